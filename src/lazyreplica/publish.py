"""Writes a snapshot of a SQLite database as a replica: for data that has no Litestream primary.

The layout is Litestream's: one level-9 file ``1-<TXID>`` a publication. A note beside it says that the path is ours.
Litestream must never replicate into such a path: a primary started there begins at TXID 1, takes the foreign snapshot
for its own, and a later restore returns the foreign data. So a path that holds anything else is refused.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import apsw

from lazyreplica.errors import ConfigError, LTXError, PublishRefused, StoreError
from lazyreplica.ltx.encoder import Encoder
from lazyreplica.ltx.header import FLAG_NO_CHECKSUM, Header, lock_pgno
from lazyreplica.ltx.name import FileName, format_txid, parse_txid
from lazyreplica.storage import SNAPSHOT_LEVEL, Listing, Store, open_store
from lazyreplica.storage.url import FileURL, parse_replica_url

log = logging.getLogger(__name__)

NOTE = "lazyreplica-publish.json"
"""Marks a path as written by `publish`, and remembers the last publication."""
_TIMEOUT = 60.0

Progress = Callable[[int, int], None]
"""Told (pages done, pages in all) while the database is read."""


@dataclass(frozen=True, slots=True)
class Published:
    """What a publication did."""

    txid: int
    pages: int
    """Database size in pages."""
    size: int
    """Bytes of the LTX file; 0 when nothing had changed and nothing was written."""
    changed: bool


@dataclass(frozen=True, slots=True)
class _Note:
    txid: int
    digest: str

    def encode(self) -> bytes:
        return json.dumps({"format": 1, "txid": format_txid(self.txid), "digest": self.digest}).encode()

    @classmethod
    def parse(cls, data: bytes, url: str) -> _Note:
        try:
            fields = json.loads(data)
            if fields["format"] != 1:
                raise ValueError(f"format {fields['format']!r}")
            return cls(parse_txid(fields["txid"]), str(fields["digest"]))
        except (ValueError, KeyError, TypeError, RecursionError, LTXError) as exc:
            raise PublishRefused(
                f"{url}/{NOTE} cannot be read ({exc}): it was written by a newer lazyreplica or by something else; "
                "publish to an empty path"
            ) from exc


def publish(database: str | Path, url: str, progress: Progress | None = None) -> Published:
    """Write a consistent snapshot of a SQLite database to the replica at `url`, and return what was published.

    The database may be in use, in any journal mode: it is read by SQLite's own backup, in one read transaction.
    Publishing again continues the TXIDs, so that open readers follow; an unchanged database writes nothing.

    Raises `ConfigError` for a database that cannot be read, `PublishRefused` where the path holds what `publish` did
    not write, `StoreError`. Do not call it in a process that has the same database open through Python's ``sqlite3``:
    two copies of SQLite in one process undo each other's file locks (https://sqlite.org/howtocorrupt.html, 2.2.1).
    """
    parsed = parse_replica_url(url)
    source = Path(database)
    if not source.is_file():
        raise ConfigError(f"{str(source)!r} is not a file: name the SQLite database to publish")
    if isinstance(parsed, FileURL):
        try:
            parsed.path.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise StoreError(f"{str(parsed.path)!r} cannot be made a directory: {exc.strerror}") from exc
    store = open_store(url)
    try:
        listing = store.list_all(_TIMEOUT)
        data = store.read_note(NOTE, _TIMEOUT)
        note = None if data is None else _Note.parse(data, store.url)
        _refuse_foreign(listing, note, store.url)
        with tempfile.TemporaryDirectory(prefix="lazyreplica-publish-") as directory:
            return _publish(source, Path(directory), store, listing, note, progress)
    finally:
        store.close()


def _publish(
    source: Path,
    directory: Path,
    store: Store,
    listing: Listing,
    note: _Note | None,
    progress: Progress | None,
) -> Published:
    copy = directory / "database"
    cookie = _back_up(source, copy)
    with copy.open("rb") as file:
        pages = _Pages(file, cookie)
        digest = pages.digest()
        published = {stored.name.max_txid for stored in listing.files}
        if note and note.digest == digest and note.txid in published:
            return Published(note.txid, pages.commit, 0, changed=False)
        txid = max(published | {note.txid if note else 0}, default=0) + 1
        with (directory / "file.ltx").open("w+b") as ltx:
            now = time.time()
            _encode(pages, txid, int(now * 1000), ltx, progress)
            size = ltx.tell()
            ltx.seek(0)
            # The note goes first: a publication that is cut short leaves a path that we still recognise as ours.
            store.write_note(NOTE, _Note(txid, digest).encode(), _TIMEOUT)
            store.put(SNAPSHOT_LEVEL, FileName(1, txid), ltx, size, now, _TIMEOUT)
    log.info("published %s as TXID %s of %s: %d bytes", source, format_txid(txid), store.url, size)
    return Published(txid, pages.commit, size, changed=True)


def _refuse_foreign(listing: Listing, note: _Note | None, url: str) -> None:
    if "generations" in listing.strangers:
        raise PublishRefused(f"{url} holds a Litestream 0.3 backup (generations/): publish to an empty path")
    if note is None and listing.files:
        raise PublishRefused(
            f"{url} holds {len(listing.files)} LTX files that `publish` did not write (the first: {listing.files[0]}): "
            "Litestream replicates there, and a foreign snapshot would corrupt its restores; publish to an empty path"
        )
    for file in listing.files:
        if note is None or file.level != SNAPSHOT_LEVEL or not file.name.is_snapshot or file.name.max_txid > note.txid:
            raise PublishRefused(
                f"{url} was published by lazyreplica, but holds {file} now, which `publish` did not write: something "
                "else writes there; publish to an empty path"
            )


def _back_up(source: Path, copy: Path) -> int:
    """Copy `source` as one transaction left it, and return its schema cookie (the backup counts its own)."""
    try:
        with (
            _Connection(source, apsw.SQLITE_OPEN_READWRITE) as original,
            _Connection(copy, apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE) as target,
        ):
            original.set_busy_timeout(10_000)
            original.execute("begin")
            cookie = original.pragma("schema_version")
            assert isinstance(cookie, int)
            with target.backup("main", original, "main") as backup:
                while not backup.done:
                    backup.step(-1)
            _refuse_damaged(target, source)
            return cookie
    except (apsw.NotADBError, apsw.CorruptError) as exc:
        raise ConfigError(f"{str(source)!r} is not a readable SQLite database: {exc}") from exc
    except (apsw.CantOpenError, apsw.BusyError, apsw.PermissionsError) as exc:
        raise ConfigError(f"{str(source)!r} cannot be read: {exc}") from exc


_CONSTRAINT = re.compile(r"(NULL|NUMERIC|TEXT|non-\w+) value in |CHECK constraint failed in ")
"""Rows that break a constraint of their table are the owner's affair."""


