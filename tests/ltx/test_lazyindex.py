"""The lazy page index: the same answers as the eager one, few reads, and never a wrong answer."""

from __future__ import annotations

import itertools
import random
import threading
import tracemalloc
from array import array
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyreplica.errors import LTXError
from lazyreplica.ltx import (
    HEADER_SIZE,
    TRAILER_SIZE,
    Compression,
    Header,
    PageIndex,
    encode_file,
    encode_index,
    lazyindex,
    locate_index,
    lock_pgno,
    max_frame_size,
)
from lazyreplica.ltx.index import parse_entries
from lazyreplica.ltx.lazyindex import LazyIndex

Entry = tuple[int, int] | None


@dataclass
class Region:
    """A snapshot of which only the index exists, and what reading it costs."""

    header: Header
    start: int
    data: bytes = field(repr=False)
    offsets: Sequence[int] = field(repr=False)
    pgnos: Sequence[int] = field(repr=False)
    reads: int = 0
    fault: Callable[[int, bytes], bytes] = field(default=lambda _, data: data)

    @property
    def file_size(self) -> int:
        return self.start + len(self.data) + TRAILER_SIZE

    def read(self, offset: int, length: int) -> bytes:
        self.reads += 1
        assert self.start <= offset < offset + length <= self.start + len(self.data)
        found = self.data[offset - self.start : offset - self.start + length]
        return self.fault(offset, found)

    def open(self, **options: int) -> LazyIndex:
        return LazyIndex(self.header, self.file_size, self.start, len(self.data), self.read, **options)

    def truth(self, position: int) -> tuple[int, int]:
        return self.offsets[position], self.offsets[position + 1] - self.offsets[position]

    def check(self, index: LazyIndex, positions: Sequence[int]) -> list[int]:
        """Ask for these pages; gives how many reads each took."""
        reads = []
        for position in positions:
            before = self.reads
            assert index.get(self.pgnos[position]) == self.truth(position)
            reads.append(self.reads - before)
        return reads


def region(sizes: Sequence[int], page_size: int = 4096) -> Region:
    lock = lock_pgno(page_size)
    commit = len(sizes) + (len(sizes) >= lock)
    pgnos = array("I", itertools.chain(range(1, min(commit + 1, lock)), range(lock + 1, commit + 1)))
    offsets = array("Q", itertools.accumulate(sizes, initial=HEADER_SIZE))
    data = encode_index(zip(pgnos, offsets, sizes, strict=False))
    return Region(Header(2, page_size, commit, 1, 3, 0), offsets[-1] + 6, data, offsets, pgnos)


def eager(file: Region) -> PageIndex:
    return PageIndex.parse(file.data, header=file.header, file_size=file.file_size)


def runs(*pairs: tuple[int, int]) -> list[int]:
    """Sizes from (size, how many of it)."""
    return [size for size, count in pairs for _ in range(count)]


