#!/usr/bin/env python3
"""Compares a server's scores of stories260K, and the harness's results, with numpy.

Usage: compare.py URL ASSETS RESULTS DEVICE
ASSETS holds stories260K.bin and tok512.bin, RESULTS what lm_eval wrote with --log_samples, DEVICE
is the server's. Keys and values are rounded to F16 in both. The reference device sums in F64 as
numpy does: every log-probability agrees to 1e-3, in fact to some 1e-6. Others sum in F32, and a key
that lies between two F16 numbers may go either way with the order of such a sum; this model is
sensitive, a key of 10 moves by 0.008. So numpy also tells for each token how far such roundings
move it. There every log-probability agrees to 1e-3 and that, nine in ten to 1e-3 alone, and the
mean. Passes if so, and every choice and greedy text is the same.
"""

import json
import pathlib
import sys
import urllib.request

import numpy as np

import llama2c

BOUND = 1e-3  # per token, natural logarithm
WITHIN = 0.9  # of the tokens agree to that whatever roundings do


def post(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)


def compare_tokens(url, model, tokenizer, texts, runs):
    """Scores texts through the API, token by token."""
    answer = post(url + "/completions", {"model": "stories", "prompt": texts, "max_tokens": 0,
                                         "echo": True, "logprobs": 1, "temperature": 0})
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    assert len(choices) == len(texts)
    off, free, unrounded = [], [], []
    for text, choice in zip(texts, choices):
        ids = tokenizer.encode(text, bos=True)
        block = choice["logprobs"]
        assert len(block["tokens"]) == len(ids), (block["tokens"], ids)
        assert block["token_logprobs"][0] is None
        scores = np.array(block["token_logprobs"][1:])
        expected, moves = model.score_as_stored(ids, runs)
        off.append(np.abs(scores - expected))
        free.append(moves)
        unrounded.append(np.abs(scores - model.score(ids)))
    off, free, unrounded = map(np.concatenate, (off, free, unrounded))
    print(f"{off.size} tokens: log-probabilities are off by {off.mean():.1e} in the mean and "
          f"{off.max():.1e} at most, {(off <= BOUND).mean():.1%} of them by no more than {BOUND}; "
          f"undecided roundings move them by up to {free.max():.1e}; without rounding to F16 they "
          f"would be off by {unrounded.mean():.1e} and {unrounded.max():.1e}")
    assert off.mean() <= BOUND and (off <= BOUND + free).all(), (off - free).max()
    assert (off <= BOUND).mean() >= WITHIN, (off <= BOUND).mean()


def samples(results, task):
    (file,) = pathlib.Path(results).rglob(f"samples_{task}_*.jsonl")
    with open(file, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def compare_choices(model, tokenizer, items, runs):
    """The harness's log-likelihoods of endings, and which one it chose."""
    off, greedy = [], 0
    for item in items:
        ours = []
        for argument, ((value, is_greedy),) in zip(item["arguments"].values(), item["resps"]):
            context = tokenizer.encode(argument["arg_0"], bos=False)
            ids = tokenizer.encode(argument["arg_0"] + argument["arg_1"], bos=False)
            ending = slice(len(context) - 1, None)
            scores, moves = (values[ending] for values in model.score_as_stored(ids, runs))
            ours.append(scores.sum())
            off.append(abs(ours[-1] - float(value)) / scores.size)
            assert off[-1] <= BOUND + moves.mean(), (argument, off[-1], moves)
            best = model.logprobs(ids, half_cache=True)[ending][:-1].argmax(axis=1)
            assert str(is_greedy) == str(list(best) == ids[len(context):]), argument
            greedy += str(is_greedy) == "True"
        assert item["acc"] == (int(np.argmax(ours)) == item["doc"]["best"]), item["doc"]
    print(f"{len(off)} endings: log-likelihoods are off by {np.mean(off):.1e} per token in the "
          f"mean and {max(off):.1e} at most; accuracy {np.mean([item['acc'] for item in items]):.2f} in "
          f"both, {greedy} endings greedy in both")
    assert np.mean(off) <= BOUND


def compare_texts(model, tokenizer, items):
    """The harness's greedy continuations."""
    for item in items:
        (argument,) = item["arguments"].values()
        ids = tokenizer.encode(argument["arg_0"], bos=False)
        text = tokenizer.decode(model.continue_greedily(ids, 16)).split("\n")[0]
        assert item["resps"] == [[text]], (item["resps"], text)
    print(f"{len(items)} continuations are the same")


def main():
    url, assets, results = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3]
    runs = 0 if sys.argv[4] == "reference" else 16  # of undecided roundings
    model = llama2c.Model(assets / "stories260K.bin")
    tokenizer = llama2c.Tokenizer(assets / "tok512.bin", model.vocab_size)
    choices = samples(results, "stories_choice")
    texts = [f"{item['doc']['story']} {ending}" for item in choices
             for ending in item["doc"]["endings"]]
    compare_tokens(url, model, tokenizer, texts, runs)
    compare_choices(model, tokenizer, choices, runs)
    compare_texts(model, tokenizer, samples(results, "stories_continue"))


if __name__ == "__main__":
    main()
