"""The base: which pages are there, what survives, and that no mapping is used beyond the end of its file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lazyreplica.local.base import Base, copy_range, pwrite_all

SIZE = 512


def page(*key: object) -> bytes:
    return repr(key).encode().ljust(SIZE, b".")


def make(path: Path, commit: int, *, create: bool = True) -> Base:
    return Base(path / "base", path / "present", SIZE, commit, create=create)


def test_a_page_is_there_once_it_is_written(tmp_path: Path) -> None:
    base = make(tmp_path, 5)
    assert (list(base.absent()), base.count()) == ([1, 2, 3, 4, 5], 0)
    base.write(2, page(2) + page(3))
    assert (list(base.absent()), base.count()) == ([1, 4, 5], 2)
    assert base.pages[SIZE : 3 * SIZE] == page(2) + page(3)
    base.forget([3])
    assert list(base.absent()) == [1, 3, 4, 5]


def test_only_what_was_synced_outlives_a_power_loss(tmp_path: Path) -> None:
    base = make(tmp_path, 4)
    base.write(1, page(1) + page(2))
    base.sync()
    base.write(3, page(3))
    assert base.present[:] == b"\2\2\1\0"
    again = make(tmp_path, 4, create=False)
    again.forget_unsynced()
    assert again.present[:] == b"\2\2\0\0"


def test_new_files_are_not_made_over_old_ones(tmp_path: Path) -> None:
    make(tmp_path, 2).write(1, page(1))
    with pytest.raises(FileExistsError):
        make(tmp_path, 2)
    assert make(tmp_path, 2, create=False).count() == 1


def test_growing_keeps_what_is_there_and_adds_nothing(tmp_path: Path) -> None:
    base = make(tmp_path, 2)
    base.write(1, page(1) + page(2))
    before = base.pages, base.present
    base.resize(6)
    base.write(5, page(5))
    assert list(base.absent()) == [3, 4, 6]
    assert before[0][:SIZE] == page(1), "who reads has the old mapping"
    assert bytes(before[1][:2]) == b"\1\1"


# A fold that grew the base ended in a crash: the state still names the smaller one.
@pytest.mark.parametrize("reopened", [True, False])
def test_what_lies_beyond_the_end_is_not_there_when_the_database_grows_again(tmp_path: Path, reopened: bool) -> None:
    base = make(tmp_path, 6)
    base.write(1, b"".join(page(p) for p in range(1, 7)))
    base.sync()
    if reopened:
        base = make(tmp_path, 3, create=False)
    else:
        base.resize(3)
    base.resize(6)
    assert list(base.absent()) == [4, 5, 6]


def test_pages_that_a_cut_off_file_has_lost_are_not_there(tmp_path: Path) -> None:
    base = make(tmp_path, 6)
    base.write(1, b"".join(page(p) for p in range(1, 7)))
    base.sync()
    os.truncate(base.path, 3 * SIZE + 100)
    assert list(make(tmp_path, 6, create=False).absent()) == [4, 5, 6]


def test_a_copy_has_the_same_pages(tmp_path: Path) -> None:
    base = make(tmp_path, 600)
    for first, count in ((1, 2), (7, 1), (100, 300), (600, 1)):
        base.write(first, b"".join(page(p) for p in range(first, first + count)))
    base.sync()
    other = base.copy_to(tmp_path / "other", tmp_path / "presence")
    assert list(other.absent()) == list(base.absent())
    assert other.pages[:] == base.pages[:]
    assert b"\2" not in other.present[:], "not yet on the disk"


def test_a_range_that_ends_early_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100)
    source, target = os.open(tmp_path / "a", os.O_RDONLY), os.open(tmp_path / "b", os.O_RDWR | os.O_CREAT)
    try:
        copy_range(source, target, 10, 100)
        assert (tmp_path / "b").read_bytes() == bytes(10) + b"x" * 90
        with pytest.raises(OSError, match="ends at byte 100, expected 200"):
            copy_range(source, target, 0, 200)
    finally:
        os.close(source)
        os.close(target)


def test_a_short_write_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, bytes(data)[:7], at))
    fd = os.open(tmp_path / "a", os.O_RDWR | os.O_CREAT)
    pwrite_all(fd, bytes(range(100)), 3)
    os.close(fd)
    assert (tmp_path / "a").read_bytes() == bytes(3) + bytes(range(100))


SHRINKING = """
import sys
from pathlib import Path
from lazyreplica.local.base import Base
path = Path(sys.argv[1])
base = Base(path / "base", path / "present", 512, 20_000, create=True)
base.write(1, bytes(512 * 20_000))
base.forget(range(101, 20_001))
base.resize(100)
base.trim()
base.write(7, b"x" * 512)
base.sync()  # looked through presence beyond the end of its file: SIGBUS
assert base.trimmed and base.count() == 100 and not list(base.absent())
other = base.copy_to(path / "other", path / "presence")
assert other.count() == 100
base.resize(30_000)
base.write(30_000, b"y" * 512)
assert base.pages[-512:] == b"y" * 512 and base.count() == 101
"""


def test_no_mapping_is_used_beyond_the_end_of_a_file_that_was_cut_off(tmp_path: Path) -> None:
    assert subprocess.run([sys.executable, "-c", SHRINKING, str(tmp_path)], check=False).returncode == 0
