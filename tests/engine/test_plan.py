"""`plan` and `extend` against the rules of ``litestream restore``, written down once more in the plainest way."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyreplica.errors import EmptyReplica, ReplicaGap
from lazyreplica.ltx.name import FileName
from lazyreplica.plan import extend, plan
from lazyreplica.storage import StoredFile


def stored(level: int, low: int, high: int, modified: float = 0.0) -> StoredFile:
    return StoredFile(level, FileName(low, high), 100, f"{level}-{low}-{high}-{modified}", modified)


def restore(files: list[StoredFile], txid: int | None) -> list[StoredFile] | type[Exception]:
    """One step after another, looking at all files each time."""
    usable = [f for f in files if txid is None or f.name.max_txid <= txid]
    if not usable:
        return EmptyReplica
    chain: list[StoredFile] = []
    current = 0
    for f in usable:
        if f.level == 9 and f.name.max_txid > current:
            current, chain = f.name.max_txid, [f]
    while True:
        best = None
        for f in usable:
            if f.level == 9 or f.name.min_txid > current + 1 or f.name.max_txid <= current:
                continue
            if best is None or preferred(f, best):
                best = f
        if best is None:
            break
        chain.append(best)
        current = best.name.max_txid
    if not chain:
        return ReplicaGap
    if txid is None and any(f.name.min_txid > current + 1 for f in usable):
        return ReplicaGap
    return chain


def preferred(f: StoredFile, than: StoredFile) -> bool:
    if f.name.max_txid != than.name.max_txid:
        return f.name.max_txid > than.name.max_txid
    if f.name.min_txid != than.name.min_txid:
        return f.name.min_txid < than.name.min_txid
    if f.level != than.level:
        return f.level > than.level
    return f.modified < than.modified


@st.composite
def listings(draw: st.DrawFn) -> list[StoredFile]:
    """Files of a short history: dense enough for chains, with holes, overlaps and ties."""
    end = draw(st.integers(1, 12))
    files = []
    for _ in range(draw(st.integers(0, 14))):
        level = draw(st.sampled_from([0, 0, 0, 1, 1, 2, 8, 9]))
        low = 1 if level == 9 else draw(st.integers(1, end))
        high = draw(st.integers(low, min(end, low + 4) if level < 9 else end))
        files.append(stored(level, low, high, draw(st.sampled_from([1.0, 2.0]))))
    return list({(f.level, f.name): f for f in files}.values())


@given(listings(), st.none() | st.integers(0, 13), st.randoms(use_true_random=False))
def test_plan_is_what_restore_would_do_whatever_the_order_of_the_listing(
    files: list[StoredFile], txid: int | None, rng: random.Random
) -> None:
    expected = restore(files, txid)
    rng.shuffle(files)
    if isinstance(expected, type):
        with pytest.raises(expected):
            plan(files, txid)
    else:
        assert plan(files, txid) == tuple(expected)


@given(listings(), st.integers(0, 13))
def test_extend_reaches_the_newest_state_without_a_snapshot_where_it_can(files: list[StoredFile], txid: int) -> None:
    newest = max((f.name.max_txid for f in files), default=0)

    def reach(usable: list[StoredFile]) -> int:
        current = txid
        while ends := [f.name.max_txid for f in usable if f.name.min_txid <= current + 1 and f.name.max_txid > current]:
            current = max(ends)
        return current

    with_increments, with_all = reach([f for f in files if f.level < 9]), reach(files)
    if with_increments < newest and any(f.name.min_txid > with_all + 1 for f in files):
        with pytest.raises(ReplicaGap):
            extend(files, txid)
        return
    chain = extend(files, txid)
    current = txid
    for f in chain:
        assert f.name.min_txid <= current + 1 <= f.name.max_txid, "each file continues the one before and adds to it"
        current = f.name.max_txid
    assert current == max(txid, newest)
    if with_increments >= newest:
        assert all(f.level < 9 for f in chain)


@given(listings(), st.integers(1, 13))
def test_a_bounded_plan_never_goes_beyond_its_bound(files: list[StoredFile], txid: int) -> None:
    try:
        chain = plan(files, txid)
    except (EmptyReplica, ReplicaGap):
        return
    assert all(f.name.max_txid <= txid for f in chain)
    assert chain[0].name.min_txid == 1


def test_files_below_the_snapshot_are_leftovers_and_no_gap() -> None:
    snapshot, next_one = stored(9, 1, 10), stored(0, 11, 11)
    assert plan([stored(1, 2, 3), stored(1, 6, 7), snapshot, next_one]) == (snapshot, next_one)


def test_a_file_that_overlaps_the_snapshot_continues_it() -> None:
    snapshot, overlapping = stored(9, 1, 10), stored(2, 8, 14)
    assert plan([snapshot, overlapping]) == (snapshot, overlapping)


def test_ties_go_to_the_lower_min_then_the_higher_level_then_the_older_object() -> None:
    base = stored(9, 1, 3)
    lower_min = stored(1, 2, 8)
    assert plan([base, stored(2, 4, 8), lower_min, stored(0, 3, 8)]) == (base, lower_min)
    higher = stored(3, 4, 8)
    assert plan([base, stored(2, 4, 8), higher]) == (base, higher)
    older = stored(2, 4, 8, 1.0)
    assert plan([base, stored(2, 4, 8, 2.0), older]) == (base, older)


def test_a_gap_names_the_missing_transactions_and_the_file_behind_it() -> None:
    with pytest.raises(ReplicaGap, match=r"0000000000000003 to 0000000000000009.*level 1 file 000000000000000a"):
        plan([stored(0, 1, 2), stored(1, 10, 20)])


def test_increments_without_a_snapshot_are_a_gap_that_names_the_oldest_file() -> None:
    with pytest.raises(ReplicaGap, match="no snapshot: its oldest file starts at TXID 0000000000000005"):
        plan([stored(0, 5, 5), stored(0, 6, 6)])


def test_extend_prefers_increments_to_a_new_snapshot_of_what_is_here() -> None:
    increments = [stored(0, 6, 6), stored(0, 7, 7)]
    assert extend([stored(9, 1, 7), *increments], 5) == tuple(increments)


def test_extend_crosses_a_retention_hole_by_a_snapshot() -> None:
    snapshot, after = stored(9, 1, 20), stored(0, 21, 21)
    assert extend([stored(0, 15, 15), snapshot, after], 5) == (snapshot, after)


def test_extend_with_nothing_newer_is_empty() -> None:
    assert extend([stored(9, 1, 5), stored(0, 5, 5)], 5) == ()
    assert extend([], 5) == ()
