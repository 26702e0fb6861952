"""The newest snapshot, and which snapshots are pinned. One lock, held for a few instructions."""

from __future__ import annotations

import threading
from collections import deque

from lazyreplica.local.copy import View
from lazyreplica.pagemap import Layer
from lazyreplica.snapshot import Snapshot


class Hold:
    """A reader's hold on what it sees: pinned while `active`.

    Between two transactions it remembers the snapshot without pinning it. The next one then takes no lock: it sets the
    flag first, and looks second whether that snapshot is still the one that is shown (`Replica.resume`). Who moves the
    head exchanges what is shown first, and looks at the flags second: so one of the two sees the other.
    """

    __slots__ = ("active", "edition", "size", "snapshot", "view")

    def __init__(self) -> None:
        self.active = False
        self.snapshot: Snapshot | None = None
        self.view: View | None = None
        """The local copy as of the snapshot, if there is one."""
        self.size = 0
        """Of the snapshot's database, in bytes."""
        self.edition = 0
        """`Head.edition` when the view was asked for."""


class Head:
    """Owner of the current snapshot. A reader pins it, and what it pinned stays readable until it unpins."""

    def __init__(self, snapshot: Snapshot, *, fixed: bool = False) -> None:
        """`fixed`: readers go on seeing `snapshot`, whatever becomes current, until `show_current`."""
        self._current = snapshot
        self._fixed = fixed
        self.shown = snapshot
        """What a reader that starts now sees: the current snapshot, or the fixed one."""
        self._pins: dict[Snapshot, int] = {snapshot: 1} if fixed else {}
        self._history: deque[Layer] = deque()
        """Layers applied in the current lineage since the oldest pinned snapshot of it, without a hole."""
        self._holds: list[Hold] = []
        self.edition = 0
        """Counts what makes another view of the same snapshot worth asking for; written by one thread."""
        self._changed = threading.Condition()

    @property
    def current(self) -> Snapshot:
        return self._current

    def show_current(self) -> None:
        """Where the view is fixed, fix it to the current snapshot."""
        with self._changed:
            if self._fixed:
                before, self.shown = self.shown, self._pin(self._current)
                self._forget_idle()
                self._unpin(before)

    def pin(self, snapshot: Snapshot | None = None) -> Snapshot:
        """Pin what is shown, or once more what is pinned already. Each pin needs its `unpin`."""
        with self._changed:
            return self._pin(snapshot or self.shown)

    def add_hold(self) -> Hold:
        """A hold on nothing yet, until `drop`."""
        hold = Hold()
        with self._changed:
            self._holds.append(hold)
        return hold

    def drop(self, hold: Hold) -> None:
        """The reader has gone."""
        with self._changed:
            hold.active = False
            if hold in self._holds:
                self._holds.remove(hold)

    def drop_views(self) -> None:
        """What is local is not certain any more: nobody reads it without asking the replica, from now on."""
        with self._changed:
            for hold in self._holds:
                hold.view = None

    def look_again(self) -> None:
        """The local copy has more than before, or it is simpler to read: each reader's next transaction asks for it."""
        self.edition += 1

    def hand_over(self, snapshot: Snapshot, hold: Hold) -> None:
        """What was pinned for a reader is pinned by its `hold` from now on."""
        with self._changed:
            hold.snapshot = snapshot
            hold.active = True
            self._unpin(snapshot)

    def _forget_idle(self) -> None:
        """What is shown has changed: holds that pin nothing need not remember (and keep files open for) what was."""
        for hold in self._holds:
            if not hold.active:
                hold.snapshot = hold.view = None

    def _pinned(self) -> list[Snapshot]:
        # A copy: the garbage collector may close a connection, and so unpin, at any allocation in here.
        held = [hold.snapshot for hold in list(self._holds) if hold.active]
        return [*list(self._pins), *(snapshot for snapshot in held if snapshot is not None)]

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
            pinned = [snapshot for snapshot in self._pinned() if snapshot.lineage.number == number]
            return min((self._current, *pinned), key=lambda snapshot: snapshot.txid)

    def advance(self, snapshot: Snapshot) -> None:
        """Make the successor current: the same lineage, its last layer applied."""
        with self._changed:
            assert snapshot.lineage is self._current.lineage
            self._set_current(snapshot)
            self._history.append(snapshot.last)
            self._trim()
            self._changed.notify_all()

    def replace(self, snapshot: Snapshot) -> None:
        """Make a snapshot current that was not reached link by link: another lineage or epoch."""
        with self._changed:
            self._set_current(snapshot)
            self._history.clear()
            self._changed.notify_all()

    def _set_current(self, snapshot: Snapshot) -> None:
        self._current = snapshot
        if not self._fixed:
            self.shown = snapshot
            self._forget_idle()

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
            (snapshot.txid for snapshot in self._pinned() if snapshot.lineage is lineage),
            default=self._current.txid,
        )
        while self._history and self._history[0].max_txid <= oldest:
            self._history.popleft()
