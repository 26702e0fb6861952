"""One HTTP exchange at a time over kept-alive connections, ended by an absolute deadline.

httpcore is used directly, not through httpx: it lets us wrap the sockets, and only there can a deadline be
absolute. A read timeout alone starts again at every byte that a stalling server still sends. (It also saves
160 of 360 us a request.)
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpcore

from lazyreplica.errors import StoreError, StoreUnavailable
from lazyreplica.storage.network_env import proxy_for, tls_context
from lazyreplica.storage.retry import Deadline, TransientError, UnreachableError

MAX_CONNECTIONS = 32
_CONNECT_SECONDS = 5.0
_SILENCE_SECONDS = 10.0
"""An attempt fails when nothing moves for so long: a long deadline must leave time for another."""
_IDLE_SECONDS = 15.0
"""Idle connections are dropped then, before servers and NAT gateways silently do."""
_CLOSE_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Head:
    """A reply without its body."""

    status: int
    headers: Mapping[str, str]
    """Names in lower case."""


@dataclass(frozen=True, slots=True)
class Reply:
    head: Head
    body: bytes
    """The window's bytes; fewer if the body ended before. Empty if the window has a buffer."""
    received: int
    """How many of the window's bytes there were."""
    complete: bool
    """The body ended within the window."""


@dataclass(frozen=True, slots=True)
class Window:
    """Which bytes of a body to keep. Nothing after them is read."""

    skip: int
    take: int
    into: memoryview | None = None
    """Where they go, `take` bytes long; None: into an object of their own."""


class _Local(threading.local):
    deadline: Deadline | None = None


class _Stream(httpcore.NetworkStream):
    """A socket whose every wait ends at the deadline of the thread that waits."""

    def __init__(self, stream: httpcore.NetworkStream, backend: _Backend) -> None:
        self._stream = stream
        self._backend = backend
        backend.watch(self)

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._backend.clamp(timeout, httpcore.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._backend.clamp(timeout, httpcore.WriteTimeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        timeout = self._backend.clamp(timeout, httpcore.ConnectTimeout)
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, timeout), self._backend)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)

    def interrupt(self) -> None:
        """Wake the thread that waits here, with an end of stream.

        The socket stays open: its number must not go to another file while that thread may still read it.
        """
        connection = self._stream.get_extra_info("socket")
        with contextlib.suppress(OSError):  # down already
            socket.socket.shutdown(connection, socket.SHUT_RDWR)


