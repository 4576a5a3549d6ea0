"""Perplexity of a model directory in PyTorch, and whether the server has the same.

python3 perplexity.py --model work/low-bit --innerq ../../build/release/innerq --limit 4

Windows and tokens are those of `innerq eval perplexity`. With --reference it also prints the KL
divergence of the distributions from those of another model, e.g. of the one before quantization.
Exit status: 1 when --innerq measures another perplexity, relatively by more than --tolerance.
"""
import argparse
import json
import math
import os
import subprocess
import sys
import tempfile

import torch
import torch.nn.functional as F

from evaluate import load
from measure import HERE

CONTEXT = 2048  # of `innerq eval perplexity`


def windows(tok, path, limit):
    """Token ids [1, up to CONTEXT] of the first documents, cut; each begins with BOS."""
    with open(path) as f:
        rows = [json.loads(line) for line in f][:limit or None]
    for row in rows:
        ids = tok.encode(f"{row['prompt']} {row['answer']}")
        pieces = [ids[i:i + CONTEXT - 1] for i in range(0, len(ids), CONTEXT - 1)]
        yield from (torch.tensor([[tok.bos] + piece]) for piece in pieces[:limit or None])


@torch.no_grad()
def measure(model, reference, texts):
    """Tokens, then the means over them: -log of the probability, KL divergence, same first word."""
    count, sums = 0, torch.zeros(3, dtype=torch.float64)
    for ids in texts:
        predicted = F.log_softmax(model(ids)[0, :-1], -1)
        sums[0] += F.nll_loss(predicted, ids[0, 1:], reduction="sum")
        if reference:
            wanted = F.log_softmax(reference(ids)[0, :-1], -1)
            sums[1] += F.kl_div(predicted, wanted, reduction="sum", log_target=True)
            sums[2] += (predicted.argmax(-1) == wanted.argmax(-1)).sum()
        count += ids.shape[1] - 1
    return count, *(sums / count).tolist()


def measure_server(args):
    """The same by the server, with a cache of F16."""
    with tempfile.TemporaryDirectory() as folder:
        result = os.path.join(folder, "result.json")
        subprocess.run([args.innerq, "eval", "perplexity", "--text", args.text, "--limit",
                        str(args.limit), "-c", os.path.join(HERE, "../../configs/fp16.json"),
                        "--set", f"model.path={os.path.abspath(args.model)}", "--json", result],
                       check=True, stdout=subprocess.DEVNULL)
        with open(result) as f:
            return json.load(f)["caches"][0]["all"]


def main():
    ap = argparse.ArgumentParser(description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", default=os.path.join(HERE, "../demo"))
    ap.add_argument("--reference", default="", help="model directory to compare with")
    ap.add_argument("--text", default=os.path.join(HERE, "../demo/eval/recall.jsonl"),
                    help='.jsonl with "prompt" and "answer"')
    ap.add_argument("--limit", type=int, default=0, help="documents, and windows of each; 0: all")
    ap.add_argument("--innerq", default="", help="the server's program, to compare with")
    ap.add_argument("--tolerance", type=float, default=1e-3)
    ap.add_argument("--threads", type=int, default=1)
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    model, tok = load(args.model)
    reference = load(args.reference)[0] if args.reference else None
    count, nll, divergence, same = measure(model, reference, windows(tok, args.text, args.limit))
    print(f"{count} tokens, perplexity {math.exp(nll):.4f}")
    if reference:
        print(f"KL divergence from {args.reference} {divergence:.4f}, "
              f"same most likely token {same:.2%}")
    if not args.innerq:
        return 0
    server = measure_server(args)
    difference = abs(server["perplexity"] / math.exp(nll) - 1)
    agree = server["tokens"] == count and difference <= args.tolerance
    print(f"the server: {server['tokens']} tokens, perplexity {server['perplexity']:.4f}, "
          f"relative difference {difference:.2e}, {'agrees' if agree else 'DIFFERS'}")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
