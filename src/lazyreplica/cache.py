"""Hot pages in memory: least recently used go first, bounded in bytes, shared by all connections of a replica."""

from __future__ import annotations

import threading

from cachetools import LRUCache


class PageCache:
    """Pages by version. A version (page number and layer number) never changes its bytes, so nothing here is stale."""

    def __init__(self, capacity: int) -> None:
        """`capacity` in bytes of page data."""
        self._pages: LRUCache[int, bytes] = LRUCache(capacity, getsizeof=len)
        self._lock = threading.Lock()

    def get(self, pgno: int, version: int) -> bytes | None:
        """The page, or None. About 1 us."""
        with self._lock:
            return self._pages.get(version << 32 | pgno)

    def put(self, pgno: int, version: int, page: bytes) -> None:
        """Keep a page, if it fits at all."""
        if len(page) <= self._pages.maxsize:
            with self._lock:
                self._pages[version << 32 | pgno] = page

    def drop_version(self, version: int) -> None:
        """Forget every page of one layer."""
        with self._lock:
            for key in [key for key in self._pages if key >> 32 == version]:
                del self._pages[key]

    def __contains__(self, key: tuple[int, int]) -> bool:
        pgno, version = key
        with self._lock:
            return version << 32 | pgno in self._pages
