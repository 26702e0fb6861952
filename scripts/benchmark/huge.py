"""A 10 GB database without 10 GB: one table's b-tree, written page by page straight into an LTX file.

It is a true b-tree of four levels over the whole file (SQLite's own integrity check is run on a small one of the
same make), with one row a page. So a point query needs four pages in four far-away places of the file, and their
frames must be found in an index of 2.6 million entries. Frame sizes come in long runs of empty, small and large pages,
as tables come: where a page's frame lies cannot be told from its number.
"""

from __future__ import annotations

import math
import random
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apsw

from lazyreplica.ltx import FLAG_NO_CHECKSUM, Encoder, Header, lock_pgno

PAGE = 4096
_FAN = 400
"""Children of an interior page, at most; 409 would fit."""
_BLOB = 3900
"""Bytes of a row's payload, so that the next row needs another page."""
_RUNS = 260
"""How often the kind of the pages changes, about."""
_KINDS = (*((0, 30),) * 12, *((60, 360),) * 7, (1400, 2950))
"""Random bytes in a row's payload, from .. to: what LZ4 cannot shrink. The rest of the page is zeros."""
_SAMPLES = 41

SCHEMA = "CREATE TABLE items(id INTEGER PRIMARY KEY, name TEXT, payload BLOB)"
QUERY = "SELECT id, name, hex(substr(payload, 1, 8)), length(payload) FROM items WHERE id = ?"


