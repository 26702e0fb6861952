"""How to read one file of a bulk job: whole, or only the stretches that hold what is wanted."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from lazyreplica.bulk.job import BulkFile
from lazyreplica.bulk.pieces import PIECE, Piece
from lazyreplica.errors import LTXError
from lazyreplica.ltx.header import HEADER_SIZE, TRAILER_SIZE, Header
from lazyreplica.ltx.index import PageIndex, locate_index
from lazyreplica.storage import Store, StoredFile

LARGE = 8 << 20
"""Bytes: what is smaller is read whole, in no more time than its index would take to look at."""
_TAIL = 128 << 10
_GAP = 64 << 10
"""Two wanted frames closer than this many bytes are one range: bytes are cheaper than a round trip."""


@dataclass(frozen=True, slots=True)
class Stretches:
    """Which frames lie in each piece of a file that is not read whole: positions in its index, the end exclusive."""

    index: PageIndex
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """The pieces of a file to read."""

    pieces: tuple[Piece, ...]
    stretches: Stretches | None = None
    """None: the pieces are the whole file."""


def check_header(header: Header, file: StoredFile, page_size: int) -> None:
    """Raise `LTXError` unless that can be the header of `file`."""
    if header.name != file.name:
        raise LTXError(f"header of {file} says it is {header.name}")
    if header.page_size != page_size:
        raise LTXError(f"header of {file} has page size {header.page_size}, expected {page_size}")


def plan_whole(file: StoredFile) -> Plan:
    """All of it."""
    offsets = range(0, file.size, PIECE)
    return Plan(tuple(Piece(file, offset, min(PIECE, file.size - offset)) for offset in offsets))


def plan(store: Store, wanted: BulkFile, page_size: int, timeout: float) -> Plan:
    """The cheapest way to what is wanted.

    A file's checksum can be verified only when it is read whole, so this is the way unless it would be twice the
    bytes. May have to read the page index: raises `LTXError` and what `Store.read` raises.
    """
    file = wanted.file
    # Pages are at most what the bitmap has bits: with half of them set, half of the file is wanted.
    if file.size < LARGE or 2 * wanted.count >= 8 * len(wanted.wanted):
        return plan_whole(file)
    check_header(header := Header.parse(store.read(file, 0, HEADER_SIZE, timeout)), file, page_size)
    index = _read_index(store, file, header, timeout)
    table = wanted.page_table()
    positions = array("I", (at for at, pgno in enumerate(index.pgnos) if pgno < len(table) and table[pgno]))
    if len(positions) != wanted.count:
        raise LTXError(f"{file} holds {len(positions)} of {wanted.count} wanted pages")
    offsets = index.offsets
    if 2 * sum(offsets[at + 1] - offsets[at] for at in positions) >= file.size:
        return plan_whole(file)
    spans = tuple(_spans(positions, offsets))
    pieces = tuple(Piece(file, offsets[first], offsets[end] - offsets[first]) for first, end in spans)
    return Plan(pieces, Stretches(index, spans))


def _read_index(store: Store, file: StoredFile, header: Header, timeout: float) -> PageIndex:
    length = min(_TAIL, file.size)
    tail = store.read(file, file.size - length, length, timeout)
    start, size = locate_index(tail, file.size)
    if size + TRAILER_SIZE > length:
        tail = store.read(file, start, size + TRAILER_SIZE - length, timeout) + tail
    return PageIndex.parse(tail[-size - TRAILER_SIZE : -TRAILER_SIZE], header=header, file_size=file.size)


def _spans(positions: array[int], offsets: array[int]) -> Iterator[tuple[int, int]]:
    """First and end of the frames that are worth one request together."""
    first = end = positions[0]
    for at in positions:
        if offsets[at] - offsets[end] > _GAP or offsets[at + 1] - offsets[first] > PIECE:
            yield first, end
            first = at
        end = at + 1
    yield first, end
