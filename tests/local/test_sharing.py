"""Processes that share one copy: none sees a wrong page or falls behind, and together they download it once."""

from __future__ import annotations

import contextlib
import fcntl
import json
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from replicas import ReplicaDirectory, start

from lazyreplica.errors import ConfigError
from lazyreplica.local.control import Control
from lazyreplica.local.directory import CopyDirectory
from support.bank import bank_writer, build_bank, check_bank
from support.litestream import replicating
from support.process import clean_env
from support.waiting import eventually

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent


def test_processes_and_threads_read_one_copy_of_a_live_replica(tmp_path: Path) -> None:
    command = [sys.executable, str(HERE / "sharing.py"), str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, process_group=0)
    assert run.stdout, run.stderr[-6000:]
    done = json.loads(run.stdout)
    assert min(done["compared"]) > 200
    assert "Error" not in run.stderr, run.stderr[-6000:]


AT_ONCE = """
import os, sys, time
sys.path[:0] = [sys.argv[1], os.path.dirname(sys.argv[1])]
from replicas import ReplicaDirectory, SpyStore, complete, opened
from support.waiting import eventually
from lazyreplica import filling, layers
layers.KEEP_FILE = layers.KEEP_TOTAL = layers.PASSING_TOTAL = 0
filling.CHUNK = 64 << 10
store = SpyStore(sys.argv[2])
store.before_read = lambda file, offset, length: time.sleep(0.005)
time.sleep(max(0, float(sys.argv[4]) - time.time()))
with opened(store, hydrate=True, hydration_path=sys.argv[3], poll_interval=0.05) as replica:
    eventually(lambda: complete(replica))
    print(sum(length for _, _, length in store.reads))
    sys.stdout.flush()
    sys.stdin.read()  # until all are complete
"""


def test_processes_that_open_one_path_at_once_download_little_more_than_one(
    directory: ReplicaDirectory, tmp_path: Path
) -> None:
    history, _ = start(directory.path, 3000)
    target = tmp_path / "local.db"
    arguments = [str(HERE.parent / "engine"), directory.url, str(target), str(time.time() + 1.5)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", AT_ONCE, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    try:
        counts = [int(process.stdout.readline()) for process in processes]  # type: ignore[union-attr]
    finally:
        for process in processes:
            process.communicate(timeout=20)
    assert sum(counts) < 1.5 * len(history.database()), counts
    assert max(counts) > len(history.database())
    assert target.read_bytes() == history.database()


# Regression: who looked between the making of the directory and of the lock in it was told that it is not ours, and
# one whose last user was just leaving likewise.
def test_a_directory_that_comes_and_goes_is_always_ours(tmp_path: Path) -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(150):
                CopyDirectory.open(str(tmp_path / "local.db")).close()
        except BaseException as exc:  # noqa: BLE001
            failures.append(exc)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert not list(tmp_path.glob("local*"))


def test_a_database_that_its_owner_exchanges_is_not_called_somebody_elses(tmp_path: Path) -> None:
    target = tmp_path / "local.db"
    owner = CopyDirectory.open(str(target))
    assert owner.try_own()
    (owner.path / "state.json").write_text("")  # there is a copy, as far as `close` knows
    failures: list[BaseException] = []
    stop = threading.Event()

    def join() -> None:
        try:
            while not stop.is_set():
                CopyDirectory.open(str(target)).close()
        except BaseException as exc:  # noqa: BLE001
            failures.append(exc)

    thread = threading.Thread(target=join)
    thread.start()
    for n in range(400):
        base = owner.path / f"base-{n}"
        base.write_bytes(b"")
        owner.publish(base)
    stop.set()
    thread.join()
    owner.abandon()
    assert not failures
    target.unlink()
    target.write_text("precious")
    with pytest.raises(ConfigError, match="will not be overwritten"):
        CopyDirectory.open(str(target))


# Regression: after a restart of the machine others believed how long the log had been, and read it unverified.
def test_what_is_shared_in_memory_begins_anew_with_the_first_user(tmp_path: Path) -> None:
    target = str(tmp_path / "local.db")
    first = CopyDirectory.open(target)
    (first.path / "state.json").write_text("")
    Control(first.control).log_end = 4711
    second = CopyDirectory.open(target)
    assert Control(second.control).log_end == 4711
    first.abandon()
    third = CopyDirectory.open(target)
    assert Control(third.control).log_end == 4711, "the second uses it still"
    second.abandon()
    third.abandon()
    assert Control(CopyDirectory.open(target).control).log_end == 0


def test_an_owner_without_its_users_lock_is_not_taken_for_gone(tmp_path: Path) -> None:
    """It loses that for a moment where it asks for the lock alone."""
    target = str(tmp_path / "local.db")
    owner = CopyDirectory.open(target)
    assert owner.try_own()
    control = Control(owner.control)
    control.generation = 5
    fcntl.flock(owner._users_fd, fcntl.LOCK_UN)
    other = CopyDirectory.open(target)
    assert Control(other.control).generation == 5
    assert not other.try_own()
    other.abandon()
    owner.abandon()


BANKER = """
import sys, time
import lazyreplica
from support.bank import check_bank
connection = lazyreplica.connect(sys.argv[1], hydrate=True, hydration_path=sys.argv[2], poll_interval=0.1)
end, seen, last = None, 0, -1
while end is None or time.monotonic() < end:
    with connection:
        state = check_bank(connection)
    assert state.n >= last, "time goes on"
    seen, last = seen + (state.n > last), state.n
    print(state.n, seen, flush=True)
    time.sleep(0.005)
"""


def test_processes_share_a_copy_of_what_litestream_writes_and_compacts(
    litestream: Path, tmp_path: Path, file_replica_dir: Path
) -> None:
    db = build_bank(tmp_path / "bank.db", accounts=1500)
    levels = {"levels": ["1s", "2s"], "l0_retention": "1s", "l0_retention_check_interval": "500ms"}
    target = tmp_path / "local.db"
    environment = clean_env({"PYTHONPATH": str(HERE.parent)})

    def banker() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", BANKER, f"file://{file_replica_dir}", str(target)]
        log = (tmp_path / f"banker-{len(processes)}").open("w")
        with log:
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True, env=environment)

    def last_line(number: int) -> str:
        return (tmp_path / f"banker-{number}").read_text().rpartition("\n")[0].rpartition("\n")[2]

    processes: list[subprocess.Popen[str]] = []
    try:
        with replicating(db, file_replica_dir, **levels) as primary, bank_writer(db, rate=40, vacuum_every=2) as writer:
            primary.wait_synced()
            for _ in range(3):
                processes.append(banker())
                time.sleep(1.5)
            for victim in (0, 1):
                processes[victim].kill()
                processes.append(banker())
                time.sleep(2.5)
            writer.stop()
            primary.wait_synced()
            with contextlib.closing(sqlite3.connect(db)) as source:
                newest = check_bank(source).n
            for number in (2, 3, 4):
                eventually(lambda number=number: last_line(number).startswith(f"{newest} "), what=f"{number}: {newest}")
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    for number in range(5):
        assert "Error" not in (text := (tmp_path / f"banker-{number}").read_text()), text[-3000:]
        assert int(last_line(number).split()[1]) > 2, "it saw the bank change"
