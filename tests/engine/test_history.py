"""States of the past, found and read by the engine: few requests, files that vanish, clocks, the local copy."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from replicas import FULL, History, ReplicaDirectory, SpyStore, complete, opened, read_page, start

from lazyreplica import layers
from lazyreplica.errors import FileVanished, LTXError, NoSuchState, SnapshotGone
from lazyreplica.ltx import FLAG_NO_CHECKSUM, Header, encode_file
from lazyreplica.moments import AtTime, AtTXID, Moment
from lazyreplica.replica import Replica
from lazyreplica.snapshot import Snapshot
from support.waiting import eventually

T0 = 1_700_000_000_000
"""The time of TXID n is n milliseconds later (see `History.file`)."""


def long_history(path: Path, count: int = 60) -> tuple[History, ReplicaDirectory]:
    history, directory = start(path, 20)
    for n in range(2, count + 1):
        history.commit([1 + n % 20, 1 + n * 7 % 20], size=20 + n % 3)
        directory.sync(history)
    return history, directory


def read_past(replica: Replica, moment: Moment) -> tuple[int, bytes]:
    """The TXID and the database of a moment, read in a transaction."""
    past = replica.at(moment)
    return past.txid, read_whole(replica, past)


def read_whole(replica: Replica, past: Snapshot) -> bytes:
    assert replica.begin(replica.head.lineage.number, past) is past
    try:
        return b"".join(read_page(replica, past, p) for p in range(1, past.commit + 1))
    finally:
        replica.end(past)


def test_every_boundary_as_a_time_and_as_a_txid(tmp_path: Path) -> None:
    history, directory = long_history(tmp_path / "r")
    directory.write(history, 1, 1, 10)
    directory.write(history, 1, 11, 40)
    directory.write(history, 9, 1, 25)
    with opened(directory) as replica:
        for txid in range(1, 61):
            for moment in (AtTXID(txid), AtTime(T0 + txid + 1)):
                assert read_past(replica, moment) == (txid, history.database(txid))
        with pytest.raises(NoSuchState, match=r"begins at 2023-11-14T22:13:20.001Z \(TXID 0*1\) and ends at .*20.060Z"):
            replica.at(AtTime(T0 + 1))
        with pytest.raises(NoSuchState, match="newest: 000000000000003c"):
            replica.at(AtTXID(61))
        assert replica.head.txid == 60


def test_few_requests_and_what_was_read_is_remembered(tmp_path: Path) -> None:
    history, directory = long_history(tmp_path / "r", 400)
    directory.write(history, 9, 1, 350)
    spy = SpyStore(directory.url, parallel=48)
    with opened(spy) as replica:
        spy.listings, spy.reads = 0, []
        assert replica.at(AtTime(T0 + 200)).txid == 199
        headers = [read for read in spy.reads if read[1:] == (0, 100)]
        assert len(headers) <= 2 * 48
        assert spy.listings == 0  # what lies before the head is known
        spy.reads = []
        assert replica.at(AtTime(T0 + 200)).txid == 199
        assert [read for read in spy.reads if read[1:] == (0, 100)] == []
        replica.at(AtTime(T0 + 100_000))
        assert spy.listings == 1  # newer ones may have come


def test_new_transactions_are_found_before_a_time_after_the_head(tmp_path: Path) -> None:
    history, directory = long_history(tmp_path / "r", 5)
    with opened(directory) as replica:
        history.commit([3])
        directory.sync(history)
        assert read_past(replica, AtTime(T0 + 1000)) == (6, history.database(6))
        assert replica.head.txid == 5  # poll_interval 0: what others see stays fixed


def test_a_clock_that_was_set_back(tmp_path: Path) -> None:
    """Then only the header of every file tells; as restore does, each file is judged by itself."""
    history, directory = long_history(tmp_path / "r", 40)
    late = history.file(20, 20, wal=True)
    header = Header.parse(late[:100])
    state = history.states[20]
    moved = Header(
        FLAG_NO_CHECKSUM,
        header.page_size,
        header.commit,
        20,
        20,
        T0 + 9_000_000,
        0,
        header.wal_offset,
        header.wal_size,
        header.wal_salt1,
        header.wal_salt2,
    )
    directory.write_bytes(0, 20, 20, encode_file(moved, [(p, state[p]) for p in sorted(history.changed[20])]))
    with opened(directory) as replica:
        assert replica.at(AtTime(T0 + 15)).txid == 14
        assert replica.at(AtTime(T0 + 31)).txid == 19  # 20 is "later", so nothing after it can be joined
        assert replica.at(AtTime(T0 + 9_000_001)).txid == 40


def test_files_that_vanish_while_they_are_searched(tmp_path: Path) -> None:
    history, directory = long_history(tmp_path / "r", 60)
    spy = SpyStore(directory.url)
    with opened(spy) as replica:
        directory.write(history, 1, 1, 30)
        for txid in range(1, 31):
            directory.remove(0, txid)
        # Files of the head's chain are kept open, so what they hold can still be had; forget them as a restart would.
        replica.layers._open.clear()
        assert read_past(replica, AtTime(T0 + 41)) == (40, history.database(40))
        assert replica.at(AtTXID(30)).txid == 30
        with pytest.raises(NoSuchState, match="oldest: 000000000000001e"):
            replica.at(AtTXID(12))
        spy.before_read = lambda file, *_: (_ for _ in ()).throw(FileVanished(f"{file} is gone"))
        replica.layers._open.clear()
        with pytest.raises(FileVanished):
            replica.at(AtTXID(35))


def test_a_damaged_header_is_named(tmp_path: Path) -> None:
    history, directory = long_history(tmp_path / "r", 10)
    directory.write(history, 9, 1, 10)
    with opened(directory) as replica:
        for txid in range(2, 10):
            directory.write_bytes(0, txid, txid, b"short")
        with pytest.raises(LTXError, match=r"level 0 file .* has 5 bytes, expected a header of 100"):
            replica.at(AtTime(T0 + 5))


@pytest.mark.usefixtures("nothing_kept")
def test_a_views_pages_are_found_in_older_states_or_are_gone(tmp_path: Path) -> None:
    """Compaction deletes the view's files: versions written before a state that is left are read from there."""
    history, directory = start(tmp_path / "r", 6)
    for pages in ([2], [3], [4], [5]):
        history.commit(pages)
        directory.sync(history)
    with opened(directory, cache_size=0) as replica:
        past = replica.at(AtTXID(4))
        directory.write(history, 1, 1, 3)
        directory.write(history, 1, 4, 5)
        for txid in range(1, 6):
            directory.remove(0, txid)
        directory.write(history, 0, 5)  # Litestream keeps the newest
        assert replica.begin(past.lineage.number, past) is past
        for pgno in (1, 2, 3, 6):  # written by TXID 3
            assert read_page(replica, past, pgno) == history.states[4][pgno]
        with pytest.raises(SnapshotGone, match="set the time or TXID again"):
            read_page(replica, past, 4)
        replica.end(past)


