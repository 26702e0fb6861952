"""A replica that is read while its primary goes on: every transaction sees one moment, and soon a newer one."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path

import apsw
import pytest
from e2e_helpers import file_url, one, open_replica, python_env, txid_of, wait_hydrated

import lazyreplica
from support.bank import bank_writer, build_bank, check_bank, run
from support.data import build_social
from support.databases import assert_intact, assert_same_rows, file_digest
from support.litestream import Litestream, replicating
from support.servers import S3Server
from support.waiting import eventually

POLL = 0.5
COMPACTING = {"levels": ["1s", "2s"], "l0_retention": "1s", "l0_retention_check_interval": "500ms"}
RETAINING = {**COMPACTING, "snapshot_interval": "3s", "snapshot_retention": "3s"}


@pytest.fixture
def s3(rclone: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    for name, value in rclone.env.items():
        monkeypatch.setenv(name, value)
    return rclone


# -- changes of size and schema under an open connection --


@pytest.mark.slow
def test_delete_vacuum_and_regrowth_are_seen_live_and_on_a_fresh_open(
    litestream: Path, tmp_path: Path, file_replica_dir: Path
) -> None:
    db = build_social(tmp_path / "app.db", posts=2000)
    url = file_url(file_replica_dir)
    local_path = tmp_path / "local.db"
    steps = [
        "DELETE FROM posts WHERE id > 200",
        "VACUUM",
        "INSERT INTO posts SELECT 10000 + id, user_id, created, title, body || body FROM posts, (VALUES (1))",
        "INSERT INTO posts SELECT 20000 + p.id + u.id * 50000, 1, 2, title, body FROM posts p, users u WHERE u.id < 9",
        "UPDATE posts SET body = upper(body) WHERE id % 3 = 0",
        "DELETE FROM likes",
        "VACUUM",
        "CREATE TABLE again AS SELECT * FROM posts",
    ]
    with (
        replicating(db, file_replica_dir, **COMPACTING) as writer,
        closing(sqlite3.connect(db, isolation_level=None)) as source,
    ):
        writer.wait_synced()
        with open_replica(url, cache_size="64k") as plain, HydratingReader(url, local_path) as hydrating:
            for step in steps:
                source.execute(step)
                txid = writer.wait_synced()
                lazyreplica.wait_for(plain, txid)
                with open_replica(url) as fresh:
                    for replica in (plain, fresh):
                        assert_intact(replica)
                        assert assert_same_rows(source, replica) > 500
                hydrating.check(source, txid)
            for pragma in ("PRAGMA page_count", "PRAGMA freelist_count"):
                assert list(plain.execute(pragma)) == list(source.execute(pragma))
        with open_replica(url, hydrate=True) as replica:
            local = wait_hydrated(replica)
            restored = writer.restore(tmp_path / "restored.db", txid=txid_of(replica))
            assert file_digest(local) == file_digest(restored)


class HydratingReader:
    """A hydrating reader has to be another process: options belong to the replica, and there is one in a process."""

    SCRIPT = """
import sys
import lazyreplica
from e2e_helpers import wait_hydrated
from support.databases import assert_intact
url, path = sys.argv[1:]
db = lazyreplica.connect(url, hydrate=True, poll_interval=0.1, hydration_path=path)
for line in sys.stdin:
    lazyreplica.wait_for(db, int(line))
    assert_intact(db)
    print(wait_hydrated(db), flush=True)
    lazyreplica.export(db, path + ".export")
    print("exported", flush=True)
db.close()
"""

    def __init__(self, url: str, path: Path) -> None:
        self._path = path
        env = python_env()
        env["PYTHONPATH"] += f":{Path(__file__).parent}"
        self._process = subprocess.Popen(
            [sys.executable, "-c", self.SCRIPT, url, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )

    def check(self, source: sqlite3.Connection, txid: int) -> None:
        """Once all of `txid` is local, the file is a database with the source's rows."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{txid}\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == f"{self._path}\n"
        assert self._process.stdout.readline() == "exported\n"
        with closing(sqlite3.connect(f"file:{self._path}.export?immutable=1", uri=True)) as local:
            assert_intact(local)
            assert assert_same_rows(source, local) > 500

    def __enter__(self) -> HydratingReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=20)
        assert self._process.returncode == 0
        assert file_digest(self._path) == file_digest(Path(f"{self._path}.export")), "a clean close folds the log in"


