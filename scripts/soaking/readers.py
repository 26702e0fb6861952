"""A reader in a process of its own: ``python -m soaking.readers``, its orders as one line of JSON on standard input.

It prints a line of JSON a second: what it checked since the last. A second line on standard input, the number of the
primary's last transaction, asks it to catch up with that and to check everything once more; then it ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import IO, Any, Protocol

import apsw

from soaking import sabotage
from soaking.invariants import Anomaly, Moment, look, look_closely

KINDS = ("plain", "hydrating", "shared", "long", "threads", "short")
_DAMAGED = (apsw.CorruptError, apsw.NotADBError, apsw.FormatError)
"""SQLite's own words for a database that no primary has written; an error with any other name is only an error."""


class Tally:
    """What a process has seen since it last reported. Thread-safe."""

    def __init__(self, output: IO[str]) -> None:
        self._output = output
        self._lock = threading.Lock()
        self._reset()

    def _reset(self) -> None:
        self._transactions = 0
        self._errors: Counter[str] = Counter()
        self._anomalies: list[str] = []
        self._kinds: Counter[str] = Counter()
        self._seen: list[tuple[str, int, str]] = []
        self._ages: list[float] = []

    def checked(self, txid: str, moment: Moment, age: float) -> None:
        """`age`: seconds between the primary's transaction and our look at it."""
        with self._lock:
            self._transactions += 1
            self._seen.append((txid, moment.n, moment.digest))
            self._ages.append(age)

    def error(self, exc: BaseException) -> None:
        with self._lock:
            self._errors[type(exc).__name__] += 1

    def anomaly(self, kind: str, what: str) -> None:
        """`kind`: "wrong" for a state that never was, "late" for one that did not come,
        else the name of an error that is not allowed."""
        with self._lock:
            self._kinds[kind] += 1
            self._anomalies.append(what)

    def report(self, **more: object) -> None:
        with self._lock:
            line = {
                "transactions": self._transactions,
                "errors": self._errors,
                "anomalies": self._anomalies[:20],
                "anomaly_kinds": self._kinds,
                "seen": self._seen,
                "ages": self._ages,
                **more,
            }
            self._reset()
        self._output.write(json.dumps(line) + "\n")
        self._output.flush()


class Library(Protocol):
    def connect(self) -> apsw.Connection: ...

    def is_allowed(self, exc: apsw.Error) -> bool:
        """Whether an error is one of those that are promised instead of a wrong answer."""
        ...


class Ours:
    def __init__(self, orders: dict[str, Any]) -> None:
        import lazyreplica
        from lazyreplica import errors

        self._lazyreplica = lazyreplica
        self._url, self._options = orders["url"], orders["options"]
        allowed: list[type[Exception]] = [errors.SnapshotGone]
        if orders["faults"] != "none":
            allowed.append(errors.StoreError)
        if orders["faults"] == "all":
            allowed += [errors.LTXError, errors.LineageChanged, errors.ReplicaGap]
        self._allowed = tuple(allowed)

    def connect(self) -> apsw.Connection:
        return self._lazyreplica.connect(self._url, **self._options)

    def is_allowed(self, exc: apsw.Error) -> bool:
        return isinstance(exc, self._allowed)


class Peer:
    """litestream-vfs, a loadable extension. Its settings stand in the environment."""

    def __init__(self, _: dict[str, Any]) -> None:
        import litestream_vfs  # type: ignore[import-untyped]

        # Loaded once it stays; any connection will do.
        self._loader = apsw.Connection(":memory:")
        self._loader.enable_load_extension(True)
        self._loader.load_extension(litestream_vfs.loadable_path(), "sqlite3_litestreamvfs_init")

    def connect(self) -> apsw.Connection:
        flags = apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI
        return apsw.Connection("file:soak.db?vfs=litestream", flags=flags)

    def is_allowed(self, exc: apsw.Error) -> bool:
        return not isinstance(exc, _DAMAGED)


