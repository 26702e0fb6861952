"""`publish` writes one committed state, which `litestream restore` and a reader through the VFS see alike."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

import apsw
import pytest

import lazyreplica
from lazyreplica.errors import ConfigError, StoreError
from lazyreplica.ltx import decode_file
from lazyreplica.publish import Published
from lazyreplica.storage import s3
from support.bank import bank_writer, build_bank, check_bank
from support.data import build_social, build_varied
from support.databases import assert_intact, assert_same_files, assert_same_rows, file_digest
from support.litestream import restore
from support.servers import S3Server

HEADER_FIELDS = ("schema_version", "user_version", "application_id", "auto_vacuum", "page_size", "encoding")


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file://{tmp_path}/replica"


@contextlib.contextmanager
def opened(url: str, **options: object) -> Iterator[apsw.Connection]:
    connection = lazyreplica.connect(url, **options)
    try:
        yield connection
    finally:
        connection.close()


def hydrated(connection: apsw.Connection, timeout: float = 60) -> Path:
    """The local copy, once every page is there."""
    deadline = time.monotonic() + timeout
    while float(connection.pragma("litestream_hydration_progress")) < 100:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return Path(str(connection.pragma("litestream_hydration_file")))


def pragmas(con: sqlite3.Connection | apsw.Connection) -> dict[str, object]:
    return {name: next(iter(con.execute(f"PRAGMA {name}")))[0] for name in HEADER_FIELDS}


def check(url: str, source: Path, tmp_path: Path, env: dict[str, str] | None = None) -> Path:
    """Restore with the real Litestream and hydrate: the same bytes, and the source's rows. The restored file."""
    out = tmp_path / "restored.db"
    out.unlink(missing_ok=True)
    restore(url, out, env=env)
    with opened(url, hydrate=True, poll_interval=0) as connection:
        with closing(sqlite3.connect(source)) as con:
            assert assert_same_rows(con, connection) > 0
            assert pragmas(connection) == pragmas(con)
        assert_intact(connection)
        assert file_digest(hydrated(connection)) == file_digest(out)
        assert connection.pragma("journal_mode") == "delete"
    copy = tmp_path / "restored copy.db"  # opening a database in WAL mode may write to it
    shutil.copy(out, copy)
    assert assert_same_files(copy, source) > 0
    return out


@pytest.mark.parametrize("journal_mode", ["wal", "delete", "truncate", "persist", "memory"])
def test_every_journal_mode(litestream: Path, tmp_path: Path, url: str, journal_mode: str) -> None:
    source = build_varied(tmp_path / "source.db", journal_mode=journal_mode, rows=30)
    published = lazyreplica.publish(source, url)
    assert published.txid == 1 and published.changed
    restored = check(url, source, tmp_path)
    assert restored.stat().st_size == published.pages * 4096
    assert published.size == (tmp_path / "replica" / "ltx" / "9" / f"{1:016x}-{1:016x}.ltx").stat().st_size


@pytest.mark.parametrize("page_size", [512, 1024, 2048, 8192, 16384, 32768, 65536])
def test_every_page_size(litestream: Path, tmp_path: Path, url: str, page_size: int) -> None:
    source = build_varied(tmp_path / "source.db", page_size=page_size, rows=20)
    lazyreplica.publish(source, url)
    check(url, source, tmp_path)


@pytest.mark.parametrize("auto_vacuum", [1, 2])
def test_auto_vacuum(litestream: Path, tmp_path: Path, url: str, auto_vacuum: int) -> None:
    source = tmp_path / "source.db"
    with closing(sqlite3.connect(source, isolation_level=None)) as con:
        con.execute(f"PRAGMA auto_vacuum = {auto_vacuum}")
        con.execute("CREATE TABLE t(a)")
        con.execute(
            "WITH RECURSIVE n(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n WHERE i < 500) "
            "INSERT INTO t SELECT zeroblob(i) FROM n"
        )
        con.execute("DELETE FROM t WHERE length(a) % 2")
    lazyreplica.publish(source, url)
    check(url, source, tmp_path)


