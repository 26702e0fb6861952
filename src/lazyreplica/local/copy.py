"""The local copy: a base at one TXID and a log of the transactions after it. Answers pages at any of these states.

A page at TXID T is the newest version in the log at or below T, else the base's. Readers take no lock: they hold a
`View`, whose parts are replaced but never changed under them:

- the log is append-only, and `fold` starts a new one;
- a slot of the base is written when it is empty, or by `fold`, with the version that the oldest pinned snapshot sees.
  A view that looks past the log into such a slot would have to be older than every pinned one.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from lazyreplica.local.base import Base
from lazyreplica.local.deltalog import DeltaLog, Record
from lazyreplica.local.state import CopyState, Proof, sync_directory, write_state
from lazyreplica.ltx.header import lock_pgno
from lazyreplica.pagemap import Layer

Versions = tuple[tuple[int, int], ...]
"""(MaxTXID, byte offset in the log) of a page's versions, newest first."""


class View:
    """The copy as of one TXID. Immutable, but that absent pages may appear."""

    __slots__ = ("_log", "changed", "page_size", "pages", "present", "txid", "whole")

    def __init__(self, txid: int, base: Base, log: DeltaLog, changed: dict[int, Versions]) -> None:
        self.txid: Final = txid
        self.page_size: Final = base.page_size
        self.pages: Final = memoryview(base.pages)
        """The base: page p at (p - 1) * page_size, if it is present and not in `changed`.

        A view of the mapping: SQLite copies what it is given, so a slice needs no copy of its own (0.2 us a page).
        """
        self.present: Final = base.present
        """Of each page, at p - 1, whether the base has it."""
        self.changed: Final = changed
        """Pages with versions in the log."""
        self.whole: Final = self.pages if base.whole and not changed else None
        """The same pages, where the base is known to have all of them: then nothing else need be looked at."""
        self._log = log

    def page(self, pgno: int) -> bytes | None:
        """The page, or None if it is not here. About 0.5 us."""
        size = self.page_size
        for txid, offset in self.changed.get(pgno, ()):
            if txid <= self.txid:
                return self._log.data[offset : offset + size]
        try:
            if self.present[pgno - 1]:
                return bytes(self.pages[(pgno - 1) * size : pgno * size])
        except IndexError:  # beyond the base
            pass
        return None


