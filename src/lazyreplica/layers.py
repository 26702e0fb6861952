"""Opens LTX files: from a name in a listing to a `Layer` with its page index, checked on the way.

Small files are fetched whole and kept for a while: their pages then cost no request, survive the file's deletion by
compaction, and were verified by the file's own checksum.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from weakref import WeakKeyDictionary, WeakValueDictionary

from cachetools import LRUCache

from lazyreplica.errors import LTXError, ReplicaDamaged
from lazyreplica.ltx.decoder import decode_file
from lazyreplica.ltx.header import HEADER_SIZE, TRAILER_SIZE, Header, Trailer
from lazyreplica.ltx.index import PageIndex, locate_index
from lazyreplica.ltx.name import FileName
from lazyreplica.pagemap import Layer
from lazyreplica.storage import Store, StoredFile

log = logging.getLogger(__name__)

KEEP_FILE = 256 << 10
"""Files up to this many bytes are fetched whole when opened."""
VERIFY_FILE = 8 << 20
"""Increments up to this many bytes are read whole and verified when opened: a page index is covered by nothing but the
file's checksum, and a wrong page number in it would let an older page show through. (Of a snapshot's index every entry
is determined by its neighbours.)"""
KEEP_TOTAL = 16 << 20
"""Whatever was fetched whole is kept, up to this many bytes in all; the least recently used files go first."""
ARRIVAL_LIMIT = 8 << 20
"""A new transaction's file up to this many bytes is taken whole with the request that finds it."""
_TAIL = 64 << 10
_PARALLEL = 8

_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Arrival:
    """A file found by following, with its bytes if they came along whole (and were verified)."""

    layer: Layer
    data: bytes | None


class Layers:
    """The opened files of one replica. Thread-safe; a file in use is opened once and shared."""

    def __init__(self, store: Store, timeout: float) -> None:
        self._store = store
        self._timeout = timeout
        self._lock = threading.Lock()
        self._open: WeakValueDictionary[StoredFile, Layer] = WeakValueDictionary()
        self._distrusted: WeakKeyDictionary[Layer, str] = WeakKeyDictionary()
        self._kept: LRUCache[int, bytes] = LRUCache(KEEP_TOTAL, getsizeof=len)

    def kept(self, layer: Layer) -> bytes | None:
        """All bytes of the layer's file, if they are here."""
        with self._lock:
            return self._kept.get(layer.number)

    def distrust(self, layer: Layer, reason: str) -> None:
        """The layer's file fails its checksum: none of its pages may be served from now on.

        A single page cannot be told from a damaged one (an LZ4 block carries no checksum), so all of them are refused.
        """
        self._distrusted[layer] = reason

    def distrusted(self, layer: Layer) -> str | None:
        """Why the layer's file is not to be used, or None."""
        return self._distrusted.get(layer)

    def open_chain(self, files: Sequence[StoredFile]) -> list[Layer]:
        """Open the files of a chain, several at a time, and check that they belong together.

        Raises `FileVanished` when a listed file is gone (plan again), `LTXError` or `ReplicaDamaged` for bad ones.
        """
        layers: list[Layer] = []
        if len(files) > 1:
            workers = ThreadPoolExecutor(min(_PARALLEL, len(files)), thread_name_prefix="lazyreplica-open")
            with contextlib.suppress(RuntimeError), workers:  # no new threads at interpreter exit: go on without
                layers = list(workers.map(self.open, files))
        layers = layers or [self.open(file) for file in files]
        for layer in layers[1:]:
            check_page_size(layers[0], layer)
        return layers

    def open(self, file: StoredFile) -> Layer:
        """The layer of a listed file. Bytes that do not parse are fetched once more before that is an error."""
        with self._lock:
            layer = self._open.get(file)
        if layer is not None:
            return layer
        try:
            return self._read(file)
        except LTXError as first:
            log.warning("%s of %s is damaged (%s); fetching it again", file, self._store.url, first)
            try:
                return self._read(file)
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

    def _read(self, file: StoredFile) -> Layer:
        if file.size <= (KEEP_FILE if file.name.is_snapshot else max(KEEP_FILE, VERIFY_FILE)):
            return self._adopt_whole(file, self._store.read(file, 0, file.size, self._timeout))
        tail_size = min(file.size - HEADER_SIZE, _TAIL)
        header = Header.parse(self._store.read(file, 0, HEADER_SIZE, self._timeout))
        tail = self._store.read(file, file.size - tail_size, tail_size, self._timeout)
        start, length = locate_index(tail, file.size)
        held_from = file.size - tail_size
        missing = b""
        if start < held_from:
            missing = self._store.read(file, start, held_from - start, self._timeout)
        held = max(start, held_from) - held_from
        index = PageIndex.parse(missing + tail[held : start + length - held_from], header=header, file_size=file.size)
        return self._adopt(file, header, index, Trailer.parse(tail[-TRAILER_SIZE:]))

    def _adopt_whole(self, file: StoredFile, data: bytes) -> Layer:
        decoded = decode_file(data)
        layer = self._adopt(file, decoded.header, decoded.index, decoded.trailer)
        if len(data) <= KEEP_TOTAL:
            with self._lock:
                self._kept[layer.number] = data
        return layer

    def _adopt(self, file: StoredFile, header: Header, index: PageIndex, trailer: Trailer) -> Layer:
        if header.name != file.name:
            raise ReplicaDamaged(
                f"{file} of {self._store.url} says in its header that it is {header.name}: "
                "name and content disagree; the object was renamed or overwritten by something else than Litestream"
            )
        with self._lock:
            layer = self._open.get(file)
            if layer is None:
                layer = self._open[file] = Layer(next(_numbers), file, header, index, trailer.file_checksum)
        return layer


def check_page_size(before: Layer, after: Layer) -> None:
    """Raise `ReplicaDamaged` unless `after` can be applied to the database that `before` belongs to."""
    if before.header.page_size != after.header.page_size:
        raise ReplicaDamaged(
            f"{after} has a page size of {after.header.page_size} bytes, but the database it continues ({before}) has "
            f"{before.header.page_size}: the path mixes two databases"
        )
