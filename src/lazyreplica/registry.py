"""One `Replica` per URL per process: opened by the first user, closed after the last.

A forked child starts with none: what it inherited is the parent's, and it opens its own.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading

from lazyreplica.config import Options
from lazyreplica.replica import Replica
from lazyreplica.storage import open_store
from lazyreplica.storage.url import parse_replica_url

log = logging.getLogger(__name__)


class _Entry:
    """A replica that is being opened or is open. `lock` is held while it opens, so that other URLs do not wait."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.lock = threading.Lock()
        self.replica: Replica | None = None
        self.users = 0


_entries: dict[str, _Entry] = {}
_lock = threading.Lock()


def acquire(url: str, options: Options) -> Replica:
    """The replica at `url`, opened if need be. Each call needs a `release`.

    Options of a replica that is open already stay as they are; others are warned about. Raises what opening raises.
    """
    key = str(parse_replica_url(url))
    with _lock:
        entry = _entries.setdefault(key, _Entry(options))
        entry.users += 1
    try:
        with entry.lock:
            if entry.replica is None:
                entry.options = options
                entry.replica = Replica(open_store(url), options)
                return entry.replica
    except BaseException:
        _leave(key, entry)
        raise
    if entry.options != options:
        log.warning("%s is open already with %s; %s is not used", key, entry.options, options)
    return entry.replica


def release(replica: Replica) -> None:
    """Give back what `acquire` gave; the last one closes the replica."""
    entry = _entries.get(replica.url)
    if entry is not None and entry.replica is replica:  # else: inherited over a fork, and abandoned
        _leave(replica.url, entry)


def _leave(key: str, entry: _Entry) -> None:
    with _lock:
        entry.users -= 1
        if entry.users:
            return
        _entries.pop(key, None)
    if entry.replica is not None:
        entry.replica.close()


@atexit.register
def _close_all() -> None:
    with _lock:
        entries = list(_entries.values())
        _entries.clear()
    for entry in entries:
        if entry.replica is not None:
            entry.replica.close()


def _after_fork_in_child() -> None:
    global _lock  # noqa: PLW0603 (another thread of the parent may have held it at the moment of the fork)
    _lock = threading.Lock()
    entries = list(_entries.values())
    _entries.clear()
    for entry in entries:
        if entry.replica is not None:
            entry.replica.abandon()


os.register_at_fork(after_in_child=_after_fork_in_child)
