"""Opens LTX files: from a name in a listing to a `Layer` with its page index, checked on the way.

Small files are fetched whole and kept for a while: their pages then cost no request, survive the file's deletion by
compaction, and were verified by the file's own checksum.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import mmap
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary

from lazyreplica.clock import now
from lazyreplica.errors import LazyReplicaError, LTXError, ReplicaDamaged, StoreError
from lazyreplica.extents import Data, Extent, Extents, State
from lazyreplica.ltx.decoder import decode_file
from lazyreplica.ltx.header import HEADER_SIZE, TRAILER_SIZE, Header, Trailer
from lazyreplica.ltx.index import INDEX_END, MAX_ENTRY_SIZE, PageIndex, locate_index
from lazyreplica.ltx.lazyindex import Index, LazyIndex
from lazyreplica.ltx.name import FileName
from lazyreplica.pagemap import Layer
from lazyreplica.storage import Store, StoredFile

log = logging.getLogger(__name__)

KEEP_FILE = 256 << 10
"""Files up to this many bytes are fetched whole when opened."""
VERIFY_FILE = 8 << 20
"""Increments up to this many bytes are read whole and verified: a page index is covered by nothing but the file's
checksum, and a wrong page number in it would let an older page show through. (Of a snapshot's index every entry is
determined by its neighbours.) When a replica is opened over a network, that follows right after (`verify`)."""
QUICK_FILE = 512 << 10
"""Larger increments are verified a moment later when a replica is opened over a network: that should not wait."""
KEEP_TOTAL = 9 << 20
"""Whatever was fetched whole is kept, up to this many bytes in all; the least recently used files go first."""
PASSING_TOTAL = 10 << 20
"""Stretches of larger files stay, up to this many bytes in all, those under way included."""
ARRIVAL_LIMIT = 8 << 20
"""A new transaction's file up to this many bytes is taken whole with the request that finds it."""
_HEAD = 64 << 10
"""The first pages of a file come with its header: in a snapshot the schema, and the roots of old tables."""
_TAIL = 64 << 10
_TAIL_SHARE = 128
"""Of larger files one part in so many is read from the end: an index has about 9 bytes for a frame of 1 to 4 KB."""
_TAIL_MOST = 1 << 20
_LARGE = 64 << 10
_INDEX_MOST = 256 << 20
"""Bytes of an increment's page index, which is read whole: 25 million pages. What a file says of itself is not to
cost memory without bound."""
_INDEX_READS = 32
"""Requests at once for page indexes that nobody waits for: 2 MiB, half of what a lazy one keeps."""
_GUESSES = 3
"""Where entries lie is guessed so many times."""
_PIECE = 768 << 10
"""Bytes of one request for a file that is read whole: more pieces travel side by side."""
_TOGETHER = 256
"""Files of a chain that share one timeout: of a hundred thousand each gets its turn, and a store that stops answering
is noticed as soon as with one."""

_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Arrival:
    """A file found by following, with its bytes if they came along whole (and were verified)."""

    layer: Layer
    data: bytes | None


