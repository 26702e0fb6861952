"""Header, trailer, frame, index: each alone, against the tables in the format description."""

from __future__ import annotations

import dataclasses
import struct

import lz4.block
import lz4.frame
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyreplica.errors import LTXError
from lazyreplica.ltx import (
    CHECKSUM_FLAG,
    FLAG_NO_CHECKSUM,
    HEADER_SIZE,
    Compression,
    DatabaseChecksum,
    FileName,
    Header,
    PageIndex,
    Trailer,
    crc64,
    decode_frame,
    encode_frame,
    encode_index,
    locate_index,
    lock_pgno,
    max_frame_size,
    page_checksum,
)

PAGE_SIZES = [512 << n for n in range(8)]
HEADER = Header(FLAG_NO_CHECKSUM, 4096, 10, 2, 3, 1_700_000_000_000)


def test_crc64_is_go_iso_and_continues() -> None:
    assert crc64(b"123456789") == crc64(b"6789", crc64(b"12345")) == 0xB90956C775A41001
    assert crc64(b"", 0) == 0


def test_database_checksum_adds_and_takes_out() -> None:
    database = DatabaseChecksum()
    assert database.value == CHECKSUM_FLAG
    for pgno, page in ((1, b"a" * 512), (2, b"b" * 512), (2, b"b" * 512)):
        database.add(pgno, page)
    assert database.value == page_checksum(1, b"a" * 512) == CHECKSUM_FLAG | crc64(b"\0\0\0\1" + b"a" * 512)
    assert DatabaseChecksum(database.value).value == database.value


def test_lock_page_holds_the_lock_byte() -> None:
    assert [lock_pgno(size) for size in (512, 4096, 65536)] == [2097153, 262145, 16385]


headers = st.builds(
    Header,
    flags=st.just(FLAG_NO_CHECKSUM),
    page_size=st.sampled_from(PAGE_SIZES),
    commit=st.integers(0, 2**32 - 1),
    min_txid=st.integers(1, 2**40),
    max_txid=st.integers(2**40, 2**64 - 1),
    timestamp_ms=st.integers(-(2**63), 2**63 - 1),
    wal_offset=st.integers(1, 2**63 - 1),
    wal_size=st.integers(0, 2**63 - 1),
    wal_salt1=st.integers(0, 2**32 - 1),
    wal_salt2=st.integers(0, 2**32 - 1),
    node_id=st.integers(0, 2**64 - 1),
)


@given(headers)
def test_header_round_trip(header: Header) -> None:
    encoded = header.encode()
    assert len(encoded) == HEADER_SIZE
    assert Header.parse(encoded + b"what follows") == header
    assert Header.parse(encoded[:80] + b"reserved, unchecked!") == header


def test_header_layout() -> None:
    encoded = Header(0, 512, 3, 4, 5, 6, CHECKSUM_FLAG | 7, 8, 9, 10, 11, 12).encode()
    expected = (b"LTX1", 0, 512, 3, 4, 5, 6, CHECKSUM_FLAG | 7, 8, 9, 10, 11, 12)
    assert struct.unpack(">4sIIIQQQQQQIIQ20x", encoded) == expected


def test_header_properties() -> None:
    assert HEADER.name == FileName(2, 3)
    assert not HEADER.is_snapshot
    assert not HEADER.has_checksums
    snapshot = Header(0, 65536, 16385, 1, 3, 0)
    assert snapshot.is_snapshot
    assert snapshot.has_checksums
    assert snapshot.lock_pgno == 16385
    assert snapshot.snapshot_page_count == 16384


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"flags": 1}, "flags 0x1"),
        ({"flags": 6}, "flags 0x6"),
        ({"page_size": 256}, "page size 256"),
        ({"page_size": 131072}, "page size 131072"),
        ({"page_size": 4095}, "page size 4095"),
        ({"commit": 2**32}, "commit 4294967296"),
        ({"min_txid": 0}, "MinTXID 0"),
        ({"max_txid": 1}, "MaxTXID 1"),
        ({"max_txid": 2**64}, "MaxTXID"),
        ({"timestamp_ms": 2**63}, "timestamp"),
        ({"wal_offset": -1}, "WAL offset -1"),
        ({"wal_size": 5}, "WAL size 5"),
        ({"wal_salt1": 5}, "salts 0x5"),
        ({"wal_salt2": 5}, "0x5"),
        ({"node_id": -1}, "node id -1"),
        ({"pre_apply_checksum": CHECKSUM_FLAG}, "pre-apply"),
        ({"flags": 0}, "pre-apply checksum 0x0"),
        ({"flags": 0, "pre_apply_checksum": 5}, "bit 63"),
        ({"flags": 0, "min_txid": 1, "pre_apply_checksum": CHECKSUM_FLAG}, "snapshot"),
    ],
)
def test_header_refuses(changes: dict[str, int], complaint: str) -> None:
    with pytest.raises(LTXError, match=complaint):
        dataclasses.replace(HEADER, **changes)


