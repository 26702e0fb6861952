"""Whole files: round trips, damage, and the agreement of both decoders."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyreplica.errors import LTXError
from lazyreplica.ltx import (
    CHECKSUM_FLAG,
    FLAG_NO_CHECKSUM,
    HEADER_SIZE,
    Compression,
    DatabaseChecksum,
    DecodedFile,
    Encoder,
    Header,
    StreamDecoder,
    crc64,
    decode_file,
    encode_file,
    encode_frame,
    encode_index,
    lock_pgno,
)

PAGE_SIZES = [512 << n for n in range(8)]
Pages = dict[int, bytes]


def stream(chunks: Iterable[bytes]) -> Pages:
    decoder = StreamDecoder()
    pages = [page for chunk in chunks for page in decoder.feed(chunk)]
    decoder.close()
    assert [pgno for pgno, _ in pages] == sorted({pgno for pgno, _ in pages})
    return dict(pages)


def pages_of(file: DecodedFile) -> Pages:
    return {pgno: file.page(pgno) for pgno in file.index.pgnos}


def chunked(data: bytes, size: int) -> Iterator[bytes]:
    return (data[start : start + size] for start in range(0, len(data), size))


def mixed_file(header: Header, pages: Pages) -> bytes:
    """A file whose frames alternate between both compressions; written here by hand, not by the encoder."""
    entries: list[tuple[int, int, int]] = []
    body, checksum = b"", crc64(header.encode())
    for pgno, page in pages.items():
        compression = Compression.FRAME if len(entries) % 2 else Compression.BLOCK
        frame = encode_frame(pgno, page, compression)
        entries.append((pgno, HEADER_SIZE + len(body), len(frame)))
        checksum = crc64(frame[: 10 if compression is Compression.BLOCK else 6] + page, checksum)
        body += frame
    rest = bytes(6) + encode_index(entries) + bytes(8)
    return header.encode() + body + rest + (CHECKSUM_FLAG | crc64(rest, checksum)).to_bytes(8, "big")


def sample(page_size: int, noise: bytes, numbers: Iterable[int] = (1, 2, 3, 4)) -> Pages:
    kinds = [bytes(page_size), noise[:page_size], (noise[:100] * 700)[:page_size], noise[-page_size:]]
    return {pgno: kinds[position % 4] for position, pgno in enumerate(numbers)}


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("compression", Compression)
@pytest.mark.parametrize("flags", [0, FLAG_NO_CHECKSUM])
def test_snapshot_round_trip(page_size: int, compression: Compression, flags: int, noise: bytes) -> None:
    header = Header(flags, page_size, 4, 1, 9, 1_700_000_000_000, wal_offset=32, wal_salt1=1)
    pages = sample(page_size, noise)
    data = encode_file(header, pages.items(), compression)
    file = decode_file(data)
    assert file.header == header
    assert pages_of(file) == pages == stream([data]) == stream(chunked(data, 1000))
    assert file.index.dense_lock_pgno == lock_pgno(page_size)
    assert bool(file.trailer.post_apply_checksum) is header.has_checksums
    with pytest.raises(LTXError, match="page 5 is not among the 4 pages"):
        file.page(5)


@pytest.mark.parametrize("compression", Compression)
def test_increment_with_checksums(compression: Compression, noise: bytes) -> None:
    before, after = sample(512, noise), sample(512, noise) | {3: noise[1000:1512]}
    database = DatabaseChecksum()
    for pgno, page in before.items():
        database.add(pgno, page)
    header = Header(0, 512, 4, 2, 2, 0, pre_apply_checksum=database.value)
    database.add(3, before[3])
    database.add(3, after[3])
    data = encode_file(header, [(3, after[3])], compression, post_apply_checksum=database.value)
    assert decode_file(data).trailer.post_apply_checksum == database.value
    whole = encode_file(Header(0, 512, 4, 1, 2, 0), after.items(), compression)
    assert decode_file(whole).trailer.post_apply_checksum == database.value
    for wrong in (0, 5):
        with pytest.raises(LTXError, match="post-apply checksum"):
            encode_file(header, [(3, after[3])], compression, post_apply_checksum=wrong)


def test_snapshot_with_a_wrong_database_checksum(noise: bytes) -> None:
    """The post-apply checksum is not that of the pages; the file checksum is true."""
    header = Header(0, 512, 4, 1, 1, 0)
    data = bytearray(encode_file(header, sample(512, noise).items()))
    wrong = CHECKSUM_FLAG | 5
    checksum, start = crc64(header.encode()), HEADER_SIZE
    for _, offset, size in decode_file(bytes(data)).index.frames(0, 4):
        page = decode_file(bytes(data)).page(int.from_bytes(data[offset : offset + 4], "big"))
        checksum = crc64(page, crc64(bytes(data[offset : offset + 10]), checksum))
        start = offset + size
    data[-16:-8] = wrong.to_bytes(8, "big")
    data[-8:] = (CHECKSUM_FLAG | crc64(bytes(data[start:-8]), checksum)).to_bytes(8, "big")
    with pytest.raises(LTXError, match="that of the snapshot's pages"):
        decode_file(bytes(data))


def test_an_index_that_lists_other_frames(noise: bytes) -> None:
    """Consistent in itself, and the file checksum is true: only the frames tell."""
    header = Header(FLAG_NO_CHECKSUM, 512, 9, 2, 2, 0)
    page = noise[:512]
    frame = encode_frame(3, page, Compression.BLOCK)
    for entries, complaint in (
        ([(4, 100, len(frame))], "other frames"),
        ([(2, 100, 20), (3, 120, len(frame) - 20)], "other frames"),
        ([], "end at offset 100"),
    ):
        rest = bytes(6) + encode_index(entries) + bytes(8)
        checksum = crc64(rest, crc64(page, crc64(frame[:10], crc64(header.encode()))))
        data = header.encode() + frame + rest + (CHECKSUM_FLAG | checksum).to_bytes(8, "big")
        with pytest.raises(LTXError, match=complaint):
            decode_file(data)


def test_empty_increment() -> None:
    data = encode_file(Header(FLAG_NO_CHECKSUM, 4096, 10, 2, 2, 0), [])
    assert len(data) == 131
    assert pages_of(decode_file(data)) == {} == stream(chunked(data, 1))


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_mixed_compressions_and_chunks(page_size: int, noise: bytes) -> None:
    pages = sample(page_size, noise, (2, 3, 5, 8, 9, 10))
    data = mixed_file(Header(FLAG_NO_CHECKSUM, page_size, 12, 5, 9, 0), pages)
    assert pages_of(decode_file(data)) == pages
    chance = random.Random(page_size)
    for _ in range(10):
        cuts = sorted(chance.randrange(len(data)) for _ in range(chance.randrange(12)))
        chunks = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
        assert stream(chunks) == pages
    if page_size <= 1024:
        assert stream(chunked(data, 1)) == pages


@pytest.mark.slow
@pytest.mark.parametrize("compression", Compression)
def test_snapshot_larger_than_the_lock_page(compression: Compression, noise: bytes) -> None:
    """16400 pages of 64 KiB: 1 GiB and a little, without page 16385."""
    header = Header(FLAG_NO_CHECKSUM, 65536, 16400, 1, 1, 0)
    parts: list[bytes] = []
    encoder = Encoder(header, parts.append, compression)
    for pgno in range(1, 16401):
        if pgno == 16385:
            with pytest.raises(LTXError, match="lock page"):
                encoder.add(pgno, bytes(65536))
        else:
            encoder.add(pgno, bytes(65536))
    encoder.finish()
    decoder = StreamDecoder()
    numbers = [pgno for part in parts for pgno, _ in decoder.feed(part)]
    decoder.close()
    assert numbers == [pgno for pgno in range(1, 16401) if pgno != 16385]


def test_encoder_refuses(noise: bytes) -> None:
    page = noise[:512]
    snapshot, increment = (Header(FLAG_NO_CHECKSUM, 512, 4, low, 2, 0) for low in (1, 2))
    for header, numbers, complaint in (
        (snapshot, [1, 2, 4], "3 pages, expected 4"),
        (increment, [2, 2], "page 2 comes after page 2"),
        (increment, [2, 1], "page 1 comes after page 2"),
        (increment, [0], "page 0"),
        (increment, [5], "up to 4"),
    ):
        with pytest.raises(LTXError, match=complaint):
            encode_file(header, [(pgno, page) for pgno in numbers])
    with pytest.raises(LTXError, match="has 511 bytes, expected 512"):
        encode_file(increment, [(1, page[1:])])
    with pytest.raises(LTXError, match="expected 0 with header flags 0x2"):
        encode_file(increment, [(1, page)], post_apply_checksum=CHECKSUM_FLAG)
    with pytest.raises(LTXError, match="that of the snapshot's pages"):
        encode_file(Header(0, 512, 1, 1, 1, 0), [(1, page)], post_apply_checksum=CHECKSUM_FLAG)
    encoder = Encoder(increment, bytearray().extend)
    encoder.finish()
    with pytest.raises(LTXError, match="finished already"):
        encoder.finish()
    with pytest.raises(LTXError, match="after finish"):
        encoder.add(1, page)


def small_files(noise: bytes) -> list[bytes]:
    compressible = {1: bytes(512), 2: noise[:40] * 12 + noise[:32], 4: noise[:512]}
    complete = compressible | {3: b"\1" * 512}
    return [
        encode_file(Header(FLAG_NO_CHECKSUM, 512, 5, 2, 3, 7), compressible.items(), Compression.BLOCK),
        encode_file(Header(FLAG_NO_CHECKSUM, 512, 5, 2, 3, 7), compressible.items(), Compression.FRAME),
        encode_file(Header(0, 512, 4, 1, 3, 7), sorted(complete.items()), Compression.BLOCK),
        encode_file(Header(FLAG_NO_CHECKSUM, 512, 5, 2, 3, 7), [], Compression.BLOCK),
    ]


@pytest.mark.slow
def test_every_bit_flip_shows_or_changes_nothing(noise: bytes) -> None:
    """The file checksum covers decompressed pages: a flip in LZ4 data may decompress to the same page."""
    harmless = flips = 0
    for data in small_files(noise):
        good = decode_file(data)
        pages = pages_of(good)
        payload = set[int]()
        for _, offset, size in good.index.frames(0, len(good.index)):
            prefix = 10 if data[offset + 5] else 6
            payload.update(range(offset + prefix, offset + size))
        for bit in range(len(data) * 8):
            damaged = bytearray(data)
            damaged[bit // 8] ^= 1 << bit % 8
            try:
                found = pages_of(decode_file(bytes(damaged)))
            except LTXError:
                found = None
            try:
                streamed = stream(chunked(bytes(damaged), 300))
            except LTXError:
                streamed = None
            assert found == streamed
            flips += 1
            if found is not None:
                assert bit // 8 in payload
                assert found == pages
                harmless += 1
    assert harmless < flips / 100


def test_every_truncation_and_every_surplus_shows(noise: bytes) -> None:
    for data in small_files(noise):
        for damaged in [data[:length] for length in range(len(data))] + [data + b"\0", data + data]:
            with pytest.raises(LTXError):
                decode_file(damaged)
            with pytest.raises(LTXError):
                stream(chunked(damaged, 100))


def test_swapped_frames_show(noise: bytes) -> None:
    pages = sample(512, noise)
    swapped = {1: pages[2], 2: pages[1], 3: pages[3], 4: pages[4]}
    header = Header(FLAG_NO_CHECKSUM, 512, 4, 1, 1, 0)
    data, other = (encode_file(header, each.items()) for each in (pages, swapped))
    with pytest.raises(LTXError, match="file checksum"):
        decode_file(other[:-8] + data[-8:])


def test_stream_refuses_early(noise: bytes) -> None:
    """Hostile streams are refused where they go wrong, not after buffering what they announce."""
    header = Header(FLAG_NO_CHECKSUM, 4096, 10, 2, 2, 0)
    for frames, complaint in (
        (b"\0\0\0\1\0\1" + b"\xff\xff\xff\xff", "block of page 1 has 4294967295 bytes"),
        (b"\0\0\0\1\0\0" + b"\x04\x22\x4d\x18\x60\x40\x82" + b"\1\0\0\x80\0" * 2000, "does not end within"),
        (b"\0\0\0\1\0\2" + bytes(4), "flags 0x2"),
        (b"\0\0\0\0\0\1" + bytes(4), "page 0 after page 0"),
        (encode_frame(11, bytes(4096), Compression.BLOCK), "up to 10"),
        (encode_frame(1, bytes(8192), Compression.BLOCK), "not valid LZ4 data of 4096 bytes"),
        (encode_frame(1, bytes(8192), Compression.FRAME), "does not end within 4096 bytes"),
        (encode_frame(1, bytes(2048), Compression.BLOCK), "decompresses to 2048 bytes"),
        (encode_frame(1, bytes(2048), Compression.FRAME), "decompresses to 2048 bytes"),
        (encode_frame(2, bytes(4096), Compression.BLOCK) * 2, "page 2 after page 2"),
        (bytes(6) + b"\1" * 1000, "1000 bytes after its frames"),
    ):
        decoder = StreamDecoder()
        with pytest.raises(LTXError, match=complaint):
            list(decoder.feed(header.encode() + frames))
        for again in (decoder.close, lambda decoder=decoder: decoder.feed(b"")):
            with pytest.raises(LTXError, match="closed or refused already"):
                again()


def test_stream_header_and_unread_pages(noise: bytes) -> None:
    data = small_files(noise)[0]
    decoder = StreamDecoder()
    assert list(decoder.feed(data[:99])) == []
    assert decoder.header is None
    assert list(decoder.feed(data[99:100])) == []
    assert decoder.header == decode_file(data).header
    decoder.feed(data[100:])
    with pytest.raises(LTXError, match="before all its pages were taken"):
        decoder.close()


@given(st.binary(max_size=2000), st.integers(0, 131))
def test_garbage_is_an_ltx_error(garbage: bytes, kept: int) -> None:
    start = encode_file(Header(FLAG_NO_CHECKSUM, 512, 5, 2, 3, 7), [])[:kept]
    with pytest.raises(LTXError):
        decode_file(start + garbage + b".")
    with pytest.raises(LTXError):
        stream(chunked(start + garbage + b".", 77))


@settings(max_examples=50)
@given(
    pages=st.dictionaries(st.integers(1, 2**32 - 1), st.binary(min_size=1, max_size=512), max_size=20),
    compression=st.sampled_from(Compression),
    size=st.integers(1, 5000),
)
def test_any_increment_round_trips(pages: Pages, compression: Compression, size: int) -> None:
    pages.pop(lock_pgno(512), None)
    whole = {pgno: pages[pgno].ljust(512, b"\0") for pgno in sorted(pages)}
    data = encode_file(Header(FLAG_NO_CHECKSUM, 512, 2**32 - 1, 2, 3, 7), whole.items(), compression)
    assert pages_of(decode_file(data)) == whole == stream(chunked(data, size))
