"""Demand reads: one request for one page, neighbours with it, damage read again, nobody hurt by another's failure."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replicas import History, ReplicaDirectory, SpyStore, opened, pinned, read_page, start, until

from lazyreplica import fetcher, layers
from lazyreplica.errors import LTXError, SnapshotGone, StoreUnavailable
from lazyreplica.ltx.name import FileName
from lazyreplica.prefetch import SequentialWindow
from lazyreplica.replica import Replica
from lazyreplica.snapshot import Snapshot
from lazyreplica.storage import StoredFile


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "KEEP_FILE", 0)
    monkeypatch.setattr(layers, "KEEP_TOTAL", 0)


@pytest.fixture
def spy(directory: ReplicaDirectory) -> SpyStore:
    return SpyStore(directory.url)


def fetch(replica: Replica, snapshot: Snapshot, pgno: int, window: int) -> bytes:
    return replica._fetcher.page(snapshot, snapshot.owner(pgno), pgno, window)


def gate(spy: SpyStore) -> tuple[threading.Event, threading.Event]:
    """From now on reads wait: (set when one is under way, to be set to let them go on)."""
    under_way, go_on = threading.Event(), threading.Event()

    def wait(file: StoredFile, offset: int, length: int) -> None:
        under_way.set()
        assert go_on.wait(5)

    spy.before_read = wait
    return under_way, go_on


def test_many_readers_of_one_page_make_one_request(directory: ReplicaDirectory, spy: SpyStore) -> None:
    history, _ = start(directory.path)
    with opened(spy) as replica, pinned(replica) as snapshot, ThreadPoolExecutor(8) as pool:
        before = len(spy.reads)
        under_way, go_on = gate(spy)
        results = [pool.submit(read_page, replica, snapshot, 5) for _ in range(8)]
        assert under_way.wait(5)
        until(lambda: len(spy.reads) == before + 1)
        go_on.set()
        assert {result.result() for result in results} == {history.states[1][5]}
        assert len(spy.reads) == before + 1


def test_readers_of_other_pages_do_not_wait(directory: ReplicaDirectory, spy: SpyStore) -> None:
    history, _ = start(directory.path)
    with opened(spy) as replica, pinned(replica) as snapshot:
        under_way, go_on = gate(spy)
        slow = threading.Thread(target=read_page, args=(replica, snapshot, 5))
        slow.start()
        assert under_way.wait(5)
        spy.before_read = lambda *args: None
        assert read_page(replica, snapshot, 6) == history.states[1][6]
        go_on.set()
        slow.join()


def test_a_page_that_another_reads_ahead_is_joined(directory: ReplicaDirectory, spy: SpyStore) -> None:
    history, _ = start(directory.path)
    with opened(spy, cache_size=0) as replica, pinned(replica) as snapshot, ThreadPoolExecutor(2) as pool:
        before = len(spy.reads)
        under_way, go_on = gate(spy)
        first = pool.submit(fetch, replica, snapshot, 2, 4)
        assert under_way.wait(5)
        second = pool.submit(fetch, replica, snapshot, 4, 1)
        go_on.set()
        assert (first.result(), second.result()) == (history.states[1][2], history.states[1][4])
        assert len(spy.reads) <= before + 2


@given(
    window=st.integers(1, 40),
    first=st.integers(1, 20),
    written=st.sets(st.integers(1, 20), max_size=8),
    cut=st.integers(1, 20),
)
@settings(max_examples=60, deadline=None)
def test_a_window_brings_the_pages_of_its_layer_within_the_database(
    window: int, first: int, written: set[int], cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    history, directory = start(tmp_path_factory.mktemp("replica"), 20)
    history.commit(written - set(range(cut + 1, 21)), cut)
    directory.sync(history)
    spy = SpyStore(directory.url)
    with opened(spy) as replica, pinned(replica) as snapshot:
        first = min(first, cut)
        before = len(spy.reads)
        assert fetch(replica, snapshot, first, window) == history.states[2][first]
        assert len(spy.reads) == before + 1, "one request"
        owner = snapshot.owner(first)
        file, offset, length = spy.reads[-1]
        assert file == owner.file
        at = owner.index.position(first)
        assert at is not None
        expected = [
            p
            for p, _, _ in owner.index.frames(at, min(at + window, len(owner.index)))
            if p <= cut and snapshot.owner(p) is owner
        ]
        start_of, end_of = owner.index.get(expected[0]), owner.index.get(expected[-1])
        assert start_of is not None and end_of is not None
        assert (offset, offset + length) == (start_of[0], sum(end_of)), "from the first wanted frame to the last"
        came = [p for p in range(1, 21) if (p, owner.number) in replica._cache]
        assert came == expected, "what newer files hold is read over"
        for p in came:
            assert (p, owner.number) in replica._cache
            assert read_page(replica, snapshot, p) == history.states[2][p]
        assert len(spy.reads) == before + 1


def test_a_window_reads_over_a_page_that_is_here_already(directory: ReplicaDirectory, spy: SpyStore) -> None:
    start(directory.path)
    with opened(spy) as replica, pinned(replica) as snapshot:
        fetch(replica, snapshot, 5, 1)
        before = len(spy.reads)
        fetch(replica, snapshot, 2, 7)
        layer = snapshot.owner(1)
        assert [p for p in range(1, 10) if (p, layer.number) in replica._cache] == [2, 3, 4, 5, 6, 7, 8]
        assert len(spy.reads) == before + 1


def test_a_long_gap_ends_a_window(directory: ReplicaDirectory, spy: SpyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that a newer file holds are read over only while that costs less than another request."""
    history, _ = start(directory.path)
    history.commit([4, 5, 6])
    directory.sync(history)
    with opened(spy) as replica, pinned(replica) as snapshot:
        size = snapshot.owner(3).index.entry(3)[2]
        for gap, expected in ((2 * size, [2, 3]), (3 * size, [2, 3, 7, 8])):
            monkeypatch.setattr(fetcher, "_GAP", gap)
            replica._cache.drop_version(snapshot.owner(2).number)
            fetch(replica, snapshot, 2, 7)
            base = snapshot.owner(2)
            assert [p for p in range(1, 10) if (p, base.number) in replica._cache] == expected


