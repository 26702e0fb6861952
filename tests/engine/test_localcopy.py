"""The local copy: whatever is written when, a pinned snapshot reads its own bytes or nothing."""

from __future__ import annotations

import random
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from replicas import PAGE_SIZE, Pages, make_layer, make_snapshot, page_bytes

from lazyreplica import localcopy
from lazyreplica.errors import LTXError
from lazyreplica.head import Head
from lazyreplica.localcopy import LocalCopy
from lazyreplica.pagemap import Layer
from lazyreplica.snapshot import Snapshot

MOST = 10
pgnos = st.integers(1, MOST)


class World:
    """A head, its local copy, and the truth of every snapshot."""

    def __init__(self, directory: Path, size: int) -> None:
        layer = make_layer(range(1, size + 1), size, 1)
        self.copy = LocalCopy(directory, PAGE_SIZE)
        self.head = Head(make_snapshot([layer]))
        self.truth: dict[Snapshot, Pages] = {self.head.current: self._pages(layer)}

    @staticmethod
    def _pages(layer: Layer) -> Pages:
        return {p: page_bytes(p, layer.max_txid) for p in layer.index.pgnos}

    def successor(self, written: set[int], size: int) -> tuple[Snapshot, Pages]:
        """The state after one more transaction, and the pages of that. Not the head yet."""
        before = self.head.current
        grown = set(range(before.commit + 1, size + 1))
        layer = make_layer({p for p in written if p <= size} | grown, size, before.txid + 1)
        pages = self._pages(layer)
        after = before.with_layer(layer)
        self.truth[after] = {p: page for p, page in {**self.truth[before], **pages}.items() if p <= size}
        return after, pages

    def hydrate(self, snapshot: Snapshot, wanted: list[int]) -> None:
        """Write pages the way the hydrator does: those that a layer of `snapshot` owns, layer by layer."""
        for layer in snapshot.pages.layers():
            mine = [p for p in wanted if p <= snapshot.commit and snapshot.owner(p) is layer]
            self.copy.write(layer, [(p, self.truth[snapshot][p]) for p in mine])

    def check(self, snapshot: Snapshot) -> int:
        found = 0
        for pgno, expected in self.truth[snapshot].items():
            page = self.copy.read(pgno, snapshot.owner(pgno).number)
            assert page in (None, expected), f"page {pgno} at TXID {snapshot.txid}"
            assert self.copy.has(pgno, snapshot.owner(pgno).number) == (page is not None)
            found += page is not None
        return found

    def expect_complete(self) -> None:
        head = self.head.current
        self.hydrate(head, list(range(1, head.commit + 1)))
        self.copy.fold(self.head.floor())
        truth = self.truth[head]
        assert self.copy.path.read_bytes() == b"".join(truth[p] for p in sorted(truth))
        assert not self.copy.pending
        assert self.copy.present == head.commit


class LocalCopyMachine(RuleBasedStateMachine):
    @initialize(size=pgnos)
    def begin(self, size: int) -> None:
        self.directory = Path(tempfile.mkdtemp())
        self.world = World(self.directory, size)
        self.pins: list[Snapshot] = []

    @rule(written=st.sets(pgnos, max_size=4), size=pgnos, local=st.booleans())
    def advance(self, written: set[int], size: int, local: bool) -> None:
        after, pages = self.world.successor(written, size)
        if local:
            assert self.world.copy.write(after.last, pages.items())
        self.world.head.advance(after)

    @rule(again=st.none() | st.integers(0))
    def pin(self, again: int | None) -> None:
        held = self.pins[again % len(self.pins)] if again is not None and self.pins else None
        self.pins.append(self.world.head.pin(held))

    @rule(which=st.integers(0))
    def unpin(self, which: int) -> None:
        if self.pins:
            self.world.head.unpin(self.pins.pop(which % len(self.pins)))

    @rule()
    def fold(self) -> None:
        self.world.copy.fold(self.world.head.floor())

    @rule(wanted=st.lists(pgnos, unique=True), behind=st.integers(0, 5))
    def hydrate(self, wanted: list[int], behind: int) -> None:
        """Of the head, or of what was the head when the hydrator looked: late, and in any order."""
        snapshots = list(self.world.truth)
        self.world.hydrate(snapshots[max(0, len(snapshots) - 1 - behind)], wanted)

    @rule(which=st.integers(0))
    def revoke(self, which: int) -> None:
        layers = list(self.world.head.current.pages.layers())
        self.world.copy.revoke(layers[which % len(layers)])

    @invariant()
    def nobody_reads_wrong_bytes(self) -> None:
        if hasattr(self, "world"):
            for snapshot in {*self.pins, self.world.head.current}:
                self.world.check(snapshot)
            slots = self.world.copy._slots
            assert self.world.copy.present == sum(version != 0 for version in slots)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            for snapshot in self.pins:
                self.world.head.unpin(snapshot)
            self.world.expect_complete()
            shutil.rmtree(self.directory)


TestLocalCopy = LocalCopyMachine.TestCase
TestLocalCopy.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "copy").mkdir()
    return tmp_path / "copy"


