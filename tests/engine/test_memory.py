"""What a reader without a local copy uses: `cache_size` and 32 MiB, whatever it does, also with the smallest pages."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from replicas import History, ReplicaDirectory

PAGE_SIZE = 512
CACHE = 16
"""MiB."""

# Pages are read at random and in order, by several connections in turn; memory is what the system counts.
READING = """
import gc, random, sys
from replicas import SpyStore, opened, pinned
from lazyreplica import layers, opening
from support.memory import status

def resident():
    return status("VmRSS") / (1 << 20)

url, cache, spread = sys.argv[1], int(sys.argv[2]) << 20, int(sys.argv[3])
opening.FAR = -1.0  # as over a network: interior pages are fetched ahead
rng = random.Random(1)
most = 0.0
with opened(SpyStore(url, parallel=8), cache_size=cache, read_timeout=30.0) as replica, pinned(replica) as snapshot:
    replica._readahead.do(gc.collect, 0)
    before = resident()
    readers = [replica.reader() for _ in range(4)]
    pages = range(1, snapshot.commit + 1)
    for n in range(120):
        first = rng.randrange(snapshot.commit)
        step = rng.choice([1, 1, spread])
        for pgno in pages[first : first + step * 1500 : step]:
            replica.read(snapshot, pgno, readers[n % 4])
        replica._store._store.reads.clear()
        most = max(most, resident())
    print(most - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_a_reader_uses_no_more_than_is_promised(directory: ReplicaDirectory, tmp_path: Path) -> None:
    path = tmp_path / "source.db"
    with closing(sqlite3.connect(path)) as db:
        db.executescript(
            f"PRAGMA page_size={PAGE_SIZE}; PRAGMA synchronous=OFF; CREATE TABLE t(a INTEGER PRIMARY KEY, b)"
        )
        db.executemany("INSERT INTO t VALUES (?, ?)", ((n, f"{n * 7919 % 100_003} {'x' * 40}") for n in range(600_000)))
        db.execute("CREATE INDEX t_b ON t(b)")
        db.commit()
    data = path.read_bytes()
    history = History(page_size=PAGE_SIZE)
    history.put(
        {n + 1: data[n * PAGE_SIZE : (n + 1) * PAGE_SIZE] for n in range(len(data) // PAGE_SIZE)},
        len(data) // PAGE_SIZE,
    )
    directory.write(history, 9, 1)
    for first in range(1, 30):  # files that are kept whole: more than there is room for
        history.commit(range(first * 1000, first * 1000 + 600))
        directory.sync(history)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[:2])), "TMPDIR": str(tmp_path)}
    for spread in ("7", "150"):
        command = [sys.executable, "-c", READING, directory.url, str(CACHE), spread]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, check=False)
        assert not done.stderr
        assert float(done.stdout) < CACHE + 32, spread
