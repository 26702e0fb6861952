"""The process that is measured: ``python -m benchmark.worker`` with a target on its first line of standard input.

Then one step a line in, one result a line out. Between two steps the driver reads the proxy's counters.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

from benchmark.contenders import CONTENDERS

if TYPE_CHECKING:
    import apsw

Rows = list[Any]

_ASK_EVERY = 1000
"""Queries between two looks at the progress: the query after one is a slow one, and must not be one in a hundred."""


def digest(rows: Rows) -> str:
    """Equal for equal rows, whether they come from SQLite or out of JSON."""
    return hashlib.sha256(json.dumps(rows, default=repr).encode()).hexdigest()[:16]


def cpu_seconds() -> float:
    """User and system time of this process and of children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


class Session:
    """The connections of one process, and the steps that it can run on them."""

    def __init__(self, target: dict[str, Any]) -> None:
        self._target = target
        self._contender = CONTENDERS[target["contender"]](target)
        self._contender.load()
        self._connections: list[apsw.Connection] = []
        self._found: dict[str, Any] = {}
        """What the step has measured besides its time."""

    def run(self, step: dict[str, Any]) -> dict[str, Any]:
        work: Callable[..., Rows] = getattr(self, f"_{step['kind']}")
        modules = set(sys.modules)
        self._found = {}
        cpu, start = cpu_seconds(), time.perf_counter()
        rows = work(**step["args"])
        seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
        late = sorted(set(sys.modules) - modules)
        answer = {"seconds": seconds, "cpu": cpu, "rows": len(rows), "digest": digest(rows), "imported_late": late}
        return answer | self._found

    def close(self) -> None:
        for connection in self._connections:
            connection.close()

    def _connect(self) -> apsw.Connection:
        connection = self._contender.connect()
        self._connections.append(connection)
        return connection

    def _open(self, connections: int, schema: bool = True, statements: Rows = []) -> Rows:  # noqa: B006 (read only)
        rows = []
        for _ in range(connections):
            connection = self._connect()
            if schema:
                rows += connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_schema").fetchall()
        return rows + self._sql(statements)

    def _sql(self, statements: Rows) -> Rows:
        execute = self._connections[0].execute
        rows = []
        for sql, values in statements:
            rows += execute(sql, values).fetchall()
        return rows

    def _parallel(self, statements: Rows) -> Rows:
        """Each statement on its own connection, in a thread each, all at once."""
        found: list[Rows] = [[] for _ in statements]
        errors: list[Exception] = []

        def one(index: int) -> None:
            sql, values = statements[index]
            try:
                found[index] = self._connections[index].execute(sql, values).fetchall()
            except Exception as exc:  # noqa: BLE001 (raised below, in the main thread)
                errors.append(exc)

        threads = [threading.Thread(target=one, args=(index,)) for index in range(len(statements))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return [row for rows in found for row in rows]

    def _progress(self) -> float:
        """Percent of the database that is local."""
        if self._target["contender"] == "native":
            return 100.0
        return float(str(self._connections[0].pragma("litestream_hydration_progress")))

    def _hydrate(self, until: float = 100.0, patience: float | None = None) -> Rows:
        """Open, unless a connection is, and wait until so many percent are local.

        Or until that share has not changed for `patience` seconds.
        """
        if not self._connections:
            connection = self._connect()
            connection.execute("SELECT count(*) FROM sqlite_schema").fetchall()
            # SQLite's defaults, said here because what is compared must have the same.
            connection.pragma("cache_size", -2000)
            connection.pragma("mmap_size", 0)
        before, start = -1.0, time.perf_counter()
        moved = start
        while (progress := self._progress()) < until:
            if progress != before:
                before, moved = progress, time.perf_counter()
            elif patience is not None and time.perf_counter() - moved > patience:
                self._found["seconds"] = moved - start
                break
            time.sleep(0.01)
        return []

    def _wait(self, seconds: float) -> Rows:
        time.sleep(seconds)
        return []

    def _latencies(self, sql: str, keys: list[int], hydrating: bool) -> Rows:
        """Time each of these point queries, each its own transaction; again and again while the rest hydrates."""
        execute, clock = self._connections[0].execute, time.perf_counter
        times: list[float] = []
        rounds = 0
        while rounds == 0 or (hydrating and self._progress() < 100):
            for at, key in enumerate(keys):
                if hydrating and at % _ASK_EVERY == 0 and self._progress() >= 100:
                    break
                start = clock()
                execute(sql, (key,)).fetchall()
                times.append(clock() - start)
            rounds += 1
        self._found["latencies"] = times
        return []

    def _arrivals(self, last: int) -> Rows:
        """When (`time.time`) each transaction up to `last` was first to be seen."""
        pragma, seen, newest = self._connections[0].pragma, [], 0
        while newest < last:
            txid = int(str(pragma("litestream_txid")), 16)
            if txid > newest:
                seen.append((txid, time.time()))
                newest = txid
            time.sleep(0.005)
        self._found["arrivals"] = seen
        return []

    def _ages(self, sql: str, seconds: float) -> Rows:
        """How old the newest row is, again and again."""
        execute, end = self._connections[0].execute, time.monotonic() + seconds
        ages = []
        while time.monotonic() < end:
            written = execute(sql).fetchall()[0][0]
            ages.append(time.time() - cast(float, written))
            time.sleep(0.01)
        self._found["ages"] = ages
        return []

    def _points(self, sql: str, keys: list[int], one: bool = False) -> Rows:
        execute = self._connections[0].execute
        if one:
            execute("BEGIN")
        rows = []
        for key in keys:
            rows += execute(sql, (key,)).fetchall()
        if one:
            execute("COMMIT")
        return rows


def main() -> None:
    # Whatever a library prints must not get between our lines: the peer's, which is Go, does it below Python.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    session = Session(json.loads(sys.stdin.readline()))
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        try:
            answer = session.run(json.loads(line))
        except Exception as exc:  # noqa: BLE001 (any failure of a contender is a result)
            answer = {"error": f"{type(exc).__name__}: {exc}"}
        print(json.dumps(answer), file=answers, flush=True)
    with suppress(Exception):
        session.close()


if __name__ == "__main__":
    main()
