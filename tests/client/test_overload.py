#!/usr/bin/env python3
"""Asks more of a server than it has room for, and stops it while it is busy.

Usage: test_overload.py BINARY CONFIG
Standard library only. Prints each test's name; exits 1 if one fails.
"""

import asyncio
import collections
import contextlib
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import time

from async_http import Answer, Cut, Failed, Known, ask, connect, encode, read_answer
from server_process import Server, metrics, model_id, run_tests

BINARY, CONFIG = sys.argv[1:3]
KNOWN = 24  # distinct requests whose answers are compared
WAIT = 60  # seconds for whatever should happen soon


def start(*overrides, **popen):
    return Server(BINARY, CONFIG, *overrides, stderr=subprocess.DEVNULL, **popen)


def long_request(server, tokens, **more):
    return {"model": model_id(server.url), "prompt": "Once", "max_tokens": tokens,
            "ignore_eos": True, "temperature": 0, **more}


async def until(server, **wanted):
    """Waits for gauges of /metrics: running=1, waiting=0."""
    deadline = time.monotonic() + WAIT
    while True:
        now = await asyncio.to_thread(metrics, server.url)
        there = {name: now[f"vllm:num_requests_{name}"] for name in wanted}
        if there == wanted:
            return
        assert time.monotonic() < deadline, f"{there}, not {wanted}"
        await asyncio.sleep(0.01)


async def outcome(request):
    """An answer; or how it was refused or ended, as Failed or Cut."""
    try:
        return await request
    except (Failed, Cut) as failure:
        return failure


def check_overloaded(failed):
    assert failed.status == 503 and failed.error["code"] == "server_is_overloaded", failed
    assert 1 <= int(failed.headers["retry-after"]) <= 60, failed.headers


@contextlib.asynccontextmanager
async def streaming(server, tokens, **how):
    """A connection on which an answer is being streamed, beyond its first event."""
    async with connect(server.port, **how) as connection:
        await connection.send(encode("POST", "/v1/completions",
                                     long_request(server, tokens, stream=True)))
        reply = await connection.head()
        assert reply.status == 200, reply.status
        events = connection.events(reply)
        await anext(events)
        yield connection, events
        await events.aclose()


def test_a_full_queue_refuses_and_loses_no_place():
    async def submit(server, count, refused):
        """Sends `count` requests of which so many are refused; the tasks."""
        body = long_request(server, 2)
        tasks = [asyncio.create_task(outcome(ask(server.port, "/v1/completions", body)))
                 for _ in range(count)]
        for done in itertools.islice(asyncio.as_completed(tasks), refused):
            check_overloaded(await done)
        await until(server, running=1, waiting=4)
        assert sum(task.done() for task in tasks) == refused
        return [task for task in tasks if not task.done()]

    async def check(server):
        for _ in range(3):
            async with streaming(server, 3900):  # occupies the only place to run
                waiting = await submit(server, 12, refused=8)
                for task in waiting[:2]:  # their places are free when they leave
                    task.cancel()
                await until(server, running=1, waiting=2)
                waiting = waiting[2:] + await submit(server, 5, refused=3)
            for answer in await asyncio.gather(*waiting):
                assert isinstance(answer, Answer), answer
            await until(server, running=0, waiting=0)

    with start("scheduler.max_sequences=1", "scheduler.max_queue=4") as server:
        asyncio.run(check(server))


def test_connections_beyond_the_limit_are_refused_and_others_served():
    async def check(server):
        async def health(connection):
            await connection.send(encode("GET", "/health"))
            reply = await connection.head()
            body = await connection.body(reply)
            if reply.status != 200:
                raise Failed(reply, body)

        async def take_all_seats(stack):
            deadline = time.monotonic() + WAIT
            while True:  # places are free once the server has seen those before go
                async with contextlib.AsyncExitStack() as attempt:
                    seats = [await attempt.enter_async_context(connect(server.port)) for _ in range(8)]
                    if all([await outcome(health(seat)) is None for seat in seats]):
                        await stack.enter_async_context(attempt.pop_all())
                        return seats
                assert time.monotonic() < deadline

        for _ in range(3):
            async with contextlib.AsyncExitStack() as stack:
                seats = await take_all_seats(stack)
                async with connect(server.port) as ninth:
                    failed = await outcome(health(ninth))
                    assert isinstance(failed, Failed), failed
                    check_overloaded(failed)
                    assert await ninth.at_end()
                for seat in seats:  # those that are in have noticed nothing
                    await health(seat)

    with start("server.max_connections=8") as server:
        asyncio.run(check(server))


def test_out_of_descriptors_waits_for_some():
    def limit():
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

    async def check(server):
        short = long_request(server, 2)
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(100):
                await stack.enter_async_context(connect(server.port))
            late = asyncio.create_task(ask(server.port, "/v1/completions", short))
            files = f"/proc/{server.process.pid}/fd"
            deadline = time.monotonic() + WAIT
            while len(os.listdir(files)) < 64:
                assert time.monotonic() < deadline, "descriptors never ran out"
                await asyncio.sleep(0.01)
            assert not late.done()
        assert (await asyncio.wait_for(late, WAIT)).finish_reason == "length"

    with start(preexec_fn=limit) as server:
        asyncio.run(check(server))


