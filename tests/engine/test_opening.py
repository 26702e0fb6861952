"""What an open makes of files that change between the listing and the reading, and of files without bytes."""

from __future__ import annotations

import pytest
from replicas import History, ReplicaDirectory, SpyStore, opened, read_database

from lazyreplica.errors import FileVanished, LTXError, ReplicaDamaged
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
