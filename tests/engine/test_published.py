"""What appears on disk: at hydration_path and in the directory beside it, when, whole, and nobody else's."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from replicas import (
    FULL,
    ReplicaDirectory,
    SpyStore,
    complete,
    hydration_file,
    long_replica,
    opened,
    pinned,
    read_database,
    start,
    until,
)

from lazyreplica import filling
from lazyreplica.errors import ConfigError
from lazyreplica.replica import Replica
from lazyreplica.storage import StoredFile
from lazyreplica.workdir import WorkDirectory


def test_hydration_path_appears_whole_and_goes_at_close(directory: ReplicaDirectory, tmp_path: Path) -> None:
    history = long_replica(directory)
    target = tmp_path / "local.db"
    with opened(directory, hydration_path=str(target), **FULL) as replica:
        assert replica.hydration_file == str(target)
        until(lambda: complete(replica))
        until(target.exists)
        assert target.read_bytes() == history.database()
    assert not target.exists()
    assert not Path(f"{target}.d").exists()


@pytest.mark.parametrize("kind", ["file", "directory", "dangling link"])
def test_what_stands_at_hydration_path_is_refused_and_untouched(
    directory: ReplicaDirectory, tmp_path: Path, kind: str
) -> None:
    start(directory.path, 5)
    target = tmp_path / "mine.db"
    if kind == "file":
        target.write_text("precious")
    elif kind == "directory":
        target.mkdir()
    else:
        target.symlink_to(tmp_path / "nowhere")
    with (
        pytest.raises(ConfigError, match="will not be overwritten"),
        opened(directory, hydration_path=str(target), **FULL),
    ):
        pass
    assert os.path.lexists(target)
    if kind == "file":
        assert target.read_text() == "precious"


# Regression (workdir.py, `open`): whatever stands in `<hydration_path>.d` is deleted, without a sign that it is ours.
def test_a_directory_of_somebody_else_beside_hydration_path_is_not_emptied(
    directory: ReplicaDirectory, tmp_path: Path
) -> None:
    start(directory.path, 5)
    (tmp_path / "app.d" / "sub").mkdir(parents=True)
    (tmp_path / "app.d" / "sub" / "settings").write_text("precious")
    try:
        with opened(directory, hydration_path=str(tmp_path / "app"), **FULL):
            pass
    except ConfigError:
        pass
    assert (tmp_path / "app.d" / "sub" / "settings").read_text() == "precious"


# Regression (workdir.py, `publish`): `staged.replace(target)` overwrites whatever has appeared there since the open.
def test_a_file_that_appears_at_hydration_path_meanwhile_is_not_overwritten(
    directory: ReplicaDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(directory.path, 5)
    target = tmp_path / "local.db"
    published = threading.Event()
    original = WorkDirectory.publish

    def publish(self: WorkDirectory, database: Path) -> None:
        target.write_bytes(b"precious")
        try:
            original(self, database)
        finally:
            published.set()

    monkeypatch.setattr(WorkDirectory, "publish", publish)
    with opened(directory, hydration_path=str(target), **FULL):
        assert published.wait(5)
        assert target.read_bytes() == b"precious"
    assert target.read_bytes() == b"precious"


# Regression (hydrator.py, `_fill`): it publishes while the log still holds pages of the head (an older snapshot is
# pinned): the file at hydration_path is then a mixture of two transactions.
def test_what_is_published_is_one_transaction(
    directory: ReplicaDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_kept: None
) -> None:
    history, _ = start(directory.path, 20)
    spy = SpyStore(directory.url)
    monkeypatch.setattr(filling, "CHUNK", 2000)
    monkeypatch.setattr(filling.Filler, "_stand_back", lambda self: None)
    go_on = threading.Event()
    reached = threading.Event()

    def hold(file: StoredFile, offset: int, length: int) -> None:
        if offset and threading.current_thread().name == "lazyreplica-hydrator":
            reached.set()
            assert go_on.wait(5)

    spy.before_read = hold
    target = tmp_path / "local.db"
    with opened(spy, hydration_path=str(target), **FULL) as replica:
        assert reached.wait(5)  # the first few pages are in the file, as of TXID 1
        with pinned(replica):
            history.commit([1, 2, 15, 16])
            directory.sync(history)
            replica.refresh()
            go_on.set()
            until(lambda: replica.hydration_progress >= 99.9)  # all local, and published after the reader
            if target.exists():
                assert target.read_bytes() in (history.database(1), history.database(2))
        until(target.exists)
        until(lambda: target.read_bytes() == history.database(2))


# Regression (hydrator.py, `replace`): between `head.replace` and the assignment of the new copy the thread fills the
# old copy with pages of the new history, and marks the layers as finished.
def test_a_new_history_is_never_mixed_into_the_old_copy(
    directory: ReplicaDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_kept: None
) -> None:
    start(directory.path, 20)
    target = tmp_path / "local.db"
    with opened(directory, hydration_path=str(target), **FULL) as replica:
        until(target.exists)
        original = WorkDirectory.new_copy

        def slowly(self: WorkDirectory) -> Path:
            assert replica._hydrator is not None
            replica._hydrator._wake.set()  # as a transaction that ends at this moment does
            threading.Event().wait(0.2)
            return original(self)

        monkeypatch.setattr(WorkDirectory, "new_copy", slowly)
        directory.wipe()
        other, _ = start(directory.path, 12, name="other")
        replica.refresh()
        until(lambda: complete(replica))
        assert read_database(replica) == other.database()
        until(lambda: target.exists() and target.read_bytes() == other.database(), 5)


def test_two_replicas_with_one_hydration_path_share_nothing(
    directory: ReplicaDirectory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    history, _ = start(directory.path, 9)
    target = tmp_path / "local.db"
    options = {"hydration_path": str(target), **FULL}
    with opened(directory, **options) as first:
        until(target.exists)
        with opened(directory, **options) as second:
            until(lambda: complete(second))
            assert "is in use by another process" in caplog.text
            assert second.hydration_file not in (None, str(target))
            assert hydration_file(second).read_bytes() == history.database()
        assert target.read_bytes() == history.database()
        assert complete(first)
    assert not target.exists()


def test_nothing_is_left_of_a_private_copy(directory: ReplicaDirectory, tmp_path: Path) -> None:
    start(directory.path, 9)
    with opened(directory, **FULL) as replica:
        until(lambda: complete(replica))
        assert list(leftovers(tmp_path))
    assert not list(leftovers(tmp_path))


def leftovers(tmp_path: Path) -> Iterator[Path]:
    return (tmp_path / "tmp").glob("lazyreplica-*/*")


# Regression (hydrator.py, `replace`): the copy of the old history stays in the directory until the replica is closed.
def test_the_copy_of_an_old_history_gives_its_space_back(directory: ReplicaDirectory, tmp_path: Path) -> None:
    with opened_after_wipes(directory, 3) as replica:
        until(lambda: complete(replica))
        copies = [path for path in (tmp_path / "tmp").rglob("database") if path.is_file()]
        assert copies == [hydration_file(replica)]


@contextlib.contextmanager
def opened_after_wipes(directory: ReplicaDirectory, wipes: int) -> Iterator[Replica]:
    start(directory.path, 20)
    with opened(directory, **FULL) as replica:
        for n in range(wipes):
            until(lambda: complete(replica))
            directory.wipe()
            start(directory.path, 20, name=n)
            replica.refresh()
        yield replica
