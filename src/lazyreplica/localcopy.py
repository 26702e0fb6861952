"""The local copy: a database file that fills up, and a log beside it for versions that cannot go in yet.

A page's slot in the file is empty, or holds one version (named by its layer's number). Slots are written when empty,
or by `fold`, which moves the log's pages into the file once no pinned snapshot can still need what they replace.
Private to this process: the directory carries a lock, goes away at close, and what killed processes left is swept.
"""

from __future__ import annotations

import logging
import os
import threading
from array import array
from collections.abc import Iterable
from pathlib import Path

from lazyreplica.pagemap import Layer
from lazyreplica.snapshot import Snapshot

log = logging.getLogger(__name__)

LOG_LIMIT = 64 << 20
"""The log may grow to this many bytes, or to the size of the database if that is more; then newer pages stay remote
until it is folded (its index takes about 100 bytes of memory a page)."""

_WRITING = (1 << 64) - 1
"""A slot that a writer has claimed and not finished."""


class _File:
    """A descriptor that is closed when the last reader lets go of this object."""

    def __init__(self, path: Path) -> None:
        self.fd = -1
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class _Log(_File):
    """An append-only file of page versions; has no name once it is open."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        path.unlink()
        self.end = 0
        self.places: dict[int, int] = {}
        """version << 32 | page number -> offset."""


class LocalCopy:
    """One database's pages on local disk. Its descriptors close when the last reader lets go of it.

    Readers take no lock. They may only ask for versions of snapshots that are pinned: invariant of `fold`.
    """

    def __init__(self, directory: Path, page_size: int) -> None:
        """Starts empty in `directory`, which exists, is empty and ours. `page_size` in bytes."""
        self.path = directory / "database"
        self._directory = directory
        self._page_size = page_size
        self._file = _File(self.path)
        self._fd = self._file.fd
        self._lock = threading.Lock()
        self._slots: array[int] = array("Q")
        """Version in each slot (page number - 1): 0 empty, `_WRITING`, or a layer number."""
        self._txids: dict[int, int] = {0: 0}
        """Layer number -> MaxTXID: which of two versions is newer."""
        self._log = _Log(directory / "log")
        self.present = 0
        """Slots that hold a page."""

    @property
    def pending(self) -> bool:
        """Whether versions wait in the log for a `fold`."""
        return bool(self._log.places)

    def read(self, pgno: int, version: int) -> bytes | None:
        """That version of a page, or None. About 2 us, most of it the system call."""
        size = self._page_size
        if self._held(pgno) == version:
            return os.pread(self._fd, size, (pgno - 1) * size)
        pages = self._log
        offset = pages.places.get(version << 32 | pgno)
        if offset is not None:
            return os.pread(pages.fd, size, offset)
        # `fold` fills the slot, then names its version, and only then forgets the log's: look at the slot once more.
        if self._held(pgno) == version:
            return os.pread(self._fd, size, (pgno - 1) * size)
        return None

    def has(self, pgno: int, version: int) -> bool:
        """Whether `read` would answer."""
        return self._held(pgno) == version or (version << 32 | pgno) in self._log.places

    def _held(self, pgno: int) -> int:
        try:
            return self._slots[pgno - 1]
        except IndexError:
            return 0

    def write(self, layer: Layer, pages: Iterable[tuple[int, bytes]]) -> bool:
        """Store pages of `layer`; those in neighbouring empty slots go in one system call.

        False when the log is full and some pages were left out. Raises `OSError` (a full disk).
        """
        complete = True
        run: list[bytes] = []
        start = 0
        try:
            for pgno, page in pages:
                if run and pgno != start + len(run):
                    written, run = run, []
                    self._fill(start, written, layer)
                if not self._claim(pgno):
                    complete &= self._append(pgno, layer, page)
                    continue
                if not run:
                    start = pgno
                run.append(page)
        except BaseException:
            self._conclude(start, len(run), layer, written=False)  # claimed, and never to be filled by us
            raise
        if run:
            self._fill(start, run, layer)
        return complete

    def revoke(self, layer: Layer) -> None:
        """Forget every page of `layer`: its file turned out to be damaged."""
        version = layer.number
        with self._lock:
            for at, held in enumerate(self._slots):
                if held == version:
                    self._slots[at] = 0
                    self.present -= 1
            for key in [key for key in self._log.places if key >> 32 == version]:
                del self._log.places[key]

    def fold(self, floor: Snapshot) -> None:
        """Move the log's pages into the file as far as snapshot `floor` allows, and fit the file to its size.

        `floor` is the oldest snapshot that is pinned or may be. Overwriting slot p with floor's version of p is safe:
        whoever is pinned sees that version or a newer one, so nobody may still ask for the older one that was there;
        and those who ask for floor's version find it in the log until the slot has it.
        """
        with self._lock:
            pages = self._log
            for key, offset in list(pages.places.items()):
                pgno, version = key & 0xFFFFFFFF, key >> 32
                if pgno <= floor.commit and version == floor.owner(pgno).number:
                    if self._overwrite(pgno, version, pages, offset, floor):
                        del pages.places[key]
                elif self._txids[version] <= floor.txid:
                    del pages.places[key]  # superseded or cut off, and nobody can be pinned that far back
            if not pages.places and pages.end:
                self._log = _Log(self._directory / "log")
            self._fit(floor)
            if len(self._txids) > 1024:
                used = {0, *self._slots, *(key >> 32 for key in self._log.places)}
                self._txids = {number: txid for number, txid in self._txids.items() if number in used}

    def _overwrite(self, pgno: int, version: int, pages: _Log, offset: int, floor: Snapshot) -> bool:
        self._reach(pgno)
        held = self._slots[pgno - 1]
        if held == _WRITING or self._txids[held] > floor.txid:
            return False  # what is there belongs to a snapshot after floor
        _pwrite_all(self._fd, os.pread(pages.fd, self._page_size, offset), (pgno - 1) * self._page_size)
        self._slots[pgno - 1] = version
        self.present += held == 0
        return True

    def _fit(self, floor: Snapshot) -> None:
        """End the file where floor's database ends; slots of newer snapshots, and unfinished ones, stay."""
        for at in range(floor.commit, len(self._slots)):
            held = self._slots[at]
            if held not in (0, _WRITING) and self._txids[held] <= floor.txid:
                self._slots[at] = 0
                self.present -= 1
        while len(self._slots) > floor.commit and not self._slots[-1]:
            self._slots.pop()
        size = max(len(self._slots), floor.commit) * self._page_size
        if os.fstat(self._fd).st_size != size:
            os.ftruncate(self._fd, size)

    def _reach(self, pgno: int) -> None:
        if pgno > len(self._slots):
            self._slots.extend(array("Q", bytes(8 * (pgno - len(self._slots)))))

    def _claim(self, pgno: int) -> bool:
        """Reserve the page's slot for the caller, if it is empty."""
        with self._lock:
            self._reach(pgno)
            if self._slots[pgno - 1]:
                return False
            self._slots[pgno - 1] = _WRITING
            return True

    def _fill(self, start: int, run: list[bytes], layer: Layer) -> None:
        written = False
        try:
            _pwrite_all(self._fd, b"".join(run), (start - 1) * self._page_size)
            written = True
        finally:
            self._conclude(start, len(run), layer, written=written)

    def _conclude(self, start: int, length: int, layer: Layer, *, written: bool) -> None:
        """What was claimed holds a version of `layer` now, or is empty again."""
        with self._lock:
            if written:
                self._txids[layer.number] = layer.max_txid
                self.present += length
            for at in range(start - 1, start - 1 + length):
                self._slots[at] = layer.number if written else 0

    def _append(self, pgno: int, layer: Layer, page: bytes) -> bool:
        with self._lock:
            pages = self._log
            key = layer.number << 32 | pgno
            if self._held(pgno) == layer.number or key in pages.places:
                return True
            if pages.end >= max(LOG_LIMIT, len(self._slots) * self._page_size):
                return False
            _pwrite_all(pages.fd, page, pages.end)
            self._txids[layer.number] = layer.max_txid
            pages.places[key] = pages.end
            pages.end += len(page)
            return True


def _pwrite_all(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view = view[written:]
        offset += written
