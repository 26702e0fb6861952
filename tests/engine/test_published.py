"""What appears on disk: at hydration_path and in the directory beside it, when, whole, and nobody else's."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from replicas import (
    FULL,
    History,
    ReplicaDirectory,
    SpyStore,
    complete,
    hydration_file,
    local_database,
    long_replica,
    opened,
    pinned,
    read_database,
    start,
)

from lazyreplica import filling
from lazyreplica.errors import ConfigError
from lazyreplica.filling import Filler
from lazyreplica.head import Hold
from lazyreplica.hydrator import Hydrator
from lazyreplica.local.directory import CopyDirectory
from lazyreplica.replica import Replica
from lazyreplica.storage import StoredFile
from support.waiting import eventually


def test_hydration_path_appears_whole_and_stays(directory: ReplicaDirectory, tmp_path: Path) -> None:
    history = long_replica(directory)
    target = tmp_path / "local.db"
    with opened(directory, hydration_path=str(target), **FULL) as replica:
        assert replica.hydration_file == str(target)
        eventually(lambda: complete(replica))
        eventually(target.exists)
        assert target.read_bytes() == history.database()
        assert replica.hydration_txid == history.txid
    assert target.read_bytes() == history.database()


@pytest.mark.parametrize("arrives", [False, True])
def test_a_reader_at_rest_learns_that_the_copy_is_whole(
    directory: ReplicaDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arrives: bool
) -> None:
    """Nothing new comes, so readers would go on with the view that they had while pages were missing."""
    history = long_replica(directory)
    options = {"hydration_path": str(tmp_path / "local.db"), **FULL, "poll_interval": 0.02}
    go = threading.Event()
    monkeypatch.setattr(Filler, "fill", _after(go, Filler.fill))
    with contextlib.ExitStack() as stack:
        owner = stack.enter_context(opened(directory, **options))
        # Where something arrives, only one: while another process has the copy open, it is not folded in place.
        others = [] if arrives else [stack.enter_context(opened(directory, **options))]
        readers = [(replica, replica.hold()) for replica in (owner, *others)]

        def sees(replica: Replica, hold: Hold) -> str:
            """In a transaction, as `ReplicaFile` begins one."""
            if not replica.resume(hold):
                replica.begin_again(hold, replica.head.lineage.number)
            hold.active = False
            return "none" if hold.view is None else "part" if hold.view.whole is None else "all"

        eventually(lambda: all(sees(*reader) == "part" for reader in readers))
        if arrives:  # and is folded into the base, when all pages are here
            history.commit([3, 40])
            directory.sync(history)
            owner.refresh()
            assert sees(*readers[0]) == "part"
        go.set()
        eventually(lambda: complete(owner))
        eventually(lambda: all(sees(*reader) == "all" for reader in readers))
        assert owner.resume(readers[0][1]), "and goes on with that"


def test_a_reader_at_rest_learns_that_a_kept_copy_has_caught_up(
    directory: ReplicaDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = long_replica(directory)
    options = {"hydration_path": str(tmp_path / "local.db"), **FULL}
    with opened(directory, **options) as replica:
        eventually(lambda: complete(replica))
    history.commit([3, 40])
    directory.sync(history)
    go = threading.Event()
    monkeypatch.setattr(Hydrator, "_step", _after(go, Hydrator._step))
    with opened(directory, **options) as replica:
        hold = replica.hold()
        replica.begin_again(hold, replica.head.lineage.number)
        hold.active = False
        assert hold.view is None, "it is one transaction behind"
        go.set()
        eventually(lambda: complete(replica))
        assert not replica.resume(hold)
        replica.begin_again(hold, replica.head.lineage.number)
        assert hold.view is not None


def test_whether_the_copy_is_whole_is_asked_without_waiting_for_a_fold(directory: ReplicaDirectory) -> None:
    """Also by a connection that the garbage collector closes in the thread that has the lock."""
    long_replica(directory)
    with opened(directory, **FULL) as replica:
        eventually(lambda: complete(replica))
        assert replica._hydrator is not None
        copy = replica._hydrator.local.copy
        assert copy is not None and copy.check_whole()
        copy.base.whole = False
        with copy._lock:
            assert not copy.check_whole()
            assert replica.stats().hydration_txid is None
        assert copy.check_whole()


def _after(event: threading.Event, work: Callable[..., Any]) -> Callable[..., Any]:
    def wait_and_work(*args: object) -> Any:
        assert event.wait(5)
        return work(*args)

    return wait_and_work


def test_what_came_while_it_was_open_is_in_the_file_after_a_clean_close(
    directory: ReplicaDirectory, tmp_path: Path
) -> None:
    history = long_replica(directory)
    target = tmp_path / "local.db"
    with opened(directory, hydration_path=str(target), **FULL) as replica:
        eventually(target.exists)
        whole = history.txid
        for written, size in (([4], 30), ([50], 50), ([1], 12), ([12], 20), ([3, 4], 19)):
            history.commit(written, size)
            directory.sync(history)
            replica.refresh()
            assert local_database(replica) == history.database()
            assert replica.hydration_txid == whole
            assert target.read_bytes() == history.database(whole), "an older transaction, but a whole one"
    assert target.read_bytes() == history.database()


@pytest.mark.parametrize("more", [0, 5])
def test_a_later_process_reads_from_the_store_only_what_is_new(
    directory: ReplicaDirectory, tmp_path: Path, nothing_kept: None, more: int
) -> None:
    history = long_replica(directory)
    options = {"hydration_path": str(tmp_path / "local.db"), **FULL}
    with opened(directory, **options) as replica:
        eventually(lambda: complete(replica))
    for n in range(more):
        history.commit([n + 1, 30 - n])
        directory.sync(history)
    spy = SpyStore(directory.url)
    hydrated: list[int] = []

    def note(file: StoredFile, offset: int, length: int) -> None:
        if threading.current_thread().name == "lazyreplica-hydrator":
            hydrated.append(file.name.max_txid)

    spy.before_read = note
    with opened(spy, **options) as replica:
        eventually(lambda: complete(replica))
        opening = len(spy.reads)
        assert read_database(replica) == local_database(replica) == history.database()
        assert len(spy.reads) == opening
        assert set(hydrated) == set(range(history.txid - more + 1, history.txid + 1)), "only what is new"
    assert (tmp_path / "local.db").read_bytes() == history.database()


def test_a_copy_whose_last_transaction_was_compacted_away_is_continued(
    directory: ReplicaDirectory, tmp_path: Path, nothing_kept: None
) -> None:
    history = long_replica(directory)
    options = {"hydration_path": str(tmp_path / "local.db"), **FULL}
    with opened(directory, **options) as replica:
        eventually(lambda: complete(replica))
        inode = (tmp_path / "local.db").stat().st_ino
    end = history.txid
    for n in range(4):
        history.commit([n + 1])
        directory.sync(history)
    directory.write(history, 1, 2, end - 1)
    directory.write(history, 1, end, end + 3)
    for txid in range(2, history.txid):
        directory.remove(0, txid)
    with opened(directory, **options) as replica:
        eventually(lambda: complete(replica))
        assert read_database(replica) == local_database(replica) == history.database()
    assert (tmp_path / "local.db").read_bytes() == history.database()
    assert (tmp_path / "local.db").stat().st_ino == inode, "the same copy, not another one"


def test_a_copy_of_another_history_is_made_anew(directory: ReplicaDirectory, tmp_path: Path) -> None:
    long_replica(directory)
    options = {"hydration_path": str(tmp_path / "local.db"), **FULL}
    with opened(directory, **options) as replica:
        eventually(lambda: complete(replica))
    directory.wipe()
    other = History("other")
    for n in range(7):
        other.commit([1, n + 1], size=20)
        directory.sync(other)
    with opened(directory, **options) as replica:
        eventually(lambda: complete(replica))
        assert read_database(replica) == local_database(replica) == other.database()
    assert (tmp_path / "local.db").read_bytes() == other.database()


def test_a_history_that_was_put_back_and_went_on_differently_is_not_mixed(
    directory: ReplicaDirectory, tmp_path: Path
) -> None:
    """The base file is the same in both, so the path looks like ours; but a page that only the old branch changed is in
    no file of the new one."""
    history, _ = start(directory.path, 20)
    for written in ([2], [3], [4]):
        history.commit(written)
        directory.sync(history)
    options = {"hydration_path": str(tmp_path / "local.db"), **FULL}
    with opened(directory, **options) as replica:
        eventually(lambda: complete(replica))
    other = History("db")
    other.put(history.states[1], 20)
    for written in ([5], [6], [7], [8]):
        other.name = "branch"
        other.commit(written)
    for txid in (2, 3, 4):
        directory.remove(0, txid)
    directory.write(other, 1, 2, 5)
    with opened(directory, **options) as replica:
        eventually(lambda: complete(replica))
        assert read_database(replica) == local_database(replica) == other.database()


@pytest.mark.parametrize("kind", ["file", "directory", "dangling link"])
def test_what_stands_at_hydration_path_is_refused_and_untouched(
    directory: ReplicaDirectory, tmp_path: Path, kind: str
) -> None:
    start(directory.path, 5)
    target = tmp_path / "mine.db"
    if kind == "file":
        target.write_text("precious")
    elif kind == "directory":
        target.mkdir()
    else:
        target.symlink_to(tmp_path / "nowhere")
    with (
        pytest.raises(ConfigError, match="will not be overwritten"),
        opened(directory, hydration_path=str(target), **FULL),
    ):
        pass
    assert os.path.lexists(target)
    if kind == "file":
        assert target.read_text() == "precious"


# Regression: whatever stood in `<hydration_path>.d` was deleted, without a sign that it is ours.
def test_a_directory_of_somebody_else_beside_hydration_path_is_not_emptied(
    directory: ReplicaDirectory, tmp_path: Path
) -> None:
    start(directory.path, 5)
    (tmp_path / "app.d" / "sub").mkdir(parents=True)
    (tmp_path / "app.d" / "sub" / "settings").write_text("precious")
    try:
        with opened(directory, hydration_path=str(tmp_path / "app"), **FULL):
            pass
    except ConfigError:
        pass
    assert (tmp_path / "app.d" / "sub" / "settings").read_text() == "precious"


# Regression: `staged.replace(target)` overwrote whatever had appeared there since the open.
def test_a_file_that_appears_at_hydration_path_meanwhile_is_not_overwritten(
    directory: ReplicaDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(directory.path, 5)
    target = tmp_path / "local.db"
    published = threading.Event()
    original = CopyDirectory.publish

    def publish(self: CopyDirectory, database: Path) -> None:
        target.write_bytes(b"precious")
        try:
            original(self, database)
        finally:
            published.set()

    monkeypatch.setattr(CopyDirectory, "publish", publish)
    with opened(directory, hydration_path=str(target), **FULL):
        assert published.wait(5)
        assert target.read_bytes() == b"precious"
    assert target.read_bytes() == b"precious"


# Regression: it was published while the log still held pages of the head (an older snapshot was
# pinned): the file at hydration_path was then a mixture of two transactions.
def test_what_is_published_is_one_transaction(
    directory: ReplicaDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_kept: None
) -> None:
    history, _ = start(directory.path, 20)
    spy = SpyStore(directory.url)
    monkeypatch.setattr(filling, "CHUNK", 2000)
    monkeypatch.setattr(filling.Filler, "_stand_back", lambda self: None)
    go_on = threading.Event()
    reached = threading.Event()

    def hold(file: StoredFile, offset: int, length: int) -> None:
        if offset and threading.current_thread().name == "lazyreplica-hydrator":
            reached.set()
            assert go_on.wait(5)

    spy.before_read = hold
    target = tmp_path / "local.db"
    with opened(spy, hydration_path=str(target), **FULL) as replica:
        assert reached.wait(5)  # the first few pages are in the file, as of TXID 1
        with pinned(replica):
            history.commit([1, 2, 15, 16])
            directory.sync(history)
            replica.refresh()
            go_on.set()
            eventually(lambda: replica.hydration_progress >= 99.9)  # all local, and published after the reader
            if target.exists():
                assert target.read_bytes() in (history.database(1), history.database(2))
        eventually(target.exists)
        eventually(lambda: target.read_bytes() == history.database(2))


def test_a_new_history_is_never_mixed_into_the_old_copy(
    directory: ReplicaDirectory, tmp_path: Path, nothing_kept: None
) -> None:
    start(directory.path, 20)
    target = tmp_path / "local.db"
    with opened(directory, hydration_path=str(target), **FULL) as replica:
        eventually(target.exists)
        for n in range(5):
            directory.wipe()
            other, _ = start(directory.path, 12 + n, name=n)
            replica.refresh()
            eventually(lambda: complete(replica))
            assert read_database(replica) == local_database(replica) == other.database()
            whole = other.database()
            eventually(lambda: target.exists() and target.read_bytes() == whole)  # noqa: B023


def test_two_users_of_one_hydration_path_share_one_copy(directory: ReplicaDirectory, tmp_path: Path) -> None:
    history, _ = start(directory.path, 9)
    target = tmp_path / "local.db"
    options = {"hydration_path": str(target), "poll_interval": 0.1, **FULL}
    with opened(directory, **options) as first:
        eventually(lambda: complete(first))
        spy = SpyStore(directory.url)
        with opened(spy, **options) as second:
            eventually(lambda: complete(second))
            assert second.hydration_file == first.hydration_file == str(target)
            asked = len(spy.reads), len(spy.probes), spy.listings
            for n in range(5):
                history.commit([n + 1])
                directory.sync(history)
                eventually(lambda: second.head.txid == history.txid)
                assert read_database(second) == local_database(second) == history.database()
            assert asked == (len(spy.reads), len(spy.probes), spy.listings), "one of them asks for both"
            assert 0 <= second.lag < 5
        assert local_database(first) == history.database()
    assert target.read_bytes() == history.database()


def test_the_copy_is_taken_over_when_its_owner_goes(directory: ReplicaDirectory, tmp_path: Path) -> None:
    history = long_replica(directory)
    target = tmp_path / "local.db"
    options = {"hydration_path": str(target), "poll_interval": 0.02, **FULL}
    with contextlib.ExitStack() as others:
        first = others.enter_context(opened(directory, **options))
        eventually(lambda: complete(first))
        with opened(directory, **options) as second:
            history.commit([2])
            directory.sync(history)
            eventually(lambda: second.head.txid == history.txid)
            others.close()
            for _ in range(3):
                history.commit([3, 30])
                directory.sync(history)
                eventually(lambda: second.head.txid == history.txid)
                eventually(lambda: local_database(second) == history.database())
    assert target.read_bytes() == history.database()


def test_a_path_that_holds_another_replicas_copy_is_left_to_it(
    directory: ReplicaDirectory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start(directory.path, 9)
    other, elsewhere = start(tmp_path / "elsewhere", 12, name="other")
    options = {"hydration_path": str(tmp_path / "local.db"), **FULL}
    with opened(directory, **options) as first:
        eventually(lambda: complete(first))
        with opened(elsewhere, **options) as second:
            eventually(lambda: complete(second))
            assert second.hydration_file not in (None, first.hydration_file)
            assert read_database(second) == other.database()
    assert "holds a copy of" in caplog.text
    with opened(elsewhere, **options) as second:
        eventually(lambda: complete(second))
        assert second.hydration_file == str(tmp_path / "local.db"), "nobody uses it any more"
    assert (tmp_path / "local.db").read_bytes() == other.database()


def test_nothing_is_left_of_a_private_copy(directory: ReplicaDirectory, tmp_path: Path) -> None:
    start(directory.path, 9)
    with opened(directory, **FULL) as replica:
        eventually(lambda: complete(replica))
        assert list(leftovers(tmp_path))
    assert not list(leftovers(tmp_path))


def leftovers(tmp_path: Path) -> Iterator[Path]:
    return (tmp_path / "tmp").glob("lazyreplica-*/*")


# Regression: the copy of the old history stayed in the directory until the replica was closed.
def test_the_copy_of_an_old_history_gives_its_space_back(directory: ReplicaDirectory, tmp_path: Path) -> None:
    with opened_after_wipes(directory, 3) as replica:
        eventually(lambda: complete(replica))
        copies = [path for path in (tmp_path / "tmp").rglob("base-*") if path.is_file()]
        assert copies == [hydration_file(replica)]


@contextlib.contextmanager
def opened_after_wipes(directory: ReplicaDirectory, wipes: int) -> Iterator[Replica]:
    start(directory.path, 20)
    with opened(directory, **FULL) as replica:
        for n in range(wipes):
            eventually(lambda: complete(replica))
            directory.wipe()
            start(directory.path, 20, name=n)
            replica.refresh()
        yield replica
