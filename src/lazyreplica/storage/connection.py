"""A connection to an HTTP server: http.client's protocol over a socket whose every wait ends at an absolute deadline.

http.client lets us bring the socket. A timeout of its own would start again at every byte that a stalling server still
sends.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from lazyreplica.errors import ConfigError
from lazyreplica.storage.network_env import Proxy
from lazyreplica.storage.reach import is_ready, reach
from lazyreplica.storage.retry import Deadline
from lazyreplica.storage.waiting import SLICE, can_be_called_off, check

T = TypeVar("T")
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

    def _wait(self, operation: Callable[..., T], *args: Any) -> T:
        """The result of an operation of the socket, which may wait until the deadline or a long silence."""
        left = min(self.deadline.left(), _SILENCE_SECONDS)
        if left > 0 and not can_be_called_off():
            self.sock.settimeout(left)
            return operation(*args)
        until = Deadline.after(left)
        while (left := until.left()) > 0:
            check()
            self.sock.settimeout(min(left, SLICE))
            # One that ran out of time has done nothing; TLS goes on where it was.
            with contextlib.suppress(TimeoutError):
                return operation(*args)
        raise TimeoutError("the deadline passed, or nothing moved for long")

    def sendall(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        while view:
            view = view[self._wait(self.sock.send, view) :]

    def recv_into(self, buffer: Any) -> int:
        return self._wait(self.sock.recv_into, buffer)

    def start_tls(self, context: ssl.SSLContext, host: str) -> None:
        secured = context.wrap_socket(self.sock, server_hostname=host, do_handshake_on_connect=False)
        self.sock = secured
        self._wait(secured.do_handshake)

    def is_quiet(self) -> bool:
        """Whether the server has neither ended the stream nor sent anything that is ours to read."""
        if not is_ready(self.sock, 0.0):
            return True
        if not isinstance(self.sock, ssl.SSLSocket):
            return False
        # TLS 1.3 sends session tickets when it likes, most servers right after the handshake. Reading takes them in.
        self.sock.settimeout(0.0)
        try:
            self.sock.recv(1)
        except ssl.SSLWantReadError:
            return True
        except OSError:
            pass
        return False

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
        plain = reach(host, port, deadline, self._sockets.closed)
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
        return bool(self.sock.is_quiet())
