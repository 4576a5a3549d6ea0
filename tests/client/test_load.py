#!/usr/bin/env python3
"""Loads a server with clients of which half leave in the middle of their answers.

Usage: test_load.py BINARY CONFIG [CLIENTS]
Passes if every client that stays gets the very text that the same request gets alone, and
afterwards the server's gauges are zero, every accepted request has finished, and those who left
were noticed. Standard library only.
"""

import http.client
import json
import sys
import threading
import time
import urllib.parse

from server_process import metrics, model_id, serve

TOKENS = 200


class Client(threading.Thread):
    """One connection, one request; leaves after a few events if told so."""

    def __init__(self, url, model, number):
        super().__init__()
        self.address = urllib.parse.urlsplit(url).netloc
        self.number = number
        self.leaves = number % 2 == 1
        self.streams = number % 4 != 2  # of those that stay, half wait for a plain answer
        self.body = json.dumps({
            "model": model, "prompt": f"Client {number} says", "max_tokens": TOKENS,
            "ignore_eos": True, "seed": number, "stream": self.streams,
            **({"stream_options": {"include_usage": True}} if self.streams else {})})
        self.text = None  # the whole answer of a client that stays
        self.failure = "did not run"

    def run(self):
        try:
            self.failure = self.ask()
        except Exception as error:  # pylint: disable=broad-except
            self.failure = repr(error)

    def ask(self):
        connection = http.client.HTTPConnection(self.address, timeout=120)
        connection.request("POST", "/v1/completions", self.body,
                           {"Content-Type": "application/json"})
        reply = connection.getresponse()
        if reply.status != 200:
            return f"status {reply.status}: {reply.read()[:200]}"
        if self.leaves:
            for _ in range(6):
                reply.readline()
            connection.sock.close()
            reply.close()
            return None
        body = reply.read().decode()
        connection.close()
        events = [body]
        if self.streams:
            events = [line[6:] for line in body.split("\n") if line.startswith("data: ")]
            if events.pop() != "[DONE]":
                return "the stream ended without [DONE]"
        events = [json.loads(event) for event in events]
        self.text = "".join(event["choices"][0]["text"] for event in events if event["choices"])
        tokens = events[-1]["usage"]["completion_tokens"]
        return None if tokens == TOKENS else f"{tokens} tokens instead of {TOKENS}"


def settled(url, timeout=30):
    """Waits until nothing is in flight; returns the last metrics."""
    deadline = time.monotonic() + timeout
    while True:
        now = metrics(url)
        in_flight = now["innerq:requests_accepted_total"] - now["innerq:requests_finished_total"]
        if in_flight == 0 or time.monotonic() > deadline:
            return now
        time.sleep(0.05)


def check(url, count):
    model = model_id(url)
    clients = [Client(url, model, number) for number in range(count)]
    start = time.monotonic()
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    seconds = time.monotonic() - start
    failures = [client.failure for client in clients if client.failure]
    assert not failures, f"{len(failures)} clients failed, the first: {failures[0]}"

    now = settled(url)
    aborts = now['vllm:request_success_total{finished_reason="abort"}']
    print(f"{count} clients in {seconds:.1f} s, "
          f"{now['vllm:generation_tokens_total'] / seconds:.0f} tokens/s, "
          f"{now['vllm:num_preemptions_total']:.0f} preemptions, {aborts:.0f} aborts")
    assert now["innerq:requests_accepted_total"] == count
    assert now["innerq:requests_finished_total"] == count
    for gauge in ("vllm:num_requests_running", "vllm:num_requests_waiting",
                  "vllm:kv_cache_usage_perc", 'innerq:kv_pages_used{kind="open"}',
                  'innerq:kv_pages_used{kind="sealed"}'):
        assert now[gauge] == 0, f"{gauge} is {now[gauge]}"
    # Those who left were noticed: their answers were not computed to the end.
    stayed = [client for client in clients if not client.leaves]
    assert now["vllm:generation_tokens_total"] < count * TOKENS, "nobody's leaving was noticed"
    assert now['vllm:request_success_total{finished_reason="length"}'] >= len(stayed)
    assert aborts >= (count - len(stayed)) / 2, f"only {aborts:.0f} aborts"

    for client in stayed:
        alone = Client(url, model, client.number)
        alone.run()
        assert alone.failure is None, alone.failure
        assert alone.text == client.text, f"client {client.number} alone and in the crowd differ"


def main():
    binary, config = sys.argv[1:3]
    count = int(sys.argv[3]) if len(sys.argv) > 3 else 64
    with serve(binary, config) as url:
        check(url, count)
    print("ok")


if __name__ == "__main__":
    main()
