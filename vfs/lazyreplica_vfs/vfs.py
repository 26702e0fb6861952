"""The VFS: main databases are replicas, everything else goes to the operating system's own VFS.

A replica's name names nothing on disk. SQLite asks a VFS whether ``app.db-journal`` exists, deletes a stale
``app.db-wal``, resolves links: inherited from the unix VFS, those calls reached a live primary of the same name in the
working directory, and its WAL was deleted.
"""

from __future__ import annotations

import apsw

from lazyreplica.errors import LazyReplicaError
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
        from lazyreplica_vfs.opening import open_replica  # the engine, which `import lazyreplica` does not wait for

        try:
            file = open_replica(name)
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
