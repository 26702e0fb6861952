"""Files to pages, everything verified: in memory (`decode_file`) or as bytes arrive (`StreamDecoder`)."""

from __future__ import annotations

from array import array
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from inspect import GEN_CLOSED, getgeneratorstate

import lz4.block
import lz4.frame

from lazyreplica.errors import LTXError
from lazyreplica.ltx.checksum import CHECKSUM_FLAG, DatabaseChecksum, crc64
from lazyreplica.ltx.frame import (
    BLOCK_HEADER,
    FLAG_BLOCK,
    FRAME_HEADER_SIZE,
    ZERO_PAGE_HEADER,
    damaged,
    decode_frame,
    max_block_size,
    max_frame_size,
    unknown_flags,
    wrong_length,
)
from lazyreplica.ltx.header import HEADER_SIZE, TRAILER_SIZE, Header, Trailer
from lazyreplica.ltx.index import MAX_ENTRY_SIZE, PageIndex


@dataclass(frozen=True, slots=True)
class DecodedFile:
    """A verified file, kept compressed."""

    header: Header
    index: PageIndex
    trailer: Trailer
    data: bytes = field(repr=False)

    def page(self, pgno: int) -> bytes:
        """The contents of page `pgno`. Raises `LTXError` if the file does not hold it."""
        frame = self.index.get(pgno)
        if frame is None:
            raise LTXError(f"page {pgno} is not among the {len(self.index)} pages of {self.header.name}")
        offset, size = frame
        return decode_frame(self.data[offset : offset + size], pgno, self.header.page_size)


def decode_file(data: bytes) -> DecodedFile:
    """The file that `data` is, after every check that `StreamDecoder` makes. Raises `LTXError`."""
    decoder = StreamDecoder()
    for _ in decoder.feed(data):
        pass
    header, index, trailer = decoder.close()
    return DecodedFile(header, index, trailer, data)


