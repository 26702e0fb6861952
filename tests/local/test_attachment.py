"""How processes share one copy: what they learn from its log, what they must not believe, and who goes on with it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from replicas import (
    FULL,
    History,
    ReplicaDirectory,
    SpyStore,
    complete,
    local_database,
    opened,
    pinned,
    read_database,
    start,
)

from lazyreplica import attachment, hydrator, layers
from lazyreplica.attachment import Attachment
from lazyreplica.local.copy import LocalCopy
from lazyreplica.local.state import read_state
from lazyreplica.replica import Replica
from lazyreplica.snapshot import Lineage
from lazyreplica.storage import StoredFile
from support.waiting import eventually


@pytest.fixture
def options(tmp_path: Path) -> dict[str, object]:
    return {"hydration_path": str(tmp_path / "local.db"), **FULL}


def local(replica: Replica) -> Attachment:
    assert replica._hydrator is not None
    return replica._hydrator.local


def copy_of(replica: Replica) -> LocalCopy:
    copy = local(replica).copy
    assert copy is not None
    return copy


def die(replica: Replica) -> None:
    """As kill -9: its locks go, and nothing is put in order."""
    replica._follower.stop()
    replica._hydrator.stop()  # type: ignore[union-attr]
    replica._follower.join(5)
    replica._hydrator._thread.join(5)  # type: ignore[union-attr]
    replica.abandon()


@contextlib.contextmanager
def mortal(directory: ReplicaDirectory | SpyStore, **options: object) -> Iterator[Replica]:
    """A replica that may `die` in the block."""
    with contextlib.ExitStack() as stack:
        replica = stack.enter_context(opened(directory, **options))
        yield replica
        if replica._abandoned:
            stack.pop_all()
            replica._readahead.stop()
            replica._readahead.join(5)
            replica._store.close()


def right(replica: Replica, history: History) -> None:
    """Whatever state it shows is one of the history's, locally and altogether."""
    with pinned(replica) as snapshot:
        truth = history.states[snapshot.txid]
        view = replica.view(snapshot)
        if view is not None:
            assert all(view.page(p) in (None, page) for p, page in truth.items())
        assert read_database(replica, snapshot) == history.database(snapshot.txid)
        for pgno in truth:
            written = max(n for n in range(snapshot.txid + 1) if pgno in history.changed[n])
            assert snapshot.owner(pgno).max_txid >= written, "the store would give an older page"


# -- what is learnt from the log --


# Regression: it was in the other's copy, never became visible, and as the owner had polled nobody asked the store.
def test_a_transaction_that_came_between_listing_and_joining_is_seen(
    directory: ReplicaDirectory, options: dict[str, object]
) -> None:
    history, _ = start(directory.path, 9)
    with opened(directory, **options) as first:
        eventually(lambda: complete(first))
        spy = SpyStore(directory.url)

        def meanwhile() -> None:
            if history.txid == 1:
                history.commit([3])
                directory.sync(history)
                first.refresh()

        spy.after_list = meanwhile
        with opened(spy, poll_interval=600.0, **options) as second:
            assert (copy_of(second).txid, second.head.txid) == (2, 1)
            right(second, history)
            assert second.head.txid == 2


# Regression: the head went from 1 to 4 by transaction 4 alone.
def test_transactions_that_were_folded_before_we_looked_are_not_left_out(
    directory: ReplicaDirectory, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hydrator, "FOLD_AT", 0)
    history, _ = start(directory.path, 9)
    with opened(directory, **options) as first:
        eventually(lambda: complete(first))
        with opened(directory, poll_interval=600.0, **options) as second:
            right(second, history)
            before = copy_of(first)
            history.commit([1, 2, 3, 4, 5, 6])
            directory.sync(history)
            first.refresh()
            eventually(lambda: copy_of(first) is not before and not copy_of(first).records)
            history.commit([7])
            directory.sync(history)
            first.refresh()
            right(second, history)
            assert second._may_poll(), "what is folded has to be asked for"
            second.refresh()
            right(second, history)
            assert second.head.txid == 3
            assert local_database(second) is not None
            assert local(second).polled_at > 0, "from now on it learns from the log again"


