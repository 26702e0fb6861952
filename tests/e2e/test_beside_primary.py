"""A replica called ``app.db`` in a directory with a live ``app.db``; and a path that starts another history."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import apsw
import pytest
from e2e_helpers import file_url, one, open_replica, python_env, run_python, txid_of

import lazyreplica
from lazyreplica.errors import LineageChanged
from support.databases import assert_intact, file_digest
from support.litestream import Litestream, replicate_once, replicating
from support.waiting import eventually

READER = """
import sys
import apsw, lazyreplica
url, copy, action = sys.argv[1:]
flags = apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE | apsw.SQLITE_OPEN_URI
if action == "attach":
    db = apsw.Connection("file:other?vfs=litestream", flags=flags)
    db.execute("attach 'file:app.db?vfs=litestream' as app")
else:
    db = apsw.Connection("file:app.db?vfs=litestream", flags=flags)
if action == "vacuum":
    db.execute("vacuum into ?", (f"file:{copy}?vfs=unix",))
if action == "write":
    for sql in ("create table x(y)", "pragma journal_mode = wal", "pragma journal_mode = delete", "vacuum"):
        try:
            db.execute(sql)
        except apsw.ReadOnlyError:
            pass
assert db.pragma("integrity_check") == "ok"
print(db.execute("select count(*) from users").get)
db.close()
"""
ACTIONS = ["open", "attach", "vacuum", "write"]

WRITER = """
import sqlite3, sys, time
con = sqlite3.connect("app.db", isolation_level=None)
con.execute("pragma journal_mode = " + sys.argv[1])
con.execute("pragma wal_autocheckpoint = 0")
con.execute("create table live(x)")
con.execute("insert into live select hex(randomblob(500)) from (values (1), (2), (3))")
if sys.argv[1] == "delete":
    con.execute("pragma cache_size = 2")
    con.execute("begin")
    con.execute("update live set x = 'changed'")
    con.execute("insert into live select hex(randomblob(900)) from live a, live b, live c, live d")