def _refuse_damaged(copy: apsw.Connection, source: Path) -> None:
    try:
        found = [line for (line,) in copy.execute("pragma quick_check") if not _CONSTRAINT.match(str(line))]
    except apsw.SQLError as exc:  # a virtual table whose module only the application has
        log.info("%s cannot be checked before it is published: %s", source, exc)
        return
    if found not in ([], ["ok"]):
        raise ConfigError(f"{str(source)!r} is damaged, publishing it would pass that on: {found[0]}")


class _Connection:
    """A plain connection to a local file, closed at the end of the block."""

    def __init__(self, path: Path, flags: int) -> None:
        self._connection = apsw.Connection(str(path.absolute()), flags=flags, vfs="unix")

    def __enter__(self) -> apsw.Connection:
        return self._connection

    def __exit__(self, *exc: object) -> None:
        self._connection.close()


class _Pages:
    """The pages of a database file, with page 1 as the original had it."""

    def __init__(self, file: BinaryIO, cookie: int) -> None:
        self._file = file
        self._cookie = cookie
        header = file.read(100)
        stored = int.from_bytes(header[16:18])
        self.page_size = 65536 if stored == 1 else stored
        self.commit = file.seek(0, 2) // self.page_size

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        lock = lock_pgno(self.page_size)
        self._file.seek(0)
        for pgno in range(1, self.commit + 1):
            page = self._file.read(self.page_size)
            if pgno == 1:
                page = page[:40] + self._cookie.to_bytes(4) + page[44:]
            if pgno != lock:
                yield pgno, page

    def digest(self) -> str:
        """Tells whether a database has changed since it was published."""
        digest = hashlib.blake2b(digest_size=20)
        for _, page in self:
            digest.update(page)
        return digest.hexdigest()


def _encode(pages: _Pages, txid: int, timestamp_ms: int, target: BinaryIO, progress: Progress | None) -> None:
    header = Header(
        flags=FLAG_NO_CHECKSUM,
        page_size=pages.page_size,
        commit=pages.commit,
        min_txid=1,
        max_txid=txid,
        timestamp_ms=timestamp_ms,
    )
    encoder = Encoder(header, target.write)
    for pgno, page in pages:
        encoder.add(pgno, page)
        if progress and pgno % 256 == 0:
            progress(pgno, pages.commit)
    encoder.finish()
    if progress:
        progress(pages.commit, pages.commit)
