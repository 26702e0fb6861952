"""The copy against a model of all versions: every view that is pinned answers the model's page or None."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from copies import append, begin, fill, new_history
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule
from replicas import PAGE_SIZE, disk_full

from lazyreplica.local.copy import LocalCopy, View
from lazyreplica.local.state import read_state

PAGES = st.sets(st.integers(1, 14), max_size=4)
SIZE = st.integers(1, 14)


@dataclass
class Pin:
    """A reader of the owner's process, or of another one, whose copy is `copy`."""

    copy: LocalCopy
    view: View
    txid: int


class CopyMachine(RuleBasedStateMachine):
    """One owner, one other process that follows, readers in both."""

    pins = Bundle("pins")

    @initialize(size=SIZE)
    def start(self, size: int) -> None:
        self._directory = tempfile.TemporaryDirectory()
        self.path = Path(self._directory.name)
        self.history = new_history(size)
        self.owner = begin(self.path, self.history)
        self.other: LocalCopy | None = None
        self.pinned: list[Pin] = []

    def teardown(self) -> None:
        self._directory.cleanup()

    # -- what the owner does --

    @rule(pages=PAGES, size=SIZE)
    def commit(self, pages: set[int], size: int) -> None:
        append(self.owner, self.history, self.history.commit(pages, size))

    @rule(first=PAGES, second=PAGES, between=SIZE, size=SIZE)
    def commit_compacted(self, first: set[int], second: set[int], between: int, size: int) -> None:
        low = self.history.commit(first, between)
        append(self.owner, self.history, low, self.history.commit(second, size))

    @rule(pages=st.sets(st.integers(1, 14)))
    def fill(self, pages: set[int]) -> None:
        fill(self.owner, self.history, sorted(pages))

    @rule()
    def sync(self) -> None:
        self.owner.base.sync()

    @rule(back=st.integers(0, 3))
    def fold_in_place(self, back: int) -> None:
        """As the owner may where no other process has the copy open."""
        self.other_goes()
        floor = min([self.owner.txid, *(pin.txid for pin in self.pinned)])
        self.owner.fold(max(floor - back, 0))
        if not self.pinned and not back:
            assert not self.owner.records
            self.owner.base.trim()
            assert self.owner.base.path.stat().st_size == len(self.history.database())

    @rule()
    def build_beside(self) -> None:
        missing = self.owner.missing()
        old, self.owner = self.owner, self.owner.beside()
        assert self.owner.missing() == missing
        old.remove()
        assert self.owner.txid == self.history.txid
        assert not self.owner.records
        assert self.owner.base.trimmed
        # Readers of the owner's process that look again find their state in the new copy, or none.
        for pin in self.pinned:
            if pin.copy is old:
                pin.copy = self.owner

    @rule()
    def crash(self) -> None:
        """Another process goes on with what the killed one left."""
        self.other_goes()
        self.pinned.clear()
        state = read_state(self.path)
        assert state is not None
        self.owner = LocalCopy(self.path, state)
        for record in self.owner.log.scan(0):
            self.owner.adopt(record)
        assert self.owner.txid == self.history.txid

    @rule(of_other=st.booleans())
    def check_whole(self, of_other: bool) -> None:
        copy = self.other if of_other and self.other else self.owner
        assert copy.check_whole() == all(pgno == copy.lock_pgno for pgno in copy.base.absent())
        newest = copy.view(copy.txid)
        assert newest is not None
        assert (newest.whole is not None) == (copy.check_whole() and not newest.changed)

    # -- what the other process does --

    @precondition(lambda self: self.other is None)
    @rule()
    def other_comes(self) -> None:
        state = read_state(self.path)
        assert state is not None
        self.other = LocalCopy(self.path, state)

    @rule()
    def other_follows(self) -> None:
        if self.other is not None:
            if self.other.state.log != self.owner.state.log:
                state = read_state(self.path)
                assert state is not None
                self.other = LocalCopy(self.path, state)
            for record in self.other.log.scan(self.other.log.end, self.owner.log.end):
                self.other.adopt(record)
            assert self.other.txid == self.owner.txid
            assert list(self.other.missing()) == list(self.owner.missing())

    @rule()
    def other_goes(self) -> None:
        self.pinned = [pin for pin in self.pinned if pin.copy is self.owner]
        self.other = None

    # -- readers --

    @rule(target=pins, of_other=st.booleans())
    def pin(self, of_other: bool) -> Pin:
        copy = self.other if of_other and self.other else self.owner
        view = copy.view(copy.txid)
        assert view is not None
        pin = Pin(copy, view, copy.txid)
        self.pinned.append(pin)
        return pin

    @rule(pin=pins)
    def look_again(self, pin: Pin) -> None:
        if pin in self.pinned:
            pin.view = pin.copy.view(pin.txid) or pin.view

    @rule(pin=consumes(pins))
    def unpin(self, pin: Pin) -> None:
        if pin in self.pinned:
            self.pinned.remove(pin)

    # -- what must hold --

    @invariant()
    def no_view_answers_another_page(self) -> None:
        for pin in self.pinned:
            state = self.history.states[pin.txid]
            for pgno, page in state.items():
                found = pin.view.page(pgno)
                assert found in (None, page), (pin.txid, pgno)
                if pin.view.whole:
                    assert pin.view.whole[(pgno - 1) * PAGE_SIZE : pgno * PAGE_SIZE] == page

    @invariant()
    def what_is_not_missing_is_here(self) -> None:
        newest = self.owner.view(self.owner.txid)
        assert newest is not None
        state = self.history.states[-1]
        here = {pgno for pgno, page in state.items() if newest.page(pgno) == page}
        assert set(self.owner.missing()) == set(state) - here
        assert all(self.owner.has(pgno) == (pgno in here) for pgno in state)
        assert self.owner.view(self.history.txid + 1) is None


