"""Power loss at any moment, with any part of what was not synced lost: no wrong page is ever served."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from disk import Disk
from replicas import FULL, History, ReplicaDirectory, complete, local_database, opened, pinned, read_database, start

from lazyreplica import attachment, filling, hydrator
from lazyreplica.local import deltalog, state
from lazyreplica.local.directory import CopyDirectory
from support.waiting import eventually

pytestmark = pytest.mark.slow

CASES = 60


def changes(history: History, rng: random.Random) -> None:
    size = max(4, len(history.states[-1]) + rng.choice([0, 0, 0, 3, -3, 9, -9]))
    history.commit(rng.sample(range(1, size + 1), rng.randint(1, min(8, size))), size)


def work(history: History, directory: ReplicaDirectory, target: Path, rng: random.Random) -> None:
    """Fill, append, fold in place and beside, publish, close, again."""
    for _ in range(2):
        with contextlib.ExitStack() as stack:
            replica = stack.enter_context(opened(directory, hydration_path=str(target), **FULL))
            if rng.random() < 0.5:
                eventually(partial(complete, replica))
            others = CopyDirectory.open(str(target)) if rng.random() < 0.6 else None
            for _ in range(rng.randint(1, 6)):
                changes(history, rng)
                directory.sync(history)
                with pinned(replica) if rng.random() < 0.3 else contextlib.nullcontext():
                    replica.refresh()
                    if rng.random() < 0.5:
                        eventually(partial(complete, replica))
                if others is not None and rng.random() < 0.4:
                    others.abandon()
                    others = None
            if others is not None:
                others.abandon()
        changes(history, rng)
        directory.sync(history)


@contextlib.contextmanager
def up_to(directory: ReplicaDirectory, txid: int) -> Iterator[None]:
    """The store as it was; identities of files stay."""
    later = [(directory.place(0, n, n), directory.path / f"later-{n}") for _, n, _ in directory.files() if n > txid]
    for path, hidden in later:
        path.rename(hidden)
    try:
        yield
    finally:
        for path, hidden in later:
            hidden.rename(path)


def check(directory: ReplicaDirectory, history: History, target: Path) -> None:
    whole = [history.database(n) for n in range(1, history.txid + 1)]
    if target.exists():
        assert target.read_bytes() in whole, "what is published is one transaction"
    with opened(directory, hydration_path=str(target), **FULL) as replica:
        for _ in range(3):
            with pinned(replica) as snapshot:
                truth = history.states[snapshot.txid]
                view = replica.view(snapshot)
                for pgno, page in truth.items():
                    assert view is None or view.page(pgno) in (None, page), pgno
                assert read_database(replica, snapshot) == history.database(snapshot.txid)
        eventually(lambda replica=replica: complete(replica))
        assert local_database(replica) == history.database(replica.head.txid)
        newest = replica.head.txid
    published = target.read_bytes()
    assert [n for n in range(1, history.txid + 1) if history.database(n) == published] == [newest]


@pytest.mark.parametrize("seed", range(5))
def test_no_part_of_what_was_written_gives_a_wrong_page(
    directory: ReplicaDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_kept: None, seed: int
) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr(deltalog, "_GROW", 16 << 10)
    monkeypatch.setattr(hydrator, "FOLD_AT", 4000)
    monkeypatch.setattr(filling, "CHUNK", 2000)
    monkeypatch.setattr(filling, "_RUN", 2)
    history, _ = start(directory.path, 24)
    disk = Disk(tmp_path / "disk")
    (tmp_path / "disk" / "local.db.d").mkdir(parents=True)
    with disk.recording(monkeypatch):
        work(history, directory, tmp_path / "disk" / "local.db", rng)
    for case in range(CASES):
        root = tmp_path / f"case-{case}"
        root.mkdir()
        moment = rng.randrange(len(disk.moments))
        disk.after_power_loss(moment, root, random.Random(f"{seed} {case}"))
        for module in (attachment, state):
            monkeypatch.setattr(module, "boot_id", lambda case=case: f"boot {case}")
        now = rng.choice([history.txid, rng.randint(1, history.txid)])
        with up_to(directory, now):
            try:
                check(directory, history, root / "local.db")
            except BaseException as exc:
                exc.add_note(f"case {case}, moment {moment} of {len(disk.moments)}, the store at {now}")
                raise
