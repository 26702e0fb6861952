"""What a SQLite b-tree page says of the pages that will be read next (https://www.sqlite.org/fileformat2.html, 1.6).

Only to predict, never to answer: any bytes may come in, a page of another kind or a damaged one. Nothing here raises
on them, works longer or holds more than the size of the page allows; nonsense gives None, nothing, or page numbers
that lead nowhere. They may also lead back, and past the end of the database: whoever follows them has to bound that.

`usable` is the size of a page less the reserved bytes at its end (byte 20 of the database), `pgno` tells page 1,
whose b-tree begins after the 100 bytes of the database header.
"""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_left
from dataclasses import dataclass
from operator import itemgetter
from struct import Struct
from typing import Final

INTERIOR_INDEX: Final = 2
INTERIOR_TABLE: Final = 5
LEAF_INDEX: Final = 10
LEAF_TABLE: Final = 13

_KINDS: Final = frozenset((INTERIOR_INDEX, INTERIOR_TABLE, LEAF_INDEX, LEAF_TABLE))
_U32: Final = Struct(">I")
_INTEGER_BYTES: Final = (0, 1, 2, 3, 4, 6, 8, 0, 0, 0)
"""Length of a value by its serial type (section 2.1): 1 to 6 are integers, 8 and 9 stand for 0 and 1."""


@dataclass(frozen=True, slots=True)
class Interior:
    """An interior page: the way down from it."""

    is_table: bool
    children: array[int]
    """Page numbers ('I'), none 0, in key order. One more than the page has cells: the right-most child is last."""
    keys: array[int]
    """Of a table, the rowid ('q') of each cell: child i holds the rowids up to keys[i] and none above. Of an index
    nothing."""

    def child_for(self, rowid: int) -> int:
        """The child of a table's page where `rowid` is, if it exists; of an index merely some child. 0.3 us."""
        return self.children[bisect_left(self.keys, rowid)]


@dataclass(frozen=True, slots=True)
class SchemaRow:
    """A table or an index that has pages of its own.

    Whether a table is one of rowids is for the kind of its root page to tell: WITHOUT ROWID it is an index's. The
    entries of that table's indexes end in a column of its primary key, and `index_rowids` of them mean nothing.
    """

    type: str
    """'table' or 'index'."""
    name: str
    table: str
    """That the index belongs to; of a table its own name."""
    root: int
    """Page number, above 1."""


def kind(page: bytes, pgno: int) -> int:
    """The type of a b-tree page, one of the four constants above; 0 if it is none of them."""
    at = 100 if pgno == 1 else 0
    return page[at] if len(page) > at and page[at] in _KINDS else 0


def interior(page: bytes, pgno: int, usable: int) -> Interior | None:
    """The children of an interior page; None if it is none, or not a plausible one.

    4 KiB with 400 cells: of an index 33 us, of a table 60 us, whether a rowid takes 2 bytes or 6. 64 KiB: 0.9 ms.
    """
    found, cells = _cells(page, pgno, usable)
    if found not in (INTERIOR_INDEX, INTERIOR_TABLE):
        return None
    children: tuple[int, ...] = _U32.unpack_from(page, 108 if pgno == 1 else 8)
    keys = array("q")
    # Page 1 may have but the right-most child, if that one's cells do not fit in beside the database header.
    if cells:
        words = _words(page[:usable])
        # The last one twice: a getter of one place gives no tuple.
        at_cells = itemgetter(*cells, cells[-1])
        children = at_cells(words)[:-1] + children
        if found == INTERIOR_TABLE:
            keys = _varints(words, 4, at_cells, len(cells) + 1)[:-1]
    if 0 in children or pgno in children:
        return None
    return Interior(found == INTERIOR_TABLE, array("I", children), keys)


