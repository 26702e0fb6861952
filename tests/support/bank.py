"""A live workload with an answer that is known at every moment: transfers that keep the sum of all balances.

``python -m support.bank DB`` runs it, and ends when its standard input is closed: also when whoever started it
is gone. In a test use :func:`bank_writer`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import select
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from support.data import created, text
from support.databases import Connection
from support.process import clean_env

START_BALANCE = 1000


def build_bank(path: Path, accounts: int = 2000, page_size: int = 4096, journal_mode: str = "wal") -> Path:
    """Accounts with equal balances, an empty history, and a pulse that each transaction advances by one."""
    rng = random.Random(accounts)
    with created(path, page_size, journal_mode) as con:
        con.execute("CREATE TABLE accounts(id INTEGER PRIMARY KEY, owner TEXT, balance INTEGER NOT NULL)")
        con.executemany(
            "INSERT INTO accounts VALUES (?, ?, ?)",
            ((i, text(rng, 60), START_BALANCE) for i in range(1, accounts + 1)),
        )
        con.execute("CREATE TABLE history(id INTEGER PRIMARY KEY, source INT, target INT, amount INT, note TEXT)")
        con.execute("CREATE INDEX history_by_source ON history(source)")
        # at: when the transaction was made, by the writer's clock; a reader's age is its own clock less that
        con.execute("CREATE TABLE pulse(id INTEGER PRIMARY KEY CHECK (id = 1), n INTEGER, at REAL)")
        con.execute("INSERT INTO pulse VALUES (1, 0, 0)")
    return path


@dataclass(frozen=True)
class BankState:
    """What one read transaction saw."""

    n: int
    at: float
    accounts: int


def check_bank(con: Connection) -> BankState:
    """Assert that the view is one moment of the bank. Three statements: run it inside a read transaction."""
    ((n, at),) = con.execute("SELECT n, at FROM pulse")
    ((accounts, total),) = con.execute("SELECT count(*), sum(balance) FROM accounts")
    assert total == accounts * START_BALANCE, f"{accounts} accounts hold {total} at pulse {n}"
    # Each transfer leaves a row, and deletions take from the old end only: history ends at the pulse.
    ((last,),) = con.execute("SELECT coalesce(max(id), 0) FROM history")
    assert last in (0, n), f"history ends at {last}, the pulse is {n}"
    return BankState(n, at, accounts)


@dataclass
class BankStats:
    transactions: int = 0
    deletes: int = 0
    vacuums: int = 0


def _transfer(con: sqlite3.Connection, rng: random.Random, accounts: int) -> None:
    source, target, amount = rng.randint(1, accounts), rng.randint(1, accounts), rng.randint(1, 50)
    con.execute("BEGIN IMMEDIATE")
    con.execute("UPDATE accounts SET balance = balance - ? WHERE id = ?", (amount, source))
    con.execute("UPDATE accounts SET balance = balance + ? WHERE id = ?", (amount, target))
    con.execute("UPDATE pulse SET n = n + 1, at = ?", (time.time(),))
    con.execute("INSERT INTO history SELECT n, ?, ?, ?, ? FROM pulse", (source, target, amount, text(rng, 100)))
    con.execute("COMMIT")


def run(
    path: Path,
    *,
    seed: int = 1,
    rate: float | None = None,
    delete_every: float | None = None,
    vacuum_every: float | None = None,
    seconds: float | None = None,
    transactions: int | None = None,
    keep_history: int = 50,
    stdin: int | None = None,
) -> BankStats:
    """Transfer until a limit is reached or ``stdin`` ends. ``rate`` is transactions a second, None: all it can."""
    rng = random.Random(seed)
    stats = BankStats()
    start = time.monotonic()
    next_delete = start + delete_every if delete_every else float("inf")
    next_vacuum = start + vacuum_every if vacuum_every else float("inf")
    with contextlib.closing(sqlite3.connect(path, timeout=60, isolation_level=None)) as con:
        con.execute("PRAGMA synchronous = NORMAL")
        ((accounts,),) = con.execute("SELECT count(*) FROM accounts")
        while transactions is None or stats.transactions < transactions:
            now = time.monotonic()
            if seconds is not None and now - start >= seconds:
                break
            pause = max(0.0, start + stats.transactions / rate - now) if rate else 0.0
            if stdin is not None and select.select([stdin], [], [], pause)[0] and not os.read(stdin, 4096):
                break
            if stdin is None and pause:
                time.sleep(pause)
            _transfer(con, rng, accounts)
            stats.transactions += 1
            if now >= next_delete and delete_every:
                con.execute("DELETE FROM history WHERE id < (SELECT n FROM pulse) - ?", (keep_history,))
                stats.deletes += 1
                next_delete = time.monotonic() + delete_every
            if now >= next_vacuum and vacuum_every:
                con.execute("VACUUM")
                stats.vacuums += 1
                next_vacuum = time.monotonic() + vacuum_every
    return stats


class BankWriter:
    """The workload in a process of its own, so that its work does not hold the reader's interpreter lock."""

    def __init__(self, command: list[str]) -> None:
        paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=clean_env({"PYTHONPATH": os.pathsep.join(filter(None, paths))}),
            text=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def stop(self, timeout: float = 60) -> BankStats:
        """Let it finish its transaction, and say what it did."""
        out, err = self._process.communicate(timeout=timeout)  # closes its standard input
        if self._process.returncode:
            raise RuntimeError(f"the bank writer failed with {self._process.returncode}:\n{err}")
        return BankStats(**json.loads(out))

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def bank_writer(
    path: Path,
    *,
    seed: int = 1,
    rate: float | None = 200,
    delete_every: float | None = None,
    vacuum_every: float | None = None,
) -> Iterator[BankWriter]:
    """Transfers on ``path`` for as long as the block runs. Call ``stop()`` inside it for a still database."""
    command = [sys.executable, "-m", "support.bank", str(path), "--seed", str(seed)]
    for option, value in (("rate", rate), ("delete-every", delete_every), ("vacuum-every", vacuum_every)):
        if value is not None:
            command += [f"--{option}", str(value)]
    writer = BankWriter(command)
    try:
        yield writer
        if writer.running:
            writer.stop()
    finally:
        if writer.running:
            writer.kill()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--delete-every", type=float)
    parser.add_argument("--vacuum-every", type=float)
    given = parser.parse_args()
    stats = run(
        given.path,
        seed=given.seed,
        rate=given.rate,
        delete_every=given.delete_every,
        vacuum_every=given.vacuum_every,
        stdin=sys.stdin.fileno(),
    )
    print(json.dumps(asdict(stats)))


if __name__ == "__main__":
    main()
