"""When the head follows: by itself, when asked, and after a sleep."""

from __future__ import annotations

import logging
import threading
import time

import pytest
from replicas import ReplicaDirectory, SpyStore, opened, read_database, start

from lazyreplica import clock, follower
from lazyreplica.errors import (
    WaitTimeout,
)
from support.waiting import eventually


def test_a_follower_notices_by_itself(directory: ReplicaDirectory) -> None:
    history, _ = start(directory.path)
    with opened(directory, poll_interval=0.02) as replica:
        for _ in range(3):
            history.commit([2])
            directory.sync(history)
            eventually(lambda: replica.head.txid == history.txid)
            assert read_database(replica) == history.database()
        assert 0 <= replica.lag < 1


def test_a_follower_that_fails_says_so_once_and_recovers(
    directory: ReplicaDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    history, _ = start(directory.path)
    with caplog.at_level(logging.INFO), opened(directory, poll_interval=0.01) as replica:
        directory.path.rename(directory.path.with_name("away"))
        eventually(lambda: "cannot follow" in caplog.text)
        time.sleep(0.05)
        assert sum(r.levelno == logging.WARNING for r in caplog.records) == 1
        directory.path.with_name("away").rename(directory.path)
        history.commit([2])
        directory.sync(history)
        eventually(lambda: replica.head.txid == 2)
        eventually(lambda: "again" in caplog.text)


def test_a_fixed_head_moves_only_when_asked(directory: ReplicaDirectory) -> None:
    history, _ = start(directory.path)
    with opened(directory) as replica:
        history.commit([2])
        directory.sync(history)
        assert replica.lag == -1
        assert replica.options.staleness_limit == float("inf")
        assert read_database(replica) == history.database(1)
        replica.refresh()
        assert read_database(replica) == history.database(2)


@pytest.mark.parametrize("poll_interval", [0.0, 600.0])
def test_a_transaction_after_a_sleep_polls_first_and_once(
    directory: ReplicaDirectory, poll_interval: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept = 0.0
    monkeypatch.setattr(follower, "now", lambda: clock.now() + slept)
    history, _ = start(directory.path)
    spy = SpyStore(directory.url)
    with opened(spy, max_staleness=60.0, poll_interval=poll_interval) as replica:
        assert read_database(replica) == history.database(1)
        history.commit([2])
        directory.sync(history)
        slept = 30
        assert read_database(replica) == history.database(1), "not stale yet"
        slept = 90
        listings = spy.listings
        assert read_database(replica) == history.database(2)
        assert read_database(replica) == history.database(2)
        assert spy.listings == listings + 1


def test_a_stale_replica_that_cannot_poll_answers_with_what_it_has(
    directory: ReplicaDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    history, _ = start(directory.path)
    with opened(directory, max_staleness=0.0) as replica:
        directory.path.rename(directory.path.with_name("away"))
        assert read_database(replica) == history.database()
        assert "cannot refresh" in caplog.text


@pytest.mark.parametrize("poll_interval", [0.0, 0.05])
def test_wait_for_returns_when_the_transaction_is_there(directory: ReplicaDirectory, poll_interval: float) -> None:
    history, _ = start(directory.path)
    history.commit([2])
    with opened(directory, poll_interval=poll_interval) as replica:
        timer = threading.Timer(0.1, lambda: directory.sync(history))
        timer.start()
        started = time.monotonic()
        replica.wait_for(2, 5)
        assert time.monotonic() - started < 2
        assert read_database(replica) == history.database(2)
        replica.wait_for(1, 0)
        timer.join()


def test_wait_for_gives_up_in_time(directory: ReplicaDirectory) -> None:
    start(directory.path)
    with opened(directory) as replica:
        started = time.monotonic()
        with pytest.raises(WaitTimeout, match=r"is at TXID 0000000000000001 after 0\.1 seconds") as caught:
            replica.wait_for(2, 0.1)
        assert 0.09 < time.monotonic() - started < 5
        assert isinstance(caught.value, TimeoutError)


# Regression (replica.py, `wait_for`): the deadline is looked at before the store is, so a timeout of 0 never polls.
def test_wait_for_without_time_looks_once(directory: ReplicaDirectory) -> None:
    history, _ = start(directory.path)
    with opened(directory) as replica:
        history.commit([2])
        directory.sync(history)
        replica.wait_for(2, 0)


def test_unpinned_snapshots_leave_nothing_behind(directory: ReplicaDirectory) -> None:
    history, _ = start(directory.path)
    with opened(directory, poll_interval=600.0, max_staleness=600.0) as replica:
        for _ in range(50):
            history.commit([2])
            directory.sync(history)
            replica._follower.poll()
            read_database(replica)
        assert not replica._head._pins
        assert not replica._head._history
        assert len(list(replica.head.pages.layers())) <= 3
        assert len(replica.layers._open) <= 4
