"""Changes a plain SQLite database file that others read, as SQLite in rollback mode does: one transaction at a time.

Readers in other processes see all of a transaction or nothing, and whoever opens the file after a crash undoes what was
half done: the locks are SQLite's (https://sqlite.org/lockingv3.html), and so is the journal (file format, section 3).

The locks are POSIX record locks, as SQLite's unix VFS takes them. They belong to the process and go with the first
descriptor of the file that it closes: nothing else in this process may open the file while a `DatabaseFile` is open.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from struct import Struct
from typing import Protocol

from lazyreplica.dbheader import change_counter, with_header
from lazyreplica.errors import DatabaseBusy, DatabaseChanged
from lazyreplica.local.base import pwrite_all
from lazyreplica.local.state import sync_directory
from lazyreplica.ltx.header import lock_pgno

_PENDING = 0x40000000
_RESERVED = _PENDING + 1
_SHARED, _SHARED_SIZE = _PENDING + 2, 510
_MAGIC = bytes.fromhex("d9d505f920a163d7")
_HEADER = Struct(">8sIIIII")
"""Magic, records, nonce, pages before, sector size, page size."""
_SECTOR = 512
_STEP = 200
"""Every so many bytes one counts for a record's checksum."""
_PRESS = 0.2
"""Seconds for which new readers are kept out while old ones are waited for."""
_REST = 0.1
"""Seconds until that is tried again."""
_POLL = 0.002


class Changes(Protocol):
    """What one transaction changes."""

    @property
    def commit(self) -> int:
        """Size of the database after it, in pages."""

    def pgnos(self) -> Iterable[int]:
        """Numbers of the pages that it has, in order, at most `commit`."""

    def page(self, pgno: int) -> bytes:
        """One of them."""


