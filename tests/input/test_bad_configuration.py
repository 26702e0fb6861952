"""What the caller asked for cannot be: no replica named, a malformed URL, an option that makes no sense."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import apsw
import pytest
from handmade import STILL, History, failure, opened

import lazyreplica
from lazyreplica.config import ENVIRONMENT, OPTION_NAMES
from lazyreplica.errors import ConfigError, LazyReplicaError

URI = apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI
_names = (f"configured-{number}.db" for number in itertools.count())


def open_uri(name: str) -> None:
    apsw.Connection(name, flags=URI).close()


def test_no_replica_configured_names_the_three_ways() -> None:
    with pytest.raises(ConfigError) as caught:
        open_uri("file:app.db?vfs=litestream")
    assert isinstance(caught.value, apsw.CantOpenError)
    message = str(caught.value)
    assert "'app.db'" in message
    assert "LITESTREAM_REPLICA_URL" in message and "lazyreplica.configure('app.db'" in message
    assert "replica_url=" in message


@pytest.mark.parametrize("variable", ["", " "])
def test_an_empty_variable_names_no_replica(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITESTREAM_REPLICA_URL", variable)
    with pytest.raises(ConfigError):
        open_uri("file:app.db?vfs=litestream")


MALFORMED = {
    "app": "scheme",
    "/var/backup/app": "scheme",
    "s3:bucket/app": "s3://",
    "s3:///app": "bucket",
    "s3://": "bucket",
    "http://127.0.0.1/app": "http",
    "gs://bucket/app": "gs",
    "s3://[bucket/app": "malformed",
    "s3://bucket:port/app": "malformed",
    "s3://bucket:99999/app": "malformed",
    "s3://bucket:9000/app": "endpoint=",
    "s3://bucket/app#part": "%23",
    "s3://bucket/app?colour=red": "colour",
    "s3://bucket/app?endpoint=ftp://host": "endpoint",
    "s3://bucket/app?forcePathStyle=perhaps": "forcePathStyle",
    "s3://bucket/app?region=one&region=two": "region",
    "s3://bucket/%ff": "UTF-8",
    "file://relative/dir": "relative",
    "file:///dir?region=x": "query",
    "file:///d%00r": "%00",
    "s3://user:password@bucket/app": "credentials",
    "s3://b\N{ACCOUNT OF}cket/app": "bucket",
}


@pytest.mark.parametrize("url", MALFORMED)
def test_a_malformed_url_is_an_error_of_connect(url: str) -> None:
    assert MALFORMED[url] in failure(url, ConfigError)


@pytest.mark.parametrize("url", MALFORMED)
def test_a_malformed_url_is_an_error_of_the_uri(url: str) -> None:
    with pytest.raises(ConfigError, match=MALFORMED[url]) as caught:
        open_uri(f"file:app.db?vfs=litestream&replica_url={quote(url, safe='')}")
    assert isinstance(caught.value, apsw.CantOpenError)


@pytest.mark.parametrize("url", MALFORMED)
def test_a_malformed_url_is_an_error_of_the_environment(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITESTREAM_REPLICA_URL", url)
    with pytest.raises(ConfigError, match=MALFORMED[url]) as caught:
        open_uri("file:app.db?vfs=litestream")
    assert isinstance(caught.value, apsw.CantOpenError)


@pytest.mark.parametrize("url", MALFORMED)
def test_a_malformed_url_is_an_error_of_configure(url: str) -> None:
    with pytest.raises(ConfigError, match=MALFORMED[url]):
        lazyreplica.configure("malformed.db", url)
    with pytest.raises(ConfigError, match="no replica is configured"):
        open_uri("file:malformed.db?vfs=litestream")


@pytest.mark.parametrize("url", MALFORMED)
def test_a_malformed_url_is_an_error_of_publish(url: str) -> None:
    with pytest.raises(ConfigError, match=MALFORMED[url]):
        lazyreplica.publish(__file__, url)


def test_a_url_without_its_percent_encoding_is_an_error(history: History, replica: Path) -> None:
    """An unencoded `&` ends the parameter: the rest would be lost silently."""
    with pytest.raises(ConfigError) as caught:
        open_uri("file:app.db?vfs=litestream&replica_url=s3:bucket/app?endpoint=http://h&region=x")
    assert isinstance(caught.value, apsw.CantOpenError)


BAD_VALUES = [
    ("hydrate", "perhaps"),
    ("hydrate", "2"),
    ("hydrate_max", "lots"),
    ("hydrate_max", "-1"),
    ("hydrate_max", "1.5"),
    ("hydrate_max", "10 apples"),
    ("cache_size", "64MX"),
    ("cache_size", "-5"),
    ("cache_size", "nan"),
    ("poll_interval", "often"),
    ("poll_interval", "-1"),
    ("poll_interval", "nan"),
    ("poll_interval", "inf"),
    ("poll_interval", "1d"),
    pytest.param("poll_interval", "99999999999999", id="poll_interval-beyond-any-clock"),
    ("max_staleness", "-0.1"),
    ("max_staleness", "x"),
    ("read_timeout", "0"),
    ("read_timeout", "-3"),
    ("read_timeout", "soon"),
    pytest.param("read_timeout", "99999999999999", id="read_timeout-beyond-any-clock"),
    ("hydration_path", "/"),
]


@pytest.mark.parametrize(("option", "value"), BAD_VALUES)
def test_a_bad_option_of_connect_is_an_error_that_names_it(
    replica: Path, history: History, option: str, value: str
) -> None:
    url = history.write(replica)
    with pytest.raises(ConfigError) as caught:
        lazyreplica.connect(url, **{option: value}).close()
    assert value[:60] in str(caught.value) and option in str(caught.value)


@pytest.mark.parametrize(("option", "value"), BAD_VALUES)
def test_a_bad_option_in_the_uri_is_an_error_that_names_it(
    replica: Path, history: History, option: str, value: str
) -> None:
    url = history.write(replica)
    with pytest.raises(ConfigError) as caught:
        open_uri(f"file:x.db?vfs=litestream&replica_url={quote(url, safe='')}&{option}={quote(value, safe='')}")
    assert isinstance(caught.value, apsw.CantOpenError)
    assert option in str(caught.value) and value[:60] in str(caught.value)


@pytest.mark.parametrize(("option", "value"), BAD_VALUES)
def test_a_bad_option_in_the_environment_is_an_error_that_names_it(
    replica: Path, history: History, option: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = history.write(replica)
    monkeypatch.setenv(ENVIRONMENT[option], value)
    with pytest.raises(ConfigError) as caught:
        open_uri(f"file:x.db?vfs=litestream&replica_url={quote(url, safe='')}")
    assert isinstance(caught.value, apsw.CantOpenError)
    assert ENVIRONMENT[option] in str(caught.value) or option in str(caught.value)
    assert value[:60] in str(caught.value)


@pytest.mark.parametrize(("option", "value"), BAD_VALUES)
def test_a_bad_option_of_configure_is_an_error_at_the_latest_when_it_is_used(
    replica: Path, history: History, option: str, value: str
) -> None:
    url = history.write(replica)
    name = next(_names)
    with pytest.raises(ConfigError) as caught:
        lazyreplica.configure(name, url, **{option: value})
        open_uri(f"file:{name}?vfs=litestream")
    assert value[:60] in str(caught.value) and option in str(caught.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("hydrate", []),
        ("hydrate_max", 1.5),
        ("hydrate_max", True),
        ("cache_size", b"1"),
        ("poll_interval", "9" * 400),
        ("poll_interval", float("nan")),
        ("poll_interval", float("inf")),
        ("poll_interval", False),
        ("read_timeout", -1),
        ("hydration_path", 5),
        ("hydration_path", ""),
    ],
)
def test_a_value_of_another_type_is_an_error(option: str, value: object) -> None:
    with pytest.raises(ConfigError):
        lazyreplica.configure("types.db", "file:///nowhere", **{option: value})


ASKED: dict[str, Callable[[str], object]] = {
    "connect": lambda name: lazyreplica.connect("file:///nowhere", **{name: "1"}),
    "configure": lambda name: lazyreplica.configure("unknown.db", "file:///nowhere", **{name: "1"}),
}


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("name", ["hydrated", "Hydrate", "replica_url", "vfs", "immutable"])
def test_an_unknown_option_is_an_error_that_names_those_there_are(asked: str, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ASKED[asked](name)
    assert repr(name) in str(caught.value)
    assert all(known in str(caught.value) for known in OPTION_NAMES)


def test_a_database_needs_a_name() -> None:
    with pytest.raises(ConfigError, match="name"):
        lazyreplica.configure("", "file:///nowhere")


def test_writing_a_pragma_is_an_error_that_says_so(replica: Path, history: History) -> None:
    with opened(history.write(replica), **STILL) as connection:
        for pragma in ("litestream_lag", "litestream_hydration_progress", "litestream_hydration_file"):
            with pytest.raises(ConfigError, match="only be read") as caught:
                connection.execute(f"PRAGMA {pragma} = 5")
            assert isinstance(caught.value, apsw.SQLError)


def test_functions_on_a_plain_database_are_errors_that_say_so() -> None:
    connection = apsw.Connection("file:plain?mode=memory&vfs=unix", flags=apsw.SQLITE_OPEN_URI | 6)
    try:
        for function in ("litestream_txid", "litestream_time", "litestream_lag"):
            with pytest.raises(ConfigError, match="not a replica") as caught:
                connection.execute(f"SELECT {function}()").fetchall()
            assert isinstance(caught.value, apsw.SQLError)
        with pytest.raises(ConfigError, match="not a replica"):
            lazyreplica.refresh(connection)
        with pytest.raises(ConfigError, match="not a replica"):
            lazyreplica.wait_for(connection, 1, 0.1)
        with pytest.raises(ConfigError, match="nosuch"):
            lazyreplica.refresh(connection, "nosuch")
    finally:
        connection.close()


@pytest.mark.parametrize("txid", ["1", "000000000000000G", "00000000000000A4", ""])
def test_waiting_for_what_is_no_txid_is_an_error(replica: Path, history: History, txid: str) -> None:
    with opened(history.write(replica), **STILL) as connection, pytest.raises(LazyReplicaError, match="TXID"):
        lazyreplica.wait_for(connection, txid, 0.1)
