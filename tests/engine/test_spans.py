"""Frames that are wanted, joined into requests."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from replicas import make_layer

from lazyreplica.spans import FIRST, GAP, LIMIT, Place, Span, join

LAYERS = [make_layer([1], 1, txid) for txid in range(1, 4)]

frames = st.lists(
    st.tuples(
        st.one_of(st.just(0), st.integers(1, 200), st.sampled_from([GAP - 1, GAP, GAP + 1]), st.integers(0, 4 * GAP)),
        st.one_of(st.integers(7, 5000), st.integers(7, 70_000)),
    ),
    max_size=25,
)
"""Of one file: bytes before the frame that nobody wants, and its size."""


def wanted(files: list[list[tuple[int, int]]], rng: random.Random) -> list[Place]:
    """Those frames, in any order of need."""
    places, pgnos = [], itertools.count(1)
    for layer, each in zip(LAYERS, files, strict=False):
        end = 100
        for gap, size in each:
            places.append(Place(next(pgnos), layer, end + gap, end + gap + size))
            end += gap + size
    rng.shuffle(places)
    return places


many = st.builds(wanted, st.lists(frames, max_size=3), st.integers(0, 1 << 32).map(random.Random))
limits = st.one_of(st.sampled_from([LIMIT, FIRST, 1]), st.integers(1, 500_000))


@given(many, limits)
def test_spans_cover_what_is_wanted_and_nothing_else(places: list[Place], limit: int) -> None:
    spans = join(places, limit)
    assert sorted(pgno for span in spans for pgno in span.pgnos) == sorted(place.pgno for place in places)
    of = {place.pgno: place for place in places}
    for span in spans:
        inside = [of[pgno] for pgno in span.pgnos]
        assert {place.layer for place in inside} == {span.layer}
        assert (span.start, span.end) == (inside[0].start, inside[-1].end)
        assert all(one.end <= two.start for one, two in itertools.pairwise(inside)), "in file order"


@given(many, limits)
def test_no_gap_is_longer_than_it_is_worth_and_no_span_than_the_limit(places: list[Place], limit: int) -> None:
    of = {place.pgno: place for place in places}
    for span in join(places, limit):
        inside = [of[pgno] for pgno in span.pgnos]
        assert all(two.start - one.end <= GAP for one, two in itertools.pairwise(inside))
        assert span.end - span.start <= limit or len(inside) == 1


@given(many, limits)
def test_what_can_be_one_request_is_one(places: list[Place], limit: int) -> None:
    of = {place.pgno: place for place in places}
    in_file_order = sorted(join(places, limit), key=lambda span: (span.layer.number, span.start))
    for one, two in itertools.pairwise(in_file_order):
        following = of[two.pgnos[0]]
        assert one.layer is not two.layer or following.start - one.end > GAP or following.end - one.start > limit, (
            "greedily from the front"
        )


@given(many, limits)
def test_the_span_that_is_needed_first_is_in_front(places: list[Place], limit: int) -> None:
    need = {place.pgno: at for at, place in enumerate(places)}
    spans = join(places, limit)
    first = [min(need[pgno] for pgno in span.pgnos) for span in spans]
    assert first == sorted(first)
    if places:
        assert places[0].pgno in spans[0].pgnos


# BUG (spans.py, `join`): of a page that is named twice, the last mention counts. `Fetcher._begin` takes the first span
# for the one with the page that somebody waits for, and asks that page's file for the bytes of another page.
@given(many, limits, st.integers(0, 1 << 32).map(random.Random))
@example([Place(1, LAYERS[0], 100, 200), Place(2, LAYERS[1], 100, 200)], LIMIT, random.Random(1))
def test_a_page_that_is_named_again_is_needed_as_early_as_before(
    places: list[Place], limit: int, rng: random.Random
) -> None:
    again = rng.choices(places, k=5) if places else []
    named_again = join([*places, *again], limit)
    assert [replace(span, places=tuple(dict.fromkeys(span.places))) for span in named_again] == join(places, limit)


def test_nothing_is_wanted() -> None:
    assert join([]) == []


@pytest.mark.parametrize(("gap", "count"), [(0, 1), (GAP, 1), (GAP + 1, 2)])
def test_a_gap_as_long_as_allowed(gap: int, count: int) -> None:
    assert len(join([Place(1, LAYERS[0], 100, 200), Place(2, LAYERS[0], 200 + gap, 300 + gap)])) == count


@pytest.mark.parametrize(("limit", "count"), [(200, 1), (199, 2)])
def test_a_span_as_long_as_allowed(limit: int, count: int) -> None:
    assert len(join([Place(1, LAYERS[0], 100, 200), Place(2, LAYERS[0], 200, 300)], limit)) == count


def test_files_are_never_joined() -> None:
    places = [Place(1, LAYERS[0], 100, 200), Place(2, LAYERS[1], 200, 300), Place(3, LAYERS[0], 300, 400)]
    first, second, third = places[0], places[2], places[1]
    assert join(places) == [Span(LAYERS[0], 100, 400, (first, second)), Span(LAYERS[1], 200, 300, (third,))]
