"""`Extents` against a model that remembers everything, and from many threads."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lazyreplica.extents import EXTENT, FILE, Extent, Extents, State
from lazyreplica.prefetch import Token

TOTAL = 1_000_000
GRANULE = 256 << 10
T = TypeVar("T")

numbers = st.integers(1, 3)
readers = st.sampled_from([Token() for _ in range(3)])
starts = st.one_of(
    st.integers(0, 1_200_000), st.builds(lambda n, off: n * GRANULE + off, st.integers(1, 4), st.integers(-3, 3))
)
sizes = st.one_of(st.integers(1, 1000), st.integers(1, 400_000))


def content(number: int, start: int, size: int) -> bytes:
    return ((number + start) % 256).to_bytes(1) * size


def taken(extents: Iterable[Extent]) -> int:
    """Bytes of memory."""
    return sum(len(extent) + EXTENT for extent in extents)


class Machine(RuleBasedStateMachine):
    """Of stretches the model is two lists, in the order in which they go; of whole files one, as well."""

    def __init__(self) -> None:
        super().__init__()
        self.extents = Extents(TOTAL, TOTAL)
        self.used: list[Extent] = []
        self.owned: list[Extent] = []
        """Sent for by a reader, and not used up yet."""
        self.owners: dict[Extent, Token] = {}
        self.current: dict[Token, Extent] = {}
        self.gone: list[Extent] = []
        self.whole: list[tuple[int, bytes]] = []

    @property
    def live(self) -> list[Extent]:
        return self.used + self.owned

    def some(self, which: int, *states: State) -> Extent | None:
        found = [extent for extent in self.live if extent.state in states]
        return found[which % len(found)] if found else None

    def remove(self, extent: Extent) -> None:
        (self.owned if extent in self.owned else self.used).remove(extent)
        self.gone.append(extent)
        self.current = {reader: each for reader, each in self.current.items() if each is not extent}

    def forget(self, extent: Extent, was: State) -> None:
        self.remove(extent)
        assert extent.state is (State.HERE if was is State.HERE else State.FAILED)

    def make_room(self, newest: Extent) -> None:
        """What was used goes first; what is under way stays, and so does what has just come."""
        for extent in list(self.live):
            if taken(self.live) <= TOTAL:
                return
            if extent.state is State.HERE and extent is not newest:
                self.remove(extent)

    @rule(
        number=numbers,
        start=starts,
        size=sizes,
        before=st.integers(0, 500),
        after=st.integers(0, 500),
        owner=st.one_of(st.none(), readers),
    )
    def begin(self, number: int, start: int, size: int, before: int, after: int, owner: Token | None) -> None:
        inner, outer = (start, start + size), (max(0, start - before), start + size + after)
        extent, new = self.extents.begin(number, *outer, State.WAITING, inner, owner)
        covering = [e for e in self.live if e.number == number and e.start <= inner[0] and inner[1] <= e.end]
        assert new == (not covering)
        if new:
            assert (extent.number, extent.start, extent.end, extent.state) == (number, *outer, State.WAITING)
            assert not extent.arrived.is_set()
            if owner is None:
                self.used.append(extent)
            else:
                self.owned.append(extent)
                self.owners[extent] = owner
            self.make_room(extent)
        else:
            assert extent in covering

    @rule(which=st.integers(0), reader=readers)
    def use(self, which: int, reader: Token) -> None:
        """Who goes on to another extent is done with the last one. One that is gone may still be read."""
        extents = [extent for extent in self.live + self.gone if extent.state is State.HERE]
        if not extents:
            return
        extent = extents[which % len(extents)]
        self.extents.use(extent, reader)
        before = self.current.pop(reader, None)
        if before in self.owned and before is not extent:
            self.owned.remove(before)
            self.used.append(before)
        if extent in self.live:
            self.current[reader] = extent
        if extent in self.used and before is not extent:
            self.used.remove(extent)
            self.used.append(extent)

    @rule(which=st.integers(0))
    def claim(self, which: int) -> None:
        extent = self.some(which, *State)
        if extent is not None:
            waiting = extent.state is State.WAITING
            assert self.extents.claim(extent) == waiting
            assert not self.extents.claim(extent), "only once"

    @rule(which=st.integers(0))
    def finish(self, which: int) -> None:
        extent = self.some(which, State.FLYING)
        if extent is not None:
            data = content(extent.number, extent.start, len(extent))
            self.extents.finish(extent, data)
            assert (extent.state, extent.data) == (State.HERE, data)
            assert extent.arrived.is_set()
            self.make_room(extent)

    @rule(which=st.integers(0))
    def fail(self, which: int) -> None:
        extent = self.some(which, State.WAITING, State.FLYING)
        if extent is not None:
            self.extents.fail(extent)
            assert extent.arrived.is_set()
            assert not extent.data
            self.forget(extent, State.FLYING)

    @rule(which=st.integers(0), finish=st.booleans())
    def end_what_was_forgotten_meanwhile(self, which: int, finish: bool) -> None:
        if self.gone:
            extent = self.gone[which % len(self.gone)]
            state = extent.state
            if finish:
                self.extents.finish(extent, bytes(len(extent)))
            else:
                self.extents.fail(extent)
            self.extents.discard(extent)
            assert not self.extents.claim(extent)
            assert extent.state is state
            assert extent.arrived.is_set()

    @rule(which=st.integers(0))
    def discard(self, which: int) -> None:
        extent = self.some(which, State.HERE)
        if extent is not None:
            data = extent.data
            self.extents.discard(extent)
            self.forget(extent, State.HERE)
            assert extent.data is data, "who has found it goes on reading"

    @rule(number=numbers, start=starts, size=st.one_of(sizes, st.sampled_from([0, TOTAL - EXTENT, TOTAL - EXTENT + 1])))
    def add(self, number: int, start: int, size: int) -> None:
        before = set(self.extents._used)
        self.extents.add(number, start, content(number, start, size))
        new = set(self.extents._used) - before
        assert len(new) == (1 if 0 < size <= TOTAL - EXTENT else 0)
        for extent in new:
            assert (extent.state, len(extent), len(extent.data)) == (State.HERE, size, size)
            self.used.append(extent)
            self.make_room(extent)

    @rule(number=numbers)
    def drop(self, number: int) -> None:
        self.extents.drop(number)
        for extent in [extent for extent in self.live if extent.number == number]:
            self.remove(extent)
            assert extent.arrived.is_set() or extent.state is State.HERE
            assert extent.state in (State.HERE, State.FAILED)
        self.whole = [(n, data) for n, data in self.whole if n != number]

    @rule(number=st.integers(1, 8), size=st.one_of(sizes, st.sampled_from([TOTAL - FILE, TOTAL - FILE + 1])))
    def keep_whole(self, number: int, size: int) -> None:
        data = content(number, 0, size)
        self.extents.keep_whole(number, data)
        if size <= TOTAL - FILE and number not in dict(self.whole):
            self.whole.append((number, data))
            while sum(len(each) + FILE for _, each in self.whole) > TOTAL:
                self.whole.pop(0)

    @rule(number=st.integers(1, 8))
    def look_up_whole(self, number: int) -> None:
        found = self.extents.whole(number)
        assert found == dict(self.whole).get(number)
        self.whole.sort(key=lambda each: each[0] == number)  # used: last in line

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0), skip=st.integers(0, 300), cut=st.integers(0, 300))
    def find(self, which: int, skip: int, cut: int) -> None:
        extent = self.live[which % len(self.live)]
        start, end = extent.start + skip, extent.end - cut
        if start < end:
            found = self.extents.find(extent.number, start, end)
            assert found in self.live
            assert found.number == extent.number
            assert found.start <= start < end <= found.end
        assert self.extents.find(9, extent.start, extent.end) is None

    @invariant()
    def the_books_are_right(self) -> None:
        extents = self.extents
        assert list(extents._used) == self.used
        assert list(extents._owned) == self.owned
        assert extents._current == self.current
        assert extents._passing_size == taken(self.live)
        flying = [extent for extent in self.used if extent.state in (State.WAITING, State.FLYING)]
        assert extents._flying_size == taken(flying)
        owners = {self.owners[extent] for extent in self.owned}
        assert extents._ahead == {n: taken(e for e in self.owned if self.owners[e] == n) for n in owners}
        placed = {(key, extent) for key, each in extents._places.items() for extent in each}
        assert all(extents._places.values()), "no empty lists stay behind"
        assert placed == {
            ((extent.number, n), extent)
            for extent in self.live
            for n in range(extent.start // GRANULE, (extent.end - 1) // GRANULE + 1)
        }
        assert extents._whole_size == sum(len(data) + FILE for _, data in self.whole) <= TOTAL
        assert dict(extents._whole) == dict(self.whole)

    @invariant()
    def memory_is_bounded(self) -> None:
        assert taken(extent for extent in self.live if extent.state is State.HERE) <= TOTAL


TestExtents = Machine.TestCase
TestExtents.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def test_a_stretch_is_found_from_any_piece_of_it() -> None:
    extents = Extents(0, 10 * GRANULE)
    extent, _ = extents.begin(1, 100, 3 * GRANULE + 100, State.WAITING, (100, 200))
    for start in range(100, 3 * GRANULE + 100, 10_007):
        assert extents.find(1, start, start + 50) is extent or start + 50 > extent.end
    assert extents.find(1, 99, 150) is None
    assert extents.find(1, 3 * GRANULE, 3 * GRANULE + 101) is None
    assert extents.find(2, 100, 200) is None


def test_what_was_used_goes_before_what_was_read_ahead() -> None:
    extents = Extents(0, 1000 + 4 * EXTENT)
    for start in range(0, 1000, 250):
        extents.add(1, start, bytes(250))
    extents.add(1, 5000, bytes(100))
    assert [bool(extents.find(1, start, start + 10)) for start in (0, 250, 500, 750, 5000)] == [False] + [True] * 4


def arrive(extents: Extents, start: int, size: int, owner: Token) -> Extent:
    extent, new = extents.begin(1, start, start + size, State.WAITING, (start, start + size), owner)
    assert new
    assert extents.claim(extent)
    extents.finish(extent, bytes(size))
    return extent


def test_those_who_read_ahead_have_equal_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lazyreplica.extents._STALE", 1e9)
    extents = Extents(0, TOTAL)
    most = TOTAL * 4 // 5
    a, b = Token(), Token()
    assert extents.room(a) == most
    mine = [arrive(extents, start, 100_000 - EXTENT, a) for start in range(0, 800_000, 100_000)]
    assert extents.room(a) == 0
    assert extents.room(b) == 0, "nothing of what is about to be read is pushed out"
    for extent in mine[:6]:
        extents.use(extent, a)
    assert extents.room(a) == 500_000, "what is read at the moment counts as not used yet"
    assert extents.share(b) == extents.room(b) == most // 2
    others = [arrive(extents, start, 100_000 - EXTENT, b) for start in range(1_000_000, 1_400_000, 100_000)]
    assert extents.room(b) == 0
    assert extents.room(a) == most // 2 - 300_000
    assert all(extents.find(1, extent.start, extent.end) for extent in mine[5:] + others)


def test_who_has_ended_or_stands_still_has_no_share(monkeypatch: pytest.MonkeyPatch) -> None:
    extents = Extents(0, TOTAL)
    most = TOTAL * 4 // 5
    a, b = Token(), Token()
    rest = arrive(extents, 0, 100_000 - EXTENT, a)
    assert extents.share(b) == most // 2
    a.reading = False
    assert extents.share(b) == most
    assert extents.room(b) == most - 100_000, "what it has it keeps"
    arrive(extents, 200_000, 100_000 - EXTENT, a)
    assert extents.share(b) == most // 2, "it reads again"
    monkeypatch.setattr("lazyreplica.extents._QUIET", 0.0)
    assert extents.share(b) == most
    monkeypatch.undo()
    extents.use(rest, a)
    assert extents.share(b) == most // 2, "it gets on"


def test_who_has_gone_in_the_middle_of_an_extent_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lazyreplica.extents._STALE", 0.0)
    extents = Extents(0, TOTAL)
    for number in range(4):
        reader = Token()
        extent = arrive(extents, number * 200_000, 100_000 - EXTENT, reader)
        extents.use(extent, reader)
        assert extents.room(reader) == TOTAL * 4 // 5 - 100_000, "it is in the middle of it"
        reader.reading = False  # the connection was closed
    assert extents.room(Token()) == TOTAL * 4 // 5
    assert not extents._current and not extents._ahead and not extents._lately


def test_what_nobody_came_for_takes_no_room_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    extents = Extents(0, TOTAL)
    a, b = Token(), Token()
    for start in range(0, 800_000, 100_000):
        arrive(extents, start, 100_000 - EXTENT, a)
    assert extents.room(b) == 0
    monkeypatch.setattr("lazyreplica.extents._STALE", 0.0)
    assert extents.room(b) == TOTAL * 4 // 5
    assert extents.find(1, 0, 50), "as long as there is room"


def test_with_no_room_at_all_a_demand_read_still_gets_its_bytes() -> None:
    extents = Extents(0, 0)
    assert extents.room(Token()) <= 0
    extent, new = extents.begin(1, 0, 500, State.WAITING, (0, 500))
    assert new
    assert extents.claim(extent)
    extents.finish(extent, bytes(500))
    assert (extent.state, len(extent.data)) == (State.HERE, 500)
    extents.add(1, 700, b"x")
    assert extents.find(1, 700, 701) is None
    other, _ = extents.begin(1, 900, 950, State.WAITING, (900, 950))
    extents.claim(other)
    extents.finish(other, bytes(50))
    assert extents._passing_size == 50 + EXTENT, "only the newest stays"


# -- threads --


def at_once(count: int, work: Callable[[int], T]) -> list[T]:
    barrier = threading.Barrier(count)

    def run(number: int) -> T:
        barrier.wait(5)
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return [each.result() for each in [pool.submit(run, number) for number in range(count)]]


def test_of_many_claimers_one_wins() -> None:
    extents = Extents(0, TOTAL)

    def claim(extent: Extent, number: int) -> bool:
        return extents.claim(extent)

    for start in range(0, 50_000, 1000):
        extent, _ = extents.begin(1, start, start + 1000, State.WAITING, (start, start + 10))
        assert sorted(at_once(6, partial(claim, extent))) == [False] * 5 + [True]


def test_of_many_who_begin_one_does() -> None:
    extents = Extents(0, TOTAL)

    def begin(start: int, number: int) -> tuple[Extent, bool]:
        return extents.begin(1, start, start + 500 + number, State.WAITING, (start + 5, start + 10))

    for start in range(0, 50_000, 1000):
        found = at_once(6, partial(begin, start))
        assert sum(is_new for _, is_new in found) == 1
        assert len({each for each, _ in found}) == 1


def test_who_waits_is_woken_by_the_bytes_and_by_a_failure() -> None:
    extents = Extents(0, TOTAL)
    ends: list[Callable[[Extent], None]] = [
        lambda extent: extents.finish(extent, bytes(len(extent))),
        extents.fail,
        lambda extent: extents.drop(extent.number),
    ]
    for number, end in enumerate(ends):
        extent, _ = extents.begin(number, 0, 100, State.WAITING, (0, 100))
        extents.claim(extent)
        with ThreadPoolExecutor(3) as pool:
            waiting = [pool.submit(extent.arrived.wait, 5) for _ in range(3)]
            end(extent)
            assert all(each.result() for each in waiting)
        assert len(extent.data) == (100 if number == 0 else 0)


@pytest.mark.parametrize("seed", [1, 2])
def test_any_mixture_from_many_threads_leaves_the_books_right(seed: int) -> None:
    extents = Extents(50_000, 100_000)
    bad: list[Extent] = []

    def work(number: int) -> None:
        rng, token = random.Random(f"{seed} {number}"), Token()
        for _ in range(400):
            layer, start = rng.randrange(1, 4), rng.randrange(0, 600_000)
            end = start + rng.randrange(1, 20_000)
            owner = rng.choice([None, token, token])
            extent, _ = extents.begin(layer, start, end, State.WAITING, (start, start + 1), owner)
            if extents.claim(extent):
                if rng.random() < 0.2:
                    extents.fail(extent)
                else:
                    extents.finish(extent, layer.to_bytes(1) * len(extent))
            if extent.state is State.HERE and extent.data != layer.to_bytes(1) * len(extent):
                bad.append(extent)
            if extent.state is State.HERE:
                extents.use(extent, token)
            match rng.randrange(12):
                case 0:
                    extents.drop(layer)
                case 1:
                    extents.discard(extent)
                case 2:
                    extents.add(layer, start, layer.to_bytes(1) * 500)
                case 3:
                    extents.keep_whole(layer, layer.to_bytes(1) * 30_000)
                case 4:
                    whole = extents.whole(layer)
                    assert whole is None or whole == layer.to_bytes(1) * 30_000
                case _:
                    extents.find(layer, start, start + 5)

    at_once(5, work)
    assert not bad
    assert extents._flying_size == 0
    left = [*extents._used, *extents._owned]
    assert sum(extents._ahead.values()) == taken(extents._owned)
    assert extents._passing_size == taken(left) <= 100_000
    assert {extent for each in extents._places.values() for extent in each} == set(left)
    assert extents._whole_size == sum(len(data) + FILE for data in extents._whole.values()) <= 50_000
