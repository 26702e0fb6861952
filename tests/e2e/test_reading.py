"""What the real Litestream wrote is read row for row, byte for byte."""

from __future__ import annotations

import contextlib
import sqlite3
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import apsw
import pytest
from e2e_helpers import file_url, one, open_replica, txid_of, wait_hydrated

import lazyreplica
from support.data import build_social, build_varied
from support.databases import assert_intact, assert_same_rows, file_digest
from support.litestream import replicate_once, replicating, restore
from support.servers import S3Server

PAGE_SIZES = [512, 1024, 2048, 4096, 8192, 16384, 32768, 65536]
QUICK_SIZES = [512, 65536]


@contextlib.contextmanager
def source(db: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(f"file:{db}?mode=ro", uri=True)) as con:
        yield con


def assert_reads_like(db: Path, url: str, **options: object) -> None:
    """Every row through one connection, with no more of SQLite's own page cache than it insists on."""
    with source(db) as con, open_replica(url, **options) as replica:
        replica.execute("PRAGMA cache_size = 1")
        assert assert_same_rows(con, replica) > 1000
        assert_intact(replica)


def assert_hydrates_like_restore(db: Path, url: str, out: Path, **restore_options: object) -> None:
    with source(db) as con, open_replica(url, hydrate=True) as replica:
        local = wait_hydrated(replica)
        txid = txid_of(replica)
        assert file_digest(local) == file_digest(restore(url, out, txid=txid, **restore_options))
        assert assert_same_rows(con, replica) > 1000
        assert_intact(replica)


