"""Background work that makes the replica local: fills the local copy until every page of the head is there.

One thread. It reads each file of the chain in order, so the file's own checksum is verified as it passes; new
transactions are handed to it by the follower, with their bytes, before they become visible.
"""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path

from lazyreplica.config import Options
from lazyreplica.errors import FileVanished, LazyReplicaError, LTXError, SnapshotGone, StoreError
from lazyreplica.fetcher import Fetcher
from lazyreplica.head import Head
from lazyreplica.layers import Arrival, Layers
from lazyreplica.localcopy import LocalCopy
from lazyreplica.ltx.decoder import StreamDecoder
from lazyreplica.ltx.frame import decode_frame
from lazyreplica.pagemap import Layer
from lazyreplica.relocate import Relocator
from lazyreplica.snapshot import Snapshot
from lazyreplica.storage import Store
from lazyreplica.workdir import InUse, WorkDirectory

log = logging.getLogger(__name__)

CHUNK = 4 << 20
"""Bytes of a file in one request."""
_GAP = 64 << 10
"""Two wanted frames closer than this many bytes are one range: bytes are cheaper than a round trip."""
_DEFAULT_MAX = 1 << 30
JOIN_TIMEOUT = 5.0
_YIELD = 0.005
_RETRY = 5.0


class Hydrator:
    """Owner of the local copy and its directory. `start` begins; `stop` and `close` end and remove everything."""

    def __init__(
        self,
        store: Store,
        layers: Layers,
        head: Head,
        fetcher: Fetcher,
        relocator: Relocator,
        options: Options,
        work: WorkDirectory,
    ) -> None:
        self._store = store
        self._layers = layers
        self._head = head
        self._fetcher = fetcher
        self._relocator = relocator
        self._timeout = options.read_timeout
        self._work = work
        self._copy: LocalCopy | None = LocalCopy(work.new_copy(), head.current.page_size)
        self._lineage = head.current.lineage.number
        self._complete: Snapshot | None = None
        """The newest snapshot whose every page is known to be local."""
        self._finished: set[int] = set()
        """Numbers of layers whose pages, as far as they are anybody's newest version, are local."""
        self._published = False
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._guard = threading.Lock()
        """Held while the set of local pages is compared with the head, and while the head is changed."""
        self._thread = threading.Thread(target=self._run, name="lazyreplica-hydrator", daemon=True)

    @property
    def copy(self) -> LocalCopy | None:
        """The local copy, or None once it had to be given up. Valid for snapshots of the current lineage."""
        return self._copy

    @property
    def path(self) -> Path | None:
        """The database file that is being filled, or where it appears when it is complete."""
        copy = self._copy
        return (self._work.published_at or copy.path) if copy else None

    @property
    def progress(self) -> float:
        """0..100; 100.0 exactly when every page of the current snapshot is local."""
        head, copy = self._head.current, self._copy
        if copy is None:
            return 0.0
        if self._complete is head:
            return 100.0
        total = max(1, head.commit - (head.lock_pgno <= head.commit))
        return min(99.9, 100 * copy.present / total)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ask the thread to end. A request under way is ended by closing the store."""
        self._stop.set()
        self._wake.set()

    def close(self) -> None:
        """After `stop`: join the thread and remove the local copy."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(JOIN_TIMEOUT)
        self._copy = None
        self._work.remove()

    def abandon(self) -> None:
        """In a forked child: the copy and the thread are the parent's."""
        self._copy = None
        self._work.abandon()

    def advance(self, arrival: Arrival, after: Snapshot) -> None:
        """Make `after`, the head with `arrival` applied, the new head; its pages become local first."""
        whole = False
        if self._copy is not None and arrival.data is not None:
            try:
                whole = self._copy.write(arrival.layer, _pages_of(arrival.data, arrival.layer))
            except OSError as exc:
                self._give_up(exc)
        with self._guard:
            was_complete = self._complete is not None and self._complete is self._head.current
            self._head.advance(after)
            if whole:
                self._finished.add(arrival.layer.number)
                if was_complete:
                    self._complete = after
        self._settle()
        self._wake.set()

    def replace(self, after: Snapshot) -> None:
        """Make `after` the new head, which was not reached link by link."""
        self._head.replace(after)
        if after.lineage.number != self._lineage and self._copy is not None:
            self._lineage = after.lineage.number
            self._published = False
            try:
                self._copy = LocalCopy(self._work.new_copy(), after.page_size)
            except OSError as exc:
                self._give_up(exc)
            self._finished.clear()
        self._wake.set()

    def unpinned(self) -> None:
        """A read transaction has ended: what it kept out of the file may go in now. Cheap when nothing waits."""
        copy = self._copy
        if copy is not None and copy.pending:
            self._wake.set()

    def _settle(self) -> None:
        """Fold into the file whatever no pinned snapshot keeps out of it."""
        copy = self._copy
        if copy is not None:
            try:
                copy.fold(self._head.floor())
            except OSError as exc:
                self._give_up(exc)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wake.clear()
            head, copy = self._head.current, self._copy
            if copy is None:
                return
            try:
                if self._complete is not head:
                    self._fill(head, copy)
                    continue
                self._settle()
            except OSError as exc:
                self._give_up(exc)
                return
            except (StoreError, SnapshotGone) as exc:
                if self._stop.is_set():
                    return
                log.warning("hydration of %s pauses: %s", self._store.url, exc)
                self._stop.wait(_RETRY)
                continue
            except LazyReplicaError as exc:
                log.error("hydration of %s stops, reads go on from the store: %s", self._store.url, exc)
                return
            except Exception:
                log.exception("hydration of %s failed unexpectedly, reads go on from the store", self._store.url)
                return
            self._wake.wait()

    def _fill(self, snapshot: Snapshot, copy: LocalCopy) -> None:
        """Make every page of `snapshot` local, or return early: to be called again with the head of then."""
        for layer in snapshot.pages.layers():
            if layer.number in self._finished:
                continue
            wanted = [
                pgno
                for pgno in layer.index.pgnos
                if pgno <= snapshot.commit and snapshot.pages.owner(pgno) is layer and not copy.has(pgno, layer.number)
            ]
            try:
                room = not wanted or self._bring(layer, wanted, copy)
            except FileVanished as exc:
                log.info("%s is gone (%s); looking for its pages elsewhere", layer, exc)
                if not self._bring_relocated(snapshot, layer, wanted, copy):
                    return
                room = True
            if self._stop.is_set() or self._head.current.lineage.number != snapshot.lineage.number:
                return
            if not room:
                self._settle()
                self._stop.wait(_RETRY)  # the log is full until old readers end
                return
            self._finished.add(layer.number)
        if not self._verify_complete(snapshot, copy):
            return
        self._settle()
        with self._guard:
            if self._head.current is not snapshot:
                return
            self._complete = snapshot
            self._finished.intersection_update(layer.number for layer in snapshot.pages.layers())
        if not self._published:
            self._published = True
            self._work.publish(copy.path)
            log.info("%s is local: %d bytes at %s", self._store.url, snapshot.size, self.path)

    def _verify_complete(self, snapshot: Snapshot, copy: LocalCopy) -> bool:
        """Look at every page once, so that 100 % is a fact and a page that no file holds is reported."""
        complete = True
        for pgno in range(1, snapshot.commit + 1):
            if pgno != snapshot.lock_pgno:
                layer = snapshot.owner(pgno)
                if not copy.has(pgno, layer.number):
                    self._finished.discard(layer.number)
                    complete = False
        return complete

    def _bring(self, layer: Layer, wanted: list[int], copy: LocalCopy) -> bool:
        kept = self._layers.kept(layer)
        if kept is not None:
            return copy.write(layer, _some_pages_of(kept, layer, wanted))
        entries = [entry for entry in map(layer.index.get, wanted) if entry is not None]
        if 2 * sum(size for _, size in entries) >= layer.file.size:
            try:
                return self._read_whole(layer, wanted, copy)
            except LTXError as exc:
                log.warning("%s is damaged (%s); fetching it again", layer, exc)
            copy.revoke(layer)
            try:
                return self._read_whole(layer, wanted, copy)
            except LTXError as exc:
                copy.revoke(layer)
                self._fetcher.distrust(layer, str(exc))
                raise LTXError(f"{layer} of {self._store.url} is damaged: {exc}") from exc
        return self._read_ranges(layer, layer, wanted, copy)

    def _read_whole(self, layer: Layer, wanted: list[int], copy: LocalCopy) -> bool:
        """Read the whole file in order, and verify its checksum on the way."""
        decoder = StreamDecoder()
        want = set(wanted)
        complete = True
        for offset in range(0, layer.file.size, CHUNK):
            self._stand_back()
            if self._stop.is_set():
                return False
            chunk = self._store.read(layer.file, offset, min(CHUNK, layer.file.size - offset), self._timeout)
            complete &= copy.write(layer, (page for page in decoder.feed(chunk) if page[0] in want))
        decoder.close()
        return complete

    def _read_ranges(self, layer: Layer, source: Layer, wanted: list[int], copy: LocalCopy) -> bool:
        """Read those pages of `layer` from `source`, which holds the same versions, by ranges."""
        complete = True
        for run in _runs(source, wanted):
            self._stand_back()
            if self._stop.is_set():
                return False
            base, length = run[0][1], run[-1][1] + run[-1][2] - run[0][1]
            data = memoryview(self._store.read(source.file, base, length, self._timeout))
            size = layer.header.page_size
            pages = [(p, decode_frame(data[at - base : at - base + n], p, size)) for p, at, n in run]
            complete &= copy.write(layer, pages)
        return complete

    def _bring_relocated(self, snapshot: Snapshot, layer: Layer, wanted: list[int], copy: LocalCopy) -> bool:
        """The layer's file is gone: bring its pages from wherever their versions are now.

        False when `snapshot` is no longer the head: only of what was pinned as the head are all successors known.
        """
        pinned = self._head.pin_current()
        try:
            if pinned is not snapshot:
                return False
            sources: dict[int, tuple[Layer, list[int]]] = {}
            for pgno in wanted:
                if not copy.has(pgno, layer.number):
                    source = self._relocator.find(snapshot, pgno, layer)
                    sources.setdefault(source.number, (source, []))[1].append(pgno)
            complete = True
            for source, pgnos in sources.values():
                complete &= self._read_ranges(layer, source, pgnos, copy)
            return complete
        finally:
            self._head.unpin(pinned)

    def _stand_back(self) -> None:
        """Let demand reads go first, for at most a second."""
        for _ in range(200):
            if not self._fetcher.busy or self._stop.wait(_YIELD):
                return

    def _give_up(self, exc: OSError) -> None:
        log.warning("the local copy of %s is given up, reads go on from the store: %s", self._store.url, exc)
        self._copy = None


