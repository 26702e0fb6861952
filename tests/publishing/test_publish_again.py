"""Publishing again: TXIDs continue, open connections follow, nothing is written without a change."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import BinaryIO

import apsw
import pytest

import lazyreplica
from lazyreplica.errors import LineageChanged, PublishRefused, StoreError
from lazyreplica.ltx import FileName
from lazyreplica.publish import NOTE
from lazyreplica.storage.local import LocalStore
from support.data import build_social, build_varied
from support.databases import assert_intact, file_digest
from support.litestream import replicate_once, restore


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "replica"


@pytest.fixture
def url(target: Path) -> str:
    return f"file://{target}"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make(tmp_path / "source.db", "first")


def make(path: Path, word: str, table: str = "t", extra: str = "") -> Path:
    """A database of one table with one row; those made alike have equal schema cookies."""
    with closing(sqlite3.connect(path, isolation_level=None)) as con:
        con.execute(f"CREATE TABLE {table}(a TEXT{extra})")
        con.execute(f"INSERT INTO {table}(a) VALUES (?)", (word,))
    return path


def change(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as con:
        for statement in statements:
            con.execute(statement)


@contextlib.contextmanager
def opened(url: str, **options: object) -> Iterator[apsw.Connection]:
    connection = lazyreplica.connect(url, **options)
    try:
        yield connection
    finally:
        connection.close()


def files(target: Path) -> list[str]:
    return sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file())


def snapshots(*txids: int) -> list[str]:
    return [NOTE, *(f"ltx/9/{FileName(1, txid)}" for txid in txids)]


def word(connection: apsw.Connection) -> object:
    return connection.execute("SELECT a FROM t").get


def test_txids_continue(litestream: Path, source: Path, target: Path, url: str, tmp_path: Path) -> None:
    for txid in (1, 2, 3):
        assert lazyreplica.publish(source, url).txid == txid
        change(source, f"UPDATE t SET a = 'after {txid}'")
    assert files(target) == sorted(snapshots(1, 2, 3))
    with opened(url) as connection:
        assert word(connection) == "after 2"
        assert connection.pragma("litestream_txid") == f"{3:016x}"
    with closing(sqlite3.connect(restore(url, tmp_path / "out.db"))) as con:
        assert con.execute("SELECT a FROM t").fetchall() == [("after 2",)]


@pytest.mark.parametrize("journal_mode", ["wal", "delete"])
def test_an_unchanged_database_writes_nothing(tmp_path: Path, target: Path, url: str, journal_mode: str) -> None:
    source = build_varied(tmp_path / "varied.db", journal_mode=journal_mode, rows=20)
    first = lazyreplica.publish(source, url)
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in target.rglob("*")}
    for _ in range(3):
        again = lazyreplica.publish(source, url)
        assert (again.txid, again.changed, again.size, again.pages) == (first.txid, False, 0, first.pages)
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in target.rglob("*")} == before
    # moved into the database file by a checkpoint, but the same
    change(source, "PRAGMA wal_checkpoint(TRUNCATE)")
    assert not lazyreplica.publish(source, url).changed
    change(source, "PRAGMA user_version = 5")
    assert lazyreplica.publish(source, url).txid == 2


def test_what_came_and_went_again_is_published(source: Path, url: str) -> None:
    lazyreplica.publish(source, url)
    change(source, "UPDATE t SET a = 'second'")
    assert lazyreplica.publish(source, url).txid == 2
    change(source, "UPDATE t SET a = 'first'")
    assert lazyreplica.publish(source, url).txid == 3


@pytest.mark.parametrize("hydrate", [False, True])
def test_an_open_connection_follows(source: Path, url: str, hydrate: bool) -> None:
    lazyreplica.publish(source, url)
    with opened(url, hydrate=hydrate, poll_interval=0) as connection:
        for txid in (2, 3, 4, 5):
            change(source, f"UPDATE t SET a = 'number {txid}'")
            lazyreplica.publish(source, url)
            assert lazyreplica.refresh(connection) == f"{txid:016x}"
            assert word(connection) == f"number {txid}"


@pytest.mark.slow
def test_an_open_connection_follows_by_itself(source: Path, url: str) -> None:
    """Within ten seconds: nothing but a listing shows a publication, and that is how often one is asked for."""
    lazyreplica.publish(source, url)
    with opened(url, poll_interval=0.2) as connection:
        time.sleep(1)  # past the first two misses, after which the follower lists anyway
        change(source, "UPDATE t SET a = 'second'")
        lazyreplica.wait_for(connection, lazyreplica.publish(source, url).txid, 15)
        assert word(connection) == "second"


def test_a_read_transaction_stays_where_it_is(source: Path, url: str) -> None:
    lazyreplica.publish(source, url)
    with opened(url, poll_interval=0) as connection:
        connection.execute("BEGIN")
        assert word(connection) == "first"
        change(source, "UPDATE t SET a = 'second'", "ALTER TABLE t ADD COLUMN b")
        lazyreplica.publish(source, url)
        lazyreplica.refresh(connection)
        assert connection.execute("SELECT * FROM t").fetchall() == [("first",)]
        connection.execute("COMMIT")
        assert connection.execute("SELECT * FROM t").fetchall() == [("second", None)]


def test_an_open_connection_follows_a_changed_schema(source: Path, url: str) -> None:
    lazyreplica.publish(source, url)
    with opened(url, poll_interval=0) as connection:
        assert connection.execute("SELECT * FROM t").fetchall() == [("first",)]
        change(
            source, "ALTER TABLE t RENAME COLUMN a TO b", "ALTER TABLE t ADD COLUMN c DEFAULT 7", "CREATE TABLE u(x)"
        )
        lazyreplica.publish(source, url)
        lazyreplica.refresh(connection)
        assert connection.execute("SELECT * FROM t").fetchall() == [("first", 7)]
        assert connection.execute("SELECT b, c FROM t").fetchall() == [("first", 7)]
        assert connection.execute("SELECT count(*) FROM u").get == 0
        change(source, "DROP TABLE u")
        lazyreplica.publish(source, url)
        lazyreplica.refresh(connection)
        with pytest.raises(apsw.SQLError, match="no such table"):
            connection.execute("SELECT * FROM u")


@pytest.mark.parametrize("hydrate", [False, True])
def test_another_database_with_an_equal_schema_cookie_shows_no_stale_schema(
    tmp_path: Path, source: Path, url: str, hydrate: bool
) -> None:
    other = make(tmp_path / "other.db", "theirs", table="other")
    third = make(tmp_path / "third.db", "third", extra=", b TEXT DEFAULT 'b'")
    cookies = set()
    for path in (source, other, third):
        with closing(sqlite3.connect(path)) as con:
            cookies.add(con.execute("PRAGMA schema_version").fetchone())
    assert len(cookies) == 1
    lazyreplica.publish(source, url)
    with opened(url, hydrate=hydrate, poll_interval=0) as connection:
        assert word(connection) == "first"
        lazyreplica.publish(other, url)
        lazyreplica.refresh(connection)
        with pytest.raises(apsw.SQLError, match="no such table: t"):
            word(connection)
        assert connection.execute("SELECT a FROM other").get == "theirs"
        lazyreplica.publish(third, url)
        lazyreplica.refresh(connection)
        assert connection.execute("SELECT * FROM t").fetchall() == [("third", "b")]
        with pytest.raises(apsw.SQLError, match="no such table: other"):
            connection.execute("SELECT a FROM other")
        assert_intact(connection)


def test_another_page_size_is_followed_or_asks_to_reopen(tmp_path: Path, source: Path, url: str) -> None:
    """`VACUUM` can change it: an open connection must not stay behind for ever without an error."""
    lazyreplica.publish(source, url)
    with opened(url, poll_interval=0) as connection:
        assert word(connection) == "first"
        change(source, "PRAGMA page_size = 8192", "VACUUM", "UPDATE t SET a = 'second'")
        lazyreplica.publish(source, url)
        lazyreplica.refresh(connection)
        with contextlib.suppress(LineageChanged):
            assert word(connection) == "second"
    with opened(url) as connection:
        assert word(connection) == "second"


def test_the_hydrated_copy_follows(litestream: Path, tmp_path: Path, url: str) -> None:
    source = build_social(tmp_path / "social.db", posts=500, users=50, likes=100)
    lazyreplica.publish(source, url)
    with opened(url, hydrate=True, poll_interval=0) as connection:
        for number, statement in enumerate(
            ("UPDATE posts SET title = 'x' WHERE id % 7 = 0", "DELETE FROM posts WHERE id > 50", "VACUUM"), 2
        ):
            change(source, statement)
            lazyreplica.publish(source, url)
            assert lazyreplica.refresh(connection) == f"{number:016x}"
            deadline = time.monotonic() + 10
            while float(connection.pragma("litestream_hydration_progress")) < 100:
                assert time.monotonic() < deadline
                time.sleep(0.005)
            copy = tmp_path / "exported.db"
            assert lazyreplica.export(connection, copy) == f"{number:016x}"
            assert file_digest(copy) == file_digest(restore(url, tmp_path / f"{number}.db"))
            assert_intact(connection)


def test_old_publications_may_be_removed(source: Path, target: Path, url: str) -> None:
    """By a bucket's lifecycle rule, for example: the newest is enough, and TXIDs go on."""
    for number in range(3):
        change(source, f"UPDATE t SET a = '{number}'")
        lazyreplica.publish(source, url)
    for txid in (1, 2):
        (target / "ltx" / "9" / str(FileName(1, txid))).unlink()
    assert not lazyreplica.publish(source, url).changed
    change(source, "UPDATE t SET a = 'new'")
    assert lazyreplica.publish(source, url).txid == 4


