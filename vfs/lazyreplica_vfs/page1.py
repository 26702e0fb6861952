"""Page 1 as SQLite must see it. Stored bytes stay as they came; only what is shown differs."""

from __future__ import annotations

from lazyreplica.dbheader import with_header
from lazyreplica.snapshot import Snapshot


def shown(snapshot: Snapshot, stored: bytes) -> bytes:
    """Page 1 of `snapshot`, for a reader that has no shared memory and no other way to notice a change.

    The change counter is a function of (lineage, TXID); see `with_header`.
    """
    return with_header(stored, snapshot.change_counter, snapshot.commit, snapshot.lineage.epoch)
