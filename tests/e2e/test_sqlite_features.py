"""What SQLite and APSW can do with a read-only database, they can do with a replica."""

from __future__ import annotations

import multiprocessing
import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import apsw
import pytest
from e2e_helpers import (
    DEFAULT_FLAGS,
    POLL,
    file_url,
    one,
    open_replica,
    open_uri,
    run_python,
    txid_of,
    uri,
    wait_hydrated,
)

import lazyreplica
from lazyreplica.errors import ConfigError, LazyReplicaError, WaitTimeout
from support.bank import bank_writer, build_bank
from support.data import build_social
from support.databases import assert_intact, assert_same_rows
from support.litestream import Litestream, replicate_once, replicating
from support.waiting import eventually

POSTS = "SELECT count(*) FROM posts"


@pytest.fixture
def live(litestream: Path, tmp_path: Path, file_replica_dir: Path) -> Iterator[tuple[sqlite3.Connection, Litestream]]:
    """A primary to write to, and its Litestream."""
    path = build_social(tmp_path / "live.db", posts=500)
    with (
        replicating(path, file_replica_dir, sync_interval="20ms") as writer,
        closing(sqlite3.connect(path, isolation_level=None)) as con,
    ):
        writer.wait_synced()
        yield con, writer


def write(live: tuple[sqlite3.Connection, Litestream]) -> int:
    """One more transaction; returns its TXID."""
    con, writer = live
    con.execute("INSERT INTO users(name) SELECT 'more' || (max(id) + 1) FROM users")
    return writer.wait_synced()


# -- opening --


def test_the_one_liner_works_as_the_readme_has_it(social: tuple[Path, str], tmp_path: Path) -> None:
    script = """
import apsw, lazyreplica
db = apsw.Connection("file:app.db?vfs=litestream")      # LITESTREAM_REPLICA_URL=s3://bucket/app
print(db.execute("select count(*) from users").get)
"""
    done = run_python(script, cwd=tmp_path, env={"LITESTREAM_REPLICA_URL": social[1]})
    assert (done.stdout, done.stderr) == ("300\n", "")
    assert list(tmp_path.iterdir()) == []


def test_a_late_import_warns_and_works_with_the_uri_flag(social: tuple[Path, str], tmp_path: Path) -> None:
    script = """
import apsw
early = apsw.Connection(":memory:")
import lazyreplica
db = apsw.Connection("file:app.db?vfs=litestream", flags=apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI)
print(db.execute("select count(*) from users").get, early.execute("select 1").get)
"""
    done = run_python(script, cwd=tmp_path, env={"LITESTREAM_REPLICA_URL": social[1]})
    assert done.stdout == "300 1\n"
    assert "import lazyreplica first" in done.stderr and "SQLITE_OPEN_URI" in done.stderr


def test_uri_names_can_be_left_off(social: tuple[Path, str], tmp_path: Path) -> None:
    script = """
import apsw, lazyreplica
apsw.Connection("file:plain?vfs=litestream").execute("create table t(x)")
db = apsw.Connection("file:app.db?vfs=litestream", flags=apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI)
print(db.execute("select count(*) from users").get)
"""
    env = {"LITESTREAM_REPLICA_URL": social[1], "LAZYREPLICA_NO_URI": "1"}
    done = run_python(script, cwd=tmp_path, env=env)
    assert (done.stdout, done.stderr) == ("300\n", "")
    assert [path.name for path in tmp_path.iterdir()] == ["file:plain?vfs=litestream"]


def test_the_users_default_vfs_stays_the_default(social: tuple[Path, str], tmp_path: Path) -> None:
    script = """
import apsw
class Mine(apsw.VFS):
    def __init__(self):
        super().__init__("mine", base="unix", makedefault=True)
mine = Mine()
import lazyreplica
print(apsw.vfs_names()[0])
apsw.Connection("local.db").execute("create table t(x)")
print(apsw.Connection("file:app.db?vfs=litestream").execute("select count(*) from users").get)
apsw.set_default_vfs("unix-none")
"""
    done = run_python(script, cwd=tmp_path, env={"LITESTREAM_REPLICA_URL": social[1]})
    assert (done.stdout, done.stderr) == ("mine\n300\n", "")
    assert (tmp_path / "local.db").stat().st_size > 0


