#!/usr/bin/env python3
"""Soaks a server in clients of every kind, twice, and looks for what is lost or left behind.

Usage: test_soak.py BINARY CONFIG [--seconds 60] [--clients 1000] [--set KEY=VALUE]... [--no-memory]
Clients read plainly, in streams or slowly, send slowly, leave at any point, ask nonsense. Passes if
- every request had exactly one ending, and every answer its own id;
- every whole answer is, logprobs included, the one that its request gets alone;
- accepted less finished requests, all gauges, open files and threads are back where they were;
- resident memory after the second round is within 1 % (or 2 MiB) of that after the first;
- the server still answers.
Standard library only.
"""

import argparse
import asyncio
import collections
import pathlib
import random
import resource
import time

from async_http import Cut, Failed, Known, connect, encode, read_answer
from server_process import metrics, model_id, serve

KNOWN = 40            # distinct requests whose answers are compared
PATIENCE = 120        # seconds that any one request may take
GAUGES = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc",
          'innerq:kv_pages_used{kind="open"}', 'innerq:kv_pages_used{kind="sealed"}')

# Requests that are wrong, and the status that says so.
NONSENSE = (
    (400, encode("POST", "/v1/completions", b'{"model": ')),
    (400, encode("POST", "/v1/completions", b"\xff\xfe{}")),
    (400, encode("POST", "/v1/completions", {"model": "MODEL", "prompt": "x", "temperature": 3})),
    (400, encode("POST", "/v1/completions", {"model": "MODEL", "prompt": "x", "typical_p": 0.5})),
    (400, encode("POST", "/v1/completions", {"model": "MODEL", "prompt": {"x": 1}})),
    (400, encode("POST", "/v1/completions", {"model": "MODEL", "prompt": "x",
                                             "max_tokens": 10**9})),
    (400, encode("POST", "/v1/chat/completions", {"model": "MODEL", "messages": []})),
    (400, b"GARBAGE\r\n\r\n"),
    (404, encode("POST", "/v1/completions", {"model": "nobody", "prompt": "x"})),
    (404, encode("GET", "/v2/completions")),
    (404, encode("POST", "/../../etc/passwd", {})),
    (405, encode("GET", "/v1/completions")),
    (411, encode("POST", "/v1/completions")),
    (413, encode("POST", "/v1/completions", None, ["Content-Length: 999999999"])),
)


class Soak:
    """The clients of one server and what became of their requests."""

    def __init__(self, server, known):
        self.url = server.url
        self.port = server.port
        self.pid = server.process.pid
        self.known = known
        self.ids = set()
        self.endings = collections.Counter()
        self.started = 0

    async def client(self, number, deadline):
        """One request after the other, of a kind drawn at random, until the deadline."""
        chance = random.Random(f"{number} {self.started}")
        kinds = (self.answered, self.kept_alive, self.slow, self.leaver, self.nonsense)
        while time.monotonic() < deadline:
            kind = chance.choices(kinds, (40, 10, 5, 30, 15))[0]
            try:
                await asyncio.wait_for(kind(chance), PATIENCE)
            except Exception as error:
                raise AssertionError(f"client {number}, {kind.__name__}: {error!r}") from error

    def end(self, ending):
        self.endings[ending] += 1

    def pick(self, chance):
        """A request with a known answer: its number, whether it is streamed, its bytes, its id or
        None if that is the server's to choose."""
        number = chance.randrange(KNOWN)
        streamed = chance.random() < 0.5
        path, body = self.known.request(number, streamed)
        self.started += 1
        name = f"soak-{self.started}" if chance.random() < 0.5 else None
        headers = [f"X-Request-Id: {name}"] if name else []
        return number, streamed, encode("POST", path, body, headers), name

    def check(self, number, name, answer):
        self.known.check(number, answer)
        assert answer.id not in self.ids, f"the id {answer.id} came twice"
        assert name is None or answer.id.split("-", 1)[1] == name, (answer.id, name)
        self.ids.add(answer.id)
        self.end("answered")

    async def answered(self, chance):
        number, streamed, data, name = self.pick(chance)
        async with connect(self.port) as connection:
            await connection.send(data)
            self.check(number, name, await read_answer(connection, streamed))

    async def kept_alive(self, chance):
        """Several requests on one connection."""
        async with connect(self.port) as connection:
            for _ in range(3):
                number, streamed, data, name = self.pick(chance)
                await connection.send(data)
                self.check(number, name, await read_answer(connection, streamed))

    async def slow(self, chance):
        """Sends in pieces, reads in small ones."""
        number, streamed, data, name = self.pick(chance)
        async with connect(self.port, pause=0.01, piece=256) as connection:
            for i in range(0, len(data), 100):
                await connection.send(data[i:i + 100])
                await asyncio.sleep(chance.random() * 0.05)
            self.check(number, name, await read_answer(connection, streamed))

    async def leaver(self, chance):
        """Leaves in the middle of its request, while it waits, or in the middle of the answer."""
        _, _, data, _ = self.pick(chance)
        async with connect(self.port) as connection:
            when = chance.randrange(3)
            await connection.send(data if when else data[:chance.randrange(len(data))])
            if when == 1:
                await asyncio.sleep(chance.random() * 2)
            elif when == 2:
                try:
                    reply = await connection.head()
                    left = chance.randrange(12)
                    async for _ in connection.pieces(reply):
                        left -= 1
                        if left < 0:
                            break
                    assert reply.status == 200, f"status {reply.status}"
                except Cut as cut:
                    raise AssertionError("the server left first") from cut
            if chance.random() < 0.5:
                connection.reset()
            self.end("left")

    async def nonsense(self, chance):
        status, data = chance.choice(NONSENSE)
        self.started += 1
        async with connect(self.port) as connection:
            await connection.send(data.replace(b"MODEL", self.known.model.encode()))
            try:
                await read_answer(connection, False)
                raise AssertionError(f"answered: {data[:200]}")
            except Failed as failed:
                assert failed.status == status, (failed, data[:200])
            assert connection.rest == b""
            self.end("refused")

    def kernel_view(self):
        """Open files, threads and resident KiB of the server."""
        proc = pathlib.Path(f"/proc/{self.pid}")
        status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
        return (len(list((proc / "fd").iterdir())), int(status["Threads"]),
                int(status["VmRSS"].split()[0]))

    def settled(self, files, threads):
        """Waits until nothing is in flight and connections are gone; metrics and resident KiB."""
        deadline = time.monotonic() + 60
        while True:
            open_files, open_threads, _ = self.kernel_view()
            now = metrics(self.url)
            wrong = [f"{gauge} is {now[gauge]}" for gauge in GAUGES if now[gauge] != 0]
            accepted = now["innerq:requests_accepted_total"]
            endings = sum(now[f'vllm:request_success_total{{finished_reason="{reason}"}}']
                          for reason in ("stop", "length", "abort", "error"))
            if not accepted == now["innerq:requests_finished_total"] == endings:
                wrong.append(f"{accepted} requests accepted, "
                             f"{now['innerq:requests_finished_total']} finished, {endings} endings")
            if (open_files, open_threads) != (files, threads):
                wrong.append(f"{open_files} files and {open_threads} threads, before {files} and "
                             f"{threads}")
            if not wrong:
                time.sleep(2.5)  # within which a quiet server gives memory back
                return now, self.kernel_view()[2]
            assert time.monotonic() < deadline, "left behind: " + "; ".join(wrong)
            time.sleep(0.1)

    async def round(self, clients, seconds):
        """All clients for so many seconds, and what they then wait for. Fails with the first of
        them."""
        start = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for number in range(clients):
                group.create_task(self.client(number, start + seconds))
        return time.monotonic() - start


