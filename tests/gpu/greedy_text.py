#!/usr/bin/env python3
"""Holds two devices to the same greedy text of the demo model.

Usage: greedy_text.py BINARY CONFIG FIRST SECOND [--prompts N]
FIRST and SECOND say in what the two servers differ: settings with commas between them, of which a
bare word is a backend.device: `cpu cuda`, `cpu cpu,backend.variant=avx2`. Exit code 0: they agree;
1: they do not. Standard library only.

Half of the prompts are held-out problems, half are held-out texts of 2,000 tokens, most of which
lie in sealed pages. Each is answered greedily, first without log-probabilities (then a device may
give its largest logits alone), then with those of the best five tokens of each position, which must
not change the answer. Up to the first token that differs both devices have read the same tokens, so
up to there their logits differ by rounding alone.

The devices' disagreement at such a position is how far they differ, in nats, in the difference of
two tokens' logits: of the first device's best two, and where the answers part, of the two tokens
that were chosen. There each device prefers its own, and the disagreement is the sum of both gaps.
So one bound serves both: it holds for every position, and where answers part it says that they do
at a near tie. See MOST and most_rms.
"""
import argparse
import concurrent.futures
import contextlib
import json
import math
import pathlib
import subprocess
import sys
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "client"))

from server_process import model_id, serve  # pylint: disable=wrong-import-position

TOP = 5
# Of one position, in nats: twice the most that is seen of kernels which are known to agree. What
# is above most_rms is where an element lies so near to the border of two codes that it gets the
# other one.
#     greedy_text.py build/release/innerq configs/demo.json cpu cpu,backend.variant=avx2
# printed 0.214 with AMX as the best variant.
MOST = 0.43
# Products whose inputs are rounded to BF16, one after the other: four in each of the demo model's
# five layers, one for the logits.
ROUNDINGS = 4 * 5 + 1


def most_rms(gaps):
    """The bound of the disagreements of a set of positions, as the root of their mean square.

    Rounding to BF16 is off by up to 2^-9, 2^-9 / sqrt(3) in the mean square, so what comes of 21
    roundings is off by sqrt(21) of that. Two devices whose sums differ in order, and therefore in
    what they round, differ by sqrt(2) more. `gaps`: the differences that are off by so much.
    """
    relative = 2**-9 / math.sqrt(3) * math.sqrt(2 * ROUNDINGS)
    return relative * root_mean_square(gaps)


def root_mean_square(numbers):
    return math.sqrt(sum(x * x for x in numbers) / len(numbers))


def read_rows(name, count):
    """`count` rows of a held-out set, spread evenly over it."""
    text = (ROOT / "models" / "demo" / "eval" / name).read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    assert count <= len(rows), f"{name} has {len(rows)} rows, not {count}"
    return [rows[i * len(rows) // count] for i in range(count)]


def make_requests(count):
    """Requests by the name of their set."""
    problems, texts = read_rows("problems.jsonl", count // 2), read_rows("recall.jsonl", count // 2)
    return {
        "problems": [{"prompt": f"Question: {row['question']}\nAnswer:", "max_tokens": 160}
                     for row in problems],
        "2,000 tokens": [{"prompt": row["prompt"], "max_tokens": 32} for row in texts],
    }


def answer(server, request):
    body = json.dumps({"model": model_id(server.url), "temperature": 0, **request}).encode()
    headers = {"Content-Type": "application/json"}
    post = urllib.request.Request(server.url + "/v1/completions", body, headers)
    with urllib.request.urlopen(post, timeout=600) as reply:
        return json.load(reply)["choices"][0]


class Comparison:
    """Two devices' answers to one prompt: `gaps` and `moves` (disagreements) of the positions that
    they have in common, `parting`: what they chose in the last of these, empty if the same."""

    def __init__(self, servers, request):
        self.gaps, self.moves, self.parting = [], [], ""
        answers = []
        for server in servers:
            plain = answer(server, request)
            answers.append(answer(server, {**request, "logprobs": TOP}))
            for key in ("text", "finish_reason"):
                found = answers[-1][key]
                assert found == plain[key], (
                    f"with log-probabilities another {key}: {found!r}, not {plain[key]!r}")
        # The token that stops an answer is one of its tokens, so none is the beginning of another.
        logprobs = [each["logprobs"] for each in answers]
        for *tokens, first, second in zip(*(each["tokens"] for each in logprobs),
                                          *(each["top_logprobs"] for each in logprobs)):
            parts = tokens[0] != tokens[1]
            pair = tokens if parts else sorted(first, key=first.get)[:-3:-1]
            # A token that is not among a device's best is further off than any bound.
            gap, other = (top.get(pair[0], -math.inf) - top.get(pair[1], -math.inf)
                          for top in (first, second))
            self.gaps.append(gap)
            self.moves.append(abs(gap - other))
            if parts:
                at = len(self.moves) - 1
                self.parting = (f"token {at} is {tokens[0]!r} by {gap:.4f}, {tokens[1]!r} by "
                                f"{-other:.4f}: {answers[0]['text']!r}, {answers[1]['text']!r}")
                return
        assert answers[0]["text"] == answers[1]["text"], "equal tokens, other texts"


def report(name, comparisons):
    """Prints what was found; whether it is within the bounds."""
    moves = [move for each in comparisons for move in each.moves]
    gaps = [gap for each in comparisons for gap in each.gaps]
    assert len(moves) > 5 * len(comparisons), "answers too short to tell anything"
    partings = [each for each in comparisons if each.parting]
    rms, bound = root_mean_square(moves), most_rms(gaps)
    good = all(move <= MOST for move in moves) and rms <= bound
    print(f"{name}: {len(comparisons)} prompts, {len(partings)} answered differently; "
          f"{len(moves)} positions, disagreements up to {max(moves):.4f} (bound {MOST}), "
          f"RMS {rms:.4f} (bound {bound:.4f}){'' if good else ': FAILED'}")
    for each in partings:
        tie = "a near tie" if each.moves[-1] <= MOST else "no near tie"
        print(f"  {tie}: {each.parting}")
    return good


def settings(text):
    return [each if "=" in each else f"backend.device={each}" for each in text.split(",")]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("binary", "config", "first", "second"):
        parser.add_argument(name)
    parser.add_argument("--prompts", type=int, default=200)
    args = parser.parse_args()
    good = True
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(serve(args.binary, args.config, "log.level=warn",
                                             *settings(each), stdout=subprocess.DEVNULL))
                   for each in (args.first, args.second)]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            for name, requests in make_requests(args.prompts).items():
                compared = pool.map(lambda request: Comparison(servers, request), requests)
                good &= report(name, list(compared))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
