"""Measures how often a running innerq server solves the held-out problems and recalls codes.

python3 measure.py --url http://127.0.0.1:8080 --min-problems 0.8 --min-recall 0.85

It asks `/v1/completions` greedily (temperature 0) and needs nothing but the standard library.
Exit status: 0 when both shares reach their minimum, 1 when one does not, 2 when the server fails.
"""
import argparse
import concurrent.futures
import json
import os
import sys
import time
import urllib.error
import urllib.request

import data

HERE = os.path.dirname(os.path.abspath(__file__))


def read_jsonl(path, limit):
    with open(path) as f:
        rows = [json.loads(line) for line in f if line.strip()]
    if not limit or limit >= len(rows):
        return rows
    return [rows[i * len(rows) // limit] for i in range(limit)]  # spread evenly over the file


def final_number(text):
    """The word after the first '#### ', which ends the answer to the question asked."""
    tail = text.partition("#### ")[2].split()
    return tail[0] if tail else None


class Server:
    def __init__(self, args):
        self.args = args
        self.model = args.model or self.get("/v1/models")["data"][0]["id"]

    def get(self, path, body=None):
        headers = {"Content-Type": "application/json"}
        if self.args.api_key:
            headers["Authorization"] = "Bearer " + self.args.api_key
        payload = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.args.url.rstrip("/") + path, payload, headers)
        with urllib.request.urlopen(request, timeout=self.args.timeout) as reply:
            return json.load(reply)

    def complete(self, prompt, max_tokens, stop):
        reply = self.get("/v1/completions", {
            "model": self.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0,
            "stop": stop})
        usage = reply.get("usage") or {}
        choice = reply["choices"][0]
        return (choice["text"], choice.get("finish_reason"), usage.get("prompt_tokens") or 0,
                usage.get("completion_tokens") or 0)


def run(server, jobs, workers):
    """jobs: (group, prompt, max_tokens, stop, judge). Returns rows for the table."""
    def one(job):
        group, prompt, max_tokens, stop, judge = job
        text, reason, asked, new = server.complete(prompt, max_tokens, stop)
        return group, judge(text), reason == "stop", asked, new

    groups = {}
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for group, right, stopped, asked, new in pool.map(one, jobs):
            row = groups.setdefault(group, [0, 0, 0, 0, 0])
            for i, value in enumerate((1, right, stopped, asked, new)):
                row[i] += value
    return groups


def problem_jobs(rows, shots, group):
    examples = data.shots(shots)
    for row in rows:
        wanted = final_number(row["answer"])
        yield (group, data.few_shot_prompt(row["question"], examples), 160, ["\n\n"],
               lambda text, wanted=wanted: final_number(text) == wanted)


def recall_jobs(rows):
    for row in rows:
        depth = row.get("depth", 0)
        low = min(3, int(depth * 4)) * 25
        yield (f"recall, depth {low:2d}-{low + 25} %", row["prompt"], 32, ["\n"],
               lambda text, wanted=row["answer"]: text.strip() == wanted)


def main():
    ap = argparse.ArgumentParser(description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--url", default="http://127.0.0.1:8080")
    ap.add_argument("--model", default="", help="default: the first one the server lists")
    ap.add_argument("--api-key", default="")
    ap.add_argument("--eval-dir", default=os.path.join(HERE, "../demo/eval"))
    ap.add_argument("--limit", type=int, default=0, help="at most this many items of each set")
    ap.add_argument("--shots", default="0,3", help="worked examples before a problem")
    ap.add_argument("--concurrency", type=int, default=4)
    ap.add_argument("--timeout", type=float, default=300)
    ap.add_argument("--min-problems", type=float, default=0.0)
    ap.add_argument("--min-recall", type=float, default=0.0)
    ap.add_argument("--json", default="", help="also write the figures to this file")
    args = ap.parse_args()

    problems = read_jsonl(os.path.join(args.eval_dir, "problems.jsonl"), args.limit)
    recall = read_jsonl(os.path.join(args.eval_dir, "recall.jsonl"), args.limit)
    begin = time.time()
    try:
        server = Server(args)
        groups = {}
        for shots in (int(s) for s in args.shots.split(",")):
            groups |= run(server, problem_jobs(problems, shots, f"problems, {shots}-shot"),
                          args.concurrency)
        groups |= dict(sorted(run(server, recall_jobs(recall), args.concurrency).items()))
    except (urllib.error.URLError, OSError, KeyError, IndexError, ValueError) as error:
        detail = error.read().decode(errors="replace") if hasattr(error, "read") else ""
        print(f"the server failed: {error} {detail}", file=sys.stderr)
        return 2

    def share(prefix):
        rows = [row for name, row in groups.items() if name.startswith(prefix)]
        return sum(r[1] for r in rows) / max(1, sum(r[0] for r in rows))

    print(f"model {server.model}, {time.time() - begin:.1f} s")
    print(f"{'set':24} {'items':>6} {'right':>7} {'stopped':>8} {'prompt':>8} {'new':>7}")
    for name, (count, right, stopped, asked, new) in groups.items():
        print(f"{name:24} {count:6d} {right / count:7.1%} {stopped / count:8.1%} "
              f"{asked / count:8.0f} {new / count:7.1f}")
    figures = {"problems": share("problems"), "recall": share("recall")}
    print(f"problems {figures['problems']:.1%} (minimum {args.min_problems:.1%}), "
          f"recall {figures['recall']:.1%} (minimum {args.min_recall:.1%})")
    if args.json:
        with open(args.json, "w") as f:
            json.dump({**figures, "model": server.model, "groups": groups}, f, indent=2)
    return int(figures["problems"] < args.min_problems or figures["recall"] < args.min_recall)


if __name__ == "__main__":
    sys.exit(main())
