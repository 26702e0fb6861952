"""A reverse proxy in front of a real S3 server that does, on demand, what networks and object stores do on bad days.

    with FaultProxy(server) as proxy:
        url = server.url(bucket, "app", endpoint=proxy.endpoint)
        rule = proxy.add(Fault.SLOW_DOWN, method="GET", count=3)
        ...
        assert rule.strikes == 3

HTTP/1.1, one thread, one upstream connection for each client connection. A request passes with the bytes that it came
with, its Host header above all: SigV4 signs it, and the server checks the signature against what it was sent.

A rule counts a strike only when a reply was really spoilt: "a wrong Content-Range" does not strike a reply that has
none. Of several rules that fit a request the first that strikes is the only one; delays add up.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import random
import re
import socket
import struct
import threading
from collections import deque
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar
from urllib.parse import unquote, urlsplit

from support.servers import S3Server

T = TypeVar("T")
_HEAD_LIMIT = 64 << 10
_LISTINGS = 12
"""Different answers to one LIST that are remembered, for `Fault.STALE_LISTING`."""


class Fault(enum.Enum):
    """What can go wrong. Before the server is asked, or with its reply."""

    DELAY = "delay"
    """The reply comes `seconds` later."""
    STALL = "stall"
    """No reply, ever: the connection stays open until the rule is switched off or the client gives up."""
    SERVER_ERROR = "500"
    SLOW_DOWN = "503"
    TOO_MANY = "429"
    NOT_FOUND = "404"
    """NoSuchKey, though a listing shows the object."""
    EXPIRED = "expired"
    """403 ExpiredToken."""
    RESET = "reset"
    """Half of the body, then a TCP reset."""
    TRUNCATED = "truncated"
    """Half of the body that Content-Length announces, then an orderly end."""
    WRONG_RANGE = "wrong-range"
    """A Content-Range that begins one byte later than what was asked for."""
    WHOLE_BODY = "whole-body"
    """200 and the whole object where a range was asked for."""
    FLIPPED = "flipped"
    """One byte of the body inverted."""
    STALE_LISTING = "stale-listing"
    """An answer that the same LIST had earlier, and that is no longer true."""


_ANSWERS = {
    Fault.SERVER_ERROR: (500, "InternalError"),
    Fault.SLOW_DOWN: (503, "SlowDown"),
    Fault.TOO_MANY: (429, "TooManyRequests"),
    Fault.NOT_FOUND: (404, "NoSuchKey"),
    Fault.EXPIRED: (403, "ExpiredToken"),
}


@dataclass
class Rule:
    """One fault, and which requests it strikes. `on` and `count` may be changed at any time, from any thread."""

    fault: Fault
    method: str | None = None
    """GET (an object), LIST, HEAD, PUT, ...; None: any."""
    key: re.Pattern[str] = re.compile("")
    """Searched for in the request's decoded path, ``/bucket/app/0000/...ltx``; for a LIST in its query too."""
    header: re.Pattern[str] = re.compile("")
    """Searched for in the request's head, line by line as it was sent."""
    chance: float = 1.0
    count: int | None = None
    """Strikes that are left; None: no limit."""
    seconds: float = 0.0
    """Of a `Fault.DELAY`."""
    largest: int | None = None
    """Only objects of at most so many bytes."""
    seed: int = 0
    on: bool = True
    strikes: int = 0
    """How often the rule has struck."""
    _rng: random.Random = field(init=False, repr=False)
    _off: asyncio.Event = field(default_factory=asyncio.Event, repr=False)

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)

    def fits(self, request: _Request) -> bool:
        if not self.on or self.count == 0 or (self.method and self.method != request.method):
            return False
        return bool(self.key.search(request.place) and self.header.search(request.text)) and (
            self.chance >= 1 or self._rng.random() < self.chance
        )

    def strike(self) -> None:
        self.strikes += 1
        if self.count is not None:
            self.count -= 1