def test_readers_without_a_lock_never_see_another_version(place: Path) -> None:
    """Two readers against a writer, a folder and a late hydrator, for two seconds."""
    world = World(place, 30)
    deadline = time.monotonic() + 2
    failures: list[BaseException] = []
    checked = [0, 0]

    def work(step: object, number: int) -> None:
        rng = random.Random(number)
        try:
            while time.monotonic() < deadline and not failures:
                step(rng)  # type: ignore[operator]
        except BaseException as exc:  # noqa: BLE001 (raised again by the test)
            failures.append(exc)

    def write(rng: random.Random) -> None:
        after, pages = world.successor(set(rng.sample(range(1, 31), 5)), rng.choice([10, 20, 30, 30, 30]))
        world.copy.write(after.last, pages.items())
        world.head.advance(after)
        world.copy.fold(world.head.floor())
        for old in list(world.truth)[:-200]:
            del world.truth[old]

    def hydrate(rng: random.Random) -> None:
        snapshot = world.head.current
        time.sleep(0.001)
        try:
            world.hydrate(snapshot, rng.sample(range(1, 31), 10))
        except KeyError:
            return  # so late that the truth was forgotten
        world.copy.fold(world.head.floor())

    def read(rng: random.Random) -> None:
        snapshot = world.head.pin()
        truth = world.truth[snapshot]
        for pgno in rng.sample(sorted(truth), len(truth)):
            page = world.copy.read(pgno, snapshot.owner(pgno).number)
            assert page in (None, truth[pgno]), f"page {pgno} at TXID {snapshot.txid}"
            checked[page is not None] += 1
        world.head.unpin(snapshot)

    steps = [write, hydrate, read, read]
    threads = [threading.Thread(target=work, args=(step, n)) for n, step in enumerate(steps)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    assert checked[True] > 1000, "most pages were there"
    world.expect_complete()


def test_a_version_newer_than_the_slots_waits_in_the_log_until_the_old_one_is_unpinned(place: Path) -> None:
    world = World(place, 4)
    world.hydrate(world.head.current, [1, 2, 3, 4])
    old = world.head.pin()
    after, pages = world.successor({2}, 4)
    world.copy.write(after.last, pages.items())
    world.head.advance(after)
    world.copy.fold(world.head.floor())
    assert world.copy.pending
    assert world.check(old) == world.check(after) == 4
    world.head.unpin(old)
    world.copy.fold(world.head.floor())
    assert not world.copy.pending
    assert world.check(after) == 4


def test_a_full_log_leaves_newer_pages_out_until_it_is_folded(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(localcopy, "LOG_LIMIT", 2 * PAGE_SIZE)
    world = World(place, 2)
    world.hydrate(world.head.current, [1, 2])
    old = world.head.pin()
    whole = []
    for _ in range(3):
        after, pages = world.successor({1, 2}, 2)
        whole.append(world.copy.write(after.last, pages.items()))
        world.head.advance(after)
        world.copy.fold(world.head.floor())
    assert whole == [True, False, False]
    assert world.check(old) == 2
    world.check(world.head.current)
    world.head.unpin(old)
    world.copy.fold(world.head.floor())
    world.expect_complete()


def test_a_database_that_shrinks_cuts_the_file_once_nobody_reads_beyond(place: Path) -> None:
    world = World(place, 6)
    world.hydrate(world.head.current, [1, 2, 3, 4, 5, 6])
    old = world.head.pin()
    after, pages = world.successor({1}, 2)
    world.copy.write(after.last, pages.items())
    world.head.advance(after)
    world.copy.fold(world.head.floor())
    assert world.check(old) == 6
    world.head.unpin(old)
    world.copy.fold(world.head.floor())
    assert world.copy.path.stat().st_size == 2 * PAGE_SIZE
    world.expect_complete()


def test_a_failed_write_leaves_its_slots_usable(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(place, 4)
    monkeypatch.setattr(localcopy, "_pwrite_all", _raise_disk_full)
    with pytest.raises(OSError, match="full"):
        world.hydrate(world.head.current, [1, 2, 3, 4])
    assert world.check(world.head.current) == 0
    monkeypatch.undo()
    world.expect_complete()


def _raise_disk_full(*args: object) -> None:
    raise OSError(28, "disk is full")


# Regression (localcopy.py, `write`): pages claimed before the iterable raised stay `_WRITING` for ever. They then
# live in the log, `fold` never puts them into the file, and the database that is published has holes.
def test_an_iterable_that_fails_half_way_leaves_its_slots_usable(place: Path) -> None:
    world = World(place, 4)
    head = world.head.current

    def damaged() -> Iterator[tuple[int, bytes]]:
        yield 1, world.truth[head][1]
        yield 2, world.truth[head][2]
        raise LTXError("page 3 is damaged")

    with pytest.raises(LTXError):
        world.copy.write(head.last, damaged())
    world.expect_complete()


# Regression (localcopy.py, `_overwrite`): a slot whose layer ends at the same TXID as the one that the log holds is
# never overwritten, so that version stays in the log for ever, and the log, which starts anew only when it is empty,
# fills.
def test_a_version_from_a_compacted_file_with_the_same_end_leaves_the_log(place: Path) -> None:
    world = World(place, 4)
    after, _ = world.successor({2, 3}, 4)
    world.head.advance(after)
    world.hydrate(after, [1, 2, 3, 4])
    # Planned anew: transaction 2 is in a level-1 file now. Same bytes, another layer, one more transaction after it.
    base = next(layer for layer in after.pages.layers() if layer.max_txid == 1)
    last = make_layer({4}, 4, 3)
    compacted = make_layer({2, 3}, 4, 2, level=1)
    replanned = make_snapshot([base, compacted, last], after.lineage.next_epoch())
    world.truth[replanned] = {**world.truth[after], 4: page_bytes(4, 3)}
    world.head.replace(replanned)
    world.expect_complete()