class DatabaseFile:
    """A database file in rollback mode that this process alone changes. For one thread."""

    def __init__(self, path: Path, page_size: int) -> None:
        """Undoes what a crash left half done. Raises `OSError`, `DatabaseBusy`, `DatabaseChanged`."""
        self._path = path
        self._page_size = page_size
        self._journal = path.with_name(f"{path.name}-journal")
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            if self._journal.exists():
                with self._reserved(10), self._exclusive(10):
                    if self._journal.exists():  # or it was that of a writer who has ended meanwhile
                        self._roll_back()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._fd)

    @property
    def counter(self) -> int:
        """The change counter in the file."""
        return change_counter(os.pread(self._fd, 100, 0))

    def page(self, pgno: int) -> bytes:
        """As it is in the file; empty beyond its end."""
        return os.pread(self._fd, self._page_size, (pgno - 1) * self._page_size)

    def apply(self, changes: Changes, counter: int, epoch: int, patience: float) -> None:
        """One transaction, after which the change counter is one more than `counter`. On return it is on the disk.

        `epoch` moves the schema cookie (see `with_header`). `patience`: seconds to wait for readers to end their
        transactions; new ones are let in again and again meanwhile. Raises `DatabaseBusy`, `OSError` (and nothing is
        changed), `DatabaseChanged` when somebody else has changed the file.
        """
        with self._reserved(patience):
            self._refuse_strangers(counter)
            before = os.fstat(self._fd).st_size // self._page_size
            self._write_journal(self._touched(changes, before), before)
            begun = False
            try:
                with self._exclusive(patience):
                    begun = True
                    try:
                        self._write(changes, counter + 1 & 0xFFFFFFFF, epoch)
                    except BaseException:
                        self._roll_back()
                        raise
                    self._end_journal()
            finally:
                if not begun:  # for nobody hot, as long as we have the RESERVED lock
                    self._journal.unlink(missing_ok=True)

    def _refuse_strangers(self, counter: int) -> None:
        try:
            ours = os.path.samestat(os.fstat(self._fd), self._path.stat())
        except FileNotFoundError:
            ours = False
        if not ours or self.counter != counter or os.pread(self._fd, 2, 18) != b"\1\1":
            raise DatabaseChanged(
                f"{self._path} was replaced or changed by another program, and cannot be kept up to date any more: "
                "restore it again with --force, and open it for reading only"
            )

    # -- locks --

    @contextlib.contextmanager
    def _reserved(self, patience: float) -> Iterator[None]:
        """SHARED and then RESERVED: others may read, nobody else may begin to write."""
        deadline = time.monotonic() + patience
        try:
            while True:
                if self._lock(fcntl.LOCK_SH, _PENDING, 1):
                    shared = self._lock(fcntl.LOCK_SH, _SHARED, _SHARED_SIZE)
                    self._unlock(_PENDING, 1)
                    if shared and self._lock(fcntl.LOCK_EX, _RESERVED, 1):
                        break
                    self._unlock(_SHARED, _SHARED_SIZE)
                self._wait(deadline)
            yield
        finally:
            self._unlock(_PENDING, 2 + _SHARED_SIZE)

    @contextlib.contextmanager
    def _exclusive(self, patience: float) -> Iterator[None]:
        """PENDING and then EXCLUSIVE: nobody reads. With RESERVED held."""
        deadline = time.monotonic() + patience
        while not self._press(min(deadline, time.monotonic() + _PRESS)):
            self._unlock(_PENDING, 1)
            self._wait(deadline, _REST)
        try:
            yield
        finally:
            self._lock(fcntl.LOCK_SH, _SHARED, _SHARED_SIZE)
            self._unlock(_PENDING, 1)

    def _press(self, deadline: float) -> bool:
        pending = False
        while time.monotonic() < deadline:
            pending = pending or self._lock(fcntl.LOCK_EX, _PENDING, 1)
            if pending and self._lock(fcntl.LOCK_EX, _SHARED, _SHARED_SIZE):
                return True
            time.sleep(_POLL)
        return False

    def _wait(self, deadline: float, seconds: float = _POLL) -> None:
        if time.monotonic() > deadline:
            raise DatabaseBusy(f"{self._path} is in use: a reader does not end its transaction")
        time.sleep(seconds)

    def _lock(self, kind: int, start: int, length: int) -> bool:
        try:
            fcntl.lockf(self._fd, kind | fcntl.LOCK_NB, length, start)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def _unlock(self, start: int, length: int) -> None:
        fcntl.lockf(self._fd, fcntl.LOCK_UN, length, start)

    # -- pages --

    def _touched(self, changes: Changes, before: int) -> list[int]:
        """Pages whose present contents must be known until the transaction has ended."""
        found = {pgno for pgno in changes.pgnos() if pgno <= before}
        found.update(range(changes.commit + 1, before + 1), (1,))
        found.discard(lock_pgno(self._page_size))
        return sorted(found)

    def _write(self, changes: Changes, counter: int, epoch: int) -> None:
        size, page1 = self._page_size, b""
        for pgno in changes.pgnos():
            if pgno == 1:
                page1 = with_header(changes.page(1), counter, changes.commit, epoch)
            else:
                pwrite_all(self._fd, changes.page(pgno), (pgno - 1) * size)
        if not page1:  # its cookie was moved when it came
            page1 = with_header(os.pread(self._fd, size, 0), counter, changes.commit, 0)
        pwrite_all(self._fd, page1, 0)
        os.ftruncate(self._fd, changes.commit * size)
        os.fsync(self._fd)

    # -- the journal --

    def _write_journal(self, pgnos: list[int], before: int) -> None:
        """The present contents of those pages, on the disk. `before`: size of the database in pages."""
        nonce, size = secrets.randbits(32), self._page_size
        fd = os.open(self._journal, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            mode = os.fstat(self._fd).st_mode & 0o777
            os.fchmod(fd, mode)  # who may undo changes of the database must be able to read it
            at = _SECTOR
            for pgno in pgnos:
                page = os.pread(self._fd, size, (pgno - 1) * size)
                record = pgno.to_bytes(4) + page + _checksum(page, nonce).to_bytes(4)
                pwrite_all(fd, record, at)
                at += len(record)
            # The header counts no record before all of them are on the disk: what is torn is not played back.
            for count in (0, len(pgnos)):
                header = _HEADER.pack(_MAGIC, count, nonce, before, _SECTOR, size)
                pwrite_all(fd, header.ljust(_SECTOR, b"\0"), 0)
                os.fsync(fd)
            sync_directory(self._journal.parent)
        except BaseException:
            self._journal.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)

    def _end_journal(self) -> None:
        """The moment at which the transaction has happened, or has not."""
        self._journal.unlink(missing_ok=True)
        sync_directory(self._journal.parent)

    def _roll_back(self) -> None:
        """Play the journal back, as SQLite does with a hot one. With EXCLUSIVE held."""
        size = self._page_size
        with self._journal.open("rb") as journal:
            front = journal.read(_SECTOR)
            if len(front) == _SECTOR and front.startswith(_MAGIC):
                _, count, nonce, before, sector, page_size = _HEADER.unpack_from(front)
                length = _SECTOR + count * (size + 8)
                if (sector, page_size) != (_SECTOR, size) or (count and os.fstat(journal.fileno()).st_size != length):
                    raise DatabaseChanged(
                        f"{self._journal} was left by another program: SQLite undoes that when it opens {self._path}; "
                        "then restore it again with --force"
                    )
                for _ in range(count):
                    record = journal.read(size + 8)
                    page = record[4:-4]
                    if _checksum(page, nonce) != int.from_bytes(record[-4:]):
                        break
                    pwrite_all(self._fd, page, (int.from_bytes(record[:4]) - 1) * size)
                os.ftruncate(self._fd, before * size)
                os.fsync(self._fd)
        self._end_journal()


def _checksum(page: bytes, nonce: int) -> int:
    return nonce + sum(page[len(page) - _STEP : 0 : -_STEP]) & 0xFFFFFFFF
