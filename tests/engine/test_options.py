"""Options: what texts mean, what is refused, and which source wins."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import apsw
import pytest
from replicas import ReplicaDirectory, opened, start

import lazyreplica
from lazyreplica import naming
from lazyreplica.config import ENVIRONMENT, OPTION_NAMES, TECHNIQUES, Options
from lazyreplica.errors import ConfigError
from lazyreplica.naming import Named, configure, is_configured, resolve


@pytest.fixture(autouse=True)
def _forget_names() -> Iterator[None]:
    yield
    naming._configured.clear()


def parsed(**values: object) -> Options:
    return Options().updated(values, "test")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("4096", 4096),
        ("64k", 64 << 10),
        ("64KB", 64 << 10),
        ("64 KiB", 64 << 10),
        ("3m", 3 << 20),
        ("2GiB", 2 << 30),
        ("1T", 1 << 40),
        (" 5 ", 5),
        (7, 7),
        ("12b", 12),
    ],
)
def test_sizes(text: object, expected: int) -> None:
    assert parsed(cache_size=text).cache_size == expected
    assert parsed(hydrate_max=text).hydrate_max == expected


@pytest.mark.parametrize("text", ["", "-1", "1.5G", "many", "k", "1 k k", "0x10", True, 1.5, -1])
def test_sizes_that_are_refused(text: object) -> None:
    with pytest.raises(ConfigError):
        parsed(cache_size=text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("1", 1),
        ("0.25", 0.25),
        (".5", 0.5),
        ("2.", 2),
        ("500ms", 0.5),
        ("2s", 2),
        ("3 m", 180),
        ("1h", 3600),
        (2, 2),
    ],
)
def test_durations(text: object, expected: float) -> None:
    assert parsed(poll_interval=text).poll_interval == pytest.approx(expected)
    assert parsed(max_staleness=text).max_staleness == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "-1", "soon", "1d", "1m30s", "nan", "inf", True, -1, math.nan, math.inf])
def test_durations_that_are_refused(text: object) -> None:
    with pytest.raises(ConfigError):
        parsed(poll_interval=text)
    with pytest.raises(ConfigError):
        parsed(max_staleness=text)


@pytest.mark.parametrize("text", [0, "0", "0s"])
def test_a_read_timeout_of_nothing_is_refused(text: object) -> None:
    with pytest.raises(ConfigError, match="read_timeout"):
        parsed(read_timeout=text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *((text, True) for text in ("1", "TRUE", "yes", "on", True, "t")),
        *((text, False) for text in ("0", "False", "no", "OFF", False, "f")),
    ],
)
def test_booleans(text: object, expected: bool) -> None:
    assert parsed(hydrate=text).hydrate is expected


@pytest.mark.parametrize("text", ["", "maybe", "2", 2])
def test_booleans_that_are_refused(text: object) -> None:
    with pytest.raises(ConfigError, match="expected true or false"):
        parsed(hydrate=text)


def test_paths() -> None:
    assert parsed(hydration_path=Path("/x/y.db")).hydration_path == "/x/y.db"
    with pytest.raises(ConfigError, match="hydration_path"):
        parsed(hydration_path="")
    with pytest.raises(ConfigError, match="not a path"):
        parsed(hydration_path=5)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("all", TECHNIQUES),
        ("none", ()),
        (" all ", TECHNIQUES),
        ("rows", ["rows"]),
        ("overflow,interior", ["overflow", "interior"]),
        (" sequential , siblings ,", ["sequential", "siblings"]),
        ("rows overflow", ["rows", "overflow"]),
        ("rows,rows", ["rows"]),
        (",".join(TECHNIQUES), TECHNIQUES),
        (["all"], TECHNIQUES),
        (["none"], ()),
        (["rows", "interior"], ["rows", "interior"]),
        (("siblings",), ["siblings"]),
        ({"siblings", "rows"}, ["siblings", "rows"]),
        (frozenset({"sequential"}), ["sequential"]),
        ([], ()),
        ((), ()),
        (frozenset(), ()),
    ],
)
def test_techniques(value: object, expected: Iterable[str]) -> None:
    assert parsed(prefetch=value).prefetch == frozenset(expected)


def test_every_technique_is_used_unless_told_otherwise() -> None:
    assert Options().prefetch == frozenset(TECHNIQUES)


@pytest.mark.parametrize(
    "value",
    [
        "rows,guess",
        "All",
        "true",
        "all,rows",
        "none,rows",
        "rows;siblings",
        ["rows", "guess"],
        ["all", "rows"],
        [1],
        [None],
        [["rows"]],
        1,
        0,
        True,
        False,
        b"rows",
        {"rows": True},
    ],
)
def test_techniques_that_are_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=r"test is .*, expected all, none, or some of sequential, siblings, rows"):
        parsed(prefetch=value)


def test_techniques_reach_the_reader(directory: ReplicaDirectory) -> None:
    """From the environment, `configure` and a URI; what is not asked for is not done."""
    start(directory.path, 3)
    with opened(directory, prefetch=frozenset({"rows", "overflow"})) as replica:
        assert replica.reader()._techniques == {"rows", "overflow"}
    configure("x.db", directory.url, prefetch="none")
    assert resolve("x.db", {}).options.prefetch == frozenset()
    assert resolve("x.db", {"prefetch": "rows,siblings"}).options.prefetch == {"rows", "siblings"}
    with pytest.raises(ConfigError, match="LITESTREAM_PREFETCH is 'lots'"):
        Options.from_environment({"LITESTREAM_PREFETCH": "lots"})
    with pytest.raises(ConfigError, match="URI parameter prefetch is 'lots'"):
        resolve("x.db", {"prefetch": "lots"})
    lazyreplica.connect(directory.url, hydrate=False, poll_interval=0, prefetch="interior").close()


# Regression (vfs/connections.py, `connect`): a list travels as str(value), which is no list of techniques.
@pytest.mark.parametrize("names", [["interior", "rows"], ("siblings",), {"rows"}, frozenset({"rows"}), [], frozenset()])
def test_connect_takes_what_configure_takes(directory: ReplicaDirectory, names: Iterable[str]) -> None:
    start(directory.path, 3)
    configure("x.db", directory.url, prefetch=names)
    assert resolve("x.db", {}).options.prefetch == frozenset(names)
    db = lazyreplica.connect(directory.url, hydrate=False, poll_interval=0, prefetch=names)
    assert db.pragma("litestream_txid") == "0000000000000001"
    db.close()


def test_none_is_the_default() -> None:
    changed = parsed(cache_size=1, poll_interval=9, hydrate=True, hydration_path="/x", prefetch="none")
    assert changed.updated(dict.fromkeys(OPTION_NAMES), "test") == Options()


def test_unknown_options_are_refused_and_the_known_ones_named() -> None:
    with pytest.raises(ConfigError, match=r"'cachesize' is not an option; options are .*cache_size"):
        parsed(cachesize=1)


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({}, 5),
        ({"poll_interval": 0.1}, 5),
        ({"poll_interval": 3}, 15),
        ({"poll_interval": 0}, math.inf),
        ({"max_staleness": 0}, 0),
        ({"poll_interval": 0, "max_staleness": 2}, 2),
    ],
)
def test_staleness_limit(options: dict[str, object], limit: float) -> None:
    assert parsed(**options).staleness_limit == limit


def test_the_environment_sets_every_option() -> None:
    texts = {
        "hydrate": "true",
        "hydrate_max": "1k",
        "hydration_path": "/x",
        "cache_dir": "/y",
        "cache_size": "2k",
        "poll_interval": "3s",
        "max_staleness": "4",
        "read_timeout": "5",
        "prefetch": "rows,siblings",
    }
    assert set(texts) == set(ENVIRONMENT) == set(OPTION_NAMES)
    found = Options.from_environment({ENVIRONMENT[name]: text for name, text in texts.items()})
    assert found == Options(True, 1024, "/x", "/y", 2048, 3.0, 4.0, 5.0, frozenset({"rows", "siblings"}))
    assert Options.from_environment(dict.fromkeys(ENVIRONMENT.values(), "")) == Options()


def test_a_bad_environment_variable_is_named() -> None:
    with pytest.raises(ConfigError, match="LITESTREAM_CACHE_SIZE is 'lots'"):
        Options.from_environment({"LITESTREAM_CACHE_SIZE": "lots"})


# -- which replica, and which source wins --


def test_the_replica_comes_from_parameter_then_configure_then_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITESTREAM_REPLICA_URL", "file:///env")
    assert resolve("app.db", {}).url == "file:///env"
    configure("app.db", "file:///configured")
    assert resolve("app.db", {}).url == "file:///configured"
    assert resolve("other.db", {}).url == "file:///env"
    assert resolve("app.db", {"replica_url": "file:///explicit"}).url == "file:///explicit"
    assert resolve("app.db", {"replica_url": ""}).url == "file:///configured"


def test_options_come_from_parameter_then_configure_then_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITESTREAM_CACHE_SIZE", "1k")
    monkeypatch.setenv("LITESTREAM_POLL_INTERVAL", "9")
    configure("app.db", "file:///a", cache_size="2k")
    assert resolve("app.db", {}).options == Options(cache_size=2048, poll_interval=9.0)
    assert resolve("app.db", {"cache_size": "3k"}).options == Options(cache_size=3072, poll_interval=9.0)
    other = resolve("app.db", {"replica_url": "file:///b"}).options
    assert other == Options(cache_size=1024, poll_interval=9.0), "configure() was about another replica"


def test_configure_replaces_and_complains_at_once() -> None:
    configure("app.db", "file:///a", cache_size=1)
    configure("app.db", "file:///b")
    assert resolve("app.db", {}) == Named("file:///b", Options())
    for name, url, options in (
        ("", "file:///a", {}),
        ("x.db", "ftp://a/b", {}),
        ("x.db", "file:///a", {"polling": 1}),
        ("x.db", "file:///a", {"poll_interval": -1}),
    ):
        with pytest.raises(ConfigError):
            configure(name, url, **options)
    assert not is_configured("x.db")


def test_a_name_without_a_replica_is_an_error_with_the_three_remedies() -> None:
    with pytest.raises(ConfigError, match=r"LITESTREAM_REPLICA_URL=.*configure\('x\.db'.*replica_url="):
        resolve("x.db", {})


def test_a_bad_uri_parameter_is_named() -> None:
    with pytest.raises(ConfigError, match="URI parameter cache_size is 'lots'"):
        resolve("x.db", {"replica_url": "file:///a", "cache_size": "lots"})


def test_options_reach_the_replica_through_connect_uri_and_configure(directory: ReplicaDirectory) -> None:
    start(directory.path, 3)
    with pytest.raises(ConfigError, match="not an option"):
        lazyreplica.connect(directory.url, cash_size=1)
    with pytest.raises(apsw.CantOpenError) as caught:
        apsw.Connection(f"file:x.db?vfs=litestream&replica_url={directory.url}&cache_size=lots")
    assert isinstance(caught.value, ConfigError)
    configure("x.db", directory.url, hydrate=False)
    db = apsw.Connection("file:x.db?vfs=litestream&poll_interval=0")
    assert db.pragma("litestream_txid") == "0000000000000001"
    assert db.pragma("litestream_hydration_file") in ("", None)
    db.close()


# Regression (vfs/connections.py, `connect`): numbers travel as str(value), and "1e-05" is no duration.
def test_connect_takes_any_float(directory: ReplicaDirectory) -> None:
    start(directory.path, 3)
    lazyreplica.connect(directory.url, hydrate=False, max_staleness=0.00001, read_timeout=1e9).close()
