"""One replica follows a history that is written as fast as the machine goes: memory, descriptors, threads stay flat.

The writer is a process of its own (``python -m soaking.follow DIR N``) that makes LTX files with the project's encoder:
a level-0 file for each transaction, a compaction of every 20, a snapshot of every 500, and it removes what Litestream's
retention would. Which pages a transaction changes follows from its number, so every page that is read can be checked.
"""

from __future__ import annotations

import bisect
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from array import array
from pathlib import Path
from typing import Any

from lazyreplica import hydrator, layers
from lazyreplica.config import Options
from lazyreplica.errors import SnapshotGone
from lazyreplica.ltx import FLAG_NO_CHECKSUM, FileName, Header, encode_file
from lazyreplica.replica import Replica
from lazyreplica.storage import open_store

PAGE_SIZE = 4096
PAGES = 64
_COMPACT = 20
_SNAPSHOT = 500
_KEEP = (200, 2000)
"""How many transactions behind the newest the files of levels 0 and 1 are removed."""
_WAL_FRAME = 24 + PAGE_SIZE
_WARM = 0.3
"""The part of the run after which memory must not grow any more: caches are full by then."""


def changed(txid: int) -> list[int]:
    """The pages that transaction `txid` writes, ascending."""
    if txid == 1:
        return list(range(1, PAGES + 1))
    return sorted({1, txid * 7919 % PAGES + 1, txid * 104_729 % PAGES + 1})


