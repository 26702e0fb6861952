"""The VFS: main databases are replicas, everything else goes to the operating system's own VFS.

A replica's name names nothing on disk. SQLite asks a VFS whether ``app.db-journal`` exists, deletes a stale
``app.db-wal``, resolves links: inherited from the unix VFS, those calls reached a live primary of the same name in the
working directory, and its WAL was deleted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import apsw

from lazyreplica.errors import ConfigError, LazyReplicaError
from lazyreplica.naming import is_configured, resolve
from lazyreplica.registry import acquire, release
from lazyreplica_vfs.file import ReplicaFile
from lazyreplica_vfs.sqlite_errors import OPEN, as_sqlite

NAME = "litestream"

BASE = "unix"
"""The system's own VFS, by name: the default one could be anything, this one included."""

_COMPANIONS = apsw.SQLITE_OPEN_MAIN_JOURNAL | apsw.SQLITE_OPEN_WAL | apsw.SQLITE_OPEN_SUPER_JOURNAL
"""Files that SQLite keeps beside a main database. A replica has none."""


class LitestreamVFS(apsw.VFS):
    """Registered as ``litestream``. Inherits only what has no file name in it (randomness, time, sleep)."""

    def __init__(self) -> None:
        super().__init__(NAME, base=BASE)

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> apsw.VFSFile:
        asked = flags[0]
        if asked & _COMPANIONS:
            raise apsw.CantOpenError(f"a replica has no journal or WAL: {name}")
        if not asked & apsw.SQLITE_OPEN_MAIN_DB:
            return apsw.VFSFile(BASE, name, flags)  # temporary files: sorts, TEMP tables, statement journals
        try:
            file = _open_replica(name)
        except LazyReplicaError as exc:
            raise as_sqlite(exc, OPEN) from exc
        flags[1] = asked & ~(apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE) | apsw.SQLITE_OPEN_READONLY
        return file  # type: ignore[return-value]  # APSW asks for the methods only

    def xAccess(self, pathname: str, flags: int) -> bool:  # noqa: ARG002
        """Nothing exists: neither a hot journal nor a WAL is a replica's."""
        return False

    def xDelete(self, filename: str, syncdir: bool) -> None:  # noqa: ARG002
        raise apsw.IOError(f"refusing to delete {filename}: a replica's name names nothing on disk")

    def xFullPathname(self, name: str) -> str:
        """Unchanged."""
        return name


def _open_replica(name: str | apsw.URIFilename | None) -> ReplicaFile:
    if isinstance(name, apsw.URIFilename):
        filename, parameters = (
            name.filename(),
            {key: name.uri_parameter(key) or "" for key in name.parameters},
        )
    else:
        filename, parameters = name or "", {}
    _refuse_strangers(filename, parameters)
    named = resolve(filename, parameters)
    replica = acquire(named.url, named.options, named.credentials)
    try:
        return ReplicaFile(replica, locks=not _never_locks(parameters), start=named.start)
    except BaseException:
        release(replica)
        raise


def _refuse_strangers(filename: str, parameters: Mapping[str, str]) -> None:
    """ATTACH and VACUUM INTO inherit the connection's VFS: a plain file name must not become a replica silently."""
    if is_configured(filename) or "replica_url" in parameters or parameters.get("vfs") == NAME:
        return
    raise ConfigError(
        f"{filename!r} is not a configured replica, and this connection's VFS would open it as one: for a local file "
        f"write 'file:{filename}?vfs=unix' (ATTACH and VACUUM INTO take it too), for a replica "
        f"'file:{filename}?vfs=litestream&replica_url=...'"
    )


def _never_locks(parameters: Mapping[str, str]) -> bool:
    """Whether SQLite will read without locking."""
    return _is_true(parameters.get("immutable", "")) or _is_true(parameters.get("nolock", ""))


def _is_true(value: str) -> bool:
    """SQLite's own reading of a boolean URI parameter (``sqlite3GetBoolean``): leading digits count, as one byte."""
    digits = re.match(r"[0-9]+", value)
    if digits:
        return int(digits[0]) & 0xFF != 0
    return value.lower() in {"yes", "true", "on"}