@dataclass(frozen=True)
class _Request:
    method: str
    target: str
    head: bytes
    body: bytes

    @property
    def text(self) -> str:
        return self.head.decode("latin-1")

    @property
    def place(self) -> str:
        return unquote(self.target if self.method == "LIST" else urlsplit(self.target).path)

    @property
    def verb(self) -> str:
        """The method as it stands in the request."""
        return self.head.split(b" ", 1)[0].decode()


@dataclass
class _Reply:
    status: int
    reason: str
    fields: list[tuple[str, str]]
    """Without those that frame the body."""
    body: bytes
    closes: bool = False
    length: int | None = None
    """What Content-Length says where there is no body: in answers to HEAD."""

    def get(self, name: str) -> str:
        return next((value for key, value in self.fields if key.lower() == name), "")

    def put(self, name: str, value: str) -> None:
        self.fields = [each for each in self.fields if each[0].lower() != name.lower()] + [(name, value)]

    @property
    def size(self) -> int:
        """Bytes of the whole object."""
        total = self.get("content-range").rpartition("/")[2]
        return int(total) if total.isdigit() else len(self.body)

    def encoded(self) -> bytes:
        """The reply's head."""
        fields = [*self.fields, ("Content-Length", str(len(self.body) if self.length is None else self.length))]
        text = "".join(f"{name}: {value}\r\n" for name, value in fields)
        return f"HTTP/1.1 {self.status} {self.reason}\r\n{text}\r\n".encode("latin-1")


