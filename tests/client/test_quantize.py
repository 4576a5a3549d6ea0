#!/usr/bin/env python3
"""Tests `innerq quantize` from outside: options, exit codes, signals, a full disk, what it writes.

Usage: test_quantize.py BINARY CONFIG
What becomes of the weights is tested in tests/models/weight_quantizer_test.cc and
tests/server/quantize_test.cc. Standard library only.
"""

import json
import math
import pathlib
import re
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time

from server_process import run_tests

BINARY, CONFIG = sys.argv[1:3]
DEMO = pathlib.Path(CONFIG).resolve().parent.parent / "models" / "demo"
RECALL = DEMO / "eval" / "recall.jsonl"
sys.path.append(str(DEMO.parent / "training"))
import low_bit  # noqa: E402


def command(out, *arguments):
    return [BINARY, "quantize", "--threads", "1", *map(str, (DEMO, out, *arguments))]


def run(out, *arguments, **keywords):
    return subprocess.run(command(out, *arguments), capture_output=True, text=True, timeout=250,
                          check=False, **keywords)


def test_what_it_makes_is_inspected_and_answers():
    with tempfile.TemporaryDirectory() as name:
        out = pathlib.Path(name) / "out"
        done = run(out, "--scheme", "uniform", "--bits", 8, "--group-size", 128, "--head-bits", 4)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        assert "4194304 weights in 7.875 bits each" in done.stdout, done.stdout
        assert {path.name for path in pathlib.Path(name).iterdir()} == {"out"}
        config = json.loads((out / "config.json").read_text())
        assert config.pop("quantization_config") == {
            "quant_method": "sigma", "scheme": "uniform", "bits": 8, "group_size": 128,
            "activation_bits": 16, "scale": "free",
            "head": {"scheme": "apot", "bits": 4, "group_size": 128, "activation_bits": 16}}
        assert config == json.loads((DEMO / "config.json").read_text())
        for file in ("LICENSE", "tokenizer.model", "tokenizer_config.json",
                     "generation_config.json"):
            assert (out / file).read_bytes() == (DEMO / file).read_bytes()
        inspected = subprocess.run([BINARY, "inspect", out], capture_output=True, text=True,
                                   timeout=60, check=False)
        assert inspected.returncode == 0, inspected.stderr
        assert "; head apot 4-bit\n" in inspected.stdout, inspected.stdout
        answers = [subprocess.run([BINARY, "generate", "-c", CONFIG, "--set", f"model.path={path}",
                                   "-p", "Question: Tom has 12 coins. Tom buys 5 more. How many "
                                   "coins does Tom have now?\nAnswer:", "-n", "60"],
                                  capture_output=True, text=True, timeout=60, check=False)
                   for path in (DEMO, out)]
        assert "#### 17" in answers[0].stdout, answers[0]
        assert "#### 17" in answers[1].stdout, answers[1]
        again = run(out)
        assert again.returncode == 2 and "is there already" in again.stderr, again.stderr
        twice = subprocess.run([BINARY, "quantize", out, out / "again"], capture_output=True,
                               text=True, timeout=60, check=False)
        assert twice.returncode == 2 and "quantized already" in twice.stderr, twice.stderr


def read_tensor(directory, name):
    """Bytes of a tensor of a checkpoint."""
    data = (directory / "model.safetensors").read_bytes()
    header_end = 8 + int.from_bytes(data[:8], "little")
    begin, end = json.loads(data[8:header_end])[name]["data_offsets"]
    return data[header_end + begin:header_end + end]


