"""The pure parts of time travel: what people write, where a boundary lies, and which files make a state."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyreplica.boundary import BoundarySearch
from lazyreplica.errors import ConfigError, NoSuchState, ReplicaGap
from lazyreplica.ltx import FileName
from lazyreplica.moments import AtTime, AtTXID, format_ms, parse_moment, parse_time
from lazyreplica.plan import plan_before, reach
from lazyreplica.storage import StoredFile

NOW = 1_763_805_600_000  # 2025-11-22T10:00:00Z


@pytest.mark.parametrize(
    ("text", "ms"),
    [
        ("now", NOW),
        ("Yesterday", NOW - 86_400_000),
        ("5 minutes ago", NOW - 300_000),
        (" 1  hour   ago ", NOW - 3_600_000),
        ("an hour ago", NOW - 3_600_000),
        ("a day ago", NOW - 86_400_000),
        ("90s ago", NOW - 90_000),
        ("2 weeks ago", NOW - 14 * 86_400_000),
        ("2025-11-22T10:00:00Z", NOW),
        ("2025-11-22t10:00:00z", NOW),
        ("2025-11-22 10:00", NOW),
        ("2025-11-22", NOW - 36_000_000),
        ("20251122", NOW - 36_000_000),
        ("2025-11-22T12:00:00+02:00", NOW),
        ("2025-11-22T12:00:00.250+02:00", NOW + 250),
        ("2025-11-22T10:00:00.5", NOW + 500),
        ("2025-11-22T10:00:00.000000001Z", NOW + 1),
        ("2025-11-22T10:00:00.001000000Z", NOW + 1),
        ("1763805600", NOW),
        ("1763805600.0015", NOW + 2),
        ("1969-12-31T23:59:59.999Z", -1),
    ],
)
def test_times_are_read(text: str, ms: int) -> None:
    assert parse_time(text, NOW) == ms


@pytest.mark.parametrize(
    "text",
    [
        "",
        "soon",
        "tomorrow",
        "5 minutes",
        "-5 minutes ago",
        "5 moons ago",
        "10:00",
        "2025-13-01",
        "12345",
        "9" * 500 + ".",
        "\0",
    ],
)
def test_what_is_no_time_is_an_error_that_says_what_is(text: str) -> None:
    with pytest.raises(ConfigError, match=r"5 minutes ago.*Unix seconds"):
        parse_time(text, NOW)


@given(st.text(max_size=40))
def test_any_text_is_a_time_or_a_configuration_error(text: str) -> None:
    try:
        parse_time(text, NOW)
    except ConfigError:
        return


@given(st.integers(0, 4_000_000_000_000))
def test_what_is_shown_can_be_set(ms: int) -> None:
    assert parse_time(format_ms(ms), NOW) == ms
    assert parse_time(datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds"), NOW) in (ms - 1, ms)


def test_txids_and_latest() -> None:
    assert parse_moment("txid", "00000000000000A4", NOW) == AtTXID(0xA4)
    assert parse_moment("time", "now", NOW) == AtTime(NOW)
    assert parse_moment("txid", "LATEST", NOW) is parse_moment("time", " latest ", NOW) is None
    for text in ("164", "a4", "", "0x000000000000a4", "yesterday"):
        with pytest.raises(ConfigError, match="16 hexadecimal digits"):
            parse_moment("txid", text, NOW)


@given(st.lists(st.integers(0, 50)).map(sorted), st.integers(-1, 51), st.integers(1, 70), st.data())
def test_the_search_finds_what_counting_finds(values: list[int], limit: int, width: int, data: st.DataObject) -> None:
    guess = data.draw(st.none() | st.integers(-5, len(values) + 5))
    search = BoundarySearch(len(values), limit, guess)
    for index in data.draw(st.sets(st.integers(0, len(values) - 1), max_size=5)) if values else ():
        search.tell(index, values[index])
    rounds = 0
    while not search.done:
        asked = search.wanted(width)
        assert 0 < len(asked) <= width
        for index in asked:
            search.tell(index, values[index])
        rounds += 1
    assert search.below == sum(value < limit for value in values)
    assert search.ordered
    if width >= 64:
        assert rounds <= 2


def test_five_hundred_files_take_two_rounds_and_one_with_a_good_guess() -> None:
    for guess, most in ((None, 2), (0, 2), (313, 1)):
        search = BoundarySearch(500, 313, guess)
        rounds = 0
        while not search.done:
            for index in search.wanted(48):
                search.tell(index, index)
            rounds += 1
        assert rounds <= most


def test_values_that_decrease_are_noticed() -> None:
    search = BoundarySearch(3, 10)
    search.tell(0, 12)
    search.tell(2, 9)
    assert search.done
    assert not search.ordered


def file(level: int, low: int, high: int) -> StoredFile:
    return StoredFile(level, FileName(low, high), 1000, f"{level}-{low}-{high}", 0.0)


def test_a_compacted_file_that_is_too_new_gives_way_to_lower_levels() -> None:
    files = [file(9, 1, 10), file(1, 11, 20), file(0, 11, 11), file(0, 12, 12), file(0, 13, 13)]
    assert [f.name.max_txid for f in plan_before(files, [files[0], files[2], files[3]])] == [10, 11, 12]
    assert [f.name.max_txid for f in plan_before(files, files)] == [10, 20]
    # Level 0 is kept for a time only: what is left of it need not begin where the compacted file begins.
    left = [file(9, 1, 10), file(1, 11, 20), file(0, 15, 15)]
    assert [f.name.max_txid for f in plan_before(left, [left[0], left[2]])] == [10]


def test_transactions_that_are_in_no_file_are_an_error_for_a_time() -> None:
    files = [file(9, 1, 10), file(0, 11, 11), file(0, 14, 14), file(9, 1, 20)]
    assert plan_before(files, files[:1])[-1].name.max_txid == 10
    for older in (files[:2], files[:3]):
        with pytest.raises(ReplicaGap, match="c to 000000000000000d are missing"):
            plan_before(files, older)
    assert plan_before(files, files)[-1].name.max_txid == 20
    with pytest.raises(NoSuchState):
        plan_before(files, [])
    with pytest.raises(NoSuchState):
        plan_before(files, [files[1]])
    assert [reach(files, txid) for txid in (9, 10, 11, 14, 19, 20, 99)] == [0, 10, 11, 11, 11, 20, 20]
