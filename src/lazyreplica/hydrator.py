"""Background work that makes the replica local, and keeps it so: owner of the local copy and its directory.

One thread fills the copy until every page of the head is there. New transactions are handed over by the follower, with
their bytes, before they become visible.
"""

from __future__ import annotations

import logging
import shutil
import threading
from dataclasses import dataclass, field
from pathlib import Path

from lazyreplica.config import Options
from lazyreplica.errors import LazyReplicaError, SnapshotGone, StoreError
from lazyreplica.fetcher import Fetcher
from lazyreplica.filling import Filler, Outcome, Progress, pages_of
from lazyreplica.head import Head
from lazyreplica.layers import Arrival, Layers
from lazyreplica.localcopy import LocalCopy
from lazyreplica.relocate import Relocator
from lazyreplica.snapshot import Snapshot
from lazyreplica.storage import Store
from lazyreplica.workdir import InUse, WorkDirectory

log = logging.getLogger(__name__)

JOIN_TIMEOUT = 5.0
"""Seconds that closing waits for a thread; closing the store has ended its request."""
_DEFAULT_MAX = 1 << 30
_RETRY = 5.0


@dataclass(slots=True, eq=False)
class _Filling:
    """The local copy of one lineage, and how far it is."""

    copy: LocalCopy
    lineage: int
    progress: Progress = field(default_factory=Progress)
    complete: Snapshot | None = None
    """The newest snapshot whose every page is known to be local."""
    published: bool = False


class Hydrator:
    """`start` begins; `stop` and then `close` end and remove everything."""

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
        """Owns `work` from here on. Raises `OSError` when the copy cannot be made (a full disk)."""
        self._url = store.url
        self._head = head
        self._work = work
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._filler = Filler(store, layers, head, fetcher, relocator, self._stop, options.read_timeout)
        self._guard = threading.RLock()
        """Held while what is complete is compared with the head, and while the head is changed."""
        self._filling: _Filling | None = self._begin(head.current)
        self._thread = threading.Thread(target=self._run, name="lazyreplica-hydrator", daemon=True)

    def _begin(self, snapshot: Snapshot) -> _Filling:
        return _Filling(LocalCopy(self._work.new_copy(), snapshot.page_size), snapshot.lineage.number)

    @property
    def copy(self) -> LocalCopy | None:
        """The local copy, or None once it had to be given up."""
        filling = self._filling
        return filling.copy if filling else None

    @property
    def path(self) -> Path | None:
        """The database file that is being filled, or where it appears when it is complete."""
        copy = self.copy
        return (self._work.published_at or copy.path) if copy else None

    @property
    def progress(self) -> float:
        """0..100; 100.0 exactly when the local file is the current snapshot's database (where it was asked for, too).

        A pinned older snapshot keeps newer pages in the log: local, but not in the file yet.
        """
        head, filling = self._head.current, self._filling
        if filling is None:
            return 0.0
        there = filling.published or self._work.published_at is None
        if filling.complete is head and there and not filling.copy.pending:
            return 100.0
        total = max(1, head.commit - (head.lock_pgno <= head.commit))
        return min(99.9, 100 * filling.copy.present / total)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ask the thread to end. A request under way is ended by closing the store."""
        self._stop.set()
        self._wake.set()

    def close(self) -> None:
        """After `stop`: join the thread and remove the local copy."""
        # A connection may be closed by the garbage collector, which runs in any thread, this one included.
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(JOIN_TIMEOUT)
        self._filling = None
        self._work.remove()

    def abandon(self) -> None:
        """In a forked child: the copy and the thread are the parent's."""
        self._filling = None
        self._work.abandon()

    def advance(self, arrival: Arrival, after: Snapshot) -> None:
        """Make `after`, the head with `arrival` applied, the new head; its pages become local first."""
        filling = self._filling
        local = False
        if filling is not None and arrival.data is not None:
            layer = arrival.layer
            pgnos = (pgno for pgno in layer.index.pgnos if pgno <= layer.header.commit)
            try:
                local = filling.copy.write(layer, pages_of(arrival.data, layer, pgnos))
            except OSError as exc:
                self.give_up(filling.copy, exc)
        with self._guard:
            was_complete = filling is not None and filling.complete is self._head.current
            self._head.advance(after)
            if local and filling is not None:
                filling.progress.finished.add(arrival.layer.number)
                self.settle()  # first, so that the complete file is the head's, unless readers hold it back
                if was_complete and self._filling is filling:
                    filling.complete = after
        self._wake.set()

    def replace(self, after: Snapshot) -> None:
        """Make `after` the new head, which was not reached link by link."""
        filling = self._filling
        if filling is not None and after.lineage.number != filling.lineage:
            # The thread must find neither the new head with the old copy nor the other way round.
            self._filling = None
            self._head.replace(after)
            self._discard(filling)
            try:
                self._filling = self._begin(after)
            except OSError as exc:
                self._say_given_up(exc)
        else:
            self._head.replace(after)
        self._wake.set()

    def unpinned(self) -> None:
        """A read transaction has ended: what it kept out of the file may go in now. Cheap when nothing waits."""
        filling = self._filling
        if filling is not None and filling.copy.pending:
            self._wake.set()

    def give_up(self, copy: LocalCopy, exc: Exception) -> None:
        """The disk does not do its part, or what is in it is wrong: drop the copy, if it is still in use."""
        with self._guard:
            filling = self._filling
            if filling is None or filling.copy is not copy:
                return
            self._filling = None
        self._say_given_up(exc)
        self._discard(filling)

    def _say_given_up(self, exc: Exception) -> None:
        log.warning("the local copy of %s is given up, reads go on from the store: %s", self._url, exc)

    def _discard(self, filling: _Filling) -> None:
        """Remove a copy's files; who still reads them has them open."""
        self._work.withdraw()
        shutil.rmtree(filling.copy.path.parent, ignore_errors=True)

    def settle(self) -> None:
        """Fold into the file whatever no pinned snapshot keeps out of it; publish it once it is one transaction."""
        filling = self._filling
        if filling is None:
            return
        try:
            filling.copy.fold(self._head.floor())
            if filling.published or filling.complete is not self._head.current or filling.copy.pending:
                return
            self._work.publish(filling.copy.path)
            filling.published = True
            log.info("%s is local: %s", self._url, self.path)
        except OSError as exc:
            self.give_up(filling.copy, exc)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wake.clear()
            filling, head = self._filling, self._head.current
            try:
                if filling is None or filling.lineage != head.lineage.number or filling.complete is head:
                    self.settle()
                    self._wake.wait()
                else:
                    self._fill(filling, head)
            except OSError as exc:
                if filling is not None:
                    self.give_up(filling.copy, exc)
            except (StoreError, SnapshotGone) as exc:
                if not self._stop.is_set():
                    log.warning("hydration of %s pauses: %s", self._url, exc)
                    self._stop.wait(_RETRY)
            except LazyReplicaError as exc:
                log.error("hydration of %s stops, reads go on from the store: %s", self._url, exc)
                return
            except Exception:
                log.exception("hydration of %s failed unexpectedly, reads go on from the store", self._url)
                return

    def _fill(self, filling: _Filling, head: Snapshot) -> None:
        outcome = self._filler.fill(head, filling.copy, filling.progress)
        if outcome is Outcome.COMPLETE:
            with self._guard:
                if self._head.current is head:
                    filling.complete = head
                    filling.progress.finished &= {layer.number for layer in head.pages.layers()}
        elif outcome is Outcome.FULL:
            self.settle()
            self._wake.wait(_RETRY)  # until an old reader ends


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
