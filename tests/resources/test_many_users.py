"""Many connections, many replicas, and every way in which they end: what was taken is given back."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
import textwrap
import threading
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

import lazyreplica
from support.manyfiles import ManyFiles, marks
from support.waiting import eventually

QUERY = "SELECT id, mark FROM t ORDER BY id"
pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="asks /proc"), pytest.mark.slow]


@pytest.fixture(autouse=True)
def tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp"


def make(directory: Path, transactions: int = 5) -> str:
    ManyFiles(directory / "ltx" / "0").commit(transactions - 1)
    return f"file://{directory}"


def taken() -> tuple[int, int]:
    """Descriptors, and threads."""
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()


def test_two_hundred_connections_are_one_replica(tmp_path: Path, tmp: Path) -> None:
    url = make(tmp_path / "replica")
    before = taken()
    with ExitStack() as open_ones:
        found = [open_ones.enter_context(closing(lazyreplica.connect(url, hydrate=True))) for _ in range(200)]
        for db in found:
            db.execute("BEGIN")
            assert db.execute(QUERY).fetchall() == marks(5)
        descriptors, threads = taken()
        assert descriptors - before[0] <= 10, "the local copy's files, once"
        assert threads - before[1] <= 8
    eventually(lambda: taken() == before)
    assert not list(tmp.glob("*/*"))


def test_sixty_replicas_take_a_few_threads_and_descriptors_each(tmp_path: Path, tmp: Path) -> None:
    urls = [make(tmp_path / f"replica-{number}") for number in range(60)]
    before = taken()
    with ExitStack() as open_ones:
        found = [open_ones.enter_context(closing(lazyreplica.connect(url, hydrate=True))) for url in urls]
        for db in found:
            assert db.execute(QUERY).fetchall() == marks(5)
        eventually(lambda: all(db.pragma("litestream_hydration_progress") == "100.0" for db in found))
        # Listings of polls that happen to be under way come on top of these.
        eventually(lambda: taken()[0] - before[0] <= 60 * 9)
        eventually(lambda: taken()[1] - before[1] <= 60 * 3)
    eventually(lambda: taken() == before)
    assert not list(tmp.glob("*/*"))


def test_what_nobody_closed_is_given_back_by_the_garbage_collector(tmp_path: Path, tmp: Path) -> None:
    url = make(tmp_path / "replica")
    before = taken()
    for _ in range(5):
        db = lazyreplica.connect(url, hydrate=True, poll_interval=0.01)
        cursor = db.execute(QUERY)
        next(cursor)
        ring = [db, cursor]
        ring.append(ring)  # type: ignore[arg-type]
        del db, cursor, ring
    eventually(lambda: taken() == before)
    assert not list(tmp.glob("*/*"))


def run(text: str, *arguments: str, tmp: Path) -> subprocess.CompletedProcess[str]:
    paths = f"{Path(__file__).parents[1]}"
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text), *arguments],
        capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "TMPDIR": str(tmp), "PYTHONPATH": paths},
    )  # fmt: skip


@pytest.mark.parametrize("daemon", ["True", "False"])
@pytest.mark.parametrize("hydrate", ["true", "false"])
def test_the_interpreter_ends_while_threads_query(tmp_path: Path, tmp: Path, daemon: str, hydrate: str) -> None:
    done = run(
        """
        import sys, threading, time, apsw, lazyreplica
        from support.manyfiles import marks
        url, daemon, hydrate = sys.argv[1], sys.argv[2] == "True", sys.argv[3]
        until = time.monotonic() + 1
        started = threading.Barrier(9)

        def query():
            db = lazyreplica.connect(url, hydrate=hydrate, poll_interval=0.01)
            started.wait()
            while daemon or time.monotonic() < until:
                try:
                    rows = db.execute("SELECT id, mark FROM t ORDER BY id").fetchall()
                except apsw.Error:
                    return  # closed by the end of the process
                assert rows == marks(5)

        for _ in range(8):
            threading.Thread(target=query, daemon=daemon).start()
        started.wait()
        time.sleep(0.2)
        """,
        make(tmp_path / "replica"),
        daemon,
        hydrate,
        tmp=tmp,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp.glob("*/*"))


def test_forks_leave_no_thread_and_no_file(tmp_path: Path, tmp: Path) -> None:
    """Forty children, some with the parent's connection in a transaction, some with their own, some that end hard."""
    done = run(
        """
        import os, sys, threading, warnings, lazyreplica
        from pathlib import Path
        from support.manyfiles import marks
        warnings.simplefilter("ignore")
        url = sys.argv[1]
        db = lazyreplica.connect(url, hydrate=True, poll_interval=0.01)
        query = "SELECT id, mark FROM t ORDER BY id"
        db.execute("BEGIN")
        assert db.execute(query).fetchall() == marks(5)
        children = []
        for number in range(40):
            child = os.fork()
            if child == 0:
                assert threading.active_count() == 1
                code = 1
                try:
                    if number % 2:
                        with lazyreplica.connect(url, hydrate=number % 4 == 1, poll_interval=0.01) as own:
                            assert own.execute(query).fetchall() == marks(5)
                        own.close()
                    code = 0
                finally:
                    if number % 3 or code:
                        os._exit(code)
                sys.exit(0)
            children.append(child)
        assert [os.waitpid(child, 0)[1] for child in children] == [0] * 40
        assert db.execute(query).fetchall() == marks(5)
        db.close()
        (directory,) = Path(os.environ["TMPDIR"]).iterdir()
        print(len(os.listdir("/proc/self/fd")), threading.active_count(), len(list(directory.iterdir())))
        """,
        make(tmp_path / "replica"),
        tmp=tmp,
    )
    assert (done.returncode, done.stderr) == (0, "")
    descriptors, threads, left = map(int, done.stdout.split())
    assert descriptors <= 5 and threads == 1 and left == 0, done.stdout
