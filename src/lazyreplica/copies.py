"""Local copies that were left on the disk: which there are, what they hold, without their replica.

A copy is looked at through its directory, ``<hydration_path>.d``, as a process that joins it does. Nothing is changed
but by `remove`, and nothing that is not ours is touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lazyreplica.errors import ConfigError, ReplicaError
from lazyreplica.export import write_database
from lazyreplica.local.copy import LocalCopy
from lazyreplica.local.directory import CopyDirectory
from lazyreplica.local.state import boot_id, read_state


@dataclass(frozen=True, slots=True)
class Copy:
    """What is known of one local copy."""

    path: Path
    """Its hydration_path."""
    url: str
    """Of its replica, canonical; empty where its state cannot be read."""
    txid: int
    """Its newest transaction; 0: not known."""
    size: int
    """Bytes on the disk."""
    complete: bool
    """Whether every page of its newest state is there."""
    in_use: bool
    """Whether a process has it open."""


def is_copy(path: str) -> bool:
    """Whether a local copy of ours belongs to that hydration_path."""
    return "://" not in path and CopyDirectory.find(Path(path)) is not None


def find_copies(path: Path) -> list[Copy]:
    """The copy with that hydration_path, or all copies in that directory. Raises `ConfigError`, `OSError`."""
    if CopyDirectory.find(path) is not None:
        return [_look(path)]
    if not path.is_dir():
        raise ConfigError(f"{str(path)!r} is neither a hydration_path of lazyreplica nor a directory with local copies")
    found = sorted(entry.with_suffix("") for entry in path.iterdir() if entry.name.endswith(".d"))
    return [_look(each) for each in found if CopyDirectory.find(each) is not None]


def remove_copy(path: Path) -> None:
    """Remove the copy with that hydration_path. Raises `ConfigError` for what is none, or is in use; `OSError`."""
    if CopyDirectory.find(path) is None:
        raise ConfigError(f"{str(path)!r} is no local copy of lazyreplica's; nothing is removed")
    directory = CopyDirectory.open(str(path))
    try:
        removed = directory.try_own() and directory.remove()
    finally:
        directory.abandon()
    if not removed:
        raise ConfigError(f"{str(path)!r} is in use by another process; nothing is removed")


def export_copy(path: Path, output: Path) -> int:
    """Write the newest state of a complete copy to `output`, without its replica; the state's TXID.

    Raises `ReplicaError` when pages are missing, `ConfigError`, `OSError`.
    """
    if CopyDirectory.find(path) is None:
        raise ConfigError(f"{str(path)!r} is no local copy of lazyreplica's")
    directory = CopyDirectory.open(str(path))
    try:
        copy = _open(directory)
        if copy is None:
            raise ReplicaError(f"{str(path)!r} holds no local copy that can be read: `lazyreplica hydrate` makes one")
        missing = len(copy.missing())
        if missing:
            raise ReplicaError(
                f"{missing} of {copy.commit} pages are not in the local copy {str(path)!r}: complete it with "
                f"`lazyreplica hydrate --hydration-path {path} {copy.state.url}`"
            )
        write_database(output, _pages(copy))
        return copy.txid
    finally:
        directory.abandon()


def _open(directory: CopyDirectory) -> LocalCopy | None:
    """The copy as far as it can be trusted. Raises `OSError`."""
    state = read_state(directory.path)
    if state is None:
        return None
    try:
        copy = LocalCopy(directory.path, state)
    except (FileNotFoundError, ValueError):
        return None
    if state.boot != boot_id() and directory.try_own():  # else its owner has done that
        copy.base.forget_unsynced()
    for record in copy.log.scan(0):
        copy.adopt(record)
    return copy


def _look(path: Path) -> Copy:
    place = CopyDirectory.find(path)
    assert place is not None, "asked before"
    used = CopyDirectory.is_used(place)
    directory = CopyDirectory.open(str(path))
    try:
        copy = _open(directory)
        if copy is None:
            return Copy(path, "", 0, directory.size, False, used)
        return Copy(path, copy.state.url, copy.txid, directory.size, not copy.missing(), used)
    finally:
        directory.abandon()


def _pages(copy: LocalCopy) -> Iterator[bytes]:
    view = copy.view(copy.txid)
    assert view is not None, "its newest state is one that it has"
    for pgno in range(1, copy.commit + 1):
        page = view.page(pgno)
        if page is None:
            # A lock page; or it was folded away by the process that owns the copy, in this moment.
            if pgno != copy.lock_pgno:
                raise ReplicaError(f"page {pgno} of the local copy was replaced meanwhile: export it again")
            page = bytes(view.page_size)
        yield page
