"""Fills a local copy by the bulk loader: what a child process brings, and what is left to do by hand."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence

from lazyreplica.bulk import (
    BulkFile,
    BulkJob,
    BulkLoader,
    Failed,
    FileDamaged,
    FileDone,
    FileGone,
)
from lazyreplica.clock import now
from lazyreplica.errors import LazyReplicaError
from lazyreplica.filling import Stopped, Wanted
from lazyreplica.local.base import Base
from lazyreplica.pagemap import Layer
from lazyreplica.storage import Store

log = logging.getLogger(__name__)

WORTH = 8 << 20
"""Bytes of files from which on a process of its own is worth its start (0.15 s)."""
_CONNECTIONS = 8
_PAUSE = 1.0
"""Seconds that demand reads may hold the loader back, and that it then goes on beside them."""


class BulkFiller:
    """Runs one loader at a time, for one thread. `stop` ends it from any."""

    def __init__(self, store: Store, listen: Callable[[Callable[[int], None] | None], None], timeout: float) -> None:
        """`listen` sets who is told how many demand reads are waiting, at each change. `timeout`: for each request."""
        self._store = store
        self._listen = listen
        self._timeout = timeout
        self._lock = threading.Lock()
        self._loader: BulkLoader | None = None
        self._stopped = False

    def stop(self) -> None:
        """End the loader, now and for good."""
        with self._lock:
            self._stopped = True
            loader = self._loader
        if loader is not None:
            loader.stop()

    def fill(
        self,
        base: Base,
        wanted: Sequence[Wanted],
        frames: Iterable[tuple[int, memoryview]],
        lock_fd: int,
        goes_on: Callable[[], bool],
    ) -> dict[Layer, str]:
        """Bring those pages into `base`, while `goes_on` says so; what it did not bring is simply not there.

        `frames`: of pages that are in memory. (Decoded by us, each of them would be a hand-over of the interpreter lock
        from a reader and back: one query in 200 met one while 587 MB hydrated.) The child keeps `lock_fd` open: if we
        are killed, the lock lasts until it has noticed and ended.

        Returns the layers that turned out to be damaged, and how. Raises `Stopped`; `OSError` when the local files
        cannot be written, `LazyReplicaError` when no loader can be had or it failed for another reason.
        """
        job = BulkJob(
            self._store.url,
            base.path,
            base.presence_path,
            base.page_size,
            tuple(BulkFile(each.layer.file, _bitmap(each.pgnos)) for each in wanted),
            _CONNECTIONS,
            self._timeout,
            self._store.keys(),
            tuple(frames),
        )
        loader = BulkLoader(job, kept_fds=(lock_fd,))
        del job  # its bytes are needed until they are sent
        with self._lock:
            if self._stopped:
                raise Stopped
            self._loader = loader
        try:
            try:
                loader.start()
            except OSError as exc:
                raise LazyReplicaError(f"no process for bulk loading: {exc}") from exc
            self._listen(_Yielding(loader))
            return self._attend(loader, wanted, goes_on)
        finally:
            self._listen(None)
            loader.stop()
            with self._lock:
                self._loader = None

    def _attend(self, loader: BulkLoader, wanted: Sequence[Wanted], goes_on: Callable[[], bool]) -> dict[Layer, str]:
        damaged: dict[Layer, str] = {}
        for event in loader.events():
            if not goes_on():
                raise Stopped  # before what it says: an error of files that are nobody's any more is none
            match event:
                case FileDamaged(index, reason):
                    damaged[wanted[index].layer] = reason
                case FileGone(index, reason):
                    log.info("%s is gone (%s)", wanted[index].layer, reason)
                case FileDone(index):
                    log.debug("%s is local", wanted[index].layer)
                case Failed(exception):
                    raise exception
                case _:
                    pass
        if self._stopped:
            raise Stopped
        return damaged


class _Yielding:
    """Pauses a loader while demand reads wait, but not for long at a time."""

    def __init__(self, loader: BulkLoader) -> None:
        self._loader = loader
        self._since: float | None = None

    def __call__(self, waiting: int) -> None:
        """Called under the fetcher's lock: one at a time."""
        if not waiting:
            self._since = None
            self._loader.resume()
        elif self._since is None:
            self._since = now()
            self._loader.pause()
        elif now() - self._since > 2 * _PAUSE:
            self._since = None
        elif now() - self._since > _PAUSE:
            self._loader.resume()


def _bitmap(pgnos: Sequence[int]) -> bytes:
    """Bit (pgno-1) % 8 of byte (pgno-1) // 8 for each page."""
    flags = bytearray(b"0") * max(pgnos)
    for pgno in pgnos:
        flags[pgno - 1] = 49
    flags.reverse()
    return int(flags, 2).to_bytes(-(-len(flags) // 8), "little")
