"""The local copy as this process has it: found or begun, read, followed in its log, given up.

One process owns a copy (see `hydrator`). The others read what is there, and learn of new transactions from the end of
the log: N workers are not N pollers.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from array import array
from collections.abc import Callable
from pathlib import Path

from lazyreplica.clock import now
from lazyreplica.head import Head
from lazyreplica.layers import Arrival, Layers
from lazyreplica.local.control import Control
from lazyreplica.local.copy import LocalCopy, View
from lazyreplica.local.directory import CopyDirectory
from lazyreplica.local.state import STATE, CopyState, Proof, boot_id, read_state, write_state
from lazyreplica.ltx.index import PageIndex
from lazyreplica.pagemap import Layer
from lazyreplica.snapshot import Lineage, Snapshot
from lazyreplica.storage import StoredFile

log = logging.getLogger(__name__)

Apply = Callable[[Arrival], None]
Listing = Callable[[], list[StoredFile]]
_TRIES = 5


class Foreign(Exception):
    """The directory holds another replica's copy, and somebody uses it."""


class Attachment:
    """What this process knows of a local copy. `guard` is held while that is exchanged, or taken along by the head."""

    def __init__(
        self, url: str, layers: Layers, head: Head, directory: CopyDirectory, listed: list[StoredFile]
    ) -> None:
        """Owns `directory` from here on. `listed`: the listing that the head was planned from.

        Raises `OSError` when the copy cannot be made (a full disk), `Foreign`.
        """
        self._url = url
        self._layers = layers
        self._head = head
        self.directory = directory
        self.guard = threading.RLock()
        self.copy: LocalCopy | None = None
        self.lineage: Lineage | None = None
        """The history whose states `copy` has; None while that is not known, as whenever `copy` is exchanged for one of
        another history."""
        self.complete = False
        """Whether every page of the copy's newest state is here."""
        self._gap = False
        """Whether transactions after the head were folded before we looked: then only the store has them."""
        self._control = Control(directory.control)
        if directory.try_own():
            self._take_up(listed)
        else:
            self._join(listed)

    @property
    def owned(self) -> bool:
        """Whether this process is the one that changes the copy."""
        return self.directory.owned

    # -- what readers see --

    def view(self, snapshot: Snapshot) -> View | None:
        """The copy as of a pinned snapshot, or None if it does not have that state."""
        copy = self._copy_for(snapshot)
        return copy.view(snapshot.txid) if copy is not None else None

    def _copy_for(self, snapshot: Snapshot) -> LocalCopy | None:
        """The copy, if it has the history of `snapshot`."""
        lineage = self.lineage
        copy = self.copy
        # Looked at before and after: else it could be another history's copy, exchanged in this moment.
        return copy if snapshot.lineage is lineage and self.lineage is lineage else None

    def read(self, snapshot: Snapshot, layer: Layer, pgno: int) -> bytes | None:
        """Page `pgno` of a pinned snapshot, which `layer` holds, if it is here."""
        copy = self._copy_for(snapshot)
        if copy is None:
            return None
        view = copy.view(snapshot.txid)
        if view is None:
            # The copy is behind: what its newest state has and nobody changed since is good.
            txid = copy.txid
            if not layer.max_txid <= txid < snapshot.txid:
                return None
            view = copy.view(txid)
        return view.page(pgno) if view is not None else None

    @property
    def path(self) -> Path | None:
        """The database file: where it appears when it is complete, or the one that is being filled."""
        copy = self.copy
        return (self.directory.published_at or copy.base.path) if copy else None

    @property
    def file_txid(self) -> int | None:
        """The transaction whose database the file at `path` is, byte for byte; None while it is not whole."""
        copy = self.copy
        return copy.state.base_txid if copy is not None and self._check_whole(copy) else None

    def check_whole(self) -> None:
        """If the file at `path` is one transaction's database, let readers know: they look at less then."""
        copy = self.copy
        if copy is not None:
            with contextlib.suppress(OSError):
                self._check_whole(copy)

    def _check_whole(self, copy: LocalCopy) -> bool:
        # Of a file that is still being filled not every page is verified.
        verified = self.directory.shows(copy.base.path) if self.directory.shared else self.complete
        return verified and copy.check_whole()

    def holds(self, snapshot: Snapshot) -> bool:
        """Whether the copy's newest state is `snapshot`."""
        return self.copy is not None and snapshot.lineage is self.lineage and self.copy.txid == snapshot.txid

    @property
    def holds_head(self) -> bool:
        """Whether every page of the newest state is here."""
        copy = self.copy
        if copy is None or not self.holds(self._head.current):
            return False
        if not self.complete and not self.owned:
            self.complete = not copy.missing()
        return self.complete

    @property
    def share(self) -> float:
        """About how much of the newest state is here: 0..1."""
        copy = self.copy
        return copy.present() / max(1, self._head.current.commit) if copy else 0.0

    # -- finding and beginning --

    def _take_up(self, listed: list[StoredFile]) -> None:
        """As the owner: go on with the copy that is there, or begin one."""
        directory, head = self.directory, self._head.current
        state = read_state(directory.path)
        if state is not None and (state.url, state.page_size) == (self._url, head.page_size):
            with contextlib.suppress(OSError, ValueError):
                self.copy = self._reopen(state)
        elif state is not None:
            with directory.alone() as alone:
                if not alone:
                    raise Foreign(f"{directory.path} holds a copy of {state.url}, and is in use")
        if self.copy is None:
            self.begin(head)
        elif self.copy.txid <= head.txid and self._ends_in(self.copy, head, listed):
            # Else there are transactions in it of which it is not known yet whether they come after `head`.
            self.lineage = head.lineage
        directory.sweep(self.copy.state if self.copy else None)

    def _reopen(self, state: CopyState) -> LocalCopy:
        """The copy that a process left, as far as it can be trusted. Raises `OSError`."""
        copy = LocalCopy(self.directory.path, state, durable=self.directory.shared)
        copy.base.forget_garbage()
        if not state.boot or state.boot != boot_id():
            copy.base.forget_unsynced()
            copy.state = state.at_boot()
            write_state(self.directory.path, copy.state)
        copy.recover()
        self.announce(copy)
        self.complete = not copy.missing()
        return copy

    def begin(self, head: Snapshot) -> None:
        """As the owner: an empty copy of the newest state. Raises `OSError`."""
        directory = self.directory
        before = read_state(directory.path)
        chain = tuple(_proof(layer) for layer in head.pages.layers())
        number = before.log + 1 if before else 1
        state = CopyState.new(self._url, head.page_size, number, head.txid, head.commit, chain)
        directory.withdraw()
        for path in state.paths(directory.path):
            path.unlink(missing_ok=True)  # of an attempt that a crash ended
        copy = LocalCopy(directory.path, state, create=True, durable=directory.shared)
        write_state(directory.path, state)
        self.complete = False
        self.copy, self.lineage = copy, head.lineage
        self.announce(copy)
        directory.sweep(state)

    def announce(self, copy: LocalCopy) -> None:
        """As the owner: let the others know how far the copy is."""
        self._control.log_end = copy.log.end
        self._control.generation = copy.state.log

    def polled(self) -> None:
        """We have the newest state; so have the others as soon as it is in the log."""
        if self.owned and self.holds(self._head.current):
            self._control.polled_at = now()

    def give_up(self, exc: Exception) -> None:
        """The disk does not do its part, or what is in it is wrong: use it no more."""
        with self.guard:
            copy, self.copy, self.lineage = self.copy, None, None
        if copy is None:
            return
        log.warning("the local copy of %s is given up, reads go on from the store: %s", self._url, exc)
        if self.owned:
            self._control.generation = 0
            with contextlib.suppress(OSError):
                self.directory.withdraw()
                copy.remove()
                (self.directory.path / STATE).unlink(missing_ok=True)

    def _join(self, listed: list[StoredFile]) -> None:
        """As one of many: use the copy that another process owns. Raises `Foreign`, `OSError`."""
        for _ in range(_TRIES):
            # The owner may remove the files that the state names, once it has written another state.
            with contextlib.suppress(FileNotFoundError):
                self._try_to_join(listed)
                return

    def _try_to_join(self, listed: list[StoredFile]) -> None:
        state = read_state(self.directory.path)
        if state is None:
            return  # its owner is just beginning
        if state.url != self._url:
            raise Foreign(f"{self.directory.path} holds a copy of {state.url}")
        copy = LocalCopy(self.directory.path, state)
        if copy.state.log != self._control.generation:
            return
        for record in copy.log.scan(0, self._control.log_end):
            copy.adopt(record)
        head = self._head.current
        if state.page_size == head.page_size and self._ends_in(copy, head, listed):
            self.copy, self.lineage = copy, head.lineage

    def _ends_in(self, copy: LocalCopy, head: Snapshot, listed: list[StoredFile]) -> bool:
        """Whether `head` is a state of the copy's history, as far as that shows without asking the store."""
        ends = [proof for proof in copy.proofs if proof.max_txid == head.txid]
        if any(proof.file == head.last.file for proof in ends):
            return True
        if head.txid <= copy.txid:
            return any(proof.timestamp_ms and proof.matches(head.last.header) for proof in ends)
        return any(proof.max_txid == copy.txid and proof.file in listed for proof in copy.proofs)

    # -- the others' way --

    @property
    def polled_at(self) -> float:
        """When (`clock.now`) the owner last learned that it has the newest state; 0.0: never since anybody has used the
        copy, or we cannot learn that state from it."""
        copy = self.copy
        if copy is None or self.lineage is None or (self._gap and copy.txid > self._head.current.txid):
            return 0.0
        return self._control.polled_at

    @property
    def attached(self) -> bool:
        """Whether the copy's states are known to be those of the head's history."""
        return self.copy is not None and self.lineage is not None

    @property
    def outdated(self) -> bool:
        """Whether another process has brought a transaction that is not in the head yet. 0.6 us."""
        copy = self.copy
        if copy is None:
            return self._control.generation != 0
        control = self._control
        return (
            control.log_end != copy.log.end
            or control.generation != copy.state.log
            or (copy.txid > self._head.current.txid and self.lineage is not None)
        )

    def follow_log(self, apply: Apply, listing: Listing | None) -> None:
        """Learn from the log what its owner has found: `apply` takes each new transaction.

        `listing` is asked for when the copy was begun anew, to compare its history with ours; None: not now.
        """
        with self.guard:
            if self.owned:
                return  # since a moment ago
            copy, control = self.copy, self._control
            if copy is None or control.generation != copy.state.log:
                copy = self._switch(listing)
            if copy is None or control.generation != copy.state.log:
                return
            for record in copy.log.scan(copy.log.end, control.log_end):
                copy.adopt(record)
            if self.lineage is None and listing is not None and self._ends_in(copy, self._head.current, []):
                self.lineage = self._head.current.lineage  # we had gone on alone, and it has caught up
            self._apply(copy, apply)

    def _apply(self, copy: LocalCopy, apply: Apply) -> None:
        if self.lineage is None:
            return
        for record in list(copy.records):
            if record.file.name.min_txid > self._head.current.txid + 1:
                break
            if record.max_txid > self._head.current.txid:
                index = PageIndex(record.pgnos, record.offsets)
                layer = self._layers.known(record.file, record.header, index, record.checksum)
                apply(Arrival(layer, None))
                self.lineage = self._head.current.lineage
        self._gap = copy.txid > self._head.current.txid

    def _switch(self, listing: Listing | None) -> LocalCopy | None:
        """The copy has other files now: the same history folded, or another one."""
        before = self.copy
        state = read_state(self.directory.path)
        if self._control.generation == 0:
            self.copy = self.lineage = None  # given up by its owner
        if state is None or state.log != self._control.generation:
            return self.copy  # it changes right now; what we have of it stays good
        try:
            if before is not None and before.state.lineage == state.lineage and self.lineage is not None:
                copy = LocalCopy(self.directory.path, state)
                for record in copy.log.scan(0, self._control.log_end):
                    copy.adopt(record)
                self.copy = copy
            elif listing is not None:
                self.copy = self.lineage = None
                self._join(listing())
        except (OSError, Foreign) as exc:
            log.info("the local copy of %s is not followed at the moment: %s", self._url, exc)
            return self.copy
        self.complete = False
        return self.copy

    def take_over(self, apply: Apply) -> bool:
        """Become the owner if the one before is gone; `apply` takes each transaction that it had found last.

        Raises `OSError`; then there is no copy any more.
        """
        if not self.directory.try_own():
            return False
        log.info("going on with the local copy of %s, whose owner is gone", self._url)
        with self.guard:
            copy = self.copy
            state = read_state(self.directory.path)
            if copy is not None and self._control.generation == copy.state.log:
                for record in copy.log.scan(copy.log.end):
                    copy.adopt(record)
                if state is None or state.log != copy.state.log:
                    # It had built a new base, and not told. What we go on with must be what a crash leaves.
                    write_state(self.directory.path, copy.state)
                self.announce(copy)
                self.complete = not copy.missing()
                self._apply(copy, apply)
            else:
                self.copy = self.lineage = None
                if state is not None and state.url == self._url:
                    with contextlib.suppress(OSError, ValueError):
                        self.copy = self._reopen(state)
                if self.copy is None:
                    self.begin(self._head.current)
            if self.copy is not None:
                self.directory.sweep(self.copy.state)
        return True

    # -- the end --

    def close(self) -> None:
        """Let go of everything; a private copy is removed."""
        self.copy = None
        self.directory.close()

    def abandon(self) -> None:
        """In a forked child: the copy is the parent's."""
        self.copy = None
        self.directory.abandon()


def _proof(layer: Layer) -> Proof:
    pgnos = None if layer.header.is_snapshot or layer.holds_everything else array("I", layer.index.pgnos)
    return Proof.of(layer.file, layer.header, pgnos)
