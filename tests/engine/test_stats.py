"""What a replica says of itself is what its store has seen."""

from __future__ import annotations

import logging
import random
from pathlib import Path

import pytest
from replicas import SpyStore, opened, pinned, read_database, read_page, start

from lazyreplica import listeners
from lazyreplica.errors import StoreUnavailable
from lazyreplica.events import Event, HydrationDone, RequestDone, TransactionArrived
from lazyreplica.extents import Extents, State
from lazyreplica.listeners import add_listener
from lazyreplica.registry import all_stats


def test_requests_and_bytes_are_those_of_the_store(tmp_path: Path) -> None:
    history, directory = start(tmp_path / "replica", size=2000)
    spy = SpyStore(directory.url)
    with opened(spy) as replica:
        assert read_database(replica) == history.database()
        read_database(replica)
        stats = replica.stats()
        assert stats.bytes == sum(length for _, _, length in spy.reads)
        assert (stats.requests, stats.listings) == (len(spy.reads) + 1, spy.listings)
        assert stats.memory_hits >= 2000 and stats.misses > 0
        assert stats.memory_hits + stats.ahead_hits + stats.misses == 2 * 2000
        assert (stats.polls, stats.failures, stats.transactions, stats.lag) == (0, 0, 0, -1)
        assert 2000 * 512 < stats.cache_bytes <= replica.options.cache_size
        assert (stats.hydration_progress, stats.hydration_txid) == (0, None)
        history.commit([3, 4])
        directory.sync(history)
        replica.refresh()
        later = replica.stats()
        assert (later.txid, later.polls, later.transactions) == (f"{2:016x}", 1, 1)
        assert 0 <= later.lag < 60


@pytest.mark.slow
def test_pages_read_ahead_are_read_or_wasted(tmp_path: Path) -> None:
    history, directory = start(tmp_path / "replica", size=20_000)
    with opened(directory, cache_size=1 << 20) as replica:
        with pinned(replica) as snapshot:
            reader = replica.reader()
            for pgno in range(1, 3001):
                assert replica.read(snapshot, pgno, reader) == history.states[1][pgno]
            at_work = replica.stats()
            assert at_work.pages_ahead > 2000 and at_work.pages_ahead_unused == 0
            # Where nothing follows on from one page to the next, what was read ahead before is pushed out unread.
            for pgno in random.Random(1).sample(range(3001, 20_001), 4000):
                read_page(replica, snapshot, pgno)
        for pgno in (6000, 6001, 6002):
            replica.layers.extents.drop(snapshot.owner(pgno).number)
        stats = replica.stats()
        assert 0 < stats.pages_ahead_unused < stats.pages_ahead


def test_what_did_not_come_was_not_read_ahead() -> None:
    extents = Extents(1 << 20, 1 << 20)
    came, _ = extents.begin(1, 0, 1000, State.WAITING, (0, 1000))
    failed, _ = extents.begin(1, 2000, 3000, State.WAITING, (2000, 3000))
    for extent in (came, failed):
        extents.announce(extent, 10)
        assert extents.claim(extent)
    extents.finish(came, bytes(1000))
    extents.fail(failed)
    assert (extents.pages_ahead, extents.pages_unused) == (10, 0)
    came.ahead -= 4
    extents.drop(1)
    assert (extents.pages_ahead, extents.pages_unused, extents.memory) == (10, 6, 0)


def test_listeners_hear_of_requests_transactions_and_hydration(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    history, directory = start(tmp_path / "replica")
    spy = SpyStore(directory.url)
    heard: list[Event] = []

    def broken(event: Event) -> None:
        raise RuntimeError(f"cannot take {event}")

    removers = [add_listener(heard.append), add_listener(broken)]
    try:
        with caplog.at_level(logging.ERROR), opened(spy, hydrate=True) as replica:
            while not any(isinstance(event, HydrationDone) for event in heard):
                assert replica.hydration_progress <= 100
            history.commit([3])
            directory.sync(history)
            replica.refresh()
            spy.before_list = refuse
            with pytest.raises(StoreUnavailable):
                replica.refresh()
            assert (replica.stats().failures, replica.stats().failed_polls) == (1, 1)
            for remove in removers:
                remove()
            known = len(heard)
            spy.before_list = lambda: None
            replica.refresh()
    finally:
        for remove in removers:
            remove()
    assert len(heard) == known and not listeners.present
    assert "a listener failed on RequestDone" in caplog.text
    assert [(e.txid, e.url) for e in heard if isinstance(e, TransactionArrived)] == [(f"{2:016x}", directory.url)]
    requests = [event for event in heard if isinstance(event, RequestDone)]
    assert all(event.url == directory.url and 0 <= event.seconds < 60 for event in requests)
    assert {event.method for event in requests} == {"list", "read", "get"}
    assert [event.method for event in requests if event.outcome == "StoreUnavailable"] == ["list"]
    assert all(event.outcome in {"ok", "StoreUnavailable"} for event in requests)


def refuse() -> None:
    raise StoreUnavailable("nobody answers")


def test_nothing_is_open() -> None:
    assert all_stats() == {}
