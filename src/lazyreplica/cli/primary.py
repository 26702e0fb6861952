"""Compares a replica's newest state with the live primary, page by page, at one TXID.

A primary moves on while it is read. An LTX file that Litestream took from the write-ahead log says where in the log it
ended (header: WAL offset, size, salts), so the primary's pages *at that very place* can be told: each is the page's
last frame before it, or else lies in the database file. Two things must hold, and a read transaction held meanwhile
makes them hold: no checkpoint copies frames from behind our transaction's end into the database file (so the place
must be at or after that end: the replica must have caught up with the moment at which we began), and the log is not
started anew, or not without our noticing (its salts change). Writers are not held up.

SQLite: https://sqlite.org/fileformat2.html#walformat, https://sqlite.org/wal.html
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from typing import BinaryIO

import apsw

from lazyreplica.errors import ConfigError, FileVanished, ReplicaGap
from lazyreplica.ltx.header import HEADER_SIZE, Header, lock_pgno
from lazyreplica.plan import extend
from lazyreplica.storage import SNAPSHOT_LEVEL, Listing, Store
from lazyreplica.verify import TIMEOUT, apply

_PAUSE = 0.2
_SHOWN = 10
_MAY_LAG = "or the replica has not caught up with the primary"
_WAL_HEADER = Struct(">IIIIIIII")  # magic, version, page size, checkpoints, salts, checksums
_FRAME_HEADER = Struct(">IIII8x")  # page, database size after a commit or 0, salts, (checksums)
UNLIKE = ((24, 28), (40, 44), (92, 100))
"""Bytes of page 1 that a copy by SQLite's backup may have otherwise: change counter; schema cookie; version-valid-for,
and the version of the SQLite that wrote last."""


@dataclass(frozen=True, slots=True)
class Compared:
    """How the replica and its primary compare."""

    txid: int
    """The replica's TXID that was compared."""
    exact: bool
    """True: at the primary's own place in its log, every byte. False: with a copy, page 1 without `UNLIKE`."""
    pages: int
    """Pages compared."""
    replica_commit: int
    primary_commit: int
    """Sizes in pages."""
    differing: int
    first: tuple[int, ...]
    """The first pages that differ."""
    lag: str
    """Why the two may not be, or were not, compared at one moment; empty when they were."""

    @property
    def same(self) -> bool:
        return not self.differing and self.replica_commit == self.primary_commit and not self.lag


@dataclass(frozen=True, slots=True)
class _Log:
    """What a write-ahead log holds up to some place."""

    salts: tuple[int, int]
    end: int
    """Bytes: where the last whole transaction ends."""
    commit: int
    """The database's size in pages after that."""
    frames: dict[int, int]
    """Where the bytes of a page's last version lie."""


class _Primary:
    """A live database in a read transaction of ours."""

    def __init__(self, path: Path, connection: apsw.Connection) -> None:
        self._connection = connection
        self._files = [os.open(path, os.O_RDONLY | os.O_CLOEXEC)]
        size = connection.pragma("page_size")
        assert isinstance(size, int)
        self.page_size = size
        if connection.pragma("journal_mode") == "wal":
            self._files.append(os.open(f"{path}-wal", os.O_RDONLY | os.O_CLOEXEC))
        self._began = self._log()

    def close(self) -> None:
        # First the connection: closing a file drops every POSIX lock that this process holds on it
        # (https://sqlite.org/howtocorrupt.html, 2.2).
        self._connection.close()
        for file in self._files:
            os.close(file)

    def at(self, salts: tuple[int, int], end: int) -> tuple[_Log | None, str]:
        """The log up to a place, or why the primary cannot be told there.

        With nothing in the log the database file is the state, whatever the place: (None, "").
        """
        log = self._log()
        if log is None:
            return None, ""
        if salts != log.salts:
            return None, "the primary began a new log after the replica's newest transaction"
        if self._began is not None and self._began.salts == salts and end < self._began.end:
            return None, f"{self._began.end - end} bytes of the primary's log are not in the replica yet"
        log = self._log(end)
        if log is None or log.end != end:
            return None, "the replica's newest transaction does not end where one of the primary's log does"
        return log, ""

    def differences(self, state: BinaryIO, state_commit: int, log: _Log | None) -> tuple[int, list[int]]:
        """The primary's size in pages at that place, and the pages that differ."""
        size = self.page_size
        database = self._files[0]
        commit = log.commit if log else os.fstat(database).st_size // size
        frames = log.frames if log else {}
        differing = []
        for pgno in range(1, min(commit, state_commit) + 1):
            place = frames.get(pgno)
            here = (database, (pgno - 1) * size) if place is None else (self._files[1], place)
            theirs = os.pread(here[0], size, here[1])
            if pgno != lock_pgno(size) and theirs != os.pread(state.fileno(), size, (pgno - 1) * size):
                differing.append(pgno)
        return commit, differing

    def still(self, log: _Log | None) -> bool:
        """Whether the log that was read still lies there. (With nothing in it, nothing was read.)"""
        now = self._log()
        return log is None or (now is not None and now.salts == log.salts)

    def back_up(self, path: Path) -> None:
        """A copy of what our transaction sees, by SQLite's own backup."""
        target = apsw.Connection(str(path), vfs="unix")
        try:
            with target.backup("main", self._connection, "main") as backup:
                while not backup.done:
                    backup.step(4096)
        finally:
            target.close()

    def _log(self, end: int | None = None) -> _Log | None:
        """The log's whole transactions, up to `end`; None if there is none."""
        if len(self._files) < 2:
            return None
        file, step = self._files[1], _FRAME_HEADER.size + self.page_size
        header = os.pread(file, _WAL_HEADER.size, 0)
        if len(header) < _WAL_HEADER.size:
            return None
        salts = _WAL_HEADER.unpack(header)[4:6]
        frames: dict[int, int] = {}
        begun: dict[int, int] = {}
        found: _Log | None = None
        at = _WAL_HEADER.size
        while (end is None or at < end) and len(data := os.pread(file, _FRAME_HEADER.size, at)) == _FRAME_HEADER.size:
            pgno, commit, *salt = _FRAME_HEADER.unpack(data)
            if tuple(salt) != salts:
                break  # left over from before the log began anew
            begun[pgno] = at + _FRAME_HEADER.size
            at += step
            if commit:
                frames.update(begun)
                begun.clear()
                found = _Log(salts, at, commit, frames)
        return found