class StreamDecoder:
    """Decodes a file from chunks of any size, in order, without keeping the file.

    Each page is checked on its own before `feed` gives it out (number, length, LZ4). That the file is whole,
    and that pages are the ones that were written, is known only after `close`, which compares the file
    checksum, the index, and in a snapshot the database checksum. The checksum covers decompressed pages:
    damage to a compressed page that still decompresses to the same bytes goes unnoticed, and does no harm.

    Memory: one chunk, one frame, 12 bytes a page, and the index; `close` needs as much again. On hostile
    input too: a page that decompresses to more than a page, a frame longer than a page allows, and an index
    longer than its pages allow are refused as soon as they show.
    """

    __slots__ = (
        "_checksum",
        "_database",
        "_length",
        "_offsets",
        "_parser",
        "_pgnos",
        "_received",
        "_tail",
        "header",
    )

    def __init__(self) -> None:
        self.header: Header | None = None
        """The file's header, None until its 100 bytes have come."""
        self._received = b""
        self._length = 0
        self._checksum = 0
        self._database: DatabaseChecksum | None = None
        self._pgnos, self._offsets = array("I"), array("Q")
        self._tail = bytearray()
        self._parser = self._parse()

    def feed(self, chunk: bytes) -> Iterator[tuple[int, bytes]]:
        """(page number, page) for each page that `chunk` completes, decoded as you iterate.

        An iterator and not a list, because a chunk can hold 255 times its size in pages. Take all of it
        before the next call. Raises `LTXError`.
        """
        self._refuse_more()
        self._length += len(chunk)
        self._received += chunk
        # The parser gives None when it needs more bytes: where this chunk's pages end.
        return iter(self._parser.__next__, None)

    def close(self) -> tuple[Header, PageIndex, Trailer]:
        """What lies around the pages, once the whole file has been fed.

        Raises `LTXError` if the file is truncated or damaged.
        """
        self._refuse_more()
        if next(self._parser) is not None:
            raise LTXError("file is closed before all its pages were taken from feed()")
        # The parser refers to self: ending it gives its buffers back now, not at the next garbage collection.
        self._parser.close()
        header, tail = self.header, bytes(self._tail)
        if header is None or len(tail) < TRAILER_SIZE:
            raise LTXError(f"file ends after {self._length} bytes, before its page index: truncated")
        found = CHECKSUM_FLAG | crc64(tail[:-8], self._checksum)
        trailer = Trailer.parse(tail[-TRAILER_SIZE:])
        if trailer.file_checksum != found:
            raise LTXError(f"file checksum is {trailer.file_checksum:#x}, expected {found:#x}: damaged or truncated")
        trailer.check(header)
        index = PageIndex.parse(tail[:-TRAILER_SIZE], header=header, file_size=self._length)
        if index.pgnos != self._pgnos or index.offsets[:-1] != self._offsets:
            raise LTXError("page index lists other frames than the file holds")
        if self._database and self._database.value != trailer.post_apply_checksum:
            raise LTXError(
                f"post-apply checksum is {trailer.post_apply_checksum:#x}, "
                f"expected {self._database.value:#x}, that of the snapshot's pages"
            )
        return header, index, trailer

    def _refuse_more(self) -> None:
        if getgeneratorstate(self._parser) == GEN_CLOSED:
            raise LTXError("this file has been closed or refused already, expected no more of it")

    def _take(self) -> bytes:
        received, self._received = self._received, b""
        return received

    def _parse(self) -> Generator[tuple[int, bytes] | None, None, None]:
        """Pages, and None for "more bytes, please". Ends only by raising: `close` knows the file's end."""
        buffer = self._take()
        while len(buffer) < HEADER_SIZE:
            yield None
            buffer += self._take()
        self.header = header = Header.parse(buffer)
        self._checksum = crc64(buffer[:HEADER_SIZE])
        if header.is_snapshot and header.has_checksums:
            self._database = DatabaseChecksum()
        self._received, buffer = buffer, b""
        yield from self._parse_frames(header)
        tail = self._tail
        largest = len(self._pgnos) * MAX_ENTRY_SIZE + 1 + 8 + TRAILER_SIZE
        while len(tail) <= largest:
            yield None
            tail += self._take()
        raise LTXError(f"file goes on for {len(tail)} bytes after its frames, expected up to {largest}")

    def _parse_frames(  # noqa: PLR0915 (one loop: every call in it is paid for by every page)
        self, header: Header
    ) -> Generator[tuple[int, bytes] | None, None, None]:
        """The pages. Leaves in the tail what has come of the bytes after them.

        Measured with 4 KiB pages, `close` included: 2.3 us a page of LZ4 blocks, or 1.8 GB/s of database; of
        that 0.9 us are liblz4's, 0.2 CRC-64's, 0.5 `close`'s. LZ4 frames take 4.8 us a page, or 0.9 GB/s.
        """
        checksum, database = self._checksum, self._database
        add_pgno, add_offset = self._pgnos.append, self._offsets.append
        read_header, block_header_size = BLOCK_HEADER.unpack_from, BLOCK_HEADER.size
        decompress, frames = lz4.block.decompress, lz4.frame.LZ4FrameDecompressor()
        commit, page_size, lock_pgno = header.commit, header.page_size, header.lock_pgno
        largest_block = max_block_size(page_size)
        buffer = self._take()
        position, end, previous = HEADER_SIZE, len(buffer), 0
        buffer_offset = 0  # of the buffer in the file
        needed = block_header_size  # that many always follow, even the last frame: index and trailer are longer
        while True:
            if end - position < needed:
                yield None
                buffer_offset += position
                buffer = buffer[position:] + self._take()
                position, end = 0, len(buffer)
                continue
            pgno, flags, size = read_header(buffer, position)
            if not previous < pgno <= commit or pgno == lock_pgno:
                if pgno == flags == 0:
                    break
                raise LTXError(
                    f"frame holds page {pgno} after page {previous}, expected more, up to {commit}, "
                    f"and not the lock page {lock_pgno}"
                )
            if flags == FLAG_BLOCK:
                data = position + block_header_size
                stop = data + size
                if stop > end:
                    if size > largest_block:
                        raise LTXError(f"block of page {pgno} has {size} bytes, expected up to {largest_block}")
                    needed = stop - position
                    continue
                try:
                    page: bytes = decompress(buffer[data:stop], page_size)
                except lz4.block.LZ4BlockError as error:
                    raise damaged(pgno, page_size, error) from error
            elif flags == 0:
                data = position + FRAME_HEADER_SIZE
                page, length = _decompress_frame(frames, buffer, data, pgno, page_size)
                if not length:
                    needed = end - position + 1
                    continue
                stop = data + length
            else:
                raise unknown_flags(pgno, flags)
            if len(page) != page_size:
                raise wrong_length(pgno, page_size, len(page))
            checksum = crc64(page, crc64(buffer[position:data], checksum))
            if database:
                database.add(pgno, page)
            add_pgno(pgno)
            add_offset(buffer_offset + position)
            previous, position, needed = pgno, stop, block_header_size
            yield pgno, page
        self._checksum = crc64(ZERO_PAGE_HEADER, checksum)
        self._tail += buffer[position + FRAME_HEADER_SIZE :]


def _decompress_frame(
    decompressor: lz4.frame.LZ4FrameDecompressor, buffer: bytes, start: int, pgno: int, page_size: int
) -> tuple[bytes, int]:
    """The page in the LZ4 frame at `start`, and that frame's length: 0 if its end has not come yet."""
    largest = max_frame_size(page_size) - FRAME_HEADER_SIZE
    # It does not say how long it is: decompress what may belong to it and see what is left.
    candidate = buffer[start : start + largest]
    try:
        page: bytes = decompressor.decompress(candidate, page_size + 1)
    except RuntimeError as error:
        raise damaged(pgno, page_size, error) from error
    if decompressor.eof:
        return page, len(candidate) - len(decompressor.unused_data or b"")
    if len(page) > page_size or len(candidate) == largest:
        raise LTXError(f"LZ4 frame of page {pgno} does not end within {page_size} bytes, or {largest} compressed")
    decompressor.reset()
    return b"", 0
