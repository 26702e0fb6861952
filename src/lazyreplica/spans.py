"""Pages -> stretches of files worth one request each. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from lazyreplica.ltx.frame import decode_frame
from lazyreplica.pagemap import Layer

GAP = 64 << 10
"""Frames that are not wanted are read over up to this many bytes in a row: 1 ms of transfer, against a round trip."""
LIMIT = 2 << 20
"""Bytes of one request ahead."""
HURRY = 512 << 10
"""The same while little is ahead of the reader: over several connections it comes sooner."""
FIRST = 256 << 10
"""Bytes of the request that somebody waits for: what is behind it comes beside it."""


class Place(NamedTuple):
    """Where a page's frame lies. A tuple: one is made for each page that is read, in half of a dataclass's time."""

    pgno: int
    layer: Layer
    start: int
    end: int

    def decode(self, data: bytes | memoryview, base: int) -> bytes:
        """The page, out of bytes that begin at offset `base` of its file. Raises `LTXError`."""
        frame = memoryview(data)[self.start - base : self.end - base]
        return decode_frame(frame, self.pgno, self.layer.header.page_size)


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes start <= offset < end of a layer's file, and the pages that they are wanted for, in file order."""

    layer: Layer
    start: int
    end: int
    places: tuple[Place, ...]

    @property
    def pgnos(self) -> tuple[int, ...]:
        return tuple(place.pgno for place in self.places)


def peek(layer: Layer, pgno: int) -> Place | None:
    """Where `layer` has the page, if that is known without a request."""
    entry = layer.index.peek(pgno)
    return None if entry is None else Place(pgno, layer, entry[0], sum(entry))


def join(places: Iterable[Place], limit: int = LIMIT) -> list[Span]:
    """Stretches with all those frames, the one that is needed first in front: `places` come in the order of need."""
    first: dict[int, Place] = {}
    for place in places:
        first.setdefault(place.pgno, place)
    order = {pgno: number for number, pgno in enumerate(first)}
    spans: list[Span] = []
    run: list[Place] = []
    for place in sorted(first.values(), key=lambda place: (place.layer.number, place.start)):
        if run and (
            place.layer is not run[0].layer or place.start - run[-1].end > GAP or place.end - run[0].start > limit
        ):
            spans.append(_span(run))
            run = []
        run.append(place)
    if run:
        spans.append(_span(run))
    spans.sort(key=lambda span: min(order[pgno] for pgno in span.pgnos))
    return spans


def _span(run: list[Place]) -> Span:
    return Span(run[0].layer, run[0].start, run[-1].end, tuple(run))