def test_header_refuses_other_files_and_short_ones() -> None:
    with pytest.raises(LTXError, match="not an LTX file"):
        Header.parse(b"SQLite format 3\0" + bytes(84))
    with pytest.raises(LTXError, match="99 bytes"):
        Header.parse(HEADER.encode()[:99])


def test_trailer() -> None:
    trailer = Trailer(CHECKSUM_FLAG | 1, CHECKSUM_FLAG | 2)
    assert Trailer.parse(trailer.encode()) == trailer
    trailer.check(Header(0, 512, 1, 1, 1, 0))
    for bad in (b"", bytes(16), trailer.encode()[8:] + bytes(8), bytes(7) + b"\1" + trailer.encode()[8:]):
        with pytest.raises(LTXError, match="LTX trailer"):
            Trailer.parse(bad)
    with pytest.raises(LTXError, match="expected 0 with header flags 0x2"):
        trailer.check(HEADER)
    with pytest.raises(LTXError, match="expected a checksum"):
        Trailer(0, CHECKSUM_FLAG).check(Header(0, 512, 1, 1, 1, 0))


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("compression", Compression)
def test_frame_round_trip(page_size: int, compression: Compression, noise: bytes) -> None:
    for page in (bytes(page_size), noise[:page_size], (b"text " * page_size)[:page_size]):
        frame = encode_frame(7, page, compression)
        assert len(frame) <= max_frame_size(page_size)
        assert decode_frame(frame, 7, page_size) == page
        assert decode_frame(memoryview(frame), 7, page_size) == page
        for wrong in (frame + b"\0", frame[:-1], frame + frame):
            with pytest.raises(LTXError):
                decode_frame(wrong, 7, page_size)
        with pytest.raises(LTXError, match="holds page 7, expected page 8"):
            decode_frame(frame, 8, page_size)
        for other in (page_size // 2, page_size * 2):
            with pytest.raises(LTXError):
                decode_frame(frame, 7, other)


def test_incompressible_block_exceeds_the_page(noise: bytes) -> None:
    assert len(encode_frame(1, noise[:4096], Compression.BLOCK)) > 4096 + 10


def test_unknown_frame_flags() -> None:
    frame = bytearray(encode_frame(1, bytes(512), Compression.BLOCK))
    for flags in (2, 3, 0x8001):
        frame[4:6] = flags.to_bytes(2, "big")
        with pytest.raises(LTXError, match=f"flags {flags:#x}"):
            decode_frame(bytes(frame), 1, 512)


@pytest.mark.parametrize(
    "bomb",
    [
        b"\0\0\0\1\0\0" + lz4.frame.compress(bytes(64 << 20), store_size=True),
        struct.pack(">IHI", 1, 1, 263178) + lz4.block.compress(bytes(64 << 20), store_size=False),
        b"\0\0\0\1\0\0" + struct.pack("<II", 0x184D2A50, 2**32 - 1) + bytes(100),  # a skippable frame
        b"\0\0\0\1\0\1" + b"\xff" * 4,
    ],
)
def test_bombs_are_refused(bomb: bytes) -> None:
    with pytest.raises(LTXError):
        decode_frame(bomb, 1, 4096)


@given(st.binary(max_size=200), st.sampled_from([0, 1]))
def test_garbage_in_a_frame(garbage: bytes, flags: int) -> None:
    block = struct.pack(">IHI", 1, 1, len(garbage)) + garbage
    for frame in (block, b"\0\0\0\1\0\0" + garbage, b"\0\0\0\1\0\0\x04\x22\x4d\x18" + garbage, garbage):
        with pytest.raises(LTXError):
            decode_frame(frame, 1, 65536)


def region(sizes: dict[int, int]) -> tuple[bytes, int]:
    """An index region, and the size of the file that it belongs to."""
    entries, offset = [], HEADER_SIZE
    for pgno, size in sizes.items():
        entries.append((pgno, offset, size))
        offset += size
    encoded = encode_index(entries)
    return encoded, offset + 6 + len(encoded) + 16


@given(st.dictionaries(st.integers(1, 2**32 - 1), st.integers(7, 4138), max_size=60), st.booleans())
def test_index_round_trip(sizes: dict[int, int], numbered: bool) -> None:
    lock = lock_pgno(4096)
    sizes.pop(lock, None)
    pgnos = range(lock - 2, lock - 2 + len(sizes)) if numbered else sorted(sizes)
    sizes = {pgno + (numbered and pgno >= lock): size for pgno, size in zip(pgnos, sizes.values(), strict=True)}
    encoded, file_size = region(sizes)
    start, length = locate_index(encoded + bytes(16), file_size)
    assert (start, length) == (file_size - 16 - len(encoded), len(encoded))
    index = PageIndex.parse(encoded, header=Header(2, 4096, 2**32 - 1, 2, 3, 0), file_size=file_size)
    assert list(index.pgnos) == list(sizes)
    assert len(index) == len(sizes)
    offset = HEADER_SIZE
    expected = []
    for position, (pgno, size) in enumerate(sizes.items()):
        assert index.get(pgno) == (offset, size)
        assert index.position(pgno) == position
        expected.append((pgno, offset, size))
        assert index.entry(position) == expected[-1]
        offset += size
    assert list(index.frames(0, len(index))) == expected
    assert list(index.frames(1, 3)) == expected[1:3]
    for absent in (0, lock, 2**32, 12345):
        if absent not in sizes:
            assert index.get(absent) is None


def test_dense_index_around_the_lock_page() -> None:
    """65536-byte pages reach the lock page soonest: 16385."""
    encoded, file_size = region({pgno: 300 for pgno in range(1, 16400) if pgno != 16385})
    header = Header(2, 65536, 16399, 1, 3, 0)
    index = PageIndex.parse(encoded, header=header, file_size=file_size)
    assert index.dense_lock_pgno == 16385
    assert [index.position(pgno) for pgno in (0, 1, 16384, 16385, 16386, 16399, 16400)] == [
        None, 0, 16383, None, 16384, 16397, None,
    ]  # fmt: skip
    assert index.get(16386) == (100 + 16384 * 300, 300)


def index_of(*entries: tuple[int, int, int], header: Header = HEADER, file_size: int = 0) -> PageIndex:
    encoded = encode_index(entries)
    offset = entries[-1][1] + entries[-1][2] if entries else HEADER_SIZE
    return PageIndex.parse(encoded, header=header, file_size=file_size or offset + 6 + len(encoded) + 16)


@pytest.mark.parametrize(
    ("entries", "complaint"),
    [
        ([(1, 101, 50)], "page 1 at offset 101, expected 100"),
        ([(1, 100, 50), (2, 151, 50)], "page 2 at offset 151, expected 150"),
        ([(2, 100, 50), (2, 150, 50)], "page 2 after page 2"),
        ([(2, 100, 50), (1, 150, 50)], "page 1 after page 2"),
        ([(11, 100, 50)], "up to 10"),
        ([(2**34, 100, 50)], "up to 10"),
        ([(1, 100, 6)], "frame of 6 bytes"),
        ([(1, 100, 0)], "frame of 0 bytes"),
        ([(1, 100, 10_000)], "frame of 10000 bytes"),
        ([(1, 100, 2**50)], "frame of"),
        ([(1, 2**50, 50)], "at offset"),
    ],
)
def test_index_refuses(entries: list[tuple[int, int, int]], complaint: str) -> None:
    with pytest.raises(LTXError, match=complaint):
        index_of(*entries)


def test_index_refuses_what_does_not_fit() -> None:
    with pytest.raises(LTXError, match="end at offset 150, expected 149"):
        index_of((1, 100, 50), file_size=150 + 6 + 13 - 1 + 16 - 1)
    with pytest.raises(LTXError, match="snapshot lists 1 pages, expected 10"):
        index_of((1, 100, 50), header=Header(2, 4096, 10, 1, 3, 0))
    with pytest.raises(LTXError, match="no lock page"):
        index_of((16385, 100, 50), header=Header(2, 65536, 20000, 2, 3, 0))


@pytest.mark.parametrize(
    ("varints", "complaint"),
    [
        (b"\x81\x00\x64\x32\0", "more bytes than"),
        (b"\x01\xe4\x00\x32\0", "more bytes than"),
        (b"\x01\x64" + b"\x80" * 2000 + b"\1\0", "more bytes than"),
        (b"\x01\x64\x32", "expected a zero"),
        (b"\x01\x64\x32\0\0", "1 bytes after its zero"),
        (b"\x01\x64\0", "frame of 0 bytes"),
        (b"\x01\0", "at offset 0"),
    ],
)
def test_index_refuses_varints(varints: bytes, complaint: str) -> None:
    data = varints + len(varints).to_bytes(8, "big")
    with pytest.raises(LTXError, match=complaint):
        PageIndex.parse(data, header=HEADER, file_size=150 + 6 + len(data) + 16)


def test_index_refuses_a_wrong_length() -> None:
    for data in (b"", bytes(8), b"\0" + bytes(7) + b"\2"):
        with pytest.raises(LTXError, match="does not end with its length"):
            PageIndex.parse(data, header=HEADER, file_size=1000)


@given(st.binary(max_size=300))
def test_garbage_index(garbage: bytes) -> None:
    data = garbage + b"\0" + (len(garbage) + 1).to_bytes(8, "big")
    with pytest.raises(LTXError):
        PageIndex.parse(data, header=HEADER, file_size=5000)


@pytest.mark.parametrize("length", [0, 1000 - 131 + 2, 2**63, 2**64 - 1])
def test_hostile_index_length(length: int) -> None:
    with pytest.raises(LTXError, match="page index announces"):
        locate_index(length.to_bytes(8, "big") + bytes(16), 1000)


def test_locate_index_bounds() -> None:
    assert locate_index((1).to_bytes(8, "big") + bytes(16), 131) == (106, 9)
    with pytest.raises(LTXError, match="130 bytes long"):
        locate_index(bytes(24), 130)
    with pytest.raises(LTXError, match="tail is 23 bytes"):
        locate_index(bytes(23), 1000)
