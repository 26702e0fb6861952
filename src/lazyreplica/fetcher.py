"""The only code that reads page bytes from a store on demand.

Neighbouring frames are one range request; two readers that want one page make one request.
"""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout

from lazyreplica.cache import PageCache
from lazyreplica.errors import FileVanished, LTXError, SnapshotGone, StoreUnavailable
from lazyreplica.layers import Layers
from lazyreplica.ltx.frame import decode_frame
from lazyreplica.pagemap import Layer
from lazyreplica.prefetch import MAX_BYTES
from lazyreplica.relocate import Relocator
from lazyreplica.snapshot import Snapshot
from lazyreplica.storage import Store

log = logging.getLogger(__name__)

Page = tuple[int, bytes]


class Fetcher:
    """Demand reads of one replica. Thread-safe; runs in its callers' threads, so it never needs one of its own."""

    def __init__(self, store: Store, layers: Layers, cache: PageCache, relocator: Relocator, timeout: float) -> None:
        """`timeout`: seconds a read may take in all."""
        self._store = store
        self._layers = layers
        self._cache = cache
        self._relocator = relocator
        self._timeout = timeout
        self._lock = threading.Lock()
        self._flights: dict[tuple[int, int], Future[bytes]] = {}
        self._demand = 0

    @property
    def busy(self) -> bool:
        """Whether a demand read is waiting for the network: background work stands back."""
        return self._demand > 0

    def distrust(self, layer: Layer, reason: str) -> None:
        """Serve no page of `layer` any more, from memory neither."""
        self._layers.distrust(layer, reason)
        self._cache.drop_version(layer.number)

    def page(self, snapshot: Snapshot, layer: Layer, pgno: int, window: int) -> bytes:
        """Page `pgno` of `snapshot`, which `layer` holds; up to `window` pages from there on are fetched with it.

        Raises `StoreError`, `LTXError` for bytes that stay damaged when fetched again, `SnapshotGone`.
        """
        self._refuse_distrusted(layer)
        kept = self._layers.kept(layer)
        if kept is not None:
            page = _page_of(kept, layer, pgno)
            self._cache.put(pgno, layer.number, page)
            return page
        key = (pgno, layer.number)
        with self._lock:
            flight = self._flights.get(key)
            if flight is None:
                mine = self._take_off(snapshot, layer, pgno, window)
        if flight is not None:
            return self._join(flight, snapshot, layer, pgno)
        return self._lead(mine, snapshot, layer, pgno)

    def _refuse_distrusted(self, layer: Layer) -> None:
        reason = self._layers.distrusted(layer)
        if reason is not None:
            raise LTXError(f"{layer} of {self._store.url} is damaged, its pages cannot be read: {reason}")

    def _take_off(self, snapshot: Snapshot, layer: Layer, pgno: int, window: int) -> dict[int, Future[bytes]]:
        """Claim the run of pages that one range request brings; the caller holds the lock."""
        flights = {pgno: Future[bytes]()}
        self._flights[pgno, layer.number] = flights[pgno]
        at = layer.index.position(pgno)
        total = 0
        while at is not None and len(flights) < window and at + 1 < len(layer.index):
            at += 1
            following, _, size = layer.index.entry(at)
            key = (following, layer.number)
            total += size
            if (
                total > MAX_BYTES
                or following > snapshot.commit
                or key in self._flights
                or key in self._cache
                or snapshot.pages.owner(following) is not layer
            ):
                break
            flights[following] = self._flights[key] = Future[bytes]()
        return flights

    def _lead(self, flights: dict[int, Future[bytes]], snapshot: Snapshot, layer: Layer, pgno: int) -> bytes:
        self._demand += 1  # racy under threads, which only makes the hint `busy` blunt for a moment
        try:
            page = self._fly(flights, snapshot, layer, pgno)
        except BaseException as exc:
            # An interrupt (Ctrl-C) is the leader's alone; those who joined read for themselves.
            shown = exc if isinstance(exc, Exception) else StoreUnavailable("the read that was joined was interrupted")
            for flight in flights.values():
                if not flight.done():
                    flight.set_exception(shown)
            raise
        finally:
            self._demand -= 1
            with self._lock:
                for number in flights:
                    self._flights.pop((number, layer.number), None)
        return page

    def _fly(self, flights: dict[int, Future[bytes]], snapshot: Snapshot, layer: Layer, pgno: int) -> bytes:
        pages = self._obtain(snapshot, layer, pgno, max(flights))
        self._refuse_distrusted(layer)  # the hydrator may have found out meanwhile
        for number, data in pages:
            self._cache.put(number, layer.number, data)
            if number in flights:
                flights[number].set_result(data)
        for number, flight in flights.items():
            if not flight.done():
                flight.set_exception(FileVanished(f"page {number} did not come with page {pgno}"))
        return pages[0][1]

    def _join(self, flight: Future[bytes], snapshot: Snapshot, layer: Layer, pgno: int) -> bytes:
        try:
            return flight.result(self._timeout)
        except FutureTimeout:
            raise StoreUnavailable(
                f"page {pgno} of {layer} did not arrive within {self._timeout:g} seconds (read_timeout)"
            ) from None
        except Exception as exc:  # noqa: BLE001 (whatever it was, it was another reader's)
            # The reader we joined failed, perhaps for reasons of its own (its page was read ahead with another one).
            log.debug("joined read of page %d failed (%s); reading it alone", pgno, exc)
            alone = {pgno: Future[bytes]()}
            return self._fly(alone, snapshot, layer, pgno)

    def _read_run(self, layer: Layer, first: int, last: int) -> list[Page]:
        """The pages of `layer` from `first` to `last`, in one request."""
        index = layer.index
        start, end = index.position(first), index.position(last)
        assert start is not None and end is not None
        entries = [index.entry(at) for at in range(start, end + 1)]
        base = entries[0][1]
        length = entries[-1][1] + entries[-1][2] - base
        data = memoryview(self._store.read(layer.file, base, length, self._timeout))
        size = layer.header.page_size
        return [(p, decode_frame(data[at - base : at - base + n], p, size)) for p, at, n in entries]

    def _obtain(self, snapshot: Snapshot, layer: Layer, pgno: int, last: int) -> list[Page]:
        """Page `pgno` first, and up to `last` those that came along; from other files if this one has vanished."""
        try:
            if not self._relocator.is_gone(layer):
                return self._read_twice(layer, pgno, last)
        except FileVanished as exc:
            log.info("%s is gone (%s); looking for its pages elsewhere", layer, exc)
        return [(pgno, self._elsewhere(snapshot, layer, pgno))]

    def _read_twice(self, layer: Layer, pgno: int, last: int) -> list[Page]:
        try:
            return self._read_run(layer, pgno, last)
        except LTXError as exc:
            log.warning("%s gave damaged bytes (%s); fetching page %d again", layer, exc, pgno)
        try:
            return self._read_run(layer, pgno, pgno)
        except LTXError as exc:
            raise LTXError(f"page {pgno} in {layer} of {self._store.url} is damaged: {exc}") from exc

    def _elsewhere(self, snapshot: Snapshot, layer: Layer, pgno: int) -> bytes:
        gone = layer
        for _ in range(3):
            other = self._relocator.find(snapshot, pgno, gone)
            try:
                kept = self._layers.kept(other)
                return _page_of(kept, other, pgno) if kept else self._read_twice(other, pgno, pgno)[0][1]
            except FileVanished as exc:
                log.info("%s is gone too (%s)", other, exc)
                gone = other
        raise SnapshotGone(
            f"page {pgno} of {layer}: every file that should hold it vanished while it was read: roll back and retry"
        )


def _page_of(file_bytes: bytes, layer: Layer, pgno: int) -> bytes:
    entry = layer.index.get(pgno)
    assert entry is not None, "the page map named this layer as the page's owner"
    offset, size = entry
    return decode_frame(memoryview(file_bytes)[offset : offset + size], pgno, layer.header.page_size)
