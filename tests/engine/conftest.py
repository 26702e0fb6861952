from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from replicas import ReplicaDirectory, engine_threads

from lazyreplica import layers
from lazyreplica.config import ENVIRONMENT
from lazyreplica.naming import URL_VARIABLE
from support.waiting import eventually


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test has its own place for private local copies, no options from outside, and leaves no thread behind."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    for variable in (*ENVIRONMENT.values(), URL_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    yield
    # ... but for those that open a remote store: one may be looking up a host name (tests/conftest.py waits for them)
    eventually(
        lambda: not [name for name in engine_threads() if "-open" not in name], what="threads end with their replica"
    )


@pytest.fixture
def directory(tmp_path: Path) -> ReplicaDirectory:
    return ReplicaDirectory(tmp_path / "replica")


@pytest.fixture
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files are not fetched whole at open: the hydrator has to read them."""
    monkeypatch.setattr(layers, "KEEP_FILE", 0)
    monkeypatch.setattr(layers, "KEEP_TOTAL", 0)
    monkeypatch.setattr(layers, "PASSING_TOTAL", 0)
