"""One state of a replica as a plain SQLite database file, byte for byte what ``litestream restore`` makes.

Each page is fetched once: from the last file of the chain that holds it. Increments are small and were read whole when
they were opened; snapshots and what else is large go through the bulk loader, over several connections at once.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from lazyreplica.bulk import BulkFile, BulkJob, BulkLoader, Event, Failed, FileDamaged, FileGone, Progress, WorkerLost
from lazyreplica.bulk.loader import Loader
from lazyreplica.bulk.pieces import PieceReader
from lazyreplica.errors import ConfigError, EmptyReplica, FileVanished, LTXError, ReplicaGap
from lazyreplica.filling import CHUNK, Wanted, pages_of, share_out, write
from lazyreplica.history import PastPlanner
from lazyreplica.layers import Layers
from lazyreplica.local.base import Base
from lazyreplica.ltx.decoder import StreamDecoder
from lazyreplica.moments import Moment
from lazyreplica.opening import list_files
from lazyreplica.pagemap import Layer
from lazyreplica.plan import Chain, plan
from lazyreplica.snapshot import Lineage, Snapshot, stack_snapshot
from lazyreplica.storage import Store, StoredFile
from lazyreplica.unfinished import Unfinished

log = logging.getLogger(__name__)

_ATTEMPTS = 4
_CONNECTIONS = 10
_KEEP = 64 << 20
"""Bytes of increments that stay in memory between their opening and the writing of their pages."""
_SIDECARS = ("-wal", "-shm", "-journal")
"""What SQLite would take for a part of the database at the same path."""

OnProgress = Callable[[int, int], None]
"""Is told how many pages are here, and of how many."""


class Restorer:
    """Restores states of one replica. For one thread."""

    def __init__(self, store: Store, timeout: float, bulk_url: str | None) -> None:
        """`timeout`: seconds for a request. `bulk_url`: the replica's URL for a process with the environment's keys.

        None where the keys come from elsewhere: then everything is loaded in this process.
        """
        self.store = store
        self.layers = Layers(store, timeout, _KEEP)
        self.files: tuple[StoredFile, ...] = ()
        """The listing that the last state was planned from."""
        self._planner = PastPlanner(store, self.layers, timeout)
        self._timeout = timeout
        self._bulk_url = bulk_url

    def restore(
        self,
        output: Path,
        moment: Moment | None = None,
        *,
        force: bool = False,
        progress: OnProgress | None = None,
        check: Callable[[Path, Snapshot], None] | None = None,
    ) -> Snapshot:
        """Write the newest state, or that of `moment`, to `output`, which appears once it is whole.

        `check` sees the finished database before that, may change it, and ends it all by raising. `force`: in place of
        what is there. An interrupted restore leaves ``<output>.part``, with which the next one goes on.

        Raises `ConfigError` when `output` exists, `NoSuchState`, `StoreError`, `LTXError`, `ReplicaError`, `OSError`.
        """
        if not force:
            _refuse_existing(output)
        unfinished = Unfinished(output)
        try:
            snapshot = self._load(unfinished, moment, progress or _say_nothing)
            unfinished.trim()
            try:
                if check is not None:
                    check(unfinished.database, snapshot)
            except BaseException:
                unfinished.remove()
                raise
            if force:
                for path in sidecars(output):
                    path.unlink(missing_ok=True)  # before: SQLite would take them for the new database's
            else:
                _refuse_existing(output)
            unfinished.finish(output)
        finally:
            unfinished.close()
        return snapshot

    def _load(self, unfinished: Unfinished, moment: Moment | None, progress: OnProgress) -> Snapshot:
        attempt = 1
        while True:
            try:
                layers = self.layers.open_chain(self._plan(moment))
                snapshot = stack_snapshot(layers, Lineage())
                self.load(snapshot, unfinished, progress)
            except WorkerLost as exc:
                log.warning("%s; loading in this process", exc)
                self._bulk_url = None
            except (FileVanished, ReplicaGap) as exc:
                # Compaction moves files while we look.
                if attempt == _ATTEMPTS:
                    raise
                attempt += 1
                log.info("planning %s again: %s", self.store.url, exc)
            else:
                return snapshot

    def load(self, snapshot: Snapshot, unfinished: Unfinished, progress: OnProgress) -> Base:
        """Bring every page of that state. Raises `FileVanished`, `WorkerLost`, `StoreError`, `LTXError`, `OSError`."""
        shares = share_out(snapshot, _all_pages(snapshot))
        base = unfinished.prepare(self.store.url, snapshot, shares)
        self._fill(base, shares, unfinished, progress)
        return base

    def pages(self, layer: Layer, data: bytes | None) -> Iterator[tuple[int, bytes]]:
        """All pages of a file, in order, verified when the iterator ends; `data`: the file, if it is here.

        Raises `StoreError`, `LTXError`.
        """
        if data is not None:
            yield from pages_of(data, layer, layer.index.pgnos)
            return
        decoder, file = StreamDecoder(), layer.file
        for offset in range(0, file.size, CHUNK):
            length = min(CHUNK, file.size - offset)
            yield from decoder.feed(self.store.read(file, offset, length, self._timeout))
        decoder.close()

    def _plan(self, moment: Moment | None) -> Chain:
        self.files = list_files(self.store, self._timeout)
        if moment is not None:
            return tuple(layer.file for layer in self._planner.open(moment, self.files))
        try:
            return plan(self.files)
        except (EmptyReplica, ReplicaGap) as exc:
            raise type(exc)(f"{self.store.url}: {exc}") from exc

    def _fill(self, base: Base, shares: Sequence[Wanted], unfinished: Unfinished, progress: OnProgress) -> None:
        """Bring what is missing. Raises `FileVanished`, `WorkerLost`, `StoreError`, `LTXError`, `OSError`."""
        present = base.present
        absent = [Wanted(each.layer, [p for p in each.pgnos if not present[p - 1]]) for each in shares]
        absent = [each for each in absent if each.pgnos]
        large = [each for each in absent if self.layers.kept(each.layer) is None]
        tally = _Tally(self.store.url, large, base.commit - sum(len(each.pgnos) for each in absent), base, progress)
        job = BulkJob(
            self._bulk_url or "",
            unfinished.database,
            unfinished.presence,
            base.page_size,
            tuple(BulkFile(each.layer.file, _bitmap(each.pgnos, base.commit)) for each in large),
            _CONNECTIONS,
            self._timeout,
        )
        loader = self._start(job) if large else None
        try:
            for each in absent:
                kept = self.layers.kept(each.layer)
                if kept is not None and each not in large:
                    write(base, pages_of(kept, each.layer, each.pgnos))
                    tally.add(len(each.pgnos))
            if loader is not None:
                for event in loader.events():
                    tally.take(event)
            elif large:
                self._load_here(job, tally)
        finally:
            if loader is not None:
                loader.stop()
        if tally.gone is not None:
            raise FileVanished(tally.gone)

    def _start(self, job: BulkJob) -> BulkLoader | None:
        """A process that does the job; None where there can be none."""
        if self._bulk_url is None:
            return None
        loader = BulkLoader(job)
        try:
            loader.start()
        except OSError as exc:
            log.info("loading in this process: %s", exc)
            return None
        return loader

    def _load_here(self, job: BulkJob, tally: _Tally) -> None:
        gate = threading.Event()
        gate.set()
        reader = PieceReader(self.store, job.connections, job.timeout, gate)
        reader.prepare()
        Loader(job, self.store, reader, gate, tally.take).run()


class _Tally:
    """Takes what the bulk loader tells."""

    def __init__(self, url: str, large: Sequence[Wanted], done: int, base: Base, progress: OnProgress) -> None:
        self.gone: str | None = None
        """Why a file could not be read to its end: it has vanished."""
        self._url = url
        self._large = large
        self._done = done
        self._total = base.commit
        self._progress = progress
        self.add(0)

    def add(self, pages: int) -> None:
        """So many more are here."""
        self._done += pages
        self._progress(self._done, self._total)

    def take(self, event: Event) -> None:
        """Raises what went wrong with the job, or `LTXError` for a damaged file."""
        if isinstance(event, Progress):
            self.add(event.pages)
        elif isinstance(event, FileGone):
            self.gone = event.reason
        elif isinstance(event, FileDamaged):
            raise LTXError(
                f"{self._large[event.index].layer} of {self._url} is damaged: {event.reason}; `litestream restore` "
                "cannot use it either, and a new snapshot by the primary replaces it"
            )
        elif isinstance(event, Failed):
            raise event.exception


def _say_nothing(done: int, total: int) -> None:
    """Nobody watches."""


def sidecars(output: Path) -> list[Path]:
    """What SQLite would take for a part of the database at `output`."""
    return [output.with_name(output.name + suffix) for suffix in _SIDECARS]


def _refuse_existing(output: Path) -> None:
    """As ``litestream restore`` does, which takes an empty file for none; and it does not look beside the output."""
    for path in (output, *sidecars(output)):
        if os.path.lexists(path) and not (path.is_file() and path.stat().st_size == 0):
            what = "" if path == output else f", and SQLite would take it for a part of {str(output)!r}"
            raise ConfigError(f"{str(path)!r} exists{what}: name another output, or overwrite it with --force")


def _all_pages(snapshot: Snapshot) -> Iterator[int]:
    """Those that files hold: all but the lock page."""
    return (pgno for pgno in range(1, snapshot.commit + 1) if pgno != snapshot.lock_pgno)


def _bitmap(pgnos: Iterable[int], commit: int) -> bytes:
    """See `BulkFile.wanted`."""
    bits = bytearray((commit + 7) // 8)
    for pgno in pgnos:
        bits[pgno - 1 >> 3] |= 1 << (pgno - 1 & 7)
    return bytes(bits)
