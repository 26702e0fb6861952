"""Which pages next? Pure predictors: told of each page that is read from storage, they answer what to fetch ahead.

Never wrong, only early: an answer decides what is fetched, not what is returned. One `Reader` for each open database,
so that scans of several connections do not disturb one another, and in it one `_Stream` for each sequence of pages that
it is in: a scan of a table and one of an index advance side by side.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from itertools import chain, count, islice
from typing import Protocol

from lazyreplica import btree
from lazyreplica.trees import Trees

AHEAD = 10 << 20
"""Bytes of pages (decompressed) that a stream is ahead of its reader at most: that many are fetched in the time that a
round trip of 20 ms and the transfer take."""
_MOST = 2560
"""Pages that a stream is ahead at most, however small they are: each is remembered, in 130 bytes."""
_START = 8
_GROWTH = 32.0
"""From a few pages to what 60 MB/s bring during a round trip of 20 ms, and then to the limit."""
_CAREFUL = 2.0
"""The same, after there was no room for what was announced."""
_GAP = 256
"""Pages that are announced at once when a reader comes to one that was refused, however many others are ahead."""
_STREAMS = 8
_UNCLES = 7
"""Interior pages that are sent for together with the next one."""
_SEEN = 64
_NONE: tuple[int, ...] = ()


class _Source(Protocol):
    """A sequence of pages. May go on after it gave nothing, once more is known."""

    missing: list[int]
    """After `take`: pages that are not of the sequence, but have to be known to go on with it."""

    def take(self, count: int) -> list[int]: ...


class _Siblings:
    """Pages beside one another on a level of a b-tree, in key order."""

    def __init__(self, trees: Trees, pgno: int, direction: int) -> None:
        self._trees = trees
        self._last = pgno
        self._direction = direction
        self.missing: list[int] = []

    def take(self, count: int) -> list[int]:
        pages, missing = self._trees.beyond(self._last, count, self._direction)
        if missing is None:
            self.missing = []
        else:
            self.missing = [missing, *self._trees.beside(missing, _UNCLES, self._direction)]
        if pages:
            self._last = pages[-1]
        return pages


class _Listed:
    """Pages that an iterator names."""

    def __init__(self, pages: Iterable[int]) -> None:
        self._pages = iter(pages)
        self.missing: list[int] = []

    def take(self, count: int) -> list[int]:
        return list(islice(self._pages, count))


class _Run(_Listed):
    """Ascending page numbers, as long as nothing better is known."""

    def __init__(self, pgno: int) -> None:
        super().__init__(count(pgno + 1))


class _Stream:
    """A sequence that somebody is reading. `left` pages of it were announced and not read yet."""

    __slots__ = ("asked", "back", "full", "growth", "last", "left", "source", "window")

    def __init__(self, source: _Source, window: int, last: int) -> None:
        self.source = source
        self.window = window
        """How many pages to be ahead."""
        self.growth = _GROWTH
        self.last = last
        self.left = self.full = 0
        """Now, and when more was announced for the last time."""
        self.back: dict[int, None] = {}
        """Announced, and refused: the next ones to announce."""
        self.asked: set[int] = set()
        """What the source is missing, and was announced beside it."""


class Token:
    """A reader, as those see it who share out what there is to share."""

    __slots__ = ("reading",)

    def __init__(self) -> None:
        self.reading = False
        """Set when pages are fetched for it; unset when its transaction has ended."""


class Reader:
    """The predictor of one open database. Not thread-safe: SQLite reads a connection's database one page at a time.

    A KeyboardInterrupt may come between any two of its steps. Then it predicts worse, and raises nothing: what is to
    be removed need not be there.
    """

    def __init__(self, trees: Trees, page_size: int, techniques: frozenset[str]) -> None:
        """`page_size` in bytes."""
        self.token = Token()
        """Names this reader to those who share out what there is to share."""
        self.trees = self._trees = trees
        """What is known of the database that is read."""
        self._limit = max(_START, min(AHEAD // page_size, _MOST))
        self._techniques = techniques
        self._expected: dict[int, _Stream] = {}
        self._refused: dict[int, _Stream] = {}
        """Pages that were announced, and nobody fetches: whoever reads one goes on with its stream."""
        self._streams: list[_Stream] = []
        """Most recent last."""
        self._seen: OrderedDict[int, int] = OrderedDict()
        """Pages read lately outside of a stream, or at the end of one -> the window that a stream from there gets."""
        self._leaf: tuple[int, bytes] | None = None
        """The leaf that was read last, and may lead to overflow pages."""
        self._chains: dict[int, tuple[int, int]] | None = None
        """Its overflow chains, when they were asked for: first page -> which of them, length in pages."""
        self._chain_at = -1
        self._index_leaf: tuple[int, bytes] | None = None
        """The leaf of an index that was read last, and may lead to rows."""
        self._row_leaves: list[int] | None = None
        """The table's leaves with its rows, when they were asked for, in the order of the index."""
        self._row_at = -1
        rules = {
            "rows": self._find_row,
            "overflow": self._find_chain,
            "siblings": self._find_sibling,
            "sequential": self._find_number,
        }
        self._rules = [rule for name, rule in rules.items() if name in techniques]
        self._reading: _Stream | None = None
        """The stream that announced the page that is read now."""
        self._guesses = self._hits = 0
        """Of the weak kind: a page beside one that was read alone."""

    def saw(self, pgno: int, page: bytes) -> None:
        """The contents of a page that was read. 0.2 us; 0.1 ms for an interior page."""
        kind = page[0]
        if kind == btree.LEAF_TABLE:
            self._leaf, self._chains = (pgno, page), None
        elif kind == btree.LEAF_INDEX:
            self._leaf = self._index_leaf = (pgno, page)
            self._chains = self._row_leaves = None
        elif kind in (btree.INTERIOR_TABLE, btree.INTERIOR_INDEX) or pgno == 1:
            self._trees.learn(pgno, page)

    def hit(self, pgno: int, page: bytes) -> None:
        """The contents of a page that was read from the cache. 0.2 us."""
        kind = page[0]
        if kind == btree.LEAF_INDEX or (
            kind in (btree.INTERIOR_TABLE, btree.INTERIOR_INDEX) and self._trees.interior(pgno) is None
        ):
            self.saw(pgno, page)

    def reads(self, pgno: int) -> Iterable[int]:
        """Page `pgno` is read now, and not from the cache: the pages to fetch ahead, soonest first.

        0.3 us inside of a stream.
        """
        self._reading = stream = self._expected.pop(pgno, None)
        gap = stream is None
        if stream is not None:
            stream.left -= 1
        else:
            stream = self._refused.pop(pgno, None)
            if stream is None:
                return self._begin(pgno)
            stream.back.pop(pgno, None)
        stream.last = pgno
        # Three quarters not of the window: near its end a sequence has no more to give.
        if not gap and stream.left * 4 > stream.full * 3:
            return _NONE
        if isinstance(stream.source, _Run) and self._is_in_tree(pgno):
            self._end(stream)
            return self._begin(pgno)
        stream.window = min(int(stream.window * stream.growth), self._limit)
        pages = self._announce(stream, _GAP if gap else 0)
        if not stream.left:
            self._remember(pgno, stream.window)
        return pages

    def missed(self) -> Iterable[int]:
        """The page that is read now was announced, and has not come: all that was announced with it, again."""
        stream = self._reading
        if stream is None:
            return _NONE
        return [pgno for pgno, owner in self._expected.items() if owner is stream]

    def refused(self, pages: Iterable[int]) -> None:
        """Those announced pages are not fetched ahead after all (no room)."""
        rest = set(pages)
        if not rest:
            return
        found: dict[_Stream, list[int]] = {}
        for pgno, stream in self._expected.items():  # in the order in which they are needed
            if pgno in rest:
                found.setdefault(stream, []).append(pgno)
        for stream, mine in found.items():
            rest.difference_update(mine)
            for pgno in mine:
                self._expected.pop(pgno, None)
                other = self._refused.get(pgno)
                if other is not None:
                    other.back.pop(pgno, None)
                self._refused[pgno] = stream
            # What was announced is needed before what waits to be announced.
            stream.back = {**dict.fromkeys(mine), **stream.back}
            stream.left = stream.full = stream.left - len(mine)
            stream.window, stream.growth = max(_START, stream.left), _CAREFUL
        for stream in self._streams:
            stream.asked -= rest  # they may be asked for again

    def _announce(self, stream: _Stream, least: int = 0) -> list[int]:
        """More pages, up to the window; of those that were refused at least so many."""
        wanted = max(stream.window - stream.left, min(least, len(stream.back)))
        pages = list(islice(stream.back, wanted))
        for pgno in pages:
            stream.back.pop(pgno, None)
            self._refused.pop(pgno, None)
        if len(pages) < wanted:
            pages += stream.source.take(wanted - len(pages))
        pages = [pgno for pgno in pages if pgno not in self._expected]
        for pgno in pages:
            self._expected[pgno] = stream
        stream.left += len(pages)
        stream.full = stream.left
        if stream.source.missing:
            new = [pgno for pgno in stream.source.missing if pgno not in stream.asked]
            stream.asked = set(stream.source.missing)
            pages += new
        return pages

    def _remember(self, pgno: int, window: int) -> None:
        self._seen[pgno] = window
        self._seen.move_to_end(pgno)
        if len(self._seen) > _SEEN:
            self._seen.popitem(last=False)

    def _begin(self, pgno: int) -> list[int]:
        """The page continues no stream: perhaps one begins here."""
        for rule in self._rules:
            found = rule(pgno)
            if found is not None:
                source, window = found
                return self._follow(_Stream(source, window, pgno))
        self._remember(pgno, 0)
        return self._guess(pgno)

    def _follow(self, stream: _Stream) -> list[int]:
        self._streams.append(stream)
        if len(self._streams) > _STREAMS:
            self._end(self._streams[0])
        pages = self._announce(stream)
        if not pages:
            self._remember(stream.last, stream.window)
        return pages

    def _end(self, stream: _Stream) -> None:
        if stream in self._streams:
            self._streams.remove(stream)
        for pages in (self._expected, self._refused):
            for pgno in [pgno for pgno, owner in pages.items() if owner is stream]:
                pages.pop(pgno, None)
        stream.left, stream.back = 0, {}

    def _is_in_tree(self, pgno: int) -> bool:
        """Whether the page's siblings are known better than by their numbers."""
        if "siblings" not in self._techniques:
            return False
        return self._trees.parent(pgno) is not None or self._trees.is_root(pgno)

    def _guess(self, pgno: int) -> list[int]:
        """Who reads a leaf of an index reads the next one, more often than not."""
        parent = self._trees.parent(pgno)
        if (
            "siblings" not in self._techniques
            or parent is None
            or parent.is_table
            or self._guesses > 8 + 4 * self._hits
        ):
            return []
        beside = self._trees.neighbour(pgno, 1)
        if beside is None:
            return []
        self._guesses += 1
        return [beside]

    def _window(self, pgno: int | None) -> int | None:
        """The window of a stream that goes on from `pgno`; None if that page was not read lately."""
        if pgno is None:
            return None
        window = self._seen.get(pgno)
        if window is None:
            window = next((stream.window // 2 for stream in self._streams if stream.last == pgno), None)
        return None if window is None else max(window, _START)

    def _find_sibling(self, pgno: int) -> tuple[_Source, int] | None:
        for direction in (1, -1):
            window = self._window(self._trees.neighbour(pgno, -direction))
            if window is not None:
                self._hits += 1
                return _Siblings(self._trees, pgno, direction), window
        return None

    def _find_number(self, pgno: int) -> tuple[_Source, int] | None:
        if self._is_in_tree(pgno):
            return None  # what is next in the tree is known better
        for back in range(1, 5):
            window = self._window(pgno - back)
            if window is not None:
                return _Run(pgno), window
        window = self._window(pgno + 1)
        return None if window is None else (_Listed(range(pgno - 1, 0, -1)), window)

    def _find_row(self, pgno: int) -> tuple[_Source, int] | None:
        """A row that the last index leaf names, and the one before it was read before: the rows behind it are next."""
        parent = self._trees.parent(pgno)
        if self._index_leaf is None or parent is None or not parent.is_table:
            return None
        leaves = self._row_leaves
        if leaves is None:
            leaves = self._row_leaves = self._leaves_of(*self._index_leaf)
            self._row_at = -1
        before = self._row_at
        try:
            at = self._row_at = leaves.index(pgno, max(0, before - 1))
        except ValueError:
            return None
        if before < 0 or at == before:
            return None
        rest = leaves[at + 1 :] if at > before else leaves[at - 1 :: -1] if at else []
        return _Listed(rest), _START

    def _leaves_of(self, pgno: int, page: bytes) -> list[int]:
        table = self._trees.table_of(pgno)
        if not table or self._trees.root(pgno) == table:
            return []
        rowids = btree.index_rowids(page, pgno, self._trees.usable)
        return list(dict.fromkeys(self._trees.leaves(table, rowids)))

    def _find_chain(self, pgno: int) -> tuple[_Source, int] | None:
        """The first page of an overflow chain of the last leaf: its pages mostly lie in a row."""
        if self._leaf is None or self._trees.parent(pgno) is not None:
            return None
        chains = self._chains
        if chains is None:
            found = btree.overflow_chains(self._leaf[1], self._leaf[0], self._trees.usable)
            chains = self._chains = {first: (at, length) for at, (first, length) in enumerate(found)}
            self._chain_at = -1
        if pgno not in chains:
            return None
        at, length = chains[pgno]
        before, self._chain_at = self._chain_at, at
        pages: Iterable[int] = range(pgno + 1, pgno + length)
        if at == before + 1 and before >= 0:  # one after the other: those of the rows behind as well
            pages = chain(pages, *(range(first, first + n) for first, (k, n) in chains.items() if k > at))
        return _Listed(pages), max(_START, min(length, self._limit))