class FaultProxy:
    """Listens on a port of its own from `__enter__` to `__exit__`; `refuse` takes it away, `listen` brings it back.

    Every method may be called from any thread.
    """

    def __init__(self, server: S3Server) -> None:
        self._server = server
        self._upstream = ("127.0.0.1", server.port)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="faultproxy", daemon=True)
        self._listener: asyncio.Server | None = None
        self._clients: set[asyncio.Task[None]] = set()
        self._rules: list[Rule] = []
        self._listings: dict[str, deque[bytes]] = {}
        self._outage: asyncio.TimerHandle | None = None
        self.port = 0
        self.requests: dict[str, int] = {}
        """Requests that came, by method (LIST apart from GET)."""
        self.refusals = 0
        """How often the listening socket was closed."""

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._thread.start()
        self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()
        self.refuse()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    # -- rules --

    def add(self, fault: Fault, *, key: str = "", header: str = "", **more: Any) -> Rule:
        """A new rule, on from now; `key` and `header` are regular expressions, the rest are fields of `Rule`."""
        rule = Rule(fault, key=re.compile(key), header=re.compile(header, re.IGNORECASE | re.MULTILINE), **more)
        self._rules = [*self._rules, rule]  # a new list: the loop may be walking the old one
        return rule

    def remove(self, rule: Rule) -> None:
        """Switch a rule off, and let go what it stalls. Its count stays readable."""
        rule.on = False
        self._rules = [each for each in self._rules if each is not rule]
        self._loop.call_soon_threadsafe(rule._off.set)

    def clear(self) -> None:
        """Switch every rule off."""
        for rule in self._rules:
            self.remove(rule)

    @contextlib.contextmanager
    def during(self, fault: Fault, **more: Any) -> Iterator[Rule]:
        """A rule for the block."""
        rule = self.add(fault, **more)
        try:
            yield rule
        finally:
            self.remove(rule)

    # -- the listening socket --

    def listen(self) -> None:
        """Accept connections (again, at the same port)."""
        self._do(self._listen())

    def refuse(self, seconds: float | None = None) -> None:
        """Drop every connection and refuse new ones, until `listen` is called or for so many seconds."""
        self._do(self._refuse(seconds))

    async def _listen(self) -> None:
        if self._outage is not None:
            self._outage.cancel()
            self._outage = None
        if self._listener is None:
            self._listener = await asyncio.start_server(
                self._accept, "127.0.0.1", self.port, limit=_HEAD_LIMIT, backlog=512, reuse_address=True
            )
            self.port = self._listener.sockets[0].getsockname()[1]

    async def _refuse(self, seconds: float | None) -> None:
        if self._listener is not None:
            self.refusals += 1
            self._listener.close()
            self._listener = None
        clients = list(self._clients)
        for task in clients:
            task.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
        if seconds is not None:
            self._outage = self._loop.call_later(seconds, lambda: self._loop.create_task(self._listen()))

    # -- one client connection --

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients.add(task)
        upstream = _Upstream(self._upstream)
        try:
            while request := await _read_request(reader):
                self.requests[request.method] = self.requests.get(request.method, 0) + 1
                if not await self._serve(request, reader, writer, upstream):
                    break
        except (OSError, EOFError, asyncio.LimitOverrunError):
            pass  # either side may go away at any time
        except asyncio.CancelledError:
            _reset(writer)
        finally:
            self._clients.discard(task)
            upstream.close()
            writer.close()

    async def _serve(
        self, request: _Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, upstream: _Upstream
    ) -> bool:
        """Answer one request; False ends the connection."""
        rules = [rule for rule in self._rules if rule.fits(request)]
        for rule in rules:
            if rule.count == 0:  # while others were served; between this check and the strike nobody else is
                continue
            if rule.fault is Fault.DELAY:
                rule.strike()
                await asyncio.sleep(rule.seconds)
            elif rule.fault is Fault.STALL:
                rule.strike()
                await _either(rule._off.wait(), reader.read(1))
                return False
            elif rule.fault in _ANSWERS and rule.largest is None:
                rule.strike()
                await _send(request, _refusal(*_ANSWERS[rule.fault]), writer)
                return True
        reply = await upstream.ask(request)
        listing = request.method == "LIST" and reply.status == 200
        earlier = self._remember(request, reply) if listing else []
        for rule in rules:
            if rule.count == 0 or (rule.largest is not None and reply.size > rule.largest):
                continue
            ended = await self._spoil(rule, request, reply, earlier, writer)
            if ended is not None:
                return ended
        await _send(request, reply, writer)
        return not reply.closes

    async def _spoil(
        self, rule: Rule, request: _Request, reply: _Reply, earlier: list[bytes], writer: asyncio.StreamWriter
    ) -> bool | None:
        """Send the reply with the rule's fault, and say whether the connection goes on; None: it does not strike."""
        fault, body = rule.fault, reply.body
        good = reply.status < 300 and request.verb == "GET"
        half = len(body) // 2
        if fault in _ANSWERS:
            reply = _refusal(*_ANSWERS[fault])
        elif fault is Fault.STALE_LISTING and earlier:
            reply.body = rule._rng.choice(earlier)
        elif not good:
            return None
        elif fault in (Fault.RESET, Fault.TRUNCATED) and half:
            rule.strike()
            writer.write(reply.encoded() + body[:half])
            await writer.drain()
            if fault is Fault.RESET:
                await asyncio.sleep(0.005)  # a reset takes with it what the client has not read yet
                _reset(writer)
            return False
        elif fault is Fault.WRONG_RANGE and reply.get("content-range"):
            first, rest = reply.get("content-range").removeprefix("bytes ").split("-", 1)
            reply.put("Content-Range", f"bytes {int(first) + 1}-{rest}")
        elif fault is Fault.WHOLE_BODY and reply.get("content-range"):
            whole = await asyncio.to_thread(self._whole, request)
            if whole is None or rule.count == 0:  # removed meanwhile, or others were struck
                return None
            reply.fields = [each for each in reply.fields if each[0].lower() != "content-range"]
            reply.status, reply.reason, reply.body = 200, "OK", whole
        elif fault is Fault.FLIPPED and body:
            place = rule._rng.randrange(len(body))
            reply.body = body[:place] + bytes([body[place] ^ 0xFF]) + body[place + 1 :]
        else:
            return None
        rule.strike()
        await _send(request, reply, writer)
        return not reply.closes

    def _remember(self, request: _Request, reply: _Reply) -> list[bytes]:
        """Earlier answers to this LIST that differ from the present one."""
        known = self._listings.setdefault(request.target, deque(maxlen=_LISTINGS))
        earlier = [body for body in known if body != reply.body]
        if not known or known[-1] != reply.body:
            known.append(reply.body)
        return earlier

    def _whole(self, request: _Request) -> bytes | None:
        """The whole object, if it is there. With a request of our own: the client has signed its Range header."""
        from botocore.exceptions import ClientError

        bucket, _, key = unquote(urlsplit(request.target).path).lstrip("/").partition("/")
        client = self._server.client()
        with contextlib.closing(client):
            try:
                return bytes(client.get_object(Bucket=bucket, Key=key)["Body"].read())
            except ClientError:
                return None