def test_the_headers_fields_are_kept(litestream: Path, tmp_path: Path, url: str) -> None:
    source = tmp_path / "source.db"
    with closing(sqlite3.connect(source, isolation_level=None)) as con:
        con.execute("PRAGMA encoding = 'UTF-16le'")
        con.execute("PRAGMA user_version = -7")
        con.execute("PRAGMA application_id = 252006674")
        for number in range(20):
            con.execute(f"CREATE TABLE t{number}(a)")
            con.execute(f"INSERT INTO t{number} VALUES ('grüße')")
        con.execute("DROP TABLE t3")
        con.execute("PRAGMA schema_version = 987654321")
    lazyreplica.publish(source, url)
    restored = check(url, source, tmp_path)
    with closing(sqlite3.connect(restored)) as con:
        assert pragmas(con) | {"schema_version": 987654321, "user_version": -7} == pragmas(con)
        assert con.execute("PRAGMA application_id").fetchone() == (252006674,)


def test_a_source_is_not_changed(tmp_path: Path, url: str) -> None:
    source = build_varied(tmp_path / "source.db", rows=20)
    with closing(sqlite3.connect(source)) as con:
        con.execute("PRAGMA journal_mode = delete")
    before = file_digest(source)
    lazyreplica.publish(source, url)
    assert file_digest(source) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["replica", "source.db"]


def test_what_lies_in_the_wal_is_published(litestream: Path, tmp_path: Path, url: str) -> None:
    source = build_varied(tmp_path / "source.db", rows=20)
    with closing(sqlite3.connect(source, isolation_level=None)) as con:
        con.execute("PRAGMA wal_autocheckpoint = 0")
        con.execute("INSERT INTO blobs VALUES (77, x'77')")
        assert Path(f"{source}-wal").stat().st_size > 0
        lazyreplica.publish(source, url)
        with opened(url) as connection:
            assert connection.execute("SELECT hex(data) FROM blobs WHERE id = 77").get == "77"
        check(url, source, tmp_path)


