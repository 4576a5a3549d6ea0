#!/usr/bin/env python3
"""Hugging Face transformers with random BF16 weights: the peer of `innerq bench --shape`.

    python3 tests/gpu/peer_transformers.py [--shape llama-3.1-8b] [--layers 8] [--batch 64]
        [--depth 8064] [--prompt 64] [--generate 64] [--runs 1] [--cache static dynamic]
        [--attention sdpa] [--device cuda] [--json FILE]

The load is that of `innerq bench` with the same options: `batch` sequences, each with `depth`
tokens in the cache, then prompts of `prompt` random tokens, then `generate` greedy steps of one
token each. "prefill t/s" is of the prompts over their time, "decode t/s" of the steps over theirs,
"total t/s" of both over both; medians of several runs, after one that is not measured. A step ends
when its tokens are on the host. What is at `depth` is not timed: here it is random keys and values.

Caches are transformers' own, BF16: static (allocated once and written in place; attention goes over
all of it, with a mask) or dynamic (copied to a longer one in each step; no mask in decode). All
prompts are computed in one pass, without padding. Nothing is compiled or captured, as in
`model.generate` by default. Prints a line per cache. It is no error that torch or transformers are
missing or that a case does not fit: a line says so.
"""
import argparse
import inspect
import json
import statistics
import sys
import time

try:
    import torch
    import transformers
except ImportError as missing:
    print(f"no {missing.name} here: skipped")
    sys.exit(0)

NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings",
         "tie_word_embeddings")
SHAPES = {  # of server/bench_shapes.cc; and one to try this program with
    "llama-3.1-8b": (4096, 14336, 32, 32, 8, 128, 128256, 131072, False),
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, 64, 128256, 131072, True),
    "tiny": (64, 128, 2, 4, 2, 16, 512, 4096, True),
}


def make_model(args):
    config = transformers.LlamaConfig(**dict(zip(NAMES, SHAPES[args.shape])),
                                      attn_implementation=args.attention, pad_token_id=None,
                                      bos_token_id=None, eos_token_id=None)
    assert 0 < args.layers <= config.num_hidden_layers, "--layers: more than the shape has"
    config.num_hidden_layers = args.layers
    torch.manual_seed(1)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(args.device):
        return transformers.LlamaForCausalLM(config).eval()


def make_cache(kind, model, args, tokens):
    """A cache for `tokens` tokens of each sequence, the first `depth` of which are there."""
    config = model.config
    cache = (transformers.StaticCache(config=config, max_cache_len=tokens) if kind == "static" else
             transformers.DynamicCache(config=config))
    shape = (args.batch, config.num_key_value_heads, args.depth, config.head_dim)
    for layer in range(config.num_hidden_layers if args.depth > 0 else 0):
        keys, values = (torch.randn(shape, device=args.device) for _ in range(2))
        cache.update(keys, values, layer)
    assert int(cache.get_seq_length()) == args.depth
    return cache


@torch.inference_mode()
def run_load(model, kind, args, generate):
    """Seconds of the prompts, and of each step."""
    cache = make_cache(kind, model, args, args.depth + args.prompt + generate)
    # The keyword has another name since transformers 5.
    keyword = {"cache", "past_key_values"} & set(inspect.signature(model.forward).parameters)
    given = {keyword.pop(): cache}

    def step(tokens):
        begin = time.perf_counter()
        logits = model(input_ids=tokens, use_cache=True, logits_to_keep=1, **given).logits
        chosen = logits[:, -1].argmax(-1, keepdim=True)
        chosen.cpu()  # waits for it
        return chosen, time.perf_counter() - begin

    tokens = torch.randint(model.config.vocab_size, (args.batch, args.prompt), device=args.device)
    if args.device != "cpu":
        torch.cuda.synchronize()
    tokens, prefill = step(tokens)
    steps = []
    for _ in range(generate):
        tokens, seconds = step(tokens)
        steps.append(seconds)
    assert int(cache.get_seq_length()) == args.depth + args.prompt + generate
    return prefill, steps


def measure(model, kind, args):
    run_load(model, kind, args, min(args.generate, 4))
    runs = [run_load(model, kind, args, args.generate) for _ in range(args.runs)]
    prompts, answers = args.batch * args.prompt, args.batch * args.generate
    decode = statistics.median(sum(steps) for _, steps in runs)
    both = statistics.median(prefill + sum(steps) for prefill, steps in runs)
    return {
        "cache": kind, "batch": args.batch, "depth": args.depth,
        "prefill_tokens_per_second": prompts / statistics.median(prefill for prefill, _ in runs),
        "decode_tokens_per_second": answers / decode,
        "step_ms": 1000 * decode / args.generate,
        "total_tokens_per_second": (prompts + answers) / both,
        "runs": [{"prefill_seconds": prefill, "step_seconds": steps} for prefill, steps in runs],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    for name, default in (("layers", 8), ("batch", 64), ("depth", 8064), ("prompt", 64),
                          ("generate", 64), ("runs", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--cache", choices=("static", "dynamic"), nargs="+",
                        default=["static", "dynamic"])
    parser.add_argument("--attention", default="sdpa", help="transformers' attn_implementation")
    parser.add_argument("--device", default="cuda", help="cpu is for trying this program")
    parser.add_argument("--json", help="write all of it to this file")
    args = parser.parse_args()
    if args.depth < 0 or min(args.batch, args.prompt, args.generate, args.runs) < 1:
        parser.error("a load without work")
    if args.device != "cpu" and not torch.cuda.is_available():
        print("no GPU that torch can use: skipped")
        return 0
    device = "cpu" if args.device == "cpu" else torch.cuda.get_device_name(args.device)
    model = make_model(args)
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, {device}: "
          f"{args.shape}, {args.layers} layers, random bf16 weights, {args.attention}; prompts of "
          f"{args.prompt} tokens, then {args.generate} steps")
    print(f"{'cache':8} {'batch':>6} {'depth':>6} {'prefill t/s':>12} {'decode t/s':>11} "
          f"{'ms/step':>8} {'total t/s':>10}")
    rows = []
    for kind in args.cache:
        try:
            row = measure(model, kind, args)
        except torch.cuda.OutOfMemoryError:
            print(f"{kind:8} {args.batch:6} {args.depth:6} does not fit in memory")
            continue
        rows.append(row)
        print(f"{kind:8} {args.batch:6} {args.depth:6} {row['prefill_tokens_per_second']:12.0f} "
              f"{row['decode_tokens_per_second']:11.0f} {row['step_ms']:8.2f} "
              f"{row['total_tokens_per_second']:10.0f}", flush=True)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as out:
            json.dump({"settings": vars(args), "device": device, "torch": torch.__version__,
                       "transformers": transformers.__version__, "caches": rows}, out, indent=2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
