"""Many pages at once in the background: few requests, and what fails of them costs the others nothing."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from replicas import PAGE_SIZE, History, ReplicaDirectory, SpyStore, flying, opened, pinned

from lazyreplica import layers
from lazyreplica.crawl import crawl
from lazyreplica.errors import FileVanished, LazyReplicaError, StoreUnavailable
from lazyreplica.ltx import lazyindex
from lazyreplica.storage import StoredFile


@pytest.fixture(autouse=True)
def _read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KEEP_FILE", "KEEP_TOTAL", "VERIFY_FILE"):
        monkeypatch.setattr(layers, name, 0)
    monkeypatch.setattr(layers, "_HEAD", 100)
    monkeypatch.setattr("lazyreplica.spans.GAP", 0)


@pytest.fixture
def history(directory: ReplicaDirectory) -> History:
    """A snapshot of 40 pages, and 8 transactions with a page each."""
    history = History()
    history.commit(size=40)
    directory.write(history, 9, 1)
    for pgno in range(1, 9):
        history.commit([pgno])
        directory.sync(history)
    return history


@pytest.fixture
def spy(directory: ReplicaDirectory) -> SpyStore:
    return SpyStore(directory.url, parallel=4)


def failing(error: Exception, fails: Callable[[StoredFile, int], bool]) -> Callable[[StoredFile, int, int], None]:
    def fail(file: StoredFile, offset: int, length: int) -> None:
        if fails(file, offset):
            raise error

    return fail


# Regression (fetcher.py, `_burst`): the first reply that was an error ended them all, also those of other files.
def test_a_vanished_file_costs_only_its_own_pages(history: History, spy: SpyStore) -> None:
    with opened(spy) as replica, pinned(replica) as snapshot:
        replica.layers.extents.drop(snapshot.owner(9).number)
        spy.before_read = failing(FileVanished("gone"), lambda file, offset: file.name.max_txid in (3, 4))
        found = replica._gatherer.gather(snapshot, range(1, 12))
        assert found == {p: history.states[-1][p] for p in range(1, 12) if p not in (2, 3)}
        assert not flying(replica)


@pytest.mark.parametrize("error", [StoreUnavailable("no answer"), RuntimeError("a bug")])
def test_a_burst_that_fails_in_part_leaves_nothing_on_its_way(
    history: History, spy: SpyStore, error: Exception
) -> None:
    with opened(spy) as replica, pinned(replica) as snapshot:
        spy.before_read = failing(error, lambda file, offset: file.name.max_txid == 5)
        try:
            found = replica._gatherer.gather(snapshot, range(1, 9))
        except RuntimeError:
            assert not isinstance(error, LazyReplicaError)
        else:
            assert {p: history.states[-1][p] for p in found} == found
            assert 4 not in found
        assert not flying(replica)
        spy.before_read = lambda *args: None
        found = replica._gatherer.gather(snapshot, range(1, 9))
        assert found == {p: history.states[-1][p] for p in range(1, 9)}


def test_damaged_bytes_are_left_out(history: History, spy: SpyStore) -> None:
    with opened(spy) as replica, pinned(replica) as snapshot:
        spy.change = lambda file, offset, data: bytes(len(data)) if file.name.max_txid == 5 else data
        found = replica._gatherer.gather(snapshot, range(1, 9))
        assert found == {p: history.states[-1][p] for p in range(1, 9) if p != 4}


@pytest.mark.parametrize("room", [0, 2000])
def test_without_room_for_what_was_read_ahead_it_costs_no_second_request(
    history: History, spy: SpyStore, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    monkeypatch.setattr(layers, "PASSING_TOTAL", room)
    with opened(spy) as replica, pinned(replica) as snapshot:
        before = len(spy.reads)
        assert len(replica._gatherer.gather(snapshot, range(1, 9))) == 8
        assert len(spy.reads) == before + 8


def test_pages_that_are_none_are_left_out(history: History, spy: SpyStore) -> None:
    with opened(spy) as replica, pinned(replica) as snapshot:
        assert set(replica._gatherer.gather(snapshot, [0, -1, 1, 40, 41, 1 << 40, 1])) == {1, 40}


# -- page indexes that are not here --


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page index of many pieces, of which next to nothing comes with the open."""
    monkeypatch.setattr(layers, "_TAIL", 200)
    monkeypatch.setattr(layers, "_TAIL_SHARE", 1 << 30)
    monkeypatch.setattr(
        lazyindex.LazyIndex.__init__, "__kwdefaults__", {"block_size": 512, "read_size": 1024, "capacity": 1 << 20}
    )


def large(directory: ReplicaDirectory) -> History:
    history = History()
    rng = random.Random(3)
    history.put(
        {p: rng.randbytes(8) * (PAGE_SIZE // 8) if p % 3 else rng.randbytes(PAGE_SIZE) for p in range(1, 4001)}, 4000
    )
    directory.write(history, 9, 1)
    return history


# Regression (crawl.py): pages of which the entries had not come with the open were left out.
def test_entries_that_are_not_here_are_read_with_few_requests(
    directory: ReplicaDirectory, spy: SpyStore, small_pieces: None
) -> None:
    history = large(directory)
    wanted = [5, 6, 700, 701, 1500, 2500, 3100, 3990]
    with opened(spy) as replica, pinned(replica) as snapshot:
        assert snapshot.owner(1).index.peek(1500) is None
        spy.reads.clear()
        assert replica._gatherer.gather(snapshot, wanted) == {p: history.states[1][p] for p in wanted}
        assert len(spy.reads) <= 6 + 14, "of the pages, and of the index twice"


def test_a_store_that_does_not_answer_for_the_index_is_survived(
    directory: ReplicaDirectory, spy: SpyStore, small_pieces: None
) -> None:
    large(directory)
    with opened(spy) as replica, pinned(replica) as snapshot:
        spy.before_read = failing(StoreUnavailable("no answer"), lambda file, offset: True)
        assert replica._gatherer.gather(snapshot, [5, 1500]) == {}


def test_the_crawl_of_a_large_file_finds_all_interior_pages(
    directory: ReplicaDirectory, spy: SpyStore, tmp_path: Path, small_pieces: None
) -> None:
    path = tmp_path / "source.db"
    with closing(sqlite3.connect(path)) as db:
        db.executescript("PRAGMA page_size=512; PRAGMA synchronous=OFF; CREATE TABLE t(a INTEGER PRIMARY KEY, b, c)")
        db.executemany("INSERT INTO t VALUES (?, ?, ?)", ((n, n * 7919 % 9973, "x" * 60) for n in range(9000)))
        db.executescript("CREATE INDEX t_b ON t(b); CREATE INDEX t_c ON t(c, b)")
        db.commit()
    data = path.read_bytes()
    pages = {n + 1: data[n * 512 : (n + 1) * 512] for n in range(len(data) // 512)}
    history = History()
    history.put(pages, len(pages))
    directory.write(history, 9, 1)
    with opened(spy) as replica, pinned(replica) as snapshot:
        index = snapshot.owner(1).index
        assert isinstance(index, lazyindex.LazyIndex)
        spy.reads.clear()
        crawl(snapshot, replica._gatherer, replica._trees)
        interior = {p for p, page in pages.items() if p > 1 and page[0] in (2, 5)}
        assert len(interior) > 100
        assert interior <= set(replica._trees._interiors)
        of_index = [offset for _, offset, _ in spy.reads if offset >= index._start - 1]
        assert len(of_index) <= (index._end - index._start) // 1024 + 3, "no piece of the index twice"
