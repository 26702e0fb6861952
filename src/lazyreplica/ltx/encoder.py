"""Pages to an LTX file."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable

from lazyreplica.errors import LTXError
from lazyreplica.ltx.checksum import CHECKSUM_FLAG, DatabaseChecksum, crc64
from lazyreplica.ltx.frame import BLOCK_HEADER, FRAME_HEADER_SIZE, ZERO_PAGE_HEADER, Compression, encode_frame
from lazyreplica.ltx.header import HEADER_SIZE, Header, Trailer
from lazyreplica.ltx.index import PageIndex, encode_index


class Encoder:
    """Writes one file, piece by piece, through `write`: the header at once, the rest as pages are added.

    Takes only what makes a valid file, else raises `LTXError`: then what is written so far is no file.
    Memory: 12 bytes a page, and the index at the end.
    """

    __slots__ = (
        "_checksum",
        "_compression",
        "_database",
        "_finished",
        "_header",
        "_offset",
        "_offsets",
        "_pgnos",
        "_write",
    )

    def __init__(
        self, header: Header, write: Callable[[bytes], object], compression: Compression = Compression.BLOCK
    ) -> None:
        self._header = header
        self._write = write
        self._compression = compression
        self._finished = False
        self._database = DatabaseChecksum() if header.is_snapshot and header.has_checksums else None
        self._pgnos, self._offsets = array("I"), array("Q")
        self._offset = HEADER_SIZE
        encoded = header.encode()
        self._checksum = crc64(encoded)
        write(encoded)

    def add(self, pgno: int, page: bytes) -> None:
        """Write one page; page numbers ascend, and leave out the lock page."""
        header = self._header
        previous = self._pgnos[-1] if self._pgnos else 0
        if self._finished:
            raise LTXError(f"page {pgno} comes after finish()")
        if not previous < pgno <= header.commit:
            raise LTXError(f"page {pgno} comes after page {previous}, expected more, up to {header.commit}")
        if pgno == header.lock_pgno:
            raise LTXError(f"page {pgno} is the lock page, expected none in a file")
        if len(page) != header.page_size:
            raise LTXError(f"page {pgno} has {len(page)} bytes, expected {header.page_size}")
        frame = encode_frame(pgno, page, self._compression)
        prefix = BLOCK_HEADER.size if self._compression is Compression.BLOCK else FRAME_HEADER_SIZE
        self._checksum = crc64(page, crc64(frame[:prefix], self._checksum))
        if self._database:
            self._database.add(pgno, page)
        self._pgnos.append(pgno)
        self._offsets.append(self._offset)
        self._offset += len(frame)
        self._write(frame)

    def finish(self, post_apply_checksum: int = 0) -> Trailer:
        """Write what follows the pages.

        `post_apply_checksum` is the checksum of the whole database (see `DatabaseChecksum`): needed for an
        increment whose header has no `FLAG_NO_CHECKSUM`, worked out for such a snapshot, 0 for all other
        files.
        """
        header = self._header
        if self._finished:
            raise LTXError("file is finished already")
        if header.is_snapshot and len(self._pgnos) != header.snapshot_page_count:
            raise LTXError(f"snapshot has {len(self._pgnos)} pages, expected {header.snapshot_page_count}")
        if self._database:
            if post_apply_checksum not in (0, self._database.value):
                raise LTXError(
                    f"post-apply checksum is {post_apply_checksum:#x}, expected {self._database.value:#x}, "
                    "that of the snapshot's pages"
                )
            post_apply_checksum = self._database.value
        # Checked before anything is written; the file checksum is not known yet.
        Trailer(post_apply_checksum, CHECKSUM_FLAG).check(header)
        self._finished = True
        self._offsets.append(self._offset)
        index = PageIndex(self._pgnos, self._offsets)
        end = ZERO_PAGE_HEADER + encode_index(index.frames(0, len(index)))
        checksum = crc64(post_apply_checksum.to_bytes(8, "big"), crc64(end, self._checksum))
        trailer = Trailer(post_apply_checksum, CHECKSUM_FLAG | checksum)
        self._write(end + trailer.encode())
        return trailer


def encode_file(
    header: Header,
    pages: Iterable[tuple[int, bytes]],
    compression: Compression = Compression.BLOCK,
    *,
    post_apply_checksum: int = 0,
) -> bytes:
    """The file of `pages`: ascending (page number, contents). See `Encoder.finish` for the checksum."""
    parts: list[bytes] = []
    encoder = Encoder(header, parts.append, compression)
    for pgno, page in pages:
        encoder.add(pgno, page)
    encoder.finish(post_apply_checksum)
    return b"".join(parts)
