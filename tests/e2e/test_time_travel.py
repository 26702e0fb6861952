"""The past through SQL, against ``litestream restore`` of the same moment."""

from __future__ import annotations

import contextlib
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import apsw
import pytest
from e2e_helpers import file_url, one, open_replica, open_uri, txid_of, uri, wait_hydrated

import lazyreplica
from lazyreplica.errors import ConfigError, LineageChanged, NoSuchState, ReplicaGap
from lazyreplica.ltx import Header
from support.data import text
from support.litestream import LitestreamError, ltx_files, replicate_once, replicating, restore
from support.waiting import eventually

SHOWN = ((18, 20), (24, 32), (40, 44), (92, 96))
"""What page 1 shows otherwise than it is stored: format versions, change counter and size, schema cookie."""


@dataclass(frozen=True)
class Past:
    """A replica that stands still, and what its files' headers say."""

    directory: Path
    url: str
    times: dict[int, int]
    """MaxTXID -> milliseconds, of every file."""

    @property
    def moments(self) -> list[int]:
        return sorted(self.times.values())


@pytest.fixture(scope="module")
def past(tmp_path_factory: pytest.TempPathFactory) -> Past:
    """Some 200 transactions, compacted every second and every three, several snapshots; part of level 0 is gone."""
    path = tmp_path_factory.mktemp("past")
    db = apsw.Connection(str(path / "app.db"))
    db.set_busy_timeout(5000)
    db.execute("pragma journal_mode = wal; create table t(id integer primary key, n, body)").fetchall()
    rng = random.Random(11)
    with replicating(
        path / "app.db",
        path / "replica",
        sync_interval="20ms",
        levels=("1s", "3s"),
        snapshot_interval="4s",
        snapshot_retention="1h",
        l0_retention="3s",
    ) as litestream:
        for n in range(200):
            with db:
                db.execute("insert into t(n, body) values(?, ?)", (n, text(rng, rng.randrange(3000))))
                db.execute("update t set n = -n where id % 13 = ?", (n % 13,))
                if n % 20 == 19:
                    db.execute("delete from t where id % 9 = ?", (n // 20 % 9,))
                if n in (60, 120):
                    db.execute(f"alter table t add column c{n} default {n}")
                    db.execute(f"create index i{n} on t(n)")
            time.sleep(0.045)
        litestream.wait_synced()
    db.close()
    times = {}
    for file in (path / "replica").glob("ltx/*/*.ltx"):
        header = Header.parse(file.read_bytes()[:100])
        times[header.max_txid] = min(times.get(header.max_txid, 1 << 62), header.timestamp_ms)
    return Past(path / "replica", file_url(path / "replica"), times)


@pytest.fixture
def now_and_then(past: Past) -> Iterator[tuple[apsw.Connection, str]]:
    """A connection, and a moment in the middle of the history."""
    with open_replica(past.url) as con:
        yield con, iso(past.moments[len(past.moments) // 2])


def iso(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def set_time(con: apsw.Connection, moment: str, schema: str = "main") -> None:
    con.execute(f"PRAGMA {schema}.litestream_time = '{moment}'").fetchall()


def image(data: bytes) -> bytes:
    """A database without what is shown otherwise."""
    page = bytearray(data)
    for start, end in SHOWN:
        page[start:end] = bytes(end - start)
    return bytes(page)


def rows_of(con: apsw.Connection) -> list[object]:
    return con.execute("select * from t order by id").fetchall() + con.execute("select n from t order by n").fetchall()


def restored_rows(path: Path) -> list[object]:
    con = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        return rows_of(con)
    finally:
        con.close()


@pytest.mark.slow
def test_every_moment_is_what_restore_gives(past: Past, tmp_path: Path) -> None:
    rng = random.Random(5)
    moments = sorted({ms + step for ms in past.moments for step in (-1, 0, 1)})
    chosen = {*rng.sample(moments, 45), *moments[:2], *(rng.randrange(moments[0], moments[-1]) for _ in range(10))}
    chosen.discard(moments[-1])
    refused = 0
    with open_replica(past.url) as con:
        for ms in rng.sample(sorted(chosen), len(chosen)):
            out = tmp_path / "out.db"
            out.unlink(missing_ok=True)
            try:
                restore(past.directory, out, timestamp=iso(ms))
            except LitestreamError:
                refused += 1
                with pytest.raises(NoSuchState, match=f"begins at .*{iso(min(past.moments))[:10]}.* and ends at"):
                    set_time(con, iso(ms))
                continue
            set_time(con, iso(ms))
            assert rows_of(con) == restored_rows(out), iso(ms)
            assert image(con.serialize("main")) == image(out.read_bytes()), iso(ms)
            assert one(con, "pragma integrity_check") == "ok"
            assert past.times[txid_of(con)] < ms
        assert 0 < refused < 20
        # Restore refuses what lies beyond its newest file; it is the newest state, if it is not the future.
        set_time(con, iso(moments[-1]))
        assert txid_of(con) == max(past.times)


@pytest.mark.slow
def test_every_txid_is_what_restore_gives(past: Past, tmp_path: Path) -> None:
    newest = max(past.times)
    inside = 0
    with open_replica(past.url) as con:
        for txid in [*random.Random(6).sample(range(1, newest), 25), newest]:
            out = tmp_path / "out.db"
            out.unlink(missing_ok=True)
            try:
                restore(past.directory, out, txid=txid)
            except LitestreamError:
                inside += 1
                with pytest.raises(NoSuchState, match=r"(nearest|oldest): [0-9a-f]{16}"):
                    con.execute(f"pragma litestream_txid = '{txid:016x}'")
                continue
            con.execute(f"pragma litestream_txid = '{txid:016x}'").fetchall()
            assert txid_of(con) == txid
            assert rows_of(con) == restored_rows(out)
            assert image(con.serialize("main")) == image(out.read_bytes())
        assert 0 < inside < 25
        with pytest.raises(NoSuchState, match=f"newest: {newest:016x}"):
            con.execute(f"pragma litestream_txid = '{newest + 1:016x}'")


@pytest.mark.slow
def test_the_range_is_named_when_a_moment_is_outside(now_and_then: tuple[apsw.Connection, str]) -> None:
    con, _ = now_and_then
    with pytest.raises(NoSuchState, match=r"begins at 20..-.*TXID [0-9a-f]{16}\) and ends at 20..-.*TXID"):
        set_time(con, "1999-12-31")
    with pytest.raises(NoSuchState, match="in the future: it is 20"):
        set_time(con, iso(int(time.time() * 1000) + 3_600_000))
    with pytest.raises(ConfigError, match="expected a time"):
        set_time(con, "lately")
    with pytest.raises(apsw.SQLError, match="can only be read"):
        con.execute("pragma litestream_lag = 3")
    assert one(con, "select count(*) from t") == one(con, "select count(*) from t")


@pytest.mark.slow
def test_what_is_set_reads_back_and_others_are_unaffected(past: Past) -> None:
    with open_replica(past.url) as con, open_replica(past.url) as other, open_replica(past.url) as third:
        newest, moments = txid_of(con), past.moments
        early, late = iso(moments[len(moments) // 3]), iso(moments[2 * len(moments) // 3])
        everything = rows_of(con)
        set_time(con, early)
        set_time(other, late)
        for reader, moment in ((con, early), (other, late)):
            assert one(reader, "pragma litestream_time") == one(reader, "select litestream_time()") < moment
            assert one(reader, "pragma litestream_txid") == one(reader, "select litestream_txid()")
        assert txid_of(con) < txid_of(other) < newest == txid_of(third)
        assert rows_of(third) == everything
        assert len(rows_of(con)[0]) <= len(rows_of(other)[0])  # type: ignore[arg-type]  # columns were added
        assert rows_of(con) != rows_of(other) != everything
        lazyreplica.refresh(con)  # polls; the view stays
        assert txid_of(con) < newest
        assert int(one(con, "pragma litestream_txid = latest"), 16) == newest
        assert one(other, "select litestream_set_time('LATEST', 'main')") == one(third, "pragma litestream_time")
        assert rows_of(con) == rows_of(other) == everything
        assert one(con, f"select litestream_set_time('{early}')") < early
        assert txid_of(con) < newest


@pytest.mark.slow
def test_time_stands_while_the_connection_reads(now_and_then: tuple[apsw.Connection, str]) -> None:
    con, then = now_and_then
    newest = txid_of(con)
    cursor = con.execute("select * from t")
    next(cursor)
    for statement in (
        f"pragma litestream_time = '{then}'",
        "pragma litestream_time = latest",
        f"pragma litestream_txid = '{newest:016x}'",
        f"select litestream_set_time('{then}')",
    ):
        with pytest.raises(ConfigError, match=r"while this connection reads.*COMMIT"):
            con.execute(statement).fetchall()
    cursor.close()
    con.execute("begin; select 1 from t limit 1").fetchall()
    with pytest.raises(apsw.SQLError, match="while this connection reads"):
        set_time(con, then)
    con.execute("commit")
    with pytest.raises(ConfigError, match="while this connection reads"):
        con.execute(f"select litestream_set_time('{then}') from t").fetchall()
    assert txid_of(con) == newest
    con.execute("begin")  # takes no lock before it reads
    set_time(con, then)
    assert txid_of(con) < newest
    assert one(con, "select count(*) from t")
    con.execute("commit")


@pytest.mark.slow
def test_only_a_statement_that_runs_sets_the_time(now_and_then: tuple[apsw.Connection, str]) -> None:
    con, then = now_and_then
    newest = txid_of(con)
    for statement in (
        f"explain pragma litestream_time = '{then}'",
        f"explain query plan pragma litestream_time = '{then}'",
        f"/* pragma */ EXPLAIN pragma main.litestream_time('{then}')",
        f"explain select litestream_set_time('{then}')",
    ):
        con.execute(statement).fetchall()
        assert txid_of(con) == newest
        assert one(con, "select count(*) from t")
        assert txid_of(con) == newest
    con.exec_trace = lambda *_: False  # prepared, and not run
    with pytest.raises(apsw.ExecTraceAbort):
        set_time(con, then)
    con.exec_trace = None
    assert one(con, "select count(*) from t") and txid_of(con) == newest
    seen: list[str] = []
    con.trace_v2(apsw.SQLITE_TRACE_STMT, lambda event: seen.append(event["sql"]))
    for statement in (
        f"-- pragma\n /* set */ Pragma\nmain . litestream_TIME = '{then}'",
        f"pragma litestream_time('{then}')",
    ):
        for _ in range(2):  # the second time from APSW's cache of statements
            con.execute(statement).fetchall()
            assert txid_of(con) < newest, statement
            set_time(con, "latest")
            assert txid_of(con) == newest
    assert len(seen) >= 8  # the user's own tracer saw them all
    other = con.cursor()
    other.exec_trace = lambda *_: one(con, "select 1") == 1  # another statement in between
    other.execute(f"pragma litestream_time = '{then}'").fetchall()
    assert txid_of(con) < newest


@pytest.mark.slow
def test_a_moment_in_the_uri_and_in_connect_and_configure(past: Past) -> None:
    ms = past.moments[len(past.moments) // 2]
    options = {"hydrate": "false"}
    with open_replica(past.url) as con:
        set_time(con, iso(ms))
        txid, rows = txid_of(con), rows_of(con)
    number = f"{txid:016x}"
    lazyreplica.configure("past.db", past.url, time=datetime.fromtimestamp(ms / 1000, UTC), hydrate=False)
    for name in (
        uri(past.url, time=iso(ms), **options),
        uri(past.url, txid=number, **options),
        uri(past.url, txid=number, immutable=1, **options),
        uri(past.url, time=iso(ms), nolock=1, **options),
        "file:past.db?vfs=litestream",
        f"file:past.db?vfs=litestream&txid={number}",
    ):
        with open_uri(name) as con:
            assert (txid_of(con), rows_of(con)) == (txid, rows), name
            if "lock" in name or "immutable" in name:
                with pytest.raises(ConfigError, match=r"immutable=1 or nolock=1: give the moment in the URI"):
                    set_time(con, "latest")
            else:
                set_time(con, "latest")
                assert txid_of(con) == max(past.times)
    for moment in ({"time": datetime.fromtimestamp(ms / 1000, UTC)}, {"txid": txid}, {"txid": number}):
        with open_replica(past.url, **moment) as con:
            assert txid_of(con) == txid
    with open_uri("file:past.db?vfs=litestream&time=latest") as con:
        assert txid_of(con) == max(past.times)
    for wrong, error in (
        ({"time": "lately"}, ConfigError),
        ({"time": iso(ms), "txid": number}, ConfigError),
        ({"time": "1999-01-01"}, NoSuchState),
        ({"txid": "ffffffffffffffff"}, NoSuchState),
    ):
        with pytest.raises(error), open_replica(past.url, **wrong):
            pass
        with pytest.raises(apsw.CantOpenError), open_uri(uri(past.url, **wrong)):
            pass
    with pytest.raises(ConfigError, match="expected a time"):
        lazyreplica.configure("past.db", past.url, time="lately")


@pytest.mark.slow
def test_yesterday_beside_today(past: Path) -> None:
    lazyreplica.configure("app.db", past.url, hydrate=False)
    moments = past.moments
    then = iso(moments[len(moments) // 2])
    with open_uri("file:app.db?vfs=litestream") as con:
        con.execute(f"attach 'file:app.db?vfs=litestream&time={then}' as yesterday")
        assert txid_of(con, "yesterday") < txid_of(con)
        today = dict(con.execute("select id, body from main.t"))
        before = dict(con.execute("select id, body from yesterday.t"))
        assert today != before
        new = con.execute("select id, body from main.t except select id, body from yesterday.t").fetchall()
        gone = con.execute("select id, body from yesterday.t except select id, body from main.t").fetchall()
        assert set(new) == set(today.items()) - set(before.items())
        assert set(gone) == set(before.items()) - set(today.items())
        # Each schema has its own time.
        set_time(con, iso(moments[-20]), "yesterday")
        assert txid_of(con, "yesterday") < txid_of(con) == max(past.times)
        assert one(con, f"select litestream_set_time('{then}', 'main')") < then
        assert txid_of(con) < txid_of(con, "yesterday")
        assert set(con.execute("select id, body from main.t")) == set(before.items())
        set_time(con, "latest")
        set_time(con, "latest", "yesterday")
        assert one(con, "select count(*) from (select * from main.t except select * from yesterday.t)") == 0


@pytest.mark.slow
def test_a_view_while_the_replica_is_hydrated_and_followed(tmp_path: Path) -> None:
    """Views read what they share with the newest state from the local copy, which changes under them."""
    db = apsw.Connection(str(tmp_path / "app.db"))
    db.set_busy_timeout(5000)
    db.execute("pragma journal_mode = wal; create table t(id integer primary key, n)").fetchall()
    db.execute("create table big(id integer primary key, n, body)")
    db.executemany("insert into big values(?, 0, ?)", ((n, f"{n:0800}") for n in range(2000)))
    options = {"sync_interval": "20ms", "levels": ("1s",), "l0_retention": "1h"}
    with contextlib.closing(db), replicating(tmp_path / "app.db", tmp_path / "replica", **options) as litestream:
        boundaries: dict[int, int] = {}
        litestream.wait_synced()
        with (
            open_replica(file_url(tmp_path / "replica"), hydrate=True) as con,
            open_replica(file_url(tmp_path / "replica"), hydrate=True) as follower,
        ):
            wait_hydrated(con)
            rng = random.Random(8)
            for n in range(1, 15):
                with db:
                    db.execute("insert into t(n) values(?)", (n,))
                    db.execute("update big set n = ? where id % 7 = ?", (n, n % 7))
                boundaries[n] = litestream.wait_synced()
                eventually(lambda n=n: one(follower, "select max(n) from t") == n)
                k = rng.randint(1, n)
                con.execute(f"pragma litestream_txid = '{boundaries[k]:016x}'").fetchall()
                assert one(con, "select max(n) from t") == k
                want = max(m for m in range(0, k + 1) if m == 0 or m % 7 == 3)
                assert con.execute("select distinct n from big where id % 7 = 3").fetchall() == [(want,)]
                assert one(con, "pragma quick_check") == "ok"
            wait_hydrated(follower)
            path = tmp_path / "exported.db"
            lazyreplica.export(follower, path)
            copy = apsw.Connection(f"file:{path}?immutable=1", flags=apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI)
            assert one(copy, "select max(n) from t") == 14
            copy.close()


@pytest.mark.slow
def test_another_history_ends_a_view(tmp_path: Path) -> None:
    replica = tmp_path / "replica"
    for name, count in (("one", 3), ("two", 1)):
        db = apsw.Connection(str(tmp_path / f"{name}.db"))
        db.execute("pragma journal_mode = wal; create table t(x)").fetchall()
        db.executemany("insert into t values(?)", [(name,)] * count)
        db.close()
    replicate_once(tmp_path / "one.db", replica)
    with open_replica(file_url(replica)) as con:
        con.execute("pragma litestream_time = now").fetchall()
        assert one(con, "select count(*) from t where x = 'one'") == 3
        for file in replica.glob("ltx/*/*.ltx"):
            file.unlink()
        replicate_once(tmp_path / "two.db", replica)
        with pytest.raises(LineageChanged, match="open it again"):
            lazyreplica.refresh(con)
            con.execute("select * from t").fetchall()


@pytest.mark.slow
def test_where_restore_silently_stops_a_time_is_refused(past: Past, tmp_path: Path) -> None:
    """Remove transactions that only one compacted file holds, between two snapshots."""
    replica = tmp_path / "replica"
    shutil.copytree(past.directory, replica)
    files = ltx_files(replica)
    # Not one of a single transaction, which is what a busy machine compacts now and then, nor one that goes beyond the
    # second snapshot, which would then be what restore reaches.
    first, lost, inside = next(
        (first, file, inside)
        for first, second in pairwise([file.max_txid for file in files if file.level == 9])
        for file in files
        if file.level == 1
        and first < file.min_txid <= file.max_txid < second
        and (inside := [txid for txid in past.times if file.min_txid < txid <= file.max_txid])
    )
    for file in replica.glob("ltx/[0-8]/*.ltx"):
        low, high = (int(part, 16) for part in file.stem.split("-"))
        if low <= lost.max_txid and high >= lost.min_txid:
            file.unlink()
    with open_replica(file_url(replica)) as con:
        reached = restore(replica, tmp_path / "out.db", timestamp=iso(past.times[inside[-1]] + 1))
        with pytest.raises(ReplicaGap, match=r"are missing.*silently stop.*litestream_txid"):
            set_time(con, iso(past.times[inside[-1]] + 1))
        assert txid_of(con) == max(past.times)
        con.execute(f"pragma litestream_txid = '{max(t for t in past.times if t < lost.min_txid and t >= first):016x}'")
        assert rows_of(con) == restored_rows(reached)
