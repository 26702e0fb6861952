"""Replicas in a local directory: ``<path>/ltx/<level>/<name>``, as Litestream writes ``file://``.

`timeout` is not enforced here: a read from a local disk cannot be given up.
"""

# ruff: noqa: ARG002 - every `timeout`
from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

from lazyreplica.errors import AccessDenied, BucketNotFound, FileVanished, StoreError
from lazyreplica.ltx.name import FileName
from lazyreplica.storage import LEVELS, NOTE_LIMIT, Listing, StoredFile, check_note_name, timestamp_ms
from lazyreplica.storage.url import FileURL

_CHUNK = 1 << 20
_READ_ONLY = os.O_RDONLY | os.O_CLOEXEC


class LocalStore:
    """A `Store` in a directory. Holds no resources."""

    def __init__(self, url: FileURL) -> None:
        self._url = url
        self._path = url.path
        self.requests = 0
        """Calls: nothing travels."""

    @property
    def retries(self) -> int:
        return 0

    @property
    def url(self) -> str:
        return str(self._url)

    def keys(self) -> dict[str, str]:
        return {}

    @property
    def parallel(self) -> int:
        return 1

    @property
    def ready(self) -> int:
        return 1

    def prepare(self, timeout: float) -> None:
        """Nothing to prepare."""

    def list_all(self, timeout: float) -> Listing:
        self.requests += 1
        files = [file for level in LEVELS for file in self._list_level(level)]
        with _clear_errors(f"listing {self._path}"):
            strangers = frozenset(entry.name for entry in os.scandir(self._path) if entry.name != "ltx")
        return Listing(tuple(files), strangers)

    def list_level(self, level: int, after: FileName | None, timeout: float) -> Sequence[StoredFile]:
        self.requests += 1
        return [file for file in self._list_level(level) if after is None or file.name > after]

    def _list_level(self, level: int) -> list[StoredFile]:
        directory = self._path / "ltx" / str(level)
        files: list[StoredFile] = []
        with _clear_errors(f"listing {directory}"):
            try:
                entries = os.scandir(directory)
            except FileNotFoundError:
                self._check_directory()
                return []
            with entries:
                for entry in entries:
                    if (name := FileName.parse(entry.name)) is None:
                        continue
                    try:
                        status = entry.stat()
                    except FileNotFoundError:  # compacted meanwhile
                        continue
                    except OSError as error:
                        if error.errno == errno.ELOOP:
                            continue  # a link to itself is no file, as little as a directory is
                        raise
                    if stat.S_ISREG(status.st_mode):
                        files.append(_stored(level, name, status))
        files.sort(key=lambda file: file.name)
        return files

    def _check_directory(self) -> None:
        if self._path.is_dir():
            return
        advice = "check the path, or whether the volume is mounted"
        undecoded = Path(quote(str(self._path)))
        if undecoded != self._path and undecoded.is_dir():
            # Litestream 0.5.17 does not decode file:// URLs, and encodes blanks.
            advice = f"there is {undecoded}: if that is it, write file://{quote(str(undecoded))}"
        raise BucketNotFound(f"the replica directory {self._path} does not exist; {advice}")

    def read(self, file: StoredFile, offset: int, length: int, timeout: float) -> bytes:
        if offset < 0 or length < 0 or offset + length > file.size:
            raise ValueError(f"bytes {offset}..{offset + length} of {file}, which has {file.size}")
        self.requests += 1
        path = self._file(file.level, file.name)
        opened = self._open(path)
        if opened is None:
            raise FileVanished(f"{path} is gone since it was listed")
        descriptor, status = opened
        try:
            found = _stored(file.level, file.name, status)
            if found != file:
                raise FileVanished(f"{path} changed since it was listed: {found.etag}, listed was {file.etag}")
            data = _read_up_to(descriptor, offset, length)
        finally:
            os.close(descriptor)
        if len(data) != length:
            raise FileVanished(f"{path} was cut: it ends {length - len(data)} bytes early")
        return data

    def read_into(self, file: StoredFile, offset: int, buffer: memoryview, timeout: float) -> None:
        buffer[:] = self.read(file, offset, len(buffer), timeout)

    def read_many(self, wanted: Iterable[tuple[StoredFile, int, int]], timeout: float) -> Generator[bytes]:
        return (self.read(*each, timeout) for each in wanted)

    def get(self, level: int, name: FileName, limit: int, timeout: float) -> tuple[StoredFile, bytes] | None:
        self.requests += 1
        path = self._file(level, name)
        opened = self._open(path)
        if opened is None:
            return None
        descriptor, status = opened
        try:
            file = _stored(level, name, status)
            data = _read_up_to(descriptor, 0, min(limit, file.size))
        finally:
            os.close(descriptor)
        return file, data

    def put(self, level: int, name: FileName, source: BinaryIO, size: int, timestamp: float, timeout: float) -> None:
        def chunks() -> Iterator[bytes]:
            left = size
            while left and (chunk := source.read(min(_CHUNK, left))):
                left -= len(chunk)
                yield chunk
            if left:
                raise StoreError(f"the data for {name} ends after {size - left} bytes, {size} were announced")

        _write(self._file(level, name), chunks(), timestamp_ms(timestamp) * 1_000_000)

    def read_note(self, name: str, timeout: float) -> bytes | None:
        path = self._path / check_note_name(name)
        opened = self._open(path)
        if opened is None:
            return None
        descriptor, status = opened
        try:
            if status.st_size > NOTE_LIMIT:
                raise StoreError(f"{path} has {status.st_size} bytes, a note at most {NOTE_LIMIT}; it is not ours")
            return _read_up_to(descriptor, 0, status.st_size)
        finally:
            os.close(descriptor)

    def write_note(self, name: str, data: bytes, timeout: float) -> None:
        _write(self._path / check_note_name(name), iter([data]), None)

    def close(self) -> None:
        """Nothing is held."""

    def _file(self, level: int, name: FileName) -> Path:
        return self._path / "ltx" / str(level) / str(name)

    def _open(self, path: Path) -> tuple[int, os.stat_result] | None:
        """An open descriptor, which the caller closes, and its status; None if there is no such file."""
        with _clear_errors(f"opening {path}"):
            try:
                descriptor = os.open(path, _READ_ONLY | os.O_NONBLOCK)  # a FIFO must not hang us
            except FileNotFoundError:
                self._check_directory()
                return None
            status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(descriptor)
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise StoreError(f"{path} is {kind}, expected a file; move it away")
        return descriptor, status


