"""Where LTX files lie: a small `Store` protocol, one module a backend.

A store knows names, sizes, identities and bytes. It does not know what is inside a file, which files matter,
or what was read before: no caching and no planning happens here. Every call has a deadline and may come from
any thread.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, BinaryIO, Protocol

from lazyreplica.ltx.name import FileName

if TYPE_CHECKING:
    from lazyreplica.storage.credentials import CredentialSource

LEVELS = range(10)
"""Level 0 (as written), 1..8 (compacted), 9 (full snapshots)."""

SNAPSHOT_LEVEL = 9


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One LTX file as the store showed it. Two are equal when they must hold the same bytes."""

    level: int
    name: FileName
    size: int
    """Bytes."""
    etag: str
    """Opaque identity of the bytes: S3's ETag without quotes; local files' inode, mtime and size."""
    modified: float = field(compare=False)
    """Object date, seconds since the Unix epoch; a hint only (LTX headers have the real time)."""

    def __str__(self) -> str:
        return f"level {self.level} file {self.name}"


@dataclass(frozen=True, slots=True)
class Listing:
    """What a whole-prefix listing showed."""

    files: tuple[StoredFile, ...]
    """LTX files in order of level, then name."""
    strangers: frozenset[str]
    """First path components under the replica path that are not part of the layout, e.g. ``generations``."""


class Store(Protocol):
    """The one interface between the engine and a storage service.

    ``timeout`` is the number of seconds in which the call, with all its retries, answers or raises
    `StoreUnavailable`. Any method raises `AccessDenied`, `BucketNotFound` or `StoreError` for what
    cannot be helped by waiting.
    """

    @property
    def url(self) -> str:
        """The replica's URL for messages: canonical, without secrets."""

    def keys(self) -> dict[str, str]:
        """What a child process needs beside the URL to open the same store: secrets (see `credentials.from_texts`).

        Raises `AccessDenied` when they cannot be had.
        """

    @property
    def parallel(self) -> int:
        """How many calls at once are worth it: 1 where a call costs no waiting."""

    @property
    def ready(self) -> int:
        """How many calls can be made at once without making ready for them."""

    @property
    def requests(self) -> int:
        """What was asked so far, each request that a call took: pages of a listing, and those that were repeated."""

    @property
    def retries(self) -> int:
        """How many of them were repeated."""

    def prepare(self, timeout: float) -> None:
        """Make ready for one more call at once (a connection), if that takes time. Never raises."""

    def list_all(self, timeout: float) -> Listing:
        """List every level, level 0 first and level 9 last.

        The order matters: Litestream uploads a compacted file before it deletes what it was made of, so a
        file that leaves level 0 while we list is seen again one level up.
        """

    def list_level(self, level: int, after: FileName | None, timeout: float) -> Sequence[StoredFile]:
        """List one level by name, only names greater than `after` if given (S3 ``start-after``)."""

    def read(self, file: StoredFile, offset: int, length: int, timeout: float) -> bytes:
        """Exactly `length` bytes of `file` from `offset`.

        Raises `FileVanished` when the file is gone or no longer has the listed identity (ETag, size).
        """

    def read_into(self, file: StoredFile, offset: int, buffer: memoryview, timeout: float) -> None:
        """The same, as many bytes as `buffer` has, into it. After a failure its contents mean nothing."""

    def read_many(self, wanted: Iterable[tuple[StoredFile, int, int]], timeout: float) -> Generator[bytes]:
        """What `read` gives for each (file, offset, length), in that order; not one round trip after the other.

        Over connections that are there (see `prepare`), in the caller's thread: requests are sent before replies are
        awaited. `timeout` is for all of them. Each result is to be taken soon: the next ones are on their way.
        """

    def get(self, level: int, name: FileName, limit: int, timeout: float) -> tuple[StoredFile, bytes] | None:
        """The file of that name if there is one: its identity, and its bytes (at most the first `limit`).

        None when there is no such file. One request.
        """

    def put(self, level: int, name: FileName, source: BinaryIO, size: int, timestamp: float, timeout: float) -> None:
        """Store the next `size` bytes of `source` (seekable) under that name, atomically.

        `timestamp` (seconds) goes into the metadata where Litestream looks for it, to the millisecond.
        `timeout` bounds each request of a large upload.
        """

    def read_note(self, name: str, timeout: float) -> bytes | None:
        """A small object beside the levels (``<path>/<name>``), or None."""

    def write_note(self, name: str, data: bytes, timeout: float) -> None:
        """Write a small object beside the levels."""

    def close(self) -> None:
        """Drop connections. Calls under way may fail with `StoreUnavailable`; later calls do."""


NOTE_LIMIT = 1 << 20
"""Bytes: no note is larger."""


def open_store(url: str, credentials: CredentialSource | None = None) -> Store:
    """The store for a replica URL: ``s3://bucket/path?...`` or ``file:///dir``.

    `credentials` are used for this store alone; without, S3's are looked for in the environment.

    Raises `ConfigError` for a URL that cannot be understood. Opens no connection.
    """
    # The backends build on this module. S3's also loads an HTTP client, which only its users should pay for.
    from lazyreplica.storage.url import FileURL, parse_replica_url

    parsed = parse_replica_url(url)
    if isinstance(parsed, FileURL):
        from lazyreplica.storage.local import LocalStore

        return LocalStore(parsed)
    from lazyreplica.storage.s3 import S3Store

    return S3Store(parsed, credentials)


def check_note_name(name: str) -> str:
    """`name`, if it can name a note: one path component that is no part of the layout. Else `ValueError`."""
    if not name or "/" in name or name in {".", "..", "ltx"} or name in {f"{level:04x}" for level in LEVELS}:
        raise ValueError(f"note name is {name!r}, expected a single path component outside the layout")
    return name


def timestamp_ms(timestamp: float) -> int:
    """Seconds since the Unix epoch as the whole milliseconds that LTX headers and metadata hold."""
    return round(timestamp * 1000)
