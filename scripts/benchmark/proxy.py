"""A TCP proxy that puts a local S3 server as far away as a real one, and counts what passes.

A program of its own, so that its work is nobody else's CPU time: ``python -m benchmark.proxy HOST PORT`` prints
``{"port": N}``, then answers one JSON command a line on its standard input and ends with it:

    {"do": "set", "rtt": 0.02, "cap": 60e6}     for connections made from now on; cap: bytes a second down, or null
    {"do": "take"}                              what passed since the last take

What is imitated: half the round trip in each direction, one round trip for the handshake, a bandwidth cap for each
connection. What is not: TCP's slow start, TLS, jitter, a cap for the machine as a whole.

One thread does it all: threads that wait for one another's GIL would add milliseconds to a burst of requests.
"""

from __future__ import annotations

import heapq
import itertools
import json
import os
import select
import selectors
import socket
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from selectors import EVENT_READ, EVENT_WRITE
from typing import IO, Self, cast

_DIRECT = 256 << 10
"""Bytes of one read where nothing is delayed: few calls, so hundreds of MB/s pass."""
_PIECE = 128 << 10
"""Bytes of one read on a delayed connection: 2 ms at 60 MB/s, and no piece is let go before its last byte is due."""
_WINDOW = 512
"""Pieces on their way in one direction of a delayed connection: the sender is held back when it is too far ahead."""
_HEAD_LIMIT = 64 << 10


@dataclass(frozen=True, slots=True)
class Link:
    """How a connection behaves."""

    rtt: float = 0.0
    """Seconds."""
    cap: float | None = None
    """Bytes a second, downstream."""


class RequestCounter:
    """Finds the requests in what a client sends over a keep-alive connection."""

    def __init__(self, traffic: Counter[str]) -> None:
        self._traffic = traffic
        self._head = b""
        self._body = 0
        """Bytes of the present request's body that are still to come."""
        self._lost = False
        """A chunked body, or no HTTP: where the next request begins is unknown."""

    def feed(self, data: bytes) -> None:
        self._traffic["up"] += len(data)
        while data and not self._lost:
            if self._body:
                skipped = min(self._body, len(data))
                self._body -= skipped
                data = data[skipped:]
                continue
            self._head += data
            end = self._head.find(b"\r\n\r\n")
            if end < 0:
                self._lost = len(self._head) > _HEAD_LIMIT
                return
            head, data, self._head = self._head[:end], self._head[end + 4 :], b""
            self._count(head.decode("latin-1"))

    def _count(self, head: str) -> None:
        line, *fields = head.split("\r\n")
        method, _, rest = line.partition(" ")
        query = rest.partition(" ")[0].partition("?")[2]
        if method == "GET" and ("list-type=" in query or "prefix=" in query):
            method = "LIST"
        self._traffic["requests"] += 1
        self._traffic[method] += 1
        for field in fields:
            name, _, value = field.partition(":")
            if name.lower() == "content-length" and value.strip().isdecimal():
                self._body = int(value)
            elif name.lower() in ("content-length", "transfer-encoding"):
                self._lost = True


class _Loop:
    """Calls back when a socket is ready or a time has come."""

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        """Its data are functions that take the events."""
        self.now = time.monotonic()
        """When the events at hand were noticed: what they bring is no later for having waited for its turn."""
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def at(self, due: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (due, next(self._numbers), call))

    def run(self) -> None:
        while True:
            wait = self._fire()
            # An epoll waits for whole milliseconds, select() for microseconds, and it can wait for an epoll.
            ready = select.select([self.selector], [], [], wait)[0]
            self.now = time.monotonic()
            for key, events in self.selector.select(0) if ready else ():
                key.data(events)
                self._fire()

    def _fire(self) -> float | None:
        """Call what is due. Returns the seconds until the next."""
        timers = self._timers
        while timers:
            wait = timers[0][0] - time.monotonic()
            if wait > 0:
                return wait
            heapq.heappop(timers)[2]()
        return None


