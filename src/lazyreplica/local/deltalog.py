"""The log of a local copy: the transactions after its base, each as one record with all its pages, in order.

Append-only. A record is written from its pages to its head, and then announced (`control`): who follows the log sees
whole records only. A scan after a crash stops at the first record that is torn or does not match its checksum.
"""

from __future__ import annotations

import json
import mmap
import os
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from struct import Struct, error

from lazyreplica.errors import LTXError
from lazyreplica.local.base import pwrite_all
from lazyreplica.ltx.checksum import crc64
from lazyreplica.ltx.header import HEADER_SIZE, Header
from lazyreplica.ltx.name import FileName
from lazyreplica.storage import StoredFile

_MAGIC = b"LZRDELT2"
_HEAD = Struct("<8sQQIIQ")
"""Magic, bytes of the record, CRC-64 of what follows the head, bytes of the description, pages, checksum of the file.

The CRC covers the file's checksum, the description, the LTX header, the page numbers, the offsets, and the pages."""
_GROW = 16 << 20
_BATCH = 1 << 20


@dataclass(frozen=True, slots=True)
class Record:
    """One LTX file in the log, decoded."""

    file: StoredFile
    header: Header
    checksum: int
    """The file's own."""
    pgnos: array[int]
    offsets: array[int]
    """Where the frames lie in the LTX file (see `PageIndex`)."""
    start: int
    """Byte offset in the log where its first page lies; the others follow in the order of `pgnos`."""
    end: int

    @property
    def max_txid(self) -> int:
        return self.file.name.max_txid


class DeltaLog:
    """One log file. One process appends; any reads, through a mapping that grows."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        """Raises `OSError`."""
        self.path = path
        self._fd = -1
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT | os.O_EXCL if create else 0)
        self._fd = os.open(path, flags, 0o600)
        self.end = 0
        """Bytes; records lie before it."""
        if not os.fstat(self._fd).st_size:
            os.ftruncate(self._fd, _GROW)
        self.data = mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ)

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def append(
        self,
        file: StoredFile,
        header: Header,
        checksum: int,
        index: tuple[array[int], array[int]],
        pages: Iterable[tuple[int, bytes]],
    ) -> Record:
        """Write one more record at the end; `index` (page numbers, offsets) says which pages, in order.

        Nothing is appended if `pages` raises, or with `OSError` (a full disk).
        """
        pgnos, offsets = index
        description = json.dumps(
            [file.level, file.name.min_txid, file.name.max_txid, file.size, file.etag, file.modified]
        ).encode()
        front = description + header.encode() + pgnos.tobytes() + offsets.tobytes()
        crc = crc64(front, crc64(checksum.to_bytes(8, "little")))
        start = self.end + _HEAD.size + len(front)
        at, batch, room = start, bytearray(), header.page_size
        end = start + len(pgnos) * room
        self._reach(end)
        expected = iter(pgnos)
        for pgno, page in pages:
            if pgno != next(expected, 0) or len(page) != room:
                raise LTXError(f"page {pgno} does not follow in the order of the index of {file}")
            crc = crc64(page, crc)
            batch += page
            if len(batch) >= _BATCH:
                pwrite_all(self._fd, batch, at)
                at += len(batch)
                batch = bytearray()
        pwrite_all(self._fd, batch, at)
        if at + len(batch) != end:
            raise LTXError(f"{file} gave fewer pages than the {len(pgnos)} of its index")
        pwrite_all(self._fd, front, self.end + _HEAD.size)
        head = _HEAD.pack(_MAGIC, end - self.end, crc, len(description), len(pgnos), checksum)
        pwrite_all(self._fd, head, self.end)
        self.end = end
        return Record(file, header, checksum, pgnos, offsets, start, end)

    def scan(self, start: int, end: int | None = None) -> Iterator[Record]:
        """The records from `start` on: up to `end`, which somebody alive has announced; or to the last whole one.

        Leaves `end` of the log behind the last record given.
        """
        self._map_again()
        self.end = start
        while end is None or self.end < end:
            record = self._record(self.end)
            if record is None:
                return
            self.end = record.end
            yield record

    def _record(self, at: int) -> Record | None:
        """The record at `at`; None if none is there as it was written. Its checksum costs 0.1 ms a megabyte."""
        data = self.data
        try:
            magic, length, crc, described, count, checksum = _HEAD.unpack_from(data, at)
        except error:
            return None
        front = at + _HEAD.size
        start = front + described + HEADER_SIZE + 4 * count + 8 * (count + 1)
        if magic != _MAGIC or start > at + length or at + length > len(data):
            return None
        with memoryview(data)[front : at + length] as rest:
            if crc64(rest, crc64(checksum.to_bytes(8, "little"))) != crc:
                return None
        try:
            level, low, high, size, etag, modified = json.loads(data[front : front + described])
            header = Header.parse(data[front + described : front + described + HEADER_SIZE])
            file = StoredFile(level, FileName(low, high), size, etag, modified)
        except (ValueError, TypeError, RecursionError, LTXError):
            return None
        numbers = front + described + HEADER_SIZE
        pgnos, offsets = array("I"), array("Q")
        pgnos.frombytes(data[numbers : numbers + 4 * count])
        offsets.frombytes(data[numbers + 4 * count : start])
        if start + count * header.page_size != at + length:
            return None
        return Record(file, header, checksum, pgnos, offsets, start, at + length)

    def sync(self) -> None:
        """What was appended survives a power loss. Raises `OSError`."""
        os.fdatasync(self._fd)

    def _reach(self, end: int) -> None:
        """Make the file, and the mapping, hold `end` bytes. It never shrinks: others have it mapped."""
        if end > len(self.data):
            size = -(-end // _GROW) * _GROW
            if os.fstat(self._fd).st_size < size:
                os.ftruncate(self._fd, size)
            self._map_again()

    def _map_again(self) -> None:
        if os.fstat(self._fd).st_size > len(self.data):
            self.data = mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ)
