"""The base of a local copy: a sparse database file, and a presence file that says which of its pages are there.

Presence has one byte a page: 0 absent, 1 written, 2 written and synced to the disk. A page's bytes are written before
its presence, so a reader that sees presence sees the page; and 1 becomes 2 only after the data is synced, so that after
a power loss (another boot id) every 1 counts as 0, and no page is trusted that may not have reached the disk.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

ABSENT, WRITTEN, SYNCED = b"\0", b"\1", b"\2"
_CHUNK = 1 << 20
_GARBAGE = re.compile(rb"[^\x00-\x02]")


class Base:
    """The database at one TXID, as far as it is here. Any process reads it; one thread of one process changes it."""

    def __init__(self, path: Path, presence_path: Path, page_size: int, commit: int, *, create: bool = False) -> None:
        """`commit` in pages, `page_size` in bytes. `create`: both files are new and empty.

        Raises `OSError`: `FileExistsError` when they are not new, or a full disk.
        """
        self.path = path
        self.presence_path = presence_path
        self.page_size = page_size
        self.commit = commit
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT | os.O_EXCL if create else 0)
        self.whole = False
        """Whether it is known that every page is here (but the lock page, which is all zero)."""
        self._fd = self._presence_fd = -1
        self._fd = os.open(path, flags, 0o600)
        self._presence_fd = os.open(presence_path, flags, 0o600)
        self._map(commit)

    def __del__(self) -> None:
        # Whoever still reads has the mappings, which outlive the descriptors.
        for fd in (self._fd, self._presence_fd):
            if fd >= 0:
                os.close(fd)

    def _map(self, known: int) -> None:
        """Make the files as large as `commit` says, and map them.

        Beyond the first `known` pages no page is here, whatever a fold that a crash ended has left there.
        """
        size = self.commit * self.page_size
        there = os.fstat(self._fd).st_size
        if there < size:
            known = min(known, there // self.page_size)
            os.ftruncate(self._fd, size)
        known = min(known, os.fstat(self._presence_fd).st_size)
        if known < self.commit:
            # Written, not left as a hole: a store into a hole of a mapping on a full disk is SIGBUS.
            pwrite_all(self._presence_fd, bytes(self.commit - known), known)
        self.pages = mmap.mmap(self._fd, size, access=mmap.ACCESS_READ)
        self.present = mmap.mmap(self._presence_fd, self.commit)

    def write(self, pgno: int, pages: bytes) -> None:
        """Write neighbouring pages from `pgno` on; they are there from now on. Raises `OSError`."""
        pwrite_all(self._fd, pages, (pgno - 1) * self.page_size)
        count = len(pages) // self.page_size
        self.present[pgno - 1 : pgno - 1 + count] = WRITTEN * count

    def forget(self, pgnos: Iterable[int]) -> None:
        """Those pages are not there any more."""
        self.whole = False
        present = self.present
        for pgno in pgnos:
            present[pgno - 1] = 0

    def forget_garbage(self) -> None:
        """If presence has bytes that nobody writes, nothing that it says is believed."""
        if _GARBAGE.search(self.present) is not None:
            self.forget(range(1, self.commit + 1))

    def forget_unsynced(self) -> None:
        """After a power loss: what was not synced may not be there."""
        before = self.present[:]
        for run in re.finditer(rb"\x01+", before):
            self.present[run.start() : run.end()] = ABSENT * len(run[0])
        os.fdatasync(self._presence_fd)

    def sync(self) -> None:
        """Everything that is here survives a power loss from now on. Raises `OSError`."""
        before = self.present[:]
        os.fdatasync(self._fd)
        for run in re.finditer(rb"\x01+", before):
            self.present[run.start() : run.end()] = SYNCED * len(run[0])
        self.sync_presence()

    def sync_presence(self) -> None:
        """What presence says now is on the disk."""
        self.present.flush()
        os.fdatasync(self._presence_fd)

    def absent(self) -> Iterator[int]:
        """Numbers of the pages that are not there, in order. 0.4 ms for a million pages that are."""
        present = self.present[: self.commit]
        at = present.find(ABSENT)
        while at >= 0:
            yield at + 1
            at = present.find(ABSENT, at + 1)

    def count(self) -> int:
        """How many pages are there."""
        return self.commit - self.present[: self.commit].count(ABSENT)

    def resize(self, commit: int) -> None:
        """The database has `commit` pages. The files only grow: see `trim`. Raises `OSError`."""
        self.whole = False
        before, self.commit = self.commit, commit
        if commit > before:
            self._map(before)

    def trim(self) -> None:
        """Cut the files off where the database ends. Raises `OSError`.

        Only where nobody reads: beyond the end of a file that was cut off, a mapping is SIGBUS. So is our own.
        """
        if not self.trimmed:
            os.ftruncate(self._fd, self.commit * self.page_size)
            os.ftruncate(self._presence_fd, self.commit)
            self._map(self.commit)

    @property
    def trimmed(self) -> bool:
        """Whether the file ends where the database ends."""
        return os.fstat(self._fd).st_size == self.commit * self.page_size

    def copy_to(self, path: Path, presence_path: Path) -> Base:
        """A second base with the same pages, in new files. Raises `OSError`."""
        other = Base(path, presence_path, self.page_size, self.commit, create=True)
        present = self.present[: self.commit]
        for run in re.finditer(rb"[\x01\x02]+", present):
            start, end = run.start() * self.page_size, run.end() * self.page_size
            copy_range(self._fd, other._fd, start, end)
            other.present[run.start() : run.end()] = WRITTEN * len(run[0])
        return other


def pwrite_all(fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """Write all of `data` at `offset`. Raises `OSError`."""
    with memoryview(data) as whole:
        view = whole
        while view:
            written = os.pwrite(fd, view, offset)
            view = view[written:]
            offset += written


def copy_range(source: int, target: int, start: int, end: int) -> None:
    """Copy those bytes from one file to the same place in another, within the kernel where it can."""
    while start < end:
        try:
            copied = os.copy_file_range(source, target, end - start, start, start)
        except (AttributeError, OSError):  # not Linux; or two filesystems, or one that cannot
            data = os.pread(source, min(_CHUNK, end - start), start)
            pwrite_all(target, data, start)
            copied = len(data)
        if not copied:
            raise OSError(f"the local copy ends at byte {start}, expected {end}")
        start += copied
