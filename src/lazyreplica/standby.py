"""A restored database file that is kept at the newest state, while other processes read it with any SQLite.

Each new transaction of the primary becomes one transaction on the file (see `rollback`). Beside it,
``<output>-lazyreplica`` says which transaction it holds, and by which files: with those a later process proves that the
path still has the same history (see `local.continuation`), and goes on.

The state names the change counter that the file has. The next transaction is written down there before it is made, and
raises the counter by one: so after a crash the file itself says whether it happened.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import tempfile
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

from lazyreplica.dbheader import with_header
from lazyreplica.errors import ConfigError, FileVanished, LazyReplicaError, LineageChanged, ReplicaError, ReplicaGap
from lazyreplica.follower import Follower
from lazyreplica.head import Head
from lazyreplica.layers import Arrival
from lazyreplica.local.base import Base, pwrite_all
from lazyreplica.local.continuation import continuation, leads_on
from lazyreplica.local.state import Proof, sync_directory
from lazyreplica.ltx.header import lock_pgno
from lazyreplica.ltx.name import format_txid
from lazyreplica.opening import list_files
from lazyreplica.pagemap import Layer
from lazyreplica.plan import plan
from lazyreplica.restore import Restorer
from lazyreplica.rollback import Changes, DatabaseFile
from lazyreplica.snapshot import Lineage, Snapshot, stack_snapshot
from lazyreplica.storage import StoredFile
from lazyreplica.unfinished import Unfinished, part_path

log = logging.getLogger(__name__)

_FORMAT = 1
_REMEMBERED = 500
"""Files of its history that a state names, at most."""
_PATIENCE = 10.0
"""Seconds that a transaction waits for readers, before the next poll tries again."""
_IN_MEMORY = 16 << 20
_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class _State:
    url: str
    page_size: int
    txid: int
    counter: int
    """The change counter in the file at `txid`."""
    epoch: int
    """How often history went on without having been followed link by link."""
    history: tuple[Proof, ...]
    """Files that led to `txid`, oldest first."""
    pending: tuple[Proof, ...] = ()
    """Those of the next transaction on the file: it has happened if the file's counter is one more."""

    def then(self, proofs: tuple[Proof, ...], epoch: int) -> _State:
        """The same before a transaction on the file."""
        return replace(self, pending=proofs, epoch=epoch)

    def done(self) -> _State:
        """The same after it."""
        history = (*self.history, *self.pending)[-_REMEMBERED:]
        counter = self.counter + 1 & 0xFFFFFFFF
        return replace(self, txid=self.pending[-1].max_txid, counter=counter, history=history, pending=())


