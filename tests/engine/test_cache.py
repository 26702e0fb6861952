"""The page cache: what a scan may not wash out, and how much it holds."""

from __future__ import annotations

import random
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replicas import page_bytes

from lazyreplica.btree import INTERIOR_INDEX, INTERIOR_TABLE, LEAF_INDEX, LEAF_TABLE
from lazyreplica.cache import ENTRY, PageCache

SIZE = 512
TAKEN = SIZE + ENTRY
PAGES = 1000
"""That many pages is what the caches here have room for."""


def a_page(pgno: int, kind: int = LEAF_TABLE, version: int = 1, size: int = SIZE) -> bytes:
    return bytes((kind,)) + page_bytes(pgno, version, page_size=size)[1:]


def held(cache: PageCache) -> int:
    """Bytes, counted."""
    pages = {**cache._probation, **cache._protected}
    assert len(pages) == len(cache._probation) + len(cache._protected), "no page is in both"
    return sum(len(page) + ENTRY for page in pages.values())


def read(cache: PageCache, pgno: int, kind: int = LEAF_TABLE, version: int = 1) -> bool:
    """As `Replica.read` does it; whether the page was here."""
    page = cache.get(pgno, version)
    if page is None:
        cache.put(pgno, version, a_page(pgno, kind, version))
        return False
    assert page == a_page(pgno, kind, version)
    return True


# -- what stays --


@pytest.mark.parametrize("kind", [INTERIOR_INDEX, INTERIOR_TABLE])
def test_a_scan_washes_out_neither_interior_pages_nor_what_was_used_twice(kind: int) -> None:
    cache = PageCache(PAGES * TAKEN)
    interior, hot = range(1, 101), range(101, 201)
    for pgno in interior:
        assert not read(cache, pgno, kind)
    for _ in range(2):
        for pgno in hot:
            read(cache, pgno)
    for pgno in range(10_000, 10_000 + 4 * PAGES):
        assert not read(cache, pgno)
    assert all(read(cache, pgno, kind) for pgno in interior)
    assert all(read(cache, pgno) for pgno in hot)


@pytest.mark.parametrize("kind", [LEAF_INDEX, LEAF_TABLE, 0])
def test_what_was_read_once_before_a_scan_is_gone_after_it(kind: int) -> None:
    """Or there would be no room for anything new."""
    cache = PageCache(PAGES * TAKEN)
    for pgno in range(1, 101):
        read(cache, pgno, kind)
    for pgno in range(10_000, 10_000 + 4 * PAGES):
        read(cache, pgno, kind)
    assert not any((pgno, 1) in cache for pgno in range(1, 101))


def test_a_scan_again_and_again_does_not_fill_more_than_three_quarters() -> None:
    """What is read once more after that still has a place."""
    cache = PageCache(PAGES * TAKEN)
    for _ in range(3):
        for pgno in range(1, PAGES + 1):
            read(cache, pgno)
    assert cache._protected.currsize <= PAGES * TAKEN * 3 // 4
    for pgno in range(5000, 5200):
        read(cache, pgno)
    assert all((pgno, 1) in cache for pgno in range(5000, 5200))


def test_a_new_working_set_replaces_the_old_one() -> None:
    """Not one that is read in a circle: of that no page comes again as long as it is here."""
    cache, rng = PageCache(PAGES * TAKEN), random.Random(1)
    for first in (1, 10_000):
        for _ in range(10_000):
            read(cache, first + rng.randrange(700))
        assert all(read(cache, pgno) for pgno in range(first, first + 700))


def test_all_of_the_room_is_used() -> None:
    cache = PageCache(PAGES * TAKEN)
    for pgno in range(1, PAGES + 1):
        read(cache, pgno)
    assert held(cache) == PAGES * TAKEN
    assert all(read(cache, pgno) for pgno in range(1, PAGES + 1)), "and used once more, none is lost"
    assert held(cache) == PAGES * TAKEN


def test_of_interior_pages_too_many_for_the_cache_the_newest_stay() -> None:
    cache = PageCache(PAGES * TAKEN)
    for pgno in range(1, 3 * PAGES):
        read(cache, pgno, INTERIOR_TABLE)
    assert held(cache) <= PAGES * TAKEN
    assert all((pgno, 1) in cache for pgno in range(3 * PAGES - 700, 3 * PAGES))


# -- how much --


