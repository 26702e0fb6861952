"""A store that does not answer must not stop readers of what is local, nor anybody for longer than was asked for."""

from __future__ import annotations

import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import apsw
import pytest
from replicas import FULL, ReplicaDirectory, SpyStore, complete, opened, read_database, sqlite_history, start

import lazyreplica
from lazyreplica import registry
from lazyreplica.errors import LazyReplicaError, LineageChanged, StoreUnavailable, WaitTimeout
from lazyreplica.storage import StoredFile
from support.waiting import eventually


class SilentStore(SpyStore):
    """Answers until it is `silent`; then every request takes its whole timeout, unless the store is closed."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.silent = False
        self._over = threading.Event()

    def _wait(self, timeout: float) -> None:
        if self.silent:
            self._over.wait(timeout)
            raise StoreUnavailable("no answer")

    def list_all(self, timeout: float) -> Any:
        self._wait(timeout)
        return super().list_all(timeout)

    def get(self, level: int, name: Any, limit: int, timeout: float) -> tuple[StoredFile, bytes] | None:
        self._wait(timeout)
        return super().get(level, name, limit, timeout)

    def close(self) -> None:
        self._over.set()
        super().close()


@pytest.mark.slow
def test_a_local_replica_is_read_without_waiting_for_a_silent_store(directory: ReplicaDirectory) -> None:
    history, _ = start(directory.path, 20)
    store = SilentStore(directory.url)
    with opened(store, poll_interval=0.05, max_staleness=0.1, read_timeout=30.0, **FULL) as replica:
        eventually(lambda: complete(replica) and replica.lag >= 0)
        store.silent = True
        times = []
        for _ in range(40):
            began = time.monotonic()
            assert read_database(replica) == history.database()
            times.append(time.monotonic() - began)
            time.sleep(0.025)
        assert replica.lag > 0.5
        times.sort()
        assert times[-2] < 1, "one transaction may look whether the poll that is under way ends, the others do not"
        assert times[-1] < 4


def test_wait_for_ends_in_time_when_nobody_answers(directory: ReplicaDirectory) -> None:
    start(directory.path)
    store = SilentStore(directory.url)
    with opened(store, poll_interval=0.05, read_timeout=30.0) as replica:
        store.silent = True
        time.sleep(0.2)  # the follower is in a poll of its own by now
        began = time.monotonic()
        with pytest.raises(WaitTimeout):
            replica.wait_for(2, 0.5)
        assert time.monotonic() - began < 3


def test_those_who_wait_for_an_open_share_its_failure(
    directory: ReplicaDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = []

    def refuse(url: str, credentials: object) -> SpyStore:
        attempts.append(url)
        time.sleep(0.5)
        raise StoreUnavailable("nobody answers")

    monkeypatch.setattr(registry, "open_store", refuse)

    def attempt(_: int) -> type[Exception]:
        with pytest.raises(LazyReplicaError) as caught:
            lazyreplica.connect(directory.url)
        return caught.type

    with ThreadPoolExecutor(6) as pool:
        began = time.monotonic()
        kinds = list(pool.map(attempt, range(6)))
    assert time.monotonic() - began < 2
    assert all(issubclass(kind, StoreUnavailable) for kind in kinds)
    assert len(attempts) < 3
    monkeypatch.undo()
    start(directory.path)
    lazyreplica.connect(directory.url, hydrate=False).close()


def test_an_error_inside_a_with_block_is_not_hidden(directory: ReplicaDirectory, tmp_path: Any) -> None:
    """APSW releases its savepoint when the block ends; SQLite must not have rolled back by itself."""
    directory.write(sqlite_history(tmp_path / "a.db", ["CREATE TABLE a(x)"]), 0, 1)
    connection = lazyreplica.connect(directory.url, hydrate=False, poll_interval=0)
    connection.execute("SELECT * FROM a").fetchall()
    directory.wipe()
    directory.write(sqlite_history(tmp_path / "b.db", ["CREATE TABLE b(x)"]), 0, 1)
    lazyreplica.refresh(connection)
    with pytest.raises(LineageChanged), connection:
        connection.execute("SELECT * FROM a").fetchall()
    connection.close()


def test_a_connection_may_be_collected_in_one_of_our_threads(
    directory: ReplicaDirectory, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The garbage collector runs in any thread, and closes what it finds there."""
    directory.write(sqlite_history(tmp_path / "a.db", ["CREATE TABLE a(x)"]), 0, 1)
    collected = threading.Event()
    original = lazyreplica.follower.Follower.poll  # type: ignore[attr-defined]

    def poll(self: Any, **options: Any) -> None:
        if not holder:
            gc.collect()
            collected.set()
        original(self, **options)

    holder: list[apsw.Connection] = [lazyreplica.connect(directory.url, hydrate=True, poll_interval=0.05)]
    copy = holder[0].pragma("litestream_hydration_file")
    monkeypatch.setattr("lazyreplica.follower.Follower.poll", poll)
    cycle: list[Any] = [holder.pop()]
    cycle.append(cycle)
    del cycle
    assert collected.wait(5)
    eventually(lambda: not _exists(str(copy)), what="the local copy goes with its connection")


def _exists(path: str) -> bool:
    from pathlib import Path

    return Path(path).exists()
