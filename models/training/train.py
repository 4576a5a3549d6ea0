"""Trains the demo model. Resumable: started again with the same --work it goes on.

torchrun --nproc-per-node 2 train.py --threads 1 --work work --tokens 28.5e6 --export ../demo

Needs torch, sentencepiece, safetensors and numpy; ../demo/README.md installs them.
One process per core that meet once a step (gloo) suffer much less from a shared machine than two
threads that meet at every operation; started with plain `python3` it is one process.
Batches are a pure function of (seed, step, rank), so a resumed run sees what an uninterrupted one
would have seen. The window length grows with progress (see PHASES); the learning rate is held and
then falls linearly over the last part, whose start depends on --tokens only, so that a run can
be made longer or shorter on the way.
"""
import argparse
import json
import os
import random
import signal
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F

import data
import export
import tokenizer
from model import Config, Llama, parameter_count

# Up to this share of all tokens: window length -> share of steps.
PHASES = ((0.35, {512: 1.0}),
          (0.55, {512: 0.3, 1024: 0.7}),
          (0.80, {512: 0.1, 1024: 0.3, 2048: 0.6}),
          (1.01, {512: 0.1, 1024: 0.2, 2048: 0.4, 4096: 0.3}))


def window_length(progress, r):
    shares = next(s for until, s in PHASES if progress < until)
    return r.choices(list(shares), list(shares.values()))[0]


def learning_rate(args, progress, step):
    warm = min(1.0, (step + 1) / args.warmup)
    if progress < args.decay_from:
        return args.lr * warm
    return args.lr * warm * max(0.02, (1 - progress) / (1 - args.decay_from))


def average_gradients(model, stop):
    """Averages over the processes; true when any of them was told to stop."""
    parts = [p.grad for p in model.parameters()]
    flat = torch.cat([g.flatten() for g in parts] + [torch.tensor([float(stop)])])
    dist.all_reduce(flat)
    at = 0
    for g in parts:
        g.copy_(flat[at:at + g.numel()].view_as(g)).div_(dist.get_world_size())
        at += g.numel()
    return float(flat[-1]) > 0


