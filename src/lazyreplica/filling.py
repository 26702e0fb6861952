"""Brings pages from a store into a local copy: which are missing, and where their bytes are now.

Files are read whole and in order where most of a file is wanted: its own checksum is verified as it passes. Else by
ranges, neighbours together.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lazyreplica.errors import FileVanished, LTXError
from lazyreplica.fetcher import Fetcher
from lazyreplica.head import Head
from lazyreplica.layers import Layers
from lazyreplica.local.base import Base
from lazyreplica.local.copy import LocalCopy
from lazyreplica.ltx.decoder import StreamDecoder
from lazyreplica.ltx.frame import decode_frame
from lazyreplica.pagemap import Layer
from lazyreplica.relocate import Relocator
from lazyreplica.snapshot import Snapshot
from lazyreplica.storage import Store

log = logging.getLogger(__name__)

CHUNK = 4 << 20
"""Bytes of a file in one request."""
_GAP = 64 << 10
"""Two wanted frames closer than this many bytes are one range: bytes are cheaper than a round trip."""
_YIELD = 0.005
_RUN = 256
"""Pages that are written with one system call, at most."""


class Stopped(Exception):
    """The work was ended between two requests."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Pages that are to come out of one file."""

    layer: Layer
    pgnos: list[int]


def share_out(snapshot: Snapshot, missing: Iterable[int]) -> list[Wanted]:
    """Which file each of the missing pages of `snapshot` comes from; the base first.

    Raises `ReplicaDamaged` when a page is in no file.
    """
    flags = bytearray(snapshot.commit + 1)
    for pgno in missing:
        flags[pgno] = 1
    base, *increments = snapshot.pages.layers()
    found = []
    for layer in sorted(increments, key=lambda layer: layer.max_txid, reverse=True):
        pgnos = [pgno for pgno in layer.index.pgnos if pgno <= snapshot.commit and flags[pgno]]
        for pgno in pgnos:
            flags[pgno] = 0
        if pgnos:
            found.append(Wanted(layer, pgnos))
    rest = []
    at = flags.find(1)
    while at >= 0:
        rest.append(at)
        at = flags.find(1, at + 1)
    if rest and rest[-1] > base.header.commit:
        snapshot.owner(rest[-1])  # raises: no file has it
    return ([Wanted(base, rest)] if rest else []) + found[::-1]


