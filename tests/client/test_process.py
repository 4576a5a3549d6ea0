#!/usr/bin/env python3
"""Tests the innerq process: exit codes, one-line errors, signals, draining, process 1.

Usage: test_process.py BINARY CONFIG
Standard library only. Prints each test's name; exits 1 if one fails.
"""

import contextlib
import http.client
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

from server_process import Server, model_id, run_tests

BINARY, CONFIG = sys.argv[1:3]
CONFIGS = pathlib.Path(CONFIG).resolve().parent
MODEL = CONFIGS.parent / "models" / "demo"


def run(*arguments, **more):
    return subprocess.run([BINARY, *arguments], capture_output=True, text=True, timeout=60,
                          check=False, **more)


def expect_error(code, word, *arguments, **more):
    """The command fails with one line on standard error, beside its log, that has the word in it."""
    done = run(*arguments, **more)
    lines = [line for line in done.stderr.strip().splitlines() if " info innerq " not in line]
    assert done.returncode == code, (done.returncode, done.stderr)
    assert len(lines) == 1 and word in lines[0], done.stderr


def impossible_variant():
    """A variant that exists, and this machine lacks; "none" where it lacks none."""
    with open("/proc/cpuinfo", encoding="ascii") as file:
        flags = file.read().split()
    return "none" if "amx_int8" in flags else "amx"


def sanitized():
    return re.search(rb"__[at]san_init", pathlib.Path(BINARY).read_bytes()) is not None