@contextmanager
def _held(path: Path) -> Iterator[_Primary]:
    """The database at `path`, in a read transaction. Raises `ConfigError` if it cannot be read."""
    if not path.is_file():
        raise ConfigError(f"{str(path)!r} is not a file: name the primary's SQLite database")
    try:
        # Read-write, as a database in WAL mode needs it; nothing is written, and closing it leaves the log alone.
        connection = apsw.Connection(str(path.absolute()), flags=apsw.SQLITE_OPEN_READWRITE, vfs="unix")
        try:
            connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
            connection.set_busy_timeout(10_000)
            connection.execute("begin")
            connection.execute("select count(*) from sqlite_schema").fetchall()
            primary = _Primary(path, connection)
        except BaseException:
            connection.close()
            raise
    except apsw.Error as exc:
        raise ConfigError(f"{str(path)!r} cannot be read as a SQLite database: {exc}") from exc
    try:
        yield primary
    finally:
        primary.close()


def compare(path: Path, store: Store, state: BinaryIO, last: Header, wait: float) -> Compared:
    """Compare the primary at `path` with `state`, the replica's newest state, whose last file has the header `last`.

    While the replica lags behind, up to `wait` seconds, its new transactions are added to `state`. Raises
    `ConfigError`, `StoreError`, `LTXError`.
    """
    with _held(path) as primary, tempfile.TemporaryDirectory(prefix="lazyreplica-compare-") as directory:
        if primary.page_size != last.page_size:
            raise ConfigError(
                f"{str(path)!r} has pages of {primary.page_size} bytes, the replica of {last.page_size}: this is "
                "another database, or the replica is from before its page size was changed"
            )
        copy = Path(directory) / "copy.db"
        deadline = time.monotonic() + wait
        while True:
            over = time.monotonic() >= deadline
            try:
                listing = store.list_all(TIMEOUT)
                last = apply(store, extend(listing.files, last.max_txid), state) or last
                place = _place(store, listing, last)
            except (FileVanished, ReplicaGap):  # compaction moves files while we look
                if over:
                    raise
            else:
                found = _with_copy(primary, copy, state, last) if place is None else _at(primary, state, last, place)
                if found.same or not found.lag or over:
                    return found
            time.sleep(_PAUSE)


def _place(store: Store, listing: Listing, last: Header) -> tuple[tuple[int, int], int] | None:
    """The log's salts, and where in it the newest transaction ends; None where no file says that.

    Levels 0 and 9 carry it, compacted files do not; Litestream keeps the newest file of level 0.
    """
    headers = (
        Header.parse(store.read(file, 0, HEADER_SIZE, TIMEOUT))
        for file in listing.files
        if file.level in (0, SNAPSHOT_LEVEL) and file.name.max_txid == last.max_txid
    )
    header = last if last.wal_offset else next((header for header in headers if header.wal_offset), None)
    if header is None:
        return None
    return (header.wal_salt1, header.wal_salt2), header.wal_offset + header.wal_size


def _at(primary: _Primary, state: BinaryIO, last: Header, place: tuple[tuple[int, int], int]) -> Compared:
    log, lag = primary.at(*place)
    if lag:
        return Compared(last.max_txid, True, 0, last.commit, 0, 0, (), lag)
    commit, differing = primary.differences(state, last.commit, log)
    if log is None:
        lag = _MAY_LAG if differing or commit != last.commit else ""
    elif not primary.still(log):
        return Compared(last.max_txid, True, 0, last.commit, 0, 0, (), "the primary's log began anew meanwhile")
    pages = min(commit, last.commit)
    return Compared(last.max_txid, True, pages, last.commit, commit, len(differing), tuple(differing[:_SHOWN]), lag)


def _with_copy(primary: _Primary, copy: Path, state: BinaryIO, last: Header) -> Compared:
    """For a replica that does not say where its transactions end in a log: a published one."""
    if not copy.exists():
        primary.back_up(copy)
    size = last.page_size
    differing = []
    with copy.open("rb") as file:
        commit = os.fstat(file.fileno()).st_size // size
        pages = min(commit, last.commit)
        for pgno in range(1, pages + 1):
            ours = os.pread(state.fileno(), size, (pgno - 1) * size)
            theirs = os.pread(file.fileno(), size, (pgno - 1) * size)
            if pgno == 1:
                ours, theirs = _comparable(ours), _comparable(theirs)
            if ours != theirs and pgno != lock_pgno(size):
                differing.append(pgno)
    lag = _MAY_LAG if differing or commit != last.commit else ""
    return Compared(last.max_txid, False, pages, last.commit, commit, len(differing), tuple(differing[:_SHOWN]), lag)


def _comparable(page: bytes) -> bytes:
    for start, end in UNLIKE:
        page = page[:start] + bytes(end - start) + page[end:]
    return page
