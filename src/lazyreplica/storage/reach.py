"""From a host name to a connected socket, by an absolute deadline, whatever resolvers and routes do."""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
from typing import Any

from lazyreplica.storage.retry import Deadline
from lazyreplica.storage.waiting import patiently

CONNECT_SECONDS = 5.0
"""For one address."""
_STEP = 0.1
"""Seconds until a wait looks whether the store was closed."""
_PENDING = {errno.EINPROGRESS, errno.EWOULDBLOCK, errno.EALREADY}

_Address = tuple[Any, Any, int, str, Any]


def reach(host: str, port: int, deadline: Deadline, closed: threading.Event) -> socket.socket:
    """A TCP connection to the first address of `host` that answers.

    Raises `OSError` (`socket.gaierror`, `TimeoutError`, ...); `ConnectionError` once `closed` is set.
    """
    addresses = _look_up(host, port, deadline, closed)
    problem: OSError = OSError(f"{host} has no address")
    for number, address in enumerate(addresses):
        # One that does not answer must leave time for the others.
        share = deadline.left() / (len(addresses) - number)
        try:
            return _connect(address, min(CONNECT_SECONDS, share), closed)
        except OSError as exc:
            problem = exc
    raise problem


def is_ready(sock: socket.socket, seconds: float, *, to_write: bool = False) -> bool:
    """Whether a socket can be read from (or written to) within some seconds."""
    if not hasattr(select, "poll"):  # Windows; elsewhere select() cannot take numbers above 1023
        sets: tuple[list[Any], list[Any]] = ([], [sock]) if to_write else ([sock], [])
        return any(select.select(*sets, [sock], seconds))
    poll = select.poll()
    poll.register(sock, select.POLLOUT if to_write else select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def _connect(address: _Address, seconds: float, closed: threading.Event) -> socket.socket:
    family, kind, protocol, _, where = address
    until = Deadline.after(seconds)
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setblocking(False)
        problem = sock.connect_ex(where)
        if problem in _PENDING:
            while not patiently(lambda step: is_ready(sock, step, to_write=True), min(_STEP, max(0.0, until.left()))):
                _go_on(until, closed)
            problem = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if problem:
            raise OSError(problem, os.strerror(problem))
    except BaseException:
        sock.close()
        raise
    return sock


def _go_on(until: Deadline, closed: threading.Event) -> None:
    if closed.is_set():
        raise ConnectionError("the store was closed")
    if until.left() <= 0:
        raise TimeoutError("no answer")


# -- names --


class _Lookup:
    """One question to the system's resolver, which many threads may wait for."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.addresses: list[_Address] = []
        self.problem: OSError | None = None


_under_way: dict[tuple[int, str, int], _Lookup] = {}
"""(process, host, port): a forked child must not wait for its parent's."""
_lock = threading.Lock()
if hasattr(os, "register_at_fork"):
    # The lock must not be inherited while it is held.
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def _look_up(host: str, port: int, deadline: Deadline, closed: threading.Event) -> list[_Address]:
    """The addresses of a host: at once, or in a thread: a resolver may hang for a minute, and cannot be woken.

    Connections that are made at once share one question.
    """
    # As bytes: for a text Python loads its IDNA codec, which takes 5 ms.
    name = host.encode("ascii" if host.isascii() else "idna")
    try:
        return socket.getaddrinfo(name, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:
        pass
    lookup = _ask(host, name, port)
    while not patiently(lookup.done.wait, min(_STEP, max(0.0, deadline.left()))):
        if closed.is_set():
            raise ConnectionError("the store was closed")
        if deadline.left() <= 0:
            raise TimeoutError(f"the name {host} was not found in time")
    if lookup.problem is not None:
        raise lookup.problem
    return lookup.addresses


def _ask(host: str, name: bytes, port: int) -> _Lookup:
    key = (os.getpid(), host, port)
    with _lock:
        lookup = _under_way.get(key)
        if lookup is not None:
            return lookup
        lookup = _under_way[key] = _Lookup()

    def work() -> None:
        try:
            lookup.addresses = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
        except OSError as exc:
            lookup.problem = exc
        finally:
            with _lock:
                _under_way.pop(key, None)
            lookup.done.set()

    try:
        threading.Thread(target=work, name="lazyreplica-open-lookup", daemon=True).start()
    except RuntimeError:  # no new threads at interpreter exit
        work()
    return lookup