class Filler:
    """Reads pages from a store for a local copy. Used by one thread."""

    def __init__(
        self,
        store: Store,
        layers: Layers,
        head: Head,
        fetcher: Fetcher,
        relocator: Relocator,
        stop: threading.Event,
        timeout: float,
    ) -> None:
        """`stop` ends the work between two requests; `timeout` is for each of them, in seconds."""
        self._store = store
        self._layers = layers
        self._head = head
        self._fetcher = fetcher
        self._relocator = relocator
        self._stop = stop
        self._timeout = timeout

    def is_here(self, layer: Layer) -> bool:
        """Whether the layer's file is in memory, or known to be gone: nothing to download."""
        return self._layers.kept(layer) is not None or self._relocator.is_gone(layer)

    def frames(self, shares: Iterable[Wanted]) -> Iterator[tuple[int, memoryview]]:
        """Number and frame of each of those pages that is in memory."""
        for each in shares:
            kept = self._layers.kept(each.layer)
            if kept is not None:
                yield from frames_of(kept, each.layer, each.pgnos)

    def fill(self, snapshot: Snapshot, copy: LocalCopy, wanted: Wanted) -> None:
        """Write those pages into the base of `copy`, whose newest state `snapshot` is.

        Raises `Stopped`, `StoreError`, `LTXError`, `SnapshotGone`, `OSError`.
        """
        layer = wanted.layer
        try:
            kept = self._layers.kept(layer)
            if kept is not None:
                write(copy.base, pages_of(kept, layer, wanted.pgnos))
            elif 2 * len(wanted.pgnos) < len(layer.index):
                self._read_ranges(layer, wanted.pgnos, copy.base)
            else:
                self._fill_whole(layer, wanted.pgnos, copy.base)
        except FileVanished as exc:
            log.info("%s is gone (%s); looking for its pages elsewhere", layer, exc)
            self._fill_relocated(snapshot, wanted, copy)

    def pages(self, layer: Layer) -> Iterator[tuple[int, bytes]]:
        """All pages of a file, in order, verified when the iterator ends.

        Raises `Stopped`, `StoreError`, `LTXError` when the file is not what its checksum says.
        """
        kept = self._layers.kept(layer)
        if kept is not None:
            yield from pages_of(kept, layer, layer.index.pgnos)
            return
        decoder = StreamDecoder()
        for offset in range(0, layer.file.size, CHUNK):
            self._stand_back()
            chunk = self._store.read(layer.file, offset, min(CHUNK, layer.file.size - offset), self._timeout)
            yield from decoder.feed(chunk)
        decoder.close()

    def _fill_whole(self, layer: Layer, pgnos: list[int], base: Base) -> None:
        """Read the whole file, and verify its checksum on the way; twice, if need be."""
        want = bytearray(layer.header.commit + 1)
        for pgno in pgnos:
            want[pgno] = 1
        for last in (False, True):
            try:
                write(base, (page for page in self.pages(layer) if want[page[0]]))
            except LTXError as exc:
                base.forget(pgnos)
                if last:
                    raise self.distrust(layer, str(exc)) from exc
                log.warning("%s is damaged (%s); fetching it again", layer, exc)
            else:
                return

    def distrust(self, layer: Layer, reason: str) -> LTXError:
        """None of the file's pages is served any more, from anywhere. The error that says so."""
        self._fetcher.distrust(layer, reason)
        return LTXError(f"{layer} of {self._store.url} is damaged: {reason}")

    def _read_ranges(self, source: Layer, pgnos: list[int], base: Base) -> None:
        """Read pages out of a file of which most is not wanted."""
        for run in _runs(source, pgnos):
            self._stand_back()
            try:
                pages = self._read_run(source, run)
            except LTXError as exc:
                log.warning("%s gave damaged bytes (%s); fetching them again", source, exc)
                pages = self._read_run(source, run)
            write(base, pages)

    def _read_run(self, source: Layer, run: list[tuple[int, int, int]]) -> list[tuple[int, bytes]]:
        base, length = run[0][1], run[-1][1] + run[-1][2] - run[0][1]
        data = memoryview(self._store.read(source.file, base, length, self._timeout))
        size = source.header.page_size
        return [(p, decode_frame(data[at - base : at - base + n], p, size)) for p, at, n in run]

    def _fill_relocated(self, snapshot: Snapshot, wanted: Wanted, copy: LocalCopy) -> None:
        """The file is gone: bring its pages from wherever their versions are now."""
        pinned = self._head.pin_current()
        try:
            if pinned is not snapshot:
                raise Stopped  # only of what was pinned as the head are all successors known
            sources: dict[int, tuple[Layer, list[int]]] = {}
            for pgno in wanted.pgnos:
                if not copy.has(pgno):
                    source = self._relocator.find(snapshot, pgno, wanted.layer)
                    sources.setdefault(source.number, (source, []))[1].append(pgno)
            for source, pgnos in sources.values():
                self._read_ranges(source, pgnos, copy.base)
        finally:
            self._head.unpin(pinned)

    def _stand_back(self) -> None:
        """Let demand reads go first, for at most a second."""
        for _ in range(200):
            if not self._fetcher.busy or self._stop.wait(_YIELD):
                break
        if self._stop.is_set():
            raise Stopped


def write(base: Base, pages: Iterable[tuple[int, bytes]]) -> None:
    """Write pages into a base, neighbours with one system call. Raises `OSError`, or what `pages` raises."""
    run: list[bytes] = []
    first = 0
    for pgno, page in pages:
        if run and (pgno != first + len(run) or len(run) >= _RUN):
            base.write(first, b"".join(run))
            run = []
        if not run:
            first = pgno
        run.append(page)
    if run:
        base.write(first, b"".join(run))


def pages_of(data: bytes, layer: Layer, pgnos: Iterable[int]) -> Iterator[tuple[int, bytes]]:
    """Pages of a layer whose file is in memory."""
    for pgno, frame in frames_of(data, layer, pgnos):
        yield pgno, decode_frame(frame, pgno, layer.header.page_size)


def frames_of(data: bytes, layer: Layer, pgnos: Iterable[int]) -> Iterator[tuple[int, memoryview]]:
    """The same, as they are in the file."""
    view = memoryview(data)
    for pgno in pgnos:
        entry = layer.index.get(pgno)
        assert entry is not None, "only pages of this layer are asked for"
        offset, size = entry
        yield pgno, view[offset : offset + size]


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
