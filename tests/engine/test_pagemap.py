"""The page map against a plain dict, and what it costs."""

from __future__ import annotations

import gc
import random
import time
import weakref

from hypothesis import given
from hypothesis import strategies as st
from replicas import make_layer

from lazyreplica.pagemap import Layer, PageMap, stack

layer_sequences = st.lists(
    st.one_of(
        st.sets(st.integers(1, 12), max_size=12),
        st.just(frozenset(range(1, 9))),  # the whole database
    ),
    min_size=1,
    max_size=30,
)


@given(layer_sequences)
def test_each_page_belongs_to_the_last_layer_that_holds_it(sequence: list[set[int]]) -> None:
    page_map = PageMap()
    model: dict[int, Layer] = {}
    for txid, pgnos in enumerate(sequence, 1):
        commit = 8 if pgnos == set(range(1, 9)) else 12
        layer = make_layer(pgnos, commit, txid)
        before = dict(model)
        previous, page_map = page_map, page_map.with_layer(layer)
        if layer.holds_everything:
            model = {}
        model |= dict.fromkeys(pgnos, layer)
        for pgno in range(0, 14):
            assert page_map.owner(pgno) is model.get(pgno)
            assert previous.owner(pgno) is before.get(pgno), "an older map does not change"
        layers = list(page_map.layers())
        assert len({layer.number for layer in layers}) == len(layers)
        assert set(model.values()) <= set(layers)


@given(layer_sequences)
def test_stack_is_layer_upon_layer(sequence: list[set[int]]) -> None:
    layers = [make_layer(pgnos, 12, txid) for txid, pgnos in enumerate(sequence, 1)]
    page_map = PageMap()
    for layer in layers:
        page_map = page_map.with_layer(layer)
    assert [stack(layers).owner(p) for p in range(14)] == [page_map.owner(p) for p in range(14)]


def test_a_large_layer_is_not_copied_for_the_small_ones_upon_it() -> None:
    """Its index may have millions of pages."""
    whole, large = make_layer(range(1, 20_001), 20_000, 1), make_layer(range(2, 10_002), 20_000, 22)
    small = [make_layer([number, number + 7], 20_000, number) for number in (*range(2, 22), *range(23, 60))]
    stacked = stack([whole, *small[:20], large, *small[20:]])
    assert [run.layers for run in stacked._runs if large in run.layers] == [(large,)]
    assert stacked.owner(5000) is large
    assert stacked.owner(59) is small[-1]


def test_a_whole_database_hides_and_forgets_everything_before_it() -> None:
    whole = make_layer(range(1, 6), 5, 3)
    page_map = stack([make_layer(range(1, 11), 10, 1), make_layer([2], 10, 2), whole])
    assert list(page_map.layers()) == [whole]
    assert page_map.owner(7) is None


def test_every_page_but_the_lock_page_is_a_whole_database() -> None:
    lock = 0x40000000 // 65536 + 1
    pages = [*range(1, lock), lock + 1]
    assert make_layer(pages, lock + 1, 1, page_size=65536).holds_everything
    assert not make_layer(pages[:-1], lock + 1, 1, page_size=65536).holds_everything
    assert make_layer([], 0, 1).holds_everything, "an empty database"


def test_superseded_layers_are_forgotten() -> None:
    base = make_layer(range(1, 101), 100, 1)
    page_map = PageMap().with_layer(base)
    seen = []
    for txid in range(2, 1000):
        layer = make_layer([1, 2, 3], 100, txid)
        seen.append(weakref.ref(layer))
        page_map = page_map.with_layer(layer)
        del layer
    gc.collect()
    assert sum(reference() is not None for reference in seen) <= 3
    assert len(list(page_map.layers())) <= 4
    assert page_map.owner(50) is base


def test_many_thousands_of_layers_make_few_runs_and_stay_cheap() -> None:
    rng = random.Random(3)
    page_map = PageMap().with_layer(make_layer(range(1, 20_001), 20_000, 1))
    model: dict[int, int] = {}
    most = 0
    started = time.process_time()
    for txid in range(2, 5_002):
        pgnos = rng.sample(range(1, 20_001), rng.choice([1, 2, 3, 5, 20]))
        page_map = page_map.with_layer(make_layer(pgnos, 20_000, txid))
        model |= dict.fromkeys(pgnos, txid)
        most = max(most, len(page_map._runs))
    elapsed = time.process_time() - started
    assert most <= 20, "a logarithm of 5000, with room"
    assert elapsed < 10, "generous: about a second on a slow machine"
    for pgno in rng.sample(range(1, 20_001), 2_000):
        owner = page_map.owner(pgno)
        assert owner is not None
        assert owner.max_txid == model.get(pgno, 1)
