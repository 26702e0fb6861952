"""What Go's standard library makes of a text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyreplica.litestream_yml import go

VALUES = {"A": "1", "AB": "2", "A_b9": "3", "5": "five", "$": "dollar"}


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("$A ${A} $AB.$A_b9-", "1 1 2.3-"),
        ("${A}B $A{}B $AéB", "1B 1{}B 1éB"),
        ("$55 ${5} $$ $*", "five5 five dollar "),
        ("a$ b$", "a$ b$"),
        ("$- $é $.x", " $é $.x"),
        ("${} ${A", " A"),
        ("${A B}${no\nsuch}", ""),
        ("$none-${none}", "-"),
        ("", ""),
    ],
)
def test_expand(text: str, expanded: str) -> None:
    """Expectations follow the source of os.Expand."""
    assert go.expand(text, lambda name: VALUES.get(name, "")) == expanded


@settings(deadline=None)  # a busy machine is no failure
@given(st.text(), st.text())
def test_expansion_ends_and_is_not_repeated(text: str, value: str) -> None:
    seen: list[str] = []
    result = go.expand(text, lambda name: seen.append(name) or value)  # type: ignore[func-returns-value]
    if "$" not in text:
        assert result == text
    assert all(name and "}" not in name for name in seen)


@pytest.mark.parametrize(
    ("pattern", "names", "others"),
    [
        ("*.db", ["a.db", ".db", "a.b.db"], ["a.db3", "a/b.db", "a.DB"]),
        ("tenant-???.db", ["tenant-001.db"], ["tenant-01.db"]),
        ("[a-c]x", ["ax", "cx"], ["dx", "x", "-x"]),
        ("[^a-c]x", ["dx", "]x"], ["ax", "/x"]),
        (r"[\]\-]", ["]", "-"], ["\\", "a"]),
        (r"\*.db", ["*.db"], ["a.db"]),
        ("[!a]", ["!", "a"], ["b"]),
        ("[z-a]", [], ["a", "m", "z", ""]),
        ("[^z-a]", ["m"], ["/"]),
        ("a.c", ["a.c"], ["abc"]),
        ("é*", ["été"], ["ete"]),
    ],
)
def test_patterns(pattern: str, names: list[str], others: list[str]) -> None:
    compiled = go.compile_pattern(pattern)
    assert [name for name in names + others if compiled.fullmatch(name)] == names


@pytest.mark.parametrize("pattern", ["[", "[]", "[]a]", "[a", "[-]", "[a-]", "[x-", "[^]", "\\", "a\\", "[\\"])
def test_malformed_patterns(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"a '.*'|a range"):
        go.compile_pattern(pattern)


@settings(deadline=None)  # a busy machine is no failure
@given(st.text("ab-]^[\\*?", max_size=8), st.text("ab-]^[*", max_size=4))
def test_a_pattern_compiles_or_is_malformed(pattern: str, name: str) -> None:
    try:
        go.compile_pattern(pattern).fullmatch(name)
    except ValueError as exc:
        assert str(exc).startswith("a ")


@pytest.mark.parametrize(
    ("path", "escaped"),
    [("/a%20b", "/a%20b"), ("/a b", "/a%20b"), ("/é!%41", "/%C3%A9%21A"), ("/a!(b)", "/a!(b)"), ("/a%zz", "/a%25zz")],
)
def test_escaped_path(path: str, escaped: str) -> None:
    assert go.escaped_path(path) == escaped
