"""What is known of the database's b-trees: who is whose child, in which order. Shared by all readers of a replica.

Learned from the interior pages that pass by. Only to predict: it may be out of date (a page that was split since),
incomplete, or nonsense from a hostile file, and then something is fetched in vain. Bounded in memory.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping

from lazyreplica import btree
from lazyreplica.btree import Interior

_CAPACITY = 4 << 20
"""Bytes of memory for interior pages and their children."""
_CHILD = 90
_PAGE = 450
"""Bytes that a child takes, in two arrays and a table, and a page beside that (measured: 1 to 400 children a page)."""
_MAX_WANTED = 1024
_MAX_ROOTS = 4096
_ENCODINGS = {2: "utf-16-le", 3: "utf-16-be"}
_MAX_DEPTH = 20
"""SQLite's own limit for the depth of a b-tree (BTCURSOR_MAX_DEPTH)."""


class Trees:
    """Thread-safe: what is read while somebody learns is of before or after, or a bit of both, which does no harm."""

    def __init__(self, page_size: int) -> None:
        """`page_size` in bytes."""
        self.usable = page_size
        """As in `btree`; page 1 corrects it."""
        self._page_size = page_size
        self._interiors: dict[int, Interior] = {}
        self._lowest: OrderedDict[int, None] = OrderedDict()
        """Those whose children are leaves, as far as is known; oldest first, and so they are forgotten."""
        self._upper: OrderedDict[int, None] = OrderedDict()
        """Roots, and those above other interior pages: few, and everything below leads through them. They go last."""
        self._parents: dict[int, int] = {}
        self.wanted: set[int] = set()
        """Interior pages that somebody has to know to know more: learn them as soon as they are here."""
        self._tables: dict[int, int] = {}
        """Root of a table or an index -> root of the table; 0 if that is not known."""
        self._memory = 0
        self._lock = threading.Lock()

    def learn(self, pgno: int, page: bytes) -> Interior | None:
        """Take note of an interior page; None if it is none."""
        if pgno == 1:
            self.usable = self._page_size - page[20]
            self.learn_schema({1: page}, page[56:60])
        interior = btree.interior(page, pgno, self.usable)
        if interior is None:
            return None
        with self._lock:
            self._forget(pgno)
            self.wanted.discard(pgno)
            self._interiors[pgno] = interior
            self._memory += _memory(interior)
            for child in interior.children:
                self._parents[child] = pgno
            is_upper = pgno in self._tables or not self._interiors.keys().isdisjoint(interior.children)
            (self._upper if is_upper else self._lowest)[pgno] = None
            self._raise(self._parents.get(pgno, 0))
            while self._memory > _CAPACITY:
                self._forget(next(iter(self._lowest or self._upper)))
        return interior

    def forget(self, page_size: int) -> None:
        """Another database has taken the place of the one that was known."""
        with self._lock:
            self._page_size = self.usable = page_size
            self._interiors.clear()
            self._lowest.clear()
            self._upper.clear()
            self._parents.clear()
            self._tables.clear()
            self.wanted.clear()
            self._memory = 0

    def learn_schema(self, pages: Mapping[int, bytes], encoding: bytes) -> list[int]:
        """Take note of the tables and indexes in those leaves of the schema; their root pages, in order of creation.

        `encoding`: bytes 56 to 59 of page 1.
        """
        name = _ENCODINGS.get(int.from_bytes(encoding), "utf-8")
        rows = [row for pgno, page in pages.items() for row in btree.schema_rows(page, pgno, self.usable, name)]
        tables = {row.name: row.root for row in rows if row.type == "table"}
        with self._lock:
            for row in rows[:_MAX_ROOTS]:
                self._tables.pop(row.root, None)
                self._tables[row.root] = tables.get(row.table, 0)
                self._raise(row.root)
            while len(self._tables) > _MAX_ROOTS:
                del self._tables[next(iter(self._tables))]
        return [row.root for row in rows]

    def _raise(self, pgno: int) -> None:
        """That page is a root, or has a child that is an interior page."""
        if pgno in self._lowest:
            del self._lowest[pgno]
            self._upper[pgno] = None

    def _forget(self, pgno: int) -> None:
        interior = self._interiors.pop(pgno, None)
        self._lowest.pop(pgno, None)
        self._upper.pop(pgno, None)
        if interior is not None:
            self._memory -= _memory(interior)
            for child in interior.children:
                if self._parents.get(child) == pgno:
                    del self._parents[child]

    def interior(self, pgno: int) -> Interior | None:
        """What is known of that interior page."""
        return self._interiors.get(pgno)

    def knows_any(self, pgnos: Iterable[int]) -> bool:
        """Whether any of those is known to be an interior page. 30 ns a page."""
        return not self._interiors.keys().isdisjoint(pgnos)

    def parent(self, pgno: int) -> Interior | None:
        """The interior page above, if it is known."""
        return self._interiors.get(self._parents.get(pgno, 0))

    def root(self, pgno: int) -> int:
        """The page that the known way up from `pgno` ends at: the root, or how far we know."""
        for _ in range(_MAX_DEPTH):
            parent = self._parents.get(pgno)
            if parent is None:
                break
            pgno = parent
        return pgno

    @property
    def roots(self) -> list[int]:
        """Root pages of the tables and indexes that the schema names, as far as it is known."""
        return list(self._tables)

    def is_root(self, pgno: int) -> bool:
        """Whether the schema names that page."""
        return pgno in self._tables

    def table_of(self, pgno: int) -> int:
        """Root of the table that the index (or table) which `pgno` is a page of belongs to; 0 if that is not known."""
        return self._tables.get(self.root(pgno), 0)

    def neighbour(self, pgno: int, direction: int) -> int | None:
        """The page before (-1) or after (1) `pgno` on its level of the tree, if the pages above are known."""
        return next(iter(self.beyond(pgno, 1, direction)[0]), None)

    def beyond(self, pgno: int, count: int, direction: int) -> tuple[list[int], int | None]:
        """Up to `count` pages that follow `pgno` on its level, in key order (-1: in reverse).

        And, if the list ends because of that, the interior page that has to be learned to know how it goes on.
        """
        pages: list[int] = []
        # Hostile pages may lead in circles: each round uses up one of `count`.
        while len(pages) < count:
            parent = self._parents.get(pgno, 0)
            interior = self._interiors.get(parent)
            if interior is None:
                break
            pages += _after(interior, pgno, direction)
            if len(pages) >= count:
                break
            uncle = self._uncle(parent, direction)
            if uncle is None:
                break
            following = self._interiors.get(uncle)
            if following is None:
                self._want(uncle)
                return pages, uncle
            pgno = following.children[0 if direction > 0 else -1]
            pages.append(pgno)
        return pages[:count], None

    def beside(self, pgno: int, count: int, direction: int) -> list[int]:
        """Up to `count` interior pages next to `pgno`, one itself, under the same parent: those that are not known yet.

        Who goes on to the next interior page needs these soon, and should not wait for each of them.
        """
        parent = self.parent(pgno)
        if parent is None:
            return []
        pages = [page for page in _after(parent, pgno, direction)[:count] if page not in self._interiors]
        for page in pages:
            self._want(page)
        return pages

    def _want(self, pgno: int) -> None:
        if len(self.wanted) < _MAX_WANTED:
            self.wanted.add(pgno)

    def _uncle(self, pgno: int, direction: int) -> int | None:
        """The page next to `pgno`, an interior one, on its level: first up, then down, as far as that is known."""
        height = 0
        for _ in range(_MAX_DEPTH):
            parent = self._parents.get(pgno, 0)
            interior = self._interiors.get(parent)
            if interior is None:
                return None
            beside = _after(interior, pgno, direction)
            if beside:
                pgno = beside[0]
                break
            pgno, height = parent, height + 1
        for _ in range(height):
            interior = self._interiors.get(pgno)
            if interior is None:
                return pgno  # this one has to be learned first
            pgno = interior.children[0 if direction > 0 else -1]
        return pgno

    def leaves(self, root: int, rowids: Iterable[int]) -> Iterator[int]:
        """The leaf of the table at `root` for each rowid, in that order, as far as the way down is known."""
        for rowid in rowids:
            pgno = root
            for _ in range(_MAX_DEPTH):
                interior = self._interiors.get(pgno)
                if interior is None:
                    break
                if not interior.is_table:
                    return
                pgno = interior.child_for(rowid)
            # A page that is not known as interior and has a neighbour that is one would be one itself: not a leaf.
            if pgno != root:
                yield pgno


def _memory(interior: Interior) -> int:
    return _PAGE + _CHILD * len(interior.children)


def _after(interior: Interior, pgno: int, direction: int) -> list[int]:
    children = interior.children
    try:
        at = children.index(pgno)
    except ValueError:  # another one has been learned since
        return []
    return children[at + 1 :].tolist() if direction > 0 else children[:at][::-1].tolist()
