"""Stretches of LTX files in memory, and those that are on their way here.

Pages stay compressed until somebody asks for them: reading ahead then costs no decoding, holds half the memory, and a
gap that was read over between two wanted frames is as good as the rest. A file's bytes never change (its identity
would), so nothing here is ever stale.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from enum import Enum, auto
from typing import Protocol

from lazyreplica.clock import now

Data = bytes | memoryview
EXTENT = 1600
"""Bytes that an extent takes beside its own, and the job that brings it: most of that is what others wait on."""
FILE = 250
"""The same for a whole file."""
_STALE = 1.0
"""Seconds after which what was read ahead, and came, and nobody used, was read ahead in vain."""
_QUIET = 0.5
"""Seconds after which an owner that neither sends for anything nor gets on has no share of what it has not; when its
transaction has ended it has none at once."""
_GRANULE = 18
"""Extents are found by the 256 KiB pieces of their file that they touch."""


class Owner(Protocol):
    """Who reads, and reads ahead."""

    reading: bool
    """Whether it still does."""


class State(Enum):
    """Where an extent's bytes are."""

    WAITING = auto()
    """Nobody fetches it yet: who needs it may claim it."""
    FLYING = auto()
    HERE = auto()
    FAILED = auto()


class Extent:
    """Bytes start <= offset < end of one layer's file. Owned by `Extents`, which alone changes it."""

    __slots__ = ("ahead", "arrived", "data", "end", "number", "owner", "since", "start", "state")

    def __init__(self, number: int, start: int, end: int, state: State, owner: Owner | None) -> None:
        self.number = number
        """The layer's."""
        self.start = start
        self.end = end
        self.state = state
        self.ahead = 0
        """Pages in it that were announced (see `Extents.announce`) and nobody has read yet."""
        self.owner = owner
        """Whose share it takes, until that reader has used it; then None."""
        self.since = 0.0
        """When it came."""
        self.data: Data = b""
        self.arrived = threading.Event()
        """Set when it is here, or failed."""

    def __len__(self) -> int:
        return self.end - self.start

    @property
    def memory(self) -> int:
        """Bytes, once it is here."""
        return len(self) + EXTENT


