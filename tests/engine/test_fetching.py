"""Demand reads: one request for one page, neighbours with it, damage read again, nobody hurt by another's failure."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replicas import PAGE_SIZE, History, ReplicaDirectory, SpyStore, flying, pinned, read_page, start
from replicas import opened as opened_as_it_is

from lazyreplica import fetcher, layers, opening, spans
from lazyreplica.cache import ENTRY
from lazyreplica.errors import LTXError, SnapshotGone, StoreUnavailable
from lazyreplica.extents import EXTENT, State
from lazyreplica.ltx import decode_file, encode_index
from lazyreplica.ltx.name import FileName
from lazyreplica.pagemap import Layer
from lazyreplica.prefetch import Reader, Token
from lazyreplica.replica import Replica
from lazyreplica.snapshot import Snapshot
from lazyreplica.storage import StoredFile
from lazyreplica.trees import Trees
from support.waiting import eventually


@pytest.fixture(autouse=True)
def _no_file_is_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "KEEP_FILE", 0)
    monkeypatch.setattr(layers, "KEEP_TOTAL", 0)
    monkeypatch.setattr(layers, "VERIFY_FILE", 0)
    monkeypatch.setattr(opening, "FAR", float("inf"))  # however slow the machine is


@contextmanager
def opened(store: SpyStore, **options: Any) -> Iterator[Replica]:
    """An open replica that has forgotten the pages that came with the open."""
    with opened_as_it_is(store, **options) as replica:
        for layer in replica.head.pages.layers():
            replica.layers.extents.drop(layer.number)
        yield replica


@pytest.fixture
def spy(directory: ReplicaDirectory) -> SpyStore:
    return SpyStore(directory.url)


class Expecting:
    """A reader that expects, once, certain pages."""

    def __init__(self, *pages: int) -> None:
        self.asked = threading.Event()
        self.token = Token()
        self.trees = Trees(PAGE_SIZE)
        self._pages = pages

    def reads(self, pgno: int) -> Iterable[int]:
        self.asked.set()
        pages, self._pages = self._pages, ()
        return pages

    def missed(self) -> Iterable[int]:
        return ()

    def refused(self, pages: Iterable[int]) -> None:
        pass

    def saw(self, pgno: int, page: bytes) -> None:
        pass

    def hit(self, pgno: int, page: bytes) -> None:
        pass


def fetch(replica: Replica, snapshot: Snapshot, pgno: int, reader: Expecting) -> bytes:
    return replica._fetcher.page(snapshot, snapshot.owner(pgno), pgno, cast("Reader", reader))


def nobody() -> Reader:
    """A reader that expects nothing."""
    return cast("Reader", Expecting())


def fetch_row(replica: Replica, snapshot: Snapshot, pgno: int, pages: int) -> bytes:
    """Page `pgno`, by somebody who reads so many pages in a row."""
    return fetch(replica, snapshot, pgno, Expecting(*range(pgno + 1, pgno + pages)))


def frames_of(layer: Layer, pgnos: Iterable[int]) -> tuple[int, int]:
    """From where to where those pages' frames lie."""
    entries = [entry for pgno in pgnos if (entry := layer.index.get(pgno))]
    return min(start for start, _ in entries), max(start + size for start, size in entries)


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
        readers = [Expecting() for _ in range(8)]
        results = [pool.submit(fetch, replica, snapshot, 5, reader) for reader in readers]
        assert under_way.wait(5)
        eventually(lambda: all(reader.asked.is_set() for reader in readers))
        time.sleep(0.05)  # for a second request, if there is one
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
        first = pool.submit(fetch_row, replica, snapshot, 2, 4)
        assert under_way.wait(5)
        joining = Expecting()
        second = pool.submit(fetch, replica, snapshot, 4, joining)
        eventually(joining.asked.is_set)
        time.sleep(0.05)
        go_on.set()
        assert (first.result(), second.result()) == (history.states[1][2], history.states[1][4])
        assert len(spy.reads) == before + 1


