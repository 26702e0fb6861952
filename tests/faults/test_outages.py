"""Storage that is away for a while: what is local is read on, the lag tells, afterwards everything goes on by itself.

"Minutes" are seconds here: nothing in the library counts outages by more than `read_timeout`, the pause between polls
and `max_staleness`, which are small in these tests.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest
from faulty import Published, fails, opened, rows

import lazyreplica
from lazyreplica.errors import AccessDenied, LineageChanged, StoreUnavailable, WaitTimeout
from lazyreplica.layers import KEEP_FILE
from support.bank import build_bank, check_bank, run
from support.faultproxy import Fault, FaultProxy
from support.litestream import Litestream, replicating
from support.servers import S3Server
from support.waiting import eventually

pytestmark = pytest.mark.slow

ACCOUNTS = 6000
"""Enough that the replica's first file is not fetched whole at open."""
POLL = 0.1
READ_TIMEOUT = 1.0
FOLLOWING = {"poll_interval": POLL, "read_timeout": READ_TIMEOUT, "max_staleness": 0.5, "cache_size": "32MiB"}


@pytest.fixture
def primary(rclone: S3Server, tmp_path: Path) -> Iterator[tuple[Path, Litestream, Published]]:
    """A bank, the Litestream that replicates it past the proxy, and where."""
    db = build_bank(tmp_path / "bank.db", ACCOUNTS)
    bucket = rclone.new_bucket()
    with replicating(db, rclone.url(bucket, "app"), env=rclone.env, sync_interval="50ms") as writer:
        writer.wait_synced()
        yield db, writer, Published(rclone, bucket, db)


def lag(connection: apsw.Connection) -> float:
    return float(str(connection.pragma("litestream_lag")))


def bank(connection: apsw.Connection) -> int:
    """How many transfers one read transaction sees; everything in it is checked."""
    connection.execute("BEGIN")
    try:
        return check_bank(connection).n
    finally:
        if connection.in_transaction:
            connection.execute("COMMIT")


def is_local(connection: apsw.Connection) -> bool:
    return connection.pragma("litestream_hydration_progress") == "100.0"


@contextlib.contextmanager
def outage(proxy: FaultProxy, kind: str) -> Iterator[None]:
    """Nobody listens, nobody answers, or everything is an error."""
    if kind == "refused":
        proxy.refuse()
        yield
        proxy.listen()
        return
    with proxy.during(Fault.STALL if kind == "silent" else Fault.SERVER_ERROR) as rule:
        yield
        assert rule.strikes


@pytest.mark.parametrize("kind", ["refused", "silent", "errors"])
def test_a_local_replica_is_read_on_and_catches_up_by_itself(
    proxy: FaultProxy, primary: tuple[Path, Litestream, Published], kind: str
) -> None:
    db, writer, published = primary
    with opened(published.url(proxy), **FOLLOWING, hydrate=True) as connection:
        eventually(lambda: is_local(connection) and lag(connection) >= 0)
        before = bank(connection)
        with outage(proxy, kind):
            run(db, transactions=20)
            writer.wait_synced()
            lags, slowest = [], 0.0
            until = time.monotonic() + 4
            while time.monotonic() < until:
                began = time.monotonic()
                assert bank(connection) == before
                slowest = max(slowest, time.monotonic() - began)
                lags.append(lag(connection))
                time.sleep(0.1)
            assert lags == sorted(lags) and lags[-1] > 3, "the lag grows, and never shrinks"
            assert slowest < 2.5, "a reader may look for a poll that is under way once"
        eventually(lambda: bank(connection) == before + 20)
        eventually(lambda: lag(connection) < READ_TIMEOUT)


def test_what_is_not_local_is_an_error_until_storage_is_back(
    proxy: FaultProxy, primary: tuple[Path, Litestream, Published]
) -> None:
    db, writer, published = primary
    with opened(published.url(proxy), **{**FOLLOWING, "cache_size": 0}) as connection:
        txid = writer.wait_synced()
        proxy.refuse(5)
        errors = 0
        until = time.monotonic() + 4
        while time.monotonic() < until:
            with fails(StoreUnavailable, apsw.IOError, READ_TIMEOUT):
                rows(connection, "SELECT sum(balance), count(owner) FROM accounts")
            errors += 1
        assert errors >= 3, "each attempt ends in time"
        assert eventually(lambda: _sum(connection)) == [(1000 * ACCOUNTS, ACCOUNTS)]
        run(db, transactions=1)
        lazyreplica.wait_for(connection, max(txid + 1, writer.wait_synced()))
        assert bank(connection) == 1


def _sum(connection: apsw.Connection) -> list[tuple[int, int]]:
    try:
        return rows(connection, "SELECT sum(balance), count(owner) FROM accounts")
    except StoreUnavailable:
        return []


