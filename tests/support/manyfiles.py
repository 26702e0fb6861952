"""A replica of very many tiny files, made with the project's encoder: a real SQLite database, one mark a transaction.

Transaction n gives the row ``n % ROWS + 1`` the mark n, so what each row shows at any TXID is known.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from lazyreplica.ltx import FLAG_NO_CHECKSUM, FileName, Header, encode_file

PAGE_SIZE = 512
ROWS = 64
_FRAME = 24 + PAGE_SIZE


class ManyFiles:
    """Writes level-0 files into a directory, one for each transaction."""

    def __init__(self, level: Path) -> None:
        """`level`: the directory of level 0; made here. The first transaction, the whole database, is written."""
        self._level = level
        level.mkdir(parents=True)
        path = level.parent / "source.db"
        with closing(sqlite3.connect(path)) as db:
            db.execute(f"PRAGMA page_size = {PAGE_SIZE}")
            db.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, mark TEXT, rest TEXT)")
            db.executemany(
                "INSERT INTO t VALUES (?, ?, ?)", ((n, f"mark{n:08d}", "." * 150) for n in range(1, ROWS + 1))
            )
            db.commit()
        data = bytearray(path.read_bytes())
        path.unlink()
        self._marks = [data.index(f"mark{n:08d}".encode()) for n in range(1, ROWS + 1)]
        self._data = data
        self._pages = len(data) // PAGE_SIZE
        self._wal = 32
        self.txid = 0
        self._write(range(1, self._pages + 1))

    def commit(self, count: int = 1) -> int:
        """Write so many transactions more; returns the newest TXID."""
        for _ in range(count):
            number = self.txid + 1
            at = self._marks[number % ROWS]
            self._data[at : at + 12] = f"mark{number:08d}".encode()
            self._write(range(at // PAGE_SIZE + 1, (at + 11) // PAGE_SIZE + 2))
        return self.txid

    def _write(self, pgnos: range) -> None:
        self.txid += 1
        size, stamp = _FRAME * len(pgnos), 1_700_000_000_000 + self.txid
        header = Header(FLAG_NO_CHECKSUM, PAGE_SIZE, self._pages, self.txid, self.txid, stamp, 0, self._wal, size, 7, 8)
        self._wal += size
        pages = [(pgno, bytes(self._data[(pgno - 1) * PAGE_SIZE : pgno * PAGE_SIZE])) for pgno in pgnos]
        name = str(FileName(self.txid, self.txid))
        # As a primary does: a file appears whole.
        (self._level / f".{name}").write_bytes(encode_file(header, pages))
        (self._level / f".{name}").rename(self._level / name)


def marks(txid: int) -> list[tuple[int, str]]:
    """What ``SELECT id, mark FROM t ORDER BY id`` gives at `txid`."""
    shown = {row: f"mark{row:08d}" for row in range(1, ROWS + 1)}
    for number in range(max(2, txid - ROWS + 1), txid + 1):
        shown[number % ROWS + 1] = f"mark{number:08d}"
    return sorted(shown.items())