def test_out_of_pages_preempts_and_answers_as_alone():
    async def check(server):
        # Short prompts: a dozen is admitted, and each grows to more than its share of the pages.
        requests = [long_request(server, 300, prompt=f"Story {i}", seed=i, temperature=1,
                                 stream=i % 2 == 0) for i in range(12)]
        crowd = await asyncio.gather(*(ask(server.port, "/v1/completions", body)
                                       for body in requests))
        now = metrics(server.url)
        assert now["vllm:num_preemptions_total"] > 0, "there were pages enough"
        assert now["innerq:recomputed_tokens_total"] > 0
        assert now['vllm:request_success_total{finished_reason="error"}'] == 0
        for body, answer in list(zip(requests, crowd))[::3]:
            alone = await ask(server.port, "/v1/completions", body)
            assert alone.text == answer.text, f"{alone.text!r} alone, {answer.text!r} in the crowd"

    with start("kv_cache.memory=3MiB", "scheduler.max_context=1024") as server:
        asyncio.run(check(server))


def test_long_texts_to_tokenize_take_bounded_memory_and_hold_up_no_completion():
    """SentencePiece takes 250 bytes of memory for each of these."""
    async def check(server):
        def peak():
            with open(f"/proc/{server.process.pid}/status", encoding="ascii") as status:
                return next(int(line.split()[1]) << 10 for line in status if "VmHWM" in line)

        async def tokenize():
            async with connect(server.port) as connection:
                await connection.send(encode("POST", "/tokenize", {"prompt": "a" * (2 << 20)}))
                reply = await connection.head()
                await connection.body(reply)
                assert reply.status == 200, reply.status

        before = peak()
        texts = [asyncio.create_task(tokenize()) for _ in range(8)]
        await asyncio.sleep(0.2)
        await ask(server.port, "/v1/completions", long_request(server, 2))
        assert not any(text.done() for text in texts), "the completion waited for a text"
        await asyncio.gather(*texts)
        assert peak() - before < 2.5e9, peak() - before  # all eight: 3.7e9

    with start() as server:
        asyncio.run(check(server))


class Crowd:
    """Clients that ask on and on until the server refuses. A request that was there before the
    signal must be answered, a later one may be refused, and none may be cut."""

    def __init__(self, server, known, number):
        self.server = server
        self.known = known
        self.number = number  # of the signal
        self.signalled = float("inf")
        self.answered_after = 0
        self.refusals = collections.Counter()

    async def client(self, number):
        streamed = number % 2 == 0
        while True:
            which = (number + sum(self.refusals.values())) % KNOWN
            path, body = self.known.request(which, streamed)
            sent = time.monotonic()
            try:
                async with connect(self.server.port) as connection:
                    await connection.send(encode("POST", path, body))
                    try:
                        answer = await read_answer(connection, streamed)
                    except (Cut, OSError) as error:
                        assert connection.received == 0, f"an answer was cut: {error!r}"
                        raise
            except (Failed, Cut, OSError) as failure:
                # A request that is sent takes a moment to be accepted.
                assert sent > self.signalled - 0.2, f"refused before the signal: {failure!r}"
                if isinstance(failure, Failed):
                    check_overloaded(failure)
                self.refusals[type(failure).__name__] += 1
                return
            self.known.check(which, answer)
            self.answered_after += sent < self.signalled < time.monotonic()

    async def run(self, count):
        async with asyncio.TaskGroup() as group:
            for number in range(count):
                group.create_task(self.client(number))
            await asyncio.sleep(1)
            self.server.process.send_signal(self.number)
            self.signalled = time.monotonic()


def test_a_signal_under_load_loses_no_accepted_request():
    for number in (signal.SIGTERM, signal.SIGINT):
        with start("scheduler.max_queue=1024") as server:
            known = Known(model_id(server.url), KNOWN)
            asyncio.run(known.ask_alone(server.port))
            crowd = Crowd(server, known, number)
            asyncio.run(crowd.run(100))
            assert server.process.wait(WAIT) == 0
            print(f"{crowd.answered_after} answers after the signal, then {crowd.refusals}")
            assert crowd.answered_after >= 50 and crowd.refusals["Failed"] > 0, crowd.refusals


def test_what_does_not_end_in_time_is_told_so():
    async def check(server):
        async with contextlib.AsyncExitStack() as stack:
            streams = [await stack.enter_async_context(streaming(server, 3900))
                       for _ in range(8)]
            plain = [asyncio.create_task(outcome(ask(server.port, "/v1/completions",
                                                     long_request(server, 3900))))
                     for _ in range(8)]
            await until(server, running=16)
            begin = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            for connection, events in streams:
                last = [event async for event in events][-1]
                assert "error" in json.loads(last), last
                assert await connection.at_end()
            for failed in await asyncio.gather(*plain):
                check_overloaded(failed)
            assert await asyncio.to_thread(server.process.wait, WAIT) == 0
            assert time.monotonic() - begin < 10

    with start("server.drain_seconds=1") as server:
        asyncio.run(check(server))


def test_clients_that_neither_read_nor_write_do_not_keep_the_process():
    async def check(server):
        async with contextlib.AsyncExitStack() as stack:
            # One reads nothing of an answer larger than all buffers, one has sent half a request.
            deaf = await stack.enter_async_context(connect(server.port, pause=1))
            await deaf.send(encode("POST", "/v1/completions",
                                   long_request(server, 3000, stream=True, logprobs=5)))
            mute = await stack.enter_async_context(connect(server.port))
            await mute.send(encode("POST", "/v1/completions", long_request(server, 9))[:-20])
            await until(server, running=1)
            begin = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(server.process.wait, WAIT) == 0
            assert time.monotonic() - begin < 10

    with start("server.drain_seconds=2") as server:
        asyncio.run(check(server))


if __name__ == "__main__":
    sys.exit(run_tests(globals()))
