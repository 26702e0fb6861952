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

_GAP = 64 << 10
"""Frames that are not wanted are read over up to this many bytes in a row."""
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
        assert at is not None, "the page map named this layer as the page's owner"
        _, start, size = layer.index.entry(at)
        wanted_end = start + size
        for position in range(at + 1, min(at + window, len(layer.index))):
            following, offset, size = layer.index.entry(position)
            if following > snapshot.commit or offset + size - start > MAX_BYTES or offset - wanted_end > _GAP:
                break
            key = (following, layer.number)
            # A page that a newer file holds, or that is here already, is read over: bytes are cheaper than a request.
            if key not in self._flights and key not in self._cache and snapshot.pages.owner(following) is layer:
                flights[following] = self._flights[key] = Future[bytes]()
                wanted_end = offset + size
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
        pages = self._obtain(snapshot, layer, list(flights))
        self._refuse_distrusted(layer)  # the hydrator may have found out meanwhile
        for number, data in pages:
            self._cache.put(number, layer.number, data)
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

    def _read_run(self, layer: Layer, pgnos: list[int]) -> list[Page]:
        """Those pages of `layer`, ascending, in one request for all that lies between the first and the last."""
        entries = []
        for pgno in pgnos:
            entry = layer.index.get(pgno)
            assert entry is not None, "only pages of this layer are asked for"
            entries.append(entry)
        base = entries[0][0]
        length = sum(entries[-1]) - base
        data = memoryview(self._store.read(layer.file, base, length, self._timeout))
        size = layer.header.page_size
        return [
            (pgno, decode_frame(data[at - base : at - base + n], pgno, size))
            for pgno, (at, n) in zip(pgnos, entries, strict=True)
        ]

    def _obtain(self, snapshot: Snapshot, layer: Layer, pgnos: list[int]) -> list[Page]:
        """The first of those pages, and the others if they come along; from another file if this one has vanished."""
        try:
            if not self._relocator.is_gone(layer):
                return self._read_twice(layer, pgnos)
        except FileVanished as exc:
            log.info("%s is gone (%s); looking for its pages elsewhere", layer, exc)
        return [(pgnos[0], self._elsewhere(snapshot, layer, pgnos[0]))]

    def _read_twice(self, layer: Layer, pgnos: list[int]) -> list[Page]:
        """The pages; when some are damaged, the first one alone, fetched again."""
        pgno = pgnos[0]
        try:
            return self._read_run(layer, pgnos)
        except LTXError as exc:
            log.warning("%s gave damaged bytes (%s); fetching page %d again", layer, exc, pgno)
        try:
            return self._read_run(layer, [pgno])
        except LTXError as exc:
            raise LTXError(f"page {pgno} in {layer} of {self._store.url} is damaged: {exc}") from exc

    def _elsewhere(self, snapshot: Snapshot, layer: Layer, pgno: int) -> bytes:
        gone = layer
        for _ in range(3):
            other = self._relocator.find(snapshot, pgno, gone)
            try:
                kept = self._layers.kept(other)
                return _page_of(kept, other, pgno) if kept else self._read_twice(other, [pgno])[0][1]
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