def test_schema_changes_arrive_under_open_connections_and_prepared_statements(
    litestream: Path, tmp_path: Path, file_replica_dir: Path
) -> None:
    db = build_social(tmp_path / "app.db", posts=300)
    query = "SELECT * FROM users WHERE name LIKE 'user00001_' ORDER BY id"
    with (
        replicating(db, file_replica_dir, sync_interval="20ms") as writer,
        closing(sqlite3.connect(db, isolation_level=None)) as source,
    ):
        writer.wait_synced()
        with open_replica(file_url(file_replica_dir)) as plain:
            for step in (
                "ALTER TABLE users ADD COLUMN age INT DEFAULT 7",
                "CREATE INDEX users_by_age ON users(age, name)",
                "ALTER TABLE users RENAME COLUMN bio TO story",
                "CREATE TABLE extra(a, b); INSERT INTO extra SELECT id, name FROM users",
                "DROP TABLE likes",
                "ALTER TABLE users DROP COLUMN story",
                "CREATE VIEW v AS SELECT * FROM users",
            ):
                assert list(plain.execute(query)) == list(source.execute(query))
                source.executescript(step)
                lazyreplica.wait_for(plain, writer.wait_synced())
                assert list(plain.execute(query)) == list(source.execute(query))
                assert assert_same_rows(source, plain) > 300
            with pytest.raises(apsw.SQLError, match="no such table: likes"):
                plain.execute("SELECT * FROM likes")
            assert one(plain, "SELECT count(*) FROM v WHERE age = 7") == 300


def test_a_running_query_finishes_on_its_own_moment(litestream: Path, tmp_path: Path, file_replica_dir: Path) -> None:
    db = build_bank(tmp_path / "bank.db")
    with replicating(db, file_replica_dir, sync_interval="20ms") as writer:
        writer.wait_synced()
        with open_replica(file_url(file_replica_dir), cache_size=0, poll_interval=0.01) as replica, bank_writer(db):
            replica.execute("PRAGMA cache_size = 1")
            before = txid_of(replica)
            total = 0
            for number, (balance,) in enumerate(replica.execute("SELECT balance FROM accounts")):
                total += balance
                if number % 200 == 0:
                    time.sleep(0.05)
            assert total == 2000 * 1000
            assert txid_of(replica) > before


# -- the bank --


@dataclass
class Seen:
    """What one reader saw."""

    transactions: int = 0
    gone: int = 0
    ns: set[int] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)


