"""`lazyreplica restore --follow`: a plain database file that other processes read while it is kept up to date."""

from __future__ import annotations

import json
import random
import signal
import sqlite3
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from lazyreplica.dbheader import with_header
from lazyreplica.errors import DatabaseBusy, DatabaseChanged
from lazyreplica.rollback import DatabaseFile
from support.bank import bank_writer, build_bank, check_bank
from support.databases import assert_same_files
from support.litestream import replicate_once, replicating, restore
from support.process import clean_env

pytestmark = pytest.mark.slow

PROGRAM = str(Path(sysconfig.get_path("scripts")) / "lazyreplica")
TESTS = str(Path(__file__).resolve().parents[1])

READER = """
import sqlite3, sys, time
from support.bank import check_bank
path, seen, states = sys.argv[1], 0, set()
end = time.monotonic() + float(sys.argv[2])
con = sqlite3.connect(path, timeout=30, isolation_level=None)
while time.monotonic() < end:
    con.execute("BEGIN")
    state = check_bank(con)
    con.execute("COMMIT")
    assert state.n >= seen, f"back from {seen} to {state.n}"
    seen = state.n
    states.add(seen)
    if len(states) % 20 == 0:
        con.close()  # other readers come and go
        con = sqlite3.connect(path, timeout=30, isolation_level=None)
print(len(states))
"""


