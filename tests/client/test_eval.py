#!/usr/bin/env python3
"""Tests `innerq eval` from outside: options, exit codes, signals, the files it writes.

Usage: test_eval.py BINARY CONFIG
What the tasks measure is tested in tests/server/eval_test.cc. Standard library only.
"""

import json
import pathlib
import signal
import subprocess
import sys
import tempfile

from server_process import expect_interruption, run_tests

BINARY, CONFIG = sys.argv[1:3]
CONFIGS = pathlib.Path(CONFIG).resolve().parent
EVAL = CONFIGS.parent / "models" / "demo" / "eval"
SHOTS = CONFIGS.parent / "tests" / "eval" / "shots.jsonl"
KEYS = {"task", "model", "device", "scope", "settings", "caches"}


def command(task, *arguments):
    return [BINARY, "eval", task, "-c", CONFIG, "--set", "backend.threads=1", *map(str, arguments)]


def run(task, *arguments):
    return subprocess.run(command(task, *arguments), capture_output=True, text=True, timeout=120,
                          check=False)


def test_every_task_prints_a_table_and_writes_its_files():
    tasks = {
        "perplexity": ["--text", EVAL / "recall.jsonl", "--limit", 1, "--context", 192],
        "kl": ["--text", EVAL / "recall.jsonl", "--limit", 1, "--context", 192, "--skip", 10],
        "gsm8k": ["--data", EVAL / "problems.jsonl", "--limit", 2, "--max-tokens", 100,
                  "--shots", SHOTS, "--num-shots", 1, "--chat"],
        "recall": ["--lengths", "96,128", "--depths", "0,100", "--trials", 1, "--seed", 3],
        "longgen": ["--prompt", "The code", "--prompt", "Question:", "--tokens", 20,
                    "--temperature", 1, "--seed", 2],
    }
    for task, options in tasks.items():
        with tempfile.TemporaryDirectory() as name:
            out = pathlib.Path(name)
            done = run(task, "--cache", CONFIGS / "int8.json", "--cache",
                       f"{CONFIGS / 'kivi.json'},key.bits=3", "--json", out / "a.json",
                       "--plot", out / "a.svg", *options)
            assert done.returncode == 0 and done.stderr == "", (task, done.stderr)
            for text in ("| cache ", "| fp16 ", "| int8 ", "| kivi,key.bits=3 "):
                assert text in done.stdout, done.stdout
            report = json.loads((out / "a.json").read_text())
            assert set(report) == KEYS and report["task"] == task, report
            rows = report["caches"]
            assert [row["cache"] for row in rows] == ["fp16", "int8", "kivi,key.bits=3"], rows
            assert all({"sealed_bits", "effective_bits"} <= set(row) for row in rows)
            assert (out / "a.svg").read_text().startswith("<?xml")


def test_wrong_usage_is_exit_code_2():
    text = ["--text", EVAL / "recall.jsonl"]
    for task, word, options in (
            ("kl", "--text", []), ("gsm8k", "--data", []), ("longgen", "--prompt", []),
            ("kl", "--context", [*text, "--context", 1]),
            ("kl", "bitz", [*text, "--cache", f"{CONFIG},key.bitz=2"]),
            ("kl", "none.json", [*text, "--cache", "none.json"]),
            ("recall", "--depths", ["--depths", "101"]),
            ("gsm8k", "--shots", ["--data", EVAL / "problems.jsonl", "--num-shots", 1]),
            ("gsm8k", "--shots", ["--data", SHOTS, "--shots", SHOTS]),
            ("gsm8k", "--max-tokens", ["--data", SHOTS, "--max-tokens", 2**62]),
            ("recall", "--trials", ["--trials", 2**62]),
            ("recall", "--lengths", ["--lengths", 20]),
            ("longgen", "--tokens", ["--prompt", "a", "--tokens", 2**62]),
            ("longgen", "--prompt-tokens", ["--prompt", "a", "--prompt-tokens", 2**62]),
            ("perplexity", "no.txt", ["--text", "no.txt"])):
        done = run(task, *options)
        assert done.returncode == 2 and word in done.stderr, (task, options, done.stderr)
        assert done.stdout == ""
    assert subprocess.run([BINARY, "eval"], capture_output=True, check=False).returncode == 2


def test_a_full_disk_is_exit_code_1():
    options = ["--text", EVAL / "recall.jsonl", "--limit", 1, "--context", 64]
    done = run("perplexity", *options, "--json", "/dev/full")
    assert done.returncode == 1 and "No space left on device" in done.stderr, done.stderr
    with open("/dev/full", "w", encoding="ascii") as full:
        done = subprocess.run(command("perplexity", *options), stdout=full, text=True,
                              stderr=subprocess.PIPE, timeout=60, check=False)
    assert done.returncode == 1 and "standard output" in done.stderr, done.stderr


def test_a_signal_ends_it_without_output():
    for number in (signal.SIGINT, signal.SIGTERM):
        expect_interruption(command("recall", "--trials", 100), number)


if __name__ == "__main__":
    sys.exit(run_tests(globals()))