class Standby:
    """Keeps one file up to date. For one thread; `close` it. Where it comes from: `begin`, or `resume`."""

    def __init__(self, restorer: Restorer, output: Path, state: _State, snapshot: Snapshot, timeout: float) -> None:
        self._restorer = restorer
        self._output = output
        self._state = state
        self._database = DatabaseFile(output, state.page_size)
        self._head = Head(snapshot)
        self._follower = Follower(
            restorer.store, restorer.layers, self._head, restorer.files, self._advance, self._replace, timeout
        )

    # -- where it begins --

    @staticmethod
    def mark(database: Path, output: Path, snapshot: Snapshot, url: str) -> None:
        """Make a restored `database`, before it appears as `output`, one that can be kept up to date.

        Raises `OSError`.
        """
        state = _State(url, snapshot.page_size, snapshot.txid, secrets.randbits(31), 0, _proofs(_chain(snapshot)))
        fd = os.open(database, os.O_RDWR | os.O_CLOEXEC)
        try:
            page = os.pread(fd, snapshot.page_size, 0)
            pwrite_all(fd, with_header(page, state.counter, snapshot.commit, 0), 0)
        finally:
            os.close(fd)
        _write(output, state)

    @classmethod
    def begin(cls, restorer: Restorer, output: Path, snapshot: Snapshot, timeout: float) -> Self:
        """Follow a database that was just restored and marked. Raises `OSError`, `ReplicaError`."""
        return cls(restorer, output, _read(output), snapshot, timeout)

    @classmethod
    def resume(cls, restorer: Restorer, output: Path, timeout: float) -> Self:
        """Go on with what an earlier process left, and bring it to the newest state.

        Raises `ConfigError` when that is another replica's, `ReplicaError` when it does not lead to the newest state,
        `DatabaseChanged`; `StoreError`, `LTXError`, `OSError`, `DatabaseBusy`.
        """
        if part_path(output).exists():  # of a process that was killed
            Unfinished(output).remove()
        state = _read(output)
        if state.url != restorer.store.url:
            raise ConfigError(f"{output} follows {state.url}, not {restorer.store.url}: name another output")
        database = DatabaseFile(output, state.page_size)
        try:
            if state.pending and database.counter == state.counter + 1 & 0xFFFFFFFF:
                state = state.done()
            for attempt in range(1, _ATTEMPTS + 1):
                restorer.files = list_files(restorer.store, timeout)
                try:
                    layers = restorer.layers.open_chain(plan(restorer.files))
                    caught_up = _catch_up(restorer, output, database, state, layers[-1])
                except (FileVanished, ReplicaGap):
                    if attempt == _ATTEMPTS:
                        raise
                else:
                    break
        finally:
            database.close()
        newest = stack_snapshot(layers, Lineage())
        standby = cls(restorer, output, caught_up or state, newest, timeout)
        if caught_up is None:
            try:
                standby._reload(newest)
            except BaseException:
                standby.close()
                raise
        return standby

    @property
    def txid(self) -> int:
        """The transaction whose state the file has."""
        return self._state.txid

    def poll(self) -> None:
        """Look for new transactions once, and apply what is there.

        Raises `StoreError`, `LTXError` and `DatabaseBusy`, after which the next poll may succeed; `LineageChanged` when
        the path holds another history, and `DatabaseChanged` when another program has changed the file.
        """
        self._follower.poll()

    def close(self) -> None:
        """The file stays, and can be followed again."""
        self._database.close()

    # -- what the follower finds --

    def _advance(self, arrival: Arrival, after: Snapshot) -> None:
        with Spool(self._output.parent, after.page_size, after.commit) as spool:
            spool.add(self._restorer.pages(arrival.layer, arrival.data))
            self._apply(spool, (arrival.layer,), self._state.epoch)
        self._head.advance(after)

    def _replace(self, after: Snapshot) -> None:
        if after.lineage.number != self._head.current.lineage.number:
            raise LineageChanged(
                f"{self._restorer.store.url} holds another database now, at TXID {format_txid(after.txid)}: "
                f"{self._output} stays at TXID {format_txid(self.txid)} of the old one; restore it again with --force"
            )
        self._reload(after)
        self._head.replace(after)

    def _reload(self, after: Snapshot) -> None:
        """Bring the file to a state whatever lies between: by all pages that differ, in one transaction."""
        unfinished = Unfinished(self._output)
        try:
            base = self._restorer.load(after, unfinished, _say_nothing)
            self._apply(_Differing(base, self._database, after.commit), _chain(after), self._state.epoch + 1)
        except LazyReplicaError:
            unfinished.close()  # what has come is there for the next attempt
            raise
        except BaseException:
            unfinished.remove()
            raise
        unfinished.remove()

    def _apply(self, changes: Changes, layers: Sequence[Layer], epoch: int) -> None:
        self._state = _apply(self._output, self._database, self._state, changes, layers, epoch)


def _apply(
    output: Path, database: DatabaseFile, state: _State, changes: Changes, layers: Sequence[Layer], epoch: int
) -> _State:
    """One transaction on the file, that `layers` made; the state after it."""
    state = state.then(_proofs(layers), epoch)
    _write(output, state)
    database.apply(changes, state.counter, epoch, _PATIENCE)
    state = state.done()
    _write(output, state)
    log.info("%s is at TXID %s", output, format_txid(state.txid))
    return state


