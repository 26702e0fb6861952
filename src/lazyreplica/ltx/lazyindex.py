"""The page index of a snapshot, read in pieces when it is asked for (LTX.md, "Page index").

A snapshot holds every page, so an entry's position follows from its page number, and each entry determines the
next one: page number plus one, offset plus size. Hence it is possible to begin reading anywhere, and to guess where
an entry lies: a lookup in 25 MB of index (10 GB of database) usually takes one read of 64 KiB.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterable
from itertools import pairwise
from operator import attrgetter
from threading import Lock
from typing import Final, NamedTuple

from lazyreplica.errors import LTXError
from lazyreplica.ltx.frame import FRAME_HEADER_SIZE, max_frame_size
from lazyreplica.ltx.header import HEADER_SIZE, TRAILER_SIZE, Header
from lazyreplica.ltx.index import INDEX_END, MAX_ENTRY_SIZE, DensePgnos, PageIndex, parse_entries

BLOCK_SIZE: Final = 8 << 10
"""Bytes of the index that are parsed, kept and forgotten together: some 900 pages."""
READ_SIZE: Final = 64 << 10
"""Bytes of a lookup's first read: on a wire of 60 MB/s a twentieth of a round trip of 20 ms."""
CAPACITY: Final = 4 << 20
"""Bytes of memory for blocks: some 800,000 pages once they are parsed, half as many before."""

_WIDER: Final = 4
"""A lookup's further reads are so many times longer: sizes are distributed unevenly, so guesses are bad."""
_MIN_ENTRY_SIZE: Final = 3
_MIN_FRAME_SIZE: Final = FRAME_HEADER_SIZE + 1
# `_recognise` needs the first seven varints that begin at or after a given byte: one begins within 8 bytes, since
# none is longer than 9, and seven in a row are no longer than three entries.
_RECOGNISED: Final = 7
_LOOKAHEAD: Final = 64
assert _LOOKAHEAD >= 8 + 3 * MAX_ENTRY_SIZE
_BLOCK_OVERHEAD: Final = 400  # bytes of Python objects around a block's contents
_PIECES: Final = 16
_GLANCES: Final = 8
"""So many times entries of a block are looked up in a sixteenth of it. Who asks for more, or for what lies right beside
the last piece, is going to ask for many."""


class _Edge(NamedTuple):
    """Where a block begins: at the first entry from its first byte on. The last edge is the end of the entries."""

    block: int
    position: int
    """The entry's number, from 0."""
    at: int
    """The entry's offset in the file."""
    offset: int
    """The frame's offset in the file, as the entry says."""


class _Block:
    """The entries between two edges: their bytes, or once enough of them were asked for, the frames' offsets."""

    __slots__ = ("base", "count", "end", "first", "glances", "offsets", "raw", "start", "used")

    def __init__(self, start: _Edge, end: _Edge, raw: bytes, used: int) -> None:
        self.start, self.end = start, end
        self.first, self.count = start.position, end.position - start.position
        self.raw = raw  # emptied after `offsets` is set
        self.base = start.offset
        self.offsets: array[int] | None = None  # less `base`; one more than entries, the end of the last frame
        self.used = used  # when, on the index's clock: what to forget is chosen by that
        self.glances = 0

    @property
    def memory(self) -> int:
        return len(self.raw) + (4 * self.count if self.offsets else 0) + _BLOCK_OVERHEAD


class _State(NamedTuple):
    """What is known, in ascending lists. Replaced as a whole and never changed, so it is read without a lock.

    Both edges of every block are in `edges`. Edges outlive their blocks: they make later guesses better.
    """

    blocks: list[_Block]
    edges: list[_Edge]
    firsts: list[int]
    """Each block's `first`."""


_edge_block: Final = attrgetter("block")
_edge_position: Final = attrgetter("position")
_block_number: Final = attrgetter("start.block")


