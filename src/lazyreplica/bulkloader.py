"""The bulk loader's work: files side by side from storage, pages in order into the database file.

Two threads count: this one, and that of the connection that has bytes just now. Measured for 587 MB of 4 KiB pages
over HTTP, in 1.4 s of CPU time: decoding and writing 1.0 s, of which 0.25 s are the system's; receiving 0.4 s.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator

from lazyreplica.bulkjob import BulkJob, Event, FileDamaged, FileDone, FileGone, Progress
from lazyreplica.bulkpages import PageFile
from lazyreplica.bulkpieces import Piece, PieceReader
from lazyreplica.bulkplan import Frame, Plan, check_header, plan, plan_whole
from lazyreplica.errors import FileVanished, LazyReplicaError, LTXError
from lazyreplica.ltx.decoder import StreamDecoder
from lazyreplica.ltx.frame import decode_frame
from lazyreplica.storage import Store

_SLICE = 256 << 10
"""Bytes of a file that are decoded at a time: half a millisecond, and what they become stays in the CPU's cache."""
_REPORT = 0.05
"""Seconds between two reports of progress."""


class Loader:
    """Does one job, in one thread."""

    def __init__(
        self, job: BulkJob, store: Store, reader: PieceReader, gate: threading.Event, tell: Callable[[Event], None]
    ) -> None:
        """Works while `gate` is set. Raises `OSError`, `ValueError` for pages that the files have no place for."""
        self._job = job
        self._store = store
        self._gate = gate
        self._tell = tell
        self._reader = reader
        self._target = PageFile(job.database, job.presence, job.page_size)
        for each in job.files:
            highest = int.from_bytes(each.wanted, "little").bit_length()
            if highest > self._target.page_count:
                raise ValueError(f"page {highest} is wanted, the presence file has {self._target.page_count}")
        self._plans: dict[int, Plan | LazyReplicaError] = {}
        self._pages = self._bytes = 0
        self._reported = 0.0
        self._present = 0
        """Pages of the present file that are marked."""

    def run(self) -> None:
        """Raises `StoreError` except `FileVanished`, `OSError`."""
        index, again = 0, False
        while index < len(self._job.files):
            try:
                with contextlib.closing(self._reader.read(self._pieces(index))) as pieces:
                    while index < len(self._job.files):
                        self._load(index, pieces)
                        self._end(FileDone(index))
                        index, again = index + 1, False
            except FileVanished as exc:
                self._end(FileGone(index, str(exc)))
                index, again = index + 1, False
            except LTXError as exc:
                self._take_back(index)
                if again:
                    self._end(FileDamaged(index, str(exc)))
                    index, again = index + 1, False
                else:
                    self._plans[index] = plan_whole(self._job.files[index].file)
                    again = True

    def _pieces(self, first: int) -> Iterator[Piece]:
        """Of all files from that one on."""
        for index in range(first, len(self._job.files)):
            found = self._plan(index)
            if isinstance(found, Plan):
                yield from found.pieces

    def _plan(self, index: int) -> Plan | LazyReplicaError:
        """How to read that file; or why not, to be raised when its turn has come."""
        if index not in self._plans:
            try:
                self._plans[index] = plan(self._store, self._job.files[index], self._job.page_size, self._job.timeout)
            except LazyReplicaError as exc:
                self._plans[index] = exc
        return self._plans[index]

    def _load(self, index: int, pieces: Iterator[memoryview]) -> None:
        self._present = 0
        found = self._plan(index)
        if not isinstance(found, Plan):
            raise found
        del self._plans[index]
        if found.frames is None:
            self._load_whole(index, found, pieces)
        else:
            for frames in found.frames:
                self._load_frames(frames, next(pieces))

    def _load_whole(self, index: int, found: Plan, pieces: Iterator[memoryview]) -> None:
        """Decode all of the file, write what is wanted, verify the file's checksum."""
        wanted = self._job.files[index]
        table = wanted.page_table()
        decoder = StreamDecoder()
        for _ in found.pieces:
            piece = next(pieces)
            for start in range(0, len(piece), _SLICE):
                self._gate.wait()
                pages = decoder.feed(piece[start : start + _SLICE].tobytes())
                first = next(pages, None)
                if first is not None:
                    assert decoder.header is not None, "it comes before the pages"
                    check_header(decoder.header, wanted.file, self._job.page_size)
                    self._write(first, pages, table)
                self._count(0, min(_SLICE, len(piece) - start))
        decoder.close()
        if self._present != wanted.count:
            raise LTXError(f"{wanted.file} holds {self._present} of {wanted.count} wanted pages")

    def _write(self, first: tuple[int, bytes], pages: Iterable[tuple[int, bytes]], table: bytes) -> None:
        """Write those of `first` and `pages` that the table has, neighbours together."""
        start, size = 0, len(table)
        run: list[bytes] = []
        for pgno, page in (first, *pages):
            if pgno < size and table[pgno]:
                if pgno != start + len(run):
                    self._write_run(start, run)
                    start, run = pgno, []
                run.append(page)
        self._write_run(start, run)

    def _load_frames(self, frames: tuple[Frame, ...], piece: memoryview) -> None:
        base = frames[0][1]
        start = 0
        run: list[bytes] = []
        for pgno, offset, size in frames:
            page = decode_frame(piece[offset - base : offset - base + size], pgno, self._job.page_size)
            if pgno != start + len(run) or len(run) * len(page) >= _SLICE:
                self._write_run(start, run)
                start, run = pgno, []
                self._gate.wait()
            run.append(page)
        self._write_run(start, run)
        self._count(0, len(piece))

    def _write_run(self, first: int, run: list[bytes]) -> None:
        if run:
            self._target.write(first, run)
            self._present += len(run)
            self._count(len(run), 0)

    def _count(self, pages: int, size: int) -> None:
        self._pages += pages
        self._bytes += size
        if time.monotonic() - self._reported > _REPORT:
            self._report()

    def _report(self) -> None:
        if self._pages or self._bytes:
            self._tell(Progress(self._pages, self._bytes))
        self._pages = self._bytes = 0
        self._reported = time.monotonic()

    def _take_back(self, index: int) -> None:
        self._target.clear(self._job.files[index].page_table())
        self._count(-self._present, 0)

    def _end(self, event: Event) -> None:
        self._report()
        self._tell(event)
