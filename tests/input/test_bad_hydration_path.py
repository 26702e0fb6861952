"""A place for the local copy that cannot be used: the replica goes on without; and nothing of anybody's is touched."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest
from handmade import SECONDS, History, make_history, opened

import lazyreplica
from lazyreplica.errors import ConfigError
from lazyreplica.local.base import Base

ROWS = "SELECT * FROM t ORDER BY id"


@pytest.fixture
def url(replica: Path, history: History) -> str:
    return history.write(replica)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def hydrated(connection: apsw.Connection) -> None:
    deadline = time.monotonic() + SECONDS
    while float(connection.pragma("litestream_hydration_progress")) < 100:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def appeared(path: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def goes_on_without(url: str, history: History, caplog: pytest.LogCaptureFixture, **options: object) -> str:
    with opened(url, hydrate=True, poll_interval=0, **options) as connection:
        assert connection.execute(ROWS).fetchall() == history.rows[2]
        assert float(connection.pragma("litestream_hydration_progress")) == 0
        assert connection.pragma("litestream_hydration_file") == ""
    found = [text for text in warnings_of(caplog) if "not hydrated" in text or "given up" in text]
    assert found, caplog.text
    return found[0]


# -- unwritable --


def test_a_path_below_a_file(url: str, history: History, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("hello")
    path = tmp_path / "file" / "copy.db"
    assert "file" in goes_on_without(url, history, caplog, hydration_path=str(path))
    assert (tmp_path / "file").read_text() == "hello"


def test_a_file_in_place_of_the_directory(
    url: str, history: History, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "copy.db.d").write_text("hello")
    goes_on_without(url, history, caplog, hydration_path=str(tmp_path / "copy.db"))
    assert (tmp_path / "copy.db.d").read_text() == "hello"


def test_a_dangling_link_in_place_of_the_directory(
    url: str, history: History, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "copy.db.d").symlink_to(tmp_path / "nowhere")
    goes_on_without(url, history, caplog, hydration_path=str(tmp_path / "copy.db"))


def test_a_path_that_is_too_long(url: str, history: History, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    goes_on_without(url, history, caplog, hydration_path=str(tmp_path / ("x" * 254)))


def test_no_temporary_directory(
    url: str, history: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    goes_on_without(url, history, caplog)


@contextlib.contextmanager
def mounted(directory: Path, *options: str) -> Iterator[Path]:
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(directory)]
    if sys.platform != "linux" or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount here")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def test_a_read_only_disk(url: str, history: History, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with mounted(tmp_path / "disk", "ro") as disk:
        assert "Read-only" in goes_on_without(url, history, caplog, hydration_path=str(disk / "copy.db"))


# -- full --


def test_a_disk_smaller_than_the_database(replica: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    history = make_history(tmp_path, rows=5000)
    with mounted(tmp_path / "disk", "size=256k") as disk:
        text = goes_on_without(history.write(replica), history, caplog, hydration_path=str(disk / "copy.db"))
        assert "limit" in text
        assert list(disk.iterdir()) == []


def test_a_disk_without_room_for_a_file(
    url: str, history: History, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for inodes in range(2, 6):
        caplog.clear()
        with mounted(tmp_path / f"disk{inodes}", f"nr_inodes={inodes}", "size=10m") as disk:
            goes_on_without(url, history, caplog, hydration_path=str(disk / "copy.db"))


def test_no_room_for_the_copys_own_files(
    url: str, history: History, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = set(_private_directories())
    monkeypatch.setattr(os, "ftruncate", full)
    goes_on_without(url, history, caplog)
    assert set(_private_directories()) <= before


def _private_directories() -> list[Path]:
    return list((Path(tempfile.gettempdir()) / f"lazyreplica-{os.getuid()}").glob("replica-*"))


def wait_until_given_up(connection: apsw.Connection, caplog: pytest.LogCaptureFixture) -> str:
    deadline = time.monotonic() + SECONDS
    while True:
        found = [text for text in warnings_of(caplog) if "given up" in text]
        if found:
            return found[0]
        assert time.monotonic() < deadline, caplog.text
        time.sleep(0.005)


def test_a_disk_that_fills_up_while_hydrating(
    replica: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = make_history(tmp_path, rows=5000)
    url = history.write(replica)
    # What the disk says when it is asked first, before somebody else takes the room.
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with mounted(tmp_path / "disk", "size=256k") as disk:
        with opened(url, hydration_path=str(disk / "copy.db"), hydrate=True, poll_interval=0) as connection:
            assert "No space left" in wait_until_given_up(connection, caplog)
            assert connection.execute(ROWS).fetchall() == history.rows[2]
            assert float(connection.pragma("litestream_hydration_progress")) == 0
            assert not (disk / "copy.db").exists()
        assert list(disk.iterdir()) == []


def test_a_disk_that_is_full_when_a_transaction_arrives(
    replica: Path, history: History, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    url = history.write(replica, 1, 2)
    with opened(url, hydrate=True, poll_interval=0) as connection:
        hydrated(connection)

        def full(*_: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "pwrite", full)
        history.write(replica, 3)
        lazyreplica.refresh(connection)
        wait_until_given_up(connection, caplog)
        assert connection.execute(ROWS).fetchall() == history.rows[2]
        assert connection.pragma("litestream_hydration_file") == ""


_CHILD = """
import json, logging, resource, signal, sys, time
import lazyreplica
logging.basicConfig(level=logging.WARNING)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
connection = lazyreplica.connect(sys.argv[1], hydrate=True, poll_interval=0)
deadline = time.monotonic() + 10
while connection.pragma("litestream_hydration_file") and time.monotonic() < deadline:
    time.sleep(0.01)
