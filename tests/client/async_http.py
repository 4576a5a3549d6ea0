"""An HTTP/1.1 client on asyncio that can misbehave: slow, cut short, malformed. For the load tests.

Standard library only.
"""

import asyncio
import contextlib
import json
import socket
import struct


class Cut(Exception):
    """The server closed the connection where more was to come."""


def encode(method, path, body=None, headers=()):
    """A request's bytes. The body is bytes, or becomes JSON; None: no body and no length."""
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", *headers]
    if body is None:
        body = b""
    else:
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode() + body


class Reply:
    """The status and headers of an answer whose body is still to be read."""

    def __init__(self, status, headers):
        self.status = status
        self.headers = headers  # names in lower case


class Connection:
    """One TCP connection to a server on this machine. Reads are byte-exact: what follows an answer
    stays in `rest`, where an answer too many would show."""

    def __init__(self, reader, writer, pause, piece):
        self._reader = reader
        self.writer = writer
        self._pause = pause
        self._piece = piece
        self.rest = b""
        self.received = 0  # bytes

    @classmethod
    async def open(cls, port, pause=0.0, piece=1 << 16):
        """`pause`: seconds before each read of at most `piece` bytes; such a reader also keeps its
        buffers small, so that the server's writes block."""
        sock = socket.socket()
        try:
            sock.setblocking(False)
            if pause:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        except BaseException:
            sock.close()
            raise
        reader, writer = await asyncio.open_connection(sock=sock, limit=1024 if pause else 1 << 16)
        return cls(reader, writer, pause, piece)

    async def send(self, data):
        self.writer.write(data)
        await self.writer.drain()

    def close(self):
        self.writer.close()

    def reset(self):
        """Closes with a TCP reset."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def _fill(self):
        if self._pause:
            await asyncio.sleep(self._pause)
        data = await self._reader.read(self._piece)
        if not data:
            raise Cut(f"the connection ended after {self.rest[-200:]!r}")
        self.received += len(data)
        self.rest += data

    async def _line(self):
        while b"\r\n" not in self.rest:
            await self._fill()
        line, self.rest = self.rest.split(b"\r\n", 1)
        return line.decode("latin-1")

    async def _exactly(self, size):
        while len(self.rest) < size:
            await self._fill()
        data, self.rest = self.rest[:size], self.rest[size:]
        return data

    async def head(self):
        """Reads an answer's head."""
        version, status, *_ = (await self._line()).split(" ", 2)
        assert version == "HTTP/1.1", version
        headers = {}
        while line := await self._line():
            name, value = line.split(":", 1)
            headers[name.strip().lower()] = value.strip()
        return Reply(int(status), headers)

    async def pieces(self, reply):
        """The body of an answer, as it comes."""
        if "content-length" in reply.headers:
            yield await self._exactly(int(reply.headers["content-length"]))
            return
        assert reply.headers.get("transfer-encoding") == "chunked", reply.headers
        while size := int(await self._line(), 16):
            yield await self._exactly(size)
            assert await self._line() == ""
        assert await self._line() == ""

    async def body(self, reply):
        return b"".join([piece async for piece in self.pieces(reply)])

    async def events(self, reply):
        """The data of server-sent events, as text; comments are left out."""
        text = b""
        async for piece in self.pieces(reply):
            *blocks, text = (text + piece).split(b"\n\n")
            for block in blocks:
                if not block.startswith(b":"):
                    assert block.startswith(b"data: "), block
                    yield block[6:].decode()
        assert text == b"", f"half an event: {text!r}"

    async def at_end(self):
        """Whether the server has nothing more to say and closes."""
        return self.rest == b"" and await self._reader.read(1) == b""


@contextlib.asynccontextmanager
async def connect(port, **how):
    """A connection that is closed in the end."""
    connection = await Connection.open(port, **how)
    try:
        yield connection
    finally:
        connection.close()


