"""What a power loss may leave: a recording of every change below a directory, and disks made of parts of it.

Whatever was not synced may have reached the disk or not: of each 4 KiB of a file any version since its last sync, any
of its sizes, and of the changes of a directory since its last sync any part, each by itself.
"""

from __future__ import annotations

import json
import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_BLOCK = 4096
_CALLS = ("pwrite", "ftruncate", "copy_file_range", "fdatasync", "fsync", "rename", "link", "unlink", "open", "mkdir")

Names = dict[str, int]
"""Path below the root -> number of its file."""


class Disk:
    """The states of a directory tree. `root` is watched, and the directories in it; they themselves never vanish."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock = threading.RLock()
        self._kept: dict[int, int] = {}
        """Inode -> a descriptor, so that its number is not used again."""
        self._versions: dict[int, list[bytes]] = {}
        self._durable: Names = {}
        self._names: Names = {}
        self._changes: list[dict[str, int | None]] = []
        self.moments: list[tuple[dict[int, list[bytes]], Names, list[dict[str, int | None]]]] = []

    @contextmanager
    def recording(self, patch: pytest.MonkeyPatch) -> Iterator[None]:
        with patch.context() as within:
            for name in _CALLS:
                within.setattr(os, name, self._watched(name))
            yield
        for fd in self._kept.values():
            os.close(fd)

    def _watched(self, name: str):  # type: ignore[no-untyped-def]
        real, real_open = getattr(os, name), os.open

        def call(*args, **more):  # type: ignore[no-untyped-def]
            with self._lock:
                self._look(real_open)
                result = real(*args, **more)
                self._look(real_open)
                if name in ("fdatasync", "fsync"):
                    self._synced(args[0])
            return result

        return call

    def _look(self, real_open) -> None:  # type: ignore[no-untyped-def]
        names: Names = {}
        for path in self.root.rglob("*"):
            if path.is_file():
                inode = path.stat().st_ino
                names[str(path.relative_to(self.root))] = inode
                if inode not in self._kept:
                    self._kept[inode] = real_open(path, os.O_RDONLY | os.O_CLOEXEC)
                    self._versions[inode] = [b""]
        change: dict[str, int | None] = {name: inode for name, inode in names.items() if self._names.get(name) != inode}
        change.update(dict.fromkeys(set(self._names) - set(names)))
        if change:
            self._changes.append(change)
            self._names = names
        changed = bool(change)
        for inode in set(names.values()):
            data = os.pread(self._kept[inode], 1 << 26, 0)
            if self._versions[inode][-1] != data:
                self._versions[inode] = [*self._versions[inode], data]
                changed = True
        if changed:
            self._moment()

    def _synced(self, fd: int) -> None:
        status = os.fstat(fd)
        if status.st_ino in self._kept:
            self._versions[status.st_ino] = self._versions[status.st_ino][-1:]
        else:
            below = next((p for p in [self.root, *self.root.rglob("*")] if p.stat().st_ino == status.st_ino), None)
            assert below is not None, "only what is watched is synced"
            kept = []
            for change in self._changes:
                here = {name: inode for name, inode in change.items() if (self.root / name).parent == below}
                _apply(self._durable, here)
                rest = {name: inode for name, inode in change.items() if name not in here}
                if rest:
                    kept.append(rest)
            self._changes = kept
        self._moment()

    def _moment(self) -> None:
        self.moments.append((dict(self._versions), dict(self._durable), list(self._changes)))

    def after_power_loss(self, moment: int, root: Path, rng: random.Random) -> None:
        """Make in `root` what may be left of that moment."""
        versions, names, changes = self.moments[moment]
        names = dict(names)
        share = rng.choice([0.0, 0.5, 1.0, rng.random()])
        for change in changes:
            if rng.random() < share:
                _apply(names, change)
        made: dict[int, Path] = {}
        for directory in [p for p in self.root.rglob("*") if p.is_dir()]:
            (root / directory.relative_to(self.root)).mkdir(parents=True, exist_ok=True)
        for name, inode in names.items():
            path = root / name
            if inode in made:
                os.link(made[inode], path)
            else:
                path.write_bytes(_mixed(versions[inode], rng))
                made[inode] = path
        for name in names:
            if name.endswith("published.json"):
                _renumber(root / name, made)


def _apply(names: Names, change: dict[str, int | None]) -> None:
    for name, inode in change.items():
        if inode is None:
            names.pop(name, None)
        else:
            names[name] = inode


def _mixed(versions: list[bytes], rng: random.Random) -> bytes:
    if len(versions) == 1:
        return versions[0]
    style = rng.randrange(4)
    if style < 2:
        return versions[0 if style else -1]
    size = len(rng.choice(versions))
    found = bytearray(size)
    for at in range(0, size, _BLOCK):
        block = rng.choice(versions)[at : at + _BLOCK][: size - at]
        found[at : at + len(block)] = block
    return bytes(found)


def _renumber(note: Path, made: dict[int, Path]) -> None:
    """The note names a file by its inode, which is another one here."""
    try:
        _, inode = json.loads(note.read_text())
    except ValueError:
        return
    if inode in made:
        status = made[inode].stat()
        note.write_text(json.dumps([status.st_dev, status.st_ino]))
    else:
        note.write_text("[0, 0]")