@dataclass(frozen=True, slots=True)
class _Tree:
    """Where the pages of a tree of three interior levels lie: each interior page before its children."""

    leaves: int
    fan: int
    lock: int
    root: int = 2

    def number(self, position: int) -> int:
        """The page at `position` from 1, with the lock page left out."""
        return position + (position >= self.lock)

    @property
    def commit(self) -> int:
        low = -(-self.leaves // self.fan)
        high = -(-low // self.fan)
        return self.number(self.root + self.leaves + low + high)

    def pages(self, leaf: _Leaves) -> Iterator[tuple[int, bytes]]:
        """Page 2 and all that follow, ascending."""
        wide = self.fan * self.fan
        high = range(0, self.leaves, wide)
        assert len(high) <= self.fan, f"{self.leaves} leaves do not fit under one root"
        # Positions of everything below one high page: itself, its low pages, their leaves.
        starts = [self.root + 1 + first + self._interior_before(first) for first in high]
        yield (
            self.root,
            _interior(
                [(self.number(at), min(first + wide, self.leaves)) for first, at in zip(high, starts, strict=True)]
            ),
        )
        for first, at in zip(high, starts, strict=True):
            low = range(first, min(first + wide, self.leaves), self.fan)
            places = [at + 1 + index * (self.fan + 1) for index in range(len(low))]
            ends = [min(start + self.fan, self.leaves) for start in low]
            yield self.number(at), _interior([(self.number(p), end) for p, end in zip(places, ends, strict=True)])
            for start, end, place in zip(low, ends, places, strict=True):
                numbers = [self.number(place + 1 + index) for index in range(end - start)]
                yield self.number(place), _interior([(n, start + 1 + i) for i, n in enumerate(numbers)])
                for index, number in enumerate(numbers):
                    yield number, leaf.page(start + 1 + index)

    def _interior_before(self, first_leaf: int) -> int:
        """Interior pages, the root aside, in front of the high page that begins with leaf `first_leaf`."""
        return first_leaf // (self.fan * self.fan) + first_leaf // self.fan


class _Leaves:
    """Makes leaf pages of one row each. Rows must be asked for in order, from row 1."""

    def __init__(self, count: int, samples: frozenset[int]) -> None:
        self._longest = max(1, 2 * count // _RUNS)
        self._rng = random.Random(7)
        self._pool = self._rng.randbytes(1 << 20)
        self._left = 0
        self._kind = (0, 0)
        self._samples = samples
        self.rows: dict[int, tuple[int, str, str, int]] = {}
        """What `QUERY` must answer for the sampled rows."""

    def page(self, row: int) -> bytes:
        rand = self._rng.random
        if not self._left:
            self._kind = _KINDS[int(rand() * len(_KINDS))]
            self._left = 1 + int(rand() * self._longest)
        self._left -= 1
        least, most = self._kind
        size = least + int(rand() * (most - least))
        start = int(rand() * (len(self._pool) - size))
        name = f"item {row:08d}"
        blob = self._pool[start : start + size] + bytes(_BLOB - size)
        if row in self._samples:
            self.rows[row] = (row, name, blob[:8].hex().upper(), _BLOB)
        # Header: its own length, NULL (the key is the row id), text and blob as 13 and 12 plus twice their length.
        record = b"\x05\x00" + _varint(13 + 2 * len(name)) + _varint(12 + 2 * _BLOB) + name.encode() + blob
        cell = _varint(len(record)) + _varint(row) + record
        place = PAGE - len(cell)
        return b"\x0d\0\0\0\1%b\0%b" % (place.to_bytes(2), place.to_bytes(2)) + bytes(place - 10) + cell


def _varint(value: int) -> bytes:
    """SQLite's: big-endian, seven bits a byte."""
    parts = [value & 127]
    while value := value >> 7:
        parts.append(value & 127 | 128)
    return bytes(reversed(parts))


def _interior(children: list[tuple[int, int]]) -> bytes:
    """An interior page for (page number, largest row id below it)."""
    *cells, (right, _) = children
    page = bytearray(PAGE)
    place = PAGE
    for index, (number, key) in enumerate(cells):
        cell = number.to_bytes(4) + _varint(key)
        place -= len(cell)
        page[place : place + len(cell)] = cell
        page[12 + 2 * index : 14 + 2 * index] = place.to_bytes(2)
    page[0:12] = b"\x05\0\0%b%b\0%b" % (len(cells).to_bytes(2), place.to_bytes(2), right.to_bytes(4))
    return bytes(page)


def _first_page(commit: int) -> bytes:
    """Page 1 as SQLite writes it for this schema, with the size of the file to come."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "empty.db"
        with closing(sqlite3.connect(path)) as connection:
            connection.execute(f"PRAGMA page_size = {PAGE}")
            connection.execute(SCHEMA)
        page = bytearray(path.read_bytes()[:PAGE])
    page[18:20] = b"\2\2"  # WAL, as Litestream requires
    page[28:32] = commit.to_bytes(4)
    page[92:96] = page[24:28]  # the size above is valid for this change counter
    return bytes(page)


def _check_a_small_one() -> None:
    tree, leaf = _Tree(700, 10, lock=23), _Leaves(700, frozenset({1, 350, 700}))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "small.db"
        with path.open("wb") as file:
            for number, page in [(1, _first_page(tree.commit)), *tree.pages(leaf)]:
                file.seek((number - 1) * PAGE)
                file.write(page)
        connection = apsw.Connection(str(path))
        # The made-up lock page is the only one that nothing refers to.
        found = connection.execute("PRAGMA integrity_check").fetchall()
        rows = {row: connection.execute(QUERY, (row,)).fetchall() for row in leaf.rows}
        connection.close()
    assert [len(found), "never used" in str(found[0])] == [1, True], found
    assert rows == {row: [expected] for row, expected in leaf.rows.items()}, rows


def write_huge(path: Path, pages: int) -> dict[str, Any]:
    """Write the snapshot of a database of about `pages` pages, and return what is known about it."""
    _check_a_small_one()
    # SQLite takes no interior page with a single child for sound: three high pages at least, and all low ones full.
    fan = min(_FAN, math.isqrt(pages // 3))
    low = pages // (fan + 1)
    leaves = (low - (low % fan == 1)) * fan
    tree = _Tree(leaves, fan, lock_pgno(PAGE))
    rng = random.Random(11)
    keys = rng.sample(range(1, leaves + 1), _SAMPLES)
    leaf = _Leaves(leaves, frozenset(keys))
    header = Header(FLAG_NO_CHECKSUM, PAGE, tree.commit, 1, 1, 1_700_000_000_000, 0, 32)
    with path.open("wb", 1 << 20) as file:
        encoder = Encoder(header, file.write)
        encoder.add(1, _first_page(tree.commit))
        for number, page in tree.pages(leaf):
            encoder.add(number, page)
        encoder.finish()
    return {"pages": tree.commit, "keys": keys, "rows": [leaf.rows[key] for key in keys]}