# Regression: while the owner brought what had come, the others took its polls for news.
def test_who_owns_the_copy_and_is_behind_does_not_hold_the_others_back(
    directory: ReplicaDirectory, options: dict[str, object], monkeypatch: pytest.MonkeyPatch, nothing_kept: None
) -> None:
    history, _ = start(directory.path, 9)
    spy = SpyStore(directory.url)
    go_on = threading.Event()

    def hold(file: StoredFile, offset: int, length: int) -> None:
        if file.name.max_txid == 2 and threading.current_thread().name == "lazyreplica-hydrator":
            assert go_on.wait(10)

    spy.before_read = hold
    with opened(spy, poll_interval=0.02, **options) as first:
        eventually(lambda: complete(first))
        with opened(directory, poll_interval=0.05, **options) as second:
            monkeypatch.setattr(layers, "ARRIVAL_LIMIT", 0)  # so that the owner has to read it again
            history.commit([3])
            directory.sync(history)
            try:
                eventually(lambda: first.head.txid == 2)
                eventually(lambda: second.head.txid == 2)
                right(second, history)
            finally:
                go_on.set()
            eventually(lambda: local_database(second) == history.database())


# Regression: once it had gone on alone, it never looked at the copy again.
def test_who_had_to_go_on_alone_comes_back(
    directory: ReplicaDirectory, options: dict[str, object], nothing_kept: None
) -> None:
    history, _ = start(directory.path, 9)
    with opened(directory, **options) as first:
        eventually(lambda: complete(first))
        with opened(directory, poll_interval=600.0, **options) as second:
            history.commit([1])
            directory.sync(history)
            first.refresh()
            right(second, history)
            assert second.head.txid == 2
            for n in range(2):
                history.commit([n + 2])
                directory.sync(history)
            directory.write(history, 9, 1, 4)
            for txid in (2, 3, 4):
                directory.remove(0, txid)
            second.refresh()  # only the snapshot leads on: by a leap
            assert second.head.txid == 4
            assert second.head.lineage.epoch
            assert not local(second).attached
            assert local(second).polled_at == 0.0, "it has to poll for itself"
            first.refresh()
            eventually(lambda: complete(first))
            eventually(lambda: second._may_poll() is False or local(second).attached)
            right(second, history)
            eventually(lambda: local_database(second) == history.database())