class Layers:
    """The opened files of one replica. Thread-safe; a file in use is opened once and shared."""

    def __init__(self, store: Store, timeout: float, keep: int | None = None) -> None:
        """`timeout` in seconds for a request; `keep`: bytes of whole files that stay in memory (None: `KEEP_TOTAL`)."""
        self._store = store
        self._timeout = timeout
        self._lock = threading.Lock()
        self._open: WeakValueDictionary[StoredFile, Layer] = WeakValueDictionary()
        self._unverified: WeakSet[Layer] = WeakSet()
        """Increments that were opened by head and tail."""
        self._distrusted: WeakKeyDictionary[Layer, str] = WeakKeyDictionary()
        self._any_distrusted = False
        """Whether there ever was one: quicker to ask, and it is asked for each page."""
        self.extents = Extents(KEEP_TOTAL if keep is None else keep, PASSING_TOTAL)

    def headers(self, files: Iterable[StoredFile]) -> dict[StoredFile, Header]:
        """The headers of those files that are open."""
        with self._lock:
            return {file: layer.header for file in files if (layer := self._open.get(file)) is not None}

    def header_of(self, file: StoredFile) -> Header | None:
        """The file's header; None if it cannot be read."""
        try:
            return self.open(file).header
        except LazyReplicaError as exc:
            log.info("%s cannot be read: %s", file, exc)
            return None

    def kept(self, layer: Layer) -> bytes | None:
        """All bytes of the layer's file, if they are here."""
        return self.extents.whole(layer.number)

    def distrust(self, layer: Layer, reason: str) -> None:
        """The layer's file fails its checksum: none of its pages may be served from now on.

        A single page cannot be told from a damaged one (an LZ4 block carries no checksum), so all of them are refused.
        """
        self._distrusted[layer] = reason
        self._any_distrusted = True
        self.extents.drop(layer.number)

    def distrusted(self, layer: Layer) -> str | None:
        """Why the layer's file is not to be used, or None."""
        return self._distrusted.get(layer) if self._any_distrusted else None

    def open_chain(
        self,
        files: Sequence[StoredFile],
        *,
        quick: bool = False,
        opened: Callable[[Layer], None] | None = None,
        timeout: float | None = None,
    ) -> list[Layer]:
        """Open the files of a chain, all requests at once, and check that they belong together.

        `quick`: somebody waits, so what is large is not verified yet (see `verify`), and connections were prepared.
        `opened` is told of each file that is read, while others may still be on their way. `timeout`: seconds for all
        of them, if less than usual; without, a chain of very many files takes the time it needs.

        Raises `FileVanished` when a listed file is gone (plan again), `LTXError` or `ReplicaDamaged` for bad ones.
        """
        with self._lock:
            here = {file: layer for file in files if (layer := self._open.get(file)) is not None}
        new = [file for file in files if file not in here]
        most = self._store.parallel
        if len(new) <= most and sum(len(_stretches(file, quick)) for file in new) <= most:
            # All are asked for at once, and taken in shortest first: what is large, the base's page index above all, is
            # longer on its way. (Of more than can be asked for at once, the longest has to begin first.)
            new.sort(key=lambda file: sum(length for _, length in _stretches(file, quick)))
        for file, parts in zip(new, self._fetch(new, quick, timeout), strict=True):
            here[file] = self._read(file, parts, quick)
            if opened is not None:
                opened(here[file])
        layers = [here[file] for file in files]
        for layer in layers[1:]:
            check_page_size(layers[0], layer)
        return layers

    def open(self, file: StoredFile) -> Layer:
        """The layer of a listed file. Bytes that do not parse are fetched once more before that is an error."""
        return self.open_chain([file])[0]

    def _fetch(self, files: Sequence[StoredFile], quick: bool, timeout: float | None) -> Iterator[list[bytes]]:
        """The stretches of each file that opening it needs (see `_stretches`), in the order of `files`."""
        deadline = None if timeout is None else now() + timeout
        for at in range(0, len(files), _TOGETHER):
            limit = self._timeout if deadline is None else min(self._timeout, max(0.001, deadline - now()))
            yield from self._fetch_together(files[at : at + _TOGETHER], quick, limit)

    def _fetch_together(self, files: Sequence[StoredFile], quick: bool, timeout: float) -> Iterator[list[bytes]]:
        stretches = [_stretches(file, quick) for file in files]
        jobs = [(file, *stretch) for file, each in zip(files, stretches, strict=True) for stretch in each]
        if not quick:
            prepare(self._store, min(len(jobs), self._store.parallel) - max(1, self._store.ready), timeout)
        results = self._store.read_many(jobs, timeout)
        try:
            for each in stretches:
                yield [next(results) for _ in each]
        finally:
            results.close()

    def _get(self, file: StoredFile, offset: int, length: int) -> bytes:
        return self._store.read(file, offset, length, self._timeout)

    def _read(self, file: StoredFile, parts: list[bytes], quick: bool) -> Layer:
        try:
            return self._assemble(file, parts, quick)
        except LTXError as first:
            log.warning("%s of %s is damaged (%s); fetching it again", file, self._store.url, first)
        try:
            return self._assemble(file, [self._get(file, *stretch) for stretch in _stretches(file, quick)], quick)
        except LTXError as again:
            raise LTXError(
                f"{file} of {self._store.url} is damaged: {again}; `litestream restore` cannot use it either, "
                "a new snapshot by the primary replaces it"
            ) from again

    def probe(self, level: int, name: FileName, timeout: float) -> Arrival | None:
        """The file of that name if it is there: one request, usually with all its bytes."""
        found = self._store.get(level, name, ARRIVAL_LIMIT, timeout)
        if found is None:
            return None
        file, data = found
        if len(data) < file.size:
            return Arrival(self.open(file), None)
        try:
            layer = self._adopt_whole(file, data)
        except LTXError as exc:
            raise LTXError(f"{file} of {self._store.url} is damaged: {exc}") from exc
        return Arrival(layer, data)

    def known(self, file: StoredFile, header: Header, index: Index, checksum: int) -> Layer:
        """The layer of a file that another process has opened."""
        return self._make(file, header, index, checksum)

    def load(self, layer: Layer, start: int, end: int, timeout: float) -> Data:
        """Bytes start <= offset < end of a layer's file."""
        if end - start < _LARGE:
            return self._store.read(layer.file, start, end - start, timeout)
        # Into memory of its own. Of the C library's heap every thread has one, which does not give back what it has
        # grown by: 14 MiB in a scan.
        buffer = memoryview(mmap.mmap(-1, end - start))
        self._store.read_into(layer.file, start, buffer, timeout)
        return buffer

    def bring(self, layer: Layer, extent: Extent) -> None:
        """Fetch a waiting extent, unless somebody does already. Raises `StoreError`; then it is as if never begun."""
        if not self.extents.claim(extent):
            return
        try:
            data = self.load(layer, extent.start, extent.end, self._timeout)
        except BaseException:
            self.extents.fail(extent)
            raise
        self.extents.finish(extent, data)

    def bring_together(self, layer: Layer, extents: Iterable[Extent]) -> None:
        """`bring` several, over connections that are ready all in one round trip, in the caller's thread.

        Raises `StoreError`; then those that have come stay, and the others are as if never begun.
        """
        mine = [extent for extent in extents if self.extents.claim(extent)]
        jobs = [(layer.file, extent.start, len(extent)) for extent in mine]
        try:
            with contextlib.closing(self._store.read_many(jobs, self._timeout)) as replies:
                for extent, data in zip(mine, replies, strict=True):
                    self.extents.finish(extent, data)
        finally:
            for extent in mine:
                if extent.state is State.FLYING:
                    self.extents.fail(extent)

    def load_entries(self, wanted: Iterable[tuple[Layer, int]]) -> None:
        """Bring the entries of those pages into the layers' page indexes: few requests, all at once.

        For the first pages, if for all of them it were too many. Raises nothing for what storage does: what does not
        come is not there.
        """
        pages: dict[Layer, list[int]] = {}
        for layer, pgno in wanted:
            pages.setdefault(layer, []).append(pgno)
        for _ in range(_GUESSES):
            jobs = [
                (layer.file, layer.index, *stretch)
                for layer, pgnos in pages.items()
                if isinstance(layer.index, LazyIndex)
                for stretch in layer.index.lacking(pgnos, _INDEX_READS)
            ][:_INDEX_READS]
            if not jobs:
                return
            stretches = [(file, offset, length) for file, _, offset, length in jobs]
            try:
                with contextlib.closing(self._store.read_many(stretches, self._timeout)) as replies:
                    for (_, index, offset, _), data in zip(jobs, replies, strict=True):
                        index.preload(offset, data)
            except (StoreError, LTXError) as exc:
                log.debug("page indexes are not read ahead: %s", exc)
                return

    def verify(self, layer: Layer) -> str | None:
        """Read the whole file of an increment that was opened without, verify it, and keep it.

        Returns what is wrong with it, found twice; None if nothing is. Raises `StoreError`.
        """
        file = layer.file
        if layer not in self._unverified or file.size > VERIFY_FILE:
            return None
        for attempt in (1, 2):
            data = self._get(file, 0, file.size)
            try:
                decoded = decode_file(data)
                if (decoded.header, decoded.index) != (layer.header, layer.index):
                    raise LTXError("header or page index are not what they were when it was opened")
            except LTXError as exc:
                log.warning("%s of %s is damaged (%s)", file, self._store.url, exc)
                if attempt == 2:
                    self._unverified.discard(layer)
                    return str(exc)
            else:
                self.extents.keep_whole(layer.number, data)
                break
        self._unverified.discard(layer)
        return None

    def _assemble(self, file: StoredFile, parts: list[bytes], quick: bool) -> Layer:
        if _is_read_whole(file, quick):
            return self._adopt_whole(file, b"".join(parts))
        head, tail = parts
        header = Header.parse(head[:HEADER_SIZE])
        start, length = locate_index(tail, file.size)
        layer = self._adopt(
            file, header, self._index(file, header, start, length, tail), Trailer.parse(tail[-TRAILER_SIZE:])
        )
        if not header.is_snapshot:
            self._unverified.add(layer)
        self.extents.add(layer.number, 0, head)
        self.extents.add(layer.number, file.size - len(tail), tail[: start - file.size + len(tail)])  # the last frames
        return layer

    def _index(self, file: StoredFile, header: Header, start: int, length: int, tail: bytes) -> Index:
        held_from = file.size - len(tail)
        if header.is_snapshot:
            index = LazyIndex(header, file.size, start, length, partial(self._get, file))
            index.preload(held_from, tail)
            return index
        most = min(_INDEX_MOST, header.commit * MAX_ENTRY_SIZE + INDEX_END)
        if length > most:
            raise LTXError(
                f"page index has {length} bytes, expected {most} at most for a database of {header.commit} pages"
            )
        missing = self._get(file, start, held_from - start) if start < held_from else b""
        held = max(start, held_from) - held_from
        return PageIndex.parse(missing + tail[held : start + length - held_from], header=header, file_size=file.size)

    def _adopt_whole(self, file: StoredFile, data: bytes) -> Layer:
        decoded = decode_file(data)
        layer = self._adopt(file, decoded.header, decoded.index, decoded.trailer)
        self.extents.keep_whole(layer.number, data)
        return layer

    def _adopt(self, file: StoredFile, header: Header, index: Index, trailer: Trailer) -> Layer:
        if header.name != file.name:
            raise ReplicaDamaged(
                f"{file} of {self._store.url} says in its header that it is {header.name}: "
                "name and content disagree; the object was renamed or overwritten by something else than Litestream"
            )
        return self._make(file, header, index, trailer.file_checksum)

    def _make(self, file: StoredFile, header: Header, index: Index, checksum: int) -> Layer:
        with self._lock:
            layer = self._open.get(file)
            if layer is None:
                layer = self._open[file] = Layer(next(_numbers), file, header, index, checksum)
        return layer