def page(pgno: int, txid: int) -> bytes:
    """The bytes that transaction `txid` gives to page `pgno`."""
    return f"page {pgno} of transaction {txid}.".encode().ljust(64, b".") * (PAGE_SIZE // 64)


class Writer:
    """Writes the history into a ``file://`` replica."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._newest = array("Q", [0] * (PAGES + 1))
        """Of each page: the transaction that wrote it last."""
        self._wal = 32
        self._removed = [0, 0]
        for level in (0, 1, 9):
            (directory / "ltx" / str(level)).mkdir(parents=True)

    def commit(self, txid: int) -> None:
        pages = changed(txid)
        for pgno in pages:
            self._newest[pgno] = txid
        size = 32 + _WAL_FRAME * len(pages) if txid == 1 else _WAL_FRAME * len(pages)
        self._write(0, txid, txid, pages, (self._wal, size))
        self._wal += size
        if txid % _COMPACT == 0:
            low = txid - _COMPACT + 1
            self._write(1, low, txid, sorted(set().union(*map(changed, range(low, txid + 1)))), (0, 0))
            self._expire(0, 1, txid - _KEEP[0])
            self._expire(1, _COMPACT, txid - _KEEP[1])
        if txid % _SNAPSHOT == 0:
            self._write(9, 1, txid, list(range(1, PAGES + 1)), (0, 0))
            if txid > 2 * _SNAPSHOT:
                self._place(9, 1, txid - 2 * _SNAPSHOT).unlink()

    def _place(self, level: int, low: int, high: int) -> Path:
        return self._directory / "ltx" / str(level) / str(FileName(low, high))

    def _write(self, level: int, low: int, high: int, pages: list[int], wal: tuple[int, int]) -> None:
        salts = (7, 8) if wal[0] else (0, 0)
        stamp = 1_700_000_000_000 + high
        header = Header(FLAG_NO_CHECKSUM, PAGE_SIZE, PAGES, low, high, stamp, 0, *wal, *salts)
        data = encode_file(header, [(pgno, page(pgno, self._newest[pgno])) for pgno in pages])
        place = self._place(level, low, high)
        place.with_suffix(".tmp").write_bytes(data)
        place.with_suffix(".tmp").rename(place)

    def _expire(self, level: int, step: int, until: int) -> None:
        while self._removed[level] + step <= until:
            low = self._removed[level] + 1
            self._removed[level] += step
            self._place(level, low, self._removed[level]).unlink()


class _Checker:
    """Knows which transaction wrote each page last, at any TXID so far. Small: what is measured is the replica."""

    def __init__(self) -> None:
        self._versions = [array("I") for _ in range(PAGES + 1)]
        self._known = 0

    def check(self, replica: Replica, reader: Any, wanted: range) -> int:
        """Read some pages in a transaction; returns its TXID. Raises `AssertionError` for a wrong page."""
        snapshot = replica.begin(replica.head.lineage.number)
        try:
            for txid in range(self._known + 1, snapshot.txid + 1):
                for pgno in changed(txid):
                    self._versions[pgno].append(txid)
            self._known = max(self._known, snapshot.txid)
            for pgno in wanted:
                versions = self._versions[pgno]
                expected = page(pgno, versions[bisect.bisect_right(versions, snapshot.txid) - 1])
                found = replica.read(snapshot, pgno, reader)
                if found != expected:
                    raise AssertionError(f"page {pgno} at TXID {snapshot.txid}: {found[:40]!r}, not {expected[:40]!r}")
        finally:
            replica.end(snapshot)
        return snapshot.txid


def _resident() -> int:
    """Bytes of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 (an iterator would hold one itself)


def follow(transactions: int, *, hydrate: bool) -> dict[str, Any]:
    """Follow that many transactions and return what it took. Raises `AssertionError` for a wrong page."""
    with tempfile.TemporaryDirectory(prefix="lazyreplica-follow-") as name:
        directory = Path(name) / "replica"
        writer = subprocess.Popen(
            [sys.executable, "-P", "-m", "soaking.follow", str(directory), str(transactions)],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        )
        try:
            while not (directory / "ready").exists():
                if writer.poll() is not None:
                    raise RuntimeError(f"the writer ended with {writer.returncode}")
                time.sleep(0.01)
            # What may be kept is bounded, at 12 MiB for small files and 16 MiB for the local copy's log: with smaller
            # bounds it is full after the warm-up, and whatever grows from then on has no bound.
            layers.KEEP_TOTAL = hydrator.FOLD_AT = 256 << 10
            options = Options(hydrate=hydrate, poll_interval=0.001, read_timeout=10, cache_size=256 << 10)
            replica = Replica(open_store(f"file://{directory}"), options)
            try:
                (directory / "go").touch()
                return _measure(replica, transactions) | {"hydrate": hydrate}
            finally:
                replica.close()
        finally:
            writer.kill()
            writer.wait()


def _measure(replica: Replica, transactions: int) -> dict[str, Any]:
    checker, reader = _Checker(), replica.reader()
    samples: list[tuple[int, int]] = []
    """TXID, resident bytes."""
    start, txid, states, gone, number = time.monotonic(), 0, 0, 0, 0
    warm: tuple[int, int] | None = None
    while txid < transactions:
        before, number = txid, number + 1
        try:
            txid = checker.check(replica, reader, range(1 + number % 8, PAGES + 1, 8))
        except SnapshotGone:  # a slow moment of this machine, and retention is seconds here
            gone += 1
        if txid == before:
            time.sleep(0.001)
            continue
        states += 1
        samples.append((txid, _resident()))
        if warm is None and txid >= _WARM * transactions:
            warm = _descriptors(), threading.active_count()
    seconds = time.monotonic() - start
    assert warm is not None
    warm_memory = statistics.median(
        size for at, size in samples if at >= _WARM * transactions and at <= 0.5 * transactions
    )
    last_memory = statistics.median(size for at, size in samples if at >= 0.8 * transactions)
    return {
        "transactions": transactions,
        "states": states,
        "seconds": round(seconds, 1),
        "gone": gone,
        "memory_warm": warm_memory,
        "memory_end": last_memory,
        "growth": round(last_memory / warm_memory - 1, 4),
        "descriptors": [warm[0], _descriptors()],
        "threads": [warm[1], threading.active_count()],
    }


def is_flat(measured: dict[str, Any]) -> bool:
    """Whether nothing grew after the warm-up: memory by less than 5 %, descriptors and threads not at all."""
    (files_warm, files_end), (threads_warm, threads_end) = measured["descriptors"], measured["threads"]
    return bool(measured["growth"] < 0.05 and files_end <= files_warm + 2 and threads_end <= threads_warm)


def shown(measured: dict[str, Any]) -> str:
    """For people."""
    return (
        f"{'hydrating' if measured['hydrate'] else 'plain':<10} {measured['transactions']} transactions in "
        f"{measured['seconds']} s, {measured['states']} states checked, {measured['gone']} gone; memory "
        f"{measured['memory_warm'] / 1e6:.1f} -> {measured['memory_end'] / 1e6:.1f} MB ({measured['growth']:+.1%}), "
        f"descriptors {measured['descriptors'][0]} -> {measured['descriptors'][1]}, "
        f"threads {measured['threads'][0]} -> {measured['threads'][1]}"
    )


def main() -> None:
    directory, transactions = Path(sys.argv[1]), int(sys.argv[2])
    writer = Writer(directory)
    writer.commit(1)
    (directory / "ready").touch()
    while not (directory / "go").exists():
        time.sleep(0.005)
    for txid in range(2, transactions + 1):
        writer.commit(txid)
    time.sleep(3600)  # whoever started us ends us


if __name__ == "__main__":
    main()
