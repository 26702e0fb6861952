"""Finds a page version again after its file was deleted by compaction or retention.

A version does not change when its place does. For a snapshot pinned at TXID T, the file that held page p is gone;
another state at TXID M, made of files that exist now, holds the same bytes for p if

- M <= T and p's version was written at or before M (the snapshot itself says when: its owner's MaxTXID), or
- M > T and none of the layers T+1..M that we have seen contains p or cuts it off (those after a view of the past were
  not seen, so it gets nothing from later files);

and if p lies within the database at M: what older files hold beyond that is no part of the state.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from weakref import WeakSet

from lazyreplica.clock import now
from lazyreplica.errors import (
    EmptyReplica,
    FileVanished,
    LTXError,
    ReplicaDamaged,
    ReplicaError,
    SnapshotGone,
    StoreUnavailable,
)
from lazyreplica.head import Head
from lazyreplica.layers import Layers
from lazyreplica.ltx.name import format_txid
from lazyreplica.pagemap import Layer, PageMap, stack
from lazyreplica.plan import Chain, plan
from lazyreplica.snapshot import Lineage, PastLineage, Snapshot, origin_of
from lazyreplica.storage import Store, StoredFile

log = logging.getLogger(__name__)

_KEPT_STATES = 4


@dataclass(frozen=True, slots=True)
class _State:
    """Another chain, at another TXID perhaps, whose pages may stand in for those of a pinned snapshot."""

    lineage: Lineage
    txid: int
    commit: int
    pages: PageMap


class Relocator:
    """Remembers which files are gone and a few states made of files that are not. Thread-safe."""

    def __init__(
        self, store: Store, layers: Layers, head: Head, catch_up: Callable[[float], bool], timeout: float
    ) -> None:
        """`catch_up` makes the head follow the store's newest state, so that the layers up to it are known; it is given
        seconds. It says whether the store still holds the head's history; raises what prevented finding out.

        `timeout`: seconds until `find` gives up."""
        self._store = store
        self._layers = layers
        self._head = head
        self._catch_up = catch_up
        self._timeout = timeout
        # Held across network I/O, which only pages wait for that no known state has: one new plan serves them all.
        self._planning = threading.Lock()
        self._gone: WeakSet[Layer] = WeakSet()
        self._any_gone = False
        """Whether there ever was one: quicker to ask, and it is asked for each page."""
        self._noting = threading.Lock()  # held to add to `_gone`, and to go through it
        # Replaced as a whole and never changed, so it is read without a lock. Written by who holds `_planning`.
        self._states: tuple[_State, ...] = ()
        self._outdated = False
        """Whether a file of one of the states has gone too: then the listings behind all of them are out of date."""

    def is_gone(self, layer: Layer) -> bool:
        """Whether the layer's file is known to have vanished, so that asking for it again is a wasted request."""
        return self._any_gone and layer in self._gone

    def stand_in(self, snapshot: Snapshot, pgno: int) -> Layer | None:
        """What `find` answers, where that is known already; else None. Never waits."""
        written = snapshot.owner(pgno).max_txid
        for state in self._states:
            if state.lineage is not origin_of(snapshot.lineage) or pgno > state.commit:
                continue
            if state.txid <= snapshot.txid:
                same = written <= state.txid
            else:
                same = not self._head.changed_since(snapshot, pgno, state.txid)
            if same:
                layer = state.pages.owner(pgno)
                if layer is not None and layer not in self._gone and self._layers.distrusted(layer) is None:
                    return layer
        return None

    def find(self, snapshot: Snapshot, pgno: int, gone: Layer) -> Layer:
        """A layer that holds the snapshot's version of page `pgno` in a file that should still exist.

        `gone` is the layer whose file has vanished. Raises `SnapshotGone` if that version is nowhere any more,
        `StoreUnavailable` when that is not known within the timeout, for which turn others may have spent already.
        """
        deadline = now() + self._timeout
        if gone not in self._gone:
            with self._noting:
                self._gone.add(gone)
                self._any_gone = True
            if any(gone in state.pages.layers() for state in self._states):
                self._outdated = True
        found = None if self._outdated else self.stand_in(snapshot, pgno)
        if found is None:
            if not self._planning.acquire(timeout=self._timeout):
                raise self._late(gone)
            try:
                # Whoever had the lock before us may have learned of it.
                found = None if self._outdated else self.stand_in(snapshot, pgno)
                if found is None:
                    listed = self._plan_again(snapshot, gone, deadline)
                    found = self.stand_in(snapshot, pgno)
                    if found is None and self._take_back(listed):
                        self._plan_again(snapshot, gone, deadline)
                        found = self.stand_in(snapshot, pgno)
            finally:
                self._planning.release()
        if found is None:
            raise SnapshotGone(
                f"page {pgno} as of TXID {format_txid(snapshot.txid)} is in no file of {self._store.url} any more "
                f"({gone.file} was removed by compaction or retention while this read transaction was open): "
                + (
                    "set the time or TXID again, to what is left"
                    if isinstance(snapshot.lineage, PastLineage)
                    else "roll back and retry; the newest state is available"
                )
            )
        log.debug("page %d of %s is read from %s now", pgno, gone, found)
        return found

    def _late(self, gone: Layer) -> StoreUnavailable:
        return StoreUnavailable(
            f"{gone.file} of {self._store.url} was removed, and which files hold its pages now was not known within "
            f"{self._timeout:g} seconds: try again"
        )

    def _take_back(self, listed: Iterable[StoredFile]) -> bool:
        """Believe a listing that still shows files which a read did not find: a store may say so for a moment.

        Returns whether there are such files. Only asked where nothing else is left, for a listing may be out of date.
        """
        shown = set(listed)
        with self._noting:
            back = [layer for layer in self._gone if layer.file in shown]
            for layer in back:
                self._gone.discard(layer)
        for layer in back:
            log.info("%s was not found, but is listed: trying it again", layer)
        return bool(back)

    def _plan_again(self, snapshot: Snapshot, gone: Layer, deadline: float) -> tuple[StoredFile, ...]:
        """Learn of states made of the files that are there now: the newest, and the newest at or below the pin.

        Returns the listing.
        """

        def left() -> float:
            seconds = deadline - now()
            if seconds <= 0:
                raise self._late(gone)
            return seconds

        listed: tuple[StoredFile, ...] = ()
        for attempt in range(3):
            self._states = tuple(s for s in self._states if not any(layer in self._gone for layer in s.pages.layers()))
            self._outdated = False
            with self._noting:
                vanished = {layer.file for layer in self._gone}
            listed = self._store.list_all(left()).files
            files = [file for file in listed if file not in vanished]
            try:
                # Between the listing and the use of its newest state: then every layer up to that is known.
                ours = self._catch_up(left())
                lineage = self._head.current.lineage
                if not ours or origin_of(snapshot.lineage) is not lineage:
                    return ()  # the listing shows another history: nothing in it can stand in
                for chain in _candidates(files, snapshot.txid):
                    self._remember(lineage, chain, left())
            except FileVanished as exc:
                log.info("files vanished while planning again, attempt %d: %s", attempt + 1, exc)
                continue
            return listed
        return listed

    def _remember(self, lineage: Lineage, chain: Chain, timeout: float) -> None:
        try:
            layers = self._layers.open_chain(chain, timeout=timeout)
        except (LTXError, ReplicaDamaged) as exc:
            log.warning("a chain of %s that could replace a vanished file is damaged: %s", self._store.url, exc)
            return
        last = layers[-1]
        state = _State(lineage, last.max_txid, last.header.commit, stack(layers))
        self._states = (state, *self._states)[:_KEPT_STATES]


def _candidates(files: list[StoredFile], txid: int) -> list[Chain]:
    chains: list[Chain] = []
    for limit in (None, txid):
        try:
            chain = plan(files, limit)
        except EmptyReplica:
            continue
        except ReplicaError as exc:
            log.info("no plan %s: %s", "for the newest state" if limit is None else "for the pinned one", exc)
            continue
        chains.append(chain)
    return chains
