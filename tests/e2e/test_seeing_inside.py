"""Statistics as users ask for them: a pragma, functions, and a store that counts what it was asked."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import apsw
import pytest
from e2e_helpers import one, open_replica

import lazyreplica
from lazyreplica.errors import ConfigError
from support.faultproxy import Fault, FaultProxy
from support.servers import S3Server

PROJECT = Path(__file__).parents[2]


def test_requests_are_those_that_s3_sees(
    social: tuple[Path, str], rclone: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = rclone.new_bucket()
    for name, value in rclone.env.items():
        monkeypatch.setenv(name, value)
    lazyreplica.publish(social[0], rclone.url(bucket, "app"))
    with FaultProxy(rclone) as proxy:
        proxy.add(Fault.SLOW_DOWN, key="ltx$", count=3)
        url = rclone.url(bucket, "app", endpoint=proxy.endpoint)
        with open_replica(url, prefetch="none", poll_interval=0) as db:
            db.execute("pragma integrity_check").fetchall()
            lazyreplica.refresh(db)
            stats = lazyreplica.stats(db)
            assert stats.requests == sum(proxy.requests.values())
            assert stats.retries == 3
            assert (stats.listings, stats.polls, stats.failures) == (proxy.requests["LIST"], 1, 0)
            assert stats.misses + stats.ahead_hits > 10 and stats.bytes > 50_000


def test_pragma_function_and_collector_agree(social: tuple[Path, str]) -> None:
    url = social[1]
    with open_replica(url, poll_interval=0) as db, open_replica(url, poll_interval=0) as other:
        one(other, "select count(*) from sqlite_master")
        db.execute("attach ':memory:' as scratch")
        stats = lazyreplica.stats(db)
        assert json.loads(one(db, "PRAGMA litestream_stats")) == stats.as_dict()
        assert list(stats.as_dict().values())[:2] == [url, one(db, "PRAGMA litestream_txid")]
        assert lazyreplica.all_stats() == {url: stats}
        with pytest.raises(ConfigError, match="can only be read"):
            db.execute("PRAGMA litestream_stats = 1")
        with pytest.raises(ConfigError, match="not a replica"):
            lazyreplica.stats(db, "scratch")
    assert lazyreplica.all_stats() == {}
    assert isinstance(stats, lazyreplica.Stats)


def test_mapped_pages_are_counted_by_sqlite(social: tuple[Path, str]) -> None:
    """What docs/observability.md says of pages that we do not count."""
    with open_replica(social[1], hydrate=True) as db:
        while one(db, "PRAGMA litestream_hydration_progress") != "100.0":
            pass
        before = lazyreplica.stats(db)
        with open_replica(social[1], hydrate=True) as fresh:
            table = one(fresh, "select name from sqlite_master where type = 'table' limit 1")
            fresh.execute(f"select * from {table}").fetchall()
            read = fresh.status(apsw.SQLITE_DBSTATUS_CACHE_MISS)[0]
        after = lazyreplica.stats(db)
        counted = (after.memory_hits, after.ahead_hits, after.misses)
        assert sum(counted) - sum((before.memory_hits, before.ahead_hits, before.misses)) <= 3  # page 1
        assert read > 10


def test_every_logger_is_lazyreplicas() -> None:
    for path in [*PROJECT.glob("src/**/*.py"), *PROJECT.glob("vfs/**/*.py")]:
        text = path.read_text()
        name = ".".join(path.relative_to(PROJECT).with_suffix("").parts[1:])
        for given in re.findall(r"getLogger\((.*?)\)", text):
            assert (name if given == "__name__" else given.strip('"')).startswith("lazyreplica."), path
            assert given != "__name__" or not name.startswith("lazyreplica_vfs"), path
        # Put together only when somebody reads it.
        assert not re.search(r"""\blog(?:ger)?\.(?:debug|info|warning|error|exception)\(\s*f["']""", text), path
    assert logging.getLogger("lazyreplica").handlers == []
