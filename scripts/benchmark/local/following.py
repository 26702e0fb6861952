"""A hydrated replica follows transactions: requests, bytes, and the time from upload to local.

The transactions are real ones, made by SQLite on a copy of the database; their pages are taken from the write-ahead log
and encoded as Litestream would.
"""

from __future__ import annotations

import random
import shutil
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import apsw

from benchmark.data import Dataset
from benchmark.figures import Failed, ask, check, percentile
from benchmark.local.scene import HYDRATE, SCAN, Setting
from benchmark.worker import digest
from benchmark.workloads import SCANS, Step
from lazyreplica.ltx import FLAG_NO_CHECKSUM, FileName, Header, encode_file

PAGES = 100
"""Of one transaction, about: so many rows change, far from one another."""
EVERY = 0.1
"""Seconds between two uploads."""
_FRAME = 24
_CHANGE = "UPDATE posts SET title = substr(title, 2) || substr(title, 1, 1), body = upper(body) WHERE id = ?"


def follow(setting: Setting) -> None:
    """Upload transactions one after the other, and see when they are there."""
    with setting.bench.scratch() as directory:
        database = directory / "primary.db"
        assert setting.data.database is not None
        shutil.copyfile(setting.data.database, database)
        last = max(file.max_txid for _, path in setting.data.files if (file := FileName.parse(path.name)))
        made = list(transactions(database, setting.data, last + 1, setting.effort.transactions))
        truth = _truth(database)
    for name in setting.remote:
        prefix = f"follow-{name}-{setting.link.rtt:g}"
        setting.bench.upload(setting.data, prefix)
        with setting.trying(name), setting.bench.scratch() as directory:
            _watch(setting, name, prefix, directory, made, truth)


def _watch(
    setting: Setting, name: str, prefix: str, directory: Path, made: list[tuple[Header, bytes]], truth: str
) -> None:
    bench, last = setting.bench, made[-1][0].max_txid
    with bench.start(name, prefix, directory, hydrate=True) as worker, ThreadPoolExecutor(1) as pool:
        ask(worker, HYDRATE, setting.timeout)
        watching = pool.submit(ask, worker, Step("follow", "arrivals", {"last": last}), setting.timeout)
        bench.traffic()
        uploaded: dict[int, float] = {}
        due = time.monotonic()
        for header, data in made:
            time.sleep(max(0.0, due - time.monotonic()))
            bench.put(prefix, 0, header, data)
            uploaded[header.max_txid] = time.time()
            due += EVERY
        answer = watching.result()
        traffic = bench.traffic()
        ask(worker, HYDRATE, setting.timeout)
        check(worker, SCAN, truth, setting.timeout)
    waits = list(_waits(uploaded, answer["arrivals"]))
    if len(waits) != len(made):
        raise Failed(f"{len(waits)} of {len(made)} transactions arrived")
    setting.add(name, "requests a transaction", traffic["requests"] / len(made), at_most=1.2)
    setting.add(name, "listings among them, in all", traffic.get("LIST", 0))
    setting.add(name, "bytes / those of the transactions", traffic["down"] / sum(len(data) for _, data in made))
    setting.add(name, "CPU a transaction, ms", answer["cpu"] / len(made) * 1e3)
    setting.add(name, "from upload to local, p50, s", percentile(waits, 0.5))
    setting.add(name, "from upload to local, p95, s", percentile(waits, 0.95))


def _waits(uploaded: dict[int, float], arrivals: list[tuple[int, float]]) -> Iterator[float]:
    """Seconds until each transaction, or one after it, was seen."""
    rest = iter(arrivals)
    newest, seen = next(rest)
    for txid in sorted(uploaded):
        while newest < txid:
            newest, seen = next(rest)
        yield max(0.0, seen - uploaded[txid])


def transactions(database: Path, data: Dataset, first: int, count: int) -> Iterator[tuple[Header, bytes]]:
    """Level-0 files from TXID `first` on, of transactions that are made on `database`."""
    rng = random.Random(first)
    wal = database.with_name(f"{database.name}-wal")
    with closing(apsw.Connection(str(database))) as connection:
        connection.execute("PRAGMA wal_autocheckpoint = 0; PRAGMA synchronous = OFF").fetchall()
        (size,) = connection.execute("PRAGMA page_size").fetchone()  # type: ignore[misc]
        start = 32
        for txid in range(first, first + count):
            connection.execute("BEGIN IMMEDIATE")
            rows = rng.sample(range(1, data.facts["posts"] + 1), PAGES)
            connection.executemany(_CHANGE, ((row,) for row in rows))
            connection.execute("COMMIT")
            with wal.open("rb") as file:
                salts = struct.unpack(">II", file.read(24)[16:24])
                file.seek(start)
                frames = file.read()
            yield _encoded(frames, int(size), txid, start, salts)
            start += len(frames)


def _encoded(frames: bytes, size: int, txid: int, start: int, salts: tuple[int, int]) -> tuple[Header, bytes]:
    """A level-0 file of the frames that a transaction has left in the log from byte `start` on."""
    pages = {}
    commit = 0
    for at in range(0, len(frames), _FRAME + size):
        pgno, commit = struct.unpack_from(">II", frames, at)
        pages[pgno] = frames[at + _FRAME : at + _FRAME + size]
    stamp = time.time_ns() // 1_000_000
    header = Header(FLAG_NO_CHECKSUM, size, commit, txid, txid, stamp, 0, start, len(frames), *salts)
    return header, encode_file(header, sorted(pages.items()))


def _truth(database: Path) -> str:
    with closing(apsw.Connection(str(database))) as connection:
        return digest(connection.execute(SCANS["posts"]).fetchall())
