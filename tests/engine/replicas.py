"""Hand-made ``file://`` replicas whose truth is known at every TXID, and a store that can be told to misbehave."""

from __future__ import annotations

import errno
import itertools
import os
import random
import threading
import time
from array import array
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import apsw

from lazyreplica.config import Options
from lazyreplica.extents import Extent, State
from lazyreplica.ltx import FLAG_NO_CHECKSUM, FileName, Header, PageIndex, encode_file
from lazyreplica.pagemap import Layer, stack
from lazyreplica.replica import Replica
from lazyreplica.snapshot import Lineage, Snapshot
from lazyreplica.storage import Listing, StoredFile, open_store

PAGE_SIZE = 512
Pages = dict[int, bytes]


def page_bytes(*key: object, page_size: int = PAGE_SIZE) -> bytes:
    """A page that no other key has, and that LZ4 cannot shorten: its frame holds it byte for byte."""
    return random.Random(repr(key)).randbytes(page_size)


class History:
    """A database as its primary lived it: all pages at every TXID."""

    def __init__(self, name: object = "db", page_size: int = PAGE_SIZE, salt: int = 7) -> None:
        self.name = name
        self.page_size = page_size
        self.states: list[Pages] = [{}]
        self.changed: list[frozenset[int]] = [frozenset()]
        self.wal: list[tuple[int, int, int, int]] = [(0, 0, 0, 0)]
        """Of each TXID: WAL offset, size, salts."""
        self._salt = salt

    @property
    def txid(self) -> int:
        return len(self.states) - 1

    def commit(self, pages: Iterable[int] = (), size: int | None = None, *, restart_wal: bool = False) -> int:
        """One more transaction, which writes those pages and all that it adds; returns its TXID."""
        before, txid = self.states[-1], self.txid + 1
        size = max([len(before), *pages]) if size is None else size
        written = {p for p in pages if p <= size} | set(range(len(before) + 1, size + 1))
        return self.put(
            {p: page_bytes(self.name, p, txid, page_size=self.page_size) for p in written}, size, restart_wal
        )

    def put(self, pages: Mapping[int, bytes], size: int, restart_wal: bool = False) -> int:
        """One more transaction with these very bytes."""
        state = {p: page for p, page in {**self.states[-1], **pages}.items() if p <= size}
        assert sorted(state) == list(range(1, size + 1))
        offset, length, salt, _ = self.wal[-1]
        if restart_wal or not offset:
            self._salt += 1
            offset, length, salt = 32, 0, self._salt
        self.wal.append((offset + length, 24 + (24 + self.page_size) * len(pages), salt, salt ^ 0xFFFF))
        self.states.append(state)
        self.changed.append(frozenset(pages))
        return self.txid

    def database(self, txid: int | None = None) -> bytes:
        state = self.states[-1 if txid is None else txid]
        return b"".join(state[p] for p in sorted(state))

    def file(self, low: int, high: int, *, whole: bool = False, wal: bool = False) -> bytes:
        """The LTX file of transactions low..high; `wal`: with the primary's position, as levels 0 and 9 have it."""
        state = self.states[high]
        touched = set(state) if whole or low == 1 else set().union(*self.changed[low : high + 1]) & set(state)
        offset, size, salt1, salt2 = self.wal[high] if wal else (0, 0, 0, 0)
        header = Header(
            FLAG_NO_CHECKSUM,
            self.page_size,
            len(state),
            low,
            high,
            1_700_000_000_000 + high,
            0,
            offset,
            size,
            salt1,
            salt2,
        )
        return encode_file(header, [(p, state[p]) for p in sorted(touched)])