def make_batch(tok, seed, step, tokens, length, forbidden):
    """Windows filled with whole documents; the task that is furthest behind comes next."""
    r = random.Random(f"batch-{seed}-{step}")
    rows, weights, tasks = [], [], []
    used_by = {t: r.random() * 200 * data.SHARES[t] for t in data.TASKS}
    for _ in range(max(1, tokens // length)):
        ids, w, kinds, keys = [], [], [], set()
        misses = 0
        while misses < 3 and length + 1 - len(ids) > 40:
            task = min(data.TASKS, key=lambda t: used_by[t] / data.SHARES[t])
            if misses:
                task = "drill"
            room = length + 1 - len(ids)
            if task == "recall" and room < 100:
                task = "drill"
            a, b = tok.encode_document(data.document(task, r, room, keys, forbidden))
            if len(a) > room:
                misses += 1
                continue
            ids, w, kinds = ids + a, w + b, kinds + [data.TASKS.index(task)] * len(a)
            used_by[task] += len(a)
        pad = length + 1 - len(ids)
        rows.append(ids + [tok.eos] * pad)
        weights.append(w + [0.0] * pad)
        tasks.append(kinds + [0] * pad)
    return torch.tensor(rows), torch.tensor(weights)[:, 1:], torch.tensor(tasks)[:, 1:]


# ---------------------------------------------------------------- evaluation

def final_number(text):
    """What follows the last '#### ' as digits, or None."""
    _, found, tail = text.rpartition("#### ")
    return tail.split()[0] if found and tail.split() else None


@torch.no_grad()
def evaluate(model, tok, problems, per_length, lengths=(256, 1024, 2048), examples=0):
    """Greedy accuracy, in bf16, on held-out problems and on recall at several lengths."""
    result = {}
    with torch.autocast("cpu", torch.bfloat16):
        for shots in (0, 3):
            good = clean = 0
            part = problems[:len(problems) if shots == 0 else len(problems) // 2]
            worked = data.shots(shots)
            for p in part:
                ids = [tok.bos] + tok.encode(data.few_shot_prompt(p["question"], worked))
                new = model.generate(ids, 120, (tok.eos,))
                text = tok.decode(new)
                good += final_number(text) == final_number(p["answer"])
                clean += new[-1] == tok.eos and text.count("####") == 1
            result[f"problems{shots}"] = round(good / len(part), 3)
            result[f"stops{shots}"] = round(clean / len(part), 3)
        for length in lengths:
            good = 0
            for p in data.held_out_recall(per_length, length):
                ids = [tok.bos] + tok.encode(p["prompt"])
                text = tok.decode(model.generate(ids, 24, (tok.eos, tok.encode("\n")[0])))
                good += text.strip() == p["answer"]
            result[f"recall{length}"] = round(good / per_length, 3)
    return result


# ---------------------------------------------------------------- training

def save(path, state):
    torch.save(state, path + ".tmp")
    os.replace(path + ".tmp", path)


def main():
    ap = argparse.ArgumentParser(description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--work", default="work", help="checkpoint, log and tokenizer go here")
    ap.add_argument("--export", default="", help="model directory to write after an evaluation")
    ap.add_argument("--export-above", type=float, default=0.3,
                    help="export only when problems and recall together average at least this")
    ap.add_argument("--tokens", type=float, default=28.5e6)
    ap.add_argument("--batch-tokens", type=int, default=8192)
    ap.add_argument("--lr", type=float, default=2e-3)
    ap.add_argument("--warmup", type=int, default=100)
    ap.add_argument("--decay-from", type=float, default=0.7)
    ap.add_argument("--weight-decay", type=float, default=0.05)
    ap.add_argument("--layers", type=int, default=5)
    ap.add_argument("--intermediate", type=int, default=768)
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--save-minutes", type=float, default=2)
    ap.add_argument("--eval-minutes", type=float, default=7)
    ap.add_argument("--eval-problems", type=int, default=40)
    ap.add_argument("--eval-recall", type=int, default=20)
    ap.add_argument("--seed", type=int, default=7)
    ap.add_argument("--no-compile", action="store_true")
    args = ap.parse_args()

    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1:
        dist.init_process_group("gloo")
    os.makedirs(args.work, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tok_path = os.path.join(args.work, "tokenizer.model")
    if not os.path.exists(tok_path) and rank == 0:
        tokenizer.train(tok_path)
    if ranks > 1:
        dist.barrier()
    tok = tokenizer.Tokenizer(tok_path)
    problems = data.held_out_problems()
    forbidden = frozenset(p["question"] for p in problems)

    cfg = Config(num_hidden_layers=args.layers, intermediate_size=args.intermediate)
    model = Llama(cfg)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    opt = torch.optim.AdamW([{"params": matrices, "weight_decay": args.weight_decay},
                             {"params": vectors, "weight_decay": 0.0}],
                            lr=args.lr, betas=(0.9, 0.95), eps=1e-8)
    step, seen, seconds = 0, 0, 0.0
    ckpt = os.path.join(args.work, "checkpoint.pt")
    if os.path.exists(ckpt):
        state = torch.load(ckpt)
        model.load_state_dict(state["model"])
        opt.load_state_dict(state["opt"])
        step, seen, seconds = state["step"], state["seen"], state["seconds"]

    def forward(ids, targets):
        logits = model(ids).float()
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return loss.view(targets.shape), logits.argmax(-1) == targets

    run = forward if args.no_compile else torch.compile(forward, dynamic=False)
    log = open(os.path.join(args.work, "log.jsonl"), "a", buffering=1) if rank == 0 else None

    def report(row):
        if rank:
            return
        row = {"step": step, "tokens": seen, "minutes": round(seconds / 60, 1), **row}
        log.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    def checkpoint():
        if rank == 0:
            save(ckpt, {"model": model.state_dict(), "opt": opt.state_dict(), "step": step,
                        "seen": seen, "seconds": seconds, "config": cfg.to_dict()})

    def evaluation():
        if rank:
            return
        result = evaluate(model, tok, problems[:args.eval_problems], args.eval_recall)
        report({"eval": result})
        good = (result["problems0"] + result["recall1024"]) / 2
        if args.export and good >= args.export_above:
            export.write(model, tok_path, args.export)
            report({"exported": args.export})

    print(f"{parameter_count(model)} parameters, from step {step}", flush=True)
    last_save = last_eval = mark = time.time()
    mark_seen, sums = seen, {}
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))  # finish the step, save, leave
    leave = False
    while seen < args.tokens and not leave:
        begin = time.time()
        progress = seen / args.tokens
        length = window_length(progress, random.Random(f"length-{args.seed}-{step}"))
        ids, weight, task = make_batch(tok, f"{args.seed}-{rank}", step,
                                       args.batch_tokens // ranks, length, forbidden)
        lr = learning_rate(args, progress, step)
        for group in opt.param_groups:
            group["lr"] = lr
        targets = ids[:, 1:].contiguous()
        with torch.autocast("cpu", torch.bfloat16):
            loss, right = run(ids[:, :-1].contiguous(), targets)
        ((loss * weight).sum() / weight.sum()).backward()
        leave = average_gradients(model, bool(stop)) if ranks > 1 else bool(stop)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + targets.numel() * ranks
        with torch.no_grad():
            for i, name in enumerate(data.TASKS + ("first",)):
                where = (task == i) & (weight >= data.FULL)
                if name == "first":  # finding the record, without the rest of the code
                    where = weight == data.FIRST
                s = sums.setdefault(name, [0, 0.0, 0])
                s[0] += int(where.sum())
                s[1] += float(loss[where].sum())
                s[2] += int(right[where].sum())
        now = time.time()
        seconds += min(now - begin, 60)  # a stop of the process is not training time
        if step % 25 == 0:
            row = {n: [round(s[1] / max(1, s[0]), 3), round(s[2] / max(1, s[0]), 3)]
                   for n, s in sums.items()}
            report({"lr": round(lr, 6), "length": length, "norm": round(float(norm), 2),
                    "rate": round((seen - mark_seen) / (now - mark)), **row})
            mark, mark_seen, sums = now, seen, {}
        if now - last_save > 60 * args.save_minutes:
            checkpoint()
            last_save = time.time()
        if now - last_eval > 60 * args.eval_minutes:
            evaluation()
            last_eval = time.time()
    checkpoint()
    if not leave:
        evaluation()
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