@contextmanager
def following(url: str, output: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    command = [PROGRAM, "restore", url, "-o", str(output), "--follow", *more]
    env = clean_env({"LITESTREAM_POLL_INTERVAL": "0.05"})
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def started(process: subprocess.Popen[str]) -> str:
    """The line that says where it begins."""
    assert process.stdout is not None and process.stderr is not None
    return process.stdout.readline() or process.stderr.read()


def reading(output: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", READER, str(output), str(seconds)]
    return subprocess.Popen(
        command, env=clean_env({"PYTHONPATH": TESTS}), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def pulse(path: Path) -> int:
    with closing(sqlite3.connect(path, timeout=10)) as con:
        ((n,),) = con.execute("SELECT n FROM pulse")
    return int(n)


def wait_for(path: Path, n: int) -> None:
    deadline = time.monotonic() + 30
    while pulse(path) < n:
        assert time.monotonic() < deadline, f"{path} stays at {pulse(path)}, the primary is at {n}"
        time.sleep(0.05)


def test_readers_never_see_a_torn_state_although_the_follower_is_killed(tmp_path: Path) -> None:
    database, output = build_bank(tmp_path / "bank.db"), tmp_path / "out.db"
    replica = tmp_path / "replica"
    url, rng = f"file://{replica}", random.Random(3)
    with replicating(database, replica, levels=["1s", "2s"], snapshot_interval="3s", l0_retention="10s") as litestream:
        litestream.wait_synced()
        with bank_writer(database, rate=150, delete_every=0.4, vacuum_every=1.3):
            with following(url, output) as process:
                assert "restored" in started(process)
            readers = [reading(output, 9) for _ in range(2)]
            for _ in range(6):
                with following(url, output) as process:
                    assert "going on" in started(process)
                    time.sleep(rng.uniform(0.2, 1.2))
                    assert process.poll() is None, process.communicate()
                    process.send_signal(signal.SIGKILL)
            with following(url, output) as process:
                assert "going on" in started(process)
                for reader in readers:
                    out, err = reader.communicate(timeout=60)
                    assert reader.returncode == 0, err
                    assert int(out) > 5
        litestream.wait_synced()
        with following(url, output) as process:
            assert "going on" in started(process)
            wait_for(output, pulse(database))
            process.send_signal(signal.SIGINT)
            assert process.wait(10) == 130
        assert_same_files(database, output)
    assert not (tmp_path / "out.db-journal").exists() and not (tmp_path / "out.db.part").exists()


def test_a_primary_that_moves_on_is_followed_over_a_restart(tmp_path: Path) -> None:
    database, output, replica = build_bank(tmp_path / "bank.db", accounts=300), tmp_path / "out.db", tmp_path / "rep"
    with replicating(database, replica) as litestream:
        litestream.wait_synced()
        for number in range(3):
            with following(f"file://{replica}", output) as process:
                assert ("restored" if number == 0 else "going on") in started(process)
                with closing(sqlite3.connect(database)) as con, con:
                    con.execute("UPDATE pulse SET n = n + 1")
                    con.execute(f"CREATE TABLE t{number} AS SELECT * FROM accounts")
                litestream.wait_synced()
                wait_for(output, number + 1)
                process.send_signal(signal.SIGKILL)
                process.wait()
    assert_same_files(database, output)


def test_another_history_ends_it(tmp_path: Path) -> None:
    output, replica = tmp_path / "out.db", tmp_path / "replica"
    replicate_once(build_bank(tmp_path / "bank.db", accounts=300), replica)
    with following(f"file://{replica}", output) as process:
        assert "restored" in started(process)
    replica.rename(tmp_path / "old")
    replicate_once(build_bank(tmp_path / "other.db", accounts=400), replica)
    with following(f"file://{replica}", output) as process:
        _, err = process.communicate(timeout=30)
        assert process.returncode == 1 and "restore it again with --force" in err
    with closing(sqlite3.connect(output)) as con:
        assert check_bank(con).accounts == 300
    with following(f"file://{replica}", output, "--force") as process:
        assert "restored" in started(process)
    with closing(sqlite3.connect(output)) as con:
        assert check_bank(con).accounts == 400


def test_a_file_that_somebody_else_changed_is_left_alone(tmp_path: Path) -> None:
    database, output, replica = build_bank(tmp_path / "bank.db", accounts=300), tmp_path / "out.db", tmp_path / "rep"
    with replicating(database, replica) as litestream:
        litestream.wait_synced()
        with following(f"file://{replica}", output) as process:
            assert "restored" in started(process)
            with closing(sqlite3.connect(output)) as con, con:
                con.execute("UPDATE accounts SET owner = 'mine'")
            with closing(sqlite3.connect(database)) as con, con:
                con.execute("UPDATE pulse SET n = n + 1")
            litestream.wait_synced()
            _, err = process.communicate(timeout=30)
            assert process.returncode == 1 and "changed by another program" in err
    with closing(sqlite3.connect(output)) as con:
        assert con.execute("SELECT DISTINCT owner FROM accounts").fetchall() == [("mine",)]


def test_what_it_begins_with(tmp_path: Path) -> None:
    """But for its header, what `litestream restore` makes; and without its state it is a file like any other."""
    output, replica = tmp_path / "out.db", tmp_path / "replica"
    replicate_once(build_bank(tmp_path / "bank.db", accounts=300), replica)
    url = f"file://{replica}"
    with following(url, output) as process:
        assert "restored" in started(process)
    native, ours = restore(replica, tmp_path / "native.db").read_bytes(), output.read_bytes()
    counter = int.from_bytes(ours[24:28])
    assert ours == with_header(native[:4096], counter, len(native) // 4096, 0) + native[4096:]
    state = tmp_path / "out.db-lazyreplica"
    assert json.loads(state.read_text())["counter"] == counter
    state.write_text("{}")
    with following(url, output) as process:
        assert "cannot be understood" in process.communicate(timeout=30)[1]
    state.unlink()
    with following(url, output) as process:
        assert "exists" in process.communicate(timeout=30)[1]
    with following(url, output, "--txid", "1") as process:
        assert "leave out --time" in process.communicate(timeout=30)[1]
        assert process.returncode == 2


# -- one transaction on a file --


class Given:
    """Changes that are there."""

    def __init__(self, pages: dict[int, bytes], commit: int) -> None:
        self.commit = commit
        self._pages = pages

    def pgnos(self) -> list[int]:
        return sorted(self._pages)

    def page(self, pgno: int) -> bytes:
        return self._pages[pgno]


def pages_of(path: Path) -> dict[int, bytes]:
    data = path.read_bytes()
    return {at // 4096 + 1: data[at : at + 4096] for at in range(0, len(data), 4096)}


@pytest.fixture
def two_states(tmp_path: Path) -> tuple[Path, Given, Path]:
    """A database, the changes to a smaller one, and that."""
    for name, accounts in (("before.db", 900), ("after.db", 300)):
        build_bank(tmp_path / name, accounts=accounts, journal_mode="delete")
    after = pages_of(tmp_path / "after.db")
    return tmp_path / "before.db", Given(after, len(after)), tmp_path / "after.db"


def accounts_in(path: Path) -> int:
    """Asked in another process: a descriptor that this one closes would take its locks with it."""
    code = (
        "import sqlite3, sys; from support.bank import check_bank;"
        "con = sqlite3.connect(sys.argv[1]); con.execute('BEGIN'); print(check_bank(con).accounts);"
        "assert con.execute('PRAGMA integrity_check').fetchall() == [('ok',)]"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        env=clean_env({"PYTHONPATH": TESTS}),
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


def test_a_crash_at_any_write_is_undone_by_the_next_reader(
    two_states: tuple[Path, Given, Path], tmp_path: Path
) -> None:
    path, _, _ = two_states
    original = path.read_bytes()
    crash = """
import os, sys
from pathlib import Path
import lazyreplica.rollback as rollback
sys.path.insert(0, sys.argv[1])
from test_follow import Given, pages_of
path, left = Path(sys.argv[2]), int(sys.argv[3])
changes = pages_of(path.with_name("after.db"))
def dying(name):
    real = getattr(os, name)
    def call(*args, **more):
        global left
        left -= 1
        if left == 0:
            os._exit(9)
        return real(*args, **more)
    setattr(os, name, call)
for name in ("pwrite", "fsync", "ftruncate", "open"):
    dying(name)
file = rollback.DatabaseFile(path, 4096)
file.apply(Given(changes, len(changes)), file.counter, 0, 5)
os._exit(0)
"""
    outcomes = set()
    for at in [1, 2, 3, 5, 20, 60, 100, *range(104, 150, 4), 100_000]:
        path.write_bytes(original)
        (tmp_path / "before.db-journal").unlink(missing_ok=True)
        done = subprocess.run(
            [sys.executable, "-c", crash, str(Path(__file__).parent), str(path), str(at)],
            env=clean_env({"PYTHONPATH": TESTS}),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode in (0, 9), done.stderr
        hot = (tmp_path / "before.db-journal").exists()
        found = accounts_in(path)
        assert found == (300 if done.returncode == 0 else 900), f"{found} after a crash at call {at}, hot: {hot}"
        outcomes.add((found, hot))
    assert {(900, False), (900, True), (300, False)} <= outcomes


def test_our_own_recovery_is_sqlites(two_states: tuple[Path, Given, Path]) -> None:
    path, changes, _ = two_states
    before = path.read_bytes()
    file = DatabaseFile(path, 4096)
    file._write_journal(file._touched(changes, len(before) // 4096), len(before) // 4096)
    file._write(changes, 77, 0)
    file.close()  # as a crash would
    assert path.read_bytes() != before
    DatabaseFile(path, 4096).close()
    assert path.read_bytes() == before


def test_a_full_disk_changes_nothing(two_states: tuple[Path, Given, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path, changes, _ = two_states
    before = path.read_bytes()
    with closing(DatabaseFile(path, 4096)) as file:
        real = file._write

        def full(*args: object) -> None:
            real(*args)  # type: ignore[arg-type]
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(file, "_write", full)
        with pytest.raises(OSError, match="No space left"):
            file.apply(changes, file.counter, 0, 5)
        assert path.with_name("before.db-journal").exists() is False
    assert path.read_bytes() == before


def test_a_reader_in_a_transaction_is_waited_for(two_states: tuple[Path, Given, Path]) -> None:
    path, changes, _ = two_states
    code = (
        "import sqlite3, sys; con = sqlite3.connect(sys.argv[1], isolation_level=None); con.execute('BEGIN');"
        "print(con.execute('SELECT count(*) FROM accounts').fetchone()[0], flush=True); sys.stdin.readline();"
        "print(con.execute('SELECT count(*) FROM accounts').fetchone()[0], flush=True); con.execute('COMMIT');"
        "print(con.execute('SELECT count(*) FROM accounts').fetchone()[0] if sys.stdin.readline() else '')"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdin=pipe, stdout=pipe, text=True) as reader:
        assert reader.stdin is not None and reader.stdout is not None
        assert reader.stdout.readline() == "900\n"
        with closing(DatabaseFile(path, 4096)) as file:
            with pytest.raises(DatabaseBusy, match="does not end its transaction"):
                file.apply(changes, file.counter, 0, 0.5)
            assert accounts_in(path) == 900  # new readers are let in again
            reader.stdin.write("\n")
            reader.stdin.flush()
            assert reader.stdout.readline() == "900\n"
            file.apply(changes, file.counter, 0, 5)
            with pytest.raises(DatabaseChanged):
                file.apply(changes, file.counter - 1, 0, 5)
        reader.stdin.write("\n")
        reader.stdin.flush()
        assert reader.stdout.readline() == "300\n"  # in its old connection, whose page cache knows that it is stale