def index_rowids(page: bytes, pgno: int, usable: int) -> array[int]:
    """The rowid ('q') that each entry of an index page points to, in key order: the last column, if it is an integer.

    An entry is left out if that column is on an overflow page. Of a WITHOUT ROWID table, or of an index of one, the
    last column means something else. A leaf of 300 entries in 4 KiB takes 110 us.
    """
    rowids = array("q")
    found, cells = _cells(page, pgno, usable)
    if found not in (INTERIOR_INDEX, LEAF_INDEX):
        return rowids
    most, least = _payload_bounds(found, usable)
    child = 4 if found == INTERIOR_INDEX else 0
    widths, add, integer = _INTEGER_BYTES, rowids.append, int.from_bytes
    for cell in cells:
        try:
            size = page[cell + child]
            start = cell + child + 1
            if size >= 0x80:
                size, start = _varint(page, start - 1)
            header = page[start]
            if header >= 0x80:
                header = _varint(page, start)[0]
            last = start + header - 1
            serial = page[last]
            # A set high bit before it makes it the end of a longer number: a text or a blob.
            if serial > 9 or page[last - 1] >= 0x80:
                continue
        except IndexError:  # points past the end
            continue
        width = widths[serial]
        end = start + size
        if not 2 <= header <= size - width or (size > most and header > _on_page(size, most, least, usable)):
            continue
        if serial >= 8:
            add(serial - 8)
        elif width and size <= most and end <= usable:
            add(integer(page[end - width : end], "big", signed=True))
    return rowids


def overflow_pages(page: bytes, pgno: int, usable: int) -> array[int]:
    """The first overflow page ('I') of each cell that has one, in key order."""
    return array("I", [first for first, _ in overflow_chains(page, pgno, usable)])


