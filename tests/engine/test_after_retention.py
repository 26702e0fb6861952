"""The file that a pinned snapshot stands on was deleted: its pages are read as fast as before, from another one."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from replicas import History, ReplicaDirectory, SpyStore, flying, opened, pinned, read_page

from lazyreplica import layers
from lazyreplica.errors import StoreUnavailable
from lazyreplica.replica import Replica
from lazyreplica.snapshot import Snapshot
from lazyreplica.storage import StoredFile
from support.waiting import eventually

PAGES = 400


@pytest.fixture(autouse=True)
def _read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "KEEP_FILE", 0)
    monkeypatch.setattr(layers, "KEEP_TOTAL", 0)
    monkeypatch.setattr(layers, "_HEAD", 100)


def retained(directory: ReplicaDirectory) -> History:
    """A snapshot of many pages, and a transaction that a newer snapshot takes in."""
    history = History()
    history.commit(size=PAGES)
    directory.write(history, 9, 1)
    history.commit([3])
    directory.sync(history)
    return history


def retain(history: History, directory: ReplicaDirectory) -> None:
    """What the primary does once an hour: a new snapshot, and the old one goes."""
    directory.write(history, 9, 1, history.txid)
    directory.remove(9, 1)


@pytest.fixture
def spy(directory: ReplicaDirectory) -> SpyStore:
    return SpyStore(directory.url, parallel=4)


def scan(replica: Replica, snapshot: Snapshot, first: int, last: int) -> list[bytes]:
    reader = replica.reader()
    return [replica.read(snapshot, pgno, reader) for pgno in range(first, last)]


# Regression (fetcher.py): every page of a vanished file was a request of its own.
def test_a_scan_of_a_vanished_file_reads_ahead_in_the_one_that_stands_in(
    directory: ReplicaDirectory, spy: SpyStore
) -> None:
    history = retained(directory)
    with opened(spy, cache_size=0) as replica, pinned(replica) as snapshot:
        retain(history, directory)
        before = len(spy.reads)
        assert scan(replica, snapshot, 1, PAGES + 1) == [history.states[2][p] for p in range(1, PAGES + 1)]
        assert len(spy.reads) - before < 30


# Regression (fetcher.py): a stream counted them as on their way, and each was a request of its own.
def test_announced_pages_whose_requests_fail_are_sent_for_again_together(
    directory: ReplicaDirectory, spy: SpyStore
) -> None:
    history = retained(directory)
    with opened(spy, cache_size=0) as replica, pinned(replica) as snapshot:
        replica.layers.extents.drop(snapshot.owner(10).number)
        reader, failed = replica.reader(), []

        def fail(file: StoredFile, offset: int, length: int) -> None:
            if threading.current_thread().name == "lazyreplica-readahead":
                failed.append(length)
                raise StoreUnavailable("no answer")

        spy.before_read = fail
        for pgno in range(10, 20):
            assert replica.read(snapshot, pgno, reader) == history.states[2][pgno]
            eventually(lambda: not flying(replica))
        assert sum(failed) > 50 * 500, "many pages were announced, and failed"
        spy.before_read = lambda *args: None
        before = len(spy.reads)
        for pgno in range(20, PAGES + 1):
            assert replica.read(snapshot, pgno, reader) == history.states[2][pgno]
        assert len(spy.reads) - before <= 5


def test_a_prediction_asks_storage_for_no_plan(directory: ReplicaDirectory, spy: SpyStore) -> None:
    """Only states that are known already stand in for what is read ahead, whoever is planning meanwhile."""
    history = retained(directory)
    with opened(spy, cache_size=0) as replica, pinned(replica) as snapshot:
        retain(history, directory)
        assert read_page(replica, snapshot, 7) == history.states[2][7]
        listings = spy.listings
        relocator = replica._fetcher._relocator
        with relocator._planning:
            assert scan(replica, snapshot, 20, 60) == [history.states[2][p] for p in range(20, 60)]
        assert spy.listings == listings


def test_the_crawl_reads_from_what_stands_in(directory: ReplicaDirectory, spy: SpyStore) -> None:
    history = retained(directory)
    with opened(spy) as replica, pinned(replica) as snapshot:
        retain(history, directory)
        assert read_page(replica, snapshot, 7) == history.states[2][7]
        before = len(spy.reads)
        found = replica._gatherer.gather(snapshot, range(20, 60))
        assert found == {p: history.states[2][p] for p in range(20, 60)}
        assert len(spy.reads) - before <= 2
        assert all((p, snapshot.owner(p).number) in replica._cache for p in range(20, 60))


# -- how long it takes to find out --


# Regression (relocate.py): the lock was held across network I/O, and each reader in turn waited for its own timeout.
def test_where_vanished_pages_are_is_waited_for_once(directory: ReplicaDirectory, spy: SpyStore) -> None:
    history = retained(directory)
    with opened(spy, cache_size=0, read_timeout=0.4) as replica, pinned(replica) as snapshot:
        retain(history, directory)
        hanging = threading.Event()

        def hang() -> None:
            hanging.wait(0.4)
            raise StoreUnavailable("no answer within 0.4 seconds")

        spy.before_list = hang

        def read(pgno: int) -> float:
            started = time.monotonic()
            with pytest.raises(StoreUnavailable):
                read_page(replica, snapshot, pgno)
            return time.monotonic() - started

        with ThreadPoolExecutor(5) as pool:
            assert max(pool.map(read, range(10, 15))) < 0.9
        hanging.set()
        spy.before_list = lambda: None
        assert read_page(replica, snapshot, 10) == history.states[2][10], "and then it is tried anew"