def _stored(level: int, name: FileName, status: os.stat_result) -> StoredFile:
    etag = f"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}"
    return StoredFile(level, name, status.st_size, etag, status.st_mtime)


def _read_up_to(descriptor: int, offset: int, length: int) -> bytes:
    """`length` bytes from `offset`, fewer only at the end of the file."""
    with _clear_errors("reading"):
        parts: list[bytes] = []
        while length and (part := os.pread(descriptor, length, offset)):
            parts.append(part)
            offset, length = offset + len(part), length - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def _write(path: Path, chunks: Iterator[bytes], mtime_ns: int | None) -> None:
    """A file that is there whole and durable, or not at all."""
    with _clear_errors(f"writing {path}"):
        _make_directory(path.parent)
        temporary = path.with_name(f".{path.name}.{os.urandom(8).hex()}.tmp")
        try:
            with temporary.open("xb") as file:
                for chunk in chunks:
                    file.write(chunk)
                file.flush()
                if mtime_ns is not None:
                    os.utime(file.fileno(), ns=(mtime_ns, mtime_ns))
                os.fsync(file.fileno())
            temporary.rename(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_directory(path.parent)


def _make_directory(path: Path) -> None:
    if not path.is_dir():
        _make_directory(path.parent)
        path.mkdir(exist_ok=True)
        _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, _READ_ONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _clear_errors(what: str) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise AccessDenied(f"{what}: {error.strerror}; give this user the right to it") from error
    except OSError as error:
        raise StoreError(f"{what}: {error.strerror or error}") from error
