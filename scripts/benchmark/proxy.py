"""A TCP proxy that puts a local S3 server as far away as a real one, and counts what passes.

A program of its own, so that its work is nobody else's CPU time: ``python -m benchmark.proxy HOST PORT`` prints
``{"port": N}``, then answers one JSON command a line on its standard input and ends with it:

    {"do": "set", "rtt": 0.02, "cap": 60e6}     for connections made from now on; cap: bytes a second down, or null
    {"do": "take"}                              what passed since the last take

What is imitated: half the round trip in each direction, one round trip for the handshake, a bandwidth cap for each
connection. What is not: TCP's slow start, TLS, jitter, a cap for the machine as a whole.
"""

from __future__ import annotations

import json
import queue
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Self, cast

_DIRECT = 256 << 10
"""Bytes of one read where nothing is delayed: few calls, so hundreds of MB/s pass."""
_PIECE = 128 << 10
"""Bytes of one read on a delayed connection: 2 ms at 60 MB/s, and no piece is let go before its last byte is due."""
_WINDOW = 512
"""Pieces on their way in one direction: the sender is held back when it is too far ahead."""
_HEAD_LIMIT = 64 << 10


@dataclass(frozen=True, slots=True)
class Link:
    """How a connection behaves."""

    rtt: float = 0.0
    """Seconds."""
    cap: float | None = None
    """Bytes a second, downstream."""


class Traffic:
    """Counters that every connection shares."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def add(self, what: str, amount: int = 1) -> None:
        with self._lock:
            self._counts[what] += amount

    def take(self) -> dict[str, int]:
        with self._lock:
            counts, self._counts = self._counts, Counter()
        return dict(counts)


class RequestCounter:
    """Finds the requests in what a client sends over a keep-alive connection."""

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic
        self._head = b""
        self._body = 0
        """Bytes of the present request's body that are still to come."""
        self._lost = False
        """A chunked body, or no HTTP: where the next request begins is unknown."""

    def feed(self, data: bytes) -> None:
        self._traffic.add("up", len(data))
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
        self._traffic.add("requests")
        self._traffic.add(method)
        for field in fields:
            name, _, value = field.partition(":")
            if name.lower() == "content-length":
                self._body = int(value)
            elif name.lower() == "transfer-encoding":
                self._lost = True


class _Direction:
    """One half of a connection: bytes from `source` to `target`, each piece due when its last byte would arrive."""

    def __init__(self, source: socket.socket, target: socket.socket, link: Link, opened: float) -> None:
        self._source, self._target = source, target
        self._delay = link.rtt / 2
        self._cap: float | None = None
        self._free = 0.0
        """When the link has let the last piece in."""
        self._opened = opened
        """Nothing enters before: the handshake takes until then."""
        self._pieces: queue.Queue[tuple[float, bytes]] = queue.Queue(_WINDOW)

    def arrived(self, data: bytes | memoryview) -> None:
        """Told of every piece that the source has sent."""

    def leaving(self, size: int) -> None:
        """Told of every piece's bytes before they go to the target: what a client no longer wants is not counted."""

    def run(self) -> None:
        with suppress(OSError):  # either side may go away at any time
            if self._delay or self._cap:
                self._delayed()
            else:
                self._direct()
        for end, how in ((self._target, socket.SHUT_WR), (self._source, socket.SHUT_RD)):
            with suppress(OSError):
                end.shutdown(how)

    def _direct(self) -> None:
        buffer = memoryview(bytearray(_DIRECT))
        while size := self._source.recv_into(buffer):
            self.arrived(buffer[:size])
            self.leaving(size)
            self._target.sendall(buffer[:size])

    def _delayed(self) -> None:
        writer = threading.Thread(target=self._deliver, daemon=True)
        writer.start()
        try:
            while data := self._source.recv(_PIECE):
                self.arrived(data)
                entered = max(time.monotonic(), self._opened, self._free)
                self._free = entered + len(data) / self._cap if self._cap else entered
                self._pieces.put((self._free + self._delay, data))
        finally:
            self._pieces.put((time.monotonic() + self._delay, b""))
            writer.join()

    def _deliver(self) -> None:
        broken = False
        while True:
            due, data = self._pieces.get()
            if not data:
                return
            if broken:
                continue  # the reader must not wait for room in the queue
            wait = due - time.monotonic()
            if wait > 0:
                time.sleep(wait)
            self.leaving(len(data))
            try:
                self._target.sendall(data)
            except OSError:
                broken = True
                with suppress(OSError):
                    self._source.shutdown(socket.SHUT_RD)


class _Up(_Direction):
    def __init__(self, source: socket.socket, target: socket.socket, link: Link, opened: float, traffic: Traffic):
        # The client believes to be connected at once and sends; what it sends waits for the handshake.
        super().__init__(source, target, link, opened + link.rtt)
        self._requests = RequestCounter(traffic)

    def arrived(self, data: bytes | memoryview) -> None:
        self._requests.feed(bytes(data))


class _Down(_Direction):
    def __init__(self, source: socket.socket, target: socket.socket, link: Link, opened: float, traffic: Traffic):
        super().__init__(source, target, link, opened)
        self._cap = link.cap
        self._traffic = traffic

    def leaving(self, size: int) -> None:
        self._traffic.add("down", size)


class Server:
    """Accepts connections and passes each on to the upstream server."""

    def __init__(self, upstream: tuple[str, int]) -> None:
        self._upstream = upstream
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.traffic = Traffic()
        self.link = Link()

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def serve(self) -> None:
        while True:
            client, _ = self._listener.accept()
            threading.Thread(target=self._connection, args=(client, time.monotonic(), self.link), daemon=True).start()

    def _connection(self, client: socket.socket, opened: float, link: Link) -> None:
        self.traffic.add("connections")
        with client:
            try:
                upstream = socket.create_connection(self._upstream, timeout=10)
            except OSError as exc:
                print(f"no connection to the server: {exc}", file=sys.stderr)
                return
            with upstream:
                upstream.settimeout(None)
                for end in (client, upstream):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                down = threading.Thread(target=_Down(upstream, client, link, opened, self.traffic).run, daemon=True)
                down.start()
                _Up(client, upstream, link, opened, self.traffic).run()
                down.join()


def main() -> None:
    server = Server((sys.argv[1], int(sys.argv[2])))
    threading.Thread(target=server.serve, daemon=True).start()
    print(json.dumps({"port": server.port}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        answer: dict[str, int] = {}
        if command["do"] == "set":
            server.link = Link(command["rtt"], command["cap"])
        else:
            answer = server.traffic.take()
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
    main()