print("ready", flush=True)
time.sleep(60)
"""


def listing(directory: Path) -> dict[str, tuple[int, int, int, str]]:
    """Every file: its inode, size, date and content."""
    files = {}
    for path in sorted(directory.iterdir()):
        status = path.stat()
        files[path.name] = (status.st_ino, status.st_size, status.st_mtime_ns, file_digest(path))
    return files


@pytest.fixture
def home(tmp_path: Path) -> Path:
    directory = tmp_path / "home"
    directory.mkdir()
    return directory


@pytest.fixture(params=["wal", "delete"])
def primary(home: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A directory with a real app.db: with -wal and -shm in use, or with the hot journal of a killed writer."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, request.param], cwd=home, stdout=subprocess.PIPE, env=python_env()
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        if request.param == "delete":
            writer.send_signal(signal.SIGKILL)
            writer.wait()
            assert {path.name for path in home.iterdir()} == {"app.db", "app.db-journal"}
            assert is_hot(home / "app.db-journal")
        else:
            assert {path.name for path in home.iterdir()} == {"app.db", "app.db-wal", "app.db-shm"}
            assert (home / "app.db-wal").stat().st_size > 0
        yield home
        writer.kill()


def is_hot(journal: Path) -> bool:
    return journal.read_bytes()[:8] == bytes.fromhex("d9d505f920a163d7") and journal.stat().st_size > 512


@pytest.mark.parametrize("action", ACTIONS)
def test_nothing_of_a_real_database_of_that_name_is_touched(
    primary: Path, social: tuple[Path, str], tmp_path: Path, action: str
) -> None:
    before = listing(primary)
    done = run_python(
        READER, social[1], str(tmp_path / "copy.db"), action, cwd=primary, env={"LITESTREAM_REPLICA_URL": social[1]}
    )
    assert done.stdout == "300\n"
    assert listing(primary) == before
    assert (tmp_path / "copy.db").exists() == (action == "vacuum")


def test_a_hot_journal_still_rolls_back_afterwards(home: Path, social: tuple[Path, str], tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, "delete"], cwd=home, stdout=subprocess.PIPE, env=python_env()
    ) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        writer.kill()
    run_python(
        READER, social[1], str(tmp_path / "copy.db"), "open", cwd=home, env={"LITESTREAM_REPLICA_URL": social[1]}
    )
    with closing(sqlite3.connect(home / "app.db")) as con:
        assert con.execute("SELECT count(*) FROM live WHERE length(x) = 1000").fetchone() == (3,)
        assert_intact(con)


# -- a path that is wiped and holds another history --


def build_history(path: Path, table: str, word: str, rows: int = 3000) -> Path:
    """Two histories have the same schema cookie, the same root pages, and other tables in them."""
    with closing(sqlite3.connect(path, isolation_level=None)) as con:
        con.execute("PRAGMA journal_mode = wal")
        con.execute(f"CREATE TABLE {table}(id INTEGER PRIMARY KEY, word TEXT)")
        con.execute("BEGIN")
        con.executemany(
            f"INSERT INTO {table} VALUES (?, ?)", ((i, f"{word} {os.urandom(100).hex()}") for i in range(rows))
        )
        con.execute("COMMIT")
    return path


def write(path: Path, table: str, writer: Litestream, times: int) -> int:
    with closing(sqlite3.connect(path, isolation_level=None)) as con:
        for number in range(times):
            con.execute(f"UPDATE {table} SET word = word || '!' WHERE id = ?", (number,))
            txid = writer.wait_synced()
    return txid


@pytest.mark.slow
@pytest.mark.parametrize("hydrate", [False, True])
@pytest.mark.parametrize("ahead", [False, True], ids=["from 1", "grown beyond"])
def test_a_new_history_at_the_path_is_an_error_until_reopened(
    litestream: Path, tmp_path: Path, file_replica_dir: Path, hydrate: bool, ahead: bool
) -> None:
    """`grown beyond`: nobody polls before the new history has a file with the TXID that we wait for next."""
    old = build_history(tmp_path / "old.db", "old", "ours")
    new = build_history(tmp_path / "new.db", "new", "theirs")
    url = file_url(file_replica_dir)
    with replicating(old, file_replica_dir, sync_interval="20ms") as writer:
        ours = write(old, "old", writer, 2)
    options = {"hydrate": hydrate, "poll_interval": 60 if ahead else 0.05}
    with open_replica(url, **options) as db, open_replica(url, **options) as pinned:
        statement = "SELECT count(*), min(substr(word, 1, 5)), max(substr(word, 1, 5)) FROM old"
        assert list(db.execute(statement)) == [(3000, "ours ", "ours ")]
        pinned.execute("BEGIN")
        assert one(pinned, "SELECT count(*) FROM old WHERE id < 10") == 10
        shutil.rmtree(file_replica_dir)
        with replicating(new, file_replica_dir, sync_interval="20ms") as writer:
            theirs = write(new, "new", writer, 4 if ahead else 1)
            assert theirs > ours if ahead else theirs <= ours
            if ahead:
                lazyreplica.refresh(db)
            with pytest.raises(apsw.CantOpenError, match="open it again") as caught:
                eventually(lambda: list(db.execute(statement)) != [(3000, "ours ", "ours ")])
            assert isinstance(caught.value, LineageChanged)
            # what a transaction has pinned it keeps, or loses with an error
            try:
                assert list(pinned.execute(statement)) == [(3000, "ours ", "ours ")]
            except apsw.BusyError as exc:
                assert exc.extendedresult == apsw.SQLITE_BUSY_SNAPSHOT
            pinned.execute("ROLLBACK")
            for connection in (db, pinned):
                with pytest.raises(LineageChanged):
                    connection.execute(statement)
            # a new connection reads it at once, beside the old ones
            with open_replica(url, **options) as reopened:
                assert txid_of(reopened) == theirs
                assert list(reopened.execute(statement.replace("FROM old", "FROM new"))) == [(3000, "their", "their")]
                assert_intact(reopened)
                with pytest.raises(LineageChanged):
                    db.execute(statement)
                following = write(new, "new", writer, 1)
                lazyreplica.wait_for(reopened, following)
                assert one(reopened, "SELECT word FROM new WHERE id = 0").endswith("!!")


def test_an_emptied_path_keeps_the_open_view(litestream: Path, tmp_path: Path, file_replica_dir: Path) -> None:
    """Nothing there is not another history: what is local goes on, and the error of what is not says so."""
    replicate_once(build_history(tmp_path / "old.db", "old", "ours"), file_replica_dir)
    with open_replica(file_url(file_replica_dir), hydrate=True) as db:
        eventually(lambda: one(db, "PRAGMA litestream_hydration_progress") == "100.0")
        shutil.rmtree(file_replica_dir / "ltx")
        lazyreplica.refresh(db)
        assert one(db, "SELECT count(*) FROM old") == 3000
        assert_intact(db)
