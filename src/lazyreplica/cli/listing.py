"""What the commands that look into a replica begin with: its files, and their headers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lazyreplica.cli.terminal import progress_bar
from lazyreplica.errors import FileVanished, LTXError
from lazyreplica.layers import prepare
from lazyreplica.ltx.header import HEADER_SIZE, Header
from lazyreplica.storage import Listing, Store, StoredFile
from lazyreplica.verify import nothing_there

if TYPE_CHECKING:
    from rich.console import Console

TIMEOUT = 60.0
"""Seconds for a listing, and for a batch of headers."""
_BATCH = 480


def list_files(store: Store, err: Console) -> Listing:
    """The replica's files, of which there is one at least. Raises `EmptyReplica`, `LegacyLayout`, `StoreError`."""
    with err.status("listing"):
        listing = store.list_all(TIMEOUT)
    if not listing.files:
        raise nothing_there(listing, store.url)
    return listing


def read_headers(store: Store, files: Sequence[StoredFile], err: Console) -> dict[StoredFile, Header]:
    """The header of each file, but of those that have vanished or are no LTX files; many requests at once."""
    found: dict[StoredFile, Header] = {}
    waiting = list(files)
    with progress_bar(err) as bar:
        task = bar.add_task("reading headers", total=len(files))
        while waiting:
            batch, waiting = waiting[:_BATCH], waiting[_BATCH:]
            prepare(store, min(len(batch), store.parallel) - max(1, store.ready), TIMEOUT)
            results = store.read_many([(file, 0, min(HEADER_SIZE, file.size)) for file in batch], TIMEOUT)
            for number, file in enumerate(batch, 1):
                try:
                    found[file] = Header.parse(next(results))
                except LTXError:
                    pass
                except FileVanished:  # the replies behind it are lost
                    waiting[:0] = batch[number:]
                    bar.advance(task)
                    break
                bar.advance(task)
    return found
