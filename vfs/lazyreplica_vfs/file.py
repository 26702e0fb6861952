"""An open replica as SQLite sees it: a read-only file whose bytes change only between read transactions."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import apsw

from lazyreplica.errors import ConfigError, LazyReplicaError
from lazyreplica.registry import release
from lazyreplica.replica import Replica
from lazyreplica.snapshot import Snapshot
from lazyreplica_vfs import page1
from lazyreplica_vfs.deferred import when_run
from lazyreplica_vfs.interrupts import Interrupts
from lazyreplica_vfs.pragmas import SETTABLE, answer
from lazyreplica_vfs.sqlite_errors import LOCK, PRAGMA, READ, as_sqlite

FCNTL_FIND = 0x6C72
"""A file control of our own (SQLite leaves those above 100 to VFSes): "which file object is this schema?"."""

_NONE, _SHARED = apsw.SQLITE_LOCK_NONE, apsw.SQLITE_LOCK_SHARED

_by_connection: dict[int, list[ReplicaFile]] = {}
"""sqlite3* -> its open replicas. SQLite's connection mutex keeps one connection's entry to one thread at a time."""

found: dict[int, ReplicaFile] = {}
"""Answers to `FCNTL_FIND`: the pointer argument is the asker's key."""


class ReplicaFile:
    """One attachment of a replica to a connection. Holds nothing but the snapshot that it has pinned."""

    def __init__(self, replica: Replica, *, locks: bool, start: tuple[str, str] | None = None) -> None:
        """Takes over one `acquire` of `replica`, unless it raises. `start`: the moment to show (see `find`).

        `locks` is False where SQLite will never lock (``immutable=1``, ``nolock=1``): then the head is pinned now, for
        good, because nothing would say when a read transaction ends.
        """
        self.replica = replica
        head = replica.head
        self._lineage = head.lineage.number
        self._locks = True
        self._hold = replica.hold()
        """Pins the head in ordinary transactions."""
        self._kept: Snapshot | None = None
        """What is pinned otherwise: a moment of the past, what another attachment has pinned, or the head for good."""
        self._resume = replica.resume
        self._single = True
        """Whether this is the only replica of its connection."""
        self._past = self.find(*start) if start else None
        """What is shown instead of the head."""
        self._reader = replica.reader(self._past)
        self._connection = 0
        self._interrupts = Interrupts(0)
        self._first: tuple[Snapshot, bytes, bytes] | None = None
        """Page 1 as shown for a snapshot, and the 16 bytes of it that SQLite looks at in every transaction."""
        if not locks:
            self._keep(replica.begin(self._lineage, self._past))
        self._locks = locks
        self._plain = locks and self._past is None
        """Whether it shows the head, alone on its connection: a transaction may begin with what the last one saw."""

    @property
    def _pinned(self) -> Snapshot | None:
        return self._hold.snapshot if self._hold.active else self._kept

    @property
    def snapshot(self) -> Snapshot:
        """What a pragma or SQL function speaks of: the pinned snapshot in a transaction, else what would be pinned."""
        return self._pinned or self._past or self.replica.head

    @contextmanager
    def pinned(self) -> Iterator[Snapshot]:
        """What a transaction sees, or would see, pinned while the block runs."""
        held = self._pinned
        past = None if held else self._past
        snapshot = self.replica.begin(self._lineage, past) if held is None else held
        try:
            yield snapshot
        finally:
            if held is None:
                self.replica.end(snapshot)

    # -- time travel: what this attachment, and no other, shows from its next transaction on --

    def find(self, kind: str, text: str) -> Snapshot | None:
        """The snapshot of a moment ("time" or "txid", and what the user wrote); None for the newest, whatever comes.

        Raises `ConfigError` when it makes no sense or cannot be shown now, and what `Replica.at` raises.
        """
        from lazyreplica.moments import parse_moment

        self._refuse_while_reading()
        moment = parse_moment(kind, text, time.time_ns() // 1_000_000)
        return self.replica.at(moment) if moment else None

    def show(self, past: Snapshot | None) -> None:
        """Show what `find` gave."""
        self._refuse_while_reading()
        self._past = past
        self._hold.snapshot = self._hold.view = None
        self._plain = self._single and past is None
        self._reader = self.replica.reader(past)

    def _refuse_while_reading(self) -> None:
        if self._pinned is None:
            return
        if self._locks:
            raise ConfigError(
                "the time cannot be set while this connection reads: end its transaction (COMMIT), and finish or close "
                "every statement that still has rows, then set it"
            )
        raise ConfigError(
            "the time cannot be set on a connection with immutable=1 or nolock=1: give the moment in the URI (time=, "
            "txid=)"
        )

    # -- locking: SQLite takes SHARED when a read transaction starts, and drops it when it ends --

    def xLock(self, level: int) -> None:
        """0.4 us where nothing has come since the last transaction."""
        if level == _SHARED and self._plain and self._resume(self._hold):
            return
        if level > _SHARED:
            raise apsw.ReadOnlyError("a Litestream replica is read-only")
        if level == _SHARED and self._pinned is None:
            try:
                self._begin()
            except LazyReplicaError as exc:
                raise as_sqlite(exc, LOCK) from exc

    def _begin(self) -> None:
        held = None if self._past else self._held_by_sibling()
        if held is not None:
            self._keep(self.replica.share(held))
        elif self._past is not None:
            self._keep(self.replica.begin(self._lineage, self._past))
        else:
            self.replica.begin_again(self._hold, self._lineage)

    def _keep(self, snapshot: Snapshot) -> None:
        self._kept = snapshot
        self._hold.view = self.replica.view(snapshot)
        self._hold.size = snapshot.size

    def xUnlock(self, level: int) -> None:
        if level == _NONE and self._locks:
            self._hold.active = False
            self._reader.token.reading = False
            if self._kept is not None:
                self._unpin()

    def xCheckReservedLock(self) -> bool:
        return False

    def _unpin(self) -> None:
        self._hold.active = False
        if self._kept is not None:
            snapshot, self._kept = self._kept, None
            self._hold.snapshot = self._hold.view = None
            self.replica.end(snapshot)

    def _held_by_sibling(self) -> Snapshot | None:
        """What another attachment of this replica to the same connection has pinned: both must show one TXID.

        Unless it shows a moment of its own.
        """
        for file in _by_connection.get(self._connection, ()):
            alike = file.replica is self.replica and file._lineage == self._lineage
            if alike and file._locks and file._past is None and file._pinned:
                return file._pinned
        return None

    # -- reading --

    def xRead(self, amount: int, offset: int) -> bytes | memoryview:
        """`amount` bytes from `offset`; fewer at the end of the database (SQLite fills up with zeros).

        A page that is local and has not changed since the copy's base is a slice of a mapping: 0.5 us, or 0.3 where the
        copy is known to be whole. A scan takes 4 us a page, SQLite's own work included.
        """
        hold = self._hold
        local = hold.view
        if local is not None and amount == local.page_size and offset:
            whole = local.whole
            if whole is not None:
                return whole[offset : offset + amount]
            pgno = offset // amount + 1
            try:
                if pgno not in local.changed and local.present[pgno - 1]:
                    return local.pages[offset : offset + amount]
            except IndexError:  # beyond the base
                pass
        elif amount == 16 and offset == 24:
            first = self._first
            if first is not None and first[0] is hold.snapshot and hold.active:
                return first[2]
        snapshot = self._pinned
        try:
            if snapshot is not None:
                return self._read(snapshot, amount, offset)
            # SQLite peeks at the header without a lock when it opens a database.
            snapshot = self.replica.begin(self._lineage, self._past)
            try:
                return self._read(snapshot, amount, offset)
            finally:
                self.replica.end(snapshot)
        except LazyReplicaError as exc:
            raise as_sqlite(exc, READ) from exc

    def xFileSize(self) -> int:
        """Bytes: what the last file of the chain says, whatever older files hold beyond it."""
        return self._hold.size if self._hold.active else self.snapshot.size

    def _read(self, snapshot: Snapshot, amount: int, offset: int) -> bytes:
        size = snapshot.page_size
        if amount == size and offset and offset % size == 0 and offset < snapshot.size:
            return self.replica.read(snapshot, offset // size + 1, self._reader, self._interrupts)
        end = min(offset + amount, snapshot.size)
        pieces = []
        while offset < end:
            pgno, start = offset // size + 1, offset % size
            length = min(size - start, end - offset)
            page = self._page_1(snapshot) if pgno == 1 else self._page(snapshot, pgno)
            pieces.append(page[start : start + length])
            offset += length
        return b"".join(pieces)

    def _page(self, snapshot: Snapshot, pgno: int) -> bytes:
        return self.replica.read(snapshot, pgno, self._reader, self._interrupts)

    def _page_1(self, snapshot: Snapshot) -> bytes:
        if self._first is None or self._first[0] is not snapshot:
            page = page1.shown(snapshot, self._page(snapshot, 1))
            self._first = (snapshot, page, page[24:40])
        return self._first[1]

    # -- the rest of sqlite3_io_methods --

    def xFileControl(self, op: int, pointer: int) -> bool:
        if op == apsw.SQLITE_FCNTL_PDB:
            self._belong_to(ctypes.c_void_p.from_address(pointer).value or 0)
            return False
        if op == apsw.SQLITE_FCNTL_PRAGMA:
            pragma = apsw.VFSFcntlPragma(pointer)
            try:
                result = self._answer(pragma.name, pragma.value)
            except LazyReplicaError as exc:
                raise as_sqlite(exc, PRAGMA) from exc
            if result is None:
                return False
            pragma.result = result
            return True
        if op == FCNTL_FIND:
            found[pointer] = self
            return True
        return False

    def _answer(self, name: str, value: str | None) -> str | None:
        kind = SETTABLE.get(name.lower())
        if kind is None or value is None:
            return answer(self.replica, self.snapshot, name, value)
        past = self.find(kind, value)
        when_run(self._connection, name.lower(), partial(self.show, past))
        return answer(self.replica, past or self.replica.head, name, None)

    def _belong_to(self, connection: int) -> None:
        self._leave_connection()
        self._connection = connection
        self._interrupts = Interrupts(connection)
        files = _by_connection.setdefault(connection, [])
        files.append(self)
        _count(files)

    def _leave_connection(self) -> None:
        files = _by_connection.get(self._connection, [])
        if self in files:
            files.remove(self)
            _count(files)
            if not files:
                _by_connection.pop(self._connection, None)

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: ARG002
        raise apsw.ReadOnlyError("a Litestream replica is read-only")

    def xTruncate(self, size: int) -> None:  # noqa: ARG002
        raise apsw.ReadOnlyError("a Litestream replica is read-only")

    def xSync(self, flags: int) -> None:
        """Nothing is ever written."""

    def xSectorSize(self) -> int:
        return 4096

    def xDeviceCharacteristics(self) -> int:
        """None. Not SQLITE_IOCAP_IMMUTABLE above all: SQLite would stop locking, and mix transactions."""
        return 0

    def xClose(self) -> None:
        self._leave_connection()
        self._unpin()
        self.replica.drop(self._hold)
        release(self.replica)


def _count(files: list[ReplicaFile]) -> None:
    for file in files:
        file._single = len(files) == 1
        file._plain = file._single and file._locks and file._past is None


def _after_fork_in_child() -> None:
    """What the parent's copy shows may change under a pin that the parent does not know of."""
    for files in _by_connection.values():
        for file in files:
            file._hold.view = None


os.register_at_fork(after_in_child=_after_fork_in_child)


def file_of(connection: apsw.Connection, schema: str) -> ReplicaFile:
    """The replica that is open as `schema` of `connection`. Raises `ConfigError` if that is not a replica."""
    key = id(connection)
    try:
        if connection.file_control(schema, FCNTL_FIND, key):
            return found[key]
    except apsw.SQLError:
        raise ConfigError(f"the connection has no database named {schema!r}") from None
    finally:
        found.pop(key, None)
    raise ConfigError(
        f"{schema!r} of this connection is {connection.db_filename(schema)!r}, not a replica: open it as "
        "'file:NAME?vfs=litestream'"
    )