class Answer:
    """A whole answer of either endpoint, streamed or plain, in one form that can be compared."""

    def __init__(self):
        self.id = None
        self.text = ""
        self.logprobs = []
        self.finish_reason = None
        self.completion_tokens = None

    def content(self):
        """What must not depend on other requests, nor on how the answer was delivered."""
        return (self.text, self.logprobs, self.finish_reason, self.completion_tokens)

    def add(self, part):
        """Takes a plain answer, or a chunk of a streamed one."""
        assert "error" not in part, part
        assert self.id in (None, part["id"]), f"{part['id']} in the answer {self.id}"
        self.id = part["id"]
        if part.get("usage"):
            assert self.completion_tokens is None, "usage came twice"
            self.completion_tokens = part["usage"]["completion_tokens"]
        for choice in part["choices"]:
            assert self.finish_reason is None, "a choice went on after its end"
            message = choice.get("message") or choice.get("delta") or {}
            self.text += choice.get("text") or message.get("content") or ""
            self.finish_reason = choice["finish_reason"]
            self._add_logprobs(choice.get("logprobs") or {})

    def _add_logprobs(self, block):
        if "content" in block:
            self.logprobs += block["content"] or []
        elif block:
            keys = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
            self.logprobs += map(list, zip(*(block[key] for key in keys), strict=True))


class Failed(Exception):
    """An answer with another status than 200."""

    def __init__(self, reply, body):
        super().__init__(f"status {reply.status}: {body[:300]}")
        self.status = reply.status
        self.headers = reply.headers
        self.error = json.loads(body)["error"]
        assert set(self.error) >= {"message", "type", "param", "code"}, self.error


async def read_answer(connection, streamed):
    """The answer to a completion request that was sent. Raises Failed, Cut, or AssertionError if it
    is not one whole answer with one ending."""
    reply = await connection.head()
    if reply.status != 200:
        raise Failed(reply, await connection.body(reply))
    answer = Answer()
    if streamed:
        done = False
        async for event in connection.events(reply):
            assert not done, f"after [DONE]: {event}"
            done = event == "[DONE]"
            if not done:
                answer.add(json.loads(event))
        assert done, f"a stream without [DONE] after {answer.text[-80:]!r}"
    else:
        answer.add(json.loads(await connection.body(reply)))
    assert answer.finish_reason in ("stop", "length"), answer.finish_reason
    assert connection.rest == b"", f"after the answer: {connection.rest[:200]!r}"
    return answer


async def ask(port, path, body, headers=(), **how):
    """One request on a connection of its own; its whole answer."""
    async with connect(port, **how) as connection:
        await connection.send(encode("POST", path, body, headers))
        return await read_answer(connection, body.get("stream", False))


class Known:
    """Seeded requests, and their answers when nothing else runs."""

    def __init__(self, model, count, longest=48):
        self.model = model
        self.requests = [self._request(model, number, longest) for number in range(count)]
        self.alone = []  # Answer.content() of each

    @staticmethod
    def _request(model, number, longest):
        question = f"Question {number}: " + "a key and a value, " * (number % 7 * 9)
        body = {"model": model, "seed": number, "temperature": 0 if number % 5 == 0 else 1,
                "max_tokens": 4 + number * 7 % (longest - 3), "ignore_eos": True}
        if number % 4 == 3:
            return "/v1/chat/completions", body | {
                "messages": [{"role": "user", "content": question}]} | (
                    {"logprobs": True, "top_logprobs": 2} if number % 8 == 7 else {})
        return "/v1/completions", body | {"prompt": question} | (
            {"logprobs": 2} if number % 4 == 1 else {})

    def request(self, number, streamed):
        """Path and body."""
        path, body = self.requests[number]
        if streamed:
            body = body | {"stream": True, "stream_options": {"include_usage": True}}
        return path, body

    async def ask_alone(self, port):
        """One after the other. Every second answer is streamed: how must not matter either."""
        self.alone = []
        for number in range(len(self.requests)):
            path, body = self.request(number, streamed=number % 2 == 0)
            self.alone.append((await ask(port, path, body)).content())
        texts = {content[0] for content in self.alone}
        assert len(texts) > len(self.alone) / 2, "answers that are all alike compare nothing"

    def check(self, number, answer):
        assert answer.content() == self.alone[number], (
            f"request {number} alone: {self.alone[number]}, in the crowd: {answer.content()}")
