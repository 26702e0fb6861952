"""The only code that reads page bytes from a store on demand.

Neighbouring frames are one range request; two readers that want one page make one request; what the reader's predictor
names is fetched beside it, in other threads.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable

from lazyreplica.cache import PageCache
from lazyreplica.errors import FileVanished, LTXError, SnapshotGone
from lazyreplica.extents import EXTENT, Data, Extent, State
from lazyreplica.layers import Layers
from lazyreplica.pagemap import Layer
from lazyreplica.prefetch import Reader
from lazyreplica.readahead import Readahead, Urgency
from lazyreplica.readcounters import ReadCounters
from lazyreplica.relocate import Relocator
from lazyreplica.snapshot import Snapshot
from lazyreplica.spans import FIRST, HURRY, LIMIT, Place, Span, join, peek
from lazyreplica.storage import Store, waiting
from lazyreplica.trees import Trees

log = logging.getLogger(__name__)

_NEAR = 64
"""Pages of a prediction that are fetched in small requests when somebody waits for the first of them."""
_REQUESTS = 16
"""Requests that one prediction may lead to: pages far apart cost one each."""
_STAND_INS = 3
"""Other files that a page is looked for in, one after the other, when they vanish as well."""
_PATIENCE = 2.0
"""Seconds that a reader waits for a request that somebody else has made, before it makes its own."""


class Fetcher:
    """Demand reads of one replica. Thread-safe; runs in its callers' threads, so it never needs one of its own."""

    def __init__(
        self,
        store: Store,
        layers: Layers,
        cache: PageCache,
        relocator: Relocator,
        readahead: Readahead,
        trees: Trees,
        counters: ReadCounters,
        timeout: float,
    ) -> None:
        """`timeout`: seconds a read may take in all."""
        self._store = store
        self._layers = layers
        self._extents = layers.extents
        self._cache = cache
        self._relocator = relocator
        self._readahead = readahead
        self._trees = trees
        self._counters = counters
        self._timeout = timeout
        self._demand = 0
        self._listener: Callable[[int], None] | None = None
        self._counting = threading.Lock()

    @property
    def busy(self) -> bool:
        """Whether a demand read is waiting for the network: background work stands back."""
        return self._demand > 0

    def distrust(self, layer: Layer, reason: str) -> None:
        """Serve no page of `layer` any more, from memory neither."""
        self._layers.distrust(layer, reason)
        self._cache.drop_version(layer.number)

    def page(
        self,
        snapshot: Snapshot,
        layer: Layer,
        pgno: int,
        reader: Reader,
        is_off: Callable[[], bool] | None = None,
    ) -> bytes:
        """Page `pgno` of `snapshot`, which `layer` holds; what `reader` expects next is fetched ahead.

        `is_off`: see `Replica.read`.

        Raises `StoreError`, `LTXError` for bytes that stay damaged when fetched again, `SnapshotGone`. A page that was
        read ahead takes 7 us, 2 of them liblz4's.
        """
        further = reader.reads(pgno)
        page = None if further else self._beside(layer, pgno, reader)
        if page is None:
            self._refuse_distrusted(layer)
            with waiting.called_off_by(is_off):
                page = self._page_from(layer, snapshot, pgno, reader, further)
        self._refuse_distrusted(layer)  # the hydrator may have found out meanwhile
        self._cache.put(pgno, layer.number, page)
        reader.saw(pgno, page)
        return page

    def _beside(self, layer: Layer, pgno: int, reader: Reader) -> bytes | None:
        """The page, if it lies in the extent that this reader has used last, as most pages of a scan do."""
        extent = self._extents.current(reader.token)
        if extent is None or extent.number != layer.number or extent.state is not State.HERE:
            return None
        place = peek(layer, pgno)
        if place is None or place.start < extent.start or extent.end < place.end:
            return None
        try:
            page = place.decode(extent.data, extent.start)
        except LTXError:
            return None  # `_decode_from` says so, and does something about it
        self._count_ahead(extent)
        return page

    def _count_ahead(self, extent: Extent) -> None:
        """A page was found in an extent that had been announced."""
        self._counters.ahead_hits += 1
        if extent.ahead:
            extent.ahead -= 1

    def _page_from(self, owner: Layer, snapshot: Snapshot, pgno: int, reader: Reader, further: Iterable[int]) -> bytes:
        """The page out of its own file; out of another that holds it where that has vanished."""
        layer = owner
        for _ in range(1 + _STAND_INS):
            try:
                # Of a file that is known to be gone, nothing but what is here: a request would be in vain.
                gone = self._relocator.is_gone(layer)
                place = peek(layer, pgno) if gone else self._place(layer, pgno)
                if place is None:
                    layer = self._relocator.find(snapshot, pgno, layer)
                    continue
                whole = self._layers.kept(layer)
                if whole is not None:
                    self._counters.ahead_hits += 1
                    self._ahead(snapshot, further, reader)
                    return place.decode(whole, 0)
                extent = self._extents.find(layer.number, place.start, place.end)
                if extent is not None:
                    self._count_ahead(extent)
                    self._ahead(snapshot, further, reader)
                    return self._decode_from(extent, place, reader)
                if not gone:
                    # Announced, and not here: what was announced with it may have failed too, or been pushed out.
                    further = further or reader.missed()
                    self._counters.misses += 1
                    return self._decode_from(self._begin(snapshot, place, further, reader), place, reader)
            except FileVanished as exc:
                log.info("%s is gone (%s); looking for its pages elsewhere", layer, exc)
            layer = self._relocator.find(snapshot, pgno, layer)
        raise SnapshotGone(
            f"page {pgno} of {owner}: every file that should hold it vanished while it was read: roll back and retry"
        )

    def _refuse_distrusted(self, layer: Layer) -> None:
        reason = self._layers.distrusted(layer)
        if reason is not None:
            raise LTXError(f"{layer} of {self._store.url} is damaged, its pages cannot be read: {reason}")

    def _place(self, layer: Layer, pgno: int) -> Place:
        try:
            entry = layer.index.get(pgno)
        except LTXError as exc:
            log.warning("%s gave a damaged page index (%s); fetching it again", layer, exc)
            try:
                entry = layer.index.get(pgno)
            except LTXError as again:
                raise LTXError(f"{layer} of {self._store.url} is damaged: {again}") from again
        assert entry is not None, "the page map named this layer as the page's owner"
        return Place(pgno, layer, entry[0], sum(entry))

    # -- what is fetched ahead --

    def _begin(self, snapshot: Snapshot, wanted: Place, further: Iterable[int], reader: Reader) -> Extent:
        """An extent with the wanted page, claimed by nobody yet, and extents for the others, on their way."""
        places = self._places(snapshot, further)
        near, far = [wanted, *places[:_NEAR]], places[_NEAR:]
        mine, *others = join(near, FIRST)
        extent, new = self._extents.begin(
            wanted.layer.number, mine.start, mine.end, State.WAITING, (wanted.start, wanted.end), reader.token
        )
        if new:
            self._extents.announce(extent, len(mine.places) - 1)
        self._start(others + join(far, self._limit(reader)), reader)
        return extent

    def _ahead(self, snapshot: Snapshot, pages: Iterable[int], reader: Reader) -> None:
        if not pages:
            return
        if self._extents.room(reader.token) < FIRST:
            reader.refused(pages)  # not even worth looking where they are
        else:
            self._start(join(self._places(snapshot, pages), self._limit(reader)), reader)

    def _limit(self, reader: Reader) -> int:
        """Bytes of one request ahead: while one is used up, another is here and two are on their way."""
        share = self._extents.share(reader.token)
        most = HURRY if self._extents.room(reader.token) > share // 4 * 3 else LIMIT
        return max(FIRST, min(most, share // 4))

    def _start(self, spans: Iterable[Span], reader: Reader) -> None:
        full = False
        refused: list[int] = []
        for number, span in enumerate(spans):
            # What is needed later waits behind what has no room: else the reader would come to a gap.
            full = full or number >= _REQUESTS or span.end - span.start + EXTENT > self._extents.room(reader.token)
            if full:
                refused += span.pgnos
                continue
            extent, new = self._extents.begin(
                span.layer.number, span.start, span.end, State.WAITING, (span.start, span.end), reader.token
            )
            if new:
                self._extents.announce(extent, len(span.places))
                if not self._bring(span, extent, reader.trees):
                    refused += span.pgnos
        reader.refused(refused)

    def _bring(self, span: Span, extent: Extent, trees: Trees) -> bool:
        """Let a thread fetch an extent, and learn from the interior pages in it that somebody waits for."""
        wanted = trees.wanted.intersection(span.pgnos)

        def work() -> None:
            self._layers.bring(span.layer, extent)
            if wanted and extent.state is State.HERE:
                for place in span.places:
                    if place.pgno in wanted:
                        with contextlib.suppress(LTXError):  # who reads the page fetches it again
                            trees.learn(place.pgno, place.decode(extent.data, extent.start))

        if self._readahead.do(work, Urgency.SOON):
            return True
        self._extents.fail(extent)
        return False

    def _places(self, snapshot: Snapshot, pages: Iterable[int]) -> list[Place]:
        """Where those of the pages lie that are neither here nor under way. 5 us a page."""
        places = []
        page_map, commit = snapshot.pages, snapshot.commit
        for pgno in pages:
            layer = page_map.owner(pgno) if 1 <= pgno <= commit else None
            if layer is None or (pgno, layer.number) in self._cache:
                continue
            place = peek(layer, pgno)
            if place is not None and self._is_coming(place):
                continue
            if self._relocator.is_gone(layer):
                stand_in = self._relocator.stand_in(snapshot, pgno)
                place = peek(stand_in, pgno) if stand_in else None
                if place is not None and self._is_coming(place):
                    continue
            if place is not None:  # else where it lies is not worth a request of its own
                places.append(place)
        return places

    def _is_coming(self, place: Place) -> bool:
        """Whether the page's bytes are here, or under way."""
        number = place.layer.number
        return (
            self._layers.kept(place.layer) is not None or self._extents.find(number, place.start, place.end) is not None
        )

    # -- bytes to pages --

    def _decode_from(self, extent: Extent, place: Place, reader: Reader) -> bytes:
        """The page; fetched again, alone, when its bytes are damaged or did not come."""
        patience = min(_PATIENCE, self._timeout / 2)
        data = self._bytes_of(extent, place, patience)
        if data is not None:
            self._extents.use(extent, reader.token)
            try:
                return place.decode(data, extent.start)
            except LTXError as exc:
                log.warning("%s gave damaged bytes (%s); fetching page %d again", place.layer, exc, place.pgno)
                self._extents.discard(extent)
        try:
            data = self._read(place.layer, place.start, place.end, self._timeout - patience)
            return place.decode(data, place.start)
        except LTXError as exc:
            raise LTXError(f"page {place.pgno} in {place.layer} of {self._store.url} is damaged: {exc}") from exc

    def _bytes_of(self, extent: Extent, place: Place, patience: float) -> Data | None:
        """The extent's bytes, fetched by us if nobody does; None if whoever does fails or takes long."""
        if extent.state is State.HERE:
            return extent.data
        if not self._extents.claim(extent):
            waiting.wait(extent.arrived, patience)
            return extent.data or None
        try:
            data = self._read(place.layer, extent.start, extent.end, self._timeout)
        except BaseException:
            # Also of an interrupt (Ctrl-C), which is ours alone; those who joined read for themselves.
            self._extents.fail(extent)
            raise
        self._extents.finish(extent, data)
        if len(extent) == place.end - place.start:
            self._extents.discard(extent)  # one page, in the cache from now on; who waits for it has it in hand
        return data

    def _read(self, layer: Layer, start: int, end: int, timeout: float) -> Data:
        self._count(1)
        try:
            return self._layers.load(layer, start, end, timeout)
        finally:
            self._count(-1)

    def _count(self, change: int) -> None:
        with self._counting:
            self._demand += change
            if self._listener is not None:
                self._listener(self._demand)

    def listen(self, listener: Callable[[int], None] | None) -> None:
        """Tell `listener` how many demand reads are waiting for the network, at each change. It must be quick."""
        with self._counting:
            self._listener = listener
