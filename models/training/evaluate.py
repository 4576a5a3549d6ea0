"""Accuracy of an exported model directory in PyTorch (float32 arithmetic on the BF16 weights;
of a low-bit checkpoint, on its levels and on inputs that are rounded as the server rounds them).

python3 evaluate.py --model ../demo      (needs torch, sentencepiece, safetensors, numpy)

The figures to compare a server's with: the same sets, prompts and judging as measure.py.
"""
import argparse
import json
import os

import torch
from safetensors.torch import load_file

import data
import sigma
from measure import HERE, final_number, read_jsonl
from model import Config, Llama
from tokenizer import Tokenizer


def load(path):
    with open(os.path.join(path, "config.json")) as f:
        values = json.load(f)
    model = Llama(Config(**{k: values[k] for k in Config().to_dict()}))
    tensors = load_file(os.path.join(path, "model.safetensors"))
    if "quantization_config" in values:
        sigma.decode(model, tensors, values["quantization_config"])
    model.load_state_dict({k: v.float() for k, v in tensors.items()})
    return model, Tokenizer(os.path.join(path, "tokenizer.model"))


def main():
    ap = argparse.ArgumentParser(description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", default=os.path.join(HERE, "../demo"))
    ap.add_argument("--limit", type=int, default=0, help="at most this many items of each set")
    ap.add_argument("--shots", default="0,3")
    ap.add_argument("--threads", type=int, default=1)
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    model, tok = load(args.model)
    groups = {}

    def ask(group, prompt, max_new, judge):
        ids = [tok.bos] + tok.encode(prompt)
        new = model.generate(ids, max_new, (tok.eos, tok.im_end))
        row = groups.setdefault(group, [0, 0, 0, 0])
        for i, value in enumerate((1, judge(tok.decode(new)), new[-1] == tok.eos, len(ids))):
            row[i] += value

    problems = read_jsonl(os.path.join(args.model, "eval/problems.jsonl"), args.limit)
    for shots in (int(s) for s in args.shots.split(",")):
        examples = data.shots(shots)
        for row in problems:
            wanted = final_number(row["answer"])
            ask(f"problems, {shots}-shot", data.few_shot_prompt(row["question"], examples), 160,
                lambda text: final_number(text) == wanted)
    for row in read_jsonl(os.path.join(args.model, "eval/recall.jsonl"), args.limit):
        low = min(3, int(row["depth"] * 4)) * 25
        ask(f"recall, depth {low:2d}-{low + 25} %", row["prompt"], 32,
            lambda text: text.strip() == row["answer"])
    for name, (count, right, ended, length) in groups.items():
        print(f"{name:24} {right:4d} of {count:4d} = {right / count:6.1%}, ended by </s> "
              f"{ended / count:6.1%}, prompt {length / count:.0f} tokens")


if __name__ == "__main__":
    main()