def spoil(spy: SpyStore, times: int) -> list[int]:
    """The next `times` reads are damaged, in the first frame's header."""
    done: list[int] = []

    def change(file: StoredFile, offset: int, data: bytes) -> bytes:
        if len(done) < times:
            done.append(offset)
            return bytes(8) + data[8:]
        return data

    spy.change = change
    return done


def test_damaged_bytes_are_fetched_again(directory: ReplicaDirectory, spy: SpyStore) -> None:
    history, _ = start(directory.path)
    with opened(spy) as replica, pinned(replica) as snapshot:
        before = len(spy.reads)
        spoil(spy, 1)
        assert fetch(replica, snapshot, 3, 4) == history.states[1][3]
        assert len(spy.reads) == before + 2
        assert fetch(replica, snapshot, 4, 1) == history.states[1][4]


def test_bytes_that_stay_damaged_are_an_error_that_names_page_and_file(
    directory: ReplicaDirectory, spy: SpyStore
) -> None:
    history, _ = start(directory.path)
    with opened(spy) as replica, pinned(replica) as snapshot:
        before = len(spy.reads)
        spoil(spy, 2)
        with pytest.raises(LTXError, match=r"page 3 in level 0 file 0{15}1-0{15}1.ltx of file://.* is damaged"):
            fetch(replica, snapshot, 3, 4)
        assert len(spy.reads) == before + 2
        assert fetch(replica, snapshot, 3, 4) == history.states[1][3], "the next read tries anew"
        assert not replica._fetcher._flights


def test_a_file_that_vanishes_before_the_second_fetch_is_looked_for_elsewhere(
    directory: ReplicaDirectory, spy: SpyStore
) -> None:
    history, _ = start(directory.path)
    history.commit([1])
    directory.sync(history)
    with opened(spy) as replica, pinned(replica) as snapshot:
        directory.write(history, 9, 1, 2)
        done = spoil(spy, 1)

        def vanish(*args: object) -> None:
            if done and directory.place(0, 1, 1).exists():
                directory.remove(0, 1)

        spy.before_read = vanish
        assert read_page(replica, snapshot, 3) == history.states[2][3]


# Regression (fetcher.py, `_fly`): an LTXError of a stand-in file is taken for one of the vanished file, which is then
# asked for again: the reader gets FileVanished, and the stand-in's bytes are not fetched twice.
def test_damaged_bytes_of_a_stand_in_are_fetched_again(directory: ReplicaDirectory, spy: SpyStore) -> None:
    history, _ = start(directory.path)
    history.commit([1])
    directory.sync(history)
    with opened(spy, cache_size=0) as replica, pinned(replica) as snapshot:
        directory.write(history, 9, 1, 2)
        directory.remove(0, 1)
        assert read_page(replica, snapshot, 3) == history.states[2][3]  # from now on the file is known to be gone
        spoil(spy, 1)
        assert read_page(replica, snapshot, 4) == history.states[2][4]