@pytest.mark.parametrize("journal_mode", ["wal", "delete"])
def test_an_open_transaction_of_a_writer_is_not_published(tmp_path: Path, url: str, journal_mode: str) -> None:
    source = build_bank(tmp_path / "bank.db", accounts=50, journal_mode=journal_mode)
    script = (
        "import sqlite3, sys\n"
        "con = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "con.execute('BEGIN IMMEDIATE')\n"
        "con.execute('UPDATE accounts SET balance = 0')\n"
        "print('ready', flush=True); sys.stdin.read(); con.execute('ROLLBACK')\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(source)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        lazyreplica.publish(source, url)
        writer.communicate(timeout=20)
    with opened(url) as connection:
        assert check_bank(connection).accounts == 50


@pytest.mark.slow
@pytest.mark.parametrize("journal_mode", ["wal", "delete"])
def test_beside_a_busy_writer_every_publication_is_one_committed_state(
    litestream: Path, tmp_path: Path, url: str, journal_mode: str
) -> None:
    source = build_bank(tmp_path / "bank.db", accounts=5000, journal_mode=journal_mode)
    seen = []
    rate = None if journal_mode == "wal" else 100
    lazyreplica.publish(source, url)
    with (
        bank_writer(source, rate=rate, delete_every=0.4, vacuum_every=1.1 if journal_mode == "wal" else None) as writer,
        opened(url, hydrate=True) as follower,
    ):
        deadline = time.monotonic() + 60
        for number in count():
            published = lazyreplica.publish(source, url)
            assert lazyreplica.refresh(follower) == f"{published.txid:016x}"
            with follower:
                seen.append(check_bank(follower).n)
            if number % 3 == 0:
                with closing(sqlite3.connect(restore(url, tmp_path / f"{number}.db"))) as con:
                    assert check_bank(con).n == seen[-1]
            # A writer gets on as fast as the machine lets it.
            if number >= 7 and (len(set(seen)) > 4 or time.monotonic() > deadline):
                break
        writer.stop()
        assert seen == sorted(seen) and len(set(seen)) > 4
        lazyreplica.publish(source, url)
    # with the follower gone: connections of one process share a replica, and its head
    check(url, source, tmp_path)


@pytest.mark.slow
def test_a_database_beyond_the_lock_page(litestream: Path, tmp_path: Path, url: str) -> None:
    source = tmp_path / "large.db"
    with closing(sqlite3.connect(source, isolation_level=None)) as con:
        con.execute("PRAGMA page_size = 65536")
        con.execute("PRAGMA journal_mode = OFF")
        con.execute("PRAGMA synchronous = OFF")
        con.execute("CREATE TABLE t(id INTEGER PRIMARY KEY, data BLOB)")
        for number in range(11):
            con.execute("INSERT INTO t VALUES (?, zeroblob(100000000))", (number,))
        con.execute("INSERT INTO t VALUES (100, 'the end')")
    published = lazyreplica.publish(source, url)
    assert published.pages > 16386
    out = restore(url, tmp_path / "restored.db")
    with opened(url, hydrate=True, hydrate_max="4GiB", poll_interval=0) as connection:
        assert connection.execute("SELECT data FROM t WHERE id = 100").get == "the end"
        assert file_digest(hydrated(connection)) == file_digest(out)
        assert connection.execute("SELECT count(*), sum(length(data)) FROM t").get == (12, 1_100_000_007)
        assert_intact(connection)
    with closing(sqlite3.connect(out)) as con:
        assert con.execute("SELECT data FROM t WHERE id = 100").fetchone() == ("the end",)
        assert_intact(con)


def to_server(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    bucket = server.new_bucket()
    url = server.url(bucket, "a b/ü")
    source = build_social(tmp_path / "source.db", posts=300, users=50, likes=100)
    lazyreplica.publish(source, url)
    check(url, source, tmp_path, env=server.env)
    assert server.keys(bucket) == [f"a b/ü/0009/{1:016x}-{1:016x}.ltx", "a b/ü/lazyreplica-publish.json"]
    with closing(sqlite3.connect(source)) as con, con:
        con.execute("UPDATE users SET bio = 'new'")
    assert lazyreplica.publish(source, url).txid == 2
    assert not lazyreplica.publish(source, url).changed
    check(url, source, tmp_path, env=server.env)


def test_to_rclone(litestream: Path, rclone: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    to_server(rclone, tmp_path, monkeypatch)


@pytest.mark.slow
def test_to_seaweed(litestream: Path, seaweed: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    to_server(seaweed, tmp_path, monkeypatch)


@pytest.mark.slow
def test_to_seaweed_in_parts(
    litestream: Path, seaweed: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = s3.S3Store
    limit = {"multipart_threshold": 5 << 20}  # S3's smallest part
    monkeypatch.setattr(s3, "S3Store", lambda *arguments: store(*arguments, **limit))
    for name, value in seaweed.env.items():
        monkeypatch.setenv(name, value)
    bucket = seaweed.new_bucket()
    url = seaweed.url(bucket, "app")
    source = build_social(tmp_path / "source.db", posts=60_000, users=2000, likes=20_000)
    assert lazyreplica.publish(source, url).size > 10 << 20
    (entry,) = [e for e in seaweed.client().list_objects_v2(Bucket=bucket)["Contents"] if e["Key"].endswith(".ltx")]
    assert entry["ETag"].strip('"').endswith(("-3", "-2", "-4"))
    check(url, source, tmp_path, env=seaweed.env)


def test_the_file_says_when_it_was_written(tmp_path: Path, url: str) -> None:
    source = build_varied(tmp_path / "source.db", rows=10)
    before = time.time()
    lazyreplica.publish(source, url)
    path = tmp_path / "replica" / "ltx" / "9" / f"{1:016x}-{1:016x}.ltx"
    header = decode_file(path.read_bytes()).header
    assert before - 0.002 <= header.timestamp_ms / 1000 <= time.time()
    # Litestream takes a local file's date for its timestamp
    assert abs(path.stat().st_mtime - header.timestamp_ms / 1000) < 0.002
    with opened(url) as connection:
        assert str(connection.pragma("litestream_time")).endswith("Z")
        assert connection.pragma("litestream_txid") == f"{1:016x}"


def test_restore_to_a_time_finds_the_publication_of_that_time(litestream: Path, tmp_path: Path, url: str) -> None:
    source = tmp_path / "source.db"
    with closing(sqlite3.connect(source, isolation_level=None)) as con:
        con.execute("CREATE TABLE t(a)")
        con.execute("INSERT INTO t VALUES (1)")
        lazyreplica.publish(source, url)
        time.sleep(0.05)
        between = datetime.now(UTC)
        time.sleep(0.05)
        con.execute("INSERT INTO t VALUES (2)")
        lazyreplica.publish(source, url)
    with closing(sqlite3.connect(restore(url, tmp_path / "out.db", timestamp=between))) as con:
        assert con.execute("SELECT * FROM t").fetchall() == [(1,)]
    with closing(sqlite3.connect(restore(url, tmp_path / "first.db", txid=1))) as con:
        assert con.execute("SELECT * FROM t").fetchall() == [(1,)]


def test_progress_ends_at_everything(tmp_path: Path, url: str) -> None:
    source = build_social(tmp_path / "source.db", posts=3000, page_size=512)
    calls: list[tuple[int, int]] = []
    published = lazyreplica.publish(source, url, lambda done, total: calls.append((done, total)))
    assert len(calls) > 3
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert {total for _, total in calls} == {published.pages}
    assert calls[-1] == (published.pages, published.pages)


def test_a_progress_callback_that_fails_stops_publishing(tmp_path: Path, url: str) -> None:
    source = build_varied(tmp_path / "source.db", rows=10)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lazyreplica.publish(source, url, stop)
    assert not list((tmp_path / "replica").rglob("*.ltx"))
    assert lazyreplica.publish(source, url).txid == 1


# -- what cannot be published --


def refused(source: Path, url: str) -> str:
    started = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        lazyreplica.publish(source, url)
    assert time.monotonic() - started < 5
    assert str(source) in str(caught.value)
    assert not list(Path(url.removeprefix("file://")).rglob("*.ltx"))
    return str(caught.value)


def test_a_missing_file(tmp_path: Path, url: str) -> None:
    assert "not a file" in refused(tmp_path / "nowhere.db", url)
    assert not (tmp_path / "nowhere.db").exists()


def test_a_directory(tmp_path: Path, url: str) -> None:
    assert "not a file" in refused(tmp_path, url)


def test_a_file_of_no_bytes_is_an_empty_database(litestream: Path, tmp_path: Path, url: str) -> None:
    """SQLite says so; the publication has one page, because LTX has no word for none."""
    (tmp_path / "empty.db").touch()
    assert lazyreplica.publish(tmp_path / "empty.db", url).pages == 1
    with opened(url) as connection:
        assert connection.execute("SELECT count(*) FROM sqlite_schema").get == 0
    with closing(sqlite3.connect(restore(url, tmp_path / "out.db"))) as con:
        assert_intact(con)
    assert (tmp_path / "empty.db").stat().st_size == 0


@pytest.mark.parametrize("content", [b"hello", b"x" * 10_000, b"LTX1" + bytes(5000), bytes(8192)])
def test_a_file_that_is_no_database(tmp_path: Path, url: str, content: bytes) -> None:
    (tmp_path / "other").write_bytes(content)
    refused(tmp_path / "other", url)
    assert (tmp_path / "other").read_bytes() == content


def test_a_database_that_was_cut(tmp_path: Path, url: str) -> None:
    source = build_varied(tmp_path / "source.db", rows=50, journal_mode="delete")
    whole = source.read_bytes()
    for length in (50, 99, 100, 512, 1000, 4095):
        (tmp_path / "cut.db").write_bytes(whole[:length])
        refused(tmp_path / "cut.db", url)


def test_a_database_whose_schema_is_garbage(tmp_path: Path, url: str) -> None:
    source = build_varied(tmp_path / "source.db", rows=50, journal_mode="delete")
    damaged = bytearray(source.read_bytes())
    damaged[100:4096] = b"\xff" * 3996
    source.write_bytes(damaged)
    refused(source, url)


def test_rows_that_break_a_constraint_are_no_damage(litestream: Path, tmp_path: Path, url: str) -> None:
    """`quick_check` complains of them, but SQLite and Litestream take them as they are."""
    source = tmp_path / "source.db"
    with closing(sqlite3.connect(source, isolation_level=None)) as con:
        con.execute("CREATE TABLE t(a INT CHECK (a > 0), b TEXT NOT NULL DEFAULT 'x')")
        con.execute("PRAGMA ignore_check_constraints = ON")
        con.execute("INSERT INTO t VALUES (-1, 'b')")
        con.execute("CREATE TABLE u(a)")
        con.execute("INSERT INTO u VALUES (NULL)")
        con.execute("PRAGMA writable_schema = ON")
        con.execute("UPDATE sqlite_schema SET sql = 'CREATE TABLE u(a NOT NULL)' WHERE name = 'u'")
    lazyreplica.publish(source, url)
    with opened(url) as connection:
        assert connection.execute("SELECT * FROM t").fetchall() == [(-1, "b")]
        assert connection.execute("SELECT * FROM u").fetchall() == [(None,)]


def test_a_database_that_stays_locked_is_an_error(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = build_varied(tmp_path / "source.db", rows=10, journal_mode="delete")
    original = apsw.Connection.set_busy_timeout

    class Impatient(apsw.Connection):
        def set_busy_timeout(self, milliseconds: int) -> None:
            original(self, 50)

    monkeypatch.setattr(apsw, "Connection", Impatient)
    script = (
        "import sqlite3, sys\n"
        "con = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "con.execute('BEGIN EXCLUSIVE'); print('ready', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(source)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        assert "locked" in refused(source, url)
        writer.communicate(timeout=20)


def test_a_hot_journal_is_rolled_back_first(tmp_path: Path, url: str) -> None:
    source = build_bank(tmp_path / "bank.db", accounts=200, journal_mode="delete")
    script = (
        "import os, sqlite3, sys\n"
        "con = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "con.execute('PRAGMA cache_size = 2'); con.execute('BEGIN')\n"
        "con.execute('UPDATE accounts SET balance = 0, owner = hex(randomblob(40))')\n"
        "os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(source)], check=False)
    assert Path(f"{source}-journal").stat().st_size > 0
    lazyreplica.publish(source, url)
    with opened(url) as connection:
        check_bank(connection)
        assert_intact(connection)


@pytest.mark.parametrize("below", ["source.db", "source.db/below", "source.db/far/below"])
def test_a_target_that_cannot_be_a_directory(tmp_path: Path, below: str) -> None:
    source = build_varied(tmp_path / "source.db", rows=10, journal_mode="delete")
    before = file_digest(source)
    with pytest.raises(StoreError) as caught:
        lazyreplica.publish(source, f"file://{tmp_path}/{below}")
    assert below in str(caught.value)
    assert file_digest(source) == before


def test_names_that_sqlite_could_take_for_something_else(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("a b%20c?mode=memory#x.db", "ümläut.db", "file:other.db", ":memory:"), 1):
        with closing(sqlite3.connect(tmp_path / "plain.db", isolation_level=None)) as con:
            con.execute("PRAGMA journal_mode = delete")
            con.execute("DROP TABLE IF EXISTS t")
            con.execute("CREATE TABLE t(a)")
            con.execute("INSERT INTO t VALUES (?)", (name,))
        Path("plain.db").rename(name)
        published = lazyreplica.publish(name, url)
        assert published.txid == number
        with opened(url) as connection:
            assert connection.execute("SELECT a FROM t").get == name
    assert isinstance(published, Published)
