"""Fills one local copy from a store: which pages of a snapshot are missing, and where their bytes are now.

Files are read whole and in order where most of a file is wanted: its own checksum is verified as it passes. Else by
ranges, neighbours together.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum, auto

from lazyreplica.errors import FileVanished, LTXError
from lazyreplica.fetcher import Fetcher
from lazyreplica.head import Head
from lazyreplica.layers import Layers
from lazyreplica.localcopy import LocalCopy
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


class Outcome(Enum):
    """How an attempt to make a snapshot local ended."""

    COMPLETE = auto()
    AGAIN = auto()
    """Look at the head again: it has moved on, or we were asked to stop."""
    FULL = auto()
    """The log has no room until old readers end."""


@dataclass(slots=True)
class Progress:
    """How far a local copy is."""

    finished: set[int] = field(default_factory=set)
    """Numbers of layers whose pages, as far as they are anybody's newest version, are local."""
    verified: bool = False
    """Whether every page was looked at once."""


class Filler:
    """Brings pages from a store into a local copy. Used by one thread."""

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

    def fill(self, snapshot: Snapshot, copy: LocalCopy, progress: Progress) -> Outcome:
        """Make every page of `snapshot` local.

        Raises `StoreError`, `LTXError`, `SnapshotGone`, `ReplicaDamaged` when a page is in no file, `OSError`.
        """
        for layer in snapshot.pages.layers():
            if layer.number not in progress.finished:
                outcome = self._fill_layer(snapshot, layer, copy)
                if outcome is not Outcome.COMPLETE:
                    return outcome
                progress.finished.add(layer.number)
        if progress.verified:
            return Outcome.COMPLETE
        # Look at every page once, so that 100 % is a fact, and a page that no file holds is reported.
        progress.verified = True
        for pgno in range(1, snapshot.commit + 1):
            if pgno != snapshot.lock_pgno:
                layer = snapshot.owner(pgno)
                if not copy.has(pgno, layer.number):
                    progress.finished.discard(layer.number)
                    progress.verified = False
        return Outcome.COMPLETE if progress.verified else Outcome.AGAIN

    def _fill_layer(self, snapshot: Snapshot, layer: Layer, copy: LocalCopy) -> Outcome:
        wanted = [
            pgno
            for pgno in layer.index.pgnos
            if pgno <= snapshot.commit and snapshot.pages.owner(pgno) is layer and not copy.has(pgno, layer.number)
        ]
        if not wanted:
            return Outcome.COMPLETE
        try:
            room = self._bring(layer, wanted, copy)
        except FileVanished as exc:
            log.info("%s is gone (%s); looking for its pages elsewhere", layer, exc)
            return self._bring_relocated(snapshot, layer, wanted, copy)
        return self._outcome(snapshot, room)

    def _outcome(self, snapshot: Snapshot, room: bool) -> Outcome:
        if self._stop.is_set() or self._head.current.lineage.number != snapshot.lineage.number:
            return Outcome.AGAIN
        return Outcome.COMPLETE if room else Outcome.FULL

    def _bring(self, layer: Layer, wanted: list[int], copy: LocalCopy) -> bool:
        kept = self._layers.kept(layer)
        if kept is not None:
            return copy.write(layer, pages_of(kept, layer, wanted))
        if 2 * len(wanted) < len(layer.index):
            return self._read_ranges(layer, layer, wanted, copy)
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

    def _read_whole(self, layer: Layer, wanted: list[int], copy: LocalCopy) -> bool:
        """Read the whole file in order, and verify its checksum on the way."""
        decoder = StreamDecoder()
        want = set(wanted)
        room = True
        for offset in range(0, layer.file.size, CHUNK):
            self._stand_back()
            if self._stop.is_set():
                return False
            chunk = self._store.read(layer.file, offset, min(CHUNK, layer.file.size - offset), self._timeout)
            room &= copy.write(layer, (page for page in decoder.feed(chunk) if page[0] in want))
        decoder.close()
        return room

    def _read_ranges(self, layer: Layer, source: Layer, wanted: list[int], copy: LocalCopy) -> bool:
        """Read those pages of `layer` from `source`, which holds the same versions, by ranges."""
        room = True
        for run in _runs(source, wanted):
            self._stand_back()
            if self._stop.is_set():
                return False
            try:
                pages = self._read_run(source, run)
            except LTXError as exc:
                log.warning("%s gave damaged bytes (%s); fetching them again", source, exc)
                pages = self._read_run(source, run)
            room &= copy.write(layer, pages)
        return room

    def _read_run(self, source: Layer, run: list[tuple[int, int, int]]) -> list[tuple[int, bytes]]:
        base, length = run[0][1], run[-1][1] + run[-1][2] - run[0][1]
        data = memoryview(self._store.read(source.file, base, length, self._timeout))
        size = source.header.page_size
        return [(p, decode_frame(data[at - base : at - base + n], p, size)) for p, at, n in run]

    def _bring_relocated(self, snapshot: Snapshot, layer: Layer, wanted: list[int], copy: LocalCopy) -> Outcome:
        """The layer's file is gone: bring its pages from wherever their versions are now."""
        pinned = self._head.pin_current()
        try:
            if pinned is not snapshot:
                return Outcome.AGAIN  # only of what was pinned as the head are all successors known
            sources: dict[int, tuple[Layer, list[int]]] = {}
            for pgno in wanted:
                if not copy.has(pgno, layer.number):
                    source = self._relocator.find(snapshot, pgno, layer)
                    sources.setdefault(source.number, (source, []))[1].append(pgno)
            room = True
            for source, pgnos in sources.values():
                room &= self._read_ranges(layer, source, pgnos, copy)
            return self._outcome(snapshot, room)
        finally:
            self._head.unpin(pinned)

    def _stand_back(self) -> None:
        """Let demand reads go first, for at most a second."""
        for _ in range(200):
            if not self._fetcher.busy or self._stop.wait(_YIELD):
                return


def pages_of(data: bytes, layer: Layer, pgnos: Iterable[int]) -> Iterable[tuple[int, bytes]]:
    """Pages of a layer whose file is in memory."""
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
