"""Keeps the head fresh: looks for new transactions, proves that they continue ours, applies them.

The next level-0 name is known (``N+1-N+1``), so one cheap GET detects a transaction and delivers it. A listing is
asked for where that cannot work: after misses (the file may have been compacted away before we looked), and when the
file that was found does not prove by itself that it continues our history.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable

from lazyreplica.clock import now
from lazyreplica.errors import FileVanished, LazyReplicaError, LTXError, ReplicaDamaged, ReplicaGap, StoreUnavailable
from lazyreplica.head import Head
from lazyreplica.layers import Arrival, Layers, check_page_size
from lazyreplica.ltx.name import FileName, format_txid
from lazyreplica.pagemap import Layer
from lazyreplica.plan import extend, plan
from lazyreplica.snapshot import Lineage, Snapshot, stack_snapshot
from lazyreplica.storage import SNAPSHOT_LEVEL, Store, StoredFile

log = logging.getLogger(__name__)

LIST_EVERY = 10.0
"""Seconds between listings while nothing arrives."""
_REQUEST = 5.0
"""Seconds that a transaction which starts after a sleep gives each request of its poll."""
_PATIENCE = 2.0
"""Seconds that it waits for a poll that somebody else has begun."""
_PROBES = 16
"""New files taken one by one before a listing is asked for: far behind, compacted files lead there faster."""

Advance = Callable[[Arrival, Snapshot], None]
Replace = Callable[[Snapshot], None]


class Follower:
    """Owner of the head's progress: nothing else changes it. One poll at a time; any thread may ask for one."""

    def __init__(
        self,
        store: Store,
        layers: Layers,
        head: Head,
        listed: Iterable[StoredFile],
        advance: Advance,
        replace: Replace,
        timeout: float,
        polled: Callable[[], None] = lambda: None,
    ) -> None:
        """`listed`: the files of the listing that the head was planned from. `timeout`: seconds for a request.

        `polled` is called after each successful poll.
        """
        self._store = store
        self._layers = layers
        self._head = head
        self._advance = advance
        self._replace = replace
        self._timeout = timeout
        self._polled = polled
        self._lock = threading.Lock()
        self._recorded = set(listed)
        """Files known to belong to the current lineage, as the last listing showed them, and those found since."""
        self.standing = True
        """Whether the last listing still showed a file of our history that ends where the head stands."""
        self._set_back = 0
        """Listings in a row that did not hold the transaction we stand on, nor a newer one."""
        self._misses = 0
        self.polls = self.failed_polls = self.transactions = 0
        """Since the start; `transactions`: files that were applied."""
        self._listed_at = self.tried_at = now()
        """When (`clock.now`) the last listing was asked for, and when the last poll, successful or not, ended."""
        self._started_at = self._awaited = self.tried_at
        self._failing = False
        """Whether the last poll that ended failed."""
        self._limit = timeout
        """Seconds for a request of the poll that is under way."""
        self._polled_at: float | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def lag(self) -> float:
        """Seconds since the last successful poll; -1 before the first, as the peer has it."""
        return -1.0 if self._polled_at is None else now() - self._polled_at

    @property
    def idle(self) -> float:
        """Seconds since the last poll, successful or not, ended."""
        return now() - self.tried_at

    def start(self, interval: float, ours: Callable[[], bool]) -> None:
        """Every `interval` seconds, in a thread: poll, if it is `ours` to do."""
        self._thread = threading.Thread(
            target=self._run, args=(interval, ours), name="lazyreplica-follower", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Ask the thread to end. A request under way is ended by closing the store."""
        self._stop.set()

    def join(self, timeout: float) -> None:
        """After `stop`: wait for the thread, at most `timeout` seconds."""
        # A connection may be closed by the garbage collector, which runs in any thread, this one included.
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def _run(self, interval: float, ours: Callable[[], bool]) -> None:
        failing = False
        while not self._stop.wait(interval):
            try:
                if not ours():
                    continue
                self.poll(thorough=self.idle > 2 * interval)  # late: we slept, and the next file may be gone by now
            except LazyReplicaError as exc:
                if self._stop.is_set():
                    return
                log.log(
                    logging.DEBUG if failing else logging.WARNING,
                    "cannot follow %s: %s",
                    self._store.url,
                    exc,
                )
                failing = True
            except Exception:
                log.exception("following %s failed unexpectedly; trying again", self._store.url)
            else:
                if failing:
                    log.info("following %s again", self._store.url)
                failing = False

    def poll(self, *, thorough: bool = False, timeout: float | None = None) -> None:
        """Look for new transactions once, and apply what is there.

        `thorough` asks for a listing even if the next file is not there, so that on return the head is the newest
        state that the store showed. `timeout`: seconds for each request, and to wait for a poll that is under way.
        Raises `StoreError`, `LTXError`, `ReplicaError`; the head then stays as it is.
        """
        limit = self._timeout if timeout is None else min(timeout, self._timeout)
        if not self._lock.acquire(timeout=-1 if timeout is None else limit):
            raise StoreUnavailable(f"{self._store.url}: a poll that is under way did not end within {limit:g} seconds")
        try:
            self._started_at = now()
            self.polls += 1
            self._limit = limit
            succeeded = False
            self._poll(thorough)
            self._polled_at = now()
            self._polled()
            succeeded = True
        finally:
            self._failing = not succeeded
            self.failed_polls += self._failing
            self.tried_at = now()
            self._lock.release()

    def known(self) -> tuple[Lineage, tuple[StoredFile, ...]]:
        """The head's lineage, and the files known to belong to it, in order of level and name.

        Some may be gone by now, or compacted ones be there that no listing has shown yet. Waits for a poll that is
        under way: it may be about to find another lineage.
        """
        if not self._lock.acquire(timeout=self._timeout):
            raise StoreUnavailable(
                f"{self._store.url}: a poll that is under way did not end within {self._timeout:g} seconds"
            )
        try:
            files = sorted(self._recorded, key=lambda file: (file.level, file.name))
            return self._head.current.lineage, tuple(files)
        finally:
            self._lock.release()

    def poll_if_idle(self, limit: float) -> bool:
        """Poll unless somebody did within `limit` seconds: for a process that slept. A failure is only logged.

        An outage must not stop readers of what is local: a poll that is under way is waited for only when the one
        before it succeeded, shortly, and once. Returns whether there was a poll.
        """
        if self.idle <= limit:
            return False
        if self._lock.locked():
            started = self._started_at
            if self._failing or started == self._awaited:
                return False
            if self._lock.acquire(timeout=_PATIENCE):
                self._lock.release()
                return True
            self._awaited = started
            return False
        try:
            self.poll(thorough=True, timeout=_REQUEST)
        except LazyReplicaError as exc:
            log.warning("cannot refresh %s after %.0f seconds without a poll: %s", self._store.url, self.idle, exc)
        return True

    def take(self, find: Callable[[Callable[[Arrival], None]], object], *, wait: bool) -> None:
        """Apply transactions that are not found by polling: `find` gives each to the function that it is given.

        Does nothing where a poll is under way, unless told to `wait` for its end.
        """
        if self._lock.acquire(blocking=wait):
            try:
                find(lambda arrival: self._apply(self._head.current, arrival))
            finally:
                self._lock.release()

    def _poll(self, thorough: bool) -> None:
        for _ in range(_PROBES):
            outcome = self._probe()
            if outcome is None:
                break
            if not outcome or self._stop.is_set():
                return
        else:
            self._list()
            return
        self._misses += 1
        if thorough or self._misses == 2 or now() - self._listed_at >= LIST_EVERY:
            self._list()

    def _probe(self) -> bool | None:
        """Take the next file: True if the head has moved, None if it is not there, False if a listing did not help."""
        head = self._head.current
        following = head.txid + 1
        try:
            arrival = self._layers.probe(0, FileName(following, following), self._limit)
            if arrival is None and head.last.file.level == SNAPSHOT_LEVEL:
                arrival = self._layers.probe(
                    SNAPSHOT_LEVEL, FileName(1, following), self._limit
                )  # as `publish` goes on
        except LTXError as exc:
            log.warning("the next transaction cannot be read (%s); looking for another file that holds it", exc)
            self._list()
            return False
        if arrival is None:
            return None
        self._misses = 0
        if _continues_wal(head.last, arrival.layer):
            self._recorded.add(arrival.layer.file)
            self._apply(head, arrival)
            return True
        # Asked for after the file was read: if the file that we stand on is listed, the path was not wiped before.
        self._list(arrival)
        return self._head.current.txid > head.txid

    def _apply(self, head: Snapshot, arrival: Arrival) -> None:
        self.transactions += 1
        if arrival.layer.header.page_size != head.page_size and arrival.layer.holds_everything:
            log.warning("%s has another page size now: open connections have to reopen", self._store.url)
            self._replace(head.with_layer(arrival.layer, Lineage()))
            return
        check_page_size(head.last, arrival.layer)
        if arrival.layer.holds_everything and not _continues_wal(head.last, arrival.layer):
            # The primary lost its local state and went on with a copy of the whole database: perhaps a restored, older
            # one, whose schema may differ although its cookie is equal.
            self._replace(head.with_layer(arrival.layer, head.lineage.next_epoch()))
        else:
            self._advance(arrival, head.with_layer(arrival.layer))
        log.debug("%s is at TXID %s", self._store.url, format_txid(arrival.layer.max_txid))

    def _list(self, arrival: Arrival | None = None) -> None:
        """Compare a listing with what we stand on, and go on from there.

        `arrival` is a level-0 file already read that may be the first step.
        """
        head = self._head.current
        for attempt in (1, 2):
            listing = self._store.list_all(self._limit)
            self._listed_at = now()
            files = listing.files
            if not files:
                log.warning("%s has no files any more; staying at TXID %s", self._store.url, format_txid(head.txid))
                return
            try:
                ends = [file for file in files if file.name.max_txid == head.txid]
                self.standing = any(file in self._recorded or self._ends_alike(file, head) for file in ends)
                if self.standing:
                    self._set_back = 0
                    self._walk(head, files, arrival)
                else:
                    self._leap(head, files)
            except (ReplicaGap, FileVanished):
                # Levels are not listed in one instant: only a hole that is still there a moment later is one.
                if attempt == 2:
                    raise
                continue
            return

    def _rewritten(self, files: tuple[StoredFile, ...], txid: int) -> bool:
        """Whether the level-0 file that we took as transaction `txid` has other bytes now."""
        name = FileName(txid, txid)
        known = {file for file in self._recorded if (file.level, file.name) == (0, name)}
        return any((file.level, file.name) == (0, name) and file not in known for file in files) and bool(known)

    def _ends_alike(self, file: StoredFile, head: Snapshot) -> bool:
        """Whether a file that we have not seen before ends with the transaction we stand on.

        It may be the one that we took, under another identity (Litestream sets a local file's date after it has
        appeared), or a compaction: that has the timestamp of its last input, in milliseconds.
        """
        same = (file.level, file.name) == (head.last.file.level, head.last.file.name)
        if not same and (file.level in (0, SNAPSHOT_LEVEL) or head.timestamp_ms == 0):
            return False
        try:
            layer = self._layers.open(file)
        except (LTXError, ReplicaDamaged) as exc:
            log.info("%s cannot be read: %s", file, exc)
            return False
        if same:
            return layer.checksum == head.last.checksum
        header = layer.header
        return (header.timestamp_ms, header.commit, header.page_size) == (
            head.timestamp_ms,
            head.commit,
            head.page_size,
        )

    def _walk(self, head: Snapshot, files: tuple[StoredFile, ...], arrival: Arrival | None) -> None:
        """A file that ends where we stand is still there: whatever continues it continues our history."""
        self._recorded = set(files)  # even if none of them can be read now: by the next poll we may know no other
        chain = extend(files, head.txid)
        layers = self._layers.open_chain(chain) if chain else []
        for layer in layers:
            data = arrival.data if arrival and arrival.layer is layer else self._layers.kept(layer)
            self._apply(self._head.current, Arrival(layer, data))

    def _leap(self, head: Snapshot, files: tuple[StoredFile, ...]) -> None:
        """What we stand on is no longer listed: plan from scratch, and find out whether this is still our history."""
        newest = max(file.name.max_txid for file in files)
        ours = any(file in self._recorded for file in files)
        if ours and newest <= head.txid:
            if newest == head.txid and not self._rewritten(files, head.txid):
                return  # only its snapshot was made anew, which Litestream may do
            # The transaction that we stand on is not there (any more, or as it was): put back to an older state, or
            # rewritten. One listing may be out of date; two are not.
            self._set_back += 1
            log.warning(
                "%s ends at TXID %s now, and does not hold TXID %s as we know it",
                self._store.url,
                format_txid(newest),
                format_txid(head.txid),
            )
            if self._set_back < 2:
                return
            ours = False
        if ours:
            self._recorded |= set(files)  # as in `_walk`
        layers = self._layers.open_chain(plan(files))
        same = ours and layers[-1].header.page_size == head.page_size
        snapshot = stack_snapshot(layers, head.lineage.next_epoch() if same else Lineage())
        if not ours:
            log.warning(
                "%s holds another database history now: TXID %s replaces %s, open connections have to reopen",
                self._store.url,
                format_txid(snapshot.txid),
                format_txid(head.txid),
            )
        self._recorded = set(files)
        self._replace(snapshot)


def _continues_wal(before: Layer, after: Layer) -> bool:
    """Whether `after` was taken from the WAL exactly where `before` ended.

    The salts name one generation of the primary's WAL, and the offset a place in it: equal place, equal database.
    """
    old, new = before.header, after.header
    return (
        new.wal_offset != 0
        and old.wal_offset != 0
        and (new.wal_salt1, new.wal_salt2) == (old.wal_salt1, old.wal_salt2)
        and new.wal_offset == old.wal_offset + old.wal_size
    )