class _Upstream:
    """The server's side of one client connection."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: _Request) -> _Reply:
        fresh = self._streams is None
        try:
            return await self._ask(request)
        except (OSError, EOFError):
            # Servers drop connections that were idle: once more, over a new one.
            self.close()
            if fresh:
                raise
            return await self._ask(request)

    async def _ask(self, request: _Request) -> _Reply:
        if self._streams is None:
            self._streams = await asyncio.open_connection(*self._address, limit=_HEAD_LIMIT)
        reader, writer = self._streams
        writer.write(request.head + request.body)
        await writer.drain()
        reply = await _read_reply(reader, bodiless=request.verb == "HEAD")
        while reply.status == 100:
            reply = await _read_reply(reader, bodiless=request.verb == "HEAD")
        if reply.closes:
            self.close()
        return reply

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


def _refusal(status: int, code: str) -> _Reply:
    body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>made by the fault proxy</Message></Error>'
    return _Reply(status, code, [("Content-Type", "application/xml")], body.encode())


async def _send(request: _Request, reply: _Reply, writer: asyncio.StreamWriter) -> None:
    writer.write(reply.encoded() + (b"" if request.verb == "HEAD" else reply.body))
    await writer.drain()


async def _read_request(reader: asyncio.StreamReader) -> _Request | None:
    head = await _read_head(reader)
    if not head:
        return None
    verb, target, _ = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)
    fields = dict(_fields(head))
    body = await _read_body(reader, {name.lower(): value for name, value in fields.items()}, raw=True)
    method = "LIST" if verb == "GET" and "list-type=" in target else verb
    return _Request(method, target, head, body)


async def _read_reply(reader: asyncio.StreamReader, *, bodiless: bool) -> _Reply:
    head = await _read_head(reader)
    if not head:
        raise EOFError("the server closed the connection")
    _, status, *reason = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)
    fields = _fields(head)
    known = {name.lower(): value for name, value in fields}
    closes = known.get("connection", "").lower() == "close"
    kept = [each for each in fields if each[0].lower() not in ("content-length", "transfer-encoding", "connection")]
    body, length = b"", None
    if bodiless:
        length = int(known.get("content-length", "0"))
    elif status not in ("100", "204", "304"):
        body = await _read_body(reader, known, raw=False, to_end=closes)
    return _Reply(int(status), reason[0] if reason else "", kept, body, closes, length)


async def _read_head(reader: asyncio.StreamReader) -> bytes:
    """A message's head with the empty line behind it; nothing at the end of the stream."""
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as exc:
        if exc.partial:
            raise
        return b""


def _fields(head: bytes) -> list[tuple[str, str]]:
    lines = head.decode("latin-1").split("\r\n")[1:]
    return [(name, value.strip()) for name, colon, value in (line.partition(":") for line in lines) if colon]


async def _read_body(reader: asyncio.StreamReader, fields: dict[str, str], *, raw: bool, to_end: bool = False) -> bytes:
    """A message's body; `raw`: with the marks of the chunks it came in."""
    if "content-length" in fields:
        return await reader.readexactly(int(fields["content-length"]))
    if "chunked" not in fields.get("transfer-encoding", "").lower():
        return await reader.read(-1) if to_end else b""
    pieces = []
    while True:
        line = await reader.readuntil(b"\r\n")
        size = int(line.split(b";")[0], 16)
        data = await reader.readexactly(size + 2) if size else await reader.readuntil(b"\r\n")
        pieces.append(line + data if raw else data[:size])
        if not size:
            return b"".join(pieces)


async def _either(*waits: Coroutine[Any, Any, Any]) -> None:
    """Return as soon as one of them ends."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _reset(writer: asyncio.StreamWriter) -> None:
    """End a connection with a TCP reset."""
    sock = writer.get_extra_info("socket")
    if sock is not None:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