class Reader:
    """One connection and what it saw last. Errors that are allowed are counted; after them it goes on."""

    def __init__(self, library: Library, tally: Tally, rng: random.Random, orders: dict[str, Any]) -> None:
        self._library = library
        self._tally = tally
        self._rng = rng
        self._hold = orders["hold"]
        self._has_txids = not orders["peer"]
        self._connection: apsw.Connection | None = None
        self.last = Moment(-1, 0, "")
        self._txid = ""

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def read(self, *, integrity: bool = False) -> bool:
        """One transaction. Returns whether it was checked to its end."""
        try:
            if self._connection is None:
                self._connection = self._library.connect()
                self._connection.pragma("cache_size", 50)
                self._txid = ""
                self.last = Moment(-1, 0, "")
            with _transaction(self._connection):
                self._check(self._connection, integrity or self._rng.random() < 0.04)
        except Anomaly as exc:
            self._tally.anomaly("wrong", str(exc))
        except apsw.Error as exc:
            self._judge(exc)
        else:
            return True
        return False

    def _check(self, con: apsw.Connection, integrity: bool) -> None:
        moment, txid = look(con), self._read_txid(con)
        age = time.time() - moment.at
        if moment.n < self.last.n or txid < self._txid:
            raise Anomaly(f"back from {self.last.n} (TXID {self._txid}) to {moment.n} (TXID {txid})")
        look_closely(con, self._rng, integrity=integrity)
        if self._hold:
            time.sleep(self._rng.uniform(*self._hold))
            look_closely(con, self._rng, integrity=integrity)
        again = look(con)
        if again != moment or self._read_txid(con) != txid:
            raise Anomaly(f"one transaction saw {moment} at TXID {txid}, then {again} at {self._read_txid(con)}")
        self.last, self._txid = moment, txid
        self._tally.checked(txid, moment, age)

    def _read_txid(self, con: apsw.Connection) -> str:
        return str(con.pragma("litestream_txid")) if self._has_txids else ""

    def _judge(self, exc: apsw.Error) -> None:
        if self._library.is_allowed(exc):
            self._tally.error(exc)
        else:
            self._tally.anomaly(type(exc).__name__, f"{type(exc).__name__}: {exc}")
        if type(exc).__name__ == "LineageChanged":
            self.close()


@contextlib.contextmanager
def _transaction(con: apsw.Connection) -> Iterator[None]:
    """BEGIN, and ROLLBACK whatever happens; SQLite may have rolled back by itself."""
    con.execute("BEGIN")
    try:
        yield
    finally:
        if con.in_transaction:
            con.execute("ROLLBACK")


def _catch_up(reader: Reader, tally: Tally, final: int, patience: float) -> None:
    """See the primary's last transaction, over the connection that went through all the faults."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if reader.read(integrity=True) and reader.last.n == final:
            return
        time.sleep(0.3)
    tally.anomaly("late", f"stands at transaction {reader.last.n}, {patience:g} s after the primary ended at {final}")


def _run(reader: Reader, tally: Tally, given: dict[str, Any], orders: _Orders) -> None:
    pace, limit, patience = given["pace"], given["transactions"], given["patience"]
    rng = random.Random()  # when to look is no part of the workload
    while not orders.ended.wait(rng.uniform(*pace)):
        reader.read()
        if limit is not None and (limit := limit - 1) <= 0:
            break
    if orders.final is not None:
        _catch_up(reader, tally, orders.final, patience)
    reader.close()


class _Orders:
    """What standard input says after the first line."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.final: int | None = None

    def look(self, seconds: float) -> None:
        if select.select([sys.stdin], [], [], seconds)[0]:
            line = os.read(0, 4096).decode()
            self.final = int(line) if line.strip() else None
            self.ended.set()


def _first_line() -> str:
    """Unbuffered: what follows belongs to select()."""
    line = b""
    while not line.endswith(b"\n"):
        line += os.read(0, 1)
    return line.decode()


def main() -> None:
    # What a library prints (the peer's does, below Python) must not get between our lines.
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    orders = json.loads(_first_line())
    if orders["sabotage"]:
        sabotage.install(orders["sabotage"])
    library: Library = (Peer if orders["peer"] else Ours)(orders)
    tally, more = Tally(output), _Orders()
    readers = [
        Reader(library, tally, random.Random(orders["seed"] + number), orders) for number in range(orders["threads"])
    ]
    threads = [threading.Thread(target=_run, args=(reader, tally, orders, more)) for reader in readers]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if more.ended.is_set():
            time.sleep(0.2)
        else:
            more.look(0.1 if orders["transactions"] else 1.0)
        tally.report()
    tally.report(ended=True)


if __name__ == "__main__":
    main()