class _Backend(httpcore.NetworkBackend):
    def __init__(self) -> None:
        self.local = _Local()
        self.closed = threading.Event()
        self._live: weakref.WeakSet[_Stream] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._sockets = httpcore.SyncBackend()
        self._ready: list[tuple[float, _Stream]] = []
        """Connected at that moment, and not used yet."""

    def watch(self, stream: _Stream) -> None:
        with self._lock:
            self._live.add(stream)

    def interrupt(self) -> None:
        """Wake every thread that waits for the network."""
        with self._lock:
            live = list(self._live)
        for stream in live:
            stream.interrupt()

    def clamp(self, timeout: float | None, late: type[httpcore.TimeoutException]) -> float:
        left = self.local.deadline.left() if self.local.deadline else _SILENCE_SECONDS
        if left <= 0:
            raise late("the deadline passed")
        return left if timeout is None else min(timeout, left)

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        with self._lock:
            since, ready = self._ready.pop() if self._ready else (0.0, None)
        if ready is not None:
            if time.monotonic() - since < _IDLE_SECONDS:
                return ready
            ready.close()
        return self._connect(host, port, timeout, local_address, socket_options)

    def _connect(
        self,
        host: str,
        port: int,
        timeout: float | None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> _Stream:
        timeout = self.clamp(timeout, httpcore.ConnectTimeout)
        stream = _Stream(self._sockets.connect_tcp(host, port, timeout, local_address, socket_options), self)
        if self.closed.is_set():  # while we connected: nobody would close this one
            stream.close()
            raise httpcore.ConnectError("the store was closed")
        return stream

    def prepare(self, host: str, port: int, timeout: float) -> None:
        """Connect now, for whoever connects next."""
        stream = self._connect(host, port, timeout)
        with self._lock:
            self._ready.append((time.monotonic(), stream))

    def close_ready(self) -> None:
        with self._lock:
            ready, self._ready = self._ready, []
        for _, stream in ready:
            stream.close()


@dataclass(frozen=True, slots=True)
class Exchange:
    """A request as it goes over the wire."""

    method: str
    target: str
    """Path and query, encoded."""
    headers: Sequence[tuple[str, str]]
    content: Iterator[bytes] | None = None


class Connections:
    """Connections to one origin, kept alive. Thread-safe; not to be used in a forked child.

    Only the connections are httpcore's: its pool looks at every one of them, with a system call each, before and after
    each request.
    """

    def __init__(self, origin: str, *, skip_verify: bool = False) -> None:
        """`origin` is ``scheme://host[:port]``; a TLS context is built for ``https`` only."""
        parts = urlsplit(origin)
        self._shown = origin
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._origin = httpcore.Origin(parts.scheme.encode(), self._host.encode(), self._port)
        self._backend = _Backend()
        self._pid = os.getpid()
        self._busy = 0
        self._changed = threading.Condition()
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._idle: list[httpcore.ConnectionInterface] = []
        """Most recently used last. A list's append and pop need no lock."""
        options: dict[str, Any] = {
            "ssl_context": tls_context(skip_verify) if parts.scheme == "https" else None,
            "keepalive_expiry": _IDLE_SECONDS,
            "network_backend": self._backend,
        }
        proxy = proxy_for(parts.scheme, parts.hostname or "")
        self._direct = proxy is None
        self._factory = (
            httpcore.ConnectionPool(**options)
            if proxy is None
            else httpcore.HTTPProxy(proxy_url=proxy.url, proxy_auth=proxy.auth, **options)
        )

    @property
    def closed(self) -> threading.Event:
        """Set by `close`; something to sleep on between attempts."""
        return self._backend.closed

    def exchange(self, exchange: Exchange, window: Callable[[Head], Window], deadline: Deadline) -> Reply:
        """Send one request and keep the bytes of the reply that `window` asks for.

        Raises `TransientError` or `UnreachableError` for what another attempt may cure, `StoreUnavailable`
        once closed, `StoreError` when TLS fails.
        """
        with self._changed:
            if self._backend.closed.is_set():
                raise StoreUnavailable(f"the store at {self._shown} is closed; open it again")
            self._busy += 1
        self._backend.local.deadline = deadline
        try:
            return self._exchange(exchange, window, deadline)
        except httpcore.ConnectError as error:
            raise self._connect_problem(error) from error
        except httpcore.TimeoutException as error:
            raise TransientError(f"{_TIMEOUTS.get(type(error), 'timed out')} ({self._shown})") from error
        except _BROKEN as error:
            raise TransientError(f"the connection to {self._shown} broke ({error})") from error
        except httpcore.LocalProtocolError as error:
            raise StoreError(f"{exchange.method} {exchange.target}: the body changed ({error})") from error
        finally:
            self._backend.local.deadline = None
            with self._changed:
                self._busy -= 1
                self._changed.notify_all()

    def prepare(self, timeout: float) -> None:
        """Connect now, for a request to come: then that does not wait for the handshake.

        A failure is not told: the request will meet it. Through a proxy nothing is done.
        """
        if self._direct and not self._backend.closed.is_set():
            with contextlib.suppress(httpcore.NetworkError, httpcore.TimeoutException):
                self._backend.prepare(self._host, self._port, min(_CONNECT_SECONDS, timeout))

    def _exchange(self, exchange: Exchange, window: Callable[[Head], Window], deadline: Deadline) -> Reply:
        left = max(deadline.left(), 0.001)
        timeouts = {
            "connect": min(_CONNECT_SECONDS, left),
            "read": min(_SILENCE_SECONDS, left),
            "write": min(_SILENCE_SECONDS, left),
        }
        origin = self._origin
        url = httpcore.URL(scheme=origin.scheme, host=origin.host, port=origin.port, target=exchange.target.encode())
        wire = [(name.encode(), value.encode()) for name, value in exchange.headers]
        request = httpcore.Request(
            exchange.method, url, headers=wire, content=exchange.content, extensions={"timeout": timeouts}
        )
        if not self._free.acquire(timeout=left):
            raise TransientError(f"all {MAX_CONNECTIONS} connections were busy until the deadline")
        try:
            connection = self._take()
            try:
                response = connection.handle_request(request)
                try:
                    head = Head(response.status, {k.decode().lower(): v.decode("latin-1") for k, v in response.headers})
                    reply = _cut(head, response.iter_stream(), window(head))
                finally:
                    response.close()
            finally:
                self._put_back(connection)
        finally:
            self._free.release()
        return reply

    def _take(self) -> httpcore.ConnectionInterface:
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                return self._factory.create_connection(self._origin)
            if not connection.is_closed() and not connection.has_expired():
                return connection
            connection.close()

    def _put_back(self, connection: httpcore.ConnectionInterface) -> None:
        if connection.is_idle() and not self._backend.closed.is_set():
            self._idle.append(connection)
        else:
            connection.close()

    def _connect_problem(self, error: httpcore.ConnectError) -> Exception:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ssl.SSLCertVerificationError):
                return StoreError(
                    f"the TLS certificate of {self._shown} is not trusted ({cause.verify_message}); point "
                    "SSL_CERT_FILE to its authority, or add skipVerify=true to the URL"
                )
            if isinstance(cause, ssl.SSLEOFError):
                return TransientError(f"{self._shown} closed the connection during the TLS handshake")
            if isinstance(cause, ssl.SSLError):
                return StoreError(f"TLS with {self._shown} failed ({cause.reason}); does it speak plain http://?")
            if isinstance(cause, ConnectionRefusedError):
                return UnreachableError(f"nothing listens at {self._shown} (connection refused)")
            if isinstance(cause, socket.gaierror):
                return UnreachableError(f"the host name of {self._shown} is unknown ({cause.strerror})")
            cause = cause.__cause__ or cause.__context__
        return UnreachableError(f"no connection to {self._shown}: {error}")

    def close(self) -> None:
        """Wake every exchange under way, then drop the connections."""
        self._backend.closed.set()
        if os.getpid() != self._pid:
            return  # a forked child: the sockets, and perhaps locked locks, are the parent's
        until = time.monotonic() + _CLOSE_SECONDS
        with self._changed:
            while self._busy and time.monotonic() < until:
                # again and again: an exchange may be just connecting
                self._backend.interrupt()
                self._changed.wait(0.05)
        self._backend.close_ready()
        while self._idle:
            with contextlib.suppress(IndexError):
                self._idle.pop().close()


_BROKEN = (
    httpcore.NetworkError,
    httpcore.RemoteProtocolError,
    httpcore.ProxyError,
    httpcore.ConnectionNotAvailable,
)
_TIMEOUTS = {
    httpcore.ConnectTimeout: "no connection within the time allowed",
    httpcore.ReadTimeout: "the server stopped answering",
    httpcore.WriteTimeout: "the server stopped accepting data",
}


def _cut(head: Head, chunks: Iterable[bytes], window: Window) -> Reply:
    """The reply with the window's part of a body. Reads at most one chunk more."""
    kept: list[bytes] = []
    position, end, received = 0, window.skip + window.take, 0
    for chunk in chunks:
        first, last = max(window.skip - position, 0), end - position
        if first < len(chunk):
            piece = chunk[first:last]
            if window.into is None:
                kept.append(piece)
            else:
                window.into[received : received + len(piece)] = piece
            received += len(piece)
        position += len(chunk)
        if position > end:
            return Reply(head, b"".join(kept), received, complete=False)
    return Reply(head, b"".join(kept), received, complete=True)
