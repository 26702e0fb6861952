"""The process that is measured: ``python -m benchmark.worker`` with a target on its first line of standard input.

Then one step a line in, one result a line out. Between two steps the driver reads the proxy's counters.
"""

from __future__ import annotations

import hashlib
import json
import resource
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from benchmark.contenders import CONTENDERS

if TYPE_CHECKING:
    import apsw

Rows = list[Any]


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

    def run(self, step: dict[str, Any]) -> dict[str, Any]:
        work: Callable[..., Rows] = getattr(self, f"_{step['kind']}")
        modules = set(sys.modules)
        cpu, start = cpu_seconds(), time.perf_counter()
        rows = work(**step["args"])
        seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
        late = sorted(set(sys.modules) - modules)
        return {"seconds": seconds, "cpu": cpu, "rows": len(rows), "digest": digest(rows), "imported_late": late}

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

    def _hydrate(self) -> Rows:
        connection = self._connect()
        connection.execute("SELECT count(*) FROM sqlite_schema").fetchall()
        if self._target["contender"] != "native":
            while float(str(connection.pragma("litestream_hydration_progress"))) < 100:
                time.sleep(0.02)
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
    # Whatever a library prints must not get between our lines.
    answers, sys.stdout = sys.stdout, sys.stderr
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