def test_apsw_best_practice_applies(social: tuple[Path, str], tmp_path: Path) -> None:
    script = """
import logging; logging.basicConfig()
import apsw, apsw.bestpractice
import lazyreplica
apsw.bestpractice.apply(apsw.bestpractice.recommended)
db = apsw.Connection("file:app.db?vfs=litestream")
print(db.execute("select count(*) from users").get, db.pragma("foreign_keys"), db.pragma("integrity_check"))
try:
    db.execute('select "no such column"')
except apsw.SQLError as exc:
    print(exc)
"""
    done = run_python(script, cwd=tmp_path, env={"LITESTREAM_REPLICA_URL": social[1]})
    assert done.stdout.startswith("300 1 ok\nno such column")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_uri_wins_over_configure_and_configure_over_the_environment(
    social: tuple[Path, str], varied: tuple[Path, str], file_url_: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LITESTREAM_REPLICA_URL", social[1])
    with open_uri("file:precedence.db?vfs=litestream") as db:
        assert one(db, POSTS) == 3000
    lazyreplica.configure("precedence.db", varied[1], hydrate=False)
    with open_uri("file:precedence.db?vfs=litestream") as db:
        assert one(db, "SELECT count(*) FROM dictionary") == 400
    with open_uri(uri(social[1], "precedence.db")) as db:
        assert one(db, POSTS) == 3000
    with open_uri("file:other.db?vfs=litestream") as db:
        assert one(db, POSTS) == 3000
    # a configured name is meant, whatever its URI lacks
    with closing(apsw.Connection("precedence.db", flags=apsw.SQLITE_OPEN_READONLY, vfs="litestream")) as db:
        assert one(db, "SELECT count(*) FROM dictionary") == 400


def test_options_come_from_uri_keyword_and_environment(
    social: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = social[1]
    monkeypatch.setenv("LITESTREAM_HYDRATION_ENABLED", "true")
    monkeypatch.setenv("LITESTREAM_HYDRATION_PATH", str(tmp_path / "from environment.db"))
    with open_uri(uri(url)) as db:
        assert wait_hydrated(db) == tmp_path / "from environment.db"
    with open_uri(uri(url, hydration_path=tmp_path / "a&b=c%20d.db")) as db:
        assert wait_hydrated(db) == tmp_path / "a&b=c%20d.db"
    with closing(lazyreplica.connect(url, hydration_path=tmp_path / "keyword.db")) as db:
        assert wait_hydrated(db) == tmp_path / "keyword.db"
    with closing(lazyreplica.connect(url, hydrate=False)) as db:
        assert one(db, "PRAGMA litestream_hydration_file") == ""
    names = ("a&b=c%20d.db", "from environment.db", "keyword.db")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted((*names, *(f"{name}.d" for name in names)))


def test_an_unknown_option_is_an_error_that_lists_them(social: tuple[Path, str]) -> None:
    with pytest.raises(ConfigError, match="'hydrat' is not an option; options are hydrate,"):
        lazyreplica.connect(social[1], hydrat=True)
    with pytest.raises(ConfigError, match="'hydrat' is not an option; options are hydrate,"):
        lazyreplica.configure("app.db", social[1], hydrat=True)
    with pytest.raises(apsw.CantOpenError, match="poll_interval is 'soon'") as caught:
        apsw.Connection(uri(social[1], poll_interval="soon"), flags=DEFAULT_FLAGS)
    assert isinstance(caught.value, ConfigError)


def test_without_any_replica_the_error_names_the_ways_to_name_one() -> None:
    with pytest.raises(apsw.CantOpenError, match=r"LITESTREAM_REPLICA_URL.*configure.*replica_url=") as caught:
        apsw.Connection("file:nobody.db?vfs=litestream", flags=DEFAULT_FLAGS)
    assert isinstance(caught.value, ConfigError)


def test_several_databases_live_in_one_process(social: tuple[Path, str], varied: tuple[Path, str]) -> None:
    with open_replica(social[1]) as a, open_replica(varied[1]) as b:
        assert one(a, POSTS) == 3000
        assert one(b, "SELECT count(*) FROM notes") == 400
        assert_intact(a)
        assert_intact(b)


# -- read-only --


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO users(name) VALUES ('x')",
        "UPDATE users SET name = name WHERE id = 1",
        "DELETE FROM likes",
        "CREATE TABLE t(x)",
        "CREATE INDEX i ON users(bio)",
        "DROP TABLE likes",
        "ALTER TABLE users ADD COLUMN x",
        "PRAGMA user_version = 7",
        "BEGIN IMMEDIATE; DELETE FROM likes",
        "BEGIN EXCLUSIVE; DELETE FROM likes",
        "VACUUM",
        "REINDEX",
    ],
)
@pytest.mark.parametrize("flags", [DEFAULT_FLAGS, apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI])
def test_writes_are_refused(social: tuple[Path, str], sql: str, flags: int) -> None:
    with open_uri(uri(social[1]), flags) as db:
        assert db.readonly("main")
        with pytest.raises(apsw.ReadOnlyError):
            db.execute(sql)
        if db.in_transaction:
            db.execute("ROLLBACK")
        assert one(db, POSTS) == 3000
        assert one(db, "PRAGMA user_version") == 0


