"""Runs the innerq binary on a free port for the client tests."""

import contextlib
import json
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def serve(binary, config, *overrides):
    """Starts a server, yields its base URL once it is ready, and expects it to drain and exit 0."""
    port = free_port()
    command = [binary, "serve", "-c", config, "--set", f"server.port={port}"]
    for override in overrides:
        command += ["--set", override]
    process = subprocess.Popen(command)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(process, url)
        yield url
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0, f"exit code {process.returncode} after SIGTERM"
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def wait_until_ready(process, url, timeout=120):
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the server ended with exit code {process.returncode}"
        try:
            with urllib.request.urlopen(url + "/ready", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.05)
    raise AssertionError("the server did not become ready")


def model_id(url):
    with urllib.request.urlopen(url + "/v1/models", timeout=10) as reply:
        return json.load(reply)["data"][0]["id"]


def metrics(url):
    """Samples of /metrics: name with labels (without the model's) to value."""
    with urllib.request.urlopen(url + "/metrics", timeout=10) as reply:
        lines = reply.read().decode().splitlines()
    samples = {}
    for line in lines:
        if not line.startswith("#"):
            key, value = line.rsplit(" ", 1)
            name, labels = key.rstrip("}").split("{", 1)
            labels = [label for label in labels.split(",") if not label.startswith("model_name=")]
            samples[name + ("{" + ",".join(labels) + "}" if labels else "")] = float(value)
    return samples
