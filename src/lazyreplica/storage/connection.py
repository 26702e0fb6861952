"""A connection to an HTTP server: http.client's protocol over a socket whose every wait ends at an absolute deadline.

http.client lets us bring the socket. A timeout of its own would start again at every byte that a stalling server still
sends.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import select
import socket
import ssl
import threading
import time
import weakref
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from lazyreplica.errors import ConfigError
from lazyreplica.storage.network_env import Proxy
from lazyreplica.storage.retry import Deadline

CONNECT_SECONDS = 5.0
_SILENCE_SECONDS = 10.0
"""An attempt fails when nothing moves for so long: a long deadline must leave time for another."""
_BUFFER = 64 << 10


class Sockets:
    """The sockets of one origin, so that closing can wake whoever waits at one."""

    def __init__(self) -> None:
        self.closed = threading.Event()
        self._live: weakref.WeakSet[DeadlineSocket] = weakref.WeakSet()
        self._lock = threading.Lock()

    def watch(self, opened: DeadlineSocket) -> None:
        with self._lock:
            self._live.add(opened)

    def interrupt(self) -> None:
        """Wake every thread that waits for the network."""
        with self._lock:
            live = list(self._live)
        for each in live:
            each.interrupt()


class DeadlineSocket:
    """What http.client needs of a socket. Used by one thread at a time; `deadline` is the present request's."""

    def __init__(self, sock: socket.socket, deadline: Deadline, sockets: Sockets) -> None:
        self.sock = sock
        self.deadline = deadline
        self._users = 1
        sockets.watch(self)

    def _allow(self) -> None:
        left = self.deadline.left()
        if left <= 0:
            raise TimeoutError("the deadline passed")
        self.sock.settimeout(min(left, _SILENCE_SECONDS))

    def sendall(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        while view:
            self._allow()
            view = view[self.sock.send(view) :]

    def recv_into(self, buffer: Any) -> int:
        self._allow()
        return self.sock.recv_into(buffer)

    def start_tls(self, context: ssl.SSLContext, host: str) -> None:
        self._allow()
        self.sock = context.wrap_socket(self.sock, server_hostname=host)

    def makefile(self, _: str) -> io.BufferedReader:
        """For http.client: what a response reads from. The socket is closed when this, too, is closed."""
        self._users += 1
        return io.BufferedReader(_Reader(self), _BUFFER)

    def close(self) -> None:
        self._users -= 1
        if self._users == 0:
            self.sock.close()

    def interrupt(self) -> None:
        """Wake the thread that waits here, with an end of stream.

        The socket stays open: its number must not go to another file while that thread may still read it.
        """
        with contextlib.suppress(OSError):  # down already
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)


class _Reader(io.RawIOBase):
    def __init__(self, source: DeadlineSocket) -> None:
        self._source = source

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._source.recv_into(buffer)

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._source.close()


@dataclass(frozen=True, slots=True)
class Origin:
    """Where connections go."""

    scheme: str
    host: str
    port: int
    tls: ssl.SSLContext | None
    proxy: Proxy | None

    def __post_init__(self) -> None:
        if self.tls and self.proxy and self.proxy.url.startswith("https:"):
            raise ConfigError(
                f"the proxy {self.proxy.url} is itself https, which is not supported for an https endpoint; use an "
                f"http:// proxy, or put {self.host} into NO_PROXY"
            )


class Connection(http.client.HTTPConnection):
    """One connection. Connects when it is first used; never by itself again."""

    auto_open = 0
    sock: Any

    def __init__(self, origin: Origin, sockets: Sockets) -> None:
        super().__init__(origin.host, origin.port)
        self._origin = origin
        self._sockets = sockets
        self._idle_since = 0.0
        self.absolute = ""
        """What stands before the path of every request: through a plain proxy, the origin."""
        self.extra: list[tuple[str, str]] = []
        """Headers that every request needs: credentials for the proxy."""

    def open(self, deadline: Deadline) -> None:
        """Connect, with the proxy's and TLS's handshakes. Raises `OSError`, `http.client.HTTPException`."""
        origin, proxy = self._origin, self._origin.proxy
        place = urlsplit(proxy.url) if proxy else None
        host, port = (place.hostname or "", place.port or 80) if place else (origin.host, origin.port)
        left = deadline.left()
        if left <= 0:
            raise TimeoutError("the deadline passed")
        # As bytes: for a text Python loads its IDNA codec, which takes 5 ms.
        name = host.encode("ascii" if host.isascii() else "idna")
        plain = socket.create_connection((name, port), min(CONNECT_SECONDS, left))  # type: ignore[arg-type]
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = opened = DeadlineSocket(plain, deadline, self._sockets)
        try:
            if place and place.scheme == "https":
                opened.start_tls(ssl.create_default_context(), host)
            if proxy:
                self._pass_through(proxy)
            if origin.tls:
                opened.start_tls(origin.tls, origin.host)
        except BaseException:
            self.close()
            raise
        if self._sockets.closed.is_set():  # while we connected: nobody would close this one
            self.close()
            raise ConnectionError("the store was closed")

    def _pass_through(self, proxy: Proxy) -> None:
        credentials = []
        if proxy.auth:
            pair = base64.b64encode(":".join(proxy.auth).encode()).decode()
            credentials = [("Proxy-Authorization", f"Basic {pair}")]
        if self._origin.tls:
            self.set_tunnel(self._origin.host, self._origin.port, dict(credentials))
            self._tunnel()  # type: ignore[attr-defined] # what subclasses that connect themselves call
        else:
            host = f"[{self._origin.host}]" if ":" in self._origin.host else self._origin.host
            self.absolute = f"http://{host}:{self._origin.port}"
            self.extra = credentials

    def begin(self, deadline: Deadline) -> None:
        """From now on this connection works for a request with that deadline. Connects if need be."""
        if self.sock is None:
            self.open(deadline)
        self.sock.deadline = deadline

    def rest(self) -> None:
        """No request is under way from now on."""
        self._idle_since = time.monotonic()

    @property
    def idle(self) -> float:
        """Seconds since `rest`."""
        return time.monotonic() - self._idle_since

    def is_fresh(self, longest: float) -> bool:
        """Whether an idle connection is worth using: for at most `longest` seconds, and not closed by the server."""
        if self.sock is None or self.idle > longest:
            return False
        # Readable without a request: an end of stream, or something that nobody asked for.
        if not hasattr(select, "poll"):  # Windows
            return not select.select([self.sock.sock], [], [], 0)[0]
        poll = select.poll()
        poll.register(self.sock.sock, select.POLLIN)
        return not poll.poll(0)
