"""Pieces of files in a given order, read side by side."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue

from lazyreplica.storage import Store, StoredFile

PIECE = 4 << 20
"""Bytes of one request at most: 70 ms at 60 MB/s, so that a round trip of 20 ms between two of them costs a quarter."""
_AHEAD = 4
"""So many pieces wait for the decoder while all connections are busy."""
_MOST = 14
"""Pieces in memory at most: 56 MB."""


@dataclass(frozen=True, slots=True)
class Piece:
    """`length` bytes of `file` from `offset`, at most `PIECE`."""

    file: StoredFile
    offset: int
    length: int


class PieceReader:
    """Reads ahead over some connections, into a fixed number of buffers. `read` belongs to one thread."""

    def __init__(self, store: Store, connections: int, timeout: float, gate: threading.Event) -> None:
        """`timeout` is for each request, in seconds; none is sent while `gate` is not set."""
        self._store = store
        self._timeout = timeout
        self._gate = gate
        # Where a call costs no waiting, one that reads ahead is enough.
        threads = max(1, min(connections, store.parallel, _MOST - 1))
        self._threads = ThreadPoolExecutor(threads)
        self._buffers: SimpleQueue[bytearray] = SimpleQueue()
        for _ in range(min(threads + _AHEAD, _MOST)):
            self._buffers.put(bytearray(PIECE))
        self._connections = threads

    def prepare(self) -> None:
        """Connect, while the caller does something else."""
        for _ in range(self._connections):
            self._threads.submit(self._store.prepare, self._timeout)

    def read(self, pieces: Iterable[Piece]) -> Generator[memoryview]:
        """The bytes of each piece, good until the next is asked for. Raises what `Store.read_into` raises.

        Ending the iteration early gives up what is under way.
        """
        waiting: deque[tuple[bytearray, int, Future[None]]] = deque()
        rest = iter(pieces)
        coming = next(rest, None)
        try:
            while coming or waiting:
                # What an earlier iteration gave up may still hold buffers: then wait for one.
                while coming and not (waiting and self._buffers.empty()):
                    buffer = self._buffers.get()
                    waiting.append((buffer, coming.length, self._threads.submit(self._fetch, coming, buffer)))
                    coming = next(rest, None)
                buffer, length, fetched = waiting[0]
                fetched.result()
                with memoryview(buffer) as view:
                    yield view[:length]
                waiting.popleft()
                self._buffers.put(buffer)
        finally:
            for buffer, _, fetched in waiting:
                self._give_up(buffer, fetched)

    def _fetch(self, piece: Piece, buffer: bytearray) -> None:
        self._gate.wait()
        with memoryview(buffer) as view, view[: piece.length] as wanted:
            self._store.read_into(piece.file, piece.offset, wanted, self._timeout)

    def _give_up(self, buffer: bytearray, fetched: Future[None]) -> None:
        fetched.cancel()
        fetched.add_done_callback(lambda _: self._buffers.put(buffer))
