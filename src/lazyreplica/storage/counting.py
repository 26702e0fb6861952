"""A `Store` that counts what a replica asks of another one, and tells listeners. About 0.4 us a call."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Sequence
from time import monotonic
from typing import BinaryIO

from lazyreplica import listeners
from lazyreplica.ltx.name import FileName
from lazyreplica.storage import Listing, Store, StoredFile


class CountingStore:
    """`store`, counted where a replica reads. See `lazyreplica.stats.Stats` for what the numbers mean."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.bytes = self.listings = self.failures = 0

    @property
    def url(self) -> str:
        return self._store.url

    def keys(self) -> dict[str, str]:
        return self._store.keys()

    @property
    def parallel(self) -> int:
        return self._store.parallel

    @property
    def ready(self) -> int:
        return self._store.ready

    @property
    def requests(self) -> int:
        return self._store.requests

    @property
    def retries(self) -> int:
        return self._store.retries

    def prepare(self, timeout: float) -> None:
        self._store.prepare(timeout)

    def list_all(self, timeout: float) -> Listing:
        self.listings += 1
        start = monotonic()
        try:
            listing = self._store.list_all(timeout)
        except Exception as exc:
            self._failed("list", start, exc)
            raise
        self._done("list", start, 0)
        return listing

    def read(self, file: StoredFile, offset: int, length: int, timeout: float) -> bytes:
        start = monotonic()
        try:
            data = self._store.read(file, offset, length, timeout)
        except Exception as exc:
            self._failed("read", start, exc)
            raise
        self._done("read", start, length)
        return data

    def read_into(self, file: StoredFile, offset: int, buffer: memoryview, timeout: float) -> None:
        start = monotonic()
        try:
            self._store.read_into(file, offset, buffer, timeout)
        except Exception as exc:
            self._failed("read", start, exc)
            raise
        self._done("read", start, len(buffer))

    def read_many(self, wanted: Iterable[tuple[StoredFile, int, int]], timeout: float) -> Generator[bytes]:
        start = monotonic()
        with contextlib.closing(self._store.read_many(wanted, timeout)) as replies:
            while True:
                try:
                    data = next(replies)
                except StopIteration:
                    return
                except Exception as exc:
                    self._failed("read", start, exc)
                    raise
                self._done("read", start, len(data))
                yield data

    def get(self, level: int, name: FileName, limit: int, timeout: float) -> tuple[StoredFile, bytes] | None:
        start = monotonic()
        try:
            found = self._store.get(level, name, limit, timeout)
        except Exception as exc:
            self._failed("get", start, exc)
            raise
        self._done("get", start, len(found[1]) if found else 0)
        return found

    def _done(self, method: str, start: float, size: int) -> None:
        self.bytes += size
        if listeners.present:
            self._tell(method, size, start, "ok")

    def _failed(self, method: str, start: float, exc: Exception) -> None:
        self.failures += 1
        if listeners.present:
            self._tell(method, 0, start, type(exc).__name__)

    def _tell(self, method: str, size: int, start: float, outcome: str) -> None:
        from lazyreplica.events import RequestDone

        listeners.emit(RequestDone(self.url, method, size, monotonic() - start, outcome))

    # -- what a replica never does --

    def list_level(self, level: int, after: FileName | None, timeout: float) -> Sequence[StoredFile]:
        return self._store.list_level(level, after, timeout)

    def put(self, level: int, name: FileName, source: BinaryIO, size: int, timestamp: float, timeout: float) -> None:
        self._store.put(level, name, source, size, timestamp, timeout)

    def read_note(self, name: str, timeout: float) -> bytes | None:
        return self._store.read_note(name, timeout)

    def write_note(self, name: str, data: bytes, timeout: float) -> None:
        self._store.write_note(name, data, timeout)

    def close(self) -> None:
        self._store.close()
