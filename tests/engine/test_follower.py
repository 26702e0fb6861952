"""How the head follows the files: link by link, over compaction and holes, and onto another history."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import apsw
import pytest
from replicas import History, ReplicaDirectory, SpyStore, opened, pinned, read_database, read_page, start

import lazyreplica
from lazyreplica import layers
from lazyreplica.errors import (
    BucketNotFound,
    EmptyReplica,
    LegacyLayout,
    LineageChanged,
    LTXError,
    ReplicaDamaged,
    ReplicaGap,
    SnapshotGone,
    StoreUnavailable,
)
from lazyreplica.ltx import FileName

STILL = {"hydrate": False, "poll_interval": 0}


def test_every_new_file_is_a_new_state(directory: ReplicaDirectory) -> None:
    history, _ = start(directory.path)
    spy = SpyStore(directory.url)
    with opened(spy) as replica:
        for written, size in (([2], 8), ([1, 9], 9), ([3], 4), ([], 4)):
            history.commit(written, size)
            directory.sync(history)
            replica.refresh()
            assert replica.head.txid == history.txid
            assert replica.head.timestamp_ms == 1_700_000_000_000 + history.txid
            assert replica.head.lineage.epoch == 0
            assert read_database(replica) == history.database()
        assert not [r for r in spy.reads if r[0].name.min_txid > 1], "a new file comes with the request that finds it"


def test_files_that_continue_the_wal_need_no_listing(directory: ReplicaDirectory) -> None:
    history, _ = start(directory.path)
    spy = SpyStore(directory.url)
    with opened(spy) as replica:
        for _ in range(5):
            history.commit([2])
            directory.sync(history)
        replica._follower.poll()
        assert (replica._head.current.txid, spy.listings) == (6, 1)


def test_a_new_wal_is_followed_when_a_listing_still_shows_our_file(directory: ReplicaDirectory) -> None:
    history, _ = start(directory.path)
    spy = SpyStore(directory.url)
    with opened(spy) as replica:
        history.commit([2], restart_wal=True)
        directory.sync(history)
        replica._follower.poll()
        assert (replica._head.current.txid, spy.listings) == (2, 2)
        replica.refresh()
        assert replica.head.lineage.epoch == 0
        assert read_database(replica) == history.database()


def test_far_behind_compacted_files_lead_to_the_head(directory: ReplicaDirectory) -> None:
    history, _ = start(directory.path)
    with opened(directory) as replica:
        for n in range(40):
            history.commit([n % 8 + 1])
        directory.write(history, 1, 2, 20)
        directory.write(history, 2, 15, 30)  # overlaps
        directory.write(history, 1, 31, 40)
        directory.sync(history)
        replica.refresh()
        assert replica.head.txid == 41
        assert read_database(replica) == history.database()
        history.commit([1])
        directory.sync(history)
        replica.refresh()
        assert read_database(replica) == history.database()


def test_compaction_of_what_we_stand_on_starts_an_epoch_not_a_lineage(directory: ReplicaDirectory) -> None:
    history, _ = start(directory.path)
    directory.write(history, 9, 1, 1)
    with opened(directory) as replica:
        lineage = replica.head.lineage
        for _ in range(4):
            history.commit([2, 3])
        directory.write(history, 1, 2, 4)
        directory.sync(history)
        directory.remove(0, 1)
        directory.remove(9, 1)
        directory.write(history, 9, 1, 3)
        replica.refresh()
        # Nothing of what was known is left: that cannot be told from another history.
        assert replica.head.lineage.number != lineage.number
        lineage = replica.head.lineage
        for _ in range(4):
            history.commit([2, 5])
        directory.write(history, 1, 5, 8)
        directory.sync(history)
        directory.remove(0, 5)
        replica.refresh()
        assert (replica.head.lineage.number, replica.head.lineage.epoch) == (lineage.number, 1)
        assert read_database(replica) == history.database()


def test_a_retention_hole_is_bridged_by_a_snapshot(directory: ReplicaDirectory) -> None:
    history, _ = start(directory.path)
    with opened(directory) as replica:
        number = replica.head.lineage.number
        for _ in range(9):
            history.commit([4])
        directory.write(history, 9, 1, 8)
        directory.write(history, 0, 9)
        directory.write(history, 0, 10)
        replica.refresh()
        assert (replica.head.txid, replica.head.lineage.number) == (10, number)
        assert read_database(replica) == history.database()


def test_a_hole_is_an_error_and_the_head_stays(directory: ReplicaDirectory) -> None:
    history, _ = start(directory.path)
    with opened(directory) as replica:
        history.commit([4])
        history.commit([4])
        directory.sync(history)
        with pytest.raises(ReplicaGap, match="0000000000000002 to 0000000000000002 are missing"):
            replica.refresh()
        assert read_database(replica) == history.database(1)
        directory.write(history, 0, 2)
        replica.refresh()
        assert read_database(replica) == history.database()


def test_a_file_that_vanishes_between_listing_and_reading_is_planned_around(directory: ReplicaDirectory) -> None:
    history, _ = start(directory.path)
    for _ in range(3):
        history.commit([2, 3])
        directory.sync(history)
    spy = SpyStore(directory.url)

    def compact() -> None:
        if directory.place(0, 2, 2).exists():
            directory.write(history, 1, 2, 4)
            directory.remove(0, 2)
            directory.remove(0, 3)

    spy.after_list = compact
    with opened(spy) as replica:
        assert read_database(replica) == history.database()
        assert spy.listings == 2


def test_the_same_while_following(directory: ReplicaDirectory) -> None:
    history, _ = start(directory.path)
    spy = SpyStore(directory.url)
    with opened(spy) as replica:
        for _ in range(3):
            history.commit([2, 3])
        directory.write(history, 1, 2, 3)
        directory.sync(history)

        def compact() -> None:
            if directory.place(1, 2, 3).exists():
                directory.write(history, 2, 2, 4)
                directory.remove(1, 2, 3)

        spy.after_list = compact
        replica.refresh()
        assert read_database(replica) == history.database()


# -- wiped paths --


@pytest.mark.parametrize("transactions", [1, 3, 5])
def test_a_path_that_was_wiped_and_started_anew_is_another_lineage(
    directory: ReplicaDirectory, transactions: int
) -> None:
    """Whether the new history ends before ours, with it, or beyond."""
    history, _ = start(directory.path)
    for _ in range(2):
        history.commit([2])
        directory.sync(history)
    with opened(directory) as replica:
        old = replica.head.lineage.number
        directory.wipe()
        other, _ = start(directory.path, 6, name="other", salt=50)
        for _ in range(transactions - 1):
            other.commit([1])
            directory.sync(other)
        replica.refresh()
        with pytest.raises(LineageChanged, match="close this connection and open it again"):
            replica.begin(old)
        assert replica.head.txid == transactions
        assert read_database(replica) == other.database()
    assert not replica._head._pins or list(replica._head._pins) == [replica.head]


def test_the_same_names_with_other_bytes_are_another_lineage(directory: ReplicaDirectory) -> None:
    start(directory.path)
    with opened(directory) as replica:
        old = replica.head.lineage.number
        other = History("other")
        other.commit(size=8)
        directory.sync(other)
        replica.refresh()
        assert replica.head.lineage.number != old
        assert read_database(replica) == other.database()


def test_an_open_connection_must_reopen_and_a_new_one_sees_the_new_database(
    directory: ReplicaDirectory, tmp_path: Path
) -> None:
    directory.write(one_transaction(tmp_path / "a.db", ["CREATE TABLE a(x)"]), 0, 1)
    old = lazyreplica.connect(directory.url, **STILL)
    assert old.execute("SELECT name FROM sqlite_schema").get == "a"
    directory.wipe()
    directory.write(one_transaction(tmp_path / "b.db", ["CREATE TABLE b(x)"]), 0, 1)
    lazyreplica.refresh(old)
    with pytest.raises(apsw.CantOpenError, match="close this connection and open it again") as caught:
        old.execute("SELECT name FROM sqlite_schema").fetchall()
    assert isinstance(caught.value, LineageChanged)
    assert caught.value.extendedresult == apsw.SQLITE_CANTOPEN  # type: ignore[attr-defined]
    with lazyreplica.connect(directory.url, **STILL) as new:
        assert new.execute("SELECT name FROM sqlite_schema").get == "b"
    new.close()
    old.close()


def test_a_wiped_path_without_files_leaves_the_head(
    directory: ReplicaDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    history, _ = start(directory.path)
    with opened(directory) as replica:
        directory.wipe()
        replica.refresh()
        assert "has no files any more; staying at TXID 0000000000000001" in caplog.text
        assert read_database(replica) == history.database(), "small files are kept"


def test_a_path_whose_newest_files_were_deleted_is_another_history_when_it_stays_so(
    directory: ReplicaDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    """One listing may be out of date; after two, the store was put back, and TXID 2 may come again as another one."""
    history, _ = start(directory.path)
    history.commit([2])
    directory.sync(history)
    with opened(directory) as replica:
        lineage = replica.head.lineage.number
        directory.remove(0, 2)
        replica.refresh()
        assert "does not hold TXID 0000000000000002 as we know it" in caplog.text
        assert read_database(replica) == history.database(2)
        replica.refresh()
        assert replica.head.lineage.number != lineage
        assert read_database(replica) == history.database(1)
        with pytest.raises(LineageChanged):
            replica.begin(lineage)


def test_a_rewritten_key_never_stands_in_for_what_is_pinned(
    directory: ReplicaDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another history with the same TXIDs takes the place of ours while a transaction is open."""
    monkeypatch.setattr(layers, "KEEP_FILE", 0)
    monkeypatch.setattr(layers, "KEEP_TOTAL", 0)
    monkeypatch.setattr(layers, "PASSING_TOTAL", 0)
    history, _ = start(directory.path)
    history.commit([2])
    directory.write(history, 9, 1, 1)
    directory.write(history, 9, 1, 2)
    with opened(directory, cache_size=0) as replica, pinned(replica) as snapshot:
        assert read_page(replica, snapshot, 1) == history.states[2][1]
        other = History("other")
        other.commit(size=8)
        other.commit([2])
        directory.write(other, 9, 1, 2)
        for pgno in range(1, 9):
            with pytest.raises(SnapshotGone):
                read_page(replica, snapshot, pgno)


