"""Every exception that lazyreplica raises, in one small tree.

The engine raises these as they are. Inside SQLite's calls the `vfs` package raises the same classes married to
APSW's (so that ``except apsw.IOError`` and ``except lazyreplica.errors.StoreError`` both catch them) and chooses
SQLite's result code there: nothing in this package knows about SQLite codes.

Each message names what was wrong, the value that was found, and what to do about it.
"""

from __future__ import annotations


class LazyReplicaError(Exception):
    """Base of all errors raised by lazyreplica."""


class ConfigError(LazyReplicaError):
    """The caller asked for something that cannot be: no replica named, a malformed URL, a bad option."""


class LTXError(LazyReplicaError):
    """Bytes that are not a valid LTX file: wrong magic, a damaged frame, a checksum that does not match."""


class ReplicaError(LazyReplicaError):
    """The files of a replica do not add up to a database."""


class EmptyReplica(ReplicaError):
    """The path holds no LTX file at all."""


class LegacyLayout(ReplicaError):
    """The path holds a Litestream 0.3 replica (``generations/``), which is not made of LTX files."""


class ReplicaGap(ReplicaError):
    """Transactions are missing between the files that are there."""


class ReplicaDamaged(ReplicaError):
    """Files contradict each other or their names, or a page that must exist is in no file."""


class NoSuchState(ReplicaError):
    """The time or TXID asked for is not among the states that the replica's files make."""


class LineageChanged(ReplicaError):
    """The path now holds another database history than the one that was opened; the connection must reopen."""


class SnapshotGone(ReplicaError):
    """A page of a pinned snapshot exists nowhere any more (compaction and retention); roll back and retry."""


class StoreError(LazyReplicaError):
    """The storage did not give what was asked for."""


class StoreUnavailable(StoreError):
    """No answer, or only temporary failures, until the deadline."""


class Interrupted(StoreError):
    """Whoever waited for the storage was called off (`Connection.interrupt`). Asked again, it may answer."""


class AccessDenied(StoreError):
    """Credentials are missing, wrong, expired, or not allowed to do this."""


class BucketNotFound(StoreError):
    """The bucket, or the directory of a ``file://`` replica, does not exist (or lies in another region)."""


class FileVanished(StoreError):
    """A file that a listing showed is gone, or its bytes are no longer the listed ones: plan again."""


class PublishRefused(LazyReplicaError):
    """Publishing there could corrupt somebody else's replica."""


class WaitTimeout(LazyReplicaError, TimeoutError):
    """The replica did not reach a TXID in time."""


class DatabaseChanged(LazyReplicaError):
    """A database file that is kept up to date was changed or replaced by another program."""


class DatabaseBusy(LazyReplicaError):
    """A database file cannot be brought up to date now: others read it in transactions that do not end."""
