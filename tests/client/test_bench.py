#!/usr/bin/env python3
"""Tests `innerq bench` from outside: options, exit codes, signals, the file it writes.

Usage: test_bench.py BINARY CONFIG [DEVICE]
No time is asserted. DEVICE, cpu by default, is what a whole run uses; the rest takes the reference.
Standard library only.
"""

import json
import pathlib
import signal
import subprocess
import sys
import tempfile

from server_process import expect_interruption, run_tests

BINARY, CONFIG = sys.argv[1:3]
DEVICE = sys.argv[3] if len(sys.argv) > 3 else "cpu"
CONFIGS = pathlib.Path(CONFIG).resolve().parent
# Two layers of random weights: the time of a whole run is the point of no test here.
TINY_LLAMA = pathlib.Path(__file__).resolve().parents[1] / "models/golden/tiny_llama"
KEYS = {"task", "model", "device", "scope", "settings", "version", "threads", "layers",
        "layers_of_model", "parameters", "weight_bytes", "read_bytes_per_second", "caches"}
TINY = ["--set", f"model.path={TINY_LLAMA}", "--prompt", 40]
SMALL = [*TINY, "--generate", 2, "--runs", 1]


def command(*arguments, device="reference"):
    return [BINARY, "bench", "-c", CONFIG, "--set", f"backend.device={device}",
            *map(str, arguments)]


def run(*arguments, device="reference"):
    return subprocess.run(command(*arguments, device=device), capture_output=True, text=True,
                          timeout=120, check=False)


def test_a_run_prints_a_table_and_writes_its_file():
    with tempfile.TemporaryDirectory() as name:
        out = pathlib.Path(name) / "a.json"
        done = run("--cache", CONFIGS / "fp16.json", "--cache",
                   f"{CONFIGS / 'kivi.json'},key.bits=3", "--batch", "1,3", "--depth", 170, *SMALL,
                   "--json", out, device=DEVICE)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        for text in ("| cache ", "| fp16 ", "| kivi,key.bits=3 ", " ms/step "):
            assert text in done.stdout, done.stdout
        report = json.loads(out.read_text())
        assert set(report) == KEYS and report["task"] == "bench", report
        rows = [(row["cache"], row["batch"], row["depth"]) for row in report["caches"]]
        assert rows == [("fp16", 1, 170), ("kivi,key.bits=3", 1, 170),
                        ("fp16", 3, 170), ("kivi,key.bits=3", 3, 170)], rows
        version = subprocess.run([BINARY, "--version"], capture_output=True, text=True, check=True)
        assert version.stdout == f"innerq {report['version']}\n", version.stdout
        measured = report["read_bytes_per_second"] is not None
        assert measured == (DEVICE != "reference"), report
        assert all(("floor_share" in row) == measured for row in report["caches"])


def test_wrong_usage_is_exit_code_2():
    for word, options in (
            ("no-such-shape", ["--shape", "no-such-shape"]),
            ("--batch", ["--batch", 0]), ("--batch", ["--batch", "1,0"]),
            ("--batch", ["--batch", 65]), ("--runs", ["--runs", 0]),
            ("--generate", ["--generate", 0]), ("--prompt", ["--prompt", 0]),
            ("--prompt", ["--prompt", 2**62]), ("--depth", ["--depth", -1]),
            ("4096", ["--prompt", 4000, "--generate", 100]),
            ("--shape", ["--layers", 1]), ("--layers", ["--shape", "llama-2-7b", "--layers", 99]),
            ("none.json", ["--cache", "none.json"]),
            ("bitz", ["--cache", f"{CONFIG},key.bitz=2"]),
            ("group_size", ["--cache", f"{CONFIG},key.group_size=128"]),
            ("memory", ["--cache", f"{CONFIG},memory=1GiB"])):
        done = run(*options)
        assert done.returncode == 2 and word in done.stderr, (options, done.stderr)
        assert done.stdout == ""


def test_a_full_disk_is_exit_code_1():
    done = run(*SMALL, "--json", "/dev/full")
    assert done.returncode == 1 and "No space left on device" in done.stderr, done.stderr
    with open("/dev/full", "w", encoding="ascii") as full:
        done = subprocess.run(command(*SMALL), stdout=full, text=True, stderr=subprocess.PIPE,
                              timeout=60, check=False)
    assert done.returncode == 1 and "standard output" in done.stderr, done.stderr


def test_a_signal_ends_it_without_output():
    for number in (signal.SIGINT, signal.SIGTERM):
        expect_interruption(command(*TINY, "--generate", 200, "--runs", 1000), number)


if __name__ == "__main__":
    sys.exit(run_tests(globals()))