def check(server, arguments):
    known = Known(model_id(server.url), KNOWN)
    soak = Soak(server, known)
    asyncio.run(known.ask_alone(soak.port))
    time.sleep(1)  # the server's end of the last connection goes, too
    files, threads, _ = soak.kernel_view()
    before, _ = soak.settled(files, threads)
    residents = []
    # The first round also warms up: thread stacks and heaps grow to what so many clients take.
    for seconds in (arguments.seconds / 4, arguments.seconds, arguments.seconds):
        took = asyncio.run(soak.round(arguments.clients, seconds))
        now, resident = soak.settled(files, threads)
        residents.append(resident)
        print(f"{arguments.clients} clients in {took:.1f} s; so far {soak.started} requests: "
              f"{dict(soak.endings)}; {now['vllm:generation_tokens_total']:.0f} tokens, "
              f"{now['vllm:num_preemptions_total']:.0f} preemptions; resident {resident} KiB",
              flush=True)
    assert sum(soak.endings.values()) == soak.started, "a request had no ending, or two"
    assert all(soak.endings[kind] for kind in ("answered", "left", "refused")), soak.endings

    def more(name):
        return now[name] - before[name]

    reasons = {reason: more(f'vllm:request_success_total{{finished_reason="{reason}"}}')
               for reason in ("stop", "length", "abort", "error")}
    done = reasons["stop"] + reasons["length"]
    answered, left = soak.endings["answered"], soak.endings["left"]
    assert reasons["error"] == 0, reasons
    # Who left may have been too late to cut its answer short, or too early to be accepted.
    assert answered <= done <= answered + left, (reasons, soak.endings)
    assert 0 < reasons["abort"] <= left, (reasons, soak.endings)
    if arguments.memory:
        growth = residents[2] - residents[1]
        bound = max(residents[1] // 100, 2048)  # a heap of this many threads has its moods
        assert growth <= bound, f"resident memory grew by {growth} KiB: {residents} KiB"
    alone = known.alone
    asyncio.run(known.ask_alone(soak.port))
    assert known.alone == alone, "the server answers otherwise than before"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("binary")
    parser.add_argument("config")
    parser.add_argument("--seconds", type=float, default=60, help="of each of two rounds")
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--set", action="append", default=[], help="as for innerq serve")
    parser.add_argument("--no-memory", dest="memory", action="store_false",
                        help="do not compare resident memory: sanitizers keep what was freed")
    arguments = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 65536)), hard))
    room = 4 * arguments.clients  # for connections whose clients left unnoticed yet
    with serve(arguments.binary, arguments.config, f"server.max_connections={room}",
               f"scheduler.max_queue={room}", *arguments.set) as server:
        check(server, arguments)
    print("ok")


if __name__ == "__main__":
    main()