print(connection.execute("SELECT count(*), sum(number) FROM t").fetchall())
connection.close()
"""


def test_a_limit_on_the_size_of_files(replica: Path, tmp_path: Path) -> None:
    history = make_history(tmp_path, rows=5000)
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, history.write(replica)], capture_output=True, text=True, timeout=60, check=True
    )
    assert eval(done.stdout) == [(5000, sum(row[2] for row in history.rows[2]))]
    assert "is not hydrated" in done.stderr and "Traceback" not in done.stderr


def test_too_few_descriptors_are_no_error_from_the_depths(url: str, history: History) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list(Path("/proc/self/fd").iterdir())) if sys.platform == "linux" else 50
    outcomes = set()
    try:
        for spare in range(8):
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + spare, hard))
            try:
                with opened(url, hydrate=True, poll_interval=0) as connection:
                    assert connection.execute(ROWS).fetchall() == history.rows[2]
                    outcomes.add("rows")
            except (lazyreplica.errors.LazyReplicaError, apsw.Error) as exc:
                outcomes.add(type(exc).__name__)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "rows" in outcomes


# -- taken --


@pytest.mark.parametrize("content", [b"", b"hello", b"SQLite format 3\0" + bytes(5000)])
def test_a_file_that_is_there_already_is_refused_and_kept(url: str, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mine.db"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="mine") as caught:
        lazyreplica.connect(url, hydration_path=str(path), hydrate=True)
    assert isinstance(caught.value, apsw.CantOpenError)
    assert "not be overwritten" in str(caught.value)
    assert path.read_bytes() == content
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["mine.db", "replica"]


def test_a_directory_or_link_that_is_there_already_is_refused_and_kept(url: str, tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "target").write_text("hello")
    (tmp_path / "good link").symlink_to(tmp_path / "target")
    for name in ("directory", "link", "good link"):
        with pytest.raises(ConfigError, match=name):
            lazyreplica.connect(url, hydration_path=str(tmp_path / name), hydrate=True)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "hello"


def test_a_file_that_is_there_already_beside_our_directory_is_refused_and_kept(url: str, tmp_path: Path) -> None:
    path = tmp_path / "copy.db"
    with opened(url, hydration_path=str(path), hydrate=True):
        appeared(path)
        # somebody replaces the copy while it is there
        path.unlink()
        path.write_text("mine")
    assert path.read_text() == "mine"
    with pytest.raises(ConfigError):
        lazyreplica.connect(url, hydration_path=str(path), hydrate=True)
    assert path.read_text() == "mine"


def test_a_foreign_directory_of_the_working_directorys_name_is_left_alone(
    url: str, tmp_path: Path, history: History
) -> None:
    """`<hydration_path>.d` may be somebody's configuration directory: nothing in it is ours to remove."""
    foreign = tmp_path / "copy.db.d"
    (foreign / "sub").mkdir(parents=True)
    (foreign / "precious.txt").write_text("mine")
    (foreign / "sub" / "also.txt").write_text("mine too")
    with (
        contextlib.suppress(ConfigError),
        opened(url, hydration_path=str(tmp_path / "copy.db"), hydrate=True) as connection,
    ):
        assert connection.execute(ROWS).fetchall() == history.rows[2]
    assert (foreign / "precious.txt").read_text() == "mine"
    assert (foreign / "sub" / "also.txt").read_text() == "mine too"


def test_a_link_to_a_foreign_directory_is_left_alone(url: str, tmp_path: Path) -> None:
    foreign = tmp_path / "home"
    foreign.mkdir()
    (foreign / "precious.txt").write_text("mine")
    (tmp_path / "copy.db.d").symlink_to(foreign)
    with (
        contextlib.suppress(ConfigError),
        opened(url, hydration_path=str(tmp_path / "copy.db"), hydrate=True),
    ):
        pass
    assert (foreign / "precious.txt").read_text() == "mine"


def test_a_copy_left_by_a_killed_process_is_used(url: str, tmp_path: Path, history: History) -> None:
    path = tmp_path / "copy.db"
    child = """
import os, sys, time, lazyreplica
connection = lazyreplica.connect(sys.argv[1], hydration_path=sys.argv[2], hydrate=True, poll_interval=0)
while float(connection.pragma("litestream_hydration_progress")) < 100 or not os.path.exists(sys.argv[2]):
    time.sleep(0.01)
os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", child, url, str(path)], timeout=30, check=False)
    assert path.exists() and (tmp_path / "copy.db.d").is_dir()
    with opened(url, hydration_path=str(path), hydrate=True) as connection:
        hydrated(connection)
        assert connection.execute(ROWS).fetchall() == history.rows[2]
    assert path.exists()


def test_a_path_that_another_replica_uses_gives_a_private_copy_and_a_warning(
    url: str, tmp_path: Path, history: History, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "copy.db"
    other = history.write(tmp_path / "other")
    with (
        opened(url, hydration_path=str(path), hydrate=True) as first,
        opened(other, hydration_path=str(path), hydrate=True) as second,
    ):
        hydrated(first)
        hydrated(second)
        assert first.pragma("litestream_hydration_file") == str(path)
        assert second.pragma("litestream_hydration_file") != str(path)
        assert second.execute(ROWS).fetchall() == history.rows[2]
    assert any("holds a copy of" in text for text in warnings_of(caplog))


def test_a_base_never_overwrites_a_file(tmp_path: Path) -> None:
    (tmp_path / "base").write_text("mine")
    with pytest.raises(FileExistsError):
        Base(tmp_path / "base", tmp_path / "present", 4096, 1, create=True)
    assert (tmp_path / "base").read_text() == "mine"
