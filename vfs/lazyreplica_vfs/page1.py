"""Page 1 as SQLite must see it. Stored bytes stay as they came; only what is shown differs.

Offsets: SQLite file format, section 1.3 "The Database Header".
"""

from __future__ import annotations

from lazyreplica.snapshot import Snapshot

_SPREAD = 0x1E3779B1
"""Far apart: a cookie counts schema changes, so an epoch that counted in ones would meet the cookie of a database that
was restored to just before its last migration."""


def shown(snapshot: Snapshot, stored: bytes) -> bytes:
    """Page 1 of `snapshot`, for a reader that has no shared memory and no other way to notice a change.

    - 18, 19 (file format versions): 1, rollback journal. A database in WAL mode says 2 and would need a -shm file.
    - 24..27 (change counter) and 92..95 (version-valid-for): a function of (lineage, TXID). SQLite compares 24..39 at
      the start of a read transaction to learn whether its page cache is still good; the primary, in WAL mode, does
      not count commits there.
    - 28..31 (size in pages): the snapshot's commit; SQLite trusts it because 92..95 equals 24..27.
    - 40..43 (schema cookie): moved by the lineage's epoch, so that SQLite parses the schema again after a stretch of
      history that was not followed link by link.
    """
    page = bytearray(stored)
    counter = snapshot.change_counter.to_bytes(4)
    page[18:20] = b"\x01\x01"
    page[24:28] = counter
    page[28:32] = snapshot.commit.to_bytes(4)
    if snapshot.lineage.epoch:
        cookie = int.from_bytes(page[40:44]) + snapshot.lineage.epoch * _SPREAD
        page[40:44] = (cookie & 0x7FFFFFFF).to_bytes(4)
    page[92:96] = counter
    return bytes(page)
