"""A restore that is not finished: the directory ``<output>.part``, from which another process can go on.

It holds the database, its presence (see `local.base`), and a state that names, for each page, the file of the chain it
comes from. So whoever goes on keeps every page that would come from the same file again, even if the newest
transactions, and so the chain's last files, are others by then.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import zlib
from array import array
from base64 import b85decode, b85encode
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Self

from lazyreplica.errors import ConfigError
from lazyreplica.filling import Wanted
from lazyreplica.local.base import Base
from lazyreplica.local.state import boot_id, sync_directory
from lazyreplica.ltx.name import FileName
from lazyreplica.snapshot import Snapshot
from lazyreplica.storage import StoredFile

_FORMAT = 1
_LOCK = "lazyreplica.lock"
"""Also the sign that the directory is ours."""
_STATE = "state.json"
_DATABASE, _PRESENCE = "database", "presence"
_MODE = 0o644


@dataclass(frozen=True, slots=True)
class _State:
    url: str
    page_size: int
    commit: int
    boot: str
    """Of the machine: after another one, only what was synced is trusted."""
    files: tuple[StoredFile, ...]
    owners: array[int]
    """Of each page the number, counted from 1, of its file in `files`; 0: no file has it (the lock page)."""

    @classmethod
    def of(cls, url: str, snapshot: Snapshot, shares: Sequence[Wanted]) -> Self:
        owners = array("I", bytes(4 * snapshot.commit))
        for number, share in enumerate(shares, 1):
            for pgno in share.pgnos:
                owners[pgno - 1] = number
        files = tuple(share.layer.file for share in shares)
        return cls(url, snapshot.page_size, snapshot.commit, boot_id(), files, owners)


class Unfinished:
    """The directory, for as long as this process restores into it. `finish` or `close` ends that."""

    def __init__(self, output: Path) -> None:
        """Makes it, or takes up what is there.

        Raises `ConfigError` for a directory that is not ours, `OSError` when another process restores there now.
        """
        self.path = part_path(output)
        self.path.mkdir(mode=0o700, exist_ok=True)
        if self.path.is_symlink() or (not (self.path / _LOCK).is_file() and any(self.path.iterdir())):
            raise ConfigError(
                f"{str(self.path)!r}, where {str(output)!r} is to be built, exists and is not lazyreplica's; nothing "
                "in it will be touched: name another output"
            )
        self._lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise OSError(errno.EBUSY, "another process restores there", str(self.path)) from None
        self.base: Base | None = None

    @property
    def database(self) -> Path:
        return self.path / _DATABASE

    @property
    def presence(self) -> Path:
        return self.path / _PRESENCE

    def prepare(self, url: str, snapshot: Snapshot, shares: Sequence[Wanted]) -> Base:
        """The database of `snapshot` as far as it is here; `shares`: where its pages come from. Raises `OSError`.

        Whatever crash ends this, what is present belongs to the state that is written.
        """
        wanted = _State.of(url, snapshot, shares)
        found = _read(self.path)
        self.base = None
        if found is not None and (found.url, found.page_size) == (wanted.url, wanted.page_size):
            with contextlib.suppress(FileNotFoundError, ValueError):
                self.base = self._take_up(found, wanted)
        if self.base is None:
            for path in (self.path / _STATE, self.database, self.presence):
                path.unlink(missing_ok=True)
            self.base = Base(self.database, self.presence, wanted.page_size, wanted.commit, create=True)
        _write(self.path, wanted)
        return self.base

    def _take_up(self, found: _State, wanted: _State) -> Base:
        base = Base(self.database, self.presence, found.page_size, found.commit)
        if not found.boot or found.boot != boot_id():
            base.forget_unsynced()
        numbers = {file: number for number, file in enumerate(wanted.files, 1)}
        now = [0, *(numbers.get(file, -1) for file in found.files)]
        """Number before -> number now."""
        pairs = zip_longest(found.owners, wanted.owners[: found.commit], fillvalue=0)
        base.forget(pgno for pgno, (before, after) in enumerate(pairs, 1) if now[before] != after)
        base.sync_presence()
        base.resize(wanted.commit)
        return base

    def trim(self) -> None:
        """Every page is here: the file ends where the database does, and nobody writes through `base` any more."""
        assert self.base is not None, "prepared before"
        self.base.trim()

    def finish(self, output: Path) -> None:
        """Let the whole database appear as `output`, at once, in place of what is there. Raises `OSError`."""
        assert self.base is not None, "prepared before"
        self.base.sync()
        self.base = None
        mask = os.umask(0o077)
        os.umask(mask)
        self.database.chmod(_MODE & ~mask)
        self.database.rename(output)
        sync_directory(output.parent)
        self.remove()

    def remove(self) -> None:
        """Everything is given up."""
        self.base = None
        shutil.rmtree(self.path, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Leave what is here for whoever goes on."""
        self.base = None
        if self._lock >= 0:
            if not (self.path / _STATE).exists():
                shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
        self._lock = -1


def part_path(output: Path) -> Path:
    """The directory of an unfinished restore to `output`."""
    return output.with_name(f"{output.name}.part")


def _read(directory: Path) -> _State | None:
    """The state in `directory`; None if there is none that can be understood."""
    try:
        found = json.loads((directory / _STATE).read_text())
        if found.pop("format") != _FORMAT:
            return None
        files = tuple(
            StoredFile(level, FileName(low, high), size, etag, 0.0)
            for level, low, high, size, etag in found.pop("files")
        )
        owners = array("I")
        owners.frombytes(zlib.decompress(b85decode(found.pop("owners"))))
        state = _State(**found, files=files, owners=owners)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError, zlib.error):
        return None
    return state if len(owners) == state.commit and max(owners) <= len(files) else None


def _write(directory: Path, state: _State) -> None:
    """Switch to `state`: after a crash the directory has this one or the one before. Raises `OSError`."""
    text = json.dumps(
        {
            "format": _FORMAT,
            "url": state.url,
            "page_size": state.page_size,
            "commit": state.commit,
            "boot": state.boot,
            "files": [(f.level, f.name.min_txid, f.name.max_txid, f.size, f.etag) for f in state.files],
            "owners": b85encode(zlib.compress(state.owners.tobytes(), 1)).decode(),
        }
    )
    new = directory / f"{_STATE}.new"
    with new.open("w") as writing:
        writing.write(text)
        writing.flush()
        os.fsync(writing.fileno())
    new.rename(directory / _STATE)
    sync_directory(directory)
