"""Replicas of very many files: what opening and following them takes does not grow beyond what is stated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import pytest

import lazyreplica
from lazyreplica.config import Options
from lazyreplica.errors import StoreUnavailable
from lazyreplica.layers import Layers
from lazyreplica.pagemap import Layer
from lazyreplica.replica import Replica
from lazyreplica.storage import StoredFile
from lazyreplica.storage.local import LocalStore
from lazyreplica.storage.url import FileURL, parse_replica_url
from support.manyfiles import ManyFiles, marks
from support.servers import S3Server

pytestmark = pytest.mark.slow

STILL = {"hydrate": False, "poll_interval": 0}
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")


class Paced(LocalStore):
    """Reads so many files a second, and holds `timeout` against that: without waiting, so that nothing is by chance."""

    rate = 20
    parallel = 8  # type: ignore[assignment]

    def read_many(self, wanted: Iterable[tuple[StoredFile, int, int]], timeout: float) -> Generator[bytes]:
        for count, job in enumerate(wanted):
            if count > self.rate * timeout:
                raise StoreUnavailable(f"not within {timeout:g} seconds")
            yield self.read(*job, timeout)


def test_a_long_chain_takes_the_time_that_it_needs(tmp_path: Path) -> None:
    """The timeout is for requests. It was one for the whole chain, which with 5000 files nobody could open over S3."""
    files = ManyFiles(tmp_path / "ltx" / "0")
    files.commit(999)
    url = parse_replica_url(f"file://{tmp_path}")
    assert isinstance(url, FileURL)
    replica = Replica(Paced(url), Options(hydrate=False, poll_interval=0.0, read_timeout=15.0))
    try:
        assert replica.head.txid == 1000
    finally:
        replica.close()


@LINUX
def test_a_chain_of_two_thousand_files_takes_few_connections(rclone: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in rclone.env.items():
        monkeypatch.setenv(name, value)
    assert rclone.root is not None
    bucket = rclone.new_bucket()
    files = ManyFiles(rclone.root / bucket / "app" / "0000")
    files.commit(1999)
    before, most = _descriptors(), 0

    make = Layers._make

    def make_and_count(self: Layers, *rest: Any) -> Layer:
        nonlocal most
        most = max(most, _descriptors())  # while the chain's other files are on their way
        return make(self, *rest)

    monkeypatch.setattr(Layers, "_make", make_and_count)
    db = lazyreplica.connect(rclone.url(bucket, "app"), **STILL)
    try:
        assert db.execute("SELECT id, mark FROM t ORDER BY id").fetchall() == marks(2000)
    finally:
        db.close()
    assert most - before < 80
    assert _descriptors() <= before + 2


MEASURE = textwrap.dedent("""
    import gc, json, os, sys, time
    from pathlib import Path
    import lazyreplica
    from lazyreplica import registry
    from support.manyfiles import ManyFiles, marks
    from support.memory import peak_resident, status

    COUNT, LATER = int(sys.argv[1]), int(sys.argv[2])
    level = Path(sys.argv[3]) / "ltx" / "0"

    def resident():
        return status("VmRSS") / 1e6

    files = ManyFiles(level)
    files.commit(COUNT - 1)
    gc.collect()
    found = {"before": resident()}
    start = time.monotonic()
    db = lazyreplica.connect(f"file://{sys.argv[3]}", hydrate=False, poll_interval=0)
    found["open"] = time.monotonic() - start
    found["peak"] = peak_resident() / 1e6
    found["opened"] = resident()
    right = db.execute("SELECT id, mark FROM t ORDER BY id").fetchall() == marks(COUNT)
    (entry,) = registry._entries.values()
    start = time.monotonic()
    for _ in range(LATER):
        files.commit()
        lazyreplica.refresh(db)
    found["follow"] = time.monotonic() - start
    right = right and db.execute("SELECT id, mark FROM t ORDER BY id").fetchall() == marks(COUNT + LATER)
    found["right"] = right
    found["layers"] = len(entry.replica.layers._open)
    found["descriptors"] = len(os.listdir("/proc/self/fd"))
    db.close()
    print(json.dumps(found))
""")


@LINUX
def test_a_hundred_thousand_files_open_in_bounded_time_and_memory(tmp_path: Path) -> None:
    """0.2 ms a file to open it, and 1 KB of memory for what a listing says of it. Files whose pages are all superseded
    cost nothing else: only 9 MiB of what was read is kept, and a layer only while a page may come from it."""
    count = 100_000
    found = _measure(tmp_path, count, 3)
    assert found["right"]
    assert found["open"] < 120, "0.15 ms a file on a quiet machine"
    assert found["peak"] - found["before"] < 2.0 * count / 1000 + 64, "MB"
    assert found["opened"] - found["before"] < 1.4 * count / 1000 + 32, (
        "MB; 1.0, and what the allocator does not give back"
    )
    assert found["layers"] < 500
    assert found["descriptors"] < 20


def _measure(tmp_path: Path, *numbers: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, numbers), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=230,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "TMPDIR": str(tmp_path)},
        check=False,
    )
    assert not done.stderr and done.returncode == 0, done.stderr
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


def _descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
