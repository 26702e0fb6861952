"""One replica per URL per process; forks, exits and kills."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import apsw
import pytest
from replicas import History, ReplicaDirectory, engine_threads

import lazyreplica
from lazyreplica import registry
from lazyreplica.config import Options
from lazyreplica.errors import BucketNotFound, ReplicaError
from support.waiting import eventually

HERE = Path(__file__).parent
LAZY = Options(hydrate=False, poll_interval=0.0)


@pytest.fixture
def history(directory: ReplicaDirectory, tmp_path: Path) -> History:
    """A real database of 200 rows, at level 0."""
    db = apsw.Connection(str(tmp_path / "primary.db"))
    db.execute("CREATE TABLE t(a INTEGER PRIMARY KEY, b)")
    db.execute("WITH n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i<200) INSERT INTO t SELECT i, i*i FROM n")
    db.close()
    data = (tmp_path / "primary.db").read_bytes()
    history = History("sqlite", page_size=4096)
    history.put({n + 1: data[n * 4096 : (n + 1) * 4096] for n in range(len(data) // 4096)}, len(data) // 4096)
    directory.sync(history)
    return history


def connect(directory: ReplicaDirectory, **options: object) -> apsw.Connection:
    return lazyreplica.connect(directory.url, **{"poll_interval": 600, "max_staleness": 600, **options})


# -- the registry --


def test_two_spellings_of_a_url_are_one_replica(directory: ReplicaDirectory, history: History) -> None:
    first = registry.acquire(directory.url, LAZY)
    second = registry.acquire(f"file://{directory.path}/", LAZY)
    assert first is second
    assert len(registry._entries) == 1
    registry.release(first)
    assert not first._closed
    registry.release(second)
    assert first._closed
    assert not registry._entries


def test_threads_end_with_the_last_connection(directory: ReplicaDirectory, history: History, tmp_path: Path) -> None:
    first, second = connect(directory), connect(directory)
    assert len(registry._entries) == 1
    assert engine_threads().count("lazyreplica-follower") == 1
    first.close()
    assert engine_threads()
    assert second.execute("SELECT count(*) FROM t").get == 200
    second.close()
    assert not engine_threads()
    assert not list((tmp_path / "tmp").glob("lazyreplica-*/*"))
    third = connect(directory)
    assert third.execute("SELECT count(*) FROM t").get == 200
    third.close()


def test_a_replica_that_fails_to_open_is_forgotten(directory: ReplicaDirectory, history: History) -> None:
    url = f"file://{directory.path}-missing"
    with pytest.raises(BucketNotFound):
        registry.acquire(url, LAZY)
    assert not registry._entries
    directory.path.rename(f"{directory.path}-missing")
    replica = registry.acquire(url, LAZY)
    registry.release(replica)


def test_other_options_for_an_open_replica_are_warned_about(
    directory: ReplicaDirectory, history: History, caplog: pytest.LogCaptureFixture
) -> None:
    first = registry.acquire(directory.url, LAZY)
    registry.release(registry.acquire(directory.url, LAZY))
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        second = registry.acquire(directory.url, Options(cache_size=1))
    assert "is open already with" in caplog.text
    assert second.options == LAZY
    registry.release(second)
    registry.release(first)


def test_many_threads_open_and_close_at_once(directory: ReplicaDirectory, history: History) -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(15):
                db = connect(directory, hydrate=False)
                assert db.execute("SELECT sum(b) FROM t").get == sum(n * n for n in range(201))
                db.close()
        except BaseException as exc:  # noqa: BLE001 (looked at by the test)
            failures.append(exc)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert not registry._entries


# -- forks --


def in_child(work: object) -> None:
    """Run `work` in a forked child; its assertions are ours."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(reading)
            work()  # type: ignore[operator]
            status = 0
        except BaseException as exc:  # noqa: BLE001
            os.write(writing, repr(exc).encode()[:4000])
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        message = pipe.read().decode()
    assert os.waitpid(pid, 0)[1] == 0, message


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.parametrize("hydrate", [True, False])
def test_a_forked_child_opens_its_own_and_the_parent_goes_on(
    directory: ReplicaDirectory, history: History, tmp_path: Path, hydrate: bool
) -> None:
    db = connect(directory, hydrate=hydrate)
    assert db.execute("SELECT count(*) FROM t").get == 200
    if hydrate:
        eventually(lambda: db.pragma("litestream_hydration_progress") in (100, "100.0"))

    def child() -> None:
        with pytest.raises(apsw.Error, match="opened before this process was forked") as caught:
            db.execute("SELECT sum(b) FROM t").fetchall()
        assert isinstance(caught.value, ReplicaError)
        own = connect(directory, hydrate=hydrate)
        assert own.execute("SELECT count(*) FROM t").get == 200
        own.close()
        db.close()

    in_child(child)
    assert db.execute("SELECT sum(b) FROM t").get == sum(n * n for n in range(201))
    if hydrate:
        assert Path(str(db.pragma("litestream_hydration_file"))).exists(), "the child removed nothing"
    history.commit([1])
    db.close()
    assert not list((tmp_path / "tmp").glob("lazyreplica-*/*"))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_fork_within_a_transaction_lets_the_child_end_it(directory: ReplicaDirectory, history: History) -> None:
    db = connect(directory)
    db.execute("BEGIN")
    assert db.execute("SELECT count(*) FROM t").get == 200

    def child() -> None:
        db.execute("ROLLBACK")
        with pytest.raises(apsw.Error, match="opened before this process was forked"):
            db.execute("SELECT sum(b) FROM t").fetchall()

    in_child(child)
    assert db.execute("SELECT sum(b) FROM t").get == sum(n * n for n in range(201))
    db.execute("COMMIT")
    db.close()