def test_begin_immediate_is_a_read_transaction(live: tuple[sqlite3.Connection, Litestream], file_url_: str) -> None:
    """SQLite's own rule for read-only databases; the view starts at once, not at the first read."""
    with open_replica(file_url_) as db:
        db.execute("BEGIN IMMEDIATE")
        before = txid_of(db)
        assert write(live) > before
        lazyreplica.refresh(db)
        assert one(db, "SELECT litestream_txid()") == f"{before:016x}"
        db.execute("COMMIT")
        assert txid_of(db) > before


def test_temp_tables_ctes_and_window_functions_work(social: tuple[Path, str]) -> None:
    db_path, url = social
    queries = [
        "WITH RECURSIVE n(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n WHERE i < 20) SELECT i, title FROM n"
        " JOIN posts ON posts.id = n.i",
        "SELECT id, row_number() OVER (PARTITION BY user_id ORDER BY created DESC, id) FROM posts ORDER BY id",
    ]
    with open_replica(url) as db, closing(sqlite3.connect(f"file:{db_path}?mode=ro", uri=True)) as source:
        for sql in queries:
            assert list(db.execute(sql)) == list(source.execute(sql))
        db.execute("CREATE TEMP TABLE top AS SELECT user_id, count(*) AS n FROM posts GROUP BY 1")
        db.execute("CREATE INDEX temp.top_n ON top(n)")
        db.execute("BEGIN; UPDATE top SET n = n + 1; SAVEPOINT s; DELETE FROM top; ROLLBACK TO s; COMMIT")
        assert one(db, "SELECT sum(n) - count(*) FROM top") == 3000


# -- several databases on one connection --


def test_two_replicas_join(social: tuple[Path, str], varied: tuple[Path, str]) -> None:
    with open_replica(social[1]) as db:
        db.execute("ATTACH ? AS other", (uri(varied[1], hydrate=False, poll_interval=POLL),))
        sql = "SELECT count(*) FROM main.users, (SELECT count(*) AS n FROM other.dictionary) WHERE n = 400"
        assert one(db, sql) == 300
        assert one(db, "PRAGMA other.litestream_txid") == one(db, "SELECT litestream_txid('other')")
        assert list(db.execute("PRAGMA other.integrity_check")) == [("ok",)]
        with pytest.raises(apsw.ReadOnlyError):
            db.execute("INSERT INTO other.dictionary VALUES ('a', 'b', 'c')")
        db.execute("DETACH other")
        assert one(db, POSTS) == 3000


@pytest.mark.slow
def test_one_replica_attached_twice_is_seen_at_one_transaction(
    litestream: Path, tmp_path: Path, file_replica_dir: Path
) -> None:
    bank = build_bank(tmp_path / "bank.db")
    url = file_url(file_replica_dir)
    with replicating(bank, file_replica_dir, sync_interval="20ms") as writer:
        writer.wait_synced()
        with open_replica(url, poll_interval=0.005) as db, bank_writer(bank):
            db.execute("ATTACH ? AS twin", (uri(url, "twin.db", hydrate=False, poll_interval=0.005),))
            seen = set()
            deadline = time.monotonic() + 1
            while time.monotonic() < deadline:
                db.execute("BEGIN")
                ours = one(db, "SELECT n FROM main.pulse")
                time.sleep(0.02)
                assert one(db, "SELECT n FROM twin.pulse") == ours
                assert txid_of(db) == txid_of(db, "twin")
                db.execute("COMMIT")
                assert one(db, "SELECT a.n = b.n FROM twin.pulse AS a, main.pulse AS b") == 1
                seen.add(ours)
    assert len(seen) > 5