MANY = 100_000
DISTRIBUTIONS: dict[str, Callable[[], list[int]]] = {
    "equal": lambda: [1500] * MANY,
    "two halves": lambda: runs((30, MANY // 2), (3000, MANY // 2)),
    "two other halves": lambda: runs((3000, MANY // 2), (30, MANY // 2)),
    "long runs": lambda: runs(
        *((random.Random(n).choice((30, 100, 400, 3000)), 1 + 9999 * n % 20000) for n in range(15))
    ),
    "stretches": lambda: runs(*((3000 if n % 2 else 30, n * n) for n in range(66))),
    "sawtooth": lambda: [30 + n % 30_000 // 10 for n in range(MANY)],
    "one huge": lambda: runs((7, MANY // 3), (4000, 1), (7, MANY // 3)),
    "growing ever faster": lambda: [7 + 4000 * (n // 100) ** 6 // (MANY // 100) ** 6 for n in range(MANY)],
}


@pytest.fixture(scope="module")
def ten_gigabytes() -> Region:
    """2.6 million pages of 4 KiB, with the lock page among them; 25 MB of index."""
    return region(random.Random(1).choices(range(30, 3001), k=2_600_000))


@pytest.fixture(scope="module")
def small() -> Region:
    """2,000 pages of all sizes: 15 KB of index."""
    return region(random.Random(2).choices((7, 30, 127, 128, 2000, 4138), k=2000))


# -- right answers


@pytest.mark.parametrize("compression", Compression)
@pytest.mark.parametrize("page_size", [512, 4096, 65536])
def test_real_files(compression: Compression, page_size: int, noise: bytes) -> None:
    pages = [(n, noise[:page_size] if n % 3 else bytes(page_size)) for n in range(1, 150)]
    header = Header(2, page_size, len(pages), 1, 7, 0)
    data = encode_file(header, pages, compression)
    start, length = locate_index(data, len(data))
    expected = PageIndex.parse(data[start : start + length], header=header, file_size=len(data))
    for options in ({}, {"block_size": 64, "read_size": 1}):
        index = LazyIndex(header, len(data), start, length, lambda at, size: data[at : at + size], **options)
        assert list(index.pgnos) == list(expected.pgnos)
        for pgno in (77, *range(152)):
            assert index.get(pgno) == index.peek(pgno) == expected.get(pgno)
            assert index.position(pgno) == expected.position(pgno)
            assert index.holds(pgno) is (expected.get(pgno) is not None)


seeds = st.integers(0, 2**32).map(random.Random)
some_sizes = st.lists(
    st.tuples(st.sampled_from([7, 30, 127, 128, 3000, 4138]) | st.integers(7, 4138), st.integers(1, 300)),
    min_size=1,
    max_size=8,
).map(lambda pairs: runs(*pairs)) | st.tuples(seeds, st.integers(1, 2000)).map(
    lambda drawn: drawn[0].choices(range(30, 3001), k=drawn[1])
)
options = st.fixed_dictionaries(
    {
        "block_size": st.sampled_from([64, 65, 100, 1000, 8192]),
        "read_size": st.sampled_from([1, 200, 1000, 65536]),
        "capacity": st.sampled_from([0, 1000, 10_000, 1 << 22]),
    }
)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(some_sizes, options, seeds)
def test_every_page_in_any_order(sizes: list[int], options: dict[str, int], order: random.Random) -> None:
    file = region(sizes)
    index, expected = file.open(**options), eager(file)
    assert len(index) == len(sizes)
    for pgno in order.sample(range(len(sizes) + 2), min(len(sizes) + 2, 150)):
        known, reads = index.peek(pgno), file.reads
        assert index.get(pgno) == expected.get(pgno)
        assert known in (None, expected.get(pgno))
        assert file.reads == reads or known is None
        assert file.reads - reads <= 2 * (len(file.data) // options["block_size"]).bit_length() + 4


@settings(max_examples=6, deadline=None)
@given(seeds, options)
def test_around_the_lock_page(order: random.Random, options: dict[str, int]) -> None:
    """65536-byte pages reach it soonest: 16385."""
    file = region(order.choices((50, 60_000), k=16_600), 65536)
    index = file.open(**options)
    for at in [*range(16_370, 16_400), *order.choices(range(16_600), k=50)]:
        assert index.get(file.pgnos[at]) == file.truth(at)
    assert index.get(16385) is index.peek(16385) is None
    assert (16385 in index.pgnos, index.holds(16385), index.position(16385)) == (False, False, None)
    assert (index.holds(16601), index.holds(16602)) == (True, False)
    assert list(index.pgnos) == list(file.pgnos)
    assert len(index) == len(index.pgnos) == 16_600


@pytest.mark.parametrize("commit", [0, 1, 16_384, 16_385, 16_386])
def test_few_pages(commit: int) -> None:
    """No page, one page, and a database that ends at the lock page or beside it."""
    file = region([300] * (commit - (commit >= 16385)), 65536)
    file.header = Header(2, 65536, commit, 1, 3, 0)
    index, expected = file.open(), eager(file)
    assert list(index.pgnos) == list(expected.pgnos)
    for pgno in {0, 1, 2, 16_384, 16_385, 16_386, 16_387, commit}:
        assert index.get(pgno) == expected.get(pgno)


@pytest.mark.parametrize("page_size", [512, 65536])
def test_the_largest_database(page_size: int) -> None:
    """Page numbers to 2**32 - 1, frames of the greatest size: an index of 70 GB, computed where it is read."""
    size, lock = max_frame_size(page_size), lock_pgno(page_size)
    header = Header(2, page_size, 2**32 - 1, 1, 1, 0)
    count = header.snapshot_page_count
    reads = 0

    def at(position: int) -> int:
        """Where the entry begins; one that has a number of 7 n bits or more has a byte more."""
        firsts = [(1 << n) - 1 - (1 << n > lock) for n in range(7, 35, 7)]
        firsts += [((1 << n) - HEADER_SIZE + size - 1) // size for n in range(7, 63, 7)]
        size_length = (size.bit_length() + 6) // 7
        return start + position * (2 + size_length) + sum(max(0, position - first) for first in firsts)

    def read(offset: int, length: int) -> bytes:
        nonlocal reads
        reads += 1
        first = bisect_right(range(count), offset, key=at) - 1
        last = min(count, bisect_right(range(count), offset + length, key=at) + 1)
        entries = ((n + 1 + (n + 1 >= lock), HEADER_SIZE + n * size, size) for n in range(first, last))
        return encode_index(entries)[offset - at(first) :][:length]

    start = HEADER_SIZE + count * size + 6
    length = at(count) - start + 9
    index = LazyIndex(header, start + length + TRAILER_SIZE, start, length, read)
    for position in (count - 1, 0, count // 2, lock - 1, 2**28, 12345):
        before = reads
        pgno = position + 1 + (position + 1 >= lock)
        assert index.get(pgno) == (HEADER_SIZE + position * size, size)
        assert reads == before + 1
    assert index.get(2**32) is None


# -- few reads, little memory


@pytest.mark.slow
def test_reads_for_ten_gigabytes(ten_gigabytes: Region) -> None:
    file, choose = ten_gigabytes, random.Random(3)
    cold = [file.check(file.open(), [choose.randrange(2_600_000)])[0] for _ in range(150)]
    warming = file.check(file.open(), choose.choices(range(2_600_000), k=150))
    assert sum(cold) <= 1.05 * len(cold)
    assert sum(warming) <= len(warming)
    assert max(cold + warming) <= 2


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_reads_where_sizes_are_uneven(name: str) -> None:
    file, choose = region(DISTRIBUTIONS[name]()), random.Random(4)
    count = len(file.pgnos)
    cold = [file.check(file.open(), [choose.randrange(count)])[0] for _ in range(50)]
    warming = file.check(file.open(), choose.choices(range(count), k=50))
    assert max(cold + warming) <= 2
    assert sum(cold) <= 1.8 * len(cold)
    assert sum(warming) <= 1.2 * len(warming)
    # ... and with reads so small that guesses have to be good.
    small = [file.check(file.open(block_size=512, read_size=512), [choose.randrange(count)])[0] for _ in range(50)]
    assert max(small) <= 6


@pytest.mark.slow
def test_neighbours_come_along(ten_gigabytes: Region) -> None:
    """A read of 64 KiB brings that many entries, beside known ones too, and again after they were forgotten."""
    file, forwards = ten_gigabytes, range(1_000_000, 1_120_000, 100)
    for capacity in (1 << 18, 4 << 20):
        for order in (forwards, forwards[::-1]):
            index = file.open(capacity=capacity)
            before = file.reads
            file.check(index, order)
            assert file.reads - before <= 120_000 // 6000
            file.check(index, order)
            assert file.reads - before <= (40 if capacity == 1 << 18 else 20)  # all stay in 4 MiB


@pytest.mark.slow
def test_memory_is_bounded(ten_gigabytes: Region) -> None:
    file = ten_gigabytes
    index = file.open(capacity=100_000)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        file.check(index, range(0, 2_600_000, 200_000))
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 1.2 * 100_000 + 13 * 10 * 250  # blocks, edges


def test_what_is_used_stays() -> None:
    file = region([300] * 30_000)
    index = file.open(block_size=1000, read_size=1000, capacity=20_000)
    for position in range(0, 30_000, 50):
        file.check(index, [position])
        assert file.check(index, [15_000]) == [0] or position == 0


def test_single_entries_do_not_cost_their_block(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = []

    def parse(varints: bytes, *more: Any) -> Any:
        parsed.append(len(varints))
        return parse_entries(varints, *more)

    monkeypatch.setattr(lazyindex, "parse_entries", parse)
    file = region(random.Random(3).choices(range(30, 3001), k=8000))
    index = file.open(block_size=8192)
    index.preload(file.start, file.data)
    for position in (5, 200, 6000, 400, 600):
        file.check(index, [position])
        assert parsed and max(parsed) < 1000
        parsed.clear()
    file.check(index, [599, 601, 602])
    assert not parsed, "that piece is kept"
    file.check(index, range(603, 700))
    assert len(parsed) == 1 and parsed[0] > 8000, "what follows is asked for: a scan is going on"
    file.check(index, [5, 200, 400, 600])
    assert len(parsed) == 1
    parsed.clear()
    file.check(index, range(1000, 1900, 90))
    assert sum(parsed) < 8 * 1000 + 10_000, "or many of one block"


# -- bytes that are at hand


@pytest.mark.slow
def test_preload_of_the_tail(ten_gigabytes: Region) -> None:
    file = ten_gigabytes
    tail = file.data[-(64 << 10) + TRAILER_SIZE :] + bytes(TRAILER_SIZE)
    index = file.open()
    index.preload(file.file_size - len(tail), tail)
    before = file.reads
    file.check(index, range(2_600_000 - 5000, 2_600_000))
    assert file.reads == before


@settings(max_examples=20, deadline=None)
@given(options, st.lists(st.tuples(st.integers(-300, 16_000), st.integers(0, 16_000)), max_size=4), seeds)
@pytest.mark.slow
def test_preload_of_any_part(
    small: Region, options: dict[str, int], parts: list[tuple[int, int]], order: random.Random
) -> None:
    file = small
    whole, origin = bytes(300) + file.data + bytes(TRAILER_SIZE), file.start - 300
    index = file.open(**options)
    for begin, length in parts:
        index.preload(origin + begin + 300, whole[begin + 300 : begin + 300 + length])
    before, peeked = file.reads, [index.peek(pgno) for pgno in file.pgnos]
    assert file.reads == before
    assert all(found in (None, file.truth(position)) for position, found in enumerate(peeked))
    file.check(index, order.sample(range(2000), 100))


def test_preload_leaves_out_only_what_it_must(small: Region) -> None:
    """Of the bytes at hand, at most a block at either end."""
    file = small
    size = len(file.data)
    for begin, end in ((0, size), (0, 5000), (-50, 5000), (3000, 9000), *((9000, size - cut) for cut in range(12))):
        index = file.open(block_size=100)
        index.preload(file.start + begin, (bytes(50) + file.data)[begin + 50 : end + 50])
        known = sum(index.peek(pgno) is not None for pgno in file.pgnos)
        assert known >= 2000 * (end - max(0, begin) - 400) // size
        assert (index.peek(1) is not None) is (begin <= 0)
        assert (index.peek(2000) is not None) is (end >= size - 8)  # the zero is needed, the length is not


def test_preload_keeps_what_has_room() -> None:
    file = region([300] * 100_000)
    index = file.open(capacity=100_000)
    index.preload(file.start, file.data)
    assert index.peek(100_000) == file.truth(99_999)
    assert index.peek(1) is None
    assert sum(index.peek(pgno) is not None for pgno in file.pgnos) < 30_000


# -- damage: what an eager parse accepts gives the eager parse's answers; otherwise no single change gives a wrong one


def outcome(index: LazyIndex, pgno: int) -> Entry | LTXError:
    try:
        return index.get(pgno)
    except LTXError as error:
        return error


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [64, 150, 1000])
def test_one_damaged_byte(block_size: int) -> None:
    """Any one: whoever asks for a page near it learns the truth, or that the index is damaged."""
    choose = random.Random(block_size)
    file = region(choose.choices((7, 30, 127, 128, 129, 2000, 4138), k=200))
    true, refused = file.data, 0
    lengths = [len(encode_index([(pgno, *file.truth(position))])) - 9 for position, pgno in enumerate(file.pgnos)]
    ends = [*itertools.accumulate(lengths)]
    for at in range(len(true) - 8):
        value = true[at] ^ choose.choice([1 << choose.randrange(8), choose.randrange(1, 256)])
        file.data = true[:at] + bytes([value]) + true[at + 1 :]
        index = file.open(block_size=block_size, read_size=3 * block_size)
        near = bisect_right(ends, at)
        for position in range(max(0, near - 2), min(200, near + 3)):
            if block_size == 1000:  # of each block the first entries that are asked for are found without the others
                index = file.open(block_size=block_size, read_size=3 * block_size)
            found = outcome(index, file.pgnos[position])
            assert found == file.truth(position) or isinstance(found, LTXError)
            refused += isinstance(found, LTXError)
    assert refused > len(true)


def listed(entries: list[tuple[int, int, int]], header: Header, **options: int) -> int:
    """Check that every answer stands in the index, whatever that says; gives how many were refused."""
    data = encode_index(entries)
    file = Region(header, entries[-1][1] + entries[-1][2] + 6, data, [], [])
    try:
        index = file.open(**options)
    except LTXError:
        return header.commit
    refused, true = 0, {*entries}
    for pgno in range(max(1, header.commit - 300), header.commit + 1):
        reads, found = file.reads, outcome(index, pgno)
        assert file.reads - reads <= 2 * (len(data) // options["block_size"]).bit_length() + 4
        assert isinstance(found, LTXError) or found is None or (pgno, *found) in true
        refused += isinstance(found, LTXError)
    return refused


def test_entries_that_are_not_all_pages() -> None:
    """One left out, one twice: each offset is where the last frame ended, only the numbers are wrong."""
    header = Header(2, 4096, 200, 1, 3, 0)
    for left_out, twice in itertools.product((60, 87), range(55, 115)):
        numbers = sorted([*range(1, 201), twice + (twice == left_out)])
        numbers.remove(left_out)
        entries = [(pgno, 100 + 300 * position, 300) for position, pgno in enumerate(numbers)]
        assert listed(entries, header, block_size=64, read_size=128)


def test_entries_with_the_lock_page() -> None:
    numbers = [n for n in range(1, 16_501) if n != 16_400]  # ... and 16,385 is among them
    entries = [(pgno, 100 + 300 * position, 300) for position, pgno in enumerate(numbers)]
    assert listed(entries, Header(2, 65536, 16_500, 1, 3, 0), block_size=8192, read_size=8192) > 10


@pytest.mark.parametrize("block_size", [64, 500])
def test_parts_in_another_order(block_size: int) -> None:
    """Each part is right in itself."""
    header, choose = Header(2, 4096, 1000, 1, 3, 0), random.Random(block_size)
    entries = [(n + 1, 100 + 300 * n, 300) for n in range(1000)]
    refused = 0
    for _ in range(5):
        cuts = sorted([0, 1000, *choose.sample(range(1, 1000), 3)])
        parts = [entries[first:last] for first, last in itertools.pairwise(cuts)]
        parts[1:3] = choose.choice([parts[2:0:-1], [parts[1], parts[1]], [parts[0], parts[3]]])
        mixed = [*itertools.chain(*parts)][:1000]
        mixed[-1] = entries[-1]
        refused += listed(mixed, header, block_size=block_size, read_size=500)
    assert refused > 100


@pytest.mark.parametrize("order", [(2000, 5000), (5000, 2000)])
def test_blocks_that_contradict_each_other(order: tuple[int, int]) -> None:
    """Far from each other, each right in itself; but the frames cannot lie that way."""
    entries = [(n + 1, 100 + 300 * n - (n >= 500) * 149_000, 300) for n in range(1000)]
    file = Region(Header(2, 4096, 1000, 1, 3, 0), entries[-1][1] + 306, encode_index(entries), [], [])
    index = file.open(block_size=64)
    index.preload(file.start + order[0], file.data[order[0] : order[0] + 500])
    with pytest.raises(LTXError, match=r"whose frames have -\d+, up to 4138 each"):
        index.preload(file.start + order[1], file.data[order[1] : order[1] + 500])


def test_sizes_that_look_like_page_numbers() -> None:
    """Taken from the wrong varint on, half of what tells entries from other varints fits."""
    ascending = [*range(30, 3000)]
    growing = [7]  # each by the number of the page
    while len(growing) < 60:
        growing.append(growing[-1] + len(growing) + 1)
    for sizes in (ascending, ascending[::-1], growing + [7] * 60_000):
        file = region(sizes)
        for read_size in (64, 65, 66, 77):
            file.check(file.open(block_size=64, read_size=read_size), range(min(len(sizes), 300))[::-1])


def test_peek_leaves_damage_to_get(small: Region) -> None:
    file = Region(small.header, small.start, small.data.replace(small.data[5000:5005], b"\1\2\3\4\5"), [], [])
    index = file.open()
    with pytest.raises(LTXError):
        eager(file)
    index.preload(file.start, file.data)
    entries = [(pgno, *small.truth(pgno - 1)) for pgno in small.pgnos]
    nearest = next(n for n in range(1, 2001) if len(encode_index(entries[:n])) > 5000 + 12)
    assert index.peek(nearest) is None
    with pytest.raises(LTXError):
        index.get(nearest)


@settings(max_examples=20, deadline=None)
@given(options, st.lists(st.tuples(st.integers(0, 499), st.integers(-3, 3)), max_size=3))
def test_damage_that_agrees_with_itself(options: dict[str, int], shifts: list[tuple[int, int]]) -> None:
    """A frame takes bytes from the next: nothing in the index tells. (The frames do.)"""
    file = region([100] * 500)
    changed = list(file.offsets)
    for position, shift in shifts:
        changed[position] += shift if position else 0
    file.data = encode_index((n + 1, changed[n], changed[n + 1] - changed[n]) for n in range(500))
    if len(file.data) == len(region([100] * 500).data):
        index, expected = file.open(**options), eager(file)
        for pgno in [*range(1, 501, 9), *(position + near for position, _ in shifts for near in (0, 1))]:
            assert index.get(pgno) == expected.get(pgno)


def test_a_region_of_the_wrong_length(small: Region) -> None:
    """As after a damaged length field: what lies in the middle is still true, and nothing else is answered."""
    file = small
    whole, origin = bytes(5000) + file.data, file.start - 5000
    for shift in (-2000, -100, -9, -1, 1, 9, 100, 2000, 10_000):
        start, length = file.start + shift, len(file.data) - shift

        def read(offset: int, size: int) -> bytes:
            return whole[offset - origin : offset - origin + size]

        try:
            index = LazyIndex(file.header, file.file_size, start, length, read, block_size=500, read_size=1000)
        except LTXError:
            continue
        found = [outcome(index, pgno) for pgno in file.pgnos[::10]]
        errors = sum(isinstance(each, LTXError) for each in found)
        assert errors
        for position, each in zip(range(0, 2000, 10), found, strict=True):
            assert each == file.truth(position) or isinstance(each, LTXError)


@settings(max_examples=40, deadline=None)
@given(st.binary(min_size=1, max_size=40), st.integers(0, 12_000), options)
def test_garbage(small: Region, pattern: bytes, length: int, options: dict[str, int]) -> None:
    """Bounded reads, whatever the bytes."""
    garbage = (pattern * 20_000)[:length]
    file = Region(small.header, small.start, small.data[: (len(small.data) - length) // 2], [], small.pgnos)
    file.data += garbage + small.data[len(file.data) + length :]
    index = file.open(**options)
    for position in range(0, 2000, 100):
        reads, found = file.reads, outcome(index, small.pgnos[position])
        assert found == small.truth(position) or isinstance(found, LTXError)
        assert file.reads - reads <= 2 * (len(file.data) // options["block_size"]).bit_length() + 4


def test_damage_of_a_moment_is_forgotten(small: Region) -> None:
    """Blocks that came damaged do not spoil later calls: not by themselves, not as places to start from."""
    for at in range(0, len(small.data) - 9, 197):
        file = Region(small.header, small.start, small.data, small.offsets, small.pgnos)
        index = file.open(block_size=100, read_size=400)

        def damage(offset: int, data: bytes, where: int = file.start + at) -> bytes:
            return data.replace(data[where - offset :][:3], b"\x85\x85\x05") if offset <= where else data

        file.fault = damage
        for pgno in (1000, 1, 2000, at % 2000 + 1, 500):
            outcome(index, pgno)
        file.fault = lambda _, data: data
        for position in range(0, 2000, 37):
            outcome(index, small.pgnos[position])  # the second call starts from nothing, if this one fails
            assert index.get(small.pgnos[position]) == small.truth(position)


@pytest.mark.parametrize(
    ("sizes", "changes", "complaint"),
    [
        ([300] * 9, {"commit": 100}, "for each of 100 pages"),
        ([300] * 9, {"commit": 8, "page_size": 512}, "8 pages, whose frames have 2700, up to 553"),
        ([300] * 900, {"commit": 9}, "for each of 9 pages"),
        ([300] * 9, {"min_txid": 2}, "no snapshot"),
        ([], {"commit": 1}, "for each of 1 pages"),
        ([300], {"commit": 0}, "for each of 0 pages"),
    ],
)
def test_refuses_what_cannot_be(sizes: list[int], changes: dict[str, int], complaint: str) -> None:
    file = region([min(size, 540) for size in sizes])
    if changes.get("page_size") == 512:
        file = region([300] * 9)
        file.start += 5000
        complaint = "8 pages, whose frames have 7700, up to 553"
    fields = {"page_size": 4096, "commit": 9, "min_txid": 1} | changes
    file.header = Header(2, fields["page_size"], fields["commit"], fields["min_txid"], 3, 0)
    with pytest.raises(LTXError, match=complaint):
        file.open()


def test_refuses_bad_arguments(small: Region) -> None:
    for start, length in ((small.start + 1, len(small.data)), (small.file_size - TRAILER_SIZE - 8, 8)):
        with pytest.raises(LTXError, match="before the trailer"):
            LazyIndex(small.header, small.file_size, start, length, small.read)
    for block_size in (63, (64 << 10) + 1):
        with pytest.raises(ValueError, match="block_size"):
            small.open(block_size=block_size)


def test_refuses_a_last_byte_that_is_no_zero(small: Region) -> None:
    file = Region(small.header, small.start, small.data[:-9] + b"\1" + small.data[-8:], small.offsets, small.pgnos)
    with pytest.raises(LTXError, match="ends with byte 0x1, expected a zero"):
        file.open().get(2000)


# -- errors of the store, threads


def test_read_errors_come_out_and_a_later_call_works(small: Region) -> None:
    file = Region(small.header, small.start, small.data, small.offsets, small.pgnos)

    def fail(_: int, data: bytes) -> bytes:
        raise OSError("no network")

    for fault, error, complaint in (
        (fail, OSError, "no network"),
        (lambda _, data: data[:-1], LTXError, "read of the page index gave"),
        (lambda _, data: data + b"\0", LTXError, "read of the page index gave"),
    ):
        index = file.open(block_size=500, read_size=500)
        file.fault = fault
        with pytest.raises(error, match=complaint):
            index.get(1000)
        assert index.peek(1000) is None
        file.fault = lambda _, data: data
        file.check(index, [999, 0, 1999])


def test_a_read_under_way_holds_up_nobody(small: Region) -> None:
    file = Region(small.header, small.start, small.data, small.offsets, small.pgnos)
    index = file.open(block_size=500, read_size=500)
    file.check(index, [0])
    entered, release = threading.Event(), threading.Event()

    def wait(_: int, data: bytes) -> bytes:
        entered.set()
        assert release.wait(10)
        return data

    file.fault = wait
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(index.get, 1500)
        try:
            assert entered.wait(10)
            file.fault = lambda _, data: data
            assert index.peek(1) == index.get(1) == file.truth(0)
            assert index.peek(1500) is None
            file.check(index, [1998, 1499])  # even the same page
        finally:
            release.set()
        assert slow.result() == file.truth(1499)


@pytest.mark.parametrize("capacity", [3000, 1 << 20])
def test_threads(capacity: int) -> None:
    file = region(random.Random(5).choices((30, 3000), k=20_000))
    index = file.open(block_size=300, read_size=2000, capacity=capacity)

    def work(seed: int) -> int:
        choose = random.Random(seed)
        for _ in range(200):
            position = choose.randrange(20_000)
            assert index.get(file.pgnos[position]) == file.truth(position)
            near = min(position + choose.randrange(50), 19_999)
            assert index.peek(file.pgnos[near]) in (None, file.truth(near))
        return seed

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == list(range(8))
