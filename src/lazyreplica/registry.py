"""One `Replica` per URL per process: opened by the first user, closed after the last.

A forked child starts with none: what it inherited is the parent's, and it opens its own.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import TYPE_CHECKING

from lazyreplica.config import Options
from lazyreplica.errors import LazyReplicaError
from lazyreplica.replica import Replica
from lazyreplica.storage import open_store
from lazyreplica.storage.url import parse_replica_url

if TYPE_CHECKING:
    from lazyreplica.stats import Stats
    from lazyreplica.storage.credentials import CredentialSource

log = logging.getLogger(__name__)


class _Entry:
    """A replica that is being opened or is open. `lock` is held while it opens, so that other URLs do not wait."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.lock = threading.Lock()
        self.replica: Replica | None = None
        self.failure: LazyReplicaError | None = None
        self.users = 0
        self.known = [options]
        """Options that somebody asked for; each others' are warned about once."""


_entries: dict[str, _Entry] = {}
_lock = threading.RLock()


def acquire(url: str, options: Options, credentials: CredentialSource | None = None) -> Replica:
    """The replica at `url`, opened if need be. Each call needs a `release`.

    Options of a replica that is open already stay as they are; others are warned about. `credentials` are for
    `open_store`, and those of the one who opens the replica serve all. Raises what opening raises;
    who waited for another thread's attempt gets its failure, not a turn of their own.
    """
    key = str(parse_replica_url(url))
    fresh = _Entry(options)  # made outside of the lock: an allocation may run the garbage collector, which may release
    with _lock:
        entry = _entries.setdefault(key, fresh)
        entry.users += 1
    try:
        with entry.lock:
            if entry.failure is not None:
                raise type(entry.failure)(*entry.failure.args) from entry.failure
            if entry.replica is None:
                entry.replica = _open(url, key, entry, credentials)
                return entry.replica
    except BaseException:
        _leave(key, entry)
        raise
    if options not in entry.known:
        entry.known.append(options)
        log.warning("%s is open already with %s; %s is not used", key, entry.options, options)
    return entry.replica


def _open(url: str, key: str, entry: _Entry, credentials: CredentialSource | None) -> Replica:
    try:
        return Replica(open_store(url, credentials), entry.options)
    except LazyReplicaError as exc:
        entry.failure = exc
        with _lock:
            if _entries.get(key) is entry:
                del _entries[key]  # whoever comes from now on tries again
        raise


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
        if _entries.get(key) is entry:
            del _entries[key]
    if entry.replica is not None:
        entry.replica.close()


def all_stats() -> dict[str, Stats]:
    """What each open replica of this process has done, by its URL. For a collector: opens nothing, waits for nobody."""
    replicas = {key: entry.replica for key, entry in list(_entries.items())}
    return {key: replica.stats() for key, replica in replicas.items() if replica is not None}


def close_all() -> None:
    """At interpreter exit: close every replica."""
    with _lock:
        entries = list(_entries.values())
        _entries.clear()
    for entry in entries:
        if entry.replica is not None:
            entry.replica.close()


def _after_fork_in_child() -> None:
    global _lock  # noqa: PLW0603 (another thread of the parent may have held it at the moment of the fork)
    _lock = threading.RLock()
    entries = list(_entries.values())
    _entries.clear()
    for entry in entries:
        if entry.replica is not None:
            entry.replica.abandon()


os.register_at_fork(after_in_child=_after_fork_in_child)