def _catch_up(restorer: Restorer, output: Path, database: DatabaseFile, state: _State, newest: Layer) -> _State | None:
    """Bring a file that was left for a while to the state of a listing, by one transaction.

    None if what lies between is not there any more, though the path still has our history.
    """
    if newest.header.page_size != state.page_size:
        raise ReplicaError(f"{restorer.store.url} has another page size now: restore {output} again with --force")

    def alike(file: StoredFile, proof: Proof) -> bool:
        header = restorer.layers.header_of(file)
        return header is not None and proof.matches(header)

    found = continuation(state.history, state.txid, restorer.files, alike)
    chain = restorer.layers.open_chain(found.chain) if found else []
    reached = chain[-1].max_txid if chain else state.txid
    if found is None or not leads_on(found, chain, state.txid) or reached != newest.max_txid:
        known = {proof.file for proof in state.history}
        if newest.max_txid > state.txid and any(file in known for file in restorer.files):
            return None
        raise ReplicaError(
            f"{output} is at TXID {format_txid(state.txid)}, and {restorer.store.url} does not show how its newest "
            f"state, TXID {format_txid(newest.max_txid)}, follows from that: restore it again with --force"
        )
    if not chain:
        return state
    with Spool(output.parent, state.page_size, newest.header.commit) as spool:
        for layer in chain:
            spool.add(restorer.pages(layer, restorer.layers.kept(layer)))
        # What lies between was not seen link by link: the schema may have changed under an equal cookie.
        return _apply(output, database, state, spool, chain, state.epoch + 1)


class Spool:
    """Pages of some transactions, decoded: of each page the newest version. In a file, if they are many."""

    def __init__(self, directory: Path, page_size: int, commit: int) -> None:
        """`commit`: size of the database after the last of them, in pages."""
        self.commit = commit
        self._page_size = page_size
        self._file = tempfile.SpooledTemporaryFile(_IN_MEMORY, dir=str(directory))  # noqa: SIM115 (closed by __exit__)
        self._places: dict[int, int] = {}
        self._end = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, pages: Iterable[tuple[int, bytes]]) -> None:
        """Over what is there. Raises what `pages` raises, and `OSError`."""
        self._file.seek(self._end)
        for pgno, page in pages:
            self._file.write(page)
            self._places[pgno] = self._end
            self._end += len(page)

    def pgnos(self) -> list[int]:
        return sorted(pgno for pgno in self._places if pgno <= self.commit)

    def page(self, pgno: int) -> bytes:
        self._file.seek(self._places[pgno])
        return self._file.read(self._page_size)


class _Differing:
    """The pages of a database that differ from those of the file that is kept up to date, and page 1."""

    def __init__(self, base: Base, database: DatabaseFile, commit: int) -> None:
        self.commit = commit
        self._base = base
        lock = lock_pgno(base.page_size)
        self._pgnos = [p for p in range(1, commit + 1) if p == 1 or (p != lock and self.page(p) != database.page(p))]

    def pgnos(self) -> list[int]:
        return self._pgnos

    def page(self, pgno: int) -> bytes:
        size = self._base.page_size
        return self._base.pages[(pgno - 1) * size : pgno * size]


def _say_nothing(done: int, total: int) -> None:
    """Nobody watches."""


def _chain(snapshot: Snapshot) -> list[Layer]:
    """The files that make it, its last one too if that holds no page."""
    layers = list(snapshot.pages.layers())
    return layers if snapshot.last in layers else [*layers, snapshot.last]


def _proofs(layers: Sequence[Layer]) -> tuple[Proof, ...]:
    return tuple(
        Proof.of(layer.file, layer.header, None if layer.header.is_snapshot else array("I", layer.index.pgnos))
        for layer in sorted(layers, key=lambda layer: layer.max_txid)
    )


# -- the file beside the database --


def state_path(output: Path) -> Path:
    """Where the state of a file that is kept up to date is."""
    return output.with_name(f"{output.name}-lazyreplica")


def _read(output: Path) -> _State:
    """Raises `ReplicaError` for one that cannot be understood, `OSError`."""
    path = state_path(output)
    try:
        found = json.loads(path.read_text())
        if found.pop("format") != _FORMAT:
            raise ValueError("another format")
        history = tuple(Proof(*each) for each in found.pop("history"))
        pending = tuple(Proof(*each) for each in found.pop("pending"))
        return _State(**found, history=history, pending=pending)
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        raise ReplicaError(f"{path} cannot be understood ({exc}): restore again with --force") from exc


def _write(output: Path, state: _State) -> None:
    """Switch to `state`: after a crash there is this one or the one before. Raises `OSError`."""
    fields = asdict(state)
    for name in ("history", "pending"):
        fields[name] = [list(proof.values()) for proof in fields[name]]
    path = state_path(output)
    new = path.with_name(f"{path.name}.new")
    with contextlib.suppress(FileNotFoundError):
        new.unlink()
    with new.open("x") as writing:
        json.dump({"format": _FORMAT, **fields}, writing)
        writing.flush()
        os.fsync(writing.fileno())
    new.rename(path)
    sync_directory(path.parent)
