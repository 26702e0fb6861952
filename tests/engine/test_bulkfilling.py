"""Hydration by the bulk loader: what travels with the job, what is left to do by hand, and when it is asked again."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable

import pytest
from replicas import FULL, History, ReplicaDirectory, complete, hydration_file, local_database, opened, start

from lazyreplica import bulkfilling
from lazyreplica.bulk import BulkJob, BulkLoader
from lazyreplica.local.base import Base
from lazyreplica.replica import Replica
from support.waiting import eventually

SIZE = 3000
"""Pages of a base that is not kept in memory; the increments are."""


class Loaders:
    """What the loader is asked for, and what the parent writes by itself."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.jobs: list[BulkJob] = []
        self.by_hand = 0
        self.kill = False
        self.before: Callable[[], None] = lambda: None
        """Called when a loader is about to be started."""
        seen = self

        class Watched(BulkLoader):
            def __init__(self, job: BulkJob, *, kept_fds: tuple[int, ...]) -> None:
                seen.jobs.append(job)
                super().__init__(job, kept_fds=kept_fds)

            def start(self) -> None:
                seen.before()
                super().start()
                if seen.kill:
                    assert self._process is not None
                    os.kill(self._process.pid, signal.SIGKILL)

        real = Base.write

        def write(base: Base, pgno: int, pages: bytes) -> None:
            seen.by_hand += 1
            real(base, pgno, pages)

        monkeypatch.setattr(bulkfilling, "WORTH", 1)
        monkeypatch.setattr(bulkfilling, "BulkLoader", Watched)
        monkeypatch.setattr(Base, "write", write)


@pytest.fixture
def loaders(monkeypatch: pytest.MonkeyPatch) -> Loaders:
    return Loaders(monkeypatch)


def replica_with_increments(directory: ReplicaDirectory) -> History:
    history, _ = start(directory.path, SIZE)
    for number in range(6):
        history.commit(random.Random(number).sample(range(1, SIZE + 1), 50))
        directory.sync(history)
    return history


def is_local(replica: Replica, history: History) -> bool:
    return complete(replica) and local_database(replica) == history.database()


def test_what_is_in_memory_travels_with_the_job(directory: ReplicaDirectory, loaders: Loaders) -> None:
    history = replica_with_increments(directory)
    with opened(directory, **FULL) as replica:
        eventually(lambda: is_local(replica, history))
        assert hydration_file(replica).read_bytes() == history.database()
    (job,) = loaders.jobs
    changed = {pgno for pgnos in history.changed[2:] for pgno in pgnos}
    assert sorted(pgno for pgno, _ in job.frames) == sorted(changed)
    assert [file.count for file in job.files] == [SIZE - len(changed)]
    assert not loaders.by_hand, "each page would keep readers from the interpreter lock"


def test_what_a_killed_child_has_not_brought_is_brought_by_hand(directory: ReplicaDirectory, loaders: Loaders) -> None:
    history = replica_with_increments(directory)
    loaders.kill = True
    with opened(directory, **FULL) as replica:
        eventually(lambda: is_local(replica, history))
    assert len(loaders.jobs) == 1
    assert loaders.by_hand


def test_another_history_is_loaded_in_bulk_as_well(directory: ReplicaDirectory, loaders: Loaders) -> None:
    history = replica_with_increments(directory)
    with opened(directory, **FULL) as replica:
        eventually(lambda: is_local(replica, history))
        directory.wipe()
        other = History("other")
        other.commit(size=SIZE)
        directory.sync(other)
        replica.refresh()
        eventually(lambda: is_local(replica, other))
    assert len(loaders.jobs) == 2
    assert not loaders.by_hand


@pytest.mark.parametrize("killed", [False, True])
def test_another_history_comes_before_the_child_has_begun(
    directory: ReplicaDirectory, loaders: Loaders, killed: bool
) -> None:
    """What goes wrong with the copy of before is nobody's business any more."""
    replica_with_increments(directory)
    begun, replaced = threading.Event(), threading.Event()

    def before() -> None:
        loaders.kill = killed and len(loaders.jobs) == 1
        begun.set()
        assert replaced.wait(30)

    loaders.before = before
    with opened(directory, **FULL) as replica:
        assert begun.wait(30)
        directory.wipe()
        other = History("other")
        other.commit(size=SIZE)
        directory.sync(other)
        replica.refresh()
        replaced.set()
        eventually(lambda: is_local(replica, other))
    assert len(loaders.jobs) == 2
    assert not loaders.by_hand


def test_a_chain_of_many_small_files_makes_a_small_job(directory: ReplicaDirectory, loaders: Loaders) -> None:
    """Nothing in it is as long as the database for each of them."""
    history, _ = start(directory.path, SIZE)
    for _ in range(300):
        history.commit([SIZE])
        directory.sync(history)
    with opened(directory, **FULL) as replica:
        eventually(lambda: is_local(replica, history))
    (job,) = loaders.jobs
    assert len(job.files) == len(job.frames) == 1
