"""Stretches of LTX files in memory, and those that are on their way here.

Pages stay compressed until somebody asks for them: reading ahead then costs no decoding, holds half the memory, and a
gap that was read over between two wanted frames is as good as the rest. A file's bytes never change (its identity
would), so nothing here is ever stale.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from enum import Enum, auto

Data = bytes | memoryview
EXTENT = 1600
"""Bytes that an extent takes beside its own, and the job that brings it: most of that is what others wait on."""
FILE = 250
"""The same for a whole file."""
_GRANULE = 18
"""Extents are found by the 256 KiB pieces of their file that they touch."""


class State(Enum):
    """Where an extent's bytes are."""

    WAITING = auto()
    """Nobody fetches it yet: who needs it may claim it."""
    FLYING = auto()
    HERE = auto()
    FAILED = auto()


class Extent:
    """Bytes start <= offset < end of one layer's file. Owned by `Extents`, which alone changes it."""

    __slots__ = ("ahead", "arrived", "data", "end", "number", "start", "state")

    def __init__(self, number: int, start: int, end: int, state: State) -> None:
        self.number = number
        """The layer's."""
        self.start = start
        self.end = end
        self.state = state
        self.ahead = 0
        """Pages in it that were announced (see `Extents.announce`) and nobody has read yet."""
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
    under way included, oldest first out.
    """

    def __init__(self, whole_total: int, passing_total: int) -> None:
        self._whole_total = whole_total
        self._passing_total = passing_total
        self._whole: OrderedDict[int, bytes] = OrderedDict()
        self._whole_size = 0
        self._passing: dict[Extent, None] = {}
        """Oldest first, and so they go: what was read ahead and is not used yet is younger than what was used."""
        self._passing_size = 0
        self._flying_size = 0
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

    @property
    def room(self) -> int:
        """Bytes that may be fetched ahead now: what is under way must not push out what has just come."""
        return self._passing_total * 3 // 4 - self._flying_size

    def find(self, number: int, start: int, end: int) -> Extent | None:
        """An extent, here or on its way, that has all of start <= offset < end."""
        with self._lock:
            return self._find(number, start, end)

    def _find(self, number: int, start: int, end: int) -> Extent | None:
        for extent in self._places.get((number, start >> _GRANULE), ()):
            if extent.start <= start and end <= extent.end:
                return extent
        return None

    def begin(self, number: int, start: int, end: int, state: State, inner: tuple[int, int]) -> tuple[Extent, bool]:
        """A new extent for start..end, and True; or the one that covers the range `inner` already, and False."""
        with self._lock:
            found = self._find(number, *inner)
            if found is not None:
                return found, False
            extent = Extent(number, start, end, state)
            self._add(extent)
            self._flying_size += extent.memory
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
                extent.data, extent.state = data, State.HERE
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
            extent = Extent(number, start, start + len(data), State.HERE)
            extent.data = data
            self._add(extent)
            self._shrink(extent)

    def drop(self, number: int) -> None:
        """Forget every byte of one layer."""
        with self._lock:
            whole = self._whole.pop(number, None)
            if whole is not None:
                self._whole_size -= len(whole) + FILE
            gone = [extent for extent in self._passing if extent.number == number]
            for extent in gone:
                self._remove(extent)
        for extent in gone:
            extent.arrived.set()

    def discard(self, extent: Extent) -> None:
        """Forget one extent: its bytes are damaged."""
        with self._lock:
            self._remove(extent)

    def _add(self, extent: Extent) -> None:
        self._passing[extent] = None
        self._passing_size += extent.memory
        for granule in range(extent.start >> _GRANULE, (extent.end - 1 >> _GRANULE) + 1):
            self._places.setdefault((extent.number, granule), []).append(extent)

    def _shrink(self, newest: Extent) -> None:
        if self._passing_size <= self._passing_total:
            return
        for extent in [each for each in self._passing if each.state is State.HERE and each is not newest]:
            self._remove(extent)
            if self._passing_size <= self._passing_total:
                return

    def _remove(self, extent: Extent) -> None:
        if extent not in self._passing:
            return
        del self._passing[extent]
        self._passing_size -= extent.memory
        if extent.state in (State.WAITING, State.FLYING):
            self._flying_size -= extent.memory
        if extent.state is State.HERE:
            self.pages_unused += extent.ahead
        else:
            self.pages_ahead -= extent.ahead
        extent.ahead = 0
        # Who has found it may go on reading its bytes.
        if extent.state is not State.HERE:
            extent.state = State.FAILED
        for granule in range(extent.start >> _GRANULE, (extent.end - 1 >> _GRANULE) + 1):
            places = self._places[extent.number, granule]
            places.remove(extent)
            if not places:
                del self._places[extent.number, granule]