class ReplicaDirectory:
    """A ``file://`` replica in a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)

    @property
    def url(self) -> str:
        return f"file://{self.path}"

    def place(self, level: int, low: int, high: int) -> Path:
        return self.path / "ltx" / str(level) / str(FileName(low, high))

    def write_bytes(self, level: int, low: int, high: int, data: bytes) -> None:
        path = self.place(level, low, high)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(".new")
        temporary.write_bytes(data)
        os.utime(temporary, ns=(time.time_ns(), time.time_ns()))  # the kernel's clock ticks every few ms only
        temporary.rename(path)

    def write(
        self,
        history: History,
        level: int,
        low: int,
        high: int | None = None,
        *,
        whole: bool = False,
        wal: bool | None = None,
    ) -> None:
        high = low if high is None else high
        self.write_bytes(level, low, high, history.file(low, high, whole=whole, wal=level == 0 if wal is None else wal))

    def sync(self, history: History) -> None:
        """Write the newest transaction at level 0, as a primary would."""
        self.write(history, 0, history.txid)

    def remove(self, level: int, low: int, high: int | None = None) -> None:
        self.place(level, low, low if high is None else high).unlink()

    def files(self) -> list[tuple[int, int, int]]:
        found = []
        for path in self.path.glob("ltx/*/*.ltx"):
            name = FileName.parse(path.name)
            assert name is not None
            found.append((int(path.parent.name), name.min_txid, name.max_txid))
        return sorted(found)

    def wipe(self) -> None:
        for level, low, high in self.files():
            self.remove(level, low, high)


def start(path: Path, size: int = 8, name: object = "db", **more: Any) -> tuple[History, ReplicaDirectory]:
    """A replica of one transaction, at level 0."""
    history, directory = History(name, **more), ReplicaDirectory(path)
    history.commit(size=size)
    directory.sync(history)
    return history, directory


def sqlite_history(path: Path, statements: list[str]) -> History:
    """A real SQLite database, one transaction per statement."""
    history = History(path.name, page_size=4096)
    db = apsw.Connection(str(path))
    for statement in statements:
        db.execute(statement)
        data = path.read_bytes()
        pages = {n + 1: data[n * 4096 : (n + 1) * 4096] for n in range(len(data) // 4096)}
        before = history.states[-1]
        history.put({p: page for p, page in pages.items() if before.get(p) != page}, len(pages))
    db.close()
    return history


class SpyStore:
    """A store that counts what is asked of it, and does what a test wants before or instead."""

    def __init__(self, url: str, parallel: int = 1) -> None:
        self.inner = open_store(url)
        self.parallel = self.ready = parallel
        self.url = self.inner.url
        self.reads: list[tuple[StoredFile, int, int]] = []
        self.listings = 0
        self.probes: list[FileName] = []
        self.closed = False
        self.before_read: Callable[[StoredFile, int, int], object] = lambda file, offset, length: None
        self.change: Callable[[StoredFile, int, bytes], bytes] = lambda file, offset, data: data
        self.before_list: Callable[[], object] = lambda: None
        self.after_list: Callable[[], object] = lambda: None

    @property
    def requests(self) -> int:
        return self.inner.requests

    @property
    def retries(self) -> int:
        return self.inner.retries

    def prepare(self, timeout: float) -> None:
        pass

    def keys(self) -> dict[str, str]:
        return self.inner.keys()

    def list_all(self, timeout: float) -> Listing:
        self.listings += 1
        self.before_list()
        listing = self.inner.list_all(timeout)
        self.after_list()
        return listing

    def list_level(self, level: int, after: FileName | None, timeout: float) -> Any:
        return self.inner.list_level(level, after, timeout)

    def read(self, file: StoredFile, offset: int, length: int, timeout: float) -> bytes:
        self.reads.append((file, offset, length))
        self.before_read(file, offset, length)
        return self.change(file, offset, self.inner.read(file, offset, length, timeout))

    def read_into(self, file: StoredFile, offset: int, buffer: memoryview, timeout: float) -> None:
        buffer[:] = self.read(file, offset, len(buffer), timeout)

    def read_many(self, wanted: Iterable[tuple[StoredFile, int, int]], timeout: float) -> Generator[bytes]:
        jobs = list(wanted)
        with ThreadPoolExecutor(max(1, min(self.parallel, len(jobs)))) as pool:
            yield from pool.map(lambda job: self.read(*job, timeout), jobs)

    def get(self, level: int, name: FileName, limit: int, timeout: float) -> tuple[StoredFile, bytes] | None:
        self.probes.append(name)
        return self.inner.get(level, name, limit, timeout)

    def put(self, *args: Any) -> None:
        raise NotImplementedError

    def read_note(self, name: str, timeout: float) -> bytes | None:
        return None

    def write_note(self, *args: Any) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self.closed = True
        self.inner.close()


@contextmanager
def opened(replica: ReplicaDirectory | SpyStore, **options: Any) -> Iterator[Replica]:
    """An open replica: no threads and nothing local unless `options` say so."""
    settings = {"hydrate": False, "poll_interval": 0.0, "read_timeout": 5.0, **options}
    store = open_store(replica.url) if isinstance(replica, ReplicaDirectory) else replica
    found = Replica(store, Options(**settings))
    try:
        yield found
    finally:
        found.close()


def read_page(replica: Replica, snapshot: Snapshot, pgno: int) -> bytes:
    return replica.read(snapshot, pgno, replica.reader())


def read_database(replica: Replica, snapshot: Snapshot | None = None) -> bytes:
    """Every page of `snapshot` (else: of the head, in a transaction of its own)."""
    if snapshot is not None:
        return b"".join(read_page(replica, snapshot, p) for p in range(1, snapshot.commit + 1))
    snapshot = replica.begin(replica.head.lineage.number)
    try:
        return read_database(replica, snapshot)
    finally:
        replica.end(snapshot)


@contextmanager
def pinned(replica: Replica) -> Iterator[Snapshot]:
    snapshot = replica.begin(replica.head.lineage.number)
    try:
        yield snapshot
    finally:
        replica.end(snapshot)


_numbers = itertools.count(1)


def make_layer(
    pgnos: Iterable[int], commit: int, low: int, high: int | None = None, *, level: int = 0, page_size: int = PAGE_SIZE
) -> Layer:
    """A layer without a file: numbers only. Frames are taken to be 100 bytes long."""
    high = low if high is None else high
    listed = array("I", sorted(pgnos))
    offsets = array("Q", range(100, 100 + 100 * len(listed) + 1, 100))
    file = StoredFile(level, FileName(low, high), 1 << 20, f"etag-{level}-{low}-{high}", 0.0)
    header = Header(FLAG_NO_CHECKSUM, page_size, commit, low, high, 0)
    return Layer(next(_numbers), file, header, PageIndex(listed, offsets), checksum=0)


def make_snapshot(layers: list[Layer], lineage: Lineage | None = None) -> Snapshot:
    return Snapshot(lineage or Lineage(), layers[-1], stack(layers))


def engine_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("lazyreplica")]


# -- hydration --

FULL = {"hydrate": True}


def complete(replica: Replica) -> bool:
    return replica.hydration_progress == 100.0


def hydration_file(replica: Replica) -> Path:
    assert replica.hydration_file is not None
    return Path(replica.hydration_file)


def local_database(replica: Replica) -> bytes | None:
    """The newest state out of the local copy alone; None if it is not all there."""
    with pinned(replica) as snapshot:
        view = replica.view(snapshot)
        pages = [view and view.page(p) for p in range(1, snapshot.commit + 1)]
    return None if None in pages else b"".join(page for page in pages if page is not None)


def disk_full(*args: object) -> int:
    """In place of `os.pwrite`."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def long_replica(directory: ReplicaDirectory) -> History:
    history, _ = start(directory.path, 40)
    for written in ([3, 5], [5, 41], [1, 2, 40]):
        history.commit(written)
        directory.sync(history)
    history.commit([7], size=30)
    directory.sync(history)
    return history


def flying(replica: Replica) -> list[Extent]:
    """What counts as under way: for ever, if nobody fetches it any more, and then there would be no room ahead."""
    extents = replica.layers.extents
    assert extents._flying_size == sum(e.memory for e in extents._used if e.state is not State.HERE)
    return [each for each in (*extents._used, *extents._owned) if each.state is not State.HERE]