class Extents:
    """All extents of one replica. Thread-safe; never waits for anything but its own short lock.

    Two kinds, each bounded in bytes of memory, what surrounds the data included: whole files, least recently used first
    out, which outlive the deletion of the file in the store; and stretches that were read on demand or ahead, those
    under way included.

    Of the stretches, those go first that were used, the least recently used in front. What readers have sent for and
    not used yet has most of the room, in equal shares for those who read: who reads ahead is refused, before he pushes
    out what another one is about to read.
    """

    def __init__(self, whole_total: int, passing_total: int) -> None:
        self._whole_total = whole_total
        self._passing_total = passing_total
        self._whole: OrderedDict[int, bytes] = OrderedDict()
        self._whole_size = 0
        self._used: OrderedDict[Extent, None] = OrderedDict()
        """Without an owner. Least recently used first, as far as that is told, and so they go."""
        self._owned: dict[Extent, None] = {}
        """Oldest first."""
        self._passing_size = 0
        self._flying_size = 0
        """Of those without an owner."""
        self._ahead: dict[Owner, int] = {}
        """Owner -> bytes of memory of what is theirs."""
        self._lately: dict[Owner, float] = {}
        """Those owners -> when they sent for something, or began with another extent."""
        self._current: dict[Owner, Extent] = {}
        """Reader that is reading -> the extent that it has used last."""
        self._places: dict[tuple[int, int], list[Extent]] = {}
        self._lock = threading.Lock()
        self.pages_ahead = self.pages_unused = 0
        """Pages that were announced, and those of them that were dropped unread."""

    # -- whole files --

    def keep_whole(self, number: int, data: bytes) -> None:
        """Keep all bytes of a layer's file, if they fit at all."""
        with self._lock:
            if len(data) + FILE > self._whole_total or number in self._whole:
                return
            self._whole[number] = data
            self._whole_size += len(data) + FILE
            while self._whole_size > self._whole_total:
                self._whole_size -= len(self._whole.popitem(last=False)[1]) + FILE

    def whole(self, number: int) -> bytes | None:
        """All bytes of a layer's file, if they are here. About 0.3 us."""
        data = self._whole.get(number)
        if data is not None:
            with self._lock:
                if number in self._whole:
                    self._whole.move_to_end(number)
        return data

    # -- stretches --

    @property
    def memory(self) -> int:
        """Bytes that all of it takes, what is under way included."""
        return self._whole_size + self._passing_size

    def share(self, owner: Owner) -> int:
        """Bytes that `owner` may have sent for and not used yet."""
        with self._lock:
            return self._share(owner)

    def _share(self, owner: Owner) -> int:
        quiet = now() - _QUIET
        others = sum(each.reading and when > quiet for each, when in self._lately.items() if each is not owner)
        return self._passing_total * 4 // 5 // (others + 1)

    def room(self, owner: Owner) -> int:
        """Bytes that `owner` may send for now."""
        with self._lock:
            self._give_up_stale()
            left = self._passing_total * 4 // 5 - self._flying_size - sum(self._ahead.values())
            return min(left, self._share(owner) - self._ahead.get(owner, 0))

    def _give_up_stale(self) -> None:
        """Nobody came for them: a scan was ended, or a guess was wrong."""
        before = now() - _STALE
        for reader in [reader for reader in self._current if not reader.reading]:
            del self._current[reader]
        stale = [each for each in self._owned if each.state is State.HERE and each.since < before]
        current = set(self._current.values())
        for extent in stale:
            if extent not in current:
                self._disown(extent)

    def use(self, extent: Extent, reader: Owner) -> None:
        """The reader has taken a page out of that extent, and is done with the one that it used before. 0.1 us."""
        before = self._current.get(reader)
        if before is extent:
            return
        reader.reading = True
        with self._lock:
            if before is not None:
                self._disown(before)
            if extent in self._used:
                self._used.move_to_end(extent)
            if reader in self._lately:
                self._lately[reader] = now()
            if extent in self._used or extent in self._owned:
                self._current[reader] = extent
            else:
                self._current.pop(reader, None)

    def current(self, reader: Owner) -> Extent | None:
        """The extent that `reader` has used last, while it is kept. 0.1 us."""
        return self._current.get(reader)

    def _disown(self, extent: Extent) -> None:
        if extent in self._owned and extent.state is State.HERE:
            self._release(extent)
            del self._owned[extent]
            self._used[extent] = None

    def _release(self, extent: Extent) -> None:
        """It takes nobody's share any more."""
        owner, extent.owner = extent.owner, None
        assert owner is not None, "who calls has found it among those with one"
        left = self._ahead[owner] - extent.memory
        if left:
            self._ahead[owner] = left
        else:
            del self._ahead[owner], self._lately[owner]

    def find(self, number: int, start: int, end: int) -> Extent | None:
        """An extent, here or on its way, that has all of start <= offset < end."""
        with self._lock:
            return self._find(number, start, end)

    def _find(self, number: int, start: int, end: int) -> Extent | None:
        for extent in self._places.get((number, start >> _GRANULE), ()):
            if extent.start <= start and end <= extent.end:
                return extent
        return None

    def begin(
        self,
        number: int,
        start: int,
        end: int,
        state: State,
        inner: tuple[int, int],
        owner: Owner | None = None,
    ) -> tuple[Extent, bool]:
        """A new extent for start..end, and True; or the one that covers the range `inner` already, and False.

        `owner`: the reader that is going to use it; it counts as his until he has.
        """
        with self._lock:
            found = self._find(number, *inner)
            if found is not None:
                return found, False
            extent = Extent(number, start, end, state, owner)
            self._add(extent)
            self._shrink(extent)
            return extent, True

    def announce(self, extent: Extent, pages: int) -> None:
        """So many pages of a new extent are expected to be read."""
        with self._lock:
            if extent.state is not State.FAILED:
                extent.ahead = pages
                self.pages_ahead += pages

    def claim(self, extent: Extent) -> bool:
        """Whether the caller is the one who has to fetch a waiting extent."""
        with self._lock:
            if extent.state is not State.WAITING:
                return False
            extent.state = State.FLYING
            return True

    def finish(self, extent: Extent, data: Data) -> None:
        """The bytes have come."""
        with self._lock:
            if extent.state is State.FLYING:
                extent.data, extent.state, extent.since = data, State.HERE, now()
                if extent.owner is None:
                    self._flying_size -= extent.memory
                self._shrink(extent)
        extent.arrived.set()

    def fail(self, extent: Extent) -> None:
        """They will not; whoever waits looks for itself."""
        with self._lock:
            self._remove(extent)
        extent.arrived.set()

    def add(self, number: int, start: int, data: bytes) -> None:
        """A stretch that came along with something else, if it fits."""
        if not 0 < len(data) <= self._passing_total - EXTENT:
            return
        with self._lock:
            extent = Extent(number, start, start + len(data), State.HERE, None)
            extent.data = data
            self._add(extent)
            self._shrink(extent)

    def drop(self, number: int) -> None:
        """Forget every byte of one layer."""
        with self._lock:
            whole = self._whole.pop(number, None)
            if whole is not None:
                self._whole_size -= len(whole) + FILE
            gone = [extent for extent in (*self._used, *self._owned) if extent.number == number]
            for extent in gone:
                self._remove(extent)
        for extent in gone:
            extent.arrived.set()

    def discard(self, extent: Extent) -> None:
        """Forget one extent: its bytes are damaged."""
        with self._lock:
            self._remove(extent)

    def _add(self, extent: Extent) -> None:
        self._passing_size += extent.memory
        if extent.owner is None:
            self._used[extent] = None
            if extent.state is not State.HERE:
                self._flying_size += extent.memory
        else:
            self._owned[extent] = None
            self._ahead[extent.owner] = self._ahead.get(extent.owner, 0) + extent.memory
            self._lately[extent.owner] = now()
            extent.owner.reading = True
        for granule in range(extent.start >> _GRANULE, (extent.end - 1 >> _GRANULE) + 1):
            self._places.setdefault((extent.number, granule), []).append(extent)

    def _shrink(self, newest: Extent) -> None:
        if self._passing_size <= self._passing_total:
            return
        for extent in [e for e in (*self._used, *self._owned) if e.state is State.HERE and e is not newest]:
            self._remove(extent)
            if self._passing_size <= self._passing_total:
                return

    def _remove(self, extent: Extent) -> None:
        if extent in self._owned:
            del self._owned[extent]
            self._release(extent)
        elif extent in self._used:
            del self._used[extent]
            if extent.state is not State.HERE:
                self._flying_size -= extent.memory
        else:
            return
        self._passing_size -= extent.memory
        if extent.state is State.HERE:
            self.pages_unused += extent.ahead
        else:
            self.pages_ahead -= extent.ahead
        extent.ahead = 0
        # Who has found it may go on reading its bytes.
        if extent.state is not State.HERE:
            extent.state = State.FAILED
        for reader in [reader for reader, current in self._current.items() if current is extent]:
            del self._current[reader]
        for granule in range(extent.start >> _GRANULE, (extent.end - 1 >> _GRANULE) + 1):
            places = self._places[extent.number, granule]
            places.remove(extent)
            if not places:
                del self._places[extent.number, granule]
