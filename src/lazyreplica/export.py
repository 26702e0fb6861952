"""One state of a replica as a plain SQLite database file."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterable
from pathlib import Path

from lazyreplica.local.base import pwrite_all
from lazyreplica.local.state import sync_directory
from lazyreplica.replica import Replica
from lazyreplica.snapshot import Snapshot

_BATCH = 1 << 20


def export_snapshot(replica: Replica, snapshot: Snapshot, path: Path) -> None:
    """Write a pinned snapshot to `path`, as it is stored: byte for byte what ``litestream restore`` gives.

    What is not local is fetched. The file appears whole, in place of one that is there. Raises `OSError` and what
    `Replica.read` raises.
    """
    reader = replica.reader()
    write_database(path, (replica.read(snapshot, pgno, reader) for pgno in range(1, snapshot.commit + 1)))


def write_database(path: Path, pages: Iterable[bytes]) -> None:
    """Write pages, in order, to a file that appears whole, in place of one that is there.

    Raises `OSError`, and what `pages` raises.
    """
    new = path.with_name(f"{path.name}.{secrets.token_hex(4)}.new")
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            at, batch = 0, bytearray()
            for page in pages:
                batch += page
                if len(batch) >= _BATCH:
                    pwrite_all(fd, batch, at)
                    at += len(batch)
                    batch.clear()
            pwrite_all(fd, batch, at)
            os.fsync(fd)
        finally:
            os.close(fd)
        new.replace(path)
        sync_directory(path.absolute().parent)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink()
        raise