operations = st.lists(
    st.tuples(
        st.sampled_from(["get", "put", "put", "drop", "in"]),
        st.integers(1, 12),
        st.integers(1, 3),
        st.sampled_from([INTERIOR_INDEX, INTERIOR_TABLE, LEAF_INDEX, LEAF_TABLE, 0]),
    ),
    max_size=80,
)


@settings(max_examples=150)
@given(
    operations,
    st.one_of(st.integers(0, 12 * TAKEN), st.sampled_from([0, 1, TAKEN - 1, TAKEN, TAKEN + 1, 2 * TAKEN])),
    st.sampled_from([[SIZE], [SIZE, 4 * SIZE], [1, 100, SIZE]]),
)
def test_capacity_holds_and_what_is_found_is_what_was_put(
    operations: list[tuple[str, int, int, int]], capacity: int, sizes: list[int]
) -> None:
    cache = PageCache(capacity)
    put: dict[tuple[int, int], bytes] = {}
    for what, pgno, version, kind in operations:
        key = (pgno, version)
        match what:
            case "put":
                page = put.setdefault(key, a_page(pgno, kind, version, sizes[pgno % len(sizes)]))
                cache.put(pgno, version, page)
                # A page that is larger than all the room is not kept. Pages of one size: any other is, if only two fit.
                assert (key in cache) <= (len(page) + ENTRY <= capacity)
                assert (key in cache) >= (len(sizes) == 1 and capacity >= 2 * TAKEN)
            case "get":
                here = key in cache
                page = cache.get(pgno, version)  # type: ignore[assignment]
                assert page == (put[key] if here else None)
                assert (key in cache) == here
            case "drop":
                others = [key for key in put if key in cache and key[1] != version]
                cache.drop_version(version)
                assert [key for key in put if key in cache] == others
        assert held(cache) <= capacity
        assert cache._probation.currsize + cache._protected.currsize == held(cache)


@pytest.mark.parametrize("capacity", [0, 1, SIZE, TAKEN - 1])
def test_a_cache_without_room_holds_nothing(capacity: int) -> None:
    cache = PageCache(capacity)
    for pgno in range(1, 50):
        cache.put(pgno, 1, a_page(pgno, INTERIOR_TABLE if pgno % 2 else LEAF_TABLE))
        assert cache.get(pgno, 1) is None
        assert (pgno, 1) not in cache
    assert held(cache) == 0


def test_a_page_is_kept_whose_share_of_protected_room_is_too_small() -> None:
    """One page fits; three quarters of one do not."""
    cache = PageCache(TAKEN)
    for kind in (INTERIOR_TABLE, LEAF_TABLE):
        for pgno in (1, 2):
            cache.put(pgno, 1, a_page(pgno, kind))
            for _ in range(3):
                assert cache.get(pgno, 1) == a_page(pgno, kind)
    assert held(cache) == TAKEN


# -- versions --


def test_versions_of_a_page_are_different_pages() -> None:
    cache = PageCache(PAGES * TAKEN)
    for version in (1, 2, 1 << 31):
        cache.put((1 << 32) - 1, version, a_page(7, version=version))
    for version in (1, 2, 1 << 31):
        assert cache.get((1 << 32) - 1, version) == a_page(7, version=version)
    assert cache.get(1, 2) is None


def test_a_version_is_dropped_from_everywhere() -> None:
    cache = PageCache(PAGES * TAKEN)
    for version in (1, 2, 3):
        for pgno in range(1, 100):
            kind = INTERIOR_INDEX if pgno % 3 == 0 else LEAF_TABLE
            read(cache, pgno, kind, version)
            if pgno % 2:
                read(cache, pgno, kind, version)
    cache.drop_version(2)
    assert {version for version in (1, 2, 3) for pgno in range(1, 100) if (pgno, version) in cache} == {1, 3}
    assert all(cache.get(pgno, 2) is None for pgno in range(1, 100))
    assert held(cache) == 2 * 99 * TAKEN


def test_threads_may_do_all_of_it_at_once() -> None:
    cache = PageCache(50 * TAKEN)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(1500):
                pgno, version = int(rng.expovariate(0.02)) + 1, rng.randrange(1, 3)
                read(cache, pgno, INTERIOR_TABLE if pgno % 10 == 0 else LEAF_TABLE, version)
                (pgno, version) in cache  # noqa: B015
                if rng.random() < 0.01:
                    cache.drop_version(version)
        except BaseException as exc:  # noqa: BLE001 (raised again by the test)
            failures.append(exc)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    assert held(cache) <= 50 * TAKEN
