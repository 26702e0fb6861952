"""What a local copy is a copy of: a small file, switched atomically, that survives any crash."""

from __future__ import annotations

import json
import os
import zlib
from array import array
from base64 import b85decode, b85encode
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lazyreplica.ltx.checksum import crc64
from lazyreplica.ltx.header import Header
from lazyreplica.ltx.name import FileName
from lazyreplica.storage import StoredFile

_FORMAT = 2
STATE = "state.json"
_REMEMBERED = 2000
"""Files of its history that a state names, at most."""
_FEW = 20_000
"""Pages of one file that are remembered by number."""


@dataclass(frozen=True, slots=True)
class Proof:
    """A file that led to a state of the copy. Seen again in a listing, it proves that the path still has our history:
    by identity, or as `continuation` says."""

    level: int
    min_txid: int
    max_txid: int
    size: int
    etag: str
    timestamp_ms: int
    commit: int
    pages: str
    """Numbers of the pages that it holds, packed; empty where they are too many to remember."""

    @classmethod
    def of(cls, file: StoredFile, header: Header, pgnos: array[int] | None) -> Proof:
        """`pgnos`: None where they are not worth remembering (a snapshot has them all)."""
        few = pgnos is not None and len(pgnos) <= _FEW
        return cls(
            file.level,
            file.name.min_txid,
            file.name.max_txid,
            file.size,
            file.etag,
            header.timestamp_ms,
            header.commit,
            b85encode(zlib.compress(pgnos.tobytes(), 1)).decode() if few and pgnos is not None else "",
        )

    def matches(self, header: Header) -> bool:
        """Whether a file with that header leaves what may be the same state: of that millisecond, and of that size."""
        return (header.timestamp_ms, header.commit) == (self.timestamp_ms, self.commit)

    def pgnos(self) -> array[int] | None:
        """Numbers of the pages that it holds, or None."""
        if not self.pages:
            return None
        found = array("I")
        found.frombytes(zlib.decompress(b85decode(self.pages)))
        return found

    @property
    def file(self) -> StoredFile:
        return StoredFile(self.level, FileName(self.min_txid, self.max_txid), self.size, self.etag, 0.0)


@dataclass(frozen=True, slots=True)
class CopyState:
    """Which files of the directory make the copy, and which transaction its base holds."""

    url: str
    """Canonical, without secrets."""
    page_size: int
    base: int
    """Names the files ``base-N`` and ``present-N``."""
    log: int
    """Names the file ``log-N``; another one whenever the base's TXID changes."""
    base_txid: int
    base_commit: int
    history: tuple[Proof, ...]
    """Files that led to the base, oldest first; the newest few thousand."""
    boot: str
    """The boot of the machine in which it was last written: after another, what was not synced is not trusted."""
    lineage: str
    """Random; another one for another history."""

    @classmethod
    def new(cls, url: str, page_size: int, number: int, txid: int, commit: int, chain: tuple[Proof, ...]) -> CopyState:
        """The state of an empty copy in the files of that `number`."""
        return cls(url, page_size, number, number, txid, commit, chain, boot_id(), os.urandom(8).hex())

    def at(self, txid: int, commit: int, more: tuple[Proof, ...], base: int) -> CopyState:
        """The same history, later, with another log."""
        history = (*self.history, *more)[-_REMEMBERED:]
        return replace(
            self, base=base, log=self.log + 1, base_txid=txid, base_commit=commit, history=history, boot=boot_id()
        )

    def at_boot(self) -> CopyState:
        """The same after a restart of the machine, once everything that is not on the disk is forgotten."""
        return replace(self, boot=boot_id())

    def paths(self, directory: Path) -> tuple[Path, Path, Path]:
        """The database, its presence, the log."""
        return (
            directory / f"base-{self.base}",
            directory / f"present-{self.base}",
            directory / f"log-{self.log}",
        )


def read_state(directory: Path) -> CopyState | None:
    """The state in `directory`; None if there is none, or not as it was written. Raises `OSError`."""
    try:
        found = json.loads(read_own(directory / STATE))
        if (found.pop("format"), found.pop("checksum")) != (_FORMAT, _checksum(found)):
            return None
        history = tuple(Proof(*each) for each in found.pop("history"))
        return CopyState(**found, history=history)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def write_state(directory: Path, state: CopyState) -> None:
    """Switch to `state`: after a crash the directory has this one or the one before. Raises `OSError`."""
    fields = asdict(state)
    fields["history"] = [list(asdict(proof).values()) for proof in state.history]
    text = json.dumps({"format": _FORMAT, "checksum": _checksum(fields), **fields})
    write_own(directory / f"{STATE}.new", text).rename(directory / STATE)
    sync_directory(directory)


def _checksum(fields: dict[str, object]) -> str:
    """Of all that a state says: a digit that has changed is another transaction's number, and so a wrong page."""
    return f"{crc64(json.dumps(fields).encode()):016x}"


def read_own(path: Path) -> str:
    """The text of a small file of ours. What a link points to is not ours. Raises `OSError`, `ValueError`."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)  # a FIFO must not hang us
    with os.fdopen(fd) as reading:
        return reading.read()


def write_own(path: Path, text: str) -> Path:
    """A new file for us alone, on the disk, in place of what had its name. Raises `OSError`."""
    path.unlink(missing_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w") as writing:
        writing.write(text)
        writing.flush()
        os.fsync(writing.fileno())
    return path


def sync_directory(directory: Path) -> None:
    """Names that were made or renamed in `directory` survive a power loss. Raises `OSError`."""
    fd = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def boot_id() -> str:
    """Names this boot of the machine; empty where the system does not tell (then nothing unsynced is trusted)."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
