"""Replicas behind a proxy that misbehaves on demand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty import Published

from support.bank import build_bank
from support.data import build_social
from support.faultproxy import FaultProxy
from support.litestream import replicate_once
from support.servers import S3Server


@pytest.fixture
def proxy(rclone: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """In front of rclone; the environment holds the credentials."""
    for name, value in rclone.env.items():
        monkeypatch.setenv(name, value)
    with FaultProxy(rclone) as running:
        yield running


@pytest.fixture(scope="session")
def social(tmp_path_factory: pytest.TempPathFactory, rclone: S3Server, litestream: Path) -> Published:
    """A replica of one file, too large to be fetched whole at open: every cold page is a request. Nobody changes it."""
    db = build_social(tmp_path_factory.mktemp("social") / "social.db")
    bucket = rclone.new_bucket()
    replicate_once(db, rclone.url(bucket, "app"), env=rclone.env)
    return Published(rclone, bucket, db)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory, rclone: S3Server, litestream: Path) -> Published:
    """A replica of one file that is fetched whole at open."""
    db = build_bank(tmp_path_factory.mktemp("small") / "small.db", accounts=200)
    bucket = rclone.new_bucket()
    replicate_once(db, rclone.url(bucket, "app"), env=rclone.env)
    return Published(rclone, bucket, db)
