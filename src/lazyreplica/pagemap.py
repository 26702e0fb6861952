"""Page number -> the file that holds its newest version. Immutable; a new transaction makes a new map. Pure.

A *layer* is one LTX file of a chain, opened: identity, header and page index. A *page map* stacks layers. It keeps
them in runs, newest first, and joins neighbouring runs of similar size (the way of a log-structured merge tree), so
that a lookup visits O(log transactions) runs, and adding a transaction costs O(its pages x log) on average, however
many thousands of layers there are. A layer whose pages are all superseded is forgotten by the joining.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat

from lazyreplica.ltx.header import Header, lock_pgno
from lazyreplica.ltx.lazyindex import Index
from lazyreplica.storage import StoredFile

_AT_ONCE = 64
"""Layers that `stack` joins at once."""
_SMALL = 4096
"""Pages of a layer that it joins so: a larger one stays what it is, unless as large a one lies upon it."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Layer:
    """One LTX file, opened. Compared by identity: a file has one Layer in a process while anyone uses it."""

    number: int
    """Names the version of every page in this file, in caches and in the local copy; unique in the process."""
    file: StoredFile
    header: Header
    index: Index
    checksum: int
    """The file's checksum of itself (its trailer): equal checksum, equal content, whatever the store calls it."""

    @property
    def max_txid(self) -> int:
        return self.file.name.max_txid

    @property
    def holds_everything(self) -> bool:
        """Whether no older file is needed beneath this one (a snapshot, or a level-0 file with every page)."""
        lock = lock_pgno(self.header.page_size)
        return len(self.index) == self.header.commit - (1 if self.header.commit >= lock else 0)

    def __str__(self) -> str:
        return str(self.file)


class _Run:
    """Several layers joined: sorted page numbers, and for each the layer that holds its newest version.

    8 bytes a page in two flat arrays.
    """

    __slots__ = ("layers", "owners", "pgnos")

    def __init__(self, pgnos: array[int], owners: array[int], layers: tuple[Layer, ...]) -> None:
        self.pgnos = pgnos
        self.owners = owners
        self.layers = layers

    def __len__(self) -> int:
        return len(self.pgnos)

    def owner(self, pgno: int) -> Layer | None:
        at = bisect_left(self.pgnos, pgno)
        if at < len(self.pgnos) and self.pgnos[at] == pgno:
            return self.layers[self.owners[at]]
        return None

    def items(self) -> Iterable[tuple[int, Layer]]:
        return zip(self.pgnos, map(self.layers.__getitem__, self.owners), strict=True)


class _Single:
    """A run of one layer: its own index answers, nothing is copied."""

    __slots__ = ("layers",)

    def __init__(self, layer: Layer) -> None:
        self.layers = (layer,)

    def __len__(self) -> int:
        return len(self.layers[0].index)

    def owner(self, pgno: int) -> Layer | None:
        layer = self.layers[0]
        return layer if layer.index.holds(pgno) else None

    def items(self) -> Iterable[tuple[int, Layer]]:
        return zip(self.layers[0].index.pgnos, repeat(self.layers[0]), strict=False)


def _join(runs: Iterable[_Run | _Single]) -> _Run:
    """Runs as one, oldest first. 0.2 us a page."""
    merged: dict[int, Layer] = {}
    for run in runs:
        merged.update(run.items())
    pgnos = array("I", sorted(merged))
    holders = list(map(merged.__getitem__, pgnos))
    places = {layer: place for place, layer in enumerate(dict.fromkeys(holders))}
    return _Run(pgnos, array("I", map(places.__getitem__, holders)), tuple(places))


class PageMap:
    """Layers, stacked. A value: nothing changes it once made."""

    __slots__ = ("_runs",)

    def __init__(self, runs: tuple[_Run | _Single, ...] = ()) -> None:
        self._runs = runs

    def with_layer(self, layer: Layer) -> PageMap:
        """The map after `layer` is applied on top."""
        if layer.holds_everything:
            return PageMap((_Single(layer),))
        return self._with_run(_Single(layer))

    def _with_joined(self, above: list[_Single]) -> PageMap:
        if not above:
            return self
        return self._with_run(_join(above) if len(above) > 1 else above[0])

    def _with_run(self, run: _Run | _Single) -> PageMap:
        runs = [run, *self._runs]
        # The last run is the base (a whole database): joining it would copy it, and it is never far away.
        while len(runs) > 2 and len(runs[1]) <= 2 * len(runs[0]):
            runs[:2] = [_join((runs[1], runs[0]))]
        return PageMap(tuple(runs))

    @property
    def capacity(self) -> int:
        """How many pages the layers hold, pages in several runs counted again: no database can be larger."""
        return sum(map(len, self._runs))

    def owner(self, pgno: int) -> Layer | None:
        """The layer with the newest version of page `pgno`; None if no layer holds it."""
        for run in self._runs:
            layer = run.owner(pgno)
            if layer is not None:
                return layer
        return None

    def layers(self) -> Iterator[Layer]:
        """Every layer that may own a page, each once, base first."""
        seen: set[int] = set()
        for run in reversed(self._runs):
            for layer in run.layers:
                if layer.number not in seen:
                    seen.add(layer.number)
                    yield layer


def stack(layers: Iterable[Layer]) -> PageMap:
    """The map of a chain, base first. Joins many layers at once: 0.5 ms for 40 files with 4,000 pages."""
    page_map = PageMap()
    above: list[_Single] = []
    for layer in layers:
        if layer.holds_everything or len(layer.index) > _SMALL:
            page_map, above = page_map._with_joined(above).with_layer(layer), []
        else:
            above.append(_Single(layer))
            if len(above) == _AT_ONCE:  # not all: a layer whose pages are superseded is to be forgotten soon
                page_map, above = page_map._with_joined(above), []
    return page_map._with_joined(above)