def test_a_local_file_can_be_attached_and_written(social: tuple[Path, str], tmp_path: Path) -> None:
    with open_uri(uri(social[1])) as db:
        db.execute("ATTACH ? AS here", (f"file:{tmp_path}/local.db?vfs=unix",))
        db.execute("CREATE TABLE here.names AS SELECT name FROM main.users")
        db.execute("BEGIN; DELETE FROM here.names WHERE name > 'user000100'; COMMIT")
        assert one(db, "PRAGMA here.journal_mode = wal") == "wal"
        db.execute("INSERT INTO here.names SELECT title FROM main.posts LIMIT 5")
    with closing(sqlite3.connect(tmp_path / "local.db")) as local:
        assert local.execute("SELECT count(*) FROM names").fetchone() == (105,)


def test_a_plain_attach_is_refused_with_the_fix(
    social: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LITESTREAM_REPLICA_URL", social[1])
    with open_uri("file:app.db?vfs=litestream") as db:
        for sql in ("ATTACH 'x.db' AS x", "ATTACH 'file:x.db' AS x", "VACUUM INTO 'x.db'"):
            with pytest.raises(apsw.CantOpenError, match=r"file:x\.db\?vfs=unix") as caught:
                db.execute(sql)
            assert isinstance(caught.value, ConfigError)
        assert one(db, POSTS) == 3000
    assert list(tmp_path.iterdir()) == []


def test_vacuum_into_a_local_file_copies_every_row(varied: tuple[Path, str], tmp_path: Path) -> None:
    for number, flags in enumerate((DEFAULT_FLAGS, apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI)):
        copy = tmp_path / f"copy{number}.db"
        with open_uri(uri(varied[1]), flags) as db:
            db.execute("VACUUM INTO ?", (f"file:{copy}?vfs=unix",))
            with closing(sqlite3.connect(copy)) as local:
                assert_intact(local)
                assert assert_same_rows(local, db) > 1000
    assert {path.name for path in tmp_path.iterdir()} == {"copy0.db", "copy1.db"}


def test_backup_and_serialize_copy_every_row(varied: tuple[Path, str], tmp_path: Path) -> None:
    with open_replica(varied[1]) as db:
        for target in (apsw.Connection(str(tmp_path / "copy.db")), apsw.Connection(":memory:")):
            with closing(target):
                with target.backup("main", db, "main") as backup:
                    while not backup.done:
                        backup.step(50)
                assert_intact(target)
                assert assert_same_rows(target, db) > 1000
        with closing(apsw.Connection(":memory:")) as copy:
            copy.deserialize("main", db.serialize("main"))
            assert_intact(copy)
            assert assert_same_rows(copy, db) > 1000


# -- modes --


@pytest.mark.parametrize("mode", ["immutable=1", "nolock=1", "immutable=on&mode=ro"])
def test_a_connection_without_locks_keeps_the_view_of_its_open(
    live: tuple[sqlite3.Connection, Litestream], file_url_: str, mode: str
) -> None:
    with open_replica(file_url_) as following, open_uri(uri(file_url_) + "&" + mode) as fixed:
        before = one(fixed, "SELECT count(*) FROM users"), txid_of(fixed)
        lazyreplica.wait_for(following, write(live))
        assert one(following, "SELECT count(*) FROM users") == before[0] + 1
        assert (one(fixed, "SELECT count(*) FROM users"), txid_of(fixed)) == before
        assert_intact(fixed)


def test_mode_ro_opens(social: tuple[Path, str]) -> None:
    with open_uri(uri(social[1]) + "&mode=ro") as db:
        assert one(db, POSTS) == 3000


def test_pragmas_of_other_storage_do_no_harm(live: tuple[sqlite3.Connection, Litestream], file_url_: str) -> None:
    with open_replica(file_url_) as db:
        assert one(db, "PRAGMA journal_mode = wal") == "delete"
        assert one(db, "PRAGMA locking_mode = exclusive") == "exclusive"
        users = one(db, "SELECT count(*) FROM users")
        txid = write(live)
        lazyreplica.wait_for(db, txid)
        assert one(db, "SELECT count(*) FROM users") == users  # SQLite never unlocks in this mode
        assert one(db, "PRAGMA locking_mode = normal") == "normal"
        one(db, "SELECT count(*) FROM users")
        assert one(db, "SELECT count(*) FROM users") == users + 1
        for pragma in ("mmap_size = 100000000", "cache_spill = 5", "synchronous = full", "wal_checkpoint", "optimize"):
            db.execute(f"PRAGMA {pragma}")
        assert one(db, "SELECT count(*) FROM users") == users + 1
        assert_intact(db)


# -- pragmas and functions --


def test_pragmas_and_functions_tell_about_the_replica(
    live: tuple[sqlite3.Connection, Litestream], file_url_: str
) -> None:
    with open_replica(file_url_) as db:
        txid = write(live)
        lazyreplica.wait_for(db, txid)
        assert one(db, "PRAGMA litestream_txid") == f"{txid:016x}" == one(db, "SELECT litestream_txid()")
        assert one(db, "PRAGMA main.LITESTREAM_TXID") == one(db, "SELECT litestream_txid('main')") == f"{txid:016x}"
        moment = one(db, "PRAGMA litestream_time")
        assert moment == one(db, "SELECT litestream_time()")
        assert abs(time.time() - one(db, "SELECT unixepoch(?)", (moment,))) < 60
        assert 0 <= float(one(db, "PRAGMA litestream_lag")) < 5
        assert 0 <= one(db, "SELECT litestream_lag()") < 5
        assert one(db, "PRAGMA litestream_hydration_progress") == "0.0"
        # inside a transaction they speak of what it sees
        db.execute("BEGIN")
        one(db, POSTS)
        newer = write(live)
        lazyreplica.wait_for(db, newer)
        assert txid_of(db) == int(one(db, "SELECT litestream_txid()"), 16) == txid
        db.execute("COMMIT")
        assert txid_of(db) == newer


def test_pragmas_cannot_be_set(social: tuple[Path, str]) -> None:
    with open_replica(social[1]) as db:
        before = txid_of(db)
        for sql in (
            "PRAGMA litestream_lag = 1",
            "PRAGMA litestream_hydration_progress('2024-01-01')",
            "EXPLAIN PRAGMA litestream_lag=1",
        ):
            with pytest.raises(apsw.SQLError, match="can only be read"):
                db.execute(sql)
        list(db.execute("EXPLAIN PRAGMA litestream_txid"))
        assert txid_of(db) == before
        assert list(db.execute("PRAGMA litestream_no_such_thing")) == []


def test_functions_on_other_databases_say_what_is_wrong(social: tuple[Path, str]) -> None:
    with closing(apsw.Connection(":memory:")) as plain:
        with pytest.raises(apsw.SQLError, match="not a replica"):
            plain.execute("SELECT litestream_txid()")
        with pytest.raises(ConfigError, match="not a replica"):
            lazyreplica.refresh(plain)
    with open_replica(social[1]) as db:
        for sql in ("SELECT litestream_txid('nope')", "SELECT litestream_txid('main', 2)"):
            with pytest.raises(apsw.SQLError, match=r"no database named 'nope'|at most one argument"):
                db.execute(sql)


# -- following --


def test_wait_for_reads_your_writes_and_times_out(live: tuple[sqlite3.Connection, Litestream], file_url_: str) -> None:
    with open_replica(file_url_, poll_interval=30) as db:
        for _ in range(3):
            users = one(db, "SELECT count(*) FROM users")
            txid = write(live)
            lazyreplica.wait_for(db, f"{txid:016x}", timeout=5)
            assert one(db, "SELECT count(*) FROM users") == users + 1
        start = time.monotonic()
        with pytest.raises(WaitTimeout, match=f"waiting for {txid + 1:016x}"):
            lazyreplica.wait_for(db, txid + 1, timeout=0.3)
        assert 0.3 <= time.monotonic() - start < 5
        lazyreplica.wait_for(db, txid, timeout=0)


def test_a_fixed_head_moves_only_when_asked(live: tuple[sqlite3.Connection, Litestream], file_url_: str) -> None:
    with open_replica(file_url_, poll_interval=0) as db, open_replica(file_url_) as same:
        users = one(db, "SELECT count(*) FROM users")
        txid = write(live)
        time.sleep(3 * POLL)
        assert one(db, "SELECT count(*) FROM users") == one(same, "SELECT count(*) FROM users") == users
        assert lazyreplica.refresh(db) == f"{txid:016x}"
        assert one(db, "SELECT count(*) FROM users") == users + 1


@pytest.mark.slow
def test_data_version_changes_exactly_with_the_txid(
    live: tuple[sqlite3.Connection, Litestream], file_url_: str
) -> None:
    with open_replica(file_url_) as db:
        for _ in range(3):
            version = one(db, "PRAGMA data_version")
            for _ in range(3):
                time.sleep(2 * POLL)
                assert one(db, "PRAGMA data_version") == version
            lazyreplica.wait_for(db, write(live))
            assert one(db, "PRAGMA data_version") != version


def test_sqlites_page_cache_survives_idle_polls_and_no_transaction(
    live: tuple[sqlite3.Connection, Litestream], file_url_: str
) -> None:
    def misses(db: apsw.Connection) -> int:
        return db.status(apsw.SQLITE_DBSTATUS_CACHE_MISS)[0]

    sql = "SELECT count(*), sum(length(body)) FROM posts"
    with open_replica(file_url_, poll_interval=0.02) as db:
        list(db.execute(sql))
        warm = misses(db)
        for _ in range(5):
            time.sleep(0.1)
            list(db.execute(sql))
        assert misses(db) == warm
        lazyreplica.wait_for(db, write(live))
        list(db.execute(sql))
        assert misses(db) > warm


# -- many at once --


def test_many_threads_with_a_connection_each_read_right_rows(social: tuple[Path, str]) -> None:
    db_path, url = social
    with closing(sqlite3.connect(f"file:{db_path}?mode=ro", uri=True)) as source:
        expected = list(source.execute("SELECT id, title FROM posts WHERE user_id % 7 = 3 ORDER BY created"))

    def read(_: int) -> bool:
        with open_replica(url, cache_size="100k") as db:
            db.execute("PRAGMA cache_size = 5")
            return all(
                list(db.execute("SELECT id, title FROM posts WHERE user_id % 7 = 3 ORDER BY created")) == expected
                for _ in range(2)
            )

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(read, range(32)))


