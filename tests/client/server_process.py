"""Runs the innerq binary on a free port for the client tests."""

import contextlib
import json
import pathlib
import signal
import socket
import subprocess
import tempfile
import time
import traceback
import urllib.error
import urllib.request


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Server:
    """A running server; killed at the end if it did not end by itself.

    `wrap`: a command before the server's. More keywords are subprocess.Popen's."""

    def __init__(self, binary, config, *overrides, wrap=(), **popen):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [*wrap, binary, "serve", "-c", config, "--set", f"server.port={self.port}"]
        for override in overrides:
            command += ["--set", override]
        self.process = subprocess.Popen(command, **popen)

    def __enter__(self):
        wait_until_ready(self.process, self.url)
        return self

    def __exit__(self, *unused):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def wait_until_draining(self):
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(self.url + "/ready", timeout=5).close()
            except urllib.error.HTTPError as error:
                assert error.code == 503, error
                return
            time.sleep(0.01)
        raise AssertionError("the server did not begin to drain")


@contextlib.contextmanager
def serve(binary, config, *overrides, **popen):
    """Starts a server, yields it once it is ready, and expects it to drain and exit 0."""
    with Server(binary, config, *overrides, **popen) as server:
        yield server
        server.process.send_signal(signal.SIGTERM)
        code = server.process.wait(timeout=60)
        assert code == 0, f"exit code {code} after SIGTERM"


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
            name, _, labels = key.rstrip("}").partition("{")
            labels = [label for label in labels.split(",")
                      if label and not label.startswith("model_name=")]
            samples[name + ("{" + ",".join(labels) + "}" if labels else "")] = float(value)
    return samples


def expect_interruption(command, number):
    """Starts a command that writes a file by `--json` and goes on for minutes; sends it a signal."""
    with tempfile.TemporaryDirectory() as name:
        out = pathlib.Path(name) / "a.json"
        process = subprocess.Popen([*command, "--json", out], stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True)
        while not out.exists():  # it is opened before the work begins
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        time.sleep(0.5)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == 128 + number, (process.returncode, stderr)
        assert stdout == "" and stderr == "innerq: interrupted\n", (stdout, stderr)
        assert not out.exists()


def run_tests(tests, *arguments):
    """Runs the functions of a module (its globals()) whose names begin with test_, and prints each;
    the exit code."""
    failures = 0
    for name, test in list(tests.items()):
        if not name.startswith("test_"):
            continue
        try:
            test(*arguments)
            print("ok    ", name, flush=True)
        except Exception:  # pylint: disable=broad-except
            traceback.print_exc()
            print("FAILED", name, flush=True)
            failures += 1
    return 1 if failures else 0