def read_bank(db: apsw.Connection, seconds: float, hold: float, seen: Seen) -> Seen:
    """Read transactions of `hold` seconds, for `seconds`: each must see one moment, at its start and at its end."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        db.execute("BEGIN")
        try:
            first = check_bank(db)
            content = list(db.execute("SELECT id, balance FROM accounts ORDER BY owner, id LIMIT 50"))
            last = time.monotonic() + hold
            while True:
                if (again := check_bank(db)) != first:
                    seen.wrong.append(f"{first} became {again} in one transaction")
                if time.monotonic() >= last:
                    break
                time.sleep(min(0.3, hold))
            if list(db.execute("SELECT id, balance FROM accounts ORDER BY owner, id LIMIT 50")) != content:
                seen.wrong.append(f"other rows at the end of one transaction at {first}")
            seen.ns.add(first.n)
            seen.transactions += 1
        except apsw.BusyError as exc:
            assert exc.extendedresult == apsw.SQLITE_BUSY_SNAPSHOT
            seen.gone += 1
        except AssertionError as exc:
            seen.wrong.append(str(exc))
        finally:
            db.execute("ROLLBACK")
    return seen


def reader_main(url: str, hydrate: str, seconds: str) -> None:
    """A process with one replica and three connections: short, long and full-check transactions."""
    options = {"hydrate": hydrate == "1", "poll_interval": POLL, "cache_size": 0 if hydrate == "0" else "32MiB"}
    jobs: dict[str, Callable[[apsw.Connection], Seen]] = {
        "short": lambda db: read_bank(db, float(seconds), 0, Seen()),
        "long": lambda db: read_bank(db, float(seconds), 4, Seen()),
        "intact": lambda db: check_intact(db, float(seconds)),
    }

    def work(job: Callable[[apsw.Connection], Seen]) -> Seen:
        with open_replica(url, **options) as db:
            db.execute("PRAGMA cache_size = 2")
            return job(db)

    with open_replica(url, **options) as first, ThreadPoolExecutor() as pool:
        if hydrate == "1":
            wait_hydrated(first)
        futures: dict[str, Future[Seen]] = {name: pool.submit(work, job) for name, job in jobs.items()}
        seen = {name: future.result() for name, future in futures.items()}
    print(json.dumps({name: {**asdict(each), "ns": sorted(each.ns)} for name, each in seen.items()}))


def check_intact(db: apsw.Connection, seconds: float) -> Seen:
    seen = Seen()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            found = [row[0] for row in db.execute("PRAGMA integrity_check")]
        except apsw.BusyError:
            seen.gone += 1
        else:
            seen.transactions += 1
            if found != ["ok"]:
                seen.wrong += found
        time.sleep(0.2)
    return seen


@contextlib.contextmanager
def reader_process(url: str, *, hydrate: bool, seconds: float) -> Iterator[subprocess.Popen[str]]:
    env = python_env()
    env["PYTHONPATH"] += f":{Path(__file__).parent}"
    command = [sys.executable, "-c", "import sys, test_following as t; t.reader_main(*sys.argv[1:])"]
    process = subprocess.Popen(
        [*command, url, str(int(hydrate)), str(seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**env, **{name: value for name, value in os.environ.items() if name.startswith("AWS_")}},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("where", ["file", "rclone"])
def test_the_bank_never_shows_a_wrong_sum(
    litestream: Path, s3: S3Server, tmp_path: Path, file_replica_dir: Path, where: str
) -> None:
    db = build_bank(tmp_path / "bank.db", accounts=6000)
    url, env = file_url(file_replica_dir), {}
    replica: Path | str = file_replica_dir
    if where == "rclone":
        replica = url = s3.url(s3.new_bucket(), "bank")
        env = s3.env
    seconds = 13.0
    with (
        replicating(db, replica, env=env, **RETAINING) as writer,
        bank_writer(db, rate=100, delete_every=1.5, vacuum_every=4) as bank,
    ):
        writer.wait_synced()
        with (
            reader_process(url, hydrate=False, seconds=seconds) as plain,
            reader_process(url, hydrate=True, seconds=seconds) as hydrating,
        ):
            reports = {}
            for name, process in (("plain", plain), ("hydrating", hydrating)):
                out, err = process.communicate(timeout=120)
                assert process.returncode == 0, err
                reports[name] = json.loads(out)
        stats = bank.stop()
        writer.wait_synced()
        with open_replica(url) as fresh, closing(sqlite3.connect(db)) as source:
            fresh.execute("BEGIN")
            assert check_bank(fresh).n == check_bank(source).n
            assert assert_same_rows(source, fresh) > 6000
    for name, report in reports.items():
        for kind, seen in report.items():
            print(name, kind, seen["transactions"], "transactions,", seen["gone"], "gone,", len(seen["ns"]), "moments")
            assert seen["wrong"] == [], f"{name} {kind}"
            # a plain reader may lose what a long transaction has pinned, but it is told so
            assert seen["transactions"] + (seen["gone"] if (name, kind) == ("plain", "long") else 0) >= 2, (
                f"{name} {kind}"
            )
    assert stats.vacuums >= 2 and stats.deletes >= 5
    # a local copy keeps what a transaction has pinned
    assert reports["hydrating"]["long"]["gone"] == reports["hydrating"]["short"]["gone"] == 0
    assert len(reports["plain"]["short"]["ns"]) >= 5
    assert reports["plain"]["short"]["gone"] <= reports["plain"]["short"]["transactions"] // 10


@pytest.mark.slow
@pytest.mark.parametrize("hydrate", [False, True])
def test_new_versions_are_seen_within_two_poll_intervals(
    litestream: Path, s3: S3Server, tmp_path: Path, hydrate: bool
) -> None:
    db = build_bank(tmp_path / "bank.db")
    bucket = s3.new_bucket()
    assert s3.root is not None
    level0 = s3.root / bucket / "bank" / "0000"
    with replicating(db, s3.url(bucket, "bank"), env=s3.env, **COMPACTING) as writer:
        writer.wait_synced()
        with (
            open_replica(s3.url(bucket, "bank"), hydrate=hydrate, poll_interval=POLL) as replica,
            closing(sqlite3.connect(db, isolation_level=None)) as source,
        ):
            ages = []
            for number in range(1, 13):
                stored = max(path.name for path in level0.glob("*.ltx"))
                source.execute("UPDATE pulse SET n = ?", (number,))
                eventually(lambda old=stored: max(path.name for path in level0.glob("*.ltx")) > old)
                start = time.monotonic()
                eventually(lambda n=number: one(replica, "SELECT n FROM pulse") == n)
                ages.append(time.monotonic() - start)
                time.sleep(0.1 * (number % 4))  # not in step with the polls
    assert statistics.median(ages) < POLL * 2, ages


# -- interruptions --


FROZEN = """
import sys
import lazyreplica
from e2e_helpers import one
from support.bank import check_bank
url, hydrate = sys.argv[1:]
db = lazyreplica.connect(url, hydrate=hydrate == "1", poll_interval=0.3, max_staleness=1)
print(one(db, "select n from pulse"), flush=True)
for _ in sys.stdin:
    db.execute("begin")
    state = check_bank(db)
    db.execute("commit")
    assert db.pragma("integrity_check") == "ok"
    print(state.n, flush=True)