def make_work_directory(options: Options, snapshot: Snapshot, url: str) -> WorkDirectory | None:
    """The directory for the local copy of `snapshot`'s database, or None where it should not or cannot be kept.

    Raises `ConfigError` when `hydration_path` names something that is not ours.
    """
    if options.hydrate is False:
        return None
    try:
        try:
            work = WorkDirectory.open(options.hydration_path)
        except InUse as exc:
            log.warning("%s; %s is hydrated into a private temporary file instead", exc, url)
            work = WorkDirectory.open(None)
        free = shutil.disk_usage(work.path).free
    except OSError as exc:
        log.warning("%s is not hydrated, reads go to the store: %s", url, exc)
        return None
    limit = options.hydrate_max
    if limit is None:
        limit = min(_DEFAULT_MAX, free // 4) if options.hydrate is None else free
    if snapshot.size < limit:
        return work
    work.remove()
    if options.hydrate is None:
        log.info(
            "%s is not hydrated: %d bytes, hydrate_max is %d; hydrate=true (LITESTREAM_HYDRATION_ENABLED) turns it on",
            url,
            snapshot.size,
            limit,
        )
    else:
        log.warning("%s is not hydrated: it has %d bytes, the limit is %d", url, snapshot.size, limit)
    return None


def _pages_of(data: bytes, layer: Layer) -> Iterable[tuple[int, bytes]]:
    return _some_pages_of(data, layer, (pgno for pgno in layer.index.pgnos if pgno <= layer.header.commit))


def _some_pages_of(data: bytes, layer: Layer, pgnos: Iterable[int]) -> Iterable[tuple[int, bytes]]:
    view = memoryview(data)
    for pgno in pgnos:
        entry = layer.index.get(pgno)
        assert entry is not None, "only pages of this layer are asked for"
        offset, size = entry
        yield pgno, decode_frame(view[offset : offset + size], pgno, layer.header.page_size)


def _runs(source: Layer, pgnos: list[int]) -> Iterable[list[tuple[int, int, int]]]:
    """(page number, offset, size) of those pages, in pieces that are worth one request each."""
    run: list[tuple[int, int, int]] = []
    for pgno in sorted(pgnos):
        entry = source.index.get(pgno)
        assert entry is not None, "only pages of this layer are asked for"
        offset, size = entry
        if run and (offset - run[-1][1] - run[-1][2] > _GAP or offset + size - run[0][1] > CHUNK):
            yield run
            run = []
        run.append((pgno, offset, size))
    if run:
        yield run
