"""What the fault tests share: opening a replica behind the proxy, and what an error must look like."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apsw
import pytest

import lazyreplica
from lazyreplica.errors import LazyReplicaError
from support.faultproxy import FaultProxy
from support.servers import S3Server

QUERY = "SELECT id, user_id, created, title, body FROM posts WHERE id % 7 = 3 ORDER BY id"
SMALL = "SELECT id, balance FROM accounts ORDER BY id"
OBJECT = r"\.ltx$"
STILL = {"hydrate": False, "poll_interval": 0, "cache_size": 0, "prefetch": "none"}
"""Every read is a request, and none is made but for a read."""
SLACK = 2.0
"""Seconds that a loaded machine may add to a deadline."""


@dataclass(frozen=True)
class Published:
    """A database and its replica."""

    server: S3Server
    bucket: str
    db: Path

    def url(self, proxy: FaultProxy) -> str:
        return self.server.url(self.bucket, "app", endpoint=proxy.endpoint)

    def rows(self, sql: str = QUERY) -> list[Any]:
        with contextlib.closing(sqlite3.connect(self.db)) as con:
            return con.execute(sql).fetchall()


@contextlib.contextmanager
def opened(url: str, **options: Any) -> Iterator[apsw.Connection]:
    connection = lazyreplica.connect(url, **{**STILL, **options})
    try:
        # SQLite's own cache must not answer for us
        connection.pragma("cache_size", 5)
        yield connection
    finally:
        connection.close()


def rows(connection: apsw.Connection, sql: str = QUERY) -> list[Any]:
    return connection.execute(sql).fetchall()


@contextlib.contextmanager
def fails(ours: type[LazyReplicaError], theirs: type[apsw.Error], within: float) -> Iterator[None]:
    """The block raises one error that is both, within so many seconds, and that tells what it came from."""
    began = time.monotonic()
    with pytest.raises(ours) as caught:
        yield
    taken = time.monotonic() - began
    assert isinstance(caught.value, theirs), type(caught.value).__mro__
    assert isinstance(caught.value.__cause__, ours), "the engine's own error is the cause"
    assert str(caught.value)
    assert taken < within + SLACK, f"{taken:.1f} s: {caught.value}"


def eventually(condition: Any, timeout: float = 10) -> Any:
    deadline = time.monotonic() + timeout
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"not within {timeout:g} s"
        time.sleep(0.02)
    return answer
