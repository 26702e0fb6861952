"""Fixtures for the end-to-end tests: replicas written by the real Litestream."""

from __future__ import annotations

from pathlib import Path

import pytest
from e2e_helpers import file_url

from support.data import build_social, build_varied
from support.litestream import replicate_once


@pytest.fixture
def file_url_(file_replica_dir: Path) -> str:
    """The URL of ``file_replica_dir``."""
    return file_url(file_replica_dir)


@pytest.fixture(scope="session")
def social(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A database and its replica in local files. Nobody changes either."""
    directory = tmp_path_factory.mktemp("social")
    db = build_social(directory / "social.db")
    replicate_once(db, directory / "replica")
    return db, file_url(directory / "replica")


@pytest.fixture(scope="session")
def varied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """As ``social``, with one of everything that lays out pages differently."""
    directory = tmp_path_factory.mktemp("varied")
    db = build_varied(directory / "varied.db")
    replicate_once(db, directory / "replica")
    return db, file_url(directory / "replica")
