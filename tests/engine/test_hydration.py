"""The hydrator: completes, stays right while the head moves, gives up cleanly, and publishes only what is whole."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from replicas import (
    FULL,
    PAGE_SIZE,
    ReplicaDirectory,
    SpyStore,
    complete,
    disk_full,
    hydration_file,
    local_database,
    long_replica,
    opened,
    pinned,
    read_database,
    read_page,
    start,
)

from lazyreplica import filling, layers
from lazyreplica.errors import LTXError
from lazyreplica.local.base import Base
from lazyreplica.storage import StoredFile
from support.waiting import eventually


@pytest.mark.parametrize("kept", [True, False])
def test_the_file_becomes_the_database(
    directory: ReplicaDirectory, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kept:
        monkeypatch.setattr(layers, "KEEP_FILE", 0)
        monkeypatch.setattr(layers, "KEEP_TOTAL", 0)
        monkeypatch.setattr(layers, "PASSING_TOTAL", 0)
        monkeypatch.setattr(filling, "CHUNK", 3000)  # frames straddle chunks
    history = long_replica(directory)
    spy = SpyStore(directory.url)
    with opened(spy, **FULL) as replica:
        eventually(lambda: complete(replica))
        assert hydration_file(replica).read_bytes() == history.database()
        before = len(spy.reads)
        assert read_database(replica) == history.database()
        assert len(spy.reads) == before, "all pages are local"


def test_it_follows_the_head_without_reading_what_came_with_it(directory: ReplicaDirectory) -> None:
    history = long_replica(directory)
    spy = SpyStore(directory.url)
    with opened(spy, **FULL) as replica:
        eventually(lambda: complete(replica))
        before = len(spy.reads)
        for written, size in (([4], 30), ([50], 50), ([1], 12), ([12], 20)):
            history.commit(written, size)
            directory.sync(history)
            replica.refresh()
            assert complete(replica), "the pages are local before the transaction is visible"
            assert read_database(replica) == local_database(replica) == history.database()
        assert len(spy.reads) == before


def test_a_pinned_snapshot_stays_local_while_the_head_moves(directory: ReplicaDirectory) -> None:
    history = long_replica(directory)
    spy = SpyStore(directory.url)
    with opened(spy, cache_size=0, **FULL) as replica:
        eventually(lambda: complete(replica))
        before, reads = history.database(), len(spy.reads)
        with pinned(replica) as snapshot:
            history.commit([2, 9, 30], 12)
            directory.sync(history)
            replica.refresh()
            assert read_database(replica, snapshot) == before
            assert read_database(replica) == history.database()
        assert len(spy.reads) == reads


def test_whole_database_file_with_another_history_is_hydrated_anew(directory: ReplicaDirectory) -> None:
    long_replica(directory)
    with opened(directory, **FULL) as replica:
        eventually(lambda: complete(replica))
        directory.wipe()
        other, _ = start(directory.path, 11, name="other")
        replica.refresh()
        eventually(lambda: complete(replica))
        assert hydration_file(replica).read_bytes() == other.database()
        assert read_database(replica) == other.database()


# -- damage --


def flip_literal(directory: ReplicaDirectory, level: int, low: int, high: int, page: bytes) -> None:
    """One bit of a page's LZ4 literals: every frame still decodes, only the file's checksum tells."""
    path = directory.place(level, low, high)
    data = bytearray(path.read_bytes())
    at = data.index(page[100:200])
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.usefixtures("nothing_kept")
def test_a_file_that_fails_its_checksum_stops_hydration_and_gives_no_page(
    directory: ReplicaDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    history, _ = start(directory.path, 20)
    history.commit([2, 3, 4])
    directory.sync(history)
    flip_literal(directory, 0, 1, 1, history.states[1][9])
    with opened(directory, **FULL) as replica, caplog.at_level(logging.ERROR):
        eventually(lambda: "hydration of" in caplog.text)
        assert replica.hydration_progress < 100
        with pinned(replica) as snapshot:
            for pgno in (1, 5, 9, 20):
                with pytest.raises(LTXError, match="damaged"):
                    read_page(replica, snapshot, pgno)
            assert read_page(replica, snapshot, 3) == history.states[2][3], "the other file is good"
    assert "checksum" in caplog.text


@pytest.mark.usefixtures("nothing_kept")
def test_damage_on_the_wire_is_read_again(directory: ReplicaDirectory) -> None:
    history, _ = start(directory.path, 20)
    spy = SpyStore(directory.url)
    spoiled: list[StoredFile] = []

    def spoil(file: StoredFile, offset: int, data: bytes) -> bytes:
        if len(data) == file.size and not spoiled:
            spoiled.append(file)
            at = data.index(history.states[1][9][100:200])
            return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        return data

    spy.change = spoil
    with opened(spy, **FULL) as replica:
        eventually(lambda: complete(replica))
        assert spoiled
        assert hydration_file(replica).read_bytes() == history.database()


# Regression: the pages before the damaged frame were claimed and never filled; after the
# second, good reading they are in the log only, "100 %" is reported, and the published database has zeros in their
# place.
@pytest.mark.usefixtures("nothing_kept")
def test_a_frame_broken_on_the_wire_leaves_no_hole_in_the_database(directory: ReplicaDirectory, tmp_path: Path) -> None:
    history, _ = start(directory.path, 20)
    spy = SpyStore(directory.url)
    spoiled: list[StoredFile] = []

    def spoil(file: StoredFile, offset: int, data: bytes) -> bytes:
        if len(data) == file.size and not spoiled:
            spoiled.append(file)
            at = data.index(history.states[1][9][:100]) - 10  # the frame's header
            return data[:at] + bytes(4) + data[at + 4 :]
        return data

    spy.change = spoil
    with opened(spy, hydration_path=str(tmp_path / "local.db"), **FULL):
        eventually((tmp_path / "local.db").exists)
        assert spoiled
        assert (tmp_path / "local.db").read_bytes() == history.database()


# -- the disk --


def test_a_full_disk_ends_the_local_copy_and_not_the_replica(
    directory: ReplicaDirectory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    history, _ = start(directory.path, 20)
    monkeypatch.setattr(Base, "write", disk_full)
    with caplog.at_level(logging.WARNING), opened(directory, **FULL) as replica:
        eventually(lambda: "given up" in caplog.text)
        assert "No space left" in caplog.text
        assert read_database(replica) == history.database()
        history.commit([3])
        directory.sync(history)
        replica.refresh()
        assert read_database(replica) == history.database()
        assert (replica.hydration_progress, replica.hydration_file) == (0.0, None)


def test_a_disk_that_fills_up_later_ends_the_local_copy_and_not_the_replica(
    directory: ReplicaDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    history, _ = start(directory.path, 20)
    with opened(directory, **FULL) as replica:
        eventually(lambda: complete(replica))
        monkeypatch.setattr(os, "pwrite", disk_full)
        with pinned(replica) as snapshot:
            history.commit([3])
            directory.sync(history)
            replica.refresh()
            assert read_database(replica, snapshot) == history.database(1)
        assert read_database(replica) == history.database()
        assert replica.hydration_file is None


# Regression: on a full disk the replica could not be opened at all, and its directory stayed locked.
def test_a_disk_that_is_full_already_does_not_prevent_opening(
    directory: ReplicaDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    history, _ = start(directory.path, 20)
    monkeypatch.setattr(os, "ftruncate", disk_full)
    with opened(directory, **FULL) as replica:
        assert read_database(replica) == history.database()


def test_a_place_that_cannot_be_written_is_a_warning(
    directory: ReplicaDirectory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    history, _ = start(directory.path, 5)
    (tmp_path / "file").write_text("not a directory")
    with opened(directory, hydration_path=str(tmp_path / "file" / "local.db"), **FULL) as replica:
        assert read_database(replica) == history.database()
        assert replica.hydration_file is None
    assert "is not hydrated, reads go to the store" in caplog.text


def test_hydrate_max_is_the_limit_and_hydrate_false_is_final(directory: ReplicaDirectory) -> None:
    start(directory.path, 5)
    for options, expected in (
        ({"hydrate": None, "hydrate_max": 5 * PAGE_SIZE}, False),
        ({"hydrate": None, "hydrate_max": 5 * PAGE_SIZE + 1}, True),
        ({"hydrate": None}, True),
        ({"hydrate": False}, False),
        ({"hydrate": True, "hydrate_max": 0}, False),
    ):
        with opened(directory, **options) as replica:
            assert (replica.hydration_file is not None) == expected, options


# Regression: the copy's files stay, and keep the full disk full, until the replica is
# closed.
def test_a_copy_that_was_given_up_gives_its_space_back(
    directory: ReplicaDirectory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    history, _ = start(directory.path, 20)
    with opened(directory, **FULL) as replica:
        eventually(lambda: complete(replica))
        monkeypatch.setattr(os, "pwrite", disk_full)
        with pinned(replica):
            history.commit([3])
            directory.sync(history)
            replica.refresh()
        assert replica.hydration_file is None
        assert sum(path.stat().st_size for path in (tmp_path / "tmp").rglob("*") if path.is_file()) < 20 * PAGE_SIZE
