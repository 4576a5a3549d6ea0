#!/usr/bin/env python3
"""Compares a server's scores of stories260K, and the harness's results, with numpy.

Usage: compare.py URL ASSETS RESULTS
ASSETS holds stories260K.bin and tok512.bin, RESULTS what lm_eval wrote with --log_samples. Passes
if no token's log-probability differs by more than 1e-3 from the implementation that rounds keys and
values to F16, as the server's cache does, no log-likelihood by more than that per token, and every
choice and every greedy text is the same.
"""

import json
import pathlib
import sys
import urllib.request

import numpy as np

import llama2c

BOUND = 1e-3  # per token, natural logarithm


def post(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)


def compare_tokens(url, model, tokenizer, texts):
    """Scores texts through the API, token by token; prints and returns the largest difference."""
    answer = post(url + "/completions", {"model": "stories", "prompt": texts, "max_tokens": 0,
                                         "echo": True, "logprobs": 1, "temperature": 0})
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    assert len(choices) == len(texts)
    stored, unstored = [], []
    for text, choice in zip(texts, choices):
        ids = tokenizer.encode(text, bos=True)
        block = choice["logprobs"]
        assert len(block["tokens"]) == len(ids), (block["tokens"], ids)
        assert block["token_logprobs"][0] is None
        scores = np.array(block["token_logprobs"][1:])
        stored.append(np.abs(scores - model.score(ids, half_cache=True)))
        unstored.append(np.abs(scores - model.score(ids)))
    stored, unstored = np.concatenate(stored), np.concatenate(unstored)
    print(f"{stored.size} tokens: log-probabilities differ by up to {stored.max():.1e} (mean "
          f"{stored.mean():.1e}); from keys and values that are not rounded to F16, by up to "
          f"{unstored.max():.1e} (mean {unstored.mean():.1e})")
    return stored.max()


def samples(results, task):
    (file,) = pathlib.Path(results).rglob(f"samples_{task}_*.jsonl")
    with open(file, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def compare_choices(model, tokenizer, items):
    """The harness's log-likelihoods of endings; the largest difference per token."""
    worst, greedy = 0, 0
    for item in items:
        ours = []
        for argument, ((value, is_greedy),) in zip(item["arguments"].values(), item["resps"]):
            context = tokenizer.encode(argument["arg_0"], bos=False)
            ids = tokenizer.encode(argument["arg_0"] + argument["arg_1"], bos=False)
            scores = model.logprobs(ids, half_cache=True)[len(context) - 1:-1]
            ending = ids[len(context):]
            ours.append(scores[np.arange(len(ending)), ending].sum())
            worst = max(worst, abs(ours[-1] - float(value)) / len(ending))
            assert str(is_greedy) == str(bool((scores.argmax(axis=1) == ending).all())), argument
            greedy += str(is_greedy) == "True"
        assert item["acc"] == (int(np.argmax(ours)) == item["doc"]["best"]), item["doc"]
    accuracy = np.mean([item["acc"] for item in items])
    print(f"{len(items)} choices: log-likelihoods differ by up to {worst:.1e} per token; accuracy "
          f"{accuracy:.2f} in both, {greedy} endings greedy in both")
    return worst


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
    model = llama2c.Model(assets / "stories260K.bin")
    tokenizer = llama2c.Tokenizer(assets / "tok512.bin", model.vocab_size)
    choices = samples(results, "stories_choice")
    texts = [f"{item['doc']['story']} {ending}" for item in choices
             for ending in item["doc"]["endings"]]
    worst = compare_tokens(url, model, tokenizer, texts)
    worst = max(worst, compare_choices(model, tokenizer, choices))
    compare_texts(model, tokenizer, samples(results, "stories_continue"))
    return 0 if worst <= BOUND else f"more than {BOUND} per token"


if __name__ == "__main__":
    sys.exit(main())
