"""The primary: writes until its standard input ends, and then says what it did.

``python -m soaking.workload DB --seed N``: the sequence of transactions depends on the seed alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import select
import sqlite3
import sys
import time
import zlib
from collections import Counter
from pathlib import Path

from soaking.invariants import ACCOUNTS, EXTRA, KINDS, SCHEMA, START_BALANCE, link
from support.data import text

BLOBS = 12
_LARGEST = 300_000
_MOST_EVENTS = 20_000


def build(path: Path, seed: int) -> None:
    """A new database in WAL mode: accounts, some events and blobs, a chain of one link."""
    rng = random.Random(seed)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as con:
        con.execute("PRAGMA journal_mode = WAL")
        con.executescript(SCHEMA)
        con.execute("BEGIN")
        accounts = ((i, text(rng, 60), START_BALANCE) for i in range(1, ACCOUNTS + 1))
        con.executemany("INSERT INTO accounts VALUES (?, ?, ?)", accounts)
        con.executemany("INSERT INTO counters VALUES (?, 0, 0)", ((kind,) for kind in range(KINDS)))
        for number in range(BLOBS):
            con.execute("INSERT INTO blobs VALUES (?, 0, 0, x'')", (number,))
            _write_blob(con, rng, number)
        first = link(b"", 0, "begin")
        con.execute("INSERT INTO chain VALUES (0, 'begin', ?)", (first,))
        con.execute("INSERT INTO pulse VALUES (1, 0, ?, ?)", (time.time(), first))
        _add_events(con, rng, 3000)
        con.execute("COMMIT")


class Workload:
    """Owner of the primary's connection and of its random numbers."""

    def __init__(self, path: Path, seed: int) -> None:
        self._rng = random.Random(seed)
        self._con = sqlite3.connect(path, timeout=60, isolation_level=None)
        self._con.execute("PRAGMA synchronous = NORMAL")
        ((self.n, self._head),) = self._con.execute("SELECT n, head FROM pulse")
        self._extras: list[int] = []
        self.did: Counter[str] = Counter()

    def step(self) -> None:
        """One transaction, now and then followed by a VACUUM, which is one of its own."""
        rng, con = self._rng, self._con
        rare = [
            (0.002, "alter", self._alter),
            (0.002, "rebuild", self._rebuild),
            (0.003, "mass delete", self._delete_many),
            (0.004, "events", lambda: _add_events(con, rng, 1500)),
            (0.02, "blob", lambda: _write_blob(con, rng, rng.randrange(BLOBS))),
        ]
        con.execute("BEGIN IMMEDIATE")
        for chance, name, act in rare:
            if rng.random() < chance:
                act()
                self.did[name] += 1
        if rng.random() < 0.5:
            self._transfer()
        else:
            self._change_events()
        self._advance()
        con.execute("COMMIT")
        self.did["transactions"] += 1
        if rng.random() < 0.0015:
            con.execute("VACUUM")
            self.did["vacuum"] += 1

    def close(self) -> None:
        self._con.close()

    def _advance(self) -> None:
        self.n += 1
        payload = text(self._rng, 40)
        self._head = link(self._head, self.n, payload)
        self._con.execute("INSERT INTO chain VALUES (?, ?, ?)", (self.n, payload, self._head))
        self._con.execute("UPDATE pulse SET n = ?, at = ?, head = ?", (self.n, time.time(), self._head))

    def _transfer(self) -> None:
        for _ in range(self._rng.randint(1, 4)):
            source, target = self._rng.sample(range(1, ACCOUNTS + 1), 2)
            amount = self._rng.randint(1, 50)
            self._con.execute("UPDATE accounts SET balance = balance - ? WHERE id = ?", (amount, source))
            self._con.execute("UPDATE accounts SET balance = balance + ? WHERE id = ?", (amount, target))

    def _change_events(self) -> None:
        _add_events(self._con, self._rng, self._rng.randint(1, 6))
        ((low, high),) = self._con.execute("SELECT min(id), max(id) FROM events")
        _remove_events(self._con, f"id = {self._rng.randint(low, high)}")

    def _delete_many(self) -> None:
        ((count,),) = self._con.execute("SELECT count(*) FROM events")
        keep = self._rng.randint(2, 9) if count < _MOST_EVENTS else 10
        _remove_events(self._con, f"abs(id * 7919) % 10 >= {10 - keep} AND id < (SELECT max(id) FROM events) - 100")

    def _alter(self) -> None:
        if len(self._extras) > 2:
            gone = self._extras.pop(self._rng.randrange(len(self._extras)))
            self._con.execute(f"ALTER TABLE events DROP COLUMN {EXTRA}{gone}")
        else:
            self._extras.append(self.n)
            self._con.execute(f"ALTER TABLE events ADD COLUMN {EXTRA}{self.n} INTEGER DEFAULT {self.n}")

    def _rebuild(self) -> None:
        con = self._con
        if self._rng.random() < 0.5:
            con.execute("DROP INDEX events_by_kind")
            con.execute("CREATE INDEX events_by_kind ON events(kind, weight)")
        else:
            con.execute("CREATE TABLE rebuilt(id INTEGER PRIMARY KEY, owner TEXT NOT NULL, balance INTEGER NOT NULL)")
            con.execute("INSERT INTO rebuilt SELECT * FROM accounts")
            con.execute("DROP TABLE accounts")
            con.execute("ALTER TABLE rebuilt RENAME TO accounts")


def _add_events(con: sqlite3.Connection, rng: random.Random, count: int) -> None:
    for _ in range(count):
        kind, weight = rng.randrange(KINDS), rng.randint(1, 1000)
        con.execute("INSERT INTO events(kind, weight, note) VALUES (?, ?, ?)", (kind, weight, text(rng, 150)))
        con.execute("UPDATE counters SET n = n + 1, total = total + ? WHERE kind = ?", (weight, kind))


def _remove_events(con: sqlite3.Connection, condition: str) -> None:
    con.execute(
        "UPDATE counters SET n = counters.n - gone.n, total = counters.total - gone.total FROM "
        f"(SELECT kind, count(*) AS n, sum(weight) AS total FROM events WHERE {condition} GROUP BY kind) AS gone "
        "WHERE counters.kind = gone.kind"
    )
    con.execute(f"DELETE FROM events WHERE {condition}")


def _write_blob(con: sqlite3.Connection, rng: random.Random, number: int) -> None:
    data = rng.randbytes(rng.randint(0, _LARGEST))
    con.execute(
        "UPDATE blobs SET size = ?, crc = ?, data = ? WHERE id = ?", (len(data), zlib.crc32(data), data, number)
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--rate", type=float, required=True, help="transactions a second")
    given = parser.parse_args()
    workload = Workload(given.path, given.seed)
    start = time.monotonic()
    pause = 0.0
    while not (select.select([sys.stdin], [], [], pause)[0] and not os.read(0, 4096)):
        workload.step()
        pause = max(0.0, start + workload.did["transactions"] / given.rate - time.monotonic())
    workload.close()
    print(json.dumps(workload.did))


if __name__ == "__main__":
    main()