def test_training_writes_the_same_format():
    matrix = "model.layers.2.self_attn.k_proj"
    bf16 = read_tensor(DEMO, matrix + ".weight")
    weights = [struct.unpack("<f", b"\0\0" + bf16[i:i + 2])[0] for i in range(0, len(bf16), 2)]
    for scheme, bits in (("pow2", 3), ("apot", 4), ("uniform", 3)):
        spec = low_bit.LowBitSpec(scheme, bits)
        with tempfile.TemporaryDirectory() as name:
            out = pathlib.Path(name) / "out"
            done = run(out, "--scheme", scheme, "--bits", bits)
            assert done.returncode == 0, done.stderr
            data = read_tensor(out, matrix + ".weight_codes")
            halves = read_tensor(out, matrix + ".weight_scales")
        codes = low_bit.unpack(data, bits)
        assert low_bit.pack(codes, bits) == data
        assert len(codes) == len(weights) == 128 * 256
        scales = struct.unpack(f"<{len(halves) // 2}e", halves)
        for i, (code, weight) in enumerate(zip(codes[:8192], weights)):
            values = [scales[i // 64] * level / spec.max_level for level in spec.levels]
            least = min(abs(value - weight) for value in values)
            assert abs(values[code] - weight) <= least + 1e-6, (scheme, bits, i, code, weight)


def test_scales_may_be_powers_of_two_and_matrices_pruned_by_name():
    with tempfile.TemporaryDirectory() as name:
        out = pathlib.Path(name) / "out"
        done = run(out, "--scheme", "pow2", "--bits", 3, "--scale", "pow2", "--prune", 0.5,
                   "--prune-matrix", "*.q_proj=0.7", "--prune-matrix", "model.layers.0.*=0.6")
        assert done.returncode == 0, done.stderr
        config = json.loads((out / "config.json").read_text())["quantization_config"]
        assert low_bit.LowBitSpec(config["scheme"], config["bits"], config["group_size"],
                                  config["activation_bits"], config["scale"]).scale == "pow2"
        data = read_tensor(out, "model.layers.2.self_attn.k_proj.weight_scales")
        scales = struct.unpack(f"<{len(data) // 2}e", data)
        assert all(math.frexp(scale)[0] == 0.5 for scale in scales), scales
        inspected = subprocess.run([BINARY, "inspect", out], capture_output=True, text=True,
                                   timeout=60, check=False)
        assert "pow2 3-bit, groups of 64, scales powers of two, " in inspected.stdout, inspected
        assert "weights: prune 50 %\n" in inspected.stdout, inspected
        zeros = re.search(r"weights: zeros ([0-9.]+) %\n", inspected.stdout)
        assert zeros and 50 < float(zeros[1]) < 60, inspected
        assert re.search(r'weights: source "fnv1a64:[0-9a-f]{16}"\n', inspected.stdout), inspected
        asked = '"*.q_proj=0.7,model.layers.0.*=0.6"'
        assert f"weights: prune_matrices {asked}\n" in inspected.stdout, inspected


def test_wrong_usage_is_exit_code_2():
    with tempfile.TemporaryDirectory() as name:
        for word, options in (
                ("--scheme", ["--scheme", "log"]),
                ("--bits", ["--bits", 5]),
                ("--bits", ["--scheme", "pow2", "--bits", 8]),
                ("--bits", ["--scheme", "apot", "--bits", 3]),
                ("--group-size", ["--group-size", 16]),
                ("--activation-bits", ["--activation-bits", 2]),
                ("its clip is learned from inputs", ["--activation-bits", 4]),
                ("--head-bits", ["--head-bits", 16]),
                ("--scale", ["--scale", "pow3"]),
                ("--prune", ["--prune", 0.96]),
                ("--prune-matrix: expected PATTERN=R", ["--prune-matrix", "*.q_proj"]),
                ("no matrix matches *.head", ["--prune-matrix", "*.q_proj=0.5",
                                              "--prune-matrix", "*.head=0.5"]),
                ("--prune", ["--prune", "nan"]),
                ("--calibration-tokens", ["--calibration-tokens", 0]),
                ("--threads", ["--threads", -1]),
                ("none.txt", ["--calibration", "none.txt"]),
                ("none.txt", ["--evaluate", "none.txt"])):
            done = run(pathlib.Path(name) / "out", *options)
            assert done.returncode == 2 and word in done.stderr, (options, done.stderr)
            assert done.stdout == "" and not list(pathlib.Path(name).iterdir())
    assert subprocess.run([BINARY, "quantize", DEMO], capture_output=True,
                          check=False).returncode == 2


def test_a_full_disk_is_exit_code_1_and_leaves_nothing():
    def limit_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    with tempfile.TemporaryDirectory() as name:
        done = run(pathlib.Path(name) / "out", preexec_fn=limit_files)
        assert done.returncode == 1, (done.returncode, done.stderr)
        assert "model.safetensors: File too large" in done.stderr, done.stderr
        assert done.stdout == "" and not list(pathlib.Path(name).iterdir())


def calibrating(parent):
    """Starts a long run to parent/out and returns it when its calibration has begun."""
    process = subprocess.Popen(
        command(parent / "out", "--calibration", RECALL, "--calibration-tokens", 1 << 20),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(parent.iterdir()):  # under another name, before the work begins
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    time.sleep(0.5)  # nothing tells that calibration runs; earlier a signal must do as well
    return process


def test_a_signal_ends_it_and_leaves_nothing():
    for number in (signal.SIGINT, signal.SIGTERM):
        with tempfile.TemporaryDirectory() as name:
            parent = pathlib.Path(name)
            process = calibrating(parent)
            process.send_signal(number)
            stdout, stderr = process.communicate(timeout=60)
            assert process.returncode == 128 + number, (process.returncode, stderr)
            assert stdout == "" and stderr == "innerq: interrupted\n", (stdout, stderr)
            assert not list(parent.iterdir())


def test_a_second_signal_ends_it_at_once_and_leaves_nothing():
    codes = []
    for _ in range(10):
        with tempfile.TemporaryDirectory() as name:
            parent = pathlib.Path(name)
            process = calibrating(parent)
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGTERM)  # two of a kind could count as one
            stdout, stderr = process.communicate(timeout=60)
            assert stdout == "" and not list(parent.iterdir()), (stdout, stderr)
            codes.append(process.returncode)
            if process.returncode == 128 + signal.SIGTERM:
                assert stderr == "innerq: a second SIGTERM: ending at once\n", stderr
                return
    raise AssertionError(f"the first signal was always quicker: {codes}")


if __name__ == "__main__":
    sys.exit(run_tests(globals()))