def test_fifty_connections_share_one_replica(social: tuple[Path, str]) -> None:
    before = threading.active_count()
    with ExitStack() as stack:
        connections = [stack.enter_context(open_replica(social[1], hydrate=True)) for _ in range(50)]
        assert threading.active_count() <= before + 3, "one follows, one hydrates, one reads ahead"
        assert len({one(db, "PRAGMA litestream_hydration_file") for db in connections}) == 1
        assert {one(db, POSTS) for db in connections} == {3000}


def test_one_connection_may_move_between_threads(social: tuple[Path, str]) -> None:
    with open_replica(social[1]) as db, ThreadPoolExecutor(1) as pool:
        db.execute("BEGIN")
        assert one(db, POSTS) == pool.submit(one, db, POSTS).result() == 3000
        pool.submit(db.execute, "COMMIT").result()


def _in_child(inherited: apsw.Connection, url: str, answers: multiprocessing.SimpleQueue[object]) -> None:
    try:
        inherited.execute(POSTS).fetchall()
        answers.put("the inherited connection answered")
    except LazyReplicaError as exc:
        answers.put(str(exc))
    with open_replica(url, hydrate=True) as db:
        wait_hydrated(db)
        answers.put(one(db, POSTS))


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # Python 3.12: fork beside threads
@pytest.mark.parametrize("hydrate", [False, True])
def test_a_forked_child_opens_its_own(social: tuple[Path, str], hydrate: bool) -> None:
    fork = multiprocessing.get_context("fork")
    with open_replica(social[1], hydrate=hydrate) as db:
        if hydrate:
            local = wait_hydrated(db)
        answers = fork.SimpleQueue()
        child = fork.Process(target=_in_child, args=(db, social[1], answers))
        child.start()
        child.join(30)
        assert child.exitcode == 0
        assert "opened before this process was forked" in str(answers.get())
        assert answers.get() == 3000
        answers.close()
        child.close()
        # the parent goes on
        assert one(db, POSTS) == 3000
        assert not hydrate or (local.exists() and wait_hydrated(db) == local)
        lazyreplica.refresh(db)


def test_a_replica_reopens_after_its_last_connection(litestream: Path, tmp_path: Path, file_replica_dir: Path) -> None:
    replicate_once(build_social(tmp_path / "app.db", posts=500), file_replica_dir)
    for _ in range(20):
        with open_replica(file_url(file_replica_dir), hydrate=True) as db:
            assert one(db, POSTS) == 500
            local = Path(one(db, "PRAGMA litestream_hydration_file"))
            assert local.exists()
        eventually(lambda path=local: not path.exists())
