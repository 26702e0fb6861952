"""Reads while storage misbehaves: the right rows, or one clear error in time; and afterwards all is well again."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from pathlib import Path

import apsw
import pytest
from faulty import OBJECT, QUERY, SMALL, Published, fails, opened, rows

import lazyreplica
from lazyreplica.errors import (
    AccessDenied,
    LazyReplicaError,
    LTXError,
    SnapshotGone,
    StoreError,
    StoreUnavailable,
)
from lazyreplica.storage import connection as connection_module
from support.databases import assert_intact
from support.faultproxy import Fault, FaultProxy
from support.waiting import eventually

pytestmark = pytest.mark.slow

PASSING = [
    (Fault.DELAY, {"seconds": 0.1, "count": 5}),
    (Fault.SERVER_ERROR, {"count": 3}),
    (Fault.SLOW_DOWN, {"count": 3}),
    (Fault.TOO_MANY, {"count": 3}),
    (Fault.RESET, {"count": 3}),
    (Fault.TRUNCATED, {"count": 3}),
    (Fault.FLIPPED, {"count": 1}),
    (Fault.WHOLE_BODY, {"count": 3}),
    (Fault.NOT_FOUND, {"count": 1}),
]
"""Faults that nobody should notice when they pass."""


@pytest.mark.parametrize(("fault", "options"), PASSING, ids=lambda value: getattr(value, "value", ""))
def test_a_fault_that_passes_is_not_noticed(
    proxy: FaultProxy, social: Published, fault: Fault, options: dict[str, float]
) -> None:
    with opened(social.url(proxy), read_timeout=20) as connection, proxy.during(fault, key=OBJECT, **options) as rule:
        assert rows(connection) == social.rows()
        assert rule.strikes == options["count"]


@pytest.mark.parametrize(("fault", "options"), PASSING, ids=lambda value: getattr(value, "value", ""))
def test_a_fault_that_passes_is_not_noticed_at_open(
    proxy: FaultProxy, social: Published, fault: Fault, options: dict[str, float]
) -> None:
    # two at most: an open makes few requests of which each may fail
    options = {**options, "count": min(options["count"], 2)}
    with proxy.during(fault, key=OBJECT, **options) as rule, opened(social.url(proxy), read_timeout=20) as connection:
        assert rows(connection) == social.rows()
        assert rule.strikes == options["count"]


@pytest.mark.parametrize(("prefetch", "chance"), [("all", 0.1), ("none", 0.02)])
def test_a_shower_of_faults_never_gives_a_wrong_row(
    proxy: FaultProxy, social: Published, prefetch: str, chance: float
) -> None:
    faults = [Fault.SERVER_ERROR, Fault.SLOW_DOWN, Fault.TOO_MANY, Fault.RESET, Fault.TRUNCATED, Fault.WHOLE_BODY]
    rules = [
        proxy.add(fault, key=OBJECT, chance=chance, seed=number, **({"seconds": 0.02} if fault is Fault.DELAY else {}))
        for number, fault in enumerate([*faults, Fault.DELAY])
    ]
    with opened(social.url(proxy), read_timeout=60, prefetch=prefetch) as connection:
        assert rows(connection) == social.rows()
        assert rows(connection, "SELECT * FROM users ORDER BY name") == social.rows("SELECT * FROM users ORDER BY name")
    assert sum(rule.strikes for rule in rules) >= 4


LASTING = [
    (Fault.STALL, StoreUnavailable),
    (Fault.SERVER_ERROR, StoreUnavailable),
    (Fault.SLOW_DOWN, StoreUnavailable),
    (Fault.TOO_MANY, StoreUnavailable),
    (Fault.RESET, StoreUnavailable),
    (Fault.TRUNCATED, StoreUnavailable),
    (Fault.WRONG_RANGE, StoreError),
    (Fault.EXPIRED, AccessDenied),
]
READ_TIMEOUT = 1.5


@pytest.mark.parametrize(("fault", "error"), LASTING, ids=lambda value: getattr(value, "value", ""))
def test_a_lasting_fault_is_one_clear_error_in_time_and_heals(
    proxy: FaultProxy, social: Published, fault: Fault, error: type[LazyReplicaError]
) -> None:
    with opened(social.url(proxy), read_timeout=READ_TIMEOUT) as connection:
        with proxy.during(fault, key=OBJECT) as rule:
            with fails(error, apsw.IOError, READ_TIMEOUT):
                rows(connection)
            assert rule.strikes
        assert rows(connection) == social.rows()


@pytest.mark.parametrize(
    ("fault", "error"), [*LASTING, (Fault.NOT_FOUND, LazyReplicaError)], ids=lambda value: getattr(value, "value", "")
)
def test_a_lasting_fault_is_one_clear_error_at_open_and_heals(
    proxy: FaultProxy, social: Published, fault: Fault, error: type[LazyReplicaError]
) -> None:
    with proxy.during(fault, key=OBJECT) as rule:
        with fails(error, apsw.CantOpenError, READ_TIMEOUT):
            lazyreplica.connect(social.url(proxy), read_timeout=READ_TIMEOUT)
        assert rule.strikes
    with opened(social.url(proxy)) as connection:
        assert rows(connection) == social.rows()


def test_flipped_bytes_are_an_error_and_never_a_row(proxy: FaultProxy, small: Published) -> None:
    """In a file that is fetched whole, wherever the flipped byte lies: its checksum tells."""
    with proxy.during(Fault.FLIPPED, key=OBJECT) as rule:
        for _ in range(20):
            with fails(LTXError, apsw.CantOpenError, READ_TIMEOUT):
                lazyreplica.connect(small.url(proxy), read_timeout=READ_TIMEOUT)
        assert rule.strikes == 40, "each was fetched twice"
    with opened(small.url(proxy)) as connection:
        assert rows(connection, SMALL) == small.rows(SMALL)


@pytest.mark.parametrize("seed", range(4))
def test_a_flipped_byte_does_not_get_into_the_local_copy(proxy: FaultProxy, social: Published, seed: int) -> None:
    """Of a large file the hydrator reads every byte, and its checksum is of every byte."""
    with (
        proxy.during(Fault.FLIPPED, key=OBJECT, count=1, seed=seed) as rule,
        opened(social.url(proxy), hydrate=True, read_timeout=READ_TIMEOUT) as connection,
    ):
        eventually(lambda: connection.pragma("litestream_hydration_progress") == "100.0")
        assert rule.strikes == 1
        assert rows(connection) == social.rows()
        copy = Path(str(connection.pragma("litestream_hydration_file")))
        with contextlib.closing(sqlite3.connect(f"file:{copy}?immutable=1", uri=True)) as local:
            assert_intact(local)
            assert local.execute(QUERY).fetchall() == social.rows()


def test_an_object_that_is_not_found_is_an_error_and_heals(proxy: FaultProxy, social: Published) -> None:
    with opened(social.url(proxy), read_timeout=READ_TIMEOUT) as connection:
        with proxy.during(Fault.NOT_FOUND, key=OBJECT) as rule:
            with fails(SnapshotGone, apsw.BusyError, READ_TIMEOUT):
                rows(connection)
            assert rule.strikes
        assert rows(connection) == social.rows()


def test_a_refused_connection_is_an_error_and_heals(proxy: FaultProxy, social: Published) -> None:
    with opened(social.url(proxy), read_timeout=READ_TIMEOUT) as connection:
        proxy.refuse()
        with fails(StoreUnavailable, apsw.IOError, READ_TIMEOUT):
            rows(connection)
        with fails(StoreUnavailable, apsw.CantOpenError, READ_TIMEOUT):
            apsw.Connection(
                f"file:x.db?vfs=litestream&replica_url={social.server.url('other', endpoint=proxy.endpoint)}",
                flags=apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI,
            )
        proxy.listen()
        assert rows(connection) == social.rows()


def test_a_request_that_is_never_answered_is_made_again(
    proxy: FaultProxy, social: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "_SILENCE_SECONDS", 0.5)
    with (
        opened(social.url(proxy), read_timeout=20, prefetch="all") as connection,
        proxy.during(Fault.STALL, key=OBJECT, count=2) as rule,
    ):
        began = time.monotonic()
        assert rows(connection) == social.rows()
        assert rule.strikes == 2
        assert time.monotonic() - began < 5
