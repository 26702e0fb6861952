"""What the bulk loader is asked to do and what it tells, as values, and as the bytes between its two processes."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from struct import Struct
from typing import Any

from lazyreplica import errors
from lazyreplica.ltx.name import FileName
from lazyreplica.storage import StoredFile

_LENGTH = Struct(">I")
_NUMBER = array("I").itemsize
_ONES = tuple(bytes(byte >> bit & 1 for bit in range(8)) for byte in range(256))


class WorkerLost(errors.LazyReplicaError):
    """The process that loads pages ended before its work was done: killed, out of memory, or it could not begin."""


@dataclass(frozen=True, slots=True)
class BulkFile:
    """One LTX file, and which of its pages are wanted."""

    file: StoredFile
    wanted: bytes
    """Bitmap: bit (pgno-1) % 8 of byte (pgno-1) // 8 is set when the page is to be written."""

    def page_table(self) -> bytes:
        """One byte a page, 1 if it is wanted; of page `pgno` at position `pgno`."""
        return b"\0" + b"".join(map(_ONES.__getitem__, self.wanted))

    @property
    def count(self) -> int:
        """How many pages are wanted."""
        return int.from_bytes(self.wanted, "little").bit_count()


@dataclass(frozen=True, slots=True)
class BulkJob:
    """Bring the wanted pages of `files` from a replica into a database file, and those that are in memory.

    No page is wanted twice, and until the job has ended nobody else writes the pages it wants, or their presence.
    """

    url: str
    """The replica."""
    database: Path
    """Exists; page p lies at (p-1) * `page_size`."""
    presence: Path
    """Exists, fully written (no holes: it is mapped), one byte a page: 0 absent, 1 written."""
    page_size: int
    files: tuple[BulkFile, ...]
    """One at least: when all have ended, the job has."""
    connections: int
    timeout: float
    """Seconds for each request."""
    keys: dict[str, str] | None = field(default=None, repr=False)
    """What `Store.keys` gave: secrets. None: the child looks for credentials in its environment."""
    frames: tuple[tuple[int, bytes | memoryview], ...] = field(default=(), repr=False)
    """Pages whose bytes are in memory: each one's number, and its frame as it is in an LTX file."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What has happened since the last one."""

    pages: int
    """Marked present. Negative: taken back, because their file is damaged."""
    bytes: int
    """Read from storage and decoded."""


LISTENING = Progress(0, 0)
"""What the child says first: it has read its job."""


@dataclass(frozen=True, slots=True)
class FileDone:
    """Every wanted page of ``files[index]`` is present. Its file checksum was verified, if it was read whole."""

    index: int


@dataclass(frozen=True, slots=True)
class FileDamaged:
    """``files[index]`` failed its checks twice. None of the pages that this job wanted of it is present any more.

    Whoever read one of them meanwhile may have read damage.
    """

    index: int
    reason: str


@dataclass(frozen=True, slots=True)
class FileGone:
    """``files[index]`` is not there any more.

    Pages that it gave before are present: each was checked on its own, but not the file's checksum.
    """

    index: int
    reason: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The job has ended early: `StoreError`, `ConfigError`, `WorkerLost`, or `OSError` of one of the local files."""

    exception: Exception


Event = Progress | FileDone | FileDamaged | FileGone | Failed
_EVENTS: dict[str, type[Progress | FileDone | FileDamaged | FileGone]] = {
    kind.__name__: kind for kind in (Progress, FileDone, FileDamaged, FileGone)
}


def encode_job(job: BulkJob) -> Iterator[bytes]:
    """The job as a length, so much JSON, the bitmaps, and of the frames the page numbers, the lengths and the bytes."""
    header = {
        "url": job.url,
        "database": str(job.database),
        "presence": str(job.presence),
        "page_size": job.page_size,
        "connections": job.connections,
        "timeout": job.timeout,
        "keys": job.keys,
        "files": [
            (f.level, f.name.min_txid, f.name.max_txid, f.size, f.etag, f.modified, len(each.wanted))
            for each in job.files
            for f in (each.file,)
        ],
        "frames": len(job.frames),
    }
    encoded = json.dumps(header).encode()
    yield _LENGTH.pack(len(encoded)) + encoded
    for each in job.files:
        yield each.wanted
    yield array("I", (pgno for pgno, _ in job.frames)).tobytes()
    yield array("I", (len(frame) for _, frame in job.frames)).tobytes()
    yield b"".join(frame for _, frame in job.frames)


def read_job(read: Callable[[int], bytes]) -> BulkJob:
    """The job that `encode_job` gave; `read` returns exactly as many bytes as it is asked for."""
    (length,) = _LENGTH.unpack(read(_LENGTH.size))
    header = json.loads(read(length))
    files = []
    for level, low, high, size, etag, modified, bitmap in header["files"]:
        stored = StoredFile(level, FileName(low, high), size, etag, modified)
        files.append(BulkFile(stored, read(bitmap)))
    count = header["frames"]
    pgnos, lengths = (array("I", read(count * _NUMBER)) for _ in range(2))
    frames = memoryview(read(sum(lengths)))
    ends = list(accumulate(lengths))
    return BulkJob(
        header["url"],
        Path(header["database"]),
        Path(header["presence"]),
        header["page_size"],
        tuple(files),
        header["connections"],
        header["timeout"],
        header["keys"],
        tuple((pgno, frames[end - length : end]) for pgno, length, end in zip(pgnos, lengths, ends, strict=True)),
    )


def encode_event(event: Event) -> bytes:
    """One line of JSON."""
    fields: list[Any]
    if isinstance(event, Failed):
        fields = ["Failed", *_describe(event.exception)]
    else:
        fields = [type(event).__name__, *(getattr(event, name) for name in event.__dataclass_fields__)]
    return json.dumps(fields).encode() + b"\n"


def decode_event(line: bytes) -> Event:
    """The event in a line. Raises `ValueError` for a line that holds none."""
    kind, *fields = json.loads(line)
    if kind == "Failed":
        return Failed(_revive(*fields))
    if kind not in _EVENTS:
        raise ValueError(f"the bulk worker says {line[:100]!r}, expected an event")
    return _EVENTS[kind](*fields)


def _describe(exc: Exception) -> list[Any]:
    if isinstance(exc, errors.LazyReplicaError):
        return [type(exc).__name__, str(exc)]
    if isinstance(exc, OSError):
        return ["OSError", exc.errno, exc.strerror or str(exc), exc.filename and str(exc.filename)]
    return [WorkerLost.__name__, f"the bulk worker failed unexpectedly: {exc!r}"]


def _revive(name: str, *arguments: Any) -> Exception:
    """The exception that was described, of the class it had."""
    if name == "OSError":
        return OSError(*arguments)
    kind = getattr(errors, name, WorkerLost)
    found: Exception = kind(*arguments)
    return found
