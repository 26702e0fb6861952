"""The bulk loader's work: files side by side from storage, pages in order into the database file.

Two threads count: this one, and that of the connection that has bytes just now. Measured for 587 MB of 4 KiB pages
over HTTP, in 1.4 s of CPU time: decoding and writing 1.0 s, of which 0.25 s are the system's; receiving 0.4 s.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain, islice
from operator import itemgetter

from lazyreplica.bulk.job import BulkJob, Event, FileDamaged, FileDone, FileGone, Progress
from lazyreplica.bulk.pages import PageFile
from lazyreplica.bulk.pieces import Piece, PieceReader
from lazyreplica.bulk.plan import Plan, check_header, plan, plan_whole
from lazyreplica.errors import FileVanished, LazyReplicaError, LTXError
from lazyreplica.ltx.decoder import StreamDecoder
from lazyreplica.ltx.frame import decode_frame
from lazyreplica.storage import Store

_SLICE = 256 << 10
"""Bytes of a file that are decoded at a time: half a millisecond, and what they become stays in the CPU's cache."""
_BATCH = 512 << 10
"""Bytes of pages that are written at once."""
_REPORT = 0.05
"""Seconds between two reports of progress."""


class Loader:
    """Does one job, in one thread."""

    def __init__(
        self, job: BulkJob, store: Store, reader: PieceReader, gate: threading.Event, tell: Callable[[Event], None]
    ) -> None:
        """Works while `gate` is set. Raises `OSError`, `ValueError` for pages that the files have no place for."""
        self._job = replace(job, frames=())
        self._frames = job.frames
        self._store = store
        self._gate = gate
        self._tell = tell
        self._reader = reader
        self._target = PageFile(job.database, job.presence, job.page_size)
        in_files = (int.from_bytes(each.wanted, "little").bit_length() for each in job.files)
        highest = max(chain(in_files, (pgno for pgno, _ in job.frames)), default=0)
        if highest > self._target.page_count:
            raise ValueError(f"page {highest} is wanted, the presence file has {self._target.page_count}")
        self._plans: dict[int, Plan | LazyReplicaError] = {}
        self._pages = self._bytes = 0
        self._reported = 0.0
        self._present = 0
        """Pages of the present file that are marked."""

    def run(self) -> None:
        """Raises `StoreError` except `FileVanished`, `OSError`."""
        self._load_frames()
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

    def _load_frames(self) -> None:
        """Decode and write what came with the job. A page that cannot be decoded is simply not there."""
        page_size, frames = self._job.page_size, self._frames
        self._frames = ()

        def decode() -> Iterator[tuple[int, bytes]]:
            for pgno, frame in sorted(frames, key=itemgetter(0)):
                with contextlib.suppress(LTXError):
                    yield pgno, decode_frame(frame, pgno, page_size)

        self._write(decode(), b"\1" * (self._target.page_count + 1))

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
        if found.stretches is None:
            self._load_whole(index, found, pieces)
        else:
            table = self._job.files[index].page_table()
            for span in found.stretches.spans:
                self._load_stretch(found.stretches.index.frames(*span), next(pieces), table)
        del self._plans[index]  # not before: `pieces` looks at it when the first piece is asked for

    def _load_whole(self, index: int, found: Plan, pieces: Iterator[memoryview]) -> None:
        """Decode all of the file, write what is wanted, verify the file's checksum."""
        wanted = self._job.files[index]
        table = wanted.page_table()
        decoder = StreamDecoder()
        for piece in islice(pieces, len(found.pieces)):
            for start in range(0, len(piece), _SLICE):
                self._gate.wait()
                pages = decoder.feed(piece[start : start + _SLICE].tobytes())
                first = next(pages, None)
                if first is not None:
                    assert decoder.header is not None, "it comes before the pages"
                    check_header(decoder.header, wanted.file, self._job.page_size)
                    self._write(chain((first,), pages), table)
                self._count(0, min(_SLICE, len(piece) - start))
        decoder.close()
        if self._present != wanted.count:
            raise LTXError(f"{wanted.file} holds {self._present} of {wanted.count} wanted pages")

    def _load_stretch(self, frames: Iterable[tuple[int, int, int]], piece: memoryview, table: bytes) -> None:
        """Decode and write what is wanted of frames (page number, offset, size) that follow one another."""
        page_size, base = self._job.page_size, 0

        def decode() -> Iterator[tuple[int, bytes]]:
            nonlocal base
            for pgno, offset, size in frames:
                base = base or offset
                if table[pgno]:
                    yield pgno, decode_frame(piece[offset - base : offset - base + size], pgno, page_size)

        self._write(decode(), table)
        self._count(0, len(piece))

    def _write(self, pages: Iterable[tuple[int, bytes]], table: bytes) -> None:
        """Write those of the pages that the table has, neighbours together."""
        most, size = max(1, _BATCH // self._job.page_size), len(table)
        expected = limit = 0
        run: list[bytes] = []
        for pgno, page in pages:
            if pgno < size and table[pgno]:
                if pgno != expected or pgno == limit:
                    self._write_run(expected, run)
                    run, limit = [], pgno + most
                run.append(page)
                expected = pgno + 1
        self._write_run(expected, run)

    def _write_run(self, end: int, run: list[bytes]) -> None:
        """Write neighbours, up to page `end`, exclusive."""
        if run:
            self._gate.wait()
            self._target.write(end - len(run), run)
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
