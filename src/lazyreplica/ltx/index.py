"""The page index: where in its file each page's frame lies (LTX.md, "Page index")."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from operator import sub
from typing import Final

from lazyreplica.errors import LTXError
from lazyreplica.ltx.frame import FRAME_HEADER_SIZE, max_frame_size
from lazyreplica.ltx.header import HEADER_SIZE, TRAILER_SIZE, Header

_LENGTH_SIZE: Final = 8
_MIN_FILE_SIZE: Final = HEADER_SIZE + FRAME_HEADER_SIZE + 1 + _LENGTH_SIZE + TRAILER_SIZE
MAX_ENTRY_SIZE: Final = 5 + 9 + 3
"""Page number below 2**32, offset below 2**63, size of a frame below 2**21, seven bits a byte."""
INDEX_END: Final = 1 + _LENGTH_SIZE
"""Bytes after the entries: a zero and the length."""

# Each byte of a varint in one of three classes: zero (0), the last of its varint (1), more to come (2).
_VARINT_CLASS: Final = bytes([0]) + bytes([1]) * 127 + bytes([2]) * 128


def encode_index(entries: Iterable[tuple[int, int, int]]) -> bytes:
    """The index region for ascending (page number, offset, size): varints, a zero, the length of all that."""
    region = bytearray()
    append = region.append
    for entry in entries:
        for number in entry:
            rest = number
            while rest > 127:
                append(rest & 127 | 128)
                rest >>= 7
            append(rest)
    append(0)
    return bytes(region) + len(region).to_bytes(_LENGTH_SIZE, "big")


def locate_index(tail: bytes, file_size: int) -> tuple[int, int]:
    """Offset and length of the index region, from the last 24 or more bytes of a file of `file_size` bytes.

    The region includes the 8 bytes of its own length and ends where the trailer begins. Raises `LTXError`
    when such a region does not fit into the file, so the answer is safe to allocate or to ask a store for.
    """
    if file_size < _MIN_FILE_SIZE:
        raise LTXError(f"LTX file is {file_size} bytes long, expected at least {_MIN_FILE_SIZE}: it is truncated")
    if len(tail) < _LENGTH_SIZE + TRAILER_SIZE:
        raise LTXError(f"tail is {len(tail)} bytes long, expected at least {_LENGTH_SIZE + TRAILER_SIZE}")
    varints = int.from_bytes(tail[-_LENGTH_SIZE - TRAILER_SIZE : -TRAILER_SIZE], "big")
    largest = file_size - _MIN_FILE_SIZE + 1
    if not 1 <= varints <= largest:
        raise LTXError(f"page index announces {varints} bytes, expected 1 to {largest} in a file of {file_size}")
    length = varints + _LENGTH_SIZE
    return file_size - TRAILER_SIZE - length, length


@dataclass(frozen=True, slots=True)
class PageIndex:
    """Page numbers and frame offsets, in flat arrays: 12 bytes a page.

    `pgnos` ascends. `offsets` has one more element, the end of the last frame: frames follow one another
    without gaps, so a frame's size is the distance to the next. `dense_lock_pgno` is 0, or, when the file
    holds every page but the lock page, the number of that: then a page's position follows from its number.
    """

    pgnos: array[int]
    offsets: array[int]
    dense_lock_pgno: int = 0

    def __post_init__(self) -> None:
        if len(self.offsets) != len(self.pgnos) + 1:
            raise LTXError(f"page index has {len(self.offsets)} offsets, expected {len(self.pgnos) + 1}")

    @classmethod
    def parse(cls, data: bytes, *, header: Header, file_size: int) -> PageIndex:
        """The index in `data`, the region that `locate_index` found in a file of `file_size` bytes.

        Raises `LTXError` unless the entries describe frames that fill the room between header and index.
        """
        end = file_size - TRAILER_SIZE - len(data) - FRAME_HEADER_SIZE
        if len(data) <= _LENGTH_SIZE or int.from_bytes(data[-_LENGTH_SIZE:], "big") != len(data) - _LENGTH_SIZE:
            raise LTXError(f"page index of {len(data)} bytes does not end with its length")
        pgnos, offsets = parse_entries(data[:-_LENGTH_SIZE], header)
        if offsets[-1] != end:
            raise LTXError(f"frames in the page index end at offset {offsets[-1]}, expected {end}")
        lock_pgno = header.lock_pgno
        position = bisect_left(pgnos, lock_pgno)
        if position < len(pgnos) and pgnos[position] == lock_pgno:
            raise LTXError(f"page index lists page {lock_pgno}, expected no lock page")
        # Different numbers from 1..commit without the lock page: if they are that many, they are all.
        dense = len(pgnos) == header.snapshot_page_count
        if header.is_snapshot and not dense:
            raise LTXError(f"page index of a snapshot lists {len(pgnos)} pages, expected {header.snapshot_page_count}")
        return cls(pgnos, offsets, lock_pgno if dense else 0)

    def __len__(self) -> int:
        return len(self.pgnos)

    def position(self, pgno: int) -> int | None:
        """Which frame, from 0, holds page `pgno`; None if the file does not hold it."""
        pgnos = self.pgnos
        if self.dense_lock_pgno:
            if pgno == self.dense_lock_pgno:
                return None
            position = pgno - 1 - (pgno > self.dense_lock_pgno)
            return position if 0 <= position < len(pgnos) else None
        position = bisect_left(pgnos, pgno)
        return position if position < len(pgnos) and pgnos[position] == pgno else None

    def holds(self, pgno: int) -> bool:
        """Whether the file holds page `pgno`."""
        return self.position(pgno) is not None

    def peek(self, pgno: int) -> tuple[int, int] | None:
        """The same as `get`, which never has to read here."""
        return self.get(pgno)

    def get(self, pgno: int) -> tuple[int, int] | None:
        """Offset and size of the frame of page `pgno`, in bytes; None if the file does not hold it."""
        position = self.position(pgno)
        if position is None:
            return None
        offset = self.offsets[position]
        return offset, self.offsets[position + 1] - offset

    def entry(self, position: int) -> tuple[int, int, int]:
        """Page number, offset and size of the frame at `position`, 0 <= position < len(self)."""
        offset = self.offsets[position]
        return self.pgnos[position], offset, self.offsets[position + 1] - offset

    def frames(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """Page number, offset and size of the frames at positions first <= position < last."""
        offsets = self.offsets[first : last + 1]
        ends = offsets[1:]
        return zip(self.pgnos[first:last], offsets, map(sub, ends, offsets), strict=False)


class DensePgnos(Collection[int]):
    """The page numbers 1..commit without the lock page, ascending; takes no memory."""

    __slots__ = ("_above", "_below")

    def __init__(self, commit: int, lock_pgno: int) -> None:
        self._below = range(1, min(commit + 1, lock_pgno))
        self._above = range(lock_pgno + 1, commit + 1)

    def __len__(self) -> int:
        return len(self._below) + len(self._above)

    def __iter__(self) -> Iterator[int]:
        return chain(self._below, self._above)

    def __contains__(self, pgno: object) -> bool:
        return pgno in self._below or pgno in self._above


def parse_entries(
    varints: bytes, header: Header, previous: int = 0, expected: int = HEADER_SIZE
) -> tuple[array[int], array[int]]:
    """Page numbers and offsets (and the end of the last frame), checked to ascend without gaps.

    `varints` are whole entries and a zero. Page numbers must be above `previous`, and the first frame must lie
    at offset `expected`: what the entries before say. Raises `LTXError`.
    """
    classes = varints.translate(_VARINT_CLASS)
    if b"\2\0" in classes or b"\2" * 9 in classes:
        raise LTXError("page index holds a varint of more bytes than its number needs")
    if classes[-1]:
        raise LTXError(f"page index ends with byte {varints[-1]:#x}, expected a zero")
    # The last byte is a zero, and a varint of its own: it ends the loop, or is refused as an offset or a
    # size. So taking the next byte needs no look at whether there is one, and a for loop that breaks takes it
    # fastest. Subtracting 1 from each byte takes away the "more to come" bit of the byte before it; hence a
    # start from 1. Measured: 0.5 us an entry of 9 bytes.
    pgnos, offsets = array("I"), array("Q")
    add_pgno, add_offset = pgnos.append, offsets.append
    commit, largest = header.commit, max_frame_size(header.page_size)
    rest = iter(varints)
    for first in rest:
        pgno = first
        if first > 127:
            shift = 7
            for byte in rest:
                pgno += byte - 1 << shift
                if byte < 128:
                    break
                shift += 7
        elif first == 0:
            break
        offset, shift = 1, 0
        for byte in rest:
            offset += byte - 1 << shift
            if byte < 128:
                break
            shift += 7
        size, shift = 1, 0
        for byte in rest:
            size += byte - 1 << shift
            if byte < 128:
                break
            shift += 7
        if offset != expected:
            raise LTXError(f"page index has page {pgno} at offset {offset}, expected {expected}")
        if not previous < pgno <= commit:
            raise LTXError(f"page index has page {pgno} after page {previous}, expected more, up to {commit}")
        if not FRAME_HEADER_SIZE < size <= largest:
            raise LTXError(f"page index has a frame of {size} bytes for page {pgno}, expected up to {largest}")
        add_pgno(pgno)
        add_offset(offset)
        previous = pgno
        expected = offset + size
    add_offset(expected)
    surplus = sum(1 for _ in rest)
    if surplus:
        raise LTXError(f"page index goes on for {surplus} bytes after its zero")
    return pgnos, offsets