class LazyIndex:
    """The page index of a dense file (a snapshot), read in blocks when it is asked for. Thread-safe.

    What an answer rests on: a block, or the piece of it around an entry (`_glance`), is taken only if its entries,
    every one, continue each other (page numbers without a hole, each offset where the last frame ended), from the
    first to where the next one's first entry takes over, which is read from that entry. So for an index that
    `PageIndex.parse` accepts the answers are the same; in one that it refuses, no single damaged byte changes an
    answer, it is an `LTXError` or not met. Damage that agrees with itself through a whole piece, some 60 entries, can;
    it too ends in an error, not in a wrong page, because whoever reads a frame compares its page number and its length.

    Memory: `capacity`, and 0.2 KB for every block of the index ever met (10 GB of database: up to 0.6 MB).
    """

    def __init__(
        self,
        header: Header,
        file_size: int,
        start: int,
        length: int,
        read: Callable[[int, int], bytes],
        *,
        block_size: int = BLOCK_SIZE,
        read_size: int = READ_SIZE,
        capacity: int = CAPACITY,
    ) -> None:
        """`start` and `length` are the region that `locate_index` found in a file of `file_size` bytes.

        `read(offset, length)` gives exactly those bytes of the file; it is called without a lock, by several
        threads at once. Raises `LTXError` if the file is no snapshot or the region cannot be its index.
        """
        if not header.is_snapshot:
            raise LTXError(f"file {header.name} is no snapshot, expected one: it may leave out any page")
        if start + length + TRAILER_SIZE != file_size or length < INDEX_END:
            raise LTXError(f"page index has {length} bytes from {start} on, expected it to end before the trailer")
        if not _LOOKAHEAD <= block_size <= 64 << 10:  # offsets in a block are kept in 32 bits
            raise ValueError(f"block_size is {block_size}, expected {_LOOKAHEAD} to {64 << 10}")
        self._commit, self._lock_pgno, self._header = header.commit, header.lock_pgno, header
        self._largest = max_frame_size(header.page_size)
        self._read = read
        self._start, self._end = start, start + length - INDEX_END
        self._block_size = block_size
        # The last block takes what is left over: none is shorter than block_size, unless it is the only one.
        self._block_count = max(1, (self._end - start) // block_size)
        self._read_blocks = max(1, read_size // block_size)
        self._capacity = capacity
        self._clock = 0
        self._glances = _GLANCES
        self._piece: tuple[_Block, _Edge, array[int]] | None = None
        """What the last glance has parsed: of which block, from which edge on, and the offsets."""
        self._lock = Lock()  # held to replace the state; never while reading or parsing
        self.pgnos: Collection[int] = DensePgnos(header.commit, header.lock_pgno)
        """All page numbers, ascending; takes no memory."""
        # Positions from which on page numbers take one byte more (or the ones before: the lock page is left out).
        self._growth = [(1 << n) - 1 for n in range(7, 35, 7)]
        count = header.snapshot_page_count
        ends = [_Edge(0, 0, start, HEADER_SIZE), _Edge(self._block_count, count, self._end, start - FRAME_HEADER_SIZE)]
        self._check(ends)
        self._empty = self._state = _State([], ends, [])

    def __len__(self) -> int:
        return len(self.pgnos)

    def holds(self, pgno: int) -> bool:
        """Whether the file holds page `pgno`."""
        return 0 < pgno <= self._commit and pgno != self._lock_pgno

    def position(self, pgno: int) -> int | None:
        """Which frame, from 0, holds page `pgno`; None if the file does not hold it."""
        return pgno - 1 - (pgno > self._lock_pgno) if self.holds(pgno) else None

    def peek(self, pgno: int) -> tuple[int, int] | None:
        """What `get` answers, where that takes no read; else None.

        1 us where a block is parsed, which takes 0.6 ms; before, 0.06 ms for an entry, and 1 us for its neighbours.
        """
        position = self.position(pgno)
        try:
            return None if position is None else self._find(self._state, position)
        except LTXError:
            return None  # `get` says so

    def get(self, pgno: int) -> tuple[int, int] | None:
        """Offset and size of the frame of page `pgno`, in bytes; None if the file does not hold it.

        Where the entry is not known, usually reads once; more often where sizes are distributed unevenly, but
        never more than about twice the binary logarithm of the number of blocks. Raises `LTXError` for a damaged
        index, and whatever `read` raises; a later call begins anew.
        """
        position = self.position(pgno)
        if position is None:
            return None
        try:
            # Every read brings the edges around the entry closer together, by a block at least, and from the third
            # on every second one by half. (If other threads meet damage and forget edges, an error is right.)
            for attempt in range(2 * self._block_count.bit_length() + 4):
                state = self._state
                found = self._find(state, position)
                if found is None:
                    first, last = self._window(state, position, attempt)
                    begin, end = self._extent(first, last)
                    data = self._read(begin, end - begin)
                    if len(data) != end - begin:
                        raise LTXError(f"read of the page index gave {len(data)} bytes, expected {end - begin}")
                    found = self._find(self._add(first, last, begin, data), position)
                if found is not None:
                    return found
            raise LTXError(f"page index has no entry of page {pgno} between those of its neighbours, expected one")
        except LTXError:
            # Nobody knows which of the blocks that contradict each other is wrong, and whether in the file or only
            # as it was read: trust none.
            with self._lock:
                self._state, self._piece = self._empty, None
                # For good: or a scan would find page after page beside the damage, each with another read.
                self._glances = 0
            raise

    def preload(self, offset: int, data: bytes) -> None:
        """Take `data`, bytes of the file from `offset` on that are at hand: blocks that lie in it need no read.

        Keeps what has room, the last ones if not all have. Parses nothing yet. Raises `LTXError`.
        """
        first = -((self._start - offset - 1) // self._block_size) if offset > self._start else 0
        last = self._block_count
        if offset + len(data) <= self._end:
            last = min(last - 1, (offset + len(data) - _LOOKAHEAD - self._start) // self._block_size)
        if first < last:
            begin, end = self._extent(first, last)
            self._add(first, last, begin, data[begin - offset : end - offset])

    def lacking(self, pgnos: Iterable[int], most: int) -> list[tuple[int, int]]:
        """Stretches of the file (offset, length) to `preload`: if guesses are right they have those pages' entries.

        About `most` first reads of `get` in all, for the first of the pages if not for all. Empty when all are known.
        """
        state = self._state
        blocks: set[int] = set()
        for pgno in pgnos:
            position = self.position(pgno)
            if position is not None and self._block(state, position) is None:
                blocks.update(range(*self._window(state, position, 0)))
                if len(blocks) >= most * self._read_blocks:
                    break
        firsts = [block for block in sorted(blocks) if block - 1 not in blocks]
        lasts = [block + 1 for block in sorted(blocks) if block + 1 not in blocks]
        extents = map(self._extent, firsts, lasts)
        return [(begin, end - begin) for begin, end in extents]

    @staticmethod
    def _block(state: _State, position: int) -> _Block | None:
        """The block of `state` that holds the entry at `position`."""
        at = bisect_right(state.firsts, position) - 1
        block = state.blocks[at] if at >= 0 else None
        return block if block is not None and position - block.first < block.count else None

    def _find(self, state: _State, position: int) -> tuple[int, int] | None:
        """Offset and size of the frame at `position`, if a block of `state` holds its entry."""
        block = self._block(state, position)
        if block is None:
            return None
        self._clock = block.used = self._clock + 1  # threads may lose a tick: it is about how recent
        offsets = block.offsets
        if offsets is None:
            found = self._glance(block, position)
            if found is not None:
                return found
            offsets = self._parse(block)
        at = position - block.first
        begin = offsets[at]
        return block.base + begin, offsets[at + 1] - begin

    def _glance(self, block: _Block, position: int) -> tuple[int, int] | None:
        """The same, out of the entries around it, up to edges before and behind; None where all are to be parsed.

        These edges are as good as those of blocks, which may be as short as this. What an open and the crawl look up
        are single entries, far from each other: of each block it takes a tenth of the time.
        """
        raw, start, end = block.raw, block.start, block.end
        size = max(_LOOKAHEAD, self._block_size // _PIECES)
        likely = start.at + len(raw) * (position - start.position) // block.count
        piece = self._piece
        if piece is not None and piece[0] is block:
            _, low, offsets = piece
            at = position - low.position
            if 0 <= at < len(offsets) - 1:
                return offsets[at], offsets[at + 1] - offsets[at]
            if abs(likely - low.at) < 2 * size:
                return None
        if block.glances >= self._glances or len(raw) < 4 * size:
            return None
        block.glances += 1
        begin, stop = likely - size // 2, likely + size // 2
        low = self._recognise(start.block, begin, raw, start.at) if begin > start.at else start
        high = self._recognise(start.block, stop, raw, start.at) if stop + _LOOKAHEAD <= end.at else end
        if not low.position <= position < high.position:
            return None
        self._check((start, low) if high is end else (start, low, high, end))
        offsets = self._entries(raw[low.at - start.at : high.at - start.at], low, high)
        self._piece = block, low, offsets
        at = position - low.position
        return offsets[at], offsets[at + 1] - offsets[at]

    def _parse(self, block: _Block) -> array[int]:
        """The block's offsets, after checking that its entries lead from its first edge to the last."""
        raw = block.raw
        if not raw and block.offsets:
            return block.offsets  # another thread has just done it
        offsets = self._entries(raw, block.start, block.end)
        block.offsets = array("I", map((-block.base).__add__, offsets))
        block.raw = b""
        return block.offsets

    def _entries(self, raw: bytes, start: _Edge, end: _Edge) -> array[int]:
        """The offsets of the frames between two edges, and the end of the last, out of the entries' bytes.

        Raises `LTXError` unless every entry continues the one before, from the first edge to the last.
        """
        first, last = (n + 1 + (n + 1 >= self._lock_pgno) for n in (start.position, end.position - 1))
        count = end.position - start.position
        pgnos, offsets = parse_entries(raw + b"\0", self._header, first - 1, start.offset)
        # They ascend, from `first` or more: if the last is `last`, and they are so many, they are all.
        if not pgnos or (len(pgnos), pgnos[-1]) != (count, last) or self._lock_pgno in pgnos:
            raise LTXError(
                f"page index has {len(pgnos)} pages from byte {start.at} on, expected all {count} from {first} to "
                f"{last} but the lock page"
            )
        if offsets[-1] != end.offset:
            raise LTXError(f"page index has page {last} end at offset {offsets[-1]}, expected {end.offset}")
        return offsets

    def _extent(self, first: int, last: int) -> tuple[int, int]:
        """The bytes of the file, begin and end, that blocks first <= block < last are taken from.

        Before them the byte that tells whether a varint begins with them, after them the next block's edge.
        """
        begin = self._start + first * self._block_size
        end = self._end + 1 if last == self._block_count else self._start + last * self._block_size + _LOOKAHEAD
        return begin - 1 if first else begin, end

    def _window(self, state: _State, position: int, attempt: int) -> tuple[int, int]:
        """The blocks to read, first <= block < last, to find the entry at `position`, which no block holds."""
        at = bisect_right(state.edges, position, key=_edge_position)
        low, high = state.edges[at - 1], state.edges[at]
        if attempt > 1 and attempt % 2 == 0:
            middle = (low.block + high.block) // 2
        else:
            middle = (self._guess(position, low, high) - self._start) // self._block_size
            middle = max(low.block, min(middle, high.block - 1))
        # A block between low and high would have its edges there: so `middle` is not known. Read around it what
        # is not, at the same length where that is more on one side.
        blocks = state.blocks
        at = bisect_left(blocks, middle, key=_block_number)
        lowest = blocks[at - 1].start.block + 1 if at else 0
        highest = blocks[at].start.block if at < len(blocks) else self._block_count
        span = self._read_blocks * (_WIDER if attempt else 1)
        first = max(lowest, min(middle - span // 2, highest - span))
        return first, min(first + span, highest)

    def _guess(self, position: int, low: _Edge, high: _Edge) -> int:
        """Where in the file the entry at `position` is, if frames between the edges are all of one size.

        Then it is known which page numbers and which offsets take how many bytes. What is left of the bytes, for
        the sizes and for the error in that, is shared out evenly.
        """
        count, span = high.position - low.position, high.offset - low.offset
        growth = self._growth + [low.position + ((1 << n) - low.offset) * count // span for n in range(7, 63, 7)]

        def grown(to: int) -> int:
            return sum(to - max(low.position, since) for since in growth if since < to)

        rest = high.at - low.at - grown(high.position)
        return low.at + grown(position) + rest * (position - low.position) // count

    def _add(self, first: int, last: int, begin: int, data: bytes) -> _State:
        """Put the blocks first <= block < last into the state; gives them. `data` is their extent, from `begin`."""
        with self._lock:
            blocks, edges, _ = self._state
            left, right = bisect_left(edges, first, key=_edge_block), bisect_right(edges, last, key=_edge_block)
            known = {edge.block: edge for edge in edges[left:right]}
            run = [
                known.get(block) or self._recognise(block, self._start + block * self._block_size, data, begin)
                for block in range(first, last + 1)
            ]
            edges = edges[:left] + run + edges[right:]
            self._check(edges[max(0, left - 1) : left + len(run) + 1])
            if last == self._block_count and data[-1]:
                raise LTXError(f"page index ends with byte {data[-1]:#x}, expected a zero")
            self._clock += 1
            added = [_Block(a, b, data[a.at - begin : b.at - begin], self._clock) for a, b in pairwise(run)]
            left, right = (bisect_left(blocks, n, key=_block_number) for n in (first, last))
            blocks = self._evict(blocks[:left] + added + blocks[right:])
            self._state = _State(blocks, edges, [block.first for block in blocks])
        return _State(added, run, [block.first for block in added])

    def _evict(self, blocks: list[_Block]) -> list[_Block]:
        """The blocks that there is room for, and if not for all then an eighth less, lest this comes every time."""
        if sum(block.memory for block in blocks) <= self._capacity:
            return blocks
        room = self._capacity * 7 // 8
        kept = []
        for block in sorted(blocks, key=attrgetter("used", "first"), reverse=True):
            room -= block.memory
            if room < 0:
                break
            kept.append(block)
        return sorted(kept, key=_block_number)

    def _recognise(self, block: int, at: int, data: bytes, begin: int) -> _Edge:
        """The first entry from byte `at` of the file on, found in `data`, which has the file's bytes from `begin`.

        A varint begins after each byte below 128, an entry with every third varint, and two entries tell for certain
        with which. Taken from its second varint on, an entry would have offsets for page numbers, and these grow by
        7 at least, not by 1 (or 2, over the lock page). Taken from its third on, it would be a size, a page number
        and an offset, and the next page number is not the sum of these two, since offsets are 100 at least. So in a
        true index only the truth passes. In a damaged one an edge is no more than a guess, whoever wrote it: what
        counts is that all entries from one edge to the next lead there (see `_entries`).
        """
        before = at - 1
        near = data[before - begin : before - begin + 1 + _LOOKAHEAD]
        ends = [index for index, byte in enumerate(near) if byte < 128][: _RECOGNISED + 1]
        values = [
            sum((byte & 127) << 7 * n for n, byte in enumerate(near[last + 1 : end + 1]))
            for last, end in pairwise(ends)
        ]
        for phase in range(len(values) - 4):
            pgno, offset, size, next_pgno, next_offset = values[phase : phase + 5]
            position = self.position(pgno)
            if position is not None and self.position(next_pgno) == position + 1 and next_offset == offset + size:
                return _Edge(block, position, before + ends[phase] + 1, offset)
        raise LTXError(f"page index has near byte {at} no entries that continue each other, expected only such")

    def _check(self, edges: Iterable[_Edge]) -> None:
        """Raise `LTXError` if there cannot be so many entries, and frames, between each edge and the next."""
        for low, high in pairwise(edges):
            count = high.position - low.position
            entries, frames = high.at - low.at, high.offset - low.offset
            if not (
                _MIN_ENTRY_SIZE * count <= entries <= MAX_ENTRY_SIZE * count
                and _MIN_FRAME_SIZE * count <= frames <= self._largest * count
            ):
                raise LTXError(
                    f"page index has {entries} bytes from {low.at} on, expected {_MIN_ENTRY_SIZE} to {MAX_ENTRY_SIZE} "
                    f"for each of {count} pages, whose frames have {frames}, up to {self._largest} each"
                )


Index = PageIndex | LazyIndex
"""Either kind: `len`, `pgnos`, `holds`, `get` and `peek` are the same."""