FORK_IN_A_TRANSACTION = """
import os, sys, threading, warnings
import apsw, lazyreplica
from lazyreplica import registry
from lazyreplica.errors import ReplicaError

warnings.simplefilter("ignore")  # Python's own, of forks in a process with threads
db = lazyreplica.connect(sys.argv[1], hydrate=False, poll_interval=600, max_staleness=600)
db.pragma("cache_size", 0)
db.execute("BEGIN")
assert db.execute("SELECT b FROM t WHERE a = 7").get == 49
(entry,) = registry._entries.values()
replica = entry.replica
taken, done = threading.Event(), threading.Event()

def hold_every_lock():
    with (replica._cache._lock, replica.layers.extents._lock, replica.layers._lock, replica._head._changed,
          replica._readahead._lock, replica._trees._lock, replica._follower._lock, replica._fetcher._counting):
        taken.set()
        done.wait()

holder = threading.Thread(target=hold_every_lock)
holder.start()
taken.wait()
pid = os.fork()
if pid == 0:
    for query in ("SELECT sum(b) FROM t", "SELECT b FROM t WHERE a = 7"):
        try:
            db.execute(query).fetchall()
        except ReplicaError as exc:
            print("opened before this process was forked" in str(exc), isinstance(exc, apsw.Error), flush=True)
    try:
        lazyreplica.refresh(db)
    except ReplicaError:
        print("refused", flush=True)
    assert not db.in_transaction, "SQLite rolls back by itself after an I/O error"
    own = lazyreplica.connect(sys.argv[1], hydrate=False)
    print(own.execute("SELECT sum(b) FROM t").get, flush=True)
    os._exit(0)
done.set()
holder.join()
assert os.waitpid(pid, 0)[1] == 0
print(db.execute("SELECT sum(b) FROM t").get)
db.execute("COMMIT")
db.close()
"""


# Regression (replica.py, `read`): a child that went on in an inherited transaction used the parent's caches, sockets,
# and locks, which a thread may hold that does not exist in the child: it waited for ever.
def test_a_child_cannot_read_on_in_an_inherited_transaction(
    directory: ReplicaDirectory, history: History, tmp_path: Path
) -> None:
    done = run(FORK_IN_A_TRANSACTION, directory.url, tmp=tmp_path)
    total = str(sum(n * n for n in range(201)))
    assert (done.stderr, done.stdout.split("\n")) == ("", ["True True", "True True", "refused", total, total, ""])


# -- whole processes --


def script(text: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(text), *map(str, arguments)]