def overflow_chains(page: bytes, pgno: int, usable: int) -> list[tuple[int, int]]:
    """The first overflow page of each cell that has one, and how many it has: up to 5 million. In key order.

    4 KiB with 400 cells but none of them takes 17 us; a chain 1 us more.
    """
    chains: list[tuple[int, int]] = []
    found, cells = _cells(page, pgno, usable)
    if found in (0, INTERIOR_TABLE):
        return chains
    most, least = _payload_bounds(found, usable)
    end = usable - (4 if found == INTERIOR_INDEX else 0)
    # A number that runs past the end ends with the first 0, and the one after it is the second.
    body = page[usable - end : usable] + bytes(2)
    # The first byte of a size tells most of those apart that are small enough.
    suspect = min(0x80, most + 1)
    for cell in [cell for cell in cells if body[cell] >= suspect]:
        size, start = _varint(body, cell)
        if most < size < 1 << 31:  # SQLite's own limit
            if found == LEAF_TABLE:
                start = _varint(body, start)[1]
            local = _on_page(size, most, least, usable)
            first = int.from_bytes(body[start + local : start + local + 4], "big")
            if first and start + local + 4 <= end:
                chains.append((first, -((local - size) // (usable - 4))))
    return chains


def next_overflow(page: bytes) -> int:
    """The overflow page after this one; 0 at the end."""
    return int(_U32.unpack_from(page)[0]) if len(page) >= 4 else 0


def schema_rows(page: bytes, pgno: int, usable: int, encoding: str = "utf-8") -> list[SchemaRow]:
    """The tables and indexes with pages of their own in this leaf of sqlite_schema, by rowid: in order of creation.

    `encoding` is the database's (its bytes 56 to 59): utf-8, utf-16le or utf-16be. A row is left out if more than its
    SQL is on an overflow page. 4 us a row.
    """
    rows: list[SchemaRow] = []
    found, cells = _cells(page, pgno, usable)
    if found != LEAF_TABLE:
        return rows
    most, least = _payload_bounds(found, usable)
    budget = usable  # of text: cells that overlap could make it many times the page
    for cell in cells:
        try:
            size, start = _varint(page, cell)
            start = _varint(page, start)[1]
            values = _leading(page, start, start + _on_page(size, most, least, usable))
        except IndexError:  # points past the end
            continue
        budget -= sum(map(len, values))
        if budget < 0:
            break
        if len(values) == 4:
            type_, name, table = (value.decode(encoding, "replace") for value in values[:3])
            root = int.from_bytes(values[3], "big", signed=True)
            if type_ in {"table", "index"} and 1 < root < 1 << 32:
                rows.append(SchemaRow(type_, name, table, root))
    return rows


def _cells(page: bytes, pgno: int, usable: int) -> tuple[int, list[int]]:
    """The page's kind and where its cells begin, in key order; kind 0 if that cannot be."""
    found = kind(page, pgno)
    if not found or not 480 <= usable <= len(page):  # the least that the format allows
        return 0, []
    header = 100 if pgno == 1 else 0
    count = page[header + 3] << 8 | page[header + 4]
    first = header + (12 if found in (INTERIOR_INDEX, INTERIOR_TABLE) else 8)
    # SQLite, too, takes a page that announces more cells for damaged: the smallest with its pointer has 6 bytes.
    if first + 6 * count > usable:
        return 0, []
    cells = array("H", page[first : first + 2 * count])
    if sys.byteorder == "little":
        cells.byteswap()
    places = cells.tolist()
    return (found, places) if max(places, default=0) <= usable - 4 else (0, [])


def _varint(page: bytes, at: int) -> tuple[int, int]:
    """The variable-length number at `at`, unsigned, and where it ends. `IndexError` past the end of the page."""
    value = 0
    for n in range(at, at + 8):
        byte = page[n]
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, n + 1
    return value << 8 | page[at + 8], at + 9


def _words(page: bytes) -> array[int]:
    """The 32-bit number ('I') at every offset of the page, zeros after it, and at 16 more. 7 us for 4 KiB."""
    page += bytes(20)
    interleaved = bytearray(4 * (len(page) - 4))
    for n in range(4):
        interleaved[n if sys.byteorder == "big" else 3 - n :: 4] = page[n : len(page) - 4 + n]
    return array("I", interleaved)


def _varints(words: array[int], offset: int, at_cells: itemgetter[tuple[int, ...]], count: int) -> array[int]:
    """The variable-length number `offset` bytes after the begin of each of `count` cells, as signed 64 bits ('q').

    All in step: they are the lanes, 64 bits each, of one large integer. A loop over 400 cells takes 100 us, this 28.
    """
    order = sys.byteorder
    ones = int.from_bytes(array("Q", (1,)) * count, order)
    seven_bits = ones * 0x7F
    values, unfinished, four = 0, ones, 0
    for n in range(9):
        if n % 4 == 0:
            four = int.from_bytes(array("Q", at_cells(words[offset + n :])), order)
        byte = four >> (24 - n % 4 * 8)  # in the low bits of each lane
        # No lane runs over into the next: those that ended before have at most 7 bits for each byte so far.
        longer = values << 7 | byte & seven_bits if n < 8 else values << 8 | byte & ones * 0xFF
        values = longer if unfinished == ones else values ^ (values ^ longer) & unfinished * 0xFFFF_FFFF_FFFF_FFFF
        unfinished &= byte >> 7
        if not unfinished:
            break
    return array("q", values.to_bytes(8 * count, order))


def _payload_bounds(found: int, usable: int) -> tuple[int, int]:
    """The longest payload that is all on a page of this kind, and the least of a longer one that is: X and M."""
    most = usable - 35 if found == LEAF_TABLE else (usable - 12) * 64 // 255 - 23
    return most, (usable - 12) * 32 // 255 - 23


def _on_page(size: int, most: int, least: int, usable: int) -> int:
    """How much of a payload is on the page, ahead of the number of its first overflow page."""
    if size <= most:
        return size
    filling = least + (size - least) % (usable - 4)  # K: the last overflow page is full
    return filling if filling <= most else least


def _leading(page: bytes, start: int, end: int) -> list[bytes]:
    """Columns type, name, tbl_name and rootpage of a record, as far as they are of their type and before `end`."""
    values: list[bytes] = []
    header, at = _varint(page, start)
    start += header
    for is_text in (True, True, True, False):
        serial, at = _varint(page, at)
        if serial > 9 if not is_text else serial < 13 or serial % 2 == 0:
            break
        length = (serial - 13) // 2 if is_text else _INTEGER_BYTES[serial]
        if start + length > end:
            break
        values.append(page[start : start + length])
        start += length
    return values
