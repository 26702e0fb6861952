"""One HTTP exchange at a time over kept-alive connections, ended by an absolute deadline.

On http.client, the standard library's. httpx and its engine httpcore take three times its CPU time for a request and
for a megabyte, and when a replica is opened, that is what takes the time.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from lazyreplica.errors import StoreError, StoreUnavailable
from lazyreplica.storage.connection import Connection, Origin, Sockets
from lazyreplica.storage.idle import IDLE_SECONDS, IdleConnections
from lazyreplica.storage.network_env import proxy_for, tls_context
from lazyreplica.storage.reach import CONNECT_SECONDS
from lazyreplica.storage.retry import Deadline, TransientError, UnreachableError
from lazyreplica.storage.waiting import patiently

MAX_CONNECTIONS = 80
_MAX_AHEAD = 48
"""Requests of all bursts together whose replies nobody reads yet. What remains belongs to those who hold nothing else
while they wait: so they always get on, and with them everybody (see `send`)."""
_CLOSE_SECONDS = 2.0
_SKIPPED = 64 << 10


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


@dataclass(frozen=True, slots=True)
class Exchange:
    """A request as it goes over the wire."""

    method: str
    target: str
    """Path and query, encoded."""
    headers: Sequence[tuple[str, str]]
    content: Iterator[bytes] | None = None


@dataclass(frozen=True, slots=True)
class Pending:
    """A request that was sent, and its reply not read yet."""

    connection: Connection
    ahead: bool
    """One of `_MAX_AHEAD`."""


class Connections:
    """Connections to one origin, kept alive. Thread-safe; not to be used in a forked child."""

    def __init__(self, origin: str, *, skip_verify: bool = False) -> None:
        """`origin` is ``scheme://host[:port]``; a TLS context is built for ``https`` only."""
        parts = urlsplit(origin)
        host = parts.hostname or ""
        tls = tls_context(skip_verify) if parts.scheme == "https" else None
        self._origin = Origin(
            parts.scheme, host, parts.port or (443 if tls else 80), tls, proxy_for(parts.scheme, host)
        )
        self._shown = origin
        self._sockets = Sockets()
        self._pid = os.getpid()
        self._busy = 0
        self._changed = threading.Condition()
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._ahead = threading.BoundedSemaphore(_MAX_AHEAD)
        self._idle = IdleConnections(lambda: self._busy > 0)

    @property
    def closed(self) -> threading.Event:
        """Set by `close`; something to sleep on between attempts."""
        return self._sockets.closed

    @property
    def ready(self) -> int:
        """How many idle connections there are."""
        return len(self._idle)

    def exchange(self, exchange: Exchange, window: Callable[[Head], Window], deadline: Deadline) -> Reply:
        """Send one request and keep the bytes of the reply that `window` asks for.

        Raises `TransientError` or `UnreachableError` for what another attempt may cure, `StoreUnavailable`
        once closed, `StoreError` when TLS fails.
        """
        pending = self.send(exchange, deadline)
        assert pending is not None, "it connects"
        return self.receive(pending, window)

    def send(self, exchange: Exchange, deadline: Deadline, *, connect: bool = True) -> Pending | None:
        """The first half of `exchange`. Each `Pending` needs a `receive` or an `abandon`.

        Without `connect` it waits for nothing: None if no idle connection is at hand, or too many requests are under
        way. Only so may it be called by who holds a `Pending`: who waited for a connection while it kept others from
        theirs could wait for somebody who does the same.
        """
        with self._changed:
            if self.closed.is_set():
                raise StoreUnavailable(f"the store at {self._shown} is closed; open it again")
            self._busy += 1
        pending = None
        try:
            if self._enter(deadline, ahead=not connect):
                try:
                    pending = self._begin(exchange, deadline, connect)
                finally:
                    if pending is None:
                        self._exit(ahead=not connect)
        finally:
            if pending is None:
                self._leave()
        return pending

    def _begin(self, exchange: Exchange, deadline: Deadline, connect: bool) -> Pending | None:
        connection = self._connect(deadline, connect)
        if connection is None:
            return None
        with self._closing_on_failure(connection):
            self._send(connection, exchange)
        return Pending(connection, ahead=not connect)

    def receive(self, pending: Pending, window: Callable[[Head], Window]) -> Reply:
        """The second half of `exchange`."""
        connection = pending.connection
        try:
            with self._closing_on_failure(connection):
                response = connection.getresponse()
                with contextlib.closing(response):
                    head = Head(response.status, {name.lower(): value for name, value in response.getheaders()})
                    reply = _cut(head, response, window(head))
                    if not response.isclosed():
                        connection.close()
        finally:
            self._put_back(connection)
            self._exit(ahead=pending.ahead)
            self._leave()
        return reply

    def abandon(self, pending: Pending) -> None:
        """Nobody wants the reply."""
        pending.connection.close()
        self._exit(ahead=pending.ahead)
        self._leave()

    def _enter(self, deadline: Deadline, *, ahead: bool) -> bool:
        """Take one of the places for requests, and `_exit` gives it back. False if there is none, for those ahead."""
        if not ahead:
            if not patiently(lambda step: self._free.acquire(timeout=step), max(deadline.left(), 0.001)):
                raise TransientError(f"all {MAX_CONNECTIONS} connections were busy until the deadline")
            return True
        if not self._ahead.acquire(blocking=False):
            return False
        if self._free.acquire(blocking=False):
            return True
        self._ahead.release()
        return False

    def _exit(self, *, ahead: bool) -> None:
        self._free.release()
        if ahead:
            self._ahead.release()

    def _leave(self) -> None:
        with self._changed:
            self._busy -= 1
            self._changed.notify_all()

    @contextlib.contextmanager
    def _closing_on_failure(self, connection: Connection) -> Iterator[None]:
        try:
            yield
        except TimeoutError as error:
            connection.close()
            raise TransientError(f"the server stopped answering ({self._shown})") from error
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            said = str(error) or type(error).__name__
            raise TransientError(f"the connection to {self._shown} broke ({said})") from error
        except BaseException:
            connection.close()
            raise

    def prepare(self, timeout: float) -> None:
        """Connect now, for a request to come: then that does not wait for the handshake.

        A failure is not told: the request will meet it.
        """
        if not self.closed.is_set() and self.ready < MAX_CONNECTIONS:
            connection = Connection(self._origin, self._sockets)
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection.begin(Deadline.after(min(CONNECT_SECONDS, timeout)))
                self._keep(connection, used=False)

    def _keep(self, connection: Connection, *, used: bool) -> None:
        connection.rest()
        self._idle.put(connection, used=used)
        if self.closed.is_set():  # meanwhile: nobody would close this one
            self._idle.clear()

    def _connect(self, deadline: Deadline, connect: bool) -> Connection | None:
        while (connection := self._idle.take()) is not None:
            if connection.is_fresh(IDLE_SECONDS):
                break
            connection.close()
        else:
            if not connect:
                return None
            connection = Connection(self._origin, self._sockets)
        try:
            connection.begin(deadline)
        except TimeoutError as error:
            raise TransientError(f"no connection within the time allowed ({self._shown})") from error
        except http.client.HTTPException as error:
            raise TransientError(f"the proxy of {self._shown} broke the connection ({error})") from error
        except OSError as error:
            raise self._problem(error) from error
        return connection

    def _send(self, connection: Connection, exchange: Exchange) -> None:
        connection.putrequest(
            exchange.method, connection.absolute + exchange.target, skip_host=True, skip_accept_encoding=True
        )
        for name, value in (*exchange.headers, *connection.extra):
            connection.putheader(name, value)
        try:
            connection.endheaders()
            for chunk in exchange.content or ():
                connection.send(chunk)
        except (BrokenPipeError, ConnectionResetError):
            return  # a server may refuse before it has read everything: its answer says why

    def _put_back(self, connection: Connection) -> None:
        if connection.sock is not None and not self.closed.is_set():
            self._keep(connection, used=True)
        else:
            connection.close()

    def _problem(self, error: OSError) -> Exception:
        """Why no connection came about."""
        if isinstance(error, ssl.SSLCertVerificationError):
            return StoreError(
                f"the TLS certificate of {self._shown} is not trusted ({error.verify_message}); point "
                "SSL_CERT_FILE to its authority, or add skipVerify=true to the URL"
            )
        if isinstance(error, ssl.SSLEOFError):
            return TransientError(f"{self._shown} closed the connection during the TLS handshake")
        if isinstance(error, ssl.SSLError):
            return StoreError(f"TLS with {self._shown} failed ({error.reason}); does it speak plain http://?")
        if isinstance(error, ConnectionRefusedError):
            return UnreachableError(f"nothing listens at {self._shown} (connection refused)")
        if isinstance(error, socket.gaierror):
            return UnreachableError(f"the host name of {self._shown} is unknown ({error.strerror})")
        return UnreachableError(f"no connection to {self._shown}: {error}")

    def close(self) -> None:
        """Wake every exchange under way, then drop the connections."""
        self.closed.set()
        if os.getpid() != self._pid:
            return  # a forked child: the sockets, and perhaps locked locks, are the parent's
        until = time.monotonic() + _CLOSE_SECONDS
        with self._changed:
            while self._busy and time.monotonic() < until:
                # again and again: an exchange may be just connecting
                self._sockets.interrupt()
                self._changed.wait(0.05)
        self._idle.clear()


def _cut(head: Head, response: http.client.HTTPResponse, window: Window) -> Reply:
    """The reply with the window's part of a body. Reads at most one byte more."""
    left = window.skip
    while left and (skipped := response.read(min(left, _SKIPPED))):
        left -= len(skipped)
    data, received = b"", 0
    if window.into is None:
        data = response.read(window.take) if window.take else b""
        received = len(data)
    else:
        while received < window.take and (size := response.readinto(window.into[received:])):
            received += size
    if not response.isclosed() and response.length == 0:
        response.read()  # notes that this was the end
    complete = response.isclosed() or (response.length is None and not response.read(1))
    return Reply(head, data, received, complete)