class _End:
    """The socket of one side, and what is waited for there."""

    reads: _Flow
    """The one that comes from here."""
    writes: _Flow
    """The one that goes here."""

    def __init__(self, loop: _Loop, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self._selector = loop.selector
        self._events = 0

    def wait(self, event: int, wanted: bool) -> None:
        events = self._events | event if wanted else self._events & ~event
        if events == self._events:
            return
        # Not with a mask of 0: an epoll reports a reset even then, again and again.
        if not events:
            self._selector.unregister(self.sock)
        elif self._events:
            self._selector.modify(self.sock, events, self._ready)
        else:
            self._selector.register(self.sock, events, self._ready)
        self._events = events

    def _ready(self, events: int) -> None:
        # An event of the same round may have ended the wait.
        if events & self._events & EVENT_WRITE:
            self.writes.deliver()
        if events & self._events & EVENT_READ:
            self.reads.read()


def _ignore(_: object) -> None:
    pass


class _Flow:
    """One half of a connection: bytes from `source` to `target`, each piece due when its last byte would arrive."""

    def __init__(self, loop: _Loop, source: _End, target: _End, delay: float, cap: float | None) -> None:
        self._loop, self._source, self._target = loop, source, target
        source.reads = target.writes = self
        self._delay, self._cap = delay, cap
        self.free = 0.0
        """When the link has let the last piece in: nothing enters before."""
        self._size, self._window = (_PIECE, _WINDOW) if delay or cap else (_DIRECT, 1)
        self._pieces: deque[tuple[float, bytes | memoryview]] = deque()
        """What is on its way and when it is due; an empty piece is the end of the stream. While there are any, either
        the clock or the target, when it takes bytes again, will call deliver()."""
        self._ended = False
        """The source has no more to send, or the target does not take it."""
        self.over = False
        """Nothing more will pass."""
        self.arrived: Callable[[bytes], None] = _ignore
        """Told of every piece that the source has sent."""
        self.left: Callable[[int], None] = _ignore
        """Told of the bytes that the target has taken: what a client no longer wants is not counted."""

    def read(self) -> None:
        try:
            data = self._source.sock.recv(self._size)
        except BlockingIOError:
            return
        except OSError:  # either side may go away at any time
            data = b""
        self._ended = not data
        self.arrived(data)
        entered = max(self._loop.now, self.free)
        self.free = entered + len(data) / self._cap if self._cap else entered
        self._pieces.append((self.free + self._delay, data))
        if len(self._pieces) == 1:
            self.deliver()
        elif self._ended or len(self._pieces) == self._window:
            self._source.wait(EVENT_READ, False)

    def deliver(self) -> None:
        """Send what is due, as far as the target takes it."""
        pieces = self._pieces
        blocked = False
        while pieces and not blocked:
            due, data = pieces[0]
            if due > time.monotonic():
                self._loop.at(due, self.deliver)
                break
            try:
                sent = self._target.sock.send(data) if data else 0
            except BlockingIOError:
                sent = 0
            except OSError:
                data = b""
            if not data:
                self._finish()
                return
            self.left(sent)
            blocked = sent < len(data)
            if blocked:
                pieces[0] = due, memoryview(data)[sent:]
            else:
                pieces.popleft()
        self._target.wait(EVENT_WRITE, blocked)
        self._source.wait(EVENT_READ, not self._ended and len(pieces) < self._window)

    def _finish(self) -> None:
        self._ended = self.over = True
        self._pieces.clear()
        self._target.wait(EVENT_WRITE, False)
        self._source.wait(EVENT_READ, False)
        with suppress(OSError):
            self._target.sock.shutdown(socket.SHUT_WR)
        if self._source.writes.over:  # the other direction
            self._source.sock.close()
            self._target.sock.close()


class Server:
    """Accepts connections and passes each on to the upstream server; obeys the commands on standard input."""

    def __init__(self, upstream: tuple[str, int]) -> None:
        self._upstream = upstream
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self._listener.setblocking(False)
        self._link = Link()
        self._traffic: Counter[str] = Counter()
        self._commands = b""
        """The beginning of a line that is still to come."""
        self._loop = _Loop()
        self._loop.selector.register(self._listener, EVENT_READ, self._accept)
        self._loop.selector.register(sys.stdin, EVENT_READ, self._command)

    def run(self) -> None:
        print(json.dumps({"port": self._listener.getsockname()[1]}), flush=True)
        self._loop.run()

    def _accept(self, _: int) -> None:
        with suppress(BlockingIOError, ConnectionAbortedError):
            while True:
                self._connect(self._listener.accept()[0])

    def _connect(self, client: socket.socket) -> None:
        loop, link, traffic = self._loop, self._link, self._traffic
        traffic["connections"] += 1
        try:
            # Everything else waits, but not for long: the server is on this machine.
            upstream = socket.create_connection(self._upstream, timeout=10)
        except OSError as exc:
            print(f"no connection to the server: {exc}", file=sys.stderr)
            client.close()
            return
        near, far = _End(loop, client), _End(loop, upstream)
        up = _Flow(loop, near, far, link.rtt / 2, None)
        # The client believes to be connected at once and sends; what it sends waits for the handshake.
        up.free = loop.now + link.rtt
        up.arrived = RequestCounter(traffic).feed
        down = _Flow(loop, far, near, link.rtt / 2, link.cap)
        down.left = lambda size: traffic.update(down=size)
        near.wait(EVENT_READ, True)
        far.wait(EVENT_READ, True)

    def _command(self, _: int) -> None:
        data = os.read(sys.stdin.fileno(), 1 << 16)
        if not data:
            sys.exit()
        *lines, self._commands = (self._commands + data).split(b"\n")
        for line in lines:
            command = json.loads(line)
            answer: dict[str, int] = {}
            if command["do"] == "set":
                self._link = Link(command["rtt"], command["cap"])
            else:
                answer = dict(self._traffic)
                self._traffic.clear()
            print(json.dumps(answer), flush=True)


class Proxy:
    """The proxy program, seen from the driver."""

    def __init__(self, upstream_port: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "benchmark.proxy", "127.0.0.1", str(upstream_port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._in, self._out = cast(IO[str], self._process.stdin), cast(IO[str], self._process.stdout)
        self.pid = self._process.pid
        self.endpoint = f"http://127.0.0.1:{json.loads(self._out.readline())['port']}"

    def set(self, link: Link) -> None:
        self._ask({"do": "set", "rtt": link.rtt, "cap": link.cap})

    def take(self) -> dict[str, int]:
        return self._ask({"do": "take"})

    def _ask(self, command: dict[str, object]) -> dict[str, int]:
        print(json.dumps(command), file=self._in, flush=True)
        return cast(dict[str, int], json.loads(self._out.readline()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._in.close()
        self._process.wait(10)


if __name__ == "__main__":
    Server((sys.argv[1], int(sys.argv[2]))).run()