class LocalCopy:
    """One generation of the copy's files. `append` and what changes the base belong to the owner; see `hydrator`."""

    def __init__(self, directory: Path, state: CopyState, *, create: bool = False, durable: bool = True) -> None:
        """`create` begins a new one, else the files are there. `durable`: it is to survive a crash.

        Raises `OSError`.
        """
        self.state = state
        self.durable = durable
        self.lock_pgno: Final = lock_pgno(state.page_size)
        self._directory = directory
        database, presence, log = state.paths(directory)
        self.base = Base(database, presence, state.page_size, state.base_commit, create=create)
        self.log = DeltaLog(log, create=create)
        self.records: list[Record] = []
        self._changed: dict[int, Versions] = {}
        self._boundaries = {state.base_txid}
        """TXIDs whose state can be made."""
        self._view: View | None = None
        self._lock = threading.Lock()
        """Held while records are added, and while a fold replaces them."""

    @property
    def txid(self) -> int:
        """The newest state here."""
        return self.records[-1].max_txid if self.records else self.state.base_txid

    @property
    def commit(self) -> int:
        """Size of the newest state, in pages."""
        return self.records[-1].header.commit if self.records else self.state.base_commit

    @property
    def proofs(self) -> Iterator[Proof]:
        """Files that led here, oldest first."""
        yield from self.state.history
        yield from map(_proof, list(self.records))

    def view(self, txid: int) -> View | None:
        """The copy as of `txid`; None if that is no state that it has."""
        view = self._view
        if view is not None and view.txid == txid:
            return view
        with self._lock:
            if txid not in self._boundaries:
                return None
            view = self._view = View(txid, self.base, self.log, self._changed)
        return view

    def has(self, pgno: int) -> bool:
        """Whether the newest state's version of a page is here."""
        return pgno in self._changed or (pgno <= self.base.commit and self.base.present[pgno - 1] != 0)

    def missing(self) -> array[int]:
        """The pages of the newest state that are not here, in order."""
        commit, lock = self.commit, self.lock_pgno
        found = array("I", (p for p in self.base.absent() if p <= commit and p not in self._changed and p != lock))
        found.extend(p for p in range(self.base.commit + 1, commit + 1) if p not in self._changed and p != lock)
        return found

    def check_whole(self) -> bool:
        """Whether the base has every page of its own state: one that is newer in the log may never have come.

        Asked when all that it has is verified; views that are made from then on know it. Waits for nothing: False while
        a fold or another change is under way.
        """
        base, log = self.base, self.log
        if base.whole:
            return True
        # Without the lock: it takes time, and a connection that is closed by the garbage collector may ask as well.
        if any(pgno != self.lock_pgno for pgno in base.absent()) or not self._lock.acquire(blocking=False):
            return False
        try:
            if self.log is log:  # else a fold has come between
                base.whole = True
                self._view = None
        finally:
            self._lock.release()
        return base.whole

    def present(self) -> int:
        """About how many pages of the newest state are here."""
        return min(self.commit, self.base.count() + len(self._changed))

    # -- the log --

    def append(self, layer: Layer, pages: Iterable[tuple[int, bytes]]) -> None:
        """Add a transaction: `pages` are all of its file's, in order. Raises `OSError`, or what `pages` raises."""
        index = layer.index
        offsets = array("Q", [0] * (len(index.pgnos) + 1))
        pgnos = array("I", index.pgnos)
        for at, pgno in enumerate(pgnos):
            place = index.get(pgno)
            assert place is not None, "the index names its own pages"
            offsets[at], offsets[at + 1] = place[0], sum(place)
        self.adopt(self.log.append(layer.file, layer.header, layer.checksum, (pgnos, offsets), pages))

    def adopt(self, record: Record) -> None:
        """Know one more record of the log: its pages are here from now on."""
        size, txid, changed = record.header.page_size, record.max_txid, self._changed
        with self._lock:
            for at, pgno in enumerate(record.pgnos):
                changed[pgno] = ((txid, record.start + at * size), *changed.get(pgno, ()))
            self.records.append(record)
            self._boundaries.add(txid)

    def recover(self) -> None:
        """As the owner: know the records that a process left, as far as they are whole; of older states only what the
        log has. The base may have newer versions: a fold may have ended before it was finished."""
        for record in self.log.scan(0):
            self.adopt(record)
        self._boundaries = {self.txid}
        self.base.forget(pgno for pgno in self._changed if pgno <= self.base.commit)

    # -- the base --

    def fold(self, floor: int) -> None:
        """Move what the log holds up to TXID `floor` into the base. Raises `OSError`.

        Nobody may have pinned anything older than `floor`, in any process, and no other process may have the copy open.
        A crash at any moment leaves a copy whose newest state is whole: until the state is switched, the old log has
        every page that was overwritten.
        """
        with self._lock:
            done = [record for record in self.records if record.max_txid <= floor]
            if not done:
                return
            rest = self.records[len(done) :]
            txid, commit = done[-1].max_txid, done[-1].header.commit
            if self.durable:
                self.log.sync()
            state = self.state.at(txid, commit, tuple(map(_proof, done)), self.state.base)
            old, new = self.log.path, state.paths(self._directory)[2]
            new.unlink(missing_ok=True)  # of an attempt that a crash ended
            log = DeltaLog(new, create=True)
            moved = [_moved(self.log, record, log) for record in rest]
            if self.durable:
                log.sync()
            touched = {pgno for record in done for pgno in record.pgnos}
            touched.update(range(commit + 1, self.base.commit + 1))
            self._fold_into_base(self._newest(touched, commit, txid), touched, commit)
            if self.durable:
                sync_directory(self._directory)
                write_state(self._directory, state)
            self._switch(state, log, moved)
        old.unlink(missing_ok=True)

    def _newest(self, touched: Iterable[int], commit: int, txid: int) -> dict[int, int]:
        """Where the log has those pages as of `txid`."""
        places = {}
        for pgno in touched:
            if pgno <= commit:
                places[pgno] = next((at for version, at in self._changed.get(pgno, ()) if version <= txid), -1)
        return {pgno: at for pgno, at in places.items() if at >= 0}

    def _fold_into_base(self, newest: dict[int, int], touched: set[int], commit: int) -> None:
        base = self.base
        base.forget(pgno for pgno in touched if pgno <= base.commit)
        if self.durable:
            base.sync_presence()
        base.resize(commit)
        self._write_runs(base, newest)
        if self.durable:
            base.sync()

    def _write_runs(self, base: Base, places: dict[int, int]) -> None:
        """Write pages from the log into a base, neighbours at once."""
        size, data = base.page_size, self.log.data
        run: list[bytes] = []
        first = 0
        for pgno in sorted(places):
            if run and (pgno != first + len(run) or len(run) >= 256):
                base.write(first, b"".join(run))
                run = []
            if not run:
                first = pgno
            run.append(data[places[pgno] : places[pgno] + size])
        if run:
            base.write(first, b"".join(run))

    def beside(self) -> LocalCopy:
        """A new generation in new files, whose base is our newest state. Raises `OSError`.

        Others may go on with this one; they notice by `Control.generation`.
        """
        with self._lock:
            txid, commit, records = self.txid, self.commit, list(self.records)
            state = self.state.at(txid, commit, tuple(map(_proof, records)), self.state.log + 1)
            newest = {p: versions[0][1] for p, versions in self._changed.items() if p <= commit}
        database, presence, log = state.paths(self._directory)
        for path in (database, presence, log):
            path.unlink(missing_ok=True)  # of an attempt that a crash ended
        base = self.base.copy_to(database, presence)
        base.forget(p for p in newest if p <= base.commit)
        base.forget(range(commit + 1, base.commit + 1))
        base.resize(commit)
        base.trim()
        self._write_runs(base, newest)
        base.sync()
        DeltaLog(log, create=True).sync()
        sync_directory(self._directory)
        write_state(self._directory, state)
        return LocalCopy(self._directory, state)

    def _switch(self, state: CopyState, log: DeltaLog, records: list[Record]) -> None:
        self.state = state
        self.log = log
        self.records = []
        self._changed = {}
        self._boundaries = {self.state.base_txid}
        size = state.page_size
        for record in records:
            for at, pgno in enumerate(record.pgnos):
                entry = (record.max_txid, record.start + at * size)
                self._changed[pgno] = (entry, *self._changed.get(pgno, ()))
            self.records.append(record)
            self._boundaries.add(record.max_txid)
        self._view = None

    def remove(self) -> None:
        """Remove this copy's files; who still reads them has them open."""
        for path in self.state.paths(self._directory):
            path.unlink(missing_ok=True)


def _proof(record: Record) -> Proof:
    return Proof.of(record.file, record.header, record.pgnos)


def _moved(source: DeltaLog, record: Record, target: DeltaLog) -> Record:
    """The record at the end of another log."""
    size = record.header.page_size
    pages = (
        (pgno, source.data[record.start + at * size : record.start + (at + 1) * size])
        for at, pgno in enumerate(record.pgnos)
    )
    return target.append(record.file, record.header, record.checksum, (record.pgnos, record.offsets), pages)
