"""The newest snapshot, and which snapshots are pinned. One lock, held for a few instructions."""

from __future__ import annotations

import threading
from collections import deque

from lazyreplica.pagemap import Layer
from lazyreplica.snapshot import Snapshot


class Head:
    """Owner of the current snapshot. A reader pins it, and what it pinned stays readable until it unpins."""

    def __init__(self, snapshot: Snapshot, *, fixed: bool = False) -> None:
        """`fixed`: readers go on seeing `snapshot`, whatever becomes current, until `show_current`."""
        self._current = snapshot
        self._shown = snapshot if fixed else None
        self._pins: dict[Snapshot, int] = {snapshot: 1} if fixed else {}
        self._history: deque[Layer] = deque()
        """Layers applied in the current lineage since the oldest pinned snapshot of it, without a hole."""
        self._changed = threading.Condition()

    @property
    def current(self) -> Snapshot:
        return self._current

    @property
    def visible(self) -> Snapshot:
        """What a reader that starts now sees: the current snapshot, or the fixed one."""
        return self._shown or self._current

    def show_current(self) -> None:
        """Where the view is fixed, fix it to the current snapshot."""
        with self._changed:
            if self._shown is not None:
                before, self._shown = self._shown, self._pin(self._current)
                self._unpin(before)

    def pin(self, snapshot: Snapshot | None = None) -> Snapshot:
        """Pin what is visible, or once more what is pinned already. Each pin needs its `unpin`."""
        with self._changed:
            return self._pin(snapshot or self.visible)

    def pin_current(self) -> Snapshot:
        """Pin the current snapshot."""
        with self._changed:
            return self._pin(self._current)

    def unpin(self, snapshot: Snapshot) -> None:
        with self._changed:
            self._unpin(snapshot)

    def _pin(self, snapshot: Snapshot) -> Snapshot:
        self._pins[snapshot] = self._pins.get(snapshot, 0) + 1
        return snapshot

    def _unpin(self, snapshot: Snapshot) -> None:
        count = self._pins[snapshot] - 1
        if count:
            self._pins[snapshot] = count
        else:
            del self._pins[snapshot]
            self._trim()

    def floor(self) -> Snapshot:
        """The oldest snapshot of this history that anybody may still read: pinned, or current."""
        with self._changed:
            number = self._current.lineage.number
            # A copy: the garbage collector may close a connection, and so unpin, at any allocation in here.
            pinned = [snapshot for snapshot in list(self._pins) if snapshot.lineage.number == number]
            return min((self._current, *pinned), key=lambda snapshot: snapshot.txid)

    def advance(self, snapshot: Snapshot) -> None:
        """Make the successor current: the same lineage, its last layer applied."""
        with self._changed:
            assert snapshot.lineage is self._current.lineage
            self._current = snapshot
            self._history.append(snapshot.last)
            self._trim()
            self._changed.notify_all()

    def replace(self, snapshot: Snapshot) -> None:
        """Make a snapshot current that was not reached link by link: another lineage or epoch."""
        with self._changed:
            self._current = snapshot
            self._history.clear()
            self._changed.notify_all()

    def wait_beyond(self, txid: int, timeout: float) -> None:
        """Return as soon as the current snapshot is newer than `txid`, or after `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._current.txid > txid, timeout)

    def changed_since(self, snapshot: Snapshot, pgno: int, txid: int) -> bool:
        """Whether page `pgno` may have been changed or cut off between pinned `snapshot` and the later state at `txid`.

        True as well when the layers between are not all known: `txid` lies beyond the head, the lineage is another, or
        the snapshot was not pinned all the time.
        """
        with self._changed:
            if snapshot.lineage is not self._current.lineage or txid > self._current.txid:
                return True
            known_from = self._history[0].file.name.min_txid if self._history else self._current.txid + 1
            if known_from > snapshot.txid + 1:
                return True
            between = [
                layer for layer in self._history if layer.max_txid > snapshot.txid and layer.file.name.min_txid <= txid
            ]
        # A page that a layer cuts off is in no index, and the compacted files of later states have dropped it.
        return any(layer.header.commit < pgno or layer.index.holds(pgno) for layer in between)

    def _trim(self) -> None:
        lineage = self._current.lineage
        oldest = min(
            (snapshot.txid for snapshot in list(self._pins) if snapshot.lineage is lineage),
            default=self._current.txid,
        )
        while self._history and self._history[0].max_txid <= oldest:
            self._history.popleft()
