"""A replica: ties store, head, caches, follower and hydrator together. Shared by every connection and thread.

A read's way: `Replica.read` -> local copy -> memory -> fetcher -> store.
A transaction's way in: follower -> local copy -> a new head snapshot, by one assignment.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import cached_property, partial
from typing import TYPE_CHECKING

from lazyreplica import listeners
from lazyreplica.attachment import Attachment
from lazyreplica.cache import PageCache
from lazyreplica.clock import now
from lazyreplica.config import Options
from lazyreplica.crawl import crawl
from lazyreplica.damage import Damages, verify_patiently
from lazyreplica.errors import (
    LineageChanged,
    LTXError,
    ReplicaError,
    ReplicaGap,
    StoreUnavailable,
    WaitTimeout,
)
from lazyreplica.fetcher import Fetcher
from lazyreplica.filling import Filler
from lazyreplica.follower import Follower
from lazyreplica.gather import Gatherer
from lazyreplica.head import Head, Hold
from lazyreplica.hydration import make_hydrator
from lazyreplica.hydrator import JOIN_TIMEOUT, Hydrator
from lazyreplica.layers import Arrival, Layers
from lazyreplica.local.copy import View
from lazyreplica.ltx.name import format_txid
from lazyreplica.opening import open_newest
from lazyreplica.pagemap import Layer
from lazyreplica.prefetch import Reader
from lazyreplica.readahead import Readahead, Urgency
from lazyreplica.readcounters import ReadCounters
from lazyreplica.relocate import Relocator
from lazyreplica.snapshot import Snapshot
from lazyreplica.storage import Store, StoredFile
from lazyreplica.storage.counting import CountingStore
from lazyreplica.trees import Trees

if TYPE_CHECKING:
    from lazyreplica.history import History
    from lazyreplica.moments import Moment
    from lazyreplica.stats import Stats

log = logging.getLogger(__name__)

_WAIT_STEP = 0.2
_GRACE = 0.02
"""Seconds before background work begins: whoever opened a replica reads its schema first."""
_READAHEAD = 24
_OPEN_TIMEOUT = 10.0
"""Seconds for the first listing: who opens a replica wants to know soon that nobody answers."""


class Replica:
    """One replica URL in one process. Opening it plans the newest state; `close` ends its threads and files.

    Raises whatever makes the path unreadable: `StoreError`, `EmptyReplica`, `LegacyLayout`, `ReplicaGap`,
    `ReplicaDamaged`, `LTXError`, `ConfigError`.
    """

    def __init__(self, store: Store, options: Options) -> None:
        """Owns `store` from here on, even when this raises."""
        self.options = options
        self.url = store.url
        store = self._store = CountingStore(store)
        self._counters = ReadCounters()
        self._closed = self._abandoned = False
        self._closing = threading.Event()
        self._damages = Damages(store.url)
        self._hydrator: Hydrator | None = None
        self._fresh = -1.0
        """Seconds after a poll in which a transaction may begin with what the last one saw; negative: never."""
        self.layers = Layers(store, options.read_timeout)
        self._readahead = Readahead(min(store.parallel, _READAHEAD))
        try:
            limit = min(_OPEN_TIMEOUT, options.read_timeout)
            opened = open_newest(store, self.layers, self._readahead, limit)
            snapshot = opened.snapshot
            self._head = Head(snapshot, fixed=not options.poll_interval)
            self._cache = PageCache(options.cache_size)
            self._follower = Follower(
                store,
                self.layers,
                self._head,
                opened.files,
                self._advance,
                self._replace,
                options.read_timeout,
                self._polled,
            )
            self._beside: dict[Snapshot, Snapshot] = {}
            """Snapshots of the past that are being read -> the head that was pinned with each (see `_local_page`)."""
            relocator = Relocator(store, self.layers, self._head, self._catch_up, options.read_timeout)
            self._trees = Trees(snapshot.page_size)
            self._fetcher = Fetcher(
                store,
                self.layers,
                self._cache,
                relocator,
                self._readahead,
                self._trees,
                self._counters,
                options.read_timeout,
            )
            self._hydrator = self._make_hydrator(relocator, opened.files)
            self._gatherer = Gatherer(store, self.layers, self._cache, relocator, self._trees, options.read_timeout)
        except BaseException:
            self._readahead.stop()
            store.close()
            raise
        if self._hydrator:
            self._hydrator.start()
        if opened.far:
            self._readahead.do(lambda: self._warm_up(snapshot), Urgency.WHENEVER)
        self._set_fresh()
        if options.poll_interval:
            self._follower.start(options.poll_interval, self._may_poll)
        log.debug("opened %s at TXID %s: %d bytes", self.url, format_txid(snapshot.txid), snapshot.size)

    def _warm_up(self, snapshot: Snapshot) -> None:
        """What makes the first minutes better, in a thread of its own, once the one who opened us has begun to read."""
        if self._closing.wait(_GRACE):
            return
        # These come first, and stay as far as there is room: the next queries find their pages here.
        for layer in snapshot.pages.layers():
            self._readahead.do(partial(self._verify, layer), Urgency.PERHAPS)
        if "interior" in self.options.prefetch:
            crawl(snapshot, self._gatherer, self._trees)

    def _verify(self, layer: Layer) -> None:
        """Verify a file that was opened in haste."""
        damage = verify_patiently(self.layers, layer, self._closing)
        if damage is None:
            return
        self._damages.note(layer, self._head.current.lineage.number, damage)
        self._fresh = -1.0  # no transaction begins with what the last one saw
        self._head.drop_views()
        self._fetcher.distrust(layer, damage)
        if self._hydrator:
            self._hydrator.give_up(LTXError(f"{layer} is damaged: {damage}"))

    def _make_hydrator(self, relocator: Relocator, listed: tuple[StoredFile, ...]) -> Hydrator | None:
        def make_filler(stop: threading.Event) -> Filler:
            return Filler(
                self._store, self.layers, self._head, self._fetcher, relocator, stop, self.options.read_timeout
            )

        return make_hydrator(self._store, self.layers, self._head, self._fetcher, make_filler, self.options, listed)

    def _may_poll(self) -> bool:
        """Whether this process is the one that asks the store; else what the one that does has found is taken over."""
        hydrator = self._hydrator
        if hydrator is None or hydrator.local.owned:
            return True
        local = hydrator.local
        self._follower.take(hydrator.take_over, wait=True)
        if local.owned:
            self._set_fresh()
            return True
        if local.outdated or not local.attached:
            self._follower.take(partial(local.follow_log, listing=self._listing), wait=True)
        local.check_whole()
        return now() - local.polled_at > 2 * self.options.poll_interval

    def _set_fresh(self) -> None:
        # Where another process follows for us, each transaction has to look at what it has found.
        self._fresh = -1.0 if self._others() or self._damages else self.options.staleness_limit

    def _others(self) -> Attachment | None:
        """The local copy, if another process owns it and follows for us."""
        hydrator = self._hydrator
        return hydrator.local if hydrator is not None and not hydrator.local.owned else None

    def _listing(self) -> list[StoredFile]:
        return list(self._store.list_all(self.options.read_timeout).files)

    @property
    def head(self) -> Snapshot:
        """What a transaction that starts now would see: the newest snapshot, or the fixed one."""
        return self._head.shown

    @property
    def lag(self) -> float:
        """Seconds since the last successful poll; -1 before the first."""
        local = self._others()
        if local is not None and local.polled_at:
            return max(0.0, now() - local.polled_at)
        return self._follower.lag

    @property
    def hydration_progress(self) -> float:
        """0..100; 100.0 exactly when every page of the head is local."""
        return self._hydrator.progress if self._hydrator else 0.0

    @property
    def hydration_file(self) -> str | None:
        """The database file that the hydrator fills, or None when there is none."""
        path = self._hydrator.local.path if self._hydrator else None
        return None if path is None else str(path)

    @property
    def hydration_txid(self) -> int | None:
        """The transaction whose database the file at `hydration_file` is, byte for byte; None while it is not whole."""
        return self._hydrator.local.file_txid if self._hydrator else None

    def stats(self) -> Stats:
        """What this replica has done, and where it stands. Takes no lock; some 20 us."""
        from lazyreplica.stats import Stats  # a large value class takes 2 ms to make, and an open does not need it

        store, follower, counters, extents = self._store, self._follower, self._counters, self.layers.extents
        txid = self.hydration_txid
        return Stats(
            url=self.url,
            txid=format_txid(self.head.txid),
            lag=self.lag,
            requests=store.requests,
            retries=store.retries,
            failures=store.failures,
            bytes=store.bytes,
            listings=store.listings,
            polls=follower.polls,
            failed_polls=follower.failed_polls,
            transactions=follower.transactions,
            memory_hits=counters.memory_hits,
            local_hits=counters.local_hits,
            ahead_hits=counters.ahead_hits,
            misses=counters.misses,
            pages_ahead=extents.pages_ahead,
            pages_ahead_unused=extents.pages_unused,
            cache_bytes=self._cache.memory,
            ahead_bytes=extents.memory,
            hydration_progress=self.hydration_progress,
            hydration_txid=None if txid is None else format_txid(txid),
        )

    @cached_property
    def _past(self) -> History:
        from lazyreplica.history import History  # few look back: 4 ms that an open does not wait for

        poll = partial(self._follower.poll, thorough=True)
        return History(self._store, self.layers, poll, self._follower.known, self.options.read_timeout)

    def at(self, moment: Moment) -> Snapshot:
        """The snapshot of a moment of the past, for one reader: no two calls give the same value.

        Raises `NoSuchState` when no such state can be made, and says which can; `ReplicaGap` when transactions before a
        time are missing; `StoreError`, `LTXError`, `ReplicaDamaged`.
        """
        return self._past.at(moment, self._head.current)

    def begin(self, lineage: int, past: Snapshot | None = None) -> Snapshot:
        """Pin the head for a read transaction of a connection that opened lineage number `lineage`.

        Or begin to read `past`, which `at` gave. Each `begin` needs an `end`.

        After a sleep (see `Options.max_staleness`) the head is refreshed first. Raises `LineageChanged` when the path
        holds another database history by now.
        """
        self._refuse_if_closed()
        idle = self._follower.idle
        local = self._others() if self.options.poll_interval and past is None else None
        if local is not None:
            if local.outdated:
                self._follower.take(partial(local.follow_log, listing=None), wait=False)
            idle = min(idle, now() - local.polled_at)
        stale = past is None and idle > self.options.staleness_limit
        if stale and self._follower.poll_if_idle(self.options.staleness_limit):
            self._show_current()
        snapshot = self._head.pin_current() if past else self._head.pin()
        if snapshot.lineage.number != lineage:
            self._head.unpin(snapshot)
            raise LineageChanged(
                f"{self.url} holds another database now: its history was started anew (wiped, or replaced by a "
                f"different database) and is at TXID {format_txid(snapshot.txid)}; close this connection and open it "
                "again to read the new one"
            )
        if past is None:
            return snapshot
        self._beside[past] = snapshot
        return past

    def hold(self) -> Hold:
        """For one reader: `begin_again` and `resume` pin with it, without a lock if nothing is new. Ends by `drop`."""
        return self._head.add_hold()

    def drop(self, hold: Hold) -> None:
        """The reader has gone."""
        if not self._abandoned:
            self._head.drop(hold)

    def resume(self, hold: Hold) -> bool:
        """Begin another transaction with what `hold` had in the last one, if that is still the newest. 0.3 us."""
        hold.active = True
        head = self._head
        if (
            hold.snapshot is head.shown
            and hold.edition == head.edition
            and now() - self._follower.tried_at <= self._fresh
        ):
            return True
        hold.active = False
        return False

    def begin_again(self, hold: Hold, lineage: int) -> None:
        """`begin`, pinned by `hold`: setting `hold.active` to False ends it."""
        snapshot = self.begin(lineage)
        self._head.hand_over(snapshot, hold)
        hold.edition = self._head.edition  # first: if it changes meanwhile, the next transaction asks again
        hold.size, hold.view = snapshot.size, self.view(snapshot)

    def _refuse_if_closed(self) -> None:
        """In a forked child, before any lock: it may be held by a thread that does not exist here."""
        if self._closed:
            raise ReplicaError(
                f"{self.url} was opened before this process was forked (or is closed): a child process needs a "
                "connection of its own, opened after the fork"
            )

    def share(self, snapshot: Snapshot) -> Snapshot:
        """Pin once more what is pinned already."""
        self._refuse_if_closed()
        return self._head.pin(snapshot)

    def end(self, snapshot: Snapshot) -> None:
        """Unpin; each `begin` and `share` needs one."""
        if self._closed:
            return  # in a forked child the head's lock may be held by a thread that does not exist here
        self._head.unpin(self._beside.pop(snapshot, snapshot))

    def view(self, snapshot: Snapshot) -> View | None:
        """The local copy as of a pinned snapshot, if there is one: what it has may be read from it directly."""
        if self._hydrator is None or self._damages:
            return None
        return self._hydrator.local.view(snapshot)

    def reader(self, past: Snapshot | None = None) -> Reader:
        """What predicts the reads of one more open database, or of a view of the past: that has trees of its own."""
        size = self.head.page_size
        return Reader(Trees(size) if past else self._trees, size, self.options.prefetch)

    def read(self, snapshot: Snapshot, pgno: int, reader: Reader, is_off: Callable[[], bool] | None = None) -> bytes:
        """Page `pgno` (1 <= pgno <= commit) of a pinned snapshot, as it is stored.

        When `is_off`, asked again and again while storage keeps us waiting, says so, that ends with `Interrupted`.

        Raises `StoreError`, `LTXError`, `ReplicaDamaged`, `SnapshotGone`; `ReplicaError` in a forked child: pages,
        sockets and locks are the parent's. Never returns a page it is not sure of.
        """
        if self._closed:
            self._refuse_if_closed()
        if self._damages:
            self._damages.refuse(snapshot)
        if pgno == snapshot.lock_pgno:
            return bytes(snapshot.page_size)
        layer = snapshot.owner(pgno)
        if self._hydrator is not None:
            page = self._local_page(snapshot, layer, pgno)
            if page is not None:
                self._counters.local_hits += 1
                return page
        page = self._cache.get(pgno, layer.number)
        if page is not None:
            self._counters.memory_hits += 1
            reader.hit(pgno, page)
        else:
            page = self._fetcher.page(snapshot, layer, pgno, reader, is_off)
        return page

    def _local_page(self, snapshot: Snapshot, layer: Layer, pgno: int) -> bytes | None:
        """The page out of the local copy.

        That overwrites what no pinned snapshot of the head's needs. A snapshot of the past is not among those: it would
        hold the copy back. So of its pages only those are asked for there that are also the newest of the head pinned
        beside it, which are most.
        """
        assert self._hydrator is not None, "asked for where there is a copy"
        beside = self._beside.get(snapshot) if self._beside else None
        if beside is None:
            return self._hydrator.local.read(snapshot, layer, pgno)
        if pgno <= beside.commit and beside.pages.owner(pgno) is layer:
            return self._hydrator.local.read(beside, layer, pgno)
        return None

    def refresh(self) -> None:
        """Poll now: on return the head is the newest state in the store. Raises what made that impossible."""
        self._refuse_if_closed()
        self._follower.poll(thorough=True)
        self._show_current()

    def wait_for(self, txid: int, timeout: float) -> None:
        """Return once the head has reached `txid`; raises `WaitTimeout` after `timeout` seconds."""
        self._refuse_if_closed()
        deadline = time.monotonic() + timeout
        trouble: StoreUnavailable | None = None
        polled = False
        while self._head.current.txid < txid:
            left = deadline - time.monotonic()
            if left <= 0 and polled:
                raise WaitTimeout(
                    f"{self.url} is at TXID {format_txid(self._head.current.txid)} after {timeout:g} seconds, "
                    f"waiting for {format_txid(txid)}"
                ) from trouble
            try:
                self._follower.poll(timeout=max(left, 0.1))
            except StoreUnavailable as exc:
                trouble = exc
            polled = True
            self._head.wait_beyond(txid - 1, min(_WAIT_STEP, max(0.0, deadline - time.monotonic())))
        self._show_current()

    def close(self) -> None:
        """Stop and join the threads, remove a private local copy, drop connections. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._fresh = -1.0
        self._closing.set()
        self._follower.stop()
        self._readahead.stop()
        if self._hydrator:
            self._hydrator.stop()
        self._store.close()  # wakes whoever waits for the network, so that the joins below are short
        self._follower.join(JOIN_TIMEOUT)
        self._readahead.join(JOIN_TIMEOUT)
        if self._hydrator:
            self._hydrator.close()

    def abandon(self) -> None:
        """In a forked child: the threads, the local copy and the sockets are the parent's; use none of them."""
        self._closed = self._abandoned = True
        self._fresh = -1.0
        if self._hydrator:
            self._hydrator.abandon()

    def _advance(self, arrival: Arrival, after: Snapshot) -> None:
        if self._hydrator:
            self._hydrator.advance(arrival, after)
        else:
            self._head.advance(after)
        self._tell(after)

    def _replace(self, after: Snapshot) -> None:
        if after.lineage.number != self._head.current.lineage.number:
            self._trees.forget(after.page_size)
        if self._hydrator:
            self._hydrator.replace(after)
        else:
            self._head.replace(after)
        self._tell(after)

    def _tell(self, after: Snapshot) -> None:
        if listeners.present:
            from lazyreplica.events import TransactionArrived

            lag = time.time() - after.timestamp_ms / 1000
            listeners.emit(TransactionArrived(self.url, format_txid(after.txid), lag))

    def _polled(self) -> None:
        if self._hydrator:
            self._hydrator.local.polled()

    def _show_current(self) -> None:
        self._head.show_current()
        if self._hydrator:
            self._hydrator.wake()

    def _catch_up(self, timeout: float) -> bool:
        """For the relocator: know every layer up to the newest, and that the store still holds our history.

        `timeout`: seconds for each request.
        """
        try:
            self._follower.poll(thorough=True, timeout=timeout)
        except ReplicaGap as exc:
            log.info("%s cannot be followed: %s", self.url, exc)
        return self._follower.standing
