"""A full disk at any write: the replica goes on from the store, no page is wrong, and the next open works."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from replicas import FULL, History, ReplicaDirectory, complete, opened, pinned, read_database, start

from lazyreplica import filling, hydrator
from lazyreplica.local import deltalog
from lazyreplica.replica import Replica
from support.waiting import eventually

pytestmark = pytest.mark.slow

WRITES = ("pwrite", "ftruncate", "copy_file_range", "fdatasync", "fsync", "link", "rename")
MOST = 400


class Full:
    """From the n-th write on: one that fails, or all; but for those of the primary, below `spared`."""

    def __init__(self, patch: pytest.MonkeyPatch, fail_at: int, forever: bool, spared: Path) -> None:
        self._spared = str(spared)
        self._left = fail_at
        self._forever = forever
        self._lock = threading.Lock()
        self.failed = False
        for name in WRITES:
            patch.setattr(os, name, self._failing(getattr(os, name)))

    def _failing(self, real):  # type: ignore[no-untyped-def]
        def call(*args, **more):  # type: ignore[no-untyped-def]
            if str(args[0]).startswith(self._spared):
                return real(*args, **more)
            with self._lock:
                self._left -= 1
                fails = self._left == -1 or (self._left < 0 and self._forever)
                self.failed |= fails
            if fails:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **more)

        return call


def right(replica: Replica, history: History) -> None:
    with pinned(replica) as snapshot:
        view = replica.view(snapshot)
        for pgno, page in history.states[snapshot.txid].items():
            assert view is None or view.page(pgno) in (None, page)
        assert read_database(replica, snapshot) == history.database(snapshot.txid)


def work(directory: ReplicaDirectory, history: History, target: Path) -> None:
    """Fill, append, build beside, fold in place, publish, close."""
    options = {"hydration_path": str(target), **FULL}
    with contextlib.ExitStack() as stack:
        replica = stack.enter_context(opened(directory, **options))
        other = stack.enter_context(contextlib.ExitStack())
        joined = other.enter_context(opened(directory, **options))
        for written, size in (([2, 3], 20), ([3, 9], 24), ([1], 18)):
            eventually(lambda: complete(replica) or replica.hydration_file is None)
            history.commit(written, size)
            directory.sync(history)
            replica.refresh()
            right(replica, history)
            if size != 18:
                right(joined, history)
            if size == 24:
                other.close()


@pytest.mark.parametrize("forever", [False, True])
def test_a_disk_that_is_full_at_any_write(
    directory: ReplicaDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_kept: None, forever: bool
) -> None:
    monkeypatch.setattr(deltalog, "_GROW", 16 << 10)
    monkeypatch.setattr(hydrator, "FOLD_AT", 1000)
    monkeypatch.setattr(filling, "CHUNK", 4000)
    monkeypatch.setattr(filling, "_YIELD", 0.0)
    for fail_at in range(MOST):
        replica = ReplicaDirectory(tmp_path / f"replica-{fail_at}")
        history, _ = start(replica.path, 20)
        target = tmp_path / f"local-{fail_at}.db"
        with monkeypatch.context() as patch:
            full = Full(patch, fail_at, forever, replica.path)
            work(replica, history, target)
        with opened(replica, hydration_path=str(target), **FULL) as again:
            right(again, history)
            eventually(lambda: complete(again))
            right(again, history)
        assert target.read_bytes() == history.database()
        shutil.rmtree(replica.path)
        shutil.rmtree(target.with_name(target.name + ".d"))
        target.unlink()
        if not full.failed:
            break
    else:
        raise AssertionError(f"more than {MOST} writes")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real one of 256 KiB."""
    path = tmp_path / "small"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(path)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("only root can mount")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.parametrize("pages", [40, 400, 600])
def test_a_real_disk_that_is_too_small(directory: ReplicaDirectory, small_disk: Path, pages: int) -> None:
    history, _ = start(directory.path, pages)
    target = small_disk / "local.db"
    for _ in range(2):
        with opened(directory, hydration_path=str(target), **FULL) as replica:
            right(replica, history)
            for n in range(60):
                history.commit(range(1 + n % 7, min(30, pages)))
                directory.sync(history)
                replica.refresh()
                if n % 10 == 9:
                    right(replica, history)
            if replica.hydration_file is not None:
                eventually(lambda: complete(replica) or replica.hydration_file is None)
            right(replica, history)
        if target.exists():
            assert target.read_bytes() == history.database()
    filler = small_disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as writing:
        while True:
            writing.write(bytes(512))
    with opened(directory, hydration_path=str(target), **FULL) as replica:
        right(replica, history)
