"""The database header on page 1, for readers that are to see one state of a replica. Pure.

Offsets: SQLite file format, section 1.3 "The Database Header".
"""

from __future__ import annotations

_SPREAD = 0x1E3779B1
"""Far apart: a cookie counts schema changes, so an epoch that counted in ones would meet the cookie of a database that
was restored to just before its last migration."""


def with_header(page: bytes, counter: int, commit: int, epoch: int) -> bytes:
    """Page 1 for readers in rollback mode, which notice a change of the database by its change counter.

    - 18, 19 (file format versions): 1, rollback journal. A database in WAL mode says 2 and would need a -shm file.
    - 24..27 (change counter) and 92..95 (version-valid-for): `counter`. SQLite compares 24..39 at the start of a read
      transaction to learn whether its page cache is still good; the primary, in WAL mode, does not count commits there.
    - 28..31 (size in pages): `commit`; SQLite trusts it because 92..95 equals 24..27.
    - 40..43 (schema cookie): moved by `epoch`, so that SQLite parses the schema again after a stretch of history that
      was not followed link by link.
    """
    shown = bytearray(page)
    count = counter.to_bytes(4)
    shown[18:20] = b"\x01\x01"
    shown[24:28] = count
    shown[28:32] = commit.to_bytes(4)
    if epoch:
        cookie = int.from_bytes(shown[40:44]) + epoch * _SPREAD
        shown[40:44] = (cookie & 0x7FFFFFFF).to_bytes(4)
    shown[92:96] = count
    return bytes(shown)


def change_counter(page: bytes) -> int:
    """Bytes 24..27."""
    return int.from_bytes(page[24:28])
