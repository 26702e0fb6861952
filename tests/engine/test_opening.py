"""What an open makes of files that change meanwhile, and of files without bytes; and what it sends for ahead."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from replicas import History, ReplicaDirectory, SpyStore, opened, read_database

from lazyreplica.errors import FileVanished, LTXError, ReplicaDamaged, StoreUnavailable
from lazyreplica.extents import Extent, State
from lazyreplica.pagemap import Layer
from lazyreplica.replica import Replica
from lazyreplica.spans import peek
from lazyreplica.storage import StoredFile


@pytest.fixture
def history(directory: ReplicaDirectory) -> History:
    history = History()
    for pages in ([8], [2], [3]):
        history.commit(pages)
        directory.sync(history)
    directory.write(history, 9, 1, 1)
    directory.remove(0, 1)
    return history


def spoiled(history: History, low: int, high: int) -> bytes:
    data = history.file(low, high, wal=True)
    return data[:200] + bytes([data[200] ^ 1]) + data[201:]


def test_a_base_that_vanishes_after_the_listing_is_planned_around(
    directory: ReplicaDirectory, history: History
) -> None:
    spy = SpyStore(directory.url)

    def retain() -> None:
        if directory.place(9, 1, 1).exists():
            directory.write(history, 9, 1, 3)
            directory.remove(9, 1, 1)

    spy.after_list = retain
    with opened(spy) as replica:
        assert spy.listings == 2
        assert read_database(replica) == history.database(3)


def test_a_base_that_is_replaced_while_it_is_read_is_planned_around(
    directory: ReplicaDirectory, history: History
) -> None:
    """Damaged as it was listed; the primary writes a new snapshot while it is looked at."""
    directory.write_bytes(9, 1, 1, spoiled(history, 1, 1))
    spy = SpyStore(directory.url)

    def replace(file: StoredFile, offset: int, length: int) -> None:
        if file.level == 9 and not directory.place(9, 1, 3).exists():
            directory.write(history, 9, 1, 3)

    spy.before_read = replace
    with opened(spy) as replica:
        assert read_database(replica) == history.database(3)


def test_a_base_that_stays_damaged_is_an_error_after_one_more_look(
    directory: ReplicaDirectory, history: History
) -> None:
    directory.write_bytes(9, 1, 1, spoiled(history, 1, 1))
    spy = SpyStore(directory.url)
    with pytest.raises(LTXError, match=r"level 9 file 0{15}1-0{15}1\.ltx of file://.* is damaged"), opened(spy):
        pass
    assert spy.listings == 2


def test_files_that_go_on_vanishing_are_an_error_in_the_end(directory: ReplicaDirectory, history: History) -> None:
    spy = SpyStore(directory.url)

    def vanish(file: StoredFile, offset: int, length: int) -> None:
        raise FileVanished(f"{file} is gone")

    spy.before_read = vanish
    with pytest.raises(FileVanished), opened(spy):
        pass
    assert spy.listings == 3


def test_files_without_bytes_are_named_as_such(directory: ReplicaDirectory) -> None:
    for level, high in ((0, 1), (0, 2), (9, 2)):
        directory.write_bytes(level, 1 if level else high, high, b"")
    with pytest.raises(ReplicaDamaged, match=r"all 3 LTX files of file://.* have 0 bytes"), opened(directory):
        pass


def test_one_file_without_bytes_is_damaged(directory: ReplicaDirectory, history: History) -> None:
    directory.write_bytes(0, 2, 2, b"")
    with (
        pytest.raises(LTXError, match=r"level 0 file 0{15}2-0{15}2\.ltx of .* is damaged: .* 0 bytes"),
        opened(directory),
    ):
        pass


# -- roots, which an open asks for together --


def base_of(replica: Replica) -> Layer:
    return next(layer for layer in replica.head.pages.layers() if layer.holds_everything)


def waiting(replica: Replica, pages: Iterable[int]) -> list[Extent]:
    """Extents of the base that nobody fetches yet, one for the frame of each page."""
    layers, base = replica.layers, base_of(replica)
    found = []
    for pgno in pages:
        place = peek(base, pgno)
        assert place is not None
        inner = (place.start, place.end)
        extent, new = layers.extents.begin(base.number, *inner, State.WAITING, inner)
        assert new
        found.append(extent)
    return found


def test_of_extents_that_are_brought_together_those_before_a_failure_stay(
    directory: ReplicaDirectory, history: History
) -> None:
    spy = SpyStore(directory.url)
    with opened(spy) as replica:
        base = base_of(replica)
        extents = waiting(replica, [4, 5, 6, 7])
        before = replica.layers.extents.memory - sum(extent.memory for extent in extents)

        def fail(file: StoredFile, offset: int, length: int) -> None:
            if offset >= extents[2].start:
                raise StoreUnavailable("not now")

        spy.before_read = fail
        with pytest.raises(StoreUnavailable):
            replica.layers.bring_together(base, extents)
        assert [extent.state for extent in extents] == [State.HERE, State.HERE, State.FAILED, State.FAILED]
        assert all(extent.arrived.is_set() for extent in extents)
        assert replica.layers.extents.memory - before == sum(extent.memory for extent in extents[:2])
        spy.before_read = lambda *_: None
        assert read_database(replica) == history.database(3)


def test_what_a_reader_has_claimed_meanwhile_is_not_brought_again(
    directory: ReplicaDirectory, history: History
) -> None:
    spy = SpyStore(directory.url)
    with opened(spy) as replica:
        extents = waiting(replica, [4, 5, 6])
        assert replica.layers.extents.claim(extents[1])
        spy.reads.clear()
        replica.layers.bring_together(base_of(replica), extents)
        assert [offset for _, offset, _ in spy.reads] == [extents[0].start, extents[2].start]
        assert [extent.state for extent in extents] == [State.HERE, State.FLYING, State.HERE]
        replica.layers.extents.fail(extents[1])