def test_when_every_publication_was_removed_txids_are_not_used_again(source: Path, target: Path, url: str) -> None:
    """The note remembers the last one: an open reader must not meet an old TXID with other content."""
    for number in range(3):
        change(source, f"UPDATE t SET a = '{number}'")
        lazyreplica.publish(source, url)
    for path in (target / "ltx" / "9").iterdir():
        path.unlink()
    published = lazyreplica.publish(source, url)
    assert published.changed and published.txid > 3


# -- cut short --


def test_a_crash_between_note_and_file_leaves_a_path_that_can_be_published_to(
    litestream: Path, source: Path, url: str, target: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def crash(*_: object) -> None:
        raise StoreError("the power went out")

    last = 0
    for round_number in range(3):
        before = [name for name in files(target) if name != NOTE] if target.exists() else []
        with monkeypatch.context() as patch:
            patch.setattr(LocalStore, "put", crash)
            for _ in range(2):
                with pytest.raises(StoreError, match="power"):
                    lazyreplica.publish(source, url)
        assert [name for name in files(target) if name != NOTE] == before
        published = lazyreplica.publish(source, url)
        assert published.changed and published.txid > last
        last = published.txid
        with opened(url) as connection:
            assert connection.execute("SELECT count(*) FROM t").get == 1
        with closing(sqlite3.connect(restore(url, tmp_path / f"{round_number}.db"))) as con:
            assert_intact(con)
        change(source, f"UPDATE t SET a = 'round {round_number}'")


def test_a_crash_before_the_note_leaves_nothing(
    source: Path, url: str, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        raise StoreError("the power went out")

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "write_note", crash)
        with pytest.raises(StoreError, match="power"):
            lazyreplica.publish(source, url)
    assert files(target) == []
    assert lazyreplica.publish(source, url).txid == 1


def test_a_crash_after_the_file_does_not_publish_it_twice(
    source: Path, url: str, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = LocalStore.put

    def crash(self: LocalStore, level: int, name: FileName, file: BinaryIO, size: int, at: float, left: float) -> None:
        whole(self, level, name, file, size, at, left)
        raise StoreError("the reply was lost")

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "put", crash)
        with pytest.raises(StoreError, match="reply"):
            lazyreplica.publish(source, url)
    again = lazyreplica.publish(source, url)
    assert (again.txid, again.changed) == (1, False)


def test_nothing_is_left_in_the_temporary_directory(
    source: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    lazyreplica.publish(source, url)
    monkeypatch.setattr(LocalStore, "put", lambda *_: 1 / 0)
    change(source, "UPDATE t SET a = 'x'")
    with pytest.raises(ZeroDivisionError):
        lazyreplica.publish(source, url)
    assert list((tmp_path / "tmp").iterdir()) == []


# -- refused --


def refuse(source: Path, url: str, target: Path, *mentions: str) -> None:
    before = {name: (target / name).read_bytes() for name in files(target)}
    with pytest.raises(PublishRefused) as caught:
        lazyreplica.publish(source, url)
    assert str(target) in str(caught.value) and "empty path" in str(caught.value)
    for mention in mentions:
        assert mention in str(caught.value)
    assert {name: (target / name).read_bytes() for name in files(target)} == before


def test_a_path_that_litestream_writes_is_refused(litestream: Path, source: Path, url: str, target: Path) -> None:
    replicate_once(source, target)
    refuse(source, url, target, "Litestream", str(FileName(1, 1)))


@pytest.mark.parametrize("place", [(0, 1, 1), (0, 5, 5), (1, 1, 4), (9, 1, 9)])
def test_a_path_with_a_file_made_by_hand_is_refused(
    source: Path, url: str, target: Path, place: tuple[int, int, int]
) -> None:
    path = target / "ltx" / str(place[0]) / str(FileName(*place[1:]))
    path.parent.mkdir(parents=True)
    path.write_bytes(b"anything")
    refuse(source, url, target, path.name)


def test_a_litestream_03_backup_is_refused(source: Path, url: str, target: Path) -> None:
    (target / "generations" / "0123").mkdir(parents=True)
    (target / "generations" / "0123" / "x").write_text("x")
    refuse(source, url, target, "0.3", "generations")
    (target / NOTE).write_text(json.dumps({"format": 1, "txid": f"{0:016x}", "digest": ""}))
    refuse(source, url, target, "generations")


@pytest.mark.parametrize("place", [(0, 1, 1), (0, 2, 2), (1, 1, 1), (9, 2, 2), (9, 1, 2), (9, 1, 500)])
def test_a_foreign_file_beside_our_own_is_refused(
    source: Path, url: str, target: Path, place: tuple[int, int, int]
) -> None:
    lazyreplica.publish(source, url)
    path = target / "ltx" / str(place[0]) / str(FileName(*place[1:]))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"anything")
    change(source, "UPDATE t SET a = 'second'")
    refuse(source, url, target, path.name)


def test_litestream_at_work_on_a_published_path_is_noticed(
    litestream: Path, source: Path, url: str, target: Path
) -> None:
    lazyreplica.publish(source, url)
    change(source, "PRAGMA journal_mode = wal", "UPDATE t SET a = 'second'")
    replicate_once(source, target)
    change(source, "UPDATE t SET a = 'third'")
    refuse(source, url, target, "something else writes there")


@pytest.mark.parametrize(
    "note",
    [
        b"",
        b"hello",
        b"\xff\xfe",
        b"null",
        b"[]",
        b"{}",
        b'"text"',
        b"[" * 100_000,
        b'{"format": 2, "txid": "0000000000000001", "digest": "x"}',
        b'{"format": 1, "txid": "xyz", "digest": "x"}',
        b'{"format": 1, "txid": 7, "digest": "x"}',
        b'{"format": 1, "txid": "-1", "digest": "x"}',
        b'{"format": 1, "digest": "x"}',
        b'{"format": 1, "txid": "0000000000000001"}',
    ],
    ids=lambda note: repr(note[:60]),
)
def test_a_note_that_cannot_be_read_is_refused(source: Path, url: str, target: Path, note: bytes) -> None:
    lazyreplica.publish(source, url)
    (target / NOTE).write_bytes(note)
    change(source, "UPDATE t SET a = 'second'")
    refuse(source, url, target)


def test_a_note_that_is_absurdly_long_is_an_error(source: Path, url: str, target: Path) -> None:
    lazyreplica.publish(source, url)
    (target / NOTE).write_bytes(bytes(2 << 20))
    with pytest.raises(StoreError, match=NOTE):
        lazyreplica.publish(source, url)


def test_a_lost_note_is_refused(source: Path, url: str, target: Path) -> None:
    lazyreplica.publish(source, url)
    (target / NOTE).unlink()
    refuse(source, url, target)


def test_other_files_beside_a_publication_are_left_alone(source: Path, url: str, target: Path) -> None:
    lazyreplica.publish(source, url)
    (target / "readme.txt").write_text("hello")
    change(source, "UPDATE t SET a = 'second'")
    assert lazyreplica.publish(source, url).txid == 2
    assert (target / "readme.txt").read_text() == "hello"