@pytest.mark.slow
class TestCopy(CopyMachine.TestCase):
    settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


def test_a_fold_that_a_full_disk_ends_leaves_what_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever write fails: readers go on, and the next process finds the newest state."""
    for fail_at in range(30):
        path = tmp_path / str(fail_at)
        path.mkdir()
        history = new_history(20)
        copy = begin(path, history)
        fill(copy, history)
        for written, size in (([2, 3], 20), ([3, 9], 24), ([1], 18), ([20], 22)):
            append(copy, history, history.commit(written, size))
        view = copy.view(copy.txid)
        assert view is not None
        with monkeypatch.context() as patch:
            failed = _fail_one(patch, fail_at)
            try:
                copy.fold(4)
            except OSError:
                assert failed
            else:
                assert not failed
        assert [view.page(p) for p in history.states[-1]] == list(history.states[-1].values())
        state = read_state(path)
        assert state is not None
        again = LocalCopy(path, state)
        for record in again.log.scan(0):
            again.adopt(record)
        newest = again.view(history.txid)
        assert newest is not None
        assert all(newest.page(p) in (None, page) for p, page in history.states[-1].items())
        assert not again.missing()
        recovered = LocalCopy(path, state)
        recovered.recover()
        assert recovered.view(1) is None or recovered.txid == 1, "an older state may be of two"
        assert not recovered.missing()
        for txid in range(1, history.txid + 1):
            older = again.view(txid)  # of a process that joins the one that has recovered it
            if older is not None:
                assert all(older.page(p) in (None, page) for p, page in history.states[txid].items())
        if not failed:
            break
    else:
        raise AssertionError("a fold has more writes than that")


def _fail_one(patch: pytest.MonkeyPatch, fail_at: int) -> list[str]:
    """The n-th call that changes a disk fails; names it in the list that is returned."""
    calls: list[str] = []
    failed: list[str] = []

    def wrap(name: str) -> None:
        real = getattr(os, name)

        def call(*args: object) -> object:
            calls.append(name)
            if len(calls) == fail_at + 1:
                failed.append(name)
                disk_full()
            return real(*args)

        patch.setattr(os, name, call)

    for name in ("pwrite", "ftruncate", "fsync", "fdatasync", "rename"):
        wrap(name)
    return failed