db.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize("hydrate", [False, True])
def test_a_frozen_process_wakes_up_to_a_fresh_head(
    litestream: Path, tmp_path: Path, file_replica_dir: Path, hydrate: bool
) -> None:
    """Frozen longer than level 0 keeps its files: the next names are gone, compacted ones lead on."""
    db = build_bank(tmp_path / "bank.db")
    env = python_env()
    env["PYTHONPATH"] += f":{Path(__file__).parent}"
    with replicating(db, file_replica_dir, **COMPACTING) as writer:
        writer.wait_synced()
        # What the reader finds at its open is still there when it wakes up: the path is known to be the same.
        eventually(lambda: {f.level for f in writer.ltx_files()} >= {1, 9})
        with subprocess.Popen(
            [sys.executable, "-c", FROZEN, file_url(file_replica_dir), str(int(hydrate))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        ) as process:
            assert process.stdin is not None and process.stdout is not None
            try:
                assert process.stdout.readline() == "0\n"
                process.send_signal(signal.SIGSTOP)
                with bank_writer(db, rate=50) as bank:
                    time.sleep(6)  # what is tested is that time passes
                    transactions = bank.stop().transactions
                writer.wait_synced()
                eventually(lambda: min(f.min_txid for f in writer.ltx_files() if f.level == 0) > 3)
                process.stdin.write("read\n")
                process.stdin.flush()
                process.send_signal(signal.SIGCONT)
                assert process.stdout.readline() == f"{transactions}\n"
                # and follows on
                run(db, transactions=1)
                writer.wait_synced()
                deadline = time.monotonic() + 5
                answer = ""
                while answer != f"{transactions + 1}\n" and time.monotonic() < deadline:
                    process.stdin.write("read\n")
                    process.stdin.flush()
                    answer = process.stdout.readline()
                assert answer == f"{transactions + 1}\n"
                process.communicate(timeout=60)
                assert process.returncode == 0
            finally:
                process.kill()


@contextlib.contextmanager
def bank_readers(url: str) -> Iterator[Seen]:
    """Readers in the background for the block, plain and in short transactions; nothing may ever go wrong."""
    seen = Seen()
    stop = threading.Event()

    def read() -> None:
        with open_replica(url, poll_interval=0.2, cache_size=0) as db:
            while not stop.is_set():
                read_bank(db, 0.1, 0, seen)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(read)
        try:
            yield seen
        finally:
            stop.set()
        future.result()
    assert seen.wrong == []
    assert seen.transactions > 5


def lose_state(db: Path, writer: Litestream) -> None:
    writer.kill()
    shutil.rmtree(db.with_name(f".{db.name}-litestream"))
    writer.start()


def restart(db: Path, writer: Litestream) -> None:
    writer.kill()
    writer.start()


def stop_and_start(db: Path, writer: Litestream) -> None:
    writer.stop()
    writer.start()


@pytest.mark.slow
@pytest.mark.parametrize("interrupt", [restart, stop_and_start, lose_state])
@pytest.mark.parametrize("options", [COMPACTING, {}], ids=["compacting", "still"])
def test_readers_go_on_when_litestream_comes_back(
    litestream: Path,
    tmp_path: Path,
    file_replica_dir: Path,
    interrupt: Callable[[Path, Litestream], None],
    options: dict[str, object],
) -> None:
    db = build_bank(tmp_path / "bank.db", accounts=4000)
    url = file_url(file_replica_dir)
    with replicating(db, file_replica_dir, **options) as writer:
        writer.wait_synced()
        with bank_readers(url), open_replica(url, poll_interval=0.2) as pinned:
            for _ in range(2):
                with bank_writer(db, rate=50) as bank:
                    writer.wait_synced()
                    pinned.execute("BEGIN")
                    before = check_bank(pinned)
                    interrupt(db, writer)
                    writer.wait_synced()
                    with contextlib.suppress(apsw.BusyError):
                        assert check_bank(pinned) == before
                    pinned.execute("ROLLBACK")
                    bank.stop()
                txid = writer.wait_synced()
                lazyreplica.wait_for(pinned, txid)
                with closing(sqlite3.connect(db)) as source:
                    assert assert_same_rows(source, pinned) > 4000
                assert_intact(pinned)


@pytest.mark.slow
@pytest.mark.parametrize("hydrate", [False, True])
def test_readers_go_on_when_the_primary_is_killed_and_comes_back(
    litestream: Path, tmp_path: Path, file_replica_dir: Path, hydrate: bool
) -> None:
    """Nobody has the database open for a while: SQLite recovers the WAL and starts a new one."""
    db = build_bank(tmp_path / "bank.db")
    url = file_url(file_replica_dir)
    with replicating(db, file_replica_dir, **COMPACTING) as writer:
        writer.wait_synced()
        with open_replica(url, hydrate=hydrate) as replica:
            for _ in range(3):
                with bank_writer(db, rate=100) as bank:
                    reached = txid_of(replica)
                    eventually(lambda n=reached: txid_of(replica) > n + 2)
                    bank.kill()
                    writer.kill()
                with closing(sqlite3.connect(db, isolation_level=None)) as con:
                    con.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                    con.execute("UPDATE pulse SET at = 1")
                writer.start()
                lazyreplica.wait_for(replica, writer.wait_synced())
                with closing(sqlite3.connect(db)) as source:
                    assert assert_same_rows(source, replica) > 2000
                assert_intact(replica)
            if hydrate:
                wait_hydrated(replica)
                restored = writer.restore(tmp_path / "restored.db", txid=txid_of(replica))
                lazyreplica.export(replica, tmp_path / "exported.db")
                assert file_digest(tmp_path / "exported.db") == file_digest(restored)


@pytest.mark.slow
def test_a_primary_restored_to_an_older_state_is_followed(
    litestream: Path, tmp_path: Path, file_replica_dir: Path
) -> None:
    """Lost state and another schema under an equal cookie: what SQLite parsed before must not be used."""
    url = file_url(file_replica_dir)
    older, db = tmp_path / "older.db", tmp_path / "app.db"
    with closing(sqlite3.connect(db, isolation_level=None)) as con:
        con.execute("PRAGMA journal_mode = wal")
        con.execute("CREATE TABLE first(a, b)")
        con.execute("INSERT INTO first VALUES ('a', 'b')")
        con.execute("VACUUM INTO ?", (str(older),))
        con.execute("CREATE TABLE second(a, b)")
    with closing(sqlite3.connect(older, isolation_level=None)) as con:
        con.execute("PRAGMA journal_mode = wal")
        con.execute("CREATE TABLE sec0nd(b, a)")
    with closing(sqlite3.connect(db, isolation_level=None)) as con:
        con.execute("INSERT INTO second VALUES ('right', 'wrong')")
    with closing(sqlite3.connect(older, isolation_level=None)) as con:
        con.execute("INSERT INTO sec0nd VALUES ('other', 'table')")
    with replicating(db, file_replica_dir) as writer:
        writer.wait_synced()
        with open_replica(url) as replica:
            assert one(replica, "SELECT a FROM second") == "right"
            writer.kill()
            for leftover in (f"{db}-wal", f"{db}-shm"):
                Path(leftover).unlink(missing_ok=True)
            shutil.rmtree(db.with_name(f".{db.name}-litestream"))
            older.replace(db)
            writer.start()
            lazyreplica.wait_for(replica, writer.wait_synced())
            assert list(replica.execute("SELECT * FROM sec0nd")) == [("other", "table")]
            with pytest.raises(apsw.SQLError, match="no such table: second"):
                replica.execute("SELECT a FROM second")
            assert_intact(replica)


@pytest.mark.slow
def test_a_sleeper_that_knows_no_file_any_more_follows_a_healthy_path(
    litestream: Path, tmp_path: Path, file_replica_dir: Path
) -> None:
    """It knew the first level-0 file; what compaction made of it has other names, and nobody wiped anything."""
    db = build_bank(tmp_path / "bank.db")
    with replicating(db, file_replica_dir, levels=["24h"]) as writer:
        writer.wait_synced()
        with open_replica(file_url(file_replica_dir), poll_interval=60) as replica:
            assert one(replica, "SELECT n FROM pulse") == 0
            writer.stop()
            with replicating(db, file_replica_dir, **COMPACTING) as compacting:
                # What ends where the sleeper stands has to outlast it: that is the proof.
                eventually(lambda: any((f.level, f.max_txid) == (1, 1) for f in compacting.ltx_files()))
                run(db, transactions=1)
                compacting.wait_synced()
                eventually(lambda: min(f.min_txid for f in compacting.ltx_files() if f.level == 0) > 1)
                lazyreplica.refresh(replica)
                assert one(replica, "SELECT n FROM pulse") == 1