def test_a_removed_directory_is_an_error_and_the_head_stays(directory: ReplicaDirectory) -> None:
    history, _ = start(directory.path)
    with opened(directory) as replica:
        shutil.rmtree(directory.path)
        with pytest.raises(BucketNotFound):
            replica.refresh()
        assert read_database(replica) == history.database()


# -- a primary that lost its local state --


def one_transaction(path: Path, statements: list[str]) -> History:
    """A real SQLite database in one transaction."""
    history = History(path.name, page_size=4096)
    db = apsw.Connection(str(path))
    for statement in statements:
        db.execute(statement)
    db.close()
    data = path.read_bytes()
    pages = {n + 1: data[n * 4096 : (n + 1) * 4096] for n in range(len(data) // 4096)}
    history.put(pages, len(pages))
    return history


def test_a_whole_database_that_does_not_continue_makes_sqlite_parse_its_schema_again(
    directory: ReplicaDirectory, tmp_path: Path
) -> None:
    """Equal schema cookies, other tables: without an epoch SQLite would read rows of one table as another's."""
    first = one_transaction(tmp_path / "a.db", ["CREATE TABLE one(a, b)", "INSERT INTO one VALUES(1, 2)"])
    second = one_transaction(tmp_path / "b.db", ["CREATE TABLE two(c)", "INSERT INTO two VALUES('two')"])
    assert first.states[1][1][40:44] == second.states[1][1][40:44], "the schema cookies"
    directory.write(first, 0, 1)
    db = lazyreplica.connect(directory.url, **STILL)
    assert db.execute("SELECT a, b FROM one").fetchall() == [(1, 2)]
    cookie = db.pragma("schema_version")
    first.put(second.states[1], len(second.states[1]), restart_wal=True)
    directory.write(first, 0, 2, whole=True)
    lazyreplica.refresh(db)
    with pytest.raises(apsw.SQLError, match="no such table: one"):
        db.execute("SELECT a, b FROM one").fetchall()
    assert db.execute("SELECT c FROM two").get == "two"
    assert db.pragma("schema_version") != cookie
    db.close()


def test_a_whole_database_that_continues_the_wal_is_no_epoch(directory: ReplicaDirectory) -> None:
    history, _ = start(directory.path)
    history.commit(range(1, 9))
    with opened(directory) as replica:
        directory.sync(history)
        replica.refresh()
        assert replica.head.lineage.epoch == 0
        assert read_database(replica) == history.database()


def test_a_pinned_snapshot_survives_a_new_epoch(directory: ReplicaDirectory) -> None:
    history, _ = start(directory.path)
    with opened(directory) as replica, pinned(replica) as snapshot:
        history.commit(range(1, 7), 6, restart_wal=True)
        directory.write(history, 0, 2, whole=True)
        replica.refresh()
        assert read_database(replica, snapshot) == history.database(1)
        assert replica.head.lineage.epoch == 1
        assert read_database(replica) == history.database(2)


# -- files that do not fit --


def test_another_page_size_is_refused_while_following(directory: ReplicaDirectory) -> None:
    history, _ = start(directory.path)
    other = History("other", page_size=1024)
    other.commit(size=2)
    other.commit([1])
    with opened(directory) as replica:
        directory.write(other, 0, 2)
        with pytest.raises(ReplicaDamaged, match="page size of 1024 bytes"):
            replica.refresh()
        assert read_database(replica) == history.database(1)


def test_another_page_size_is_refused_at_open(directory: ReplicaDirectory) -> None:
    start(directory.path)
    other = History("other", page_size=1024)
    other.commit(size=2)
    other.commit([1])
    directory.write(other, 0, 2)
    with pytest.raises(ReplicaDamaged, match="mixes two databases"), opened(directory):
        pass


def test_a_file_whose_header_disagrees_with_its_name_is_refused(directory: ReplicaDirectory) -> None:
    history, _ = start(directory.path)
    history.commit([2])
    history.commit([3])
    directory.write_bytes(0, 2, 2, history.file(2, 3))
    with pytest.raises(ReplicaDamaged, match="name and content disagree"), opened(directory):
        pass


def test_a_damaged_transaction_is_passed_by_in_a_compacted_file(directory: ReplicaDirectory) -> None:
    history, _ = start(directory.path)
    with opened(directory) as replica:
        history.commit([2])
        data = history.file(2, 2, wal=True)
        directory.write_bytes(0, 2, 2, data[:150] + bytes([data[150] ^ 1]) + data[151:])
        with pytest.raises(LTXError, match="damaged"):
            replica.refresh()
        assert read_database(replica) == history.database(1)
        history.commit([3])
        directory.write(history, 1, 2, 3)
        replica.refresh()
        assert read_database(replica) == history.database(3)


def test_paths_without_a_replica(directory: ReplicaDirectory) -> None:
    with pytest.raises(EmptyReplica, match="holds no LTX files"), opened(directory):
        pass
    (directory.path / "generations").mkdir()
    with pytest.raises(LegacyLayout), opened(directory):
        pass
    shutil.rmtree(directory.path)
    with pytest.raises(BucketNotFound), opened(directory):
        pass


def test_a_page_that_no_file_holds_is_reported(directory: ReplicaDirectory) -> None:
    history, _ = start(directory.path, 4)
    history.commit([2], 6)
    pages = history.changed[2] = frozenset({2, 5})  # page 6 is missing
    assert pages
    directory.sync(history)
    with opened(directory) as replica, pinned(replica) as snapshot:
        assert read_page(replica, snapshot, 5) == history.states[2][5]
        with pytest.raises(ReplicaDamaged, match="page 6 of 6 is in no file"):
            read_page(replica, snapshot, 6)


def test_a_snapshot_that_was_made_anew_is_no_other_history(directory: ReplicaDirectory) -> None:
    """Litestream may write level 9 again at the same TXID, while the level-0 file was not in the first listing yet."""
    history, _ = start(directory.path)
    history.commit([2])
    level_0 = history.file(2, 2)
    directory.write(history, 9, 1, 2)
    with opened(directory) as replica:
        lineage = replica.head.lineage
        directory.remove(9, 1, 2)
        directory.write_bytes(0, 2, 2, level_0)
        directory.write(history, 9, 1, 2)
        for _ in range(3):
            replica.refresh()
        assert replica.head.lineage.number == lineage.number
        history.commit([3])
        directory.sync(history)
        replica.refresh()
        assert replica.head.txid == 3
        assert replica.head.lineage.number == lineage.number
        assert read_database(replica) == history.database()


def test_a_file_whose_date_is_set_after_we_took_it_is_no_other_history(directory: ReplicaDirectory) -> None:
    """Litestream renames a local file into place, and sets its date afterwards: its inode and size stay, not the rest.

    Whoever reads between the two finds another file identity from then on, but the same content.
    """
    history, _ = start(directory.path)
    with opened(directory) as replica:
        lineage = replica.head.lineage
        history.commit([2], restart_wal=True)
        directory.sync(history)
        replica.refresh()
        for _ in range(3):
            path = directory.path / "ltx" / "0" / str(FileName(2, 2))
            os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns - 5_000_000))
            replica.refresh()
        history.commit([3], restart_wal=True)
        directory.sync(history)
        replica.refresh()
        assert replica.head.txid == 3
        assert replica.head.lineage is lineage
        assert read_database(replica) == history.database()


def test_listings_whose_files_cannot_be_read_still_tell_that_the_path_is_ours(directory: ReplicaDirectory) -> None:
    """Storage fails for as long as retention keeps files: no poll gets through, but each has seen what goes on."""
    history, _ = start(directory.path)
    store = SpyStore(directory.url)
    with opened(store) as replica:
        lineage = replica.head.lineage.number

        def fail(*_: object) -> None:
            raise StoreUnavailable("no answer")

        store.before_read = fail
        removed = [(0, 1, 1)]
        for newest in (3, 5, 7):
            history.commit([1])
            history.commit([2])
            directory.write(history, 1, newest - 1, newest)
            directory.write(history, 9, 1, newest)
            with pytest.raises(StoreUnavailable):
                replica.refresh()
            for gone in removed:
                directory.remove(*gone)
            removed = [(1, newest - 1, newest), (9, 1, newest)]
        store.before_read = lambda *_: None
        replica.refresh()
        assert replica.head.txid == 7
        assert replica.head.lineage.number == lineage
        assert read_database(replica) == history.database()
