"""A read transaction whose files vanish: what it pinned, or an error, never another version of a page."""

from __future__ import annotations

import contextlib
import random
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import apsw
import pytest
from e2e_helpers import file_url, one, open_replica, txid_of

import lazyreplica
from lazyreplica import layers
from support.data import text
from support.litestream import ltx_files, replicate_once, replicating
from support.waiting import eventually

STILL = {"levels": ("24h",), "l0_retention": "1h"}
"""No compaction while the test arranges files."""
BUSY = {"levels": ("1s",), "l0_retention": "1s", "l0_retention_check_interval": "500ms"}


@contextlib.contextmanager
def primary(path: Path, rows: int = 6000) -> Iterator[sqlite3.Connection]:
    """A WAL database whose connection stays open, so that the WAL outlives every Litestream."""
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as con:
        con.execute("PRAGMA auto_vacuum = full")  # a DELETE shrinks the file and rewrites few of its pages
        con.execute("PRAGMA journal_mode = wal")
        con.execute("PRAGMA wal_autocheckpoint = 0")
        rng = random.Random(7)
        con.execute("BEGIN")
        con.execute("CREATE TABLE small(id INTEGER PRIMARY KEY, word TEXT)")
        con.execute("INSERT INTO small VALUES (1, 'small')")
        con.execute("CREATE TABLE big(id INTEGER PRIMARY KEY, version INTEGER, body TEXT)")
        con.executemany("INSERT INTO big VALUES (?, 1, ?)", ((i, text(rng, 300)) for i in range(rows)))
        con.execute("COMMIT")
        yield con


def versions(con: apsw.Connection) -> list[tuple[int, int]]:
    return list(con.execute("SELECT version, count(*) FROM big GROUP BY version"))


def gone_or(con: apsw.Connection, sql: str, expected: list[tuple[int, ...]]) -> str:
    """Read what was pinned: it is as expected, or BUSY_SNAPSHOT."""
    try:
        assert list(con.execute(sql)) == expected
    except apsw.BusyError as exc:
        assert exc.extendedresult == apsw.SQLITE_BUSY_SNAPSHOT
        assert "roll back and retry" in str(exc)
        return "gone"
    return "read"


def levels_of(directory: Path) -> set[tuple[int, int, int]]:
    return {(file.level, file.min_txid, file.max_txid) for file in ltx_files(directory)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "left"),
    [
        (["UPDATE big SET version = 3"], [(3, 6000)]),
        (["DELETE FROM big WHERE id >= 1000"], [(2, 1000)]),
        (["DELETE FROM big", "VACUUM"], []),
    ],
    ids=["overwritten", "cut off", "vacuumed"],
)
def test_a_version_that_compaction_dropped_is_not_replaced_by_an_older_one(
    litestream: Path,
    tmp_path: Path,
    file_replica_dir: Path,
    change: list[str],
    left: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Version 2 of the pages is in one level-0 file only; the next transaction overwrites or cuts them off."""
    monkeypatch.setattr(layers, "KEEP_TOTAL", 0)  # else that file is still in memory, and answers rightly
    monkeypatch.setattr(layers, "PASSING_TOTAL", 0)
    db = tmp_path / "app.db"
    with primary(db) as con:
        with replicating(db, file_replica_dir, **BUSY) as writer:
            first = writer.wait_synced()
            eventually(lambda: any(level == 1 and last == first for level, _, last in levels_of(file_replica_dir)))
        with replicating(db, file_replica_dir, **STILL) as writer:
            con.execute("UPDATE big SET version = 2")
            second = writer.wait_synced()
            with open_replica(file_url(file_replica_dir), cache_size=0) as reader:
                reader.execute("BEGIN")
                # The upper pages of the tree are SQLite's own now: the question is which leaves come with them.
                assert one(reader, "SELECT version FROM big WHERE id = 3000") == 2
                assert txid_of(reader) == second
                for statement in change:
                    con.execute(statement)
                third = writer.wait_synced()
                lazyreplica.wait_for(reader, third)
                writer.stop()
                with replicating(db, file_replica_dir, **BUSY):
                    eventually(
                        lambda: any(
                            level == 1 and low == first + 1 and high >= third
                            for level, low, high in levels_of(file_replica_dir)
                        )
                    )
                    eventually(lambda: (0, second, second) not in levels_of(file_replica_dir))
                    assert gone_or(reader, "SELECT version FROM big WHERE id = 3040", [(2,)]) == "gone"
                    reader.execute("ROLLBACK")
                    assert versions(reader) == left


@pytest.mark.slow
@pytest.mark.parametrize("poll_interval", [0, 0.1])
@pytest.mark.parametrize("hydrate", [False, True])
def test_a_wiped_path_never_lends_its_pages_to_an_open_transaction(
    litestream: Path, tmp_path: Path, file_replica_dir: Path, poll_interval: float, hydrate: bool
) -> None:
    """The new history has the same layout and other rows, and has reached a TXID beyond the pinned one's files."""
    with primary(tmp_path / "old.db"):
        replicate_once(tmp_path / "old.db", file_replica_dir, **STILL)
    with primary(tmp_path / "new.db") as new:
        new.execute("UPDATE big SET version = 99")
        with open_replica(
            file_url(file_replica_dir), cache_size=0, poll_interval=poll_interval, hydrate=hydrate
        ) as reader:
            reader.execute("BEGIN")
            assert one(reader, "SELECT word FROM small") == "small"
            shutil.rmtree(file_replica_dir)
            replicate_once(tmp_path / "new.db", file_replica_dir, **STILL)
            gone_or(reader, "SELECT version, count(*) FROM big GROUP BY version", [(1, 6000)])
            reader.execute("ROLLBACK")
            with contextlib.suppress(apsw.BusyError, lazyreplica.errors.LineageChanged):
                assert versions(reader) == [(1, 6000)]
