"""Private directories: whoever opens one removes those of processes that were killed."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from lazyreplica.local import directory
from lazyreplica.local.directory import CopyDirectory


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"lazyreplica-{os.getuid()}"


def test_what_a_killed_process_left_is_removed(root: Path) -> None:
    left = CopyDirectory.open(None)
    left.abandon()
    used = CopyDirectory.open(None)
    own = CopyDirectory.open(None)
    assert set(root.iterdir()) == {used.path, own.path}
    used.close()
    own.close()
    assert not list(root.iterdir())


def test_a_directory_that_its_owner_removes_in_that_moment(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at its lock, which is free by then, and its removal."""
    left = CopyDirectory.open(None)
    left.abandon()
    real = directory._try_lock

    def lock(fd: int, kind: int) -> bool:
        shutil.rmtree(left.path, ignore_errors=True)
        return real(fd, kind)

    monkeypatch.setattr(directory, "_try_lock", lock)
    own = CopyDirectory.open(None)
    assert list(root.iterdir()) == [own.path]
    own.close()
