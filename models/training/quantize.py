"""Trains a model on to low-bit weights and inputs, and writes a checkpoint for the server.

python3 quantize.py --out work/low-bit --bits 3 --activation-bits 16 --tokens 5e5

Starts from a model directory of floats, makes its layers' matrices SigmaLinear and trains them on
the data of train.py, whose environment it needs; embeddings and norms learn too and stay BF16. The
loss is the KL divergence from the distributions of the float model at every token, or with
`--loss text` the cross entropy of train.py. It writes the format of
`innerq quantize`, but of "__metadata__" only the format, not the source and the share of zeros.
"""
import argparse
import dataclasses
import json
import os
import random
import shutil
import time

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import data
import sigma
from evaluate import load
from export import write_json
from low_bit import LowBitSpec
from measure import HERE
from train import learning_rate, make_batch, window_length


def write(model, spec, source, out):
    """Writes the checkpoint; all else, such as the tokenizer, comes from directory `source`."""
    os.makedirs(out, exist_ok=True)
    for name in os.listdir(source):
        path = os.path.join(source, name)
        if os.path.isfile(path) and "safetensors" not in name and name != "config.json":
            shutil.copyfile(path, os.path.join(out, name))
    format_keys = dataclasses.asdict(spec)
    layers = sigma.low_bit_layers(model)
    tensors = {n: p.detach().to(torch.bfloat16).contiguous() for n, p in model.named_parameters()
               if not any(n.startswith(layer + ".") for layer in layers)}
    for name, layer in layers.items():
        tensors |= {f"{name}.{suffix}": t.contiguous() for suffix, t in layer.tensors().items()}
    path = os.path.join(out, "model.safetensors")
    save_file(tensors, path + ".tmp", metadata={"format": "pt"} |
              {k: str(v) for k, v in format_keys.items()})
    os.chmod(path + ".tmp", 0o644)  # the safetensors writer leaves it to its owner alone
    os.replace(path + ".tmp", path)
    with open(os.path.join(source, "config.json")) as f:
        config = json.load(f)
    config["quantization_config"] = {"quant_method": "sigma", **format_keys}
    write_json(os.path.join(out, "config.json"), config)


def divergence(teacher, ids, logits):
    """KL(teacher || model) of each next token, [rows][length]."""
    with torch.no_grad():
        wanted = F.log_softmax(teacher(ids).float(), -1)
    return F.kl_div(F.log_softmax(logits, -1), wanted, reduction="none", log_target=True).sum(-1)


def share_of_zeros(layers):
    with torch.no_grad():
        levels = [layer.quantized()[2] for layer in layers]
    return sum(int((x == 0).sum()) for x in levels) / sum(x.numel() for x in levels)


def train(model, teacher, tok, args):
    layers = list(sigma.low_bit_layers(model).values())
    alphas = [p for n, p in model.named_parameters() if n.endswith("alpha")]
    others = [p for n, p in model.named_parameters() if not n.endswith("alpha")]
    opt = torch.optim.AdamW([{"params": others, "scale": 1.0},
                             {"params": alphas, "scale": args.alpha_lr / args.lr}],
                            lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    forbidden = data.held_out_questions()
    step = seen = 0
    losses, begin = [], time.time()
    while True:
        minutes = (time.time() - begin) / 60
        progress = max(seen / args.tokens, minutes / args.minutes)
        if progress >= 1:
            break
        for layer in layers:
            layer.prune = args.prune * min(1.0, 2 * progress)  # all of it from halfway on
        for group in opt.param_groups:
            group["lr"] = learning_rate(args, progress, step) * group["scale"]
        length = window_length(0.7, random.Random(f"length-{args.seed}-{step}"))  # up to 2048
        ids, weight, _ = make_batch(tok, f"quantize-{args.seed}", step, args.batch_tokens,
                                    min(length, args.batch_tokens), forbidden)
        ids, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids).float()
            if args.loss == "kl":
                loss = divergence(teacher, ids, logits)
                weight = weight.clamp(min=data.TEXT)  # what nobody can predict has a distribution
            else:
                loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(),
                                       reduction="none").view(targets.shape)
        loss = (loss * weight).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + targets.numel()
        losses.append(float(loss.detach()))
        if step % 25 == 0:
            print(json.dumps({"step": step, "tokens": seen, args.loss: round(sum(losses) / 25, 4),
                              "zeros": round(share_of_zeros(layers), 3),
                              "minutes": round(minutes, 1)}), flush=True)
            losses = []
    for layer in layers:
        layer.prune = args.prune
    print(f"{seen} tokens in {step} steps, {minutes:.1f} minutes", flush=True)


def main():
    ap = argparse.ArgumentParser(description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", default=os.path.join(HERE, "../demo"))
    ap.add_argument("--out", required=True, help="directory of the new model")
    ap.add_argument("--scheme", default="pow2", choices=("pow2", "apot", "uniform"))
    ap.add_argument("--bits", type=int, default=3)
    ap.add_argument("--group-size", type=int, default=64)
    ap.add_argument("--activation-bits", type=int, default=16)
    ap.add_argument("--scale", default="free", choices=("free", "pow2"),
                    help="pow2: scales of weights are powers of two")
    ap.add_argument("--prune", type=float, default=0.0, help="share of weights to make zero")
    ap.add_argument("--loss", default="kl", choices=("kl", "text"))
    ap.add_argument("--tokens", type=float, default=2e6)
    ap.add_argument("--minutes", type=float, default=float("inf"), help="end by then at the latest")
    ap.add_argument("--batch-tokens", type=int, default=2048)
    ap.add_argument("--lr", type=float, default=2e-4, help="1e-3 for inputs of 3 or 4 bits")
    ap.add_argument("--alpha-lr", type=float, default=2e-3, help="of all alphas")
    ap.add_argument("--warmup", type=int, default=20)
    ap.add_argument("--decay-from", type=float, default=0.2)
    ap.add_argument("--threads", type=int, default=1)
    ap.add_argument("--seed", type=int, default=7)
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    spec = LowBitSpec(args.scheme, args.bits, args.group_size, args.activation_bits, args.scale)
    teacher, tok = load(args.model)
    model, _ = load(args.model)
    sigma.make_low_bit(model, spec)
    train(model, teacher.requires_grad_(False), tok, args)
    write(model, spec, args.model, args.out)


if __name__ == "__main__":
    main()
