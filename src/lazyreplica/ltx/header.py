"""The first 100 and the last 16 bytes of an LTX file (LTX.md, "One LTX file")."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from struct import Struct
from typing import Final

from lazyreplica.errors import LTXError
from lazyreplica.ltx.checksum import CHECKSUM_FLAG
from lazyreplica.ltx.name import FileName

HEADER_SIZE: Final = 100
TRAILER_SIZE: Final = 16
FLAG_NO_CHECKSUM: Final = 0x2
"""Header flag: the file carries no database checksums. All that Litestream 0.5 writes has it."""

_MAGIC: Final = b"LTX1"
_LOCK_BYTE: Final = 0x40000000
_HEADER: Final = Struct(">4sIIIQQqQqqIIQ20x")
_TRAILER: Final = Struct(">QQ")
_U32: Final = 1 << 32
_I64: Final = 1 << 63
_U64: Final = 1 << 64


def lock_pgno(page_size: int) -> int:
    """The page whose bytes SQLite locks: in no file, and all zero in a database larger than 1 GiB."""
    return _LOCK_BYTE // page_size + 1


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says about itself.

    `commit` is the size of the database in pages once the file is applied; `timestamp_ms` counts from the
    Unix epoch.
    """

    flags: int
    page_size: int
    commit: int
    min_txid: int
    max_txid: int
    timestamp_ms: int
    pre_apply_checksum: int = 0
    wal_offset: int = 0
    wal_size: int = 0
    wal_salt1: int = 0
    wal_salt2: int = 0
    node_id: int = 0

    def __post_init__(self) -> None:
        if self.flags not in (0, FLAG_NO_CHECKSUM):
            raise LTXError(f"LTX header has flags {self.flags:#x}, expected 0 or {FLAG_NO_CHECKSUM:#x}")
        if not 512 <= self.page_size <= 65536 or self.page_size & (self.page_size - 1):
            raise LTXError(f"LTX header has page size {self.page_size}, expected a power of two from 512 to 65536")
        _expect("commit", self.commit, 0, _U32)
        if not 1 <= self.min_txid <= self.max_txid < _U64:
            raise LTXError(
                f"LTX header has MinTXID {self.min_txid} and MaxTXID {self.max_txid}, "
                "expected 1 <= MinTXID <= MaxTXID < 2**64"
            )
        _expect("timestamp", self.timestamp_ms, -_I64, _I64)
        _expect("WAL offset", self.wal_offset, 0, _I64)
        _expect("WAL size", self.wal_size, 0, _I64)
        _expect("WAL salt 1", self.wal_salt1, 0, _U32)
        _expect("WAL salt 2", self.wal_salt2, 0, _U32)
        _expect("node id", self.node_id, 0, _U64)
        if self.wal_offset == 0 and (self.wal_size or self.wal_salt1 or self.wal_salt2):
            raise LTXError(
                f"LTX header has WAL size {self.wal_size}, salts {self.wal_salt1:#x}, {self.wal_salt2:#x}, "
                "expected zeros without a WAL offset"
            )
        if self.is_snapshot or not self.has_checksums:
            if self.pre_apply_checksum:
                raise LTXError(
                    f"LTX header has pre-apply checksum {self.pre_apply_checksum:#x}, "
                    "expected 0 in a snapshot and in a file without checksums"
                )
        elif not CHECKSUM_FLAG <= self.pre_apply_checksum < _U64:
            raise LTXError(f"LTX header has pre-apply checksum {self.pre_apply_checksum:#x}, expected bit 63 to be set")

    @property
    def is_snapshot(self) -> bool:
        """Whether the file holds every page of the database: it starts at TXID 1."""
        return self.min_txid == 1

    @property
    def has_checksums(self) -> bool:
        """Whether the file carries the database's checksum before and after it."""
        return not self.flags & FLAG_NO_CHECKSUM

    @property
    def name(self) -> FileName:
        """The name that the file must have: Litestream plans by names and merges by headers."""
        return FileName(self.min_txid, self.max_txid)

    @property
    def lock_pgno(self) -> int:
        """See `lock_pgno`."""
        return lock_pgno(self.page_size)

    @property
    def snapshot_page_count(self) -> int:
        """How many pages a file with every page holds: all of `commit` but the lock page."""
        return self.commit - (self.commit >= self.lock_pgno)

    @classmethod
    def parse(cls, data: bytes) -> Header:
        """The header at the start of `data`, of which there may be more. Raises `LTXError`."""
        if len(data) < HEADER_SIZE:
            raise LTXError(f"LTX header is {len(data)} bytes long, expected {HEADER_SIZE}: the file is truncated")
        magic, *fields = _HEADER.unpack_from(data)
        if magic != _MAGIC:
            raise LTXError(f"file starts with {magic!r}, expected {_MAGIC!r}: not an LTX file")
        return cls(*fields)

    def encode(self) -> bytes:
        return _HEADER.pack(_MAGIC, *astuple(self))


@dataclass(frozen=True, slots=True)
class Trailer:
    """The checksums that end a file; `post_apply_checksum` is 0 in a file without database checksums."""

    post_apply_checksum: int
    file_checksum: int

    def __post_init__(self) -> None:
        if self.post_apply_checksum and not CHECKSUM_FLAG <= self.post_apply_checksum < _U64:
            raise LTXError(
                f"LTX trailer has post-apply checksum {self.post_apply_checksum:#x}, expected 0 or one with bit 63 set"
            )
        if not CHECKSUM_FLAG <= self.file_checksum < _U64:
            raise LTXError(f"LTX trailer has file checksum {self.file_checksum:#x}, expected one with bit 63 set")

    @classmethod
    def parse(cls, data: bytes) -> Trailer:
        """The trailer that `data` is. Raises `LTXError`."""
        if len(data) != TRAILER_SIZE:
            raise LTXError(f"LTX trailer is {len(data)} bytes long, expected {TRAILER_SIZE}")
        return cls(*_TRAILER.unpack(data))

    def encode(self) -> bytes:
        return _TRAILER.pack(self.post_apply_checksum, self.file_checksum)

    def check(self, header: Header) -> None:
        """Raise `LTXError` unless there is a post-apply checksum exactly if `header` announces checksums."""
        if header.has_checksums != bool(self.post_apply_checksum):
            expected = "a checksum" if header.has_checksums else "0"
            raise LTXError(
                f"LTX trailer has post-apply checksum {self.post_apply_checksum:#x}, expected {expected} "
                f"with header flags {header.flags:#x}"
            )


def _expect(field: str, value: int, low: int, end: int) -> None:
    if not low <= value < end:
        raise LTXError(f"LTX header has {field} {value}, expected {low} <= {field} < {end}")