def test_following_goes_through_a_shower_of_faults(
    proxy: FaultProxy, primary: tuple[Path, Litestream, Published]
) -> None:
    db, writer, published = primary
    kinds = [Fault.SERVER_ERROR, Fault.RESET, Fault.TRUNCATED, Fault.WHOLE_BODY, Fault.TOO_MANY]
    rules = [proxy.add(kind, key=r"\.ltx$", chance=0.1, seed=number) for number, kind in enumerate(kinds)]
    # of larger files pages are read alone, and a frame carries no checksum
    rules.append(proxy.add(Fault.FLIPPED, key=r"\.ltx$", chance=0.1, seed=9, largest=KEEP_FILE))
    # Every second request fails: within 5 s one in a few hundred reads rightly gives up.
    with opened(published.url(proxy), **{**FOLLOWING, "read_timeout": 60}) as connection:
        seen = [bank(connection)]
        for _ in range(12):
            run(db, transactions=2)
            writer.wait_synced()
            seen.append(bank(connection))
        eventually(lambda: bank(connection) == 24)
        assert seen == sorted(seen)
    assert sum(rule.strikes for rule in rules) > 3


def test_an_object_that_is_not_there_yet_does_not_stop_the_follower(
    proxy: FaultProxy, primary: tuple[Path, Litestream, Published]
) -> None:
    """404 for what the listing shows: it stays where it is, and goes on as soon as the file can be had."""
    db, writer, published = primary
    with opened(published.url(proxy), **FOLLOWING) as connection:
        before = bank(connection)
        with proxy.during(Fault.NOT_FOUND, key=r"\.ltx$") as rule:
            run(db, transactions=3)
            writer.wait_synced()
            eventually(lambda: rule.strikes > 5)
            assert bank(connection) == before
        eventually(lambda: bank(connection) == before + 3)


def test_one_stale_listing_changes_nothing(proxy: FaultProxy, primary: tuple[Path, Litestream, Published]) -> None:
    db, writer, published = primary
    with opened(published.url(proxy), **{**FOLLOWING, "poll_interval": 0}) as connection:
        for count in range(1, 6):
            run(db, transactions=1)
            writer.wait_synced()
            lazyreplica.refresh(connection)
            assert bank(connection) == count
            with proxy.during(Fault.STALE_LISTING, count=1) as rule:
                lazyreplica.refresh(connection)
                assert bank(connection) == count
                if count > 1:
                    assert rule.strikes == 1
            lazyreplica.refresh(connection)
            assert bank(connection) == count


def test_a_history_that_begins_again_during_an_outage_is_noticed_after_it(
    proxy: FaultProxy, rclone: S3Server, primary: tuple[Path, Litestream, Published], tmp_path: Path
) -> None:
    """Wiped, and grown beyond where we stood, while nobody could look: TXIDs that are known name other transactions."""
    db, writer, published = primary
    run(db, transactions=1)
    txid = writer.wait_synced()
    with opened(published.url(proxy), **FOLLOWING, hydrate=True) as connection:
        eventually(lambda: is_local(connection))
        assert bank(connection) == 1
        proxy.refuse()
        writer.stop()
        client = rclone.client()
        for key in rclone.keys(published.bucket):
            client.delete_object(Bucket=published.bucket, Key=key)
        other = build_bank(tmp_path / "other.db", accounts=700)
        with replicating(other, rclone.url(published.bucket, "app"), env=rclone.env, sync_interval="50ms") as second:
            while second.wait_synced() <= txid + 2:
                run(other, transactions=1)
            assert bank(connection) == 1, "during the outage it is what it was"
            proxy.listen()
            with pytest.raises(LineageChanged) as caught:
                eventually(lambda: bank(connection) != 1)
            assert isinstance(caught.value, apsw.CantOpenError)
            with pytest.raises(LineageChanged):
                bank(connection)
        connection.close()
        with opened(published.url(proxy)) as fresh, contextlib.closing(sqlite3.connect(other)) as truth:
            query = "SELECT * FROM accounts ORDER BY id"
            assert rows(fresh, query) == truth.execute(query).fetchall()


def test_wait_for_and_refresh_end_in_time_during_an_outage(
    proxy: FaultProxy, primary: tuple[Path, Litestream, Published]
) -> None:
    _, _, published = primary
    with opened(published.url(proxy), **{**FOLLOWING, "poll_interval": 0}) as connection:
        with proxy.during(Fault.STALL):
            began = time.monotonic()
            with pytest.raises(StoreUnavailable):
                lazyreplica.refresh(connection)
            assert time.monotonic() - began < READ_TIMEOUT + 2
            with pytest.raises(WaitTimeout):
                lazyreplica.wait_for(connection, 10**6, 0.5)
        lazyreplica.refresh(connection)
        assert lag(connection) < 2


def test_credentials_that_expire_are_an_error_that_says_so_and_nothing_is_lost(
    proxy: FaultProxy, social: Published
) -> None:
    with opened(social.url(proxy), read_timeout=READ_TIMEOUT) as connection:
        with proxy.during(Fault.EXPIRED) as rule:
            with fails(AccessDenied, apsw.IOError, READ_TIMEOUT):
                rows(connection)
            assert rule.strikes
            with pytest.raises(AccessDenied):
                lazyreplica.refresh(connection)
        assert rows(connection) == social.rows()