def run(text: str, *arguments: object, tmp: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "TMPDIR": str(tmp), "PYTHONPATH": str(HERE)}
    return subprocess.run(script(text, *arguments), capture_output=True, text=True, timeout=30, env=env, check=False)


@pytest.mark.parametrize("hydrate", ["true", "false"])
def test_an_exit_with_open_connections_is_clean(
    directory: ReplicaDirectory, history: History, tmp_path: Path, hydrate: str
) -> None:
    done = run(
        """
        import sys, lazyreplica
        dbs = [lazyreplica.connect(sys.argv[1], hydrate=sys.argv[2], poll_interval=0.01) for _ in range(2)]
        dbs[0].execute("BEGIN")
        print(dbs[0].execute("SELECT count(*) FROM t").get)
        """,
        directory.url,
        hydrate,
        tmp=tmp_path / "tmp",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "200\n", "")
    assert not list((tmp_path / "tmp").glob("lazyreplica-*/*"))


def test_a_database_opens_while_the_interpreter_exits(
    directory: ReplicaDirectory, history: History, tmp_path: Path
) -> None:
    """No new threads can be started then: the chain of two files is opened without."""
    history.commit([1])
    history.put({1: history.states[1][1]}, len(history.states[1]))
    directory.write(history, 0, 2)
    directory.write(history, 0, 3)
    done = run(
        """
        import atexit, sys, lazyreplica
        def last():
            db = lazyreplica.connect(sys.argv[1], hydrate=False, poll_interval=0)
            print(db.execute("SELECT count(*) FROM t").get)
            db.close()
        atexit.register(last)
        """,
        directory.url,
        tmp=tmp_path / "tmp",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "200\n", "")


HOLD = """
    import sys, time, lazyreplica
    options = {"hydration_path": sys.argv[2]} if sys.argv[2] else {}
    db = lazyreplica.connect(sys.argv[1], hydrate=True, poll_interval=600, **options)
    deadline = time.monotonic() + 10
    while float(db.pragma("litestream_hydration_progress")) < 100 and time.monotonic() < deadline:
        time.sleep(0.01)
    print(db.pragma("litestream_hydration_file"), flush=True)
    time.sleep(30)
    """


def hold(directory: ReplicaDirectory, hydration_path: str, tmp: Path) -> tuple[subprocess.Popen[str], Path]:
    """Another process that has the replica open and hydrated, and its file."""
    process = subprocess.Popen(
        script(HOLD, directory.url, hydration_path),
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp)},
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    assert process.stdout is not None
    process.stdout.close()


def test_what_a_killed_process_left_is_swept_by_the_next(
    directory: ReplicaDirectory, history: History, tmp_path: Path
) -> None:
    process, left = hold(directory, "", tmp_path / "tmp")
    try:
        other = connect(directory, hydrate=True)
        assert left.exists(), "it lives"
        other.close()
        assert left.exists()
    finally:
        kill(process)
    assert left.exists()
    db = connect(directory, hydrate=True)
    assert not left.parent.exists()
    db.close()
    assert not list((tmp_path / "tmp").glob("lazyreplica-*/*"))


def test_the_copy_of_another_process_is_shared_and_outlives_it(
    directory: ReplicaDirectory, history: History, tmp_path: Path
) -> None:
    target = tmp_path / "local.db"
    process, published = hold(directory, str(target), tmp_path / "tmp")
    try:
        assert published == target
        eventually(target.exists)
        other = connect(directory, hydrate=True, hydration_path=target, poll_interval=0.05)
        eventually(lambda: float(str(other.pragma("litestream_hydration_progress"))) == 100)
        assert str(other.pragma("litestream_hydration_file")) == str(target)
        assert other.execute("SELECT sum(b) FROM t").get == sum(n * n for n in range(201))
    finally:
        kill(process)
    assert target.read_bytes() == history.database()
    history.put({1: history.states[1][1]}, len(history.states[1]))
    directory.sync(history)
    eventually(lambda: other.pragma("litestream_txid") == f"{history.txid:016x}")
    assert other.execute("SELECT sum(b) FROM t").get == sum(n * n for n in range(201))
    other.close()
    assert target.read_bytes() == history.database()
