"""Fetches many pages at once that nobody waits for, in few round trips: what the crawl asks for.

In the caller's thread, all requests on their way together: threads would take each other's interpreter lock.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Sequence

from lazyreplica.cache import PageCache
from lazyreplica.clock import now
from lazyreplica.errors import FileVanished, LTXError, StoreError
from lazyreplica.extents import Data, Extent, State
from lazyreplica.layers import Layers
from lazyreplica.pagemap import Layer
from lazyreplica.relocate import Relocator
from lazyreplica.snapshot import Snapshot
from lazyreplica.spans import FIRST, Place, Span, join, peek
from lazyreplica.storage import Store
from lazyreplica.trees import Trees

log = logging.getLogger(__name__)

_BURST = 16
"""Requests at once. More take interpreter and link from those who read meanwhile; fewer leave more of the crawl to a
time when others read. With 64, 16 and 12 an index range that begins 100 ms after an open takes 66, 60 and 57 ms, and 20
lookups after it 545, 559 and 557; with 32, three scans right after an open take 1.36 s, with 16 1.17.
"""
_BURST_BYTES = 4 << 20
_PATIENCE = 2.0
"""Seconds to wait for what somebody else is fetching."""


class Gatherer:
    """Background reads of one replica. Thread-safe."""

    def __init__(
        self, store: Store, layers: Layers, cache: PageCache, relocator: Relocator, trees: Trees, timeout: float
    ) -> None:
        """`timeout`: seconds for each burst of requests."""
        self._store = store
        self._layers = layers
        self._extents = layers.extents
        self._cache = cache
        self._relocator = relocator
        self._trees = trees
        self._timeout = timeout

    def gather(self, snapshot: Snapshot, pages: Iterable[int]) -> dict[int, bytes]:
        """Those of the pages that can be had. Also into the cache, and interior pages into what is known of the trees.

        Raises nothing for what storage does, or for damaged bytes: what does not come is not there.
        """
        found: dict[int, bytes] = {}
        owners: dict[int, Layer] = {}
        for pgno in dict.fromkeys(pages):
            layer = snapshot.pages.owner(pgno) if 1 <= pgno <= snapshot.commit else None
            if layer is None or self._layers.distrusted(layer):
                continue
            page = self._cache.get(pgno, layer.number)
            if page is None:
                owners[pgno] = layer
            else:
                found[pgno] = page
        sources = [
            (source, pgno)
            for pgno, layer in owners.items()
            if (source := self._relocator.stand_in(snapshot, pgno) if self._relocator.is_gone(layer) else layer)
        ]
        self._layers.load_entries(sources)
        places = [place for source, pgno in sources if (place := peek(source, pgno)) is not None]
        for place, page in self._bring(places):
            found[place.pgno] = page
            self._trees.learn(place.pgno, page)
            self._cache.put(place.pgno, owners[place.pgno].number, page)
        return found

    def _bring(self, places: Iterable[Place]) -> Iterator[tuple[Place, bytes]]:
        """The pages at those places, as they come."""
        wanted = []
        for place in places:
            whole = self._layers.kept(place.layer)
            if whole is None:
                wanted.append(place)
            else:
                yield from _decode((place,), whole, 0)
        for spans in _bursts(join(wanted, FIRST)):
            for span, start, data in self._burst(spans):
                yield from _decode(span.places, data, start)

    def _burst(self, spans: Iterable[Span]) -> Iterator[tuple[Span, int, Data]]:
        """Bytes, and from which offset on, of those spans that come. One round trip for all."""
        mine: list[tuple[Span, Extent]] = []
        others: list[tuple[Span, Extent]] = []
        try:
            for span in spans:
                inner = (span.start, span.end)
                extent, _ = self._extents.begin(span.layer.number, *inner, State.WAITING, inner)
                (mine if self._extents.claim(extent) else others).append((span, extent))
            yield from self._fetch(mine)
        finally:
            for _, extent in mine:
                if extent.state is State.FLYING:
                    self._extents.fail(extent)
        deadline = now() + _PATIENCE
        for span, extent in others:
            if extent.state is not State.HERE:
                extent.arrived.wait(max(0.0, deadline - now()))
            if extent.data:
                yield span, extent.start, extent.data

    def _fetch(self, claimed: Sequence[tuple[Span, Extent]]) -> Iterator[tuple[Span, int, Data]]:
        """What comes of extents that we have claimed. Those of a file that has vanished cost the others nothing."""
        deadline = now() + self._timeout
        while claimed:
            jobs = [(span.layer.file, extent.start, len(extent)) for span, extent in claimed]
            rest = list(claimed)
            try:
                with contextlib.closing(self._store.read_many(jobs, deadline - now())) as replies:
                    for (span, extent), data in zip(claimed, replies, strict=True):
                        self._extents.finish(extent, data)
                        del rest[0]
                        yield span, extent.start, data
            except FileVanished as exc:
                log.debug("not everything was fetched ahead: %s", exc)
                gone = rest[0][0].layer
                claimed = [(span, extent) for span, extent in rest if span.layer is not gone]
            except StoreError as exc:
                log.debug("not everything was fetched ahead: %s", exc)
                return
            else:
                return


def _bursts(spans: Iterable[Span]) -> Iterator[list[Span]]:
    """As many as are asked for at once."""
    burst: list[Span] = []
    size = 0
    for span in spans:
        size += span.end - span.start
        if burst and (len(burst) == _BURST or size > _BURST_BYTES):
            yield burst
            burst, size = [], span.end - span.start
        burst.append(span)
    if burst:
        yield burst


def _decode(places: Iterable[Place], data: Data, base: int) -> Iterator[tuple[Place, bytes]]:
    for place in places:
        try:
            yield place, place.decode(data, base)
        except LTXError as exc:
            log.debug("page %d of %s was not fetched ahead: %s", place.pgno, place.layer, exc)