def test_an_interrupted_reader_does_not_hurt_those_who_joined(directory: ReplicaDirectory, spy: SpyStore) -> None:
    history, _ = start(directory.path)
    with opened(spy) as replica, pinned(replica) as snapshot, ThreadPoolExecutor(2) as pool:
        under_way, go_on = threading.Event(), threading.Event()
        interrupted: list[bool] = []

        def interrupt(*args: object) -> None:
            if not interrupted:
                interrupted.append(True)
                under_way.set()
                assert go_on.wait(5)
                raise KeyboardInterrupt

        spy.before_read = interrupt
        leader = pool.submit(fetch, replica, snapshot, 2, 4)
        assert under_way.wait(5)
        joiners = [pool.submit(fetch, replica, snapshot, p, 1) for p in (2,)]
        until(lambda: pool._work_queue.empty())
        go_on.set()
        with pytest.raises(KeyboardInterrupt):
            leader.result()
        assert [joiner.result() for joiner in joiners] == [history.states[1][2]]
        assert not replica._fetcher._flights
        assert not replica._fetcher.busy


def test_a_failed_leader_does_not_hurt_those_who_joined(directory: ReplicaDirectory, spy: SpyStore) -> None:
    history, _ = start(directory.path)
    with opened(spy) as replica, pinned(replica) as snapshot, ThreadPoolExecutor(2) as pool:
        under_way, go_on = threading.Event(), threading.Event()
        failed: list[bool] = []

        def fail(*args: object) -> None:
            if not failed:
                failed.append(True)
                under_way.set()
                assert go_on.wait(5)
                raise StoreUnavailable("no answer")

        spy.before_read = fail
        leader = pool.submit(fetch, replica, snapshot, 2, 4)
        assert under_way.wait(5)
        joiner = pool.submit(fetch, replica, snapshot, 4, 1)
        go_on.set()
        with pytest.raises(StoreUnavailable):
            leader.result()
        assert joiner.result() == history.states[1][4]


def test_who_joins_waits_no_longer_than_read_timeout(directory: ReplicaDirectory, spy: SpyStore) -> None:
    start(directory.path)
    with opened(spy, read_timeout=0.1) as replica, pinned(replica) as snapshot, ThreadPoolExecutor(1) as pool:
        under_way, go_on = gate(spy)
        leader = pool.submit(fetch, replica, snapshot, 2, 1)
        assert under_way.wait(5)
        with pytest.raises(StoreUnavailable, match=r"did not arrive within 0\.1 seconds"):
            fetch(replica, snapshot, 2, 1)
        go_on.set()
        leader.result()


def test_memory_keeps_within_cache_size(directory: ReplicaDirectory, spy: SpyStore) -> None:
    history, _ = start(directory.path, 40)
    with opened(spy, cache_size=10 * 512) as replica, pinned(replica) as snapshot:
        window = SequentialWindow(512)
        for pgno in range(1, 41):
            assert replica.read(snapshot, pgno, window) == history.states[1][pgno]
        assert replica._cache._pages.currsize <= 10 * 512
        assert len(spy.reads) < 20, "a scan reads ahead"


def test_small_files_are_fetched_whole_and_never_again(
    directory: ReplicaDirectory, spy: SpyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "KEEP_FILE", 1 << 20)
    monkeypatch.setattr(layers, "KEEP_TOTAL", 1 << 20)
    history, _ = start(directory.path)
    history.commit([3])
    directory.sync(history)
    with opened(spy, cache_size=0) as replica, pinned(replica) as snapshot:
        assert sorted((file.name, offset) for file, offset, _ in spy.reads) == [
            (FileName(1, 1), 0),
            (FileName(2, 2), 0),
        ]
        directory.wipe()
        assert [read_page(replica, snapshot, p) for p in range(1, 9)] == [history.states[2][p] for p in range(1, 9)]
        assert len(spy.reads) == 2


def test_a_vanished_file_fails_only_its_own_pages(directory: ReplicaDirectory, spy: SpyStore) -> None:
    history: History
    history, _ = start(directory.path)
    history.commit([1, 2])
    directory.sync(history)
    with opened(spy, poll_interval=600.0, max_staleness=600.0) as replica, pinned(replica) as snapshot:
        directory.remove(0, 1)
        with pytest.raises(SnapshotGone):
            fetch(replica, snapshot, 5, 3)
        assert fetch(replica, snapshot, 1, 2) == history.states[2][1]
