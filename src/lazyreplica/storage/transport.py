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
    """The window's bytes; fewer if the body ended before."""
    complete: bool
    """The body ended within the window."""


@dataclass(frozen=True, slots=True)
class Window:
    """Which bytes of a body to keep. Nothing after them is read."""

    skip: int
    take: int


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
        timeout = self.clamp(timeout, httpcore.ConnectTimeout)
        stream = _Stream(self._sockets.connect_tcp(host, port, timeout, local_address, socket_options), self)
        if self.closed.is_set():  # while we connected: nobody would close this one
            stream.close()
            raise httpcore.ConnectError("the store was closed")
        return stream


@dataclass(frozen=True, slots=True)
class Exchange:
    """A request as it goes over the wire."""

    method: str
    target: str
    """Path and query, encoded."""
    headers: Sequence[tuple[str, str]]
    content: Iterator[bytes] | None = None


class Connections:
    """A pool of connections to one origin. Thread-safe; not to be used in a forked child."""

    def __init__(self, origin: str, *, skip_verify: bool = False) -> None:
        """`origin` is ``scheme://host[:port]``; a TLS context is built for ``https`` only."""
        parts = urlsplit(origin)
        self._origin = origin
        self._scheme = parts.scheme.encode()
        self._host = (parts.hostname or "").encode()
        self._port = parts.port
        self._backend = _Backend()
        self._pid = os.getpid()
        self._busy = 0
        self._changed = threading.Condition()
        options: dict[str, Any] = {
            "ssl_context": tls_context(skip_verify) if parts.scheme == "https" else None,
            "max_connections": MAX_CONNECTIONS,
            "keepalive_expiry": _IDLE_SECONDS,
            "network_backend": self._backend,
        }
        proxy = proxy_for(parts.scheme, parts.hostname or "")
        self._pool = (
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
                raise StoreUnavailable(f"the store at {self._origin} is closed; open it again")
            self._busy += 1
        self._backend.local.deadline = deadline
        try:
            return self._exchange(exchange, window, deadline)
        except httpcore.ConnectError as error:
            raise self._connect_problem(error) from error
        except httpcore.PoolTimeout as error:
            raise TransientError(f"all {MAX_CONNECTIONS} connections were busy until the deadline") from error
        except httpcore.TimeoutException as error:
            raise TransientError(f"{_TIMEOUTS.get(type(error), 'timed out')} ({self._origin})") from error
        except (httpcore.NetworkError, httpcore.RemoteProtocolError, httpcore.ProxyError) as error:
            raise TransientError(f"the connection to {self._origin} broke ({error})") from error
        except httpcore.LocalProtocolError as error:
            raise StoreError(f"{exchange.method} {exchange.target}: the body changed ({error})") from error
        finally:
            self._backend.local.deadline = None
            with self._changed:
                self._busy -= 1
                self._changed.notify_all()

    def _exchange(self, exchange: Exchange, window: Callable[[Head], Window], deadline: Deadline) -> Reply:
        left = max(deadline.left(), 0.001)
        timeouts = {
            "pool": left,
            "connect": min(_CONNECT_SECONDS, left),
            "read": min(_SILENCE_SECONDS, left),
            "write": min(_SILENCE_SECONDS, left),
        }
        url = httpcore.URL(scheme=self._scheme, host=self._host, port=self._port, target=exchange.target.encode())
        wire = [(name.encode(), value.encode()) for name, value in exchange.headers]
        with self._pool.stream(
            exchange.method, url, headers=wire, content=exchange.content, extensions={"timeout": timeouts}
        ) as response:
            head = Head(response.status, {k.decode().lower(): v.decode("latin-1") for k, v in response.headers})
            body, complete = _cut(response.iter_stream(), window(head))
        return Reply(head, body, complete)

    def _connect_problem(self, error: httpcore.ConnectError) -> Exception:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ssl.SSLCertVerificationError):
                return StoreError(
                    f"the TLS certificate of {self._origin} is not trusted ({cause.verify_message}); point "
                    "SSL_CERT_FILE to its authority, or add skipVerify=true to the URL"
                )
            if isinstance(cause, ssl.SSLEOFError):
                return TransientError(f"{self._origin} closed the connection during the TLS handshake")
            if isinstance(cause, ssl.SSLError):
                return StoreError(f"TLS with {self._origin} failed ({cause.reason}); does it speak plain http://?")
            if isinstance(cause, ConnectionRefusedError):
                return UnreachableError(f"nothing listens at {self._origin} (connection refused)")
            if isinstance(cause, socket.gaierror):
                return UnreachableError(f"the host name of {self._origin} is unknown ({cause.strerror})")
            cause = cause.__cause__ or cause.__context__
        return UnreachableError(f"no connection to {self._origin}: {error}")

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
        self._pool.close()


_TIMEOUTS = {
    httpcore.ConnectTimeout: "no connection within the time allowed",
    httpcore.ReadTimeout: "the server stopped answering",
    httpcore.WriteTimeout: "the server stopped accepting data",
}


def _cut(chunks: Iterable[bytes], window: Window) -> tuple[bytes, bool]:
    """The window's part of a body, and whether the body ended there. Reads at most one chunk more."""
    kept: list[bytes] = []
    position, end = 0, window.skip + window.take
    for chunk in chunks:
        first, last = max(window.skip - position, 0), end - position
        if first < len(chunk):
            kept.append(chunk[first:last])
        position += len(chunk)
        if position > end:
            return b"".join(kept), False
    return b"".join(kept), True