def write_empty_model(directory, head_dim, tensor="x"):
    """A model directory of which only the headers are good: two layers, no weights to speak of."""
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
              "hidden_size": 4 * head_dim, "intermediate_size": 1024, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": head_dim,
              "vocab_size": 256, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
              "rope_theta": 10000.0, "tie_word_embeddings": True}
    (directory / "config.json").write_text(json.dumps(config))
    header = json.dumps({tensor: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    header += b" " * (-len(header) % 8)  # tensors must be aligned
    (directory / "model.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + bytes(4))


def copy_demo_model(directory, **keys):
    """The demo model with keys of its config.json replaced."""
    for file in MODEL.iterdir():
        if file.is_file():
            shutil.copy(file, directory)
    path = pathlib.Path(directory) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def start(*overrides, **how):
    return Server(BINARY, CONFIG, *overrides, **{"stderr": subprocess.DEVNULL, **how})


def stream(server, tokens):
    """Begins a streamed completion; returns the reply after its first event."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    body = {"model": model_id(server.url), "prompt": "Once", "max_tokens": tokens,
            "ignore_eos": True, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body))
    reply = connection.getresponse()
    assert reply.status == 200 and reply.readline().startswith(b"data: ")
    return reply


def test_wrong_usage_and_configuration_exit_2():
    assert run("serve").returncode == 2
    assert run("none").returncode == 2
    assert run("--version").stdout.startswith("innerq ")
    assert "there is no command serv\n" in run("serv", "-c", CONFIG).stderr
    assert "there is no command frob\n" in run("eval", "frob").stderr
    expect_error(2, "cannot read", "serve", "-c", "/none.json")
    expect_error(2, "Is a directory", "check-config", "-c", "/")
    expect_error(2, "bitz", "check-config", "-c", CONFIG, "--set", "kv_cache.key.bitz=3")
    expect_error(2, "model.path", "serve", "-c", CONFIG, "--set", "model.path=/none")


def test_the_environment_may_name_the_configuration():
    demo = {**os.environ, "INNERQ_CONFIG": CONFIG}
    assert "keys 3-bit" in run("check-config", env=demo).stdout
    assert "keys 8-bit" in run("check-config", "-c", CONFIGS / "int8.json", env=demo).stdout
    assert run("check-config", env={**os.environ, "INNERQ_CONFIG": ""}).returncode == 2


def test_check_config_refuses_what_serve_refuses():
    for path, value in (
            ("kv_cache.key.bitz", "3"),
            ("kv_cache.memory", "100KiB"),
            ("kv_cache.sink_tokens", "33"),
            ("kv_cache.key.group_size", "128"),  # heads have 64 channels
            ("kv_cache.layers.0.range", "900"),
            ("kv_cache.layers.0.value", '{"group_size": 64}'),  # a page has 32 tokens
            ("backend.variant", impossible_variant()),
            ("scheduler.max_context", "99999"),
            ("scheduler.max_context", "1"),
            ("server.api_key_file", "/dev/null"),
            ("server.key_limits", '{"concurrent_requests": 1}')):
        overrides = ["--set", f"{path}={value}"]
        if path.endswith(".value"):
            overrides = ["--set", "kv_cache.layers.0.range=1"] + overrides
        for command in ("check-config", "serve"):
            expect_error(2, path, command, "-c", CONFIG, *overrides)


def test_check_config_opens_the_weights():
    with tempfile.TemporaryDirectory() as directory:
        for file in MODEL.iterdir():
            if file.is_file() and file.suffix != ".safetensors":
                shutil.copy(file, directory)
        for command in ("check-config", "serve"):
            expect_error(2, "safetensors", command, "-c", CONFIG, "--set",
                         f"model.path={directory}")


def test_check_config_compares_the_weights_with_config_json():
    for keys, code, word in (
            ({"num_attention_heads": 130}, 2, "num_attention_heads / num_key_value_heads"),
            ({"num_hidden_layers": 6}, 1, "tensor model.layers.5.input_layernorm.weight: missing"),
            ({"intermediate_size": 769}, 1, "tensor model.layers.0.mlp.gate_proj.weight"),
            ({"attention_bias": True}, 1, "tensor model.layers.0.self_attn.q_proj.bias: missing")):
        with tempfile.TemporaryDirectory() as directory:
            copy_demo_model(directory, **keys)
            for command in ("check-config", "serve"):
                expect_error(code, word, command, "-c", CONFIG, "--set", f"model.path={directory}")


def test_paths_that_may_not_be_looked_at_are_told_in_a_line():
    with tempfile.TemporaryDirectory() as directory:
        loop = pathlib.Path(directory) / "loop"
        loop.symlink_to("loop")  # may not be followed, by root either
        expect_error(2, "cannot read", "inspect", str(loop))
        for command in ("inspect", "check-config"):
            expect_error(2, "cannot look at", command, "-c", CONFIG, "--set", f"model.path={loop}")


def test_inspect_takes_one_model():
    done = run("inspect", str(MODEL), "--set", "kv_cache.key.bits=4")
    assert done.returncode == 0 and "keys 4-bit" in done.stdout, done
    expect_error(2, "model.path", "inspect", str(MODEL), "--set", "model.path=/none")


def test_inspect_tells_how_weights_are_coded():
    with tempfile.TemporaryDirectory() as directory:
        write_empty_model(pathlib.Path(directory), head_dim=128, tensor="x.weight_codes")
        path = pathlib.Path(directory) / "config.json"
        config = json.loads(path.read_text())
        config["quantization_config"] = {"quant_method": "sigma", "scheme": "pow2", "bits": 3,
                                         "group_size": 64, "activation_bits": 16}
        path.write_text(json.dumps(config))
        done = run("inspect", directory)
        assert ("weights: pow2 3-bit, groups of 64, activations 16-bit (3.25 bits per weight)\n"
                in done.stdout), done
        config["quantization_config"]["quant_method"] = "awq"
        path.write_text(json.dumps(config))
        expect_error(2, "quantization_config.quant_method", "inspect", directory)
        config["quantization_config"]["quant_method"] = "sigma"
        write_empty_model(pathlib.Path(directory), head_dim=128)
        path.write_text(json.dumps(config))
        expect_error(1, "quantization_config: expected matrices of codes", "inspect", directory)


def test_inspect_tells_the_bits_of_the_quantized_cache():
    with tempfile.TemporaryDirectory() as directory:
        write_empty_model(pathlib.Path(directory), head_dim=128)
        done = run("inspect", "-c", str(CONFIGS / "innerq_base.json"), "--set",
                   f"model.path={directory}")
        assert "cache bits per element: 3.500 without the F16 windows" in done.stdout, done
        done = run("inspect", "-c", str(CONFIGS / "fp16.json"), "--set", f"model.path={directory}")
        assert "2048.0 in F16 pages\n" in done.stdout and "quantized" not in done.stdout, done


def test_generate_answers_on_standard_output():
    done = run("generate", "-c", CONFIG, "--chat", "-p", "Hello")
    assert done.returncode == 0 and done.stdout.strip(), done


def test_memory_that_is_not_there_is_explained():
    # Looked for before it is touched, for a system that overcommits grants any size.
    expect_error(2, "kv_cache.memory", "serve", "-c", CONFIG, "--set", "kv_cache.memory=900GiB")

    if sanitized():
        print("skipped: a sanitizer needs more addresses than the limit leaves")
        return

    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))

    for path, value in (("kv_cache.memory", "2GiB"), ("scheduler.max_batch_tokens", "1048576")):
        expect_error(2, path, "serve", "-c", CONFIG, "--set", f"{path}={value}", preexec_fn=limit)


def test_an_answer_that_cannot_be_written_is_an_error():
    with open("/dev/full", "wb") as full:
        for command in (("generate", "-c", CONFIG, "-p", "Hello"), ("inspect", CONFIG)):
            done = subprocess.run([BINARY, *command], stdout=full, stderr=subprocess.PIPE,
                                  text=True, timeout=60, check=False)
            assert done.returncode == 1 and "standard output" in done.stderr, done


def test_logs_that_cannot_be_written_stop_nothing():
    with open("/dev/full", "wb") as full, start("log.level=debug", stdout=full,
                                                stderr=full) as server:
        assert stream(server, 20).read().endswith(b"data: [DONE]\n\n")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=30) == 0


def test_closed_standard_files_stay_out_of_connections():
    """A file or socket that takes the number of a closed standard output would get the logs."""
    closed = ["sh", "-c", 'exec "$0" "$@" <&- >&- 2>&-']
    with start("log.level=debug", wrap=closed) as server:
        for number in range(3):
            name = os.readlink(f"/proc/{server.process.pid}/fd/{number}")
            assert name == "/dev/null", f"{number} is {name}"
        assert stream(server, 20).read().endswith(b"data: [DONE]\n\n")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=30) == 0


def test_a_port_in_use_exits_1():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        expect_error(1, "in use", "serve", "-c", CONFIG, "--set",
                     f"server.port={taken.getsockname()[1]}")


def test_memory_that_the_machine_lacks_is_named_with_its_size():
    expect_error(2, "kv_cache.memory", "serve", "-c", CONFIG, "--set", "kv_cache.memory=900TiB")
    done = run("serve", "-c", CONFIG, "--set", "kv_cache.memory=900TiB")
    assert "are available" in done.stderr, done.stderr


def test_damaged_weights_exit_1():
    with tempfile.TemporaryDirectory() as directory:
        model = pathlib.Path(directory) / "model"
        shutil.copytree(MODEL, model)
        weights = model / "model.safetensors"
        os.truncate(weights, weights.stat().st_size // 2)
        for command in ("serve", "check-config"):
            expect_error(1, "truncated", command, "-c", CONFIG, "--set", f"model.path={model}",
                         "--set", "server.port=0")


def test_keys_and_origins_guard_the_model_and_stay_out_of_the_log():
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory)
        (path / "keys").write_text("# ours\n\nsk-from-the-file\n")
        with (path / "log").open("wb") as log, start(
                f"server.api_key_file={path / 'keys'}", "server.key_limits.requests_per_minute=2",
                "server.cors_origins.0=https://chat.example", "log.format=json", "log.level=debug",
                stderr=log) as server:
            body = {"model": model_id(server.url), "prompt": "Once", "max_tokens": 2}

            def ask(status, **headers):
                connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
                connection.request("POST", "/v1/completions", json.dumps(body), headers)
                reply = connection.getresponse()
                reply.read()
                assert reply.status == status, (reply.status, headers)
                return reply

            key = {"Authorization": "Bearer sk-from-the-file"}
            ask(401, Authorization="Bearer sk-wrong")
            ask(403, **key, Origin="https://evil.example")
            ask(403, **key, Host="evil.example")
            reply = ask(200, **key, Origin="https://chat.example")
            assert reply.headers["Access-Control-Allow-Origin"] == "https://chat.example"
            ask(200, **key)
            assert 1 <= int(ask(429, **key).headers["Retry-After"]) <= 60
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(timeout=30) == 0
        text = (path / "log").read_text()
        assert "sk-" not in text, text
        messages = [json.loads(line)["message"] for line in text.splitlines()]
        for status in (200, 401, 403, 429):
            assert any(f"POST /v1/completions {status} in" in line for line in messages), messages


def test_a_signal_drains_running_streams():
    for number in (signal.SIGTERM, signal.SIGINT):
        with start() as server:
            reply = stream(server, 600)
            server.process.send_signal(number)
            text = reply.read().decode()
            assert text.endswith("data: [DONE]\n\n"), text[-200:]
            assert server.process.wait(timeout=30) == 0


def test_what_is_not_done_when_the_time_is_over_is_cut_with_an_error():
    with start("server.drain_seconds=0") as server:
        reply = stream(server, 3000)
        server.process.send_signal(signal.SIGTERM)
        last = reply.read().decode().strip().splitlines()[-1]
        assert "error" in json.loads(last.removeprefix("data: ")), last
        assert server.process.wait(timeout=30) == 0


def test_half_a_request_does_not_hold_the_process():
    with start("server.drain_seconds=30") as server, contextlib.ExitStack() as stack:
        half_head, half_body, idle = (stack.enter_context(
            socket.create_connection(("127.0.0.1", server.port), timeout=60)) for _ in range(3))
        half_head.sendall(b"GET /health HTT")
        half_body.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
                          b"Content-Length: 99\r\nExpect: 100-continue\r\n\r\n{")
        assert half_body.recv(4096) == b"HTTP/1.1 100 Continue\r\n\r\n"
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=10) == 0
        for half in (half_head, half_body):
            assert half.recv(4096).startswith(b"HTTP/1.1 503 ")
        assert idle.recv(4096) == b""


def test_a_signal_that_is_repeated_at_once_is_one():
    """coreutils' timeout signals the process and then its group."""
    for number in (signal.SIGTERM, signal.SIGINT):
        with start() as server:
            reply = stream(server, 600)
            server.process.send_signal(number)
            server.wait_until_draining()  # earlier the two signals could become one
            server.process.send_signal(number)
            text = reply.read().decode()
            assert text.endswith("data: [DONE]\n\n"), text[-200:]
            assert server.process.wait(timeout=30) == 0


def test_a_second_signal_ends_the_process_at_once():
    for first, number in ((signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGINT),
                          (signal.SIGTERM, signal.SIGINT)):
        with tempfile.TemporaryFile() as log, start(stderr=log) as server:
            replies = [stream(server, 3900) for _ in range(8)]  # dropped ones would be cancelled
            server.process.send_signal(first)
            server.wait_until_draining()
            if first == number:
                time.sleep(1.2)  # earlier it would be the same signal repeated
            server.process.send_signal(number)
            assert server.process.wait(timeout=5) == 128 + number
            log.seek(0)
            last = log.read().decode().splitlines()[-1]
            assert last == f"innerq: a second {number.name}: ending at once", last
            assert len(replies) == 8


def test_it_works_as_process_1():
    wrap = ["unshare", "--pid", "--fork", "--kill-child"]
    if shutil.which("unshare") is None or subprocess.run(
            [*wrap, "true"], check=False, capture_output=True).returncode != 0:
        print("skipped: no right to make a process namespace")
        return
    with start(wrap=wrap) as server:
        children = f"/proc/{server.process.pid}/task/{server.process.pid}/children"
        with open(children, encoding="ascii") as file:
            child = int(file.read().split()[0])
        os.kill(child, signal.SIGTERM)
        assert server.process.wait(timeout=30) == 0


if __name__ == "__main__":
    sys.exit(run_tests(globals()))
