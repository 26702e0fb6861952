"""How long a program that reads a replica takes to start. ``scripts/startup`` runs this.

Each run is a fresh interpreter, timed from outside: from its start until it has ended, or has said that it has a row.
Bytecode is cached, as it is where a package was installed. Beside the time on the clock stands the processor time of
the process until then, which says something on a busy machine as well.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import apsw

import lazyreplica
from benchmark.proxy import Link, Proxy
from support.servers import serve_seaweed

RTT = 0.02
_ROWS = 200_000
_FIRST_ROW = """
import apsw, lazyreplica
db = apsw.Connection("file:app.db?vfs=litestream")
next(db.execute("select id, name from item where id = 77777"))
"""
_DONE = "import time; print(time.process_time(), flush=True)"


def main() -> int:
    repeat = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    with (
        tempfile.TemporaryDirectory() as name,
        serve_seaweed(Path(name)) as server,
        Proxy(server.port) as proxy,
    ):
        directory = Path(name)
        database = _build(directory / "app.db")
        local = f"file://{directory}/replica"
        bucket = server.new_bucket()
        os.environ |= server.env
        lazyreplica.publish(database, local)
        lazyreplica.publish(database, server.url(bucket, "app"))
        proxy.set(Link(RTT))
        remote = server.url(bucket, "app", endpoint=proxy.endpoint)
        programs = {
            "a bare interpreter": ("", None),
            "import apsw": ("import apsw", None),
            "import lazyreplica": ("import lazyreplica", None),
            "first row, file://": (_FIRST_ROW, local),
            f"first row, S3 at {RTT * 1e3:g} ms": (_FIRST_ROW, remote),
        }
        for program in programs.values():
            _time(*program)  # bytecode, and the file system's caches
        # One round after the other: what disturbs the machine disturbs all alike.
        rounds = [{name: _time(*program) for name, program in programs.items()} for _ in range(repeat)]
    clock, cpu = ({name: statistics.median(each[name][k] for each in rounds) for name in programs} for k in (0, 1))
    bare, with_apsw = "a bare interpreter", "import apsw"
    print("| medians in ms | clock | over a bare interpreter | over `import apsw` | CPU | over a bare interpreter |")
    print("|---|---:|---:|---:|---:|---:|")
    for name in programs:
        figures = (
            clock[name],
            clock[name] - clock[bare],
            clock[name] - clock[with_apsw],
            cpu[name],
            cpu[name] - cpu[bare],
        )
        print(f"| {name} |", " | ".join(f"{figure:.0f}" for figure in figures), "|")
    return 0


def _build(path: Path) -> Path:
    """A database of 16 MB."""
    db = apsw.Connection(str(path))
    db.execute("create table item(id integer primary key, name text, note text)").fetchall()
    with db:
        db.executemany(
            "insert into item values (?, ?, ?)", ((i, f"item {i}", f"{i:x}" * 12) for i in range(_ROWS))
        ).fetchall()
    db.close()
    return path


def _time(code: str, url: str | None) -> tuple[float, float]:
    """Milliseconds until the program is done, and of CPU time until then."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    if url is not None:
        environment["LITESTREAM_REPLICA_URL"] = url
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", f"{code}\n{_DONE}"], env=environment, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        taken = time.perf_counter() - start
    if process.returncode or not line:
        raise RuntimeError(f"the program failed with status {process.returncode}")
    return taken * 1e3, float(line) * 1e3


if __name__ == "__main__":
    sys.exit(main())