@pytest.mark.usefixtures("nothing_kept")
def test_views_beside_a_local_copy_that_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A view reads from the copy what it shares with the head, and holds nothing back."""
    monkeypatch.setattr(layers, "VERIFY_FILE", 0)
    history, directory = start(tmp_path / "r", 30)
    spy = SpyStore(directory.url)
    with opened(spy, **FULL, poll_interval=0.01, cache_size=0) as replica:
        eventually(lambda: complete(replica))
        stop = threading.Event()
        wrong: list[Any] = []

        def travel(seed: int) -> None:
            while not stop.is_set():
                txid = 1 + (seed * 7919) % replica.head.txid
                seed += 1
                if read_past(replica, AtTXID(txid)) != (txid, history.database(txid)):
                    wrong.append(txid)

        threads = [threading.Thread(target=travel, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        for n in range(60):
            history.commit([1 + n % 30, 1 + n * 11 % 30])
            directory.sync(history)
            eventually(lambda: replica.head.txid == history.txid)
        stop.set()
        for thread in threads:
            thread.join()
        assert wrong == []
        eventually(lambda: complete(replica), what="views that have ended hold nothing back")
        past = replica.at(AtTXID(history.txid - 1))
        replica.begin(past.lineage.number, past)
        history.commit([9])
        directory.sync(history)
        eventually(lambda: replica.head.txid == history.txid)
        spy.reads = []
        shared = [p for p in range(1, 31) if p not in (*history.changed[-1], *history.changed[-2])]
        assert [read_page(replica, past, p) for p in shared] == [history.states[-3][p] for p in shared]
        assert spy.reads == []
        replica.end(past)
        assert read_whole(replica, past) == history.database(past.txid)


def test_views_differ_in_what_page_1_shows(tmp_path: Path) -> None:
    _, directory = long_history(tmp_path / "r", 5)
    with opened(directory) as replica:
        views = [replica.at(AtTXID(3)), replica.at(AtTXID(3)), replica.at(AtTXID(4)), replica.head]
        assert len({view.lineage.epoch for view in views}) == 4
        assert len({view.change_counter for view in views}) == 4
        assert {view.lineage.number for view in views} == {replica.head.lineage.number}
