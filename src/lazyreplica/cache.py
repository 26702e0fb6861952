"""Hot pages in memory, bounded in bytes, shared by all connections of a replica."""

from __future__ import annotations

import threading

from cachetools import LRUCache

_INTERIOR = frozenset((2, 5))
"""Type bytes of b-tree pages with children (SQLite file format, section 1.6)."""
_PROTECTED = 0.75
ENTRY = 400
"""Bytes that an entry takes beside its page: measured with tables that have grown to their full size."""


def _size(page: bytes) -> int:
    return len(page) + ENTRY


class PageCache:
    """Pages by version. A version (page number and layer number) never changes its bytes, so nothing here is stale.

    Two queues, so that a scan does not wash out what is used again and again (segmented LRU: Karedla, Love, Wherry,
    "Caching strategies to improve disk system performance", 1994). A page comes into the first; used once more it moves
    into the second, which has three quarters of the room and gives its oldest pages back to the first. Interior pages
    of b-trees go into the second at once: every lookup needs them.
    """

    def __init__(self, capacity: int) -> None:
        """`capacity` in bytes of memory, `ENTRY` for each page included."""
        self._capacity = capacity
        self._probation: LRUCache[int, bytes] = LRUCache(capacity, getsizeof=_size)
        self._protected: LRUCache[int, bytes] = _Protected(int(capacity * _PROTECTED), self._probation)
        self._lock = threading.Lock()

    def get(self, pgno: int, version: int) -> bytes | None:
        """The page, or None. About 1 us."""
        key = version << 32 | pgno
        with self._lock:
            page = self._protected.get(key)
            if page is None:
                page = self._probation.pop(key, None)
                if page is not None:
                    self._keep(key, page)
        return page

    def put(self, pgno: int, version: int, page: bytes) -> None:
        """Keep a page, if it fits at all. About 2 us."""
        if _size(page) > self._capacity:
            return
        key = version << 32 | pgno
        with self._lock:
            if key in self._protected:
                return
            if page[0] in _INTERIOR:
                self._probation.pop(key, None)
                self._keep(key, page)
            else:
                self._probation[key] = page
                self._trim()

    def _keep(self, key: int, page: bytes) -> None:
        if _size(page) <= self._protected.maxsize:
            self._protected[key] = page
        else:
            self._probation[key] = page
        self._trim()

    def _trim(self) -> None:
        while self._probation.currsize + self._protected.currsize > self._capacity:
            self._probation.popitem()

    @property
    def memory(self) -> int:
        """Bytes that it takes."""
        return int(self._probation.currsize + self._protected.currsize)

    def drop_version(self, version: int) -> None:
        """Forget every page of one layer."""
        with self._lock:
            for pages in (self._probation, self._protected):
                for key in [key for key in pages if key >> 32 == version]:
                    del pages[key]

    def __contains__(self, key: tuple[int, int]) -> bool:
        pgno, version = key
        number = version << 32 | pgno
        return number in self._probation or number in self._protected


class _Protected(LRUCache[int, bytes]):
    """Gives what it has no room for back to another queue."""

    def __init__(self, capacity: int, below: LRUCache[int, bytes]) -> None:
        super().__init__(capacity, getsizeof=_size)
        self._below = below

    def popitem(self) -> tuple[int, bytes]:
        key, page = super().popitem()
        self._below[key] = page
        return key, page
