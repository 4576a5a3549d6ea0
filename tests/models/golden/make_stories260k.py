"""Makes stories260k_logits.json: logits of stories260K in numpy, keys and values through F16.

python3 make_stories260k.py STORIES260K      (llama2.c's stories260K.bin and tok512.bin; needs numpy)

tests/client/lm_eval/llama2c.py computes them, with sums in F64 and without a cache, from another file format than
innerq reads. A key or value that lies between two F16 numbers may be rounded either way by a computation in
F32, by the order of its sums: "moves" says by how much that moves a logit of the row at most, in 64 runs. The
rows are the last ones of beginnings of stories, and of the short pieces of stories that it moves least.
"""
import json
import os
import pathlib
import sys

import numpy as np

LM_EVAL = pathlib.Path(os.path.abspath(__file__)).parents[2] / "client" / "lm_eval"
sys.path.insert(0, str(LM_EVAL))
import llama2c  # noqa: E402

BEGINNINGS = [8, 16, 32, 55]  # tokens: a page is not full, full, and passed
PIECES = [1, 1, 1, 2, 2, 3]  # tokens
RUNS = 64


def last_row(model, ids):
    """Logits [V] after `ids`, and how far undecided roundings move one of them."""
    noise = np.random.default_rng(1)
    row = model.logits(ids, half_cache=True)[-1]
    others = [model.logits(ids, half_cache=True, noise=noise)[-1] for _ in range(RUNS)]
    return row, np.abs(np.array(others) - row).max()


def steadiest_pieces(model, stories, size, count):
    pieces = {tuple(ids[i:i + size]) for ids in stories for i in range(1, len(ids) - size)}
    moves = {piece: last_row(model, list(piece))[1] for piece in sorted(pieces)}
    return [list(piece) for piece in sorted(moves, key=moves.get)[:count]]


def main():
    directory = pathlib.Path(sys.argv[1])
    model = llama2c.Model(directory / "stories260K.bin")
    tokenizer = llama2c.Tokenizer(directory / "tok512.bin", model.vocab_size)
    with open(LM_EVAL / "stories.jsonl", encoding="utf-8") as lines:
        stories = [tokenizer.encode(json.loads(line)["story"], bos=True) for line in lines]
    longest = max(stories, key=len)
    prompts = [longest[:size] for size in BEGINNINGS]
    for size in sorted(set(PIECES)):
        prompts += steadiest_pieces(model, stories, size, PIECES.count(size))
    rows = []
    for ids in prompts:
        row, moves = last_row(model, ids)
        print(f"{len(ids)} tokens: roundings move a logit by {moves:.1e}")
        rows.append({"token_ids": ids, "moves": float(f"{moves:.2g}"),
                     "logits": [round(float(x), 5) for x in row]})
    with open(pathlib.Path(__file__).with_name("stories260k_logits.json"), "w",
              encoding="ascii") as file:
        json.dump(rows, file, separators=(",", ":"))
        file.write("\n")


if __name__ == "__main__":
    main()
