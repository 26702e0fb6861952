"""Page frames: one compressed page with its number (LTX.md, "Frame")."""

from __future__ import annotations

from enum import Enum
from struct import Struct
from typing import Final

import lz4.block
import lz4.frame

from lazyreplica.errors import LTXError

FRAME_HEADER_SIZE: Final = 6
"""Page number and flags; a block has its 4-byte size after that."""

ZERO_PAGE_HEADER: Final = bytes(FRAME_HEADER_SIZE)
"""Ends the frames."""

FLAG_BLOCK: Final = 0x1
BLOCK_HEADER: Final = Struct(">IHI")
_PAGE_HEADER: Final = Struct(">IH")

# Header with all optional fields (19), one block's size and checksum (8), end mark and content checksum (8).
_LZ4_FRAME_OVERHEAD: Final = 35


class Compression(Enum):
    """How a frame holds its page."""

    BLOCK = "block"
    """A size and an LZ4 block: Litestream from 0.5.16 on."""
    FRAME = "frame"
    """An LZ4 frame: Litestream 0.5.0 to 0.5.15. No size, but a content checksum."""


def max_block_size(page_size: int) -> int:
    """LZ4's bound for an incompressible page."""
    return page_size + page_size // 255 + 16


def max_frame_size(page_size: int) -> int:
    """No frame of either kind is longer, header included."""
    return max(BLOCK_HEADER.size + max_block_size(page_size), FRAME_HEADER_SIZE + _LZ4_FRAME_OVERHEAD + page_size)


def encode_frame(pgno: int, page: bytes, compression: Compression) -> bytes:
    """The whole frame of one page."""
    if compression is Compression.BLOCK:
        block: bytes = lz4.block.compress(page, store_size=False)
        return BLOCK_HEADER.pack(pgno, FLAG_BLOCK, len(block)) + block
    frame: bytes = lz4.frame.compress(
        page,
        # The options of the old writer; its 64 KiB blocks hold any page whole.
        block_size=lz4.frame.BLOCKSIZE_MAX64KB,
        block_linked=False,
        content_checksum=True,
        store_size=False,
    )
    return _PAGE_HEADER.pack(pgno, 0) + frame


def decode_frame(data: bytes | memoryview, pgno: int, page_size: int) -> bytes:
    """The page in the one frame that `data` is, checked to be page `pgno` and `page_size` bytes long.

    Raises `LTXError`. A hostile frame costs `page_size` bytes of memory; an LZ4 frame that announces 4 MiB
    blocks (the writer's are 64 KiB) at most 8 MiB more within liblz4, for the time of the call.
    """
    # Measured with 4 KiB pages: a block takes 1.3 us, 0.8 of them in liblz4; an LZ4 frame 3.5 us.
    if len(data) < BLOCK_HEADER.size:
        raise LTXError(f"frame of page {pgno} is {len(data)} bytes long, expected at least {BLOCK_HEADER.size}")
    found, flags, size = BLOCK_HEADER.unpack_from(data)
    if found != pgno:
        raise LTXError(f"frame holds page {found}, expected page {pgno}")
    if flags == FLAG_BLOCK:
        held = len(data) - BLOCK_HEADER.size
        if size != held:
            raise LTXError(f"frame of page {pgno} announces a block of {size} bytes, expected {held}")
        try:
            page: bytes = lz4.block.decompress(data[BLOCK_HEADER.size :], page_size)
        except lz4.block.LZ4BlockError as error:
            raise damaged(pgno, page_size, error) from error
    elif flags == 0:
        decompressor = lz4.frame.LZ4FrameDecompressor()
        try:
            # One byte more than a page, so that a longer one shows.
            page = decompressor.decompress(data[FRAME_HEADER_SIZE:], page_size + 1)
        except RuntimeError as error:
            raise damaged(pgno, page_size, error) from error
        if not decompressor.eof or decompressor.unused_data:
            raise LTXError(
                f"frame of page {pgno} is {len(data)} bytes long, expected the length of the LZ4 frame in it"
            )
    else:
        raise unknown_flags(pgno, flags)
    if len(page) != page_size:
        raise wrong_length(pgno, page_size, len(page))
    return page


def damaged(pgno: int, page_size: int, error: Exception) -> LTXError:
    """What liblz4 says about a frame, in our words."""
    return LTXError(f"page {pgno} is not valid LZ4 data of {page_size} bytes: {error}")


def unknown_flags(pgno: int, flags: int) -> LTXError:
    return LTXError(f"frame of page {pgno} has flags {flags:#x}, expected 0 or {FLAG_BLOCK:#x}")


def wrong_length(pgno: int, page_size: int, found: int) -> LTXError:
    return LTXError(f"page {pgno} decompresses to {found} bytes, expected {page_size}")