@given(
    pages=st.integers(1, 40),
    first=st.integers(1, 20),
    written=st.sets(st.integers(1, 20), max_size=8),
    cut=st.integers(1, 20),
)
@settings(max_examples=60, deadline=None)
def test_a_row_of_pages_is_one_request_of_each_file_that_has_some(
    pages: int, first: int, written: set[int], cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    history, directory = start(tmp_path_factory.mktemp("replica"), 20)
    history.commit(written - set(range(cut + 1, 21)), cut)
    directory.sync(history)
    spy = SpyStore(directory.url)
    with opened(spy) as replica, pinned(replica) as snapshot:
        first = min(first, cut)
        row = range(first, min(first + pages, cut + 1))
        before = len(spy.reads)
        assert fetch_row(replica, snapshot, first, pages) == history.states[2][first]
        expected = []
        for owner in {snapshot.owner(pgno) for pgno in row}:
            begin, end = frames_of(owner, [pgno for pgno in row if snapshot.owner(pgno) is owner])
            expected.append((str(owner.file), begin, end - begin))
        eventually(lambda: not flying(replica))
        asked = sorted((str(file), offset, length) for file, offset, length in spy.reads[before:])
        assert asked == sorted(expected), "from the first wanted frame to the last, and what newer files hold read over"
        for pgno in row:
            assert replica.read(snapshot, pgno, nobody()) == history.states[2][pgno]
        assert len(spy.reads) == before + len(expected)


def test_a_row_reads_over_a_page_that_is_here_already(directory: ReplicaDirectory, spy: SpyStore) -> None:
    history, _ = start(directory.path)
    with opened(spy) as replica, pinned(replica) as snapshot:
        fetch(replica, snapshot, 5, Expecting())
        before = len(spy.reads)
        fetch_row(replica, snapshot, 2, 7)
        begin, end = frames_of(snapshot.owner(2), [2, 8])
        assert [(offset, offset + length) for _, offset, length in spy.reads[before:]] == [(begin, end)]
        for pgno in range(2, 9):
            assert replica.read(snapshot, pgno, nobody()) == history.states[1][pgno]
        assert len(spy.reads) == before + 1


def test_pages_behind_a_long_gap_are_a_request_of_their_own(
    directory: ReplicaDirectory, spy: SpyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages that a newer file holds are read over only while that costs less than another request."""
    history, _ = start(directory.path)
    history.commit([4, 5, 6])
    directory.sync(history)
    with opened(spy) as replica, pinned(replica) as snapshot:
        base, newer = snapshot.owner(2), snapshot.owner(4)
        begin, end = frames_of(base, [4, 5, 6])
        for gap, expected in ((end - begin - 1, [[2, 3], [7, 8]]), (end - begin, [[2, 3, 7, 8]])):
            monkeypatch.setattr(spans, "GAP", gap)
            replica.layers.extents.drop(base.number)
            replica.layers.extents.drop(newer.number)
            replica._cache.drop_version(base.number)
            before = len(spy.reads)
            fetch_row(replica, snapshot, 2, 7)
            eventually(lambda: not flying(replica))
            asked = [(offset, offset + length) for file, offset, length in spy.reads[before:] if file == base.file]
            assert asked == [frames_of(base, pages) for pages in expected]


# Regression (spans.py, `join`): when a prediction names the wanted page itself, and a page of another file before that,
# the request for the wanted page has the place of that other one.
@pytest.mark.parametrize("expected", [[2, 4], [4, 2], [40, 2], [2, 2, 4, 4], [4, 4, 2, 3, 2]])
def test_a_prediction_may_name_the_page_itself_and_pages_twice(
    directory: ReplicaDirectory, spy: SpyStore, expected: list[int]
) -> None:
    """As that of the rows that an index names does: it comes to one leaf of the table again and again."""
    history, _ = start(directory.path)
    history.commit([4], 40)
    directory.sync(history)
    with opened(spy) as replica, pinned(replica) as snapshot:
        before = len(spy.reads)
        assert fetch(replica, snapshot, 2, Expecting(*expected)) == history.states[2][2]
        eventually(lambda: not flying(replica))
        for owner in {snapshot.owner(pgno) for pgno in (2, *expected)}:
            begin, end = frames_of(owner, [pgno for pgno in expected if snapshot.owner(pgno) is owner] or [2])
            asked = [(offset, offset + length) for file, offset, length in spy.reads[before:] if file == owner.file]
            assert asked == [(begin, end)]


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
        assert fetch_row(replica, snapshot, 3, 4) == history.states[1][3]
        assert len(spy.reads) == before + 2
        assert fetch(replica, snapshot, 4, Expecting()) == history.states[1][4]


def test_bytes_that_stay_damaged_are_an_error_that_names_page_and_file(
    directory: ReplicaDirectory, spy: SpyStore
) -> None:
    history, _ = start(directory.path)
    with opened(spy) as replica, pinned(replica) as snapshot:
        before = len(spy.reads)
        spoil(spy, 2)
        with pytest.raises(LTXError, match=r"page 3 in level 0 file 0{15}1-0{15}1.ltx of file://.* is damaged"):
            fetch_row(replica, snapshot, 3, 4)
        assert len(spy.reads) == before + 2
        assert fetch_row(replica, snapshot, 3, 4) == history.states[1][3], "the next read tries anew"
        assert not replica._fetcher.busy and not flying(replica)


def test_bytes_read_ahead_that_are_damaged_are_fetched_again(directory: ReplicaDirectory, spy: SpyStore) -> None:
    history, _ = start(directory.path)
    history.commit([4, 5])
    directory.sync(history)
    with opened(spy) as replica, pinned(replica) as snapshot:
        ahead = snapshot.owner(4).file
        done: list[int] = []

        def change(file: StoredFile, offset: int, data: bytes) -> bytes:
            if file != ahead or done:
                return data
            done.append(offset)
            return bytes(len(data))

        spy.change = change
        fetch_row(replica, snapshot, 2, 4)
        eventually(lambda: done and not flying(replica))
        before = len(spy.reads)
        assert [fetch(replica, snapshot, pgno, Expecting()) for pgno in (4, 5)] == [
            history.states[2][p] for p in (4, 5)
        ]
        assert len(spy.reads) == before + 2


def test_what_fails_ahead_fails_nobody(directory: ReplicaDirectory, spy: SpyStore) -> None:
    """Neither the reader who went on meanwhile, nor who comes there."""
    history, _ = start(directory.path)
    history.commit([4, 5])
    directory.sync(history)
    with opened(spy) as replica, pinned(replica) as snapshot:
        failed: list[StoredFile] = []

        def fail(file: StoredFile, *args: object) -> None:
            if file == snapshot.owner(4).file and not failed:
                failed.append(file)
                raise StoreUnavailable("no answer")

        spy.before_read = fail
        assert fetch_row(replica, snapshot, 2, 4) == history.states[2][2]
        eventually(lambda: failed and not flying(replica))
        assert fetch_row(replica, snapshot, 4, 2) == history.states[2][4]


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


# Regression (fetcher.py): an LTXError of a stand-in file is taken for one of the vanished file, which is then
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
        leader = pool.submit(fetch_row, replica, snapshot, 2, 4)
        assert under_way.wait(5)
        joining = Expecting()
        joiner = pool.submit(fetch, replica, snapshot, 2, joining)
        eventually(joining.asked.is_set)
        time.sleep(0.05)
        go_on.set()
        with pytest.raises(KeyboardInterrupt):
            leader.result()
        assert joiner.result(1) == history.states[1][2]
        assert not replica._fetcher.busy and not flying(replica)


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
        leader = pool.submit(fetch_row, replica, snapshot, 2, 4)
        assert under_way.wait(5)
        joining = Expecting()
        joiner = pool.submit(fetch, replica, snapshot, 4, joining)
        eventually(joining.asked.is_set)
        time.sleep(0.05)
        go_on.set()
        with pytest.raises(StoreUnavailable):
            leader.result()
        assert joiner.result(1) == history.states[1][4]
        assert not replica._fetcher.busy and not flying(replica)


class StuckStore(SpyStore):
    """The first read after `stick` does not answer; the timeouts of all that come then are noted."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.stuck, self.go_on = threading.Event(), threading.Event()
        self.timeouts: list[float] = []
        self._stick = False

    def stick(self) -> None:
        self._stick = True

    def read(self, file: StoredFile, offset: int, length: int, timeout: float) -> bytes:
        if self._stick:
            self.timeouts.append(timeout)
            if len(self.timeouts) == 1:
                self.stuck.set()
                if not self.go_on.wait(timeout):
                    raise StoreUnavailable(f"no answer within {timeout:g} seconds")
        return super().read(file, offset, length, timeout)


@pytest.mark.slow
@pytest.mark.parametrize("answers", [True, False])
def test_who_joins_makes_a_request_of_its_own_before_read_timeout(directory: ReplicaDirectory, answers: bool) -> None:
    """One request may be stuck in a connection that has died, and the next one is answered at once."""
    history, _ = start(directory.path)
    store = StuckStore(directory.url)
    with opened(store, read_timeout=4) as replica, pinned(replica) as snapshot, ThreadPoolExecutor(1) as pool:
        store.stick()
        leader = pool.submit(fetch_row, replica, snapshot, 2, 4)
        assert store.stuck.wait(5)
        started = time.monotonic()
        assert fetch(replica, snapshot, 3, Expecting()) == history.states[1][3]
        assert time.monotonic() - started < 3.5
        assert not leader.done()
        assert store.timeouts[0] == pytest.approx(4)
        assert store.timeouts[1:] == [pytest.approx(2)], "both waits together stay within read_timeout"
        if answers:
            store.go_on.set()
            assert leader.result() == history.states[1][2]
        else:
            with pytest.raises(StoreUnavailable):
                leader.result()
        assert not flying(replica)


@pytest.mark.slow
def test_who_joins_waits_two_seconds_at_most(directory: ReplicaDirectory) -> None:
    history, _ = start(directory.path)
    store = StuckStore(directory.url)
    with opened(store, read_timeout=600.0) as replica, pinned(replica) as snapshot, ThreadPoolExecutor(1) as pool:
        store.stick()
        leader = pool.submit(fetch, replica, snapshot, 2, Expecting())
        assert store.stuck.wait(5)
        started = time.monotonic()
        assert fetch(replica, snapshot, 2, Expecting()) == history.states[1][2]
        assert 1.9 < time.monotonic() - started < 4
        store.go_on.set()
        assert leader.result() == history.states[1][2]


def test_what_one_request_asks_for_has_room_however_many_read(directory: ReplicaDirectory, spy: SpyStore) -> None:
    """Regression: with 16 readers and more nobody read ahead, since each request was larger than a share."""
    start(directory.path, 4)
    with opened(spy) as replica:
        extents, reader = replica.layers.extents, replica.reader()
        for number in range(32):
            limit, room = replica._fetcher._limit(reader), extents.room(reader.token)
            assert fetcher.FIRST <= limit <= room or room < fetcher.FIRST
            extents.begin(1, number * 10, number * 10 + 5, State.WAITING, (number * 10, number * 10 + 5), Token())
        assert extents.share(reader.token) < 2 * fetcher.FIRST


def test_memory_keeps_within_cache_size(
    directory: ReplicaDirectory, spy: SpyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = 4 * (8 * 512 + EXTENT)
    monkeypatch.setattr(layers, "PASSING_TOTAL", total)
    monkeypatch.setattr(fetcher, "FIRST", 4 * 512)
    history, _ = start(directory.path, 40)
    with opened(spy, cache_size=10 * (512 + ENTRY)) as replica, pinned(replica) as snapshot:
        reader = replica.reader()
        for pgno in range(1, 41):
            assert replica.read(snapshot, pgno, reader) == history.states[1][pgno]
            cache, extents = replica._cache, replica.layers.extents
            assert cache._probation.currsize + cache._protected.currsize <= 10 * (512 + ENTRY)
            assert sum(extent.memory for extent in (*extents._used, *extents._owned)) == extents._passing_size <= total
        assert len(spy.reads) < 20, "a scan reads ahead"


def test_small_files_are_fetched_whole_and_never_again(
    directory: ReplicaDirectory, spy: SpyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "KEEP_FILE", 1 << 20)
    monkeypatch.setattr(layers, "KEEP_TOTAL", 1 << 20)
    history, _ = start(directory.path)
    history.commit([3])
    directory.sync(history)
    with opened_as_it_is(spy, cache_size=0) as replica, pinned(replica) as snapshot:
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
            fetch_row(replica, snapshot, 5, 3)
        assert fetch_row(replica, snapshot, 1, 2) == history.states[2][1]


# -- increments that are opened by head and tail, and verified a moment later --


@pytest.fixture
def verified_later(directory: ReplicaDirectory, monkeypatch: pytest.MonkeyPatch) -> SpyStore:
    """A remote store of a snapshot of 8 pages, and an increment with pages 3 and 5."""
    monkeypatch.setattr(opening, "FAR", -1.0)
    monkeypatch.setattr(layers, "QUICK_FILE", 0)
    monkeypatch.setattr(layers, "VERIFY_FILE", 8 << 20)
    monkeypatch.setattr(layers, "_TAIL", 200)
    history, _ = start(directory.path)
    history.commit([3, 5])
    directory.sync(history)
    return SpyStore(directory.url, parallel=4)


def exchange_page_number(directory: ReplicaDirectory) -> None:
    """The increment's index names page 4 in place of page 3, which only the file's checksum tells."""
    path = directory.place(0, 2, 2)
    data = path.read_bytes()
    index = decode_file(data).index
    entries = [(4 if pgno == 3 else pgno, offset, size) for pgno, offset, size in index.frames(0, len(index))]
    directory.write_bytes(0, 2, 2, data[: index.offsets[-1] + 6] + encode_index(entries) + data[-16:])


def increment_of(replica: Replica) -> Layer:
    return next(layer for layer in replica.head.pages.layers() if layer.max_txid == 2)


def test_an_increment_is_verified_soon_after_the_open_and_kept(
    verified_later: SpyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "KEEP_TOTAL", 1 << 20)
    with opened_as_it_is(verified_later) as replica:
        eventually(lambda: replica.layers.kept(increment_of(replica)) is not None)
        assert replica.layers.distrusted(increment_of(replica)) is None


# Regression (layers.py): what a wrong index does not name shows the page of an older file, before and after the
# damage is found, and nothing of that is refused.
def test_an_increment_that_is_found_damaged_after_the_open_shows_no_older_page(
    directory: ReplicaDirectory, verified_later: SpyStore
) -> None:
    exchange_page_number(directory)
    with opened_as_it_is(verified_later) as replica, pinned(replica) as snapshot:
        eventually(lambda: replica.layers.distrusted(increment_of(replica)))
        for pgno in (4, 5, 3):
            with pytest.raises(LTXError, match=r"0{15}2-0{15}2.ltx"):
                read_page(replica, snapshot, pgno)


def test_a_page_that_was_read_before_the_damage_was_found_is_not_shown_again(
    directory: ReplicaDirectory, verified_later: SpyStore
) -> None:
    exchange_page_number(directory)
    go_on = threading.Event()

    def wait(file: StoredFile, offset: int, length: int) -> None:
        if file.name == FileName(2, 2) and length == file.size:
            assert go_on.wait(5)

    verified_later.before_read = wait
    with opened_as_it_is(verified_later) as replica, pinned(replica) as snapshot:
        read_page(replica, snapshot, 5)  # as good as any page before the file is verified
        go_on.set()
        eventually(lambda: replica.layers.distrusted(increment_of(replica)))
        with pytest.raises(LTXError, match=r"0{15}2-0{15}2.ltx"):
            read_page(replica, snapshot, 5)


# Regression (layers.py, `verify`): the file counts as verified before it is read, and nobody tries again.
@pytest.mark.slow
def test_an_increment_that_could_not_be_verified_at_first_is_verified_later(
    directory: ReplicaDirectory, verified_later: SpyStore
) -> None:
    exchange_page_number(directory)
    failed: list[StoredFile] = []

    def fail(file: StoredFile, offset: int, length: int) -> None:
        if file.name == FileName(2, 2) and length == file.size and not failed:
            failed.append(file)
            raise StoreUnavailable("no answer")

    verified_later.before_read = fail
    with opened_as_it_is(verified_later, poll_interval=0.01) as replica:
        eventually(lambda: failed)
        eventually(lambda: replica.layers.distrusted(increment_of(replica)), 5, "somebody verifies it after all")


def test_what_was_verified_when_it_was_opened_is_not_read_again(directory: ReplicaDirectory, spy: SpyStore) -> None:
    """Though it is not kept: there may be more of such files than memory for them."""
    history, _ = start(directory.path)
    for _ in range(3):
        history.commit([3, 5])
        directory.sync(history)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "KEEP_FILE", 1 << 20)
        with opened_as_it_is(spy):
            assert len(spy.reads) == 4
            time.sleep(0.2)
            assert len(spy.reads) == 4


def test_a_page_beside_the_last_one_is_of_its_own_file(directory: ReplicaDirectory, spy: SpyStore) -> None:
    """The bytes at hand have page 6, too, but an older version of it."""
    history, _ = start(directory.path, 40)
    with opened(spy) as replica:
        reader = Expecting(*range(6, 30))
        with pinned(replica) as snapshot:
            assert fetch(replica, snapshot, 5, reader) == history.states[1][5]
            current = replica.layers.extents.current(reader.token)
            assert current is not None and current.ahead == 24
            assert fetch(replica, snapshot, 6, reader) == history.states[1][6]
            assert current.ahead == 23, "what was read counts as unread no more"
        history.commit(range(1, 41))
        directory.sync(history)
        replica.refresh()
        with pinned(replica) as snapshot:
            assert snapshot.txid == 2
            for pgno in range(6, 30):
                assert fetch(replica, snapshot, pgno, reader) == history.states[2][pgno], pgno
