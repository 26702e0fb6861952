"""A database file that is filled page by page, and the map beside it that says which pages are there."""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

_MOST_VECTORS = 1024
"""POSIX lets a system define less than that, Linux and macOS do not."""
_WRITE_BACK = 8 << 20
"""Bytes after which the system is told to bring what was written to the disk: of 587 MB that are synced at the end that
takes 0.45 s instead of 0.7."""
_RUN = re.compile(rb"\x01+")


class PageFile:
    """Pages and their presence. A reader who finds a page present finds its bytes: they are written first."""

    def __init__(self, database: Path, presence: Path, page_size: int) -> None:
        """Raises `OSError`, `ValueError` for an empty presence file."""
        self._path = database
        self._page_size = page_size
        self._file = os.open(database, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        with presence.open("r+b") as file:
            self._presence = mmap.mmap(file.fileno(), 0)
        self._fresh = (0, 0)
        """Begin and end of the bytes that were written last, in a row, and that the system was told nothing of."""

    @property
    def page_count(self) -> int:
        """How many pages have a place."""
        return len(self._presence)

    def write(self, first: int, pages: list[bytes]) -> None:
        """Write pages with the numbers `first`, `first` + 1, ...; then mark them present. Raises `OSError`."""
        offset = (first - 1) * self._page_size
        rest = iter(pages)
        while some := list(islice(rest, _MOST_VECTORS)):
            size = len(some) * self._page_size
            done = self._pwritev(some, offset)
            if done < size:  # a disk that is nearly full: what is left fails, or goes in
                self._write_rest(memoryview(b"".join(some))[done:], offset + done)
            offset += size
        self._write_back((first - 1) * self._page_size, offset)
        self._presence[first - 1 : first - 1 + len(pages)] = b"\1" * len(pages)

    def _write_back(self, start: int, end: int) -> None:
        """Begin to bring bytes to the disk, and wait for nothing: `fdatasync` would, for all of them."""
        fresh = self._fresh[0] if start == self._fresh[1] else start
        if end - fresh >= _WRITE_BACK and sys.platform == "linux":
            # Pages that are dirty, as these are, begin to be written, and stay in the cache. (Those that the system has
            # written by itself meanwhile leave it.) A file system that knows no such hint goes without.
            with contextlib.suppress(OSError):
                os.posix_fadvise(self._file, fresh, end - fresh, os.POSIX_FADV_DONTNEED)
            fresh = end
        self._fresh = fresh, end

    def _pwritev(self, pages: list[bytes], offset: int) -> int:
        try:
            return os.pwritev(self._file, pages, offset)
        except OSError as exc:
            raise self._named(exc) from exc

    def _write_rest(self, data: memoryview, offset: int) -> None:
        try:
            while data:
                done = os.pwrite(self._file, data, offset)
                data, offset = data[done:], offset + done
        except OSError as exc:
            raise self._named(exc) from exc

    def _named(self, exc: OSError) -> OSError:
        return OSError(exc.errno, exc.strerror, str(self._path))

    def clear(self, page_table: bytes) -> None:
        """Mark as absent every page that the table (see `BulkFile.page_table`) has."""
        for start, end in runs(page_table):
            self._presence[start - 1 : end - 1] = bytes(end - start)


def runs(page_table: bytes) -> Iterator[tuple[int, int]]:
    """First page and end (exclusive) of each stretch of pages that the table has."""
    return (match.span() for match in _RUN.finditer(page_table))