def _is_read_whole(file: StoredFile, quick: bool) -> bool:
    if file.name.is_snapshot:
        return file.size <= KEEP_FILE
    return file.size <= max(KEEP_FILE, QUICK_FILE if quick else VERIFY_FILE)


def _stretches(file: StoredFile, quick: bool) -> list[tuple[int, int]]:
    """(offset, length) of what opening a file needs: all of it in pieces, or the head and the tail."""
    if _is_read_whole(file, quick):
        return [(at, min(_PIECE, file.size - at)) for at in range(0, file.size, _PIECE)] or [(0, 0)]
    if not file.name.is_snapshot:
        tail = min(file.size, max(_TAIL // 4, min(file.size // _TAIL_SHARE, _INDEX_MOST // 16)))
        return [(0, HEADER_SIZE), (file.size - tail, tail)]
    tail = max(0, min(file.size - HEADER_SIZE, max(_TAIL, min(file.size // _TAIL_SHARE, _TAIL_MOST))))
    return [(0, min(_HEAD, file.size)), (file.size - tail, tail)]


def prepare(store: Store, count: int, timeout: float) -> None:
    """Connect `count` times, all at once, and wait for that."""
    if count < 1:
        return
    from concurrent.futures import ThreadPoolExecutor  # a store near by needs none

    with contextlib.suppress(RuntimeError), ThreadPoolExecutor(count) as crew:  # no threads at interpreter exit
        for _ in range(count):
            crew.submit(store.prepare, timeout)


def check_page_size(before: Layer, after: Layer) -> None:
    """Raise `ReplicaDamaged` unless `after` can be applied to the database that `before` belongs to."""
    if before.header.page_size != after.header.page_size:
        raise ReplicaDamaged(
            f"{after} has a page size of {after.header.page_size} bytes, but the database it continues ({before}) has "
            f"{before.header.page_size}: the path mixes two databases"
        )
