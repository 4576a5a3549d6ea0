#!/usr/bin/env python3
"""A chat of several turns computes only what is new in each.

Usage: test_multi_turn.py BINARY CONFIG [--turns N] [--chats N]
Asks a server with the prefix cache and one without the same questions, prints the time to the first
token of every turn (the median over the chats), how much of its prompt was found, and the ratios.
Fails if less is found than the prompt before, or if any answer differs. Standard library only.
"""

import argparse
import http.client
import json
import statistics
import time

from server_process import metrics, model_id, serve

COLORS = ("red", "green", "blue", "white", "black", "grey", "brown", "pink")
THINGS = ("lantern", "bucket", "ladder", "kettle", "basket", "hammer", "mirror", "blanket")
PAGE = 32


def question(chat, turn):
    """Some 500 tokens, different in every chat."""
    lines = []
    for i, color in enumerate(COLORS[:6]):
        for j, thing in enumerate(THINGS[:5]):
            code = (1234 * chat + 567 * turn + 89 * i + 7 * j) % 9000 + 1000
            lines.append(f"The code of the {color} {thing} is {code}.")
    asked = f"What is the code of the {COLORS[turn % 6]} {THINGS[turn % 5]}?"
    return " ".join(lines) + " " + asked


def ask(port, model, messages):
    """Seconds to the first token, the answer and its usage."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    body = {"model": model, "messages": messages, "max_tokens": 40, "temperature": 0,
            "stream": True, "stream_options": {"include_usage": True}}
    begin = time.monotonic()
    connection.request("POST", "/v1/chat/completions", json.dumps(body))
    reply = connection.getresponse()
    assert reply.status == 200, reply.read()
    first, text, usage = None, "", None
    for line in reply:
        if not line.startswith(b"data: {"):
            continue
        chunk = json.loads(line[6:])
        assert "error" not in chunk, chunk
        usage = chunk["usage"] or usage
        for choice in chunk["choices"]:
            piece = choice["delta"].get("content", "")
            if piece and first is None:
                first = time.monotonic() - begin
            text += piece
    connection.close()
    return first, text, usage


def converse(server, chats, turns):
    """Of every chat and turn: seconds, answer, usage."""
    model = model_id(server.url)
    ask(server.port, model, [{"role": "user", "content": "Hello!"}])  # whatever comes up late
    results = []
    for chat in range(chats):
        messages, rows = [], []
        for turn in range(turns):
            messages.append({"role": "user", "content": question(chat, turn)})
            rows.append(ask(server.port, model, messages))
            messages.append({"role": "assistant", "content": rows[-1][1]})
        results.append(rows)
    return results


def median_ms(results, turn):
    return 1000 * statistics.median(rows[turn][0] for rows in results)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("binary")
    parser.add_argument("config")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--chats", type=int, default=3)
    arguments = parser.parse_args()
    runs = {}
    for cached in (True, False):
        with serve(arguments.binary, arguments.config,
                   f"kv_cache.prefix_cache={json.dumps(cached)}") as server:
            runs[cached] = converse(server, arguments.chats, arguments.turns)
            hits = metrics(server.url)["vllm:prefix_cache_hits_total"]
        found = sum(row[2]["prompt_tokens_details"]["cached_tokens"]
                    for rows in runs[cached] for row in rows)
        assert hits == found and (found > 0) == cached, (hits, found)
    for warm, cold in zip(runs[True], runs[False]):
        for (_, text, usage), (_, expected, _), before in zip(warm, cold, [None, *warm]):
            assert text == expected, (text, expected)
            if before is not None:
                known = (before[2]["prompt_tokens"] - 1) // PAGE * PAGE
                assert usage["prompt_tokens_details"]["cached_tokens"] >= known, (usage, known)
    print("turn  prompt  found  first token  without the cache")
    for turn in range(arguments.turns):
        usage = runs[True][0][turn][2]
        print(f"{turn + 1:4}  {usage['prompt_tokens']:6}  "
              f"{usage['prompt_tokens_details']['cached_tokens']:5}  "
              f"{median_ms(runs[True], turn):8.1f} ms  {median_ms(runs[False], turn):14.1f} ms")
    last = arguments.turns - 1
    print(f"turn {arguments.turns} takes {median_ms(runs[True], last) / median_ms(runs[True], 0):.2f} "
          f"times as long as turn 1, without the cache "
          f"{median_ms(runs[False], last) / median_ms(runs[False], 0):.2f} times")
    print("ok")


if __name__ == "__main__":
    main()