def test_files_that_the_owner_exchanges_are_looked_for_again(
    directory: ReplicaDirectory, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    history, _ = start(directory.path, 9)
    with opened(directory, **options) as first:
        eventually(lambda: complete(first))
        attempts: list[int] = []

        class Vanishing(LocalCopy):
            def __init__(self, *args: object, **more: object) -> None:
                attempts.append(1)
                if len(attempts) < 3:
                    raise FileNotFoundError
                super().__init__(*args, **more)  # type: ignore[arg-type]

        monkeypatch.setattr(attachment, "LocalCopy", Vanishing)
        with opened(directory, **options) as second:
            assert len(attempts) == 3
            assert local_database(second) == history.database()


# Regression: the copy was looked up before its history was compared, and exchanged between the two.
def test_a_copy_that_is_exchanged_meanwhile_is_not_taken_for_the_new_historys(
    directory: ReplicaDirectory, options: dict[str, object]
) -> None:
    start(directory.path, 9)

    class Racing(Attachment):
        exchange: Callable[[], None] | None = None

        @property
        def copy(self) -> LocalCopy | None:  # type: ignore[override]
            found = self._found
            if self.exchange:
                self.exchange()
            return found

        @copy.setter
        def copy(self, value: LocalCopy | None) -> None:
            self._found = value

    with opened(directory, **options) as replica, pinned(replica) as snapshot:
        eventually(lambda: complete(replica))
        mine = local(replica)
        racing = object.__new__(Racing)
        racing.__dict__.update({**mine.__dict__, "_found": mine.copy})
        assert racing.view(snapshot) is not None
        racing.lineage = Lineage()

        def exchange() -> None:
            racing._found, racing.lineage = None, snapshot.lineage

        racing.exchange = exchange
        assert racing.view(snapshot) is None
        racing._found, racing.lineage = mine.copy, Lineage()
        assert racing.read(snapshot, snapshot.last, 1) is None


# -- who goes on --


# Regression: the state named a base that nobody used, into whose log the next fold wrote.
def test_a_new_base_of_which_a_killed_owner_told_nobody_is_not_used(
    directory: ReplicaDirectory, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    history, _ = start(directory.path, 9)
    with (
        mortal(directory, **options) as first,
        opened(directory, poll_interval=0.02, **options) as second,
    ):
        eventually(lambda: complete(first))
        history.commit([2])
        directory.sync(history)
        first.refresh()
        eventually(lambda: second.head.txid == 2)
        copy_of(first).beside()
        die(first)
        eventually(lambda: local(second).owned)
        for written in ([3], [4]):
            history.commit(written)
            directory.sync(history)
            eventually(lambda: second.head.txid == history.txid)
        state = read_state(local(second).directory.path)
        assert state is not None
        assert state.log == copy_of(second).state.log
        eventually(lambda: complete(second))
        right(second, history)
    with opened(directory, **options) as third:
        right(third, history)


# Regression: the copy was ahead of the one who took it over, and was thrown away for it.
def test_what_a_killed_owner_had_and_we_had_not_is_kept(
    directory: ReplicaDirectory, options: dict[str, object], nothing_kept: None
) -> None:
    history, _ = start(directory.path, 40)
    spy = SpyStore(directory.url)
    hydrated: list[int] = []

    def note(file: StoredFile, offset: int, length: int) -> None:
        if threading.current_thread().name == "lazyreplica-hydrator":
            hydrated.append(file.name.max_txid)

    spy.before_read = note
    with mortal(directory, **options) as first, opened(spy, poll_interval=0.3, **options) as second:
        eventually(lambda: complete(first))
        for n in range(3):
            history.commit([n + 1])
            directory.sync(history)
        first.refresh()
        die(first)
        eventually(lambda: local(second).owned)
        eventually(lambda: complete(second))
        assert second.head.txid == 4
        assert not hydrated
        right(second, history)


def test_a_copy_that_is_ahead_of_the_listing_waits_for_it(
    directory: ReplicaDirectory, options: dict[str, object], nothing_kept: None
) -> None:
    """The listing that a process opens with may be older than what the one before it saw."""
    history, _ = start(directory.path, 20)
    with mortal(directory, **options) as first:
        eventually(lambda: complete(first))
        history.commit([3])
        directory.sync(history)
        first.refresh()
        die(first)
    newest = directory.place(0, 2, 2)
    hidden = newest.with_name("hidden")
    newest.rename(hidden)
    spy = SpyStore(directory.url)

    def appear() -> None:
        if hidden.exists():
            hidden.rename(newest)

    spy.after_list = appear
    with opened(spy, poll_interval=0.05, **options) as second:
        inode = copy_of(second).base.path.stat().st_ino
        eventually(lambda: complete(second))
        assert second.head.txid == 2
        right(second, history)
        assert copy_of(second).base.path.stat().st_ino == inode


# Regression: the transactions after 1 were the old branch's where the copy was ahead of a path that was put back.
def test_a_copy_that_is_ahead_of_a_path_that_was_put_back_is_not_believed(
    directory: ReplicaDirectory, options: dict[str, object]
) -> None:
    history, _ = start(directory.path, 9)
    with mortal(directory, **options) as first:
        eventually(lambda: complete(first))
        for n in range(3):
            history.commit([n + 1])
            directory.sync(history)
        first.refresh()
        die(first)
    for txid in (2, 3, 4):
        directory.remove(0, txid)
    other = History("branch")
    other.states, other.changed, other.wal = history.states[:2], history.changed[:2], history.wal[:2]
    with opened(directory, **options) as second:
        other.commit([5])
        directory.sync(other)
        second.refresh()
        right(second, other)
        eventually(lambda: complete(second))
        right(second, other)


# Regression: a transaction began with what the last one saw, though a file had been found to be damaged meanwhile.
def test_nobody_reads_on_in_a_copy_once_its_replica_is_known_to_be_damaged(directory: ReplicaDirectory) -> None:
    history, _ = start(directory.path, 9)
    history.commit([3])
    directory.sync(history)
    with opened(directory, poll_interval=600.0, **FULL) as replica:
        eventually(lambda: complete(replica))
        hold = replica.hold()
        replica.begin_again(hold, replica.head.lineage.number)
        assert hold.view is not None
        hold.active = False
        assert replica.resume(hold)
        layer = replica.head.last
        replica.layers._unverified.add(layer)
        directory.place(0, 2, 2).write_bytes(bytes(layer.file.size))
        replica.layers.verify = lambda layer: "a checksum"  # type: ignore[method-assign]
        replica._verify(layer)
        assert hold.view is None, "in the transaction that is under way neither"
        hold.active = False
        assert not replica.resume(hold)
        replica.begin_again(hold, replica.head.lineage.number)
        assert hold.view is None
        replica.drop(hold)