def assert_reads_everywhere(server: S3Server, db: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    url = server.url(server.new_bucket(), "some path/app")
    replicate_once(db, url, env=server.env)
    assert_reads_like(db, url)
    assert_hydrates_like_restore(db, url, tmp_path / "restored.db", env=server.env)


def test_every_row_comes_from_local_files(social: tuple[Path, str], tmp_path: Path) -> None:
    assert_reads_like(*social)
    assert_hydrates_like_restore(*social, tmp_path / "restored.db")


def test_every_row_comes_without_any_page_cache(varied: tuple[Path, str]) -> None:
    assert_reads_like(*varied, cache_size=0)


def test_every_row_comes_from_rclone(
    litestream: Path, rclone: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_reads_everywhere(rclone, build_varied(tmp_path / "app.db"), tmp_path, monkeypatch)


@pytest.mark.slow
def test_every_row_comes_from_seaweed(
    litestream: Path, seaweed: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_reads_everywhere(seaweed, build_social(tmp_path / "app.db", posts=20_000), tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "page_size", [size if size in QUICK_SIZES else pytest.param(size, marks=pytest.mark.slow) for size in PAGE_SIZES]
)
def test_every_page_size_reads_and_hydrates(
    litestream: Path, tmp_path: Path, file_replica_dir: Path, page_size: int
) -> None:
    db = build_varied(tmp_path / "app.db", page_size=page_size)
    replicate_once(db, file_replica_dir)
    assert_reads_like(db, file_url(file_replica_dir))
    assert_hydrates_like_restore(db, file_url(file_replica_dir), tmp_path / "restored.db")


@pytest.mark.slow
@pytest.mark.parametrize("page_size", [512, 65536])
def test_extreme_page_sizes_read_and_hydrate_over_s3(
    litestream: Path, rclone: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page_size: int
) -> None:
    db = build_social(tmp_path / "app.db", page_size=page_size)
    assert_reads_everywhere(rclone, db, tmp_path, monkeypatch)


@pytest.mark.parametrize("journal_mode", ["wal", "delete"])
def test_a_chain_of_many_files_reads_and_hydrates(
    litestream: Path, tmp_path: Path, file_replica_dir: Path, journal_mode: str
) -> None:
    """Snapshot and increments, some pages in several files; Litestream turns a rollback journal into a WAL."""
    db = build_social(tmp_path / "app.db", posts=1500, journal_mode=journal_mode)
    with replicating(db, file_replica_dir, sync_interval="20ms") as writer, closing(sqlite3.connect(db)) as con:
        for number in range(4):
            writer.wait_synced()
            with con:
                con.execute("UPDATE posts SET title = title || ? WHERE id % 7 = ?", (f" {number}", number))
                con.execute("DELETE FROM likes WHERE id % 50 = ?", (number,))
        writer.wait_synced()
        assert len(writer.ltx_files()) >= 5
    assert_reads_like(db, file_url(file_replica_dir))
    assert_hydrates_like_restore(db, file_url(file_replica_dir), tmp_path / "restored.db")


@pytest.mark.parametrize("hydrate", [False, True])
def test_full_text_search_finds_what_the_source_finds(varied: tuple[Path, str], hydrate: bool) -> None:
    db, url = varied
    with source(db) as con, open_replica(url, hydrate=hydrate) as replica:
        if hydrate:
            wait_hydrated(replica)
        ((body,),) = con.execute("SELECT body FROM notes LIMIT 1")
        words = body.split()
        for query in (words[3], f'"{words[4]} {words[5]}"', f"title:{words[6]}", f"{words[3][:3]}* NOT {words[4]}"):
            sql = "SELECT rowid, snippet(notes, 1, '[', ']', '..', 5) FROM notes(?) ORDER BY rank, rowid"
            expected = list(con.execute(sql, (query,)))
            assert list(replica.execute(sql, (query,))) == expected
        assert len(expected) > 0


def test_without_rowid_tables_and_partial_indexes_answer_point_queries(varied: tuple[Path, str]) -> None:
    db, url = varied
    with source(db) as con, open_replica(url) as replica:
        for word, lang, meaning in con.execute("SELECT * FROM dictionary LIMIT 20"):
            found = replica.execute("SELECT meaning FROM dictionary WHERE word = ? AND lang = ?", (word, lang))
            assert list(found) == [(meaning,)]
        sql = "SELECT quote(d) FROM kinds WHERE a IS NOT NULL AND d = 'ÜMLÄUT \N{SNOWMAN}' OR d = '1E3'"
        assert list(replica.execute(sql)) == list(con.execute(sql))


def test_blobs_with_overflow_pages_are_read_in_parts(varied: tuple[Path, str]) -> None:
    db, url = varied
    with source(db) as con, open_replica(url, cache_size=0) as replica:
        for rowid, data in con.execute("SELECT id, data FROM blobs WHERE length(data) > 10000"):
            with replica.blob_open("main", "blobs", "data", rowid, False) as blob:
                assert blob.length() == len(data)
                for offset in range(len(data) - 100, -1, -9001):  # backwards: no read-ahead helps
                    blob.seek(offset)
                    assert blob.read(100) == data[offset : offset + 100]
        with pytest.raises(apsw.ReadOnlyError):
            replica.blob_open("main", "blobs", "data", 1000, True)


def test_a_sort_that_spills_uses_temporary_files_of_the_base_vfs(social: tuple[Path, str]) -> None:
    db, url = social
    sql = "SELECT id, body FROM posts ORDER BY substr(body, 17), id"
    before = nameless_files()
    with source(db) as con, open_replica(url) as replica:
        replica.execute("PRAGMA temp_store = file; PRAGMA cache_size = 10")
        rows = replica.execute(sql)
        first = next(rows)
        if Path("/proc/self/fd").exists():
            assert nameless_files() - before, "the sort was meant to spill"
        assert [first, *rows] == list(con.execute(sql))
        replica.execute("CREATE TEMP TABLE copies AS SELECT * FROM posts")
        assert one(replica, "SELECT count(*) FROM copies") == one(replica, "SELECT count(*) FROM main.posts")
    assert nameless_files() == before


def nameless_files() -> set[str]:
    """What this process has open and no directory shows: SQLite's files for sorts and TEMP tables among others."""
    found = set()
    for fd in Path("/proc/self/fd").glob("*"):
        with contextlib.suppress(OSError):  # the directory's own descriptor is gone by now
            target = str(fd.readlink())
            # Not the mappings of local copies that are closed, which go with the garbage collector.
            if target.endswith(" (deleted)") and not target.startswith(f"{tempfile.gettempdir()}/lazyreplica-"):
                found.add(target)
    return found


@pytest.fixture
def _threads_take_turns_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_threads_take_turns_often")
def test_the_hydrated_file_is_there_as_soon_as_progress_says_so(
    litestream: Path, tmp_path: Path, file_replica_dir: Path
) -> None:
    """Whoever waits for 100.0 may copy the file right then."""
    replicate_once(build_social(tmp_path / "app.db", posts=100, likes=100), file_replica_dir)
    for number in range(40):
        path = tmp_path / f"local{number}.db"
        with open_replica(file_url(file_replica_dir), hydrate=True, hydration_path=path) as replica:
            while one(replica, "PRAGMA litestream_hydration_progress") != "100.0":
                pass
            assert path.exists()


LOCK_BYTE = 1 << 30


def build_huge(path: Path) -> Path:
    """A little over 1 GiB of zeros, with something to read on both sides of the lock page."""
    with closing(sqlite3.connect(path, isolation_level=None)) as con:
        con.execute("PRAGMA page_size = 65536")
        con.execute("PRAGMA journal_mode = off")
        con.execute("PRAGMA synchronous = off")
        con.execute("CREATE TABLE rows(id INTEGER PRIMARY KEY, word TEXT, data BLOB)")
        con.executemany("INSERT INTO rows VALUES (?, 'before', NULL)", ((i,) for i in range(1, 501)))
        con.execute("INSERT INTO rows VALUES (1000, 'huge', zeroblob(900000000)), (1001, 'more', zeroblob(180000000))")
        con.execute("INSERT INTO rows SELECT id + 2000, 'after', randomblob(1000) FROM rows WHERE id <= 500")
        con.execute("CREATE INDEX rows_by_word ON rows(word)")
    assert path.stat().st_size > LOCK_BYTE + 65536
    return path


def assert_same_huge_rows(con: sqlite3.Connection, replica: apsw.Connection) -> None:
    for sql in (
        "SELECT word, count(*), min(id), max(id), sum(length(data)) FROM rows GROUP BY word",
        "SELECT id, data FROM rows WHERE id >= 2000",
    ):
        assert list(replica.execute(sql)) == list(con.execute(sql))


@pytest.fixture
def huge(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "huge.db"
    yield build_huge(path)
    path.unlink()


@pytest.mark.slow
def test_a_published_database_over_1_gib_is_read_past_the_lock_page(
    litestream: Path, file_replica_dir: Path, huge: Path
) -> None:
    lazyreplica.publish(huge, file_url(file_replica_dir))
    with open_replica(file_url(file_replica_dir)) as replica, source(huge) as con:
        assert_same_huge_rows(con, replica)
        assert_intact(replica)


@pytest.mark.slow
def test_a_database_over_1_gib_hydrates_as_litestream_restores_it(
    litestream: Path, tmp_path: Path, file_replica_dir: Path, huge: Path
) -> None:
    replicate_once(huge, file_replica_dir)
    with open_replica(file_url(file_replica_dir), hydrate=True, hydrate_max="2GiB") as replica, source(huge) as con:
        assert_same_huge_rows(con, replica)
        local = wait_hydrated(replica, timeout=120)
        restored = restore(file_replica_dir, tmp_path / "restored.db")
        assert file_digest(local) == file_digest(restored)
        restored.unlink()
        assert_same_huge_rows(con, replica)
    with open_replica(file_url(file_replica_dir), hydrate=None) as replica:
        assert one(replica, "PRAGMA litestream_hydration_file") == ""  # beyond hydrate_max's default
