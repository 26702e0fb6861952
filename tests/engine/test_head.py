"""`Head` against a model that remembers everything."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from replicas import make_layer, make_snapshot

from lazyreplica.head import Head
from lazyreplica.snapshot import Lineage, Snapshot

pgnos = st.integers(1, 5)


class HeadMachine(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.head = Head(make_snapshot([make_layer(range(1, 6), 5, 1)]))
        self.pins: list[Snapshot] = []
        self.past: list[Snapshot] = [self.head.current]
        """All snapshots of the current lineage and epoch."""

    @rule(pages=st.sets(pgnos, max_size=4), span=st.integers(1, 3))
    def advance(self, pages: set[int], span: int) -> None:
        txid = self.head.current.txid
        after = self.head.current.with_layer(make_layer(pages, 5, txid + 1, txid + span))
        self.head.advance(after)
        self.past.append(after)

    @rule(same_path=st.booleans())
    def replace(self, same_path: bool) -> None:
        current = self.head.current
        lineage = current.lineage.next_epoch() if same_path else Lineage()
        txid = current.txid + 1 if same_path else 1
        self.head.replace(make_snapshot([make_layer(range(1, 6), 5, 1, txid)], lineage))
        self.past = [self.head.current]

    @rule(again=st.none() | st.integers(0))
    def pin(self, again: int | None) -> None:
        held = self.pins[again % len(self.pins)] if again is not None and self.pins else None
        snapshot = self.head.pin(held)
        assert snapshot is (held or self.head.current)
        self.pins.append(snapshot)

    @precondition(lambda self: self.pins)
    @rule(which=st.integers(0))
    def unpin(self, which: int) -> None:
        self.head.unpin(self.pins.pop(which % len(self.pins)))

    @invariant()
    def the_floor_is_the_oldest_that_may_be_read(self) -> None:
        if hasattr(self, "head"):
            number = self.head.current.lineage.number
            readable = [self.head.current, *(s for s in self.pins if s.lineage.number == number)]
            assert self.head.floor() in readable
            assert self.head.floor().txid == min(s.txid for s in readable)

    @invariant()
    def changes_since_a_pinned_snapshot_are_known(self) -> None:
        for snapshot in getattr(self, "pins", ()):
            for pgno in range(1, 6):
                for later in self.past:
                    if later.txid > snapshot.txid:
                        known = self.head.changed_since(snapshot, pgno, later.txid)
                        if snapshot not in self.past:
                            assert known, "another lineage or epoch: never called unchanged"
                        else:
                            assert known == (later.owner(pgno) is not snapshot.owner(pgno))
                assert self.head.changed_since(snapshot, pgno, self.head.current.txid + 1), "beyond the head"


TestHead = HeadMachine.TestCase
TestHead.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def head_at(txid: int) -> Head:
    return Head(make_snapshot([make_layer(range(1, 6), 5, 1, txid)]))


def test_a_state_inside_a_layer_counts_as_changed_by_all_of_it() -> None:
    head = head_at(1)
    pinned = head.pin()
    head.advance(head.current.with_layer(make_layer([3], 5, 2, 9)))
    assert head.changed_since(pinned, 3, 5)
    assert not head.changed_since(pinned, 4, 5)


def test_nothing_is_remembered_of_what_nobody_can_ask_for() -> None:
    head = head_at(1)
    pinned = head.pin()
    for txid in range(2, 50):
        head.advance(head.current.with_layer(make_layer([1], 5, txid)))
    assert len(head._history) == 48
    head.unpin(pinned)
    assert not head._history
    assert not head._pins


def test_an_unpin_too_many_is_an_error() -> None:
    head = head_at(1)
    snapshot = head.pin()
    head.unpin(snapshot)
    with pytest.raises(KeyError):
        head.unpin(snapshot)


def test_wait_beyond_returns_as_soon_as_the_head_moves() -> None:
    head = head_at(1)
    threading.Timer(0.05, lambda: head.advance(head.current.with_layer(make_layer([1], 5, 2)))).start()
    started = time.monotonic()
    head.wait_beyond(1, 5)
    assert head.current.txid == 2
    assert time.monotonic() - started < 2


def test_wait_beyond_gives_up_in_time() -> None:
    started = time.monotonic()
    head_at(1).wait_beyond(1, 0.05)
    assert 0.04 < time.monotonic() - started < 2
