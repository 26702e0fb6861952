"""The bulk loader: what is marked present is right, whatever happens to files, server, disk and processes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replicas import ReplicaDirectory

from lazyreplica import bulk, errors
from lazyreplica.bulk import (
    BulkFile,
    BulkJob,
    BulkLoader,
    Event,
    Failed,
    FileDamaged,
    FileDone,
    FileGone,
    Progress,
    WorkerLost,
)
from lazyreplica.bulk.job import decode_event, encode_event, encode_job, read_job
from lazyreplica.bulk.pages import PageFile, runs
from lazyreplica.ltx import FLAG_NO_CHECKSUM, Compression, FileName, Header, decode_file, encode_file
from lazyreplica.ltx.frame import encode_frame
from lazyreplica.storage import StoredFile, open_store
from support.servers import S3Server
from support.waiting import eventually

Wanted = Iterable[int]
FEW = (*range(1, 50), 6000)
"""Pages of `big` that are worth no reading of all of it."""
ALWAYS = 30.0
"""Seconds that no test takes."""


def make_page(page_size: int, *key: object) -> bytes:
    """A page that no other key has; some shrink well, some do not."""
    rng = random.Random(repr(key))
    fill = rng.choice((0, page_size // 3, page_size))
    return rng.randbytes(max(16, fill)).ljust(page_size, b"\1")[:page_size]


def encode(pages: dict[int, bytes], commit: int, low: int, high: int, compression: Compression) -> bytes:
    page_size = len(next(iter(pages.values())))
    header = Header(FLAG_NO_CHECKSUM, page_size, commit, low, high, 0)
    return encode_file(header, sorted(pages.items()), compression)


def bitmap(wanted: Wanted) -> bytes:
    bits = sum(1 << pgno - 1 for pgno in set(wanted))
    return bits.to_bytes((bits.bit_length() + 7) // 8, "little")


@dataclass(frozen=True)
class Target:
    """An empty database file with its presence map."""

    database: Path
    presence: Path
    page_size: int
    count: int

    @classmethod
    def make(cls, directory: Path, page_size: int, count: int) -> Target:
        target = cls(directory / "copy.db", directory / "copy.presence", page_size, count)
        with target.database.open("wb") as file:
            file.truncate(page_size * count)
        target.presence.write_bytes(bytes(count))
        return target

    def job(self, url: str, files: Iterable[tuple[StoredFile, Wanted]], **more: Any) -> BulkJob:
        chosen = tuple(BulkFile(file, bitmap(wanted)) for file, wanted in files)
        return replace(BulkJob(url, self.database, self.presence, self.page_size, chosen, 4, ALWAYS), **more)

    @property
    def present(self) -> set[int]:
        return {pgno for pgno, there in enumerate(self.presence.read_bytes(), 1) if there}

    def check(self, truth: dict[int, bytes]) -> set[int]:
        """What is marked present, whose bytes must be right. Looked at before the bytes, as a reader does."""
        present = self.present
        with self.database.open("rb") as file:
            for pgno in present:
                file.seek((pgno - 1) * self.page_size)
                assert file.read(self.page_size) == truth[pgno], f"page {pgno}"
        return present

    def watch_the_front(self, truth: dict[int, bytes], seconds: float) -> None:
        """Read again and again the page that was marked last."""
        until = time.monotonic() + seconds
        with self.database.open("rb", 0) as file, self.presence.open("rb", 0) as presence:
            while time.monotonic() < until:
                presence.seek(0)
                front = presence.read(self.count).rfind(1) + 1
                file.seek((front - 1) * self.page_size)
                assert file.read(self.page_size) == truth[front], f"page {front}"


@contextmanager
def loading(job: BulkJob) -> Iterator[BulkLoader]:
    loader = BulkLoader(job)
    loader.start()
    try:
        yield loader
    finally:
        loader.stop()


def load(job: BulkJob) -> list[Event]:
    """Everything but progress."""
    with loading(job) as loader:
        return [event for event in loader.events() if not isinstance(event, Progress)]


def pid_of(loader: BulkLoader) -> int:
    assert loader._process is not None
    return loader._process.pid


def stored(url: str) -> list[StoredFile]:
    with closing(open_store(url)) as store:
        return sorted(store.list_all(ALWAYS).files, key=lambda file: file.name)


@dataclass(frozen=True)
class Big:
    """A replica with one file of 24 MB: it takes a moment, in several requests."""

    directory: ReplicaDirectory
    pages: dict[int, bytes]

    @property
    def file(self) -> StoredFile:
        return stored(self.directory.url)[0]


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Big:
    directory = ReplicaDirectory(tmp_path_factory.mktemp("big"))
    pages = {pgno: random.Random(pgno).randbytes(4096) for pgno in range(1, 6001)}
    directory.write_bytes(9, 1, 1, encode(pages, len(pages), 1, 1, Compression.BLOCK))
    return Big(directory, pages)


# -- what it brings --


@pytest.mark.slow
@pytest.mark.parametrize("compression", Compression)
@pytest.mark.parametrize(("page_size", "count"), [(512, 3000), (4096, 3000), (65536, 150)])
def test_every_wanted_page_comes_from_its_file_and_no_other(
    tmp_path: Path, directory: ReplicaDirectory, page_size: int, count: int, compression: Compression
) -> None:
    rng = random.Random(page_size)
    truth: dict[int, bytes] = {}
    wanted: list[set[int]] = []
    for txid in range(1, 4):
        touched = set(range(1, count + 1)) if txid == 1 else set(rng.sample(range(1, count + 1), count // 4))
        pages = {pgno: make_page(page_size, pgno, txid) for pgno in touched}
        directory.write_bytes(0, txid, txid, encode(pages, count, txid, txid, compression))
        truth |= pages
        wanted = [before - touched for before in wanted] + [touched]
    left_out = set(rng.sample(range(1, count + 1), count // 10)) | {1}
    wanted = [each - left_out for each in wanted]
    target = Target.make(tmp_path, page_size, count)
    told: list[int] = []
    loader = BulkLoader(
        target.job(directory.url, zip(stored(directory.url), wanted, strict=True)), on_pages=told.append
    )
    loader.start()
    events = list(loader.events())
    loader.stop()
    assert [event for event in events if not isinstance(event, Progress)] == [FileDone(0), FileDone(1), FileDone(2)]
    expected = set(range(1, count + 1)) - left_out
    assert target.check(truth) == expected
    assert target.database.stat().st_size == page_size * count
    data = target.database.read_bytes()
    assert all(data[(p - 1) * page_size : p * page_size] == bytes(page_size) for p in left_out)
    progress = [event for event in events if isinstance(event, Progress)]
    assert sum(told) == sum(event.pages for event in progress) == len(expected)
    assert sum(event.bytes for event in progress) == sum(file.size for file in stored(directory.url))


def test_from_s3(tmp_path: Path, rclone: S3Server, big: Big, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in rclone.env.items():
        monkeypatch.setenv(name, value)
    bucket = rclone.new_bucket()
    assert rclone.root is not None
    place = rclone.root / bucket / "app" / "0009" / str(FileName(1, 1))
    place.parent.mkdir(parents=True)
    place.write_bytes(big.directory.place(9, 1, 1).read_bytes())
    rclone.settle()
    target = Target.make(tmp_path, 4096, len(big.pages))
    url = rclone.url(bucket, "app")
    assert load(target.job(url, [(stored(url)[0], big.pages)])) == [FileDone(0)]
    assert target.check(big.pages) == set(big.pages)


def test_of_a_large_file_only_what_is_wanted_is_read(tmp_path: Path, big: Big) -> None:
    target = Target.make(tmp_path, 4096, len(big.pages))
    wanted = {*range(1, 50), *range(3000, 4500, 7), 6000}
    with loading(target.job(big.directory.url, [(big.file, wanted)])) as loader:
        events = list(loader.events())
    assert events[-1] == FileDone(0)
    assert target.check(big.pages) == wanted
    assert sum(event.bytes for event in events if isinstance(event, Progress)) < big.file.size / 2


@pytest.mark.parametrize("compression", Compression)
def test_pages_in_memory_come_with_the_job(
    tmp_path: Path, directory: ReplicaDirectory, compression: Compression
) -> None:
    pages = {pgno: make_page(4096, pgno) for pgno in range(1, 501)}
    odd = {pgno: page for pgno, page in pages.items() if pgno % 2}
    directory.write_bytes(0, 2, 2, encode(odd, 500, 2, 2, compression))
    frames = {pgno: encode_frame(pgno, page, compression) for pgno, page in pages.items() if pgno not in odd}
    frames |= {100: frames[102], 200: frames[200][:-9], 300: b""}  # damaged: they stay absent
    target = Target.make(tmp_path, 4096, 500)
    job = target.job(directory.url, [(stored(directory.url)[0], odd)], frames=tuple(reversed(frames.items())))
    with loading(job) as loader:
        events = list(loader.events())
    assert [event for event in events if not isinstance(event, Progress)] == [FileDone(0)]
    assert target.check(pages) == set(pages) - {100, 200, 300}
    assert sum(event.pages for event in events if isinstance(event, Progress)) == len(pages) - 3


def large_job(target: Target, big: Big) -> BulkJob:
    """More than a pipe takes at once, in both directions."""
    frames = tuple((pgno, encode_frame(pgno, page, Compression.BLOCK)) for pgno, page in big.pages.items() if pgno > 50)
    return target.job(big.directory.url, [(big.file, range(1, 51))], frames=frames)


def test_a_child_that_says_much_before_it_listens(tmp_path: Path, big: Big, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "_BOOTSTRAP", "import os\nos.write(2, b'x' * (1 << 20))\n" + bulk._BOOTSTRAP)
    target = Target.make(tmp_path, 4096, len(big.pages))
    assert load(large_job(target, big)) == [FileDone(0)]
    assert target.check(big.pages) == set(big.pages)


def test_nobody_waits_for_a_child_that_does_not_listen(
    tmp_path: Path, big: Big, monkeypatch: pytest.MonkeyPatch
) -> None:
    says = """print('["Progress", 0, 0]', flush=True)"""  # that it listens: which is not true, but its input is full
    monkeypatch.setattr(bulk, "_BOOTSTRAP", f"import time\n{says}\ntime.sleep(1000)")
    loader = BulkLoader(large_job(Target.make(tmp_path, 4096, len(big.pages)), big))
    loader.start()
    eventually(lambda: loader._listening)
    for _ in range(100_000):
        loader.pause()
        loader.resume()
    loader.stop()
    assert list(loader.events()) == []


@pytest.mark.slow
@pytest.mark.parametrize("paused", [False, True])
def test_a_child_that_was_frozen_is_told_how_things_stand(tmp_path: Path, big: Big, paused: bool) -> None:
    """Whichever is the last letter that its pipe takes."""
    target = Target.make(tmp_path, 4096, len(big.pages))
    with loading(large_job(target, big)) as loader:
        eventually(lambda: loader._listening)
        if paused:
            loader.pause()
            time.sleep(0.3)
        os.kill(pid_of(loader), signal.SIGSTOP)
        for _ in range(40_000):  # more letters than a pipe takes
            loader.resume()
            loader.pause()
        loader.resume()
        os.kill(pid_of(loader), signal.SIGCONT)
        assert [event for event in loader.events() if not isinstance(event, Progress)] == [FileDone(0)]
    assert target.check(big.pages) == set(big.pages)


def test_a_system_that_knows_no_scheduling_policies(tmp_path: Path, big: Big, monkeypatch: pytest.MonkeyPatch) -> None:
    """musl's calls always fail."""
    without = """
import os
def fails(*_): raise OSError(38, 'Function not implemented')
os.sched_getscheduler = os.sched_setscheduler = fails
"""
    monkeypatch.setattr(bulk, "_BOOTSTRAP", without + bulk._BOOTSTRAP)
    assert load(Target.make(tmp_path, 4096, 8).job(big.directory.url, [(big.file, [1])])) == [FileDone(0)]


def test_no_descriptor_left_is_not_an_error_of_the_local_files(
    tmp_path: Path, big: Big, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(bulk.selectors, "DefaultSelector", fail)
    (failed,) = load(Target.make(tmp_path, 4096, 8).job(big.directory.url, [(big.file, [1])]))
    assert isinstance(failed, Failed) and isinstance(failed.exception, WorkerLost)


# -- files --


def flip(directory: ReplicaDirectory, pgno: int, level: int = 9) -> None:
    """Change one byte of a page in such a way that it still decompresses."""
    place = directory.place(level, 1, 1)
    data = bytearray(place.read_bytes())
    entry = decode_file(bytes(data)).index.get(pgno)
    assert entry is not None
    offset, size = entry
    data[offset + size - 1] ^= 1  # a block ends with literals
    directory.write_bytes(level, 1, 1, bytes(data))


def test_nothing_of_a_damaged_file_stays(tmp_path: Path, directory: ReplicaDirectory) -> None:
    pages = {pgno: make_page(4096, pgno) for pgno in range(1, 501)}
    later = {pgno: make_page(4096, pgno, "later") for pgno in range(400, 500)}
    directory.write_bytes(9, 1, 1, encode(pages, 500, 1, 1, Compression.BLOCK))
    directory.write_bytes(0, 2, 2, encode(later, 500, 2, 2, Compression.BLOCK))
    flip(directory, 300)
    target = Target.make(tmp_path, 4096, 500)
    files = zip(stored(directory.url), (set(pages) - set(later), set(later)), strict=True)
    with loading(target.job(directory.url, files)) as loader:
        events = list(loader.events())
    damaged, done = (event for event in events if not isinstance(event, Progress))
    assert isinstance(damaged, FileDamaged) and damaged.index == 0
    assert "file checksum" in damaged.reason
    assert done == FileDone(1)
    assert target.check(pages | later) == set(later)
    progress = [event for event in events if isinstance(event, Progress)]
    assert sum(event.pages for event in progress) == len(later)
    sizes = [file.size for file in stored(directory.url)]
    # the damaged one was read twice, to its last slice
    assert sum(event.bytes for event in progress) == 2 * sizes[0] + sizes[1]


def test_damage_in_a_stretch_is_found_by_reading_the_whole(tmp_path: Path, big: Big) -> None:
    directory = ReplicaDirectory(tmp_path / "damaged")
    data = bytearray(big.directory.place(9, 1, 1).read_bytes())
    entry = decode_file(bytes(data)).index.get(40)
    assert entry is not None
    data[entry[0] + 10] ^= 0xFF  # the block's first token: literals of another length
    directory.write_bytes(9, 1, 1, bytes(data))
    target = Target.make(tmp_path, 4096, len(big.pages))
    (damaged,) = load(target.job(directory.url, [(stored(directory.url)[0], FEW)]))
    assert isinstance(damaged, FileDamaged)
    assert not target.present


@pytest.mark.parametrize("fault", ["page size", "name", "missing page", "empty"])
def test_a_file_that_is_not_what_it_should_be(tmp_path: Path, directory: ReplicaDirectory, fault: str) -> None:
    pages = {pgno: make_page(1024 if fault == "page size" else 512, pgno) for pgno in range(1, 9)}
    data = encode(pages, 8, 1, 2 if fault == "name" else 1, Compression.BLOCK)
    directory.write_bytes(9, 1, 1, b"" if fault == "empty" else data)
    target = Target.make(tmp_path, 512, 9)
    (damaged,) = load(target.job(directory.url, [(stored(directory.url)[0], [2, 9 if fault == "missing page" else 3])]))
    assert isinstance(damaged, FileDamaged)
    assert not target.present


def test_a_file_that_is_gone(tmp_path: Path, big: Big) -> None:
    directory = ReplicaDirectory(tmp_path / "vanishing")
    for txid in (1, 2, 3):
        pages = {pgno: make_page(4096, pgno, txid) for pgno in range(1, 20)}
        directory.write_bytes(0, txid, txid, encode(pages, 19, txid, txid, Compression.BLOCK))
    files = stored(directory.url)
    directory.remove(0, 2)
    target = Target.make(tmp_path, 4096, 19)
    first, gone, last = load(target.job(directory.url, zip(files, ([1, 2], [3], [4]), strict=True)))
    assert (first, last) == (FileDone(0), FileDone(2))
    assert isinstance(gone, FileGone) and gone.index == 1
    assert target.present == {1, 2, 4}


# -- servers that misbehave --


@contextmanager
def serving(data: bytes, meddle: Callable[[int, bytes], bytes | None]) -> Iterator[tuple[str, StoredFile]]:
    """An S3 server for one file; `meddle` changes what is sent of an offset, and with None nothing comes any more."""
    ended = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            first, last = (int(number) for number in self.headers["range"].removeprefix("bytes=").split("-"))
            body = meddle(first, data[first : last + 1])
            if body is None:
                ended.wait(ALWAYS)
                return
            self.send_response(206)
            self.send_header("etag", '"etag"')
            self.send_header("content-range", f"bytes {first}-{last}/{len(data)}")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            pass  # a client that was killed

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            url = f"s3://bucket/app?endpoint=http://127.0.0.1:{server.server_port}&forcePathStyle=true&anonymous=true"
            yield url, StoredFile(9, FileName(1, 1), len(data), "etag", 0.0)
        finally:
            ended.set()
            server.shutdown()
            thread.join()


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")


@pytest.mark.parametrize("wanted", [range(1, 6001), FEW], ids=["the whole file", "stretches of it"])
@pytest.mark.usefixtures("keys")
def test_damage_on_the_way_is_cured_by_reading_again(tmp_path: Path, big: Big, wanted: Sequence[int]) -> None:
    data = big.directory.place(9, 1, 1).read_bytes()
    spoilt: list[int] = []

    def meddle(first: int, body: bytes) -> bytes:
        if first and first + len(body) < len(data) and not spoilt:
            spoilt.append(len(body))
            return bytes(50) + body[50:]
        return body

    target = Target.make(tmp_path, 4096, len(big.pages))
    with serving(data, meddle) as (url, file), loading(target.job(url, [(file, wanted)])) as loader:
        events = list(loader.events())
    assert events[-1] == FileDone(0)
    assert spoilt
    progress = [event for event in events if isinstance(event, Progress)]
    assert sum(event.pages for event in progress) == len(wanted)
    assert sum(event.bytes for event in progress) >= len(data)
    assert target.check(big.pages) == set(wanted)


@pytest.mark.usefixtures("keys")
def test_stop_does_not_wait_for_a_server_that_stalls(tmp_path: Path, big: Big) -> None:
    data = big.directory.place(9, 1, 1).read_bytes()
    target = Target.make(tmp_path, 4096, len(big.pages))
    stall = 8 << 20
    with serving(data, lambda first, body: body if first < stall else None) as (url, file):
        loader = BulkLoader(target.job(url, [(file, big.pages)]))
        loader.start()
        events: list[Event] = []
        taker = threading.Thread(target=lambda: events.extend(loader.events()))
        taker.start()
        eventually(lambda: len(target.present) > 2000)
        started = time.monotonic()
        loader.stop()
        taker.join(ALWAYS)
        assert time.monotonic() - started < 5
        assert not [event for event in events if not isinstance(event, Progress)]
        loader.stop()
    target.check(big.pages)


@pytest.mark.slow
@pytest.mark.usefixtures("keys")
def test_a_server_that_stalls_too_long(tmp_path: Path) -> None:
    target = Target.make(tmp_path, 4096, 10)
    with serving(bytes(1000), lambda first, body: None) as (url, file):
        (failed,) = load(target.job(url, [(file, range(1, 11))], timeout=0.3))
    assert isinstance(failed, Failed)
    assert isinstance(failed.exception, errors.StoreUnavailable)


def test_a_replica_that_is_not_there(tmp_path: Path) -> None:
    target = Target.make(tmp_path, 4096, 10)
    file = StoredFile(9, FileName(1, 1), 1000, "etag", 0.0)
    (failed,) = load(target.job(f"file://{tmp_path}/nowhere", [(file, [1])]))
    assert isinstance(failed, Failed)
    assert isinstance(failed.exception, errors.BucketNotFound)


# -- local files --


def test_a_full_disk(tmp_path: Path, big: Big) -> None:
    target = Target.make(tmp_path, 4096, len(big.pages))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    loader = BulkLoader(target.job(big.directory.url, [(big.file, big.pages)]))
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, limits[1]))  # in the middle of a page
    try:
        loader.start()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    *_, failed = loader.events()
    loader.stop()
    assert isinstance(failed, Failed)
    assert isinstance(failed.exception, OSError)
    assert str(target.database) in str(failed.exception)
    present = target.check(big.pages)
    assert 500 < len(present) <= 3_000_000 // 4096


def test_files_that_do_not_fit_the_job(tmp_path: Path, big: Big) -> None:
    target = Target.make(tmp_path, 4096, 100)
    (failed,) = load(target.job(big.directory.url, [(big.file, [100, 101])]))
    assert isinstance(failed, Failed) and "page 101 is wanted" in str(failed.exception)
    job = target.job(big.directory.url, [(big.file, [100])])
    target.database.unlink()
    (failed,) = load(job)
    assert isinstance(failed, Failed)
    assert isinstance(failed.exception, FileNotFoundError)


# -- pausing --


@pytest.mark.usefixtures("keys")
def test_while_it_pauses_nothing_comes(tmp_path: Path, big: Big) -> None:
    data = big.directory.place(9, 1, 1).read_bytes()
    target = Target.make(tmp_path, 4096, len(big.pages))
    asked: list[int] = []
    released = threading.Event()

    def meddle(first: int, body: bytes) -> bytes:
        asked.append(first)
        if first >= 8 << 20:
            released.wait(ALWAYS)
        return body

    whole = sum(end <= 8 << 20 for end in decode_file(data).index.offsets[1:])
    with (
        serving(data, meddle) as (url, file),
        loading(target.job(url, [(file, big.pages)], connections=1)) as loader,
    ):
        eventually(lambda: len(asked) == 3 and len(target.present) == whole)
        loader.pause()
        time.sleep(0.05)
        released.set()
        time.sleep(0.2)
        assert len(asked) == 3
        assert len(target.present) == whole
        loader.resume()
        *_, done = loader.events()
    assert done == FileDone(0)
    assert target.check(big.pages) == set(big.pages)


@pytest.mark.slow
def test_it_may_begin_with_a_pause(tmp_path: Path, big: Big) -> None:
    target = Target.make(tmp_path, 4096, len(big.pages))
    loader = BulkLoader(target.job(big.directory.url, [(big.file, big.pages)]))
    loader.pause()
    loader.start()
    time.sleep(0.4)  # three times as long as it takes to begin
    assert not target.present
    loader.resume()
    *_, done = loader.events()
    loader.stop()
    assert done == FileDone(0)


# -- processes --


def test_a_child_that_is_killed(tmp_path: Path, big: Big) -> None:
    target = Target.make(tmp_path, 4096, len(big.pages))
    loader = BulkLoader(target.job(big.directory.url, [(big.file, big.pages)]))
    loader.pause()
    loader.start()
    os.kill(pid_of(loader), signal.SIGKILL)
    (failed,) = loader.events()
    loader.resume()
    loader.stop()
    assert isinstance(failed, Failed)
    assert isinstance(failed.exception, WorkerLost)
    assert "signal 9" in str(failed.exception)


@pytest.mark.slow
def test_what_is_present_is_right_whenever_the_child_is_killed(tmp_path: Path, big: Big) -> None:
    rng = random.Random(9)
    seen: list[int] = []
    for _ in range(30):
        target = Target.make(tmp_path, 4096, len(big.pages))
        with loading(target.job(big.directory.url, [(big.file, big.pages)])) as loader:
            events = loader.events()
            next(events)
            target.watch_the_front(big.pages, rng.uniform(0, 0.03))
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(pid_of(loader), signal.SIGKILL)
            list(events)
            seen.append(len(target.check(big.pages)))
    assert len(set(seen)) > 5, "it was killed at different moments"


_PARENT = """
import os, sys, time
from pathlib import Path
from lazyreplica.bulk import *
from lazyreplica.ltx import FileName
from lazyreplica.storage import StoredFile
url, database, presence, forks = sys.argv[1:]
file = BulkFile(StoredFile(9, FileName(1, 1), 1000, "etag", 0.0), b"\\xff")
loader = BulkLoader(BulkJob(url, Path(database), Path(presence), 4096, (file,), 2, 60.0))
loader.start()
if forks == "True" and not (child := os.fork()):
    time.sleep(60)  # with a copy of every pipe
print(loader._process.pid, child if forks == "True" else 0, flush=True)
time.sleep(60)
"""


def runs_still(pid: int) -> bool:
    """Whether that process is there and no zombie."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return bool(state.strip()) and not state.startswith("Z")


@pytest.mark.slow
@pytest.mark.usefixtures("keys")
@pytest.mark.parametrize("forks", [False, True])
def test_the_child_ends_with_its_parent(tmp_path: Path, forks: bool) -> None:
    target = Target.make(tmp_path, 4096, 8)
    asked = threading.Event()

    def stall(first: int, body: bytes) -> None:
        asked.set()

    with serving(bytes(1000), stall) as (url, _):
        command = [sys.executable, "-c", _PARENT, url, str(target.database), str(target.presence), str(forks)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
            assert parent.stdout is not None
            pid, sibling = (int(number) for number in parent.stdout.readline().split())
            try:
                assert asked.wait(ALWAYS)
                assert runs_still(pid)
                parent.kill()
                parent.wait()
                eventually(lambda: not runs_still(pid))
            finally:
                parent.kill()
                if sibling:
                    os.kill(sibling, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.usefixtures("keys")
def test_the_child_holds_no_lock_of_its_parent_and_yields_the_cpu(tmp_path: Path) -> None:
    target = Target.make(tmp_path, 4096, 8)
    asked = threading.Event()

    def stall(first: int, body: bytes) -> None:
        asked.set()

    lock = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    os.set_inheritable(lock, True)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with serving(bytes(1000), stall) as (url, file), loading(target.job(url, [(file, [1])])) as loader:
        assert asked.wait(ALWAYS)
        nice = os.getpriority(os.PRIO_PROCESS, pid_of(loader))
        assert nice == min(19, os.getpriority(os.PRIO_PROCESS, 0) + 10)
        if sys.platform == "linux":
            assert os.sched_getscheduler(pid_of(loader)) == os.SCHED_BATCH
        os.close(lock)
        with (tmp_path / "lock").open() as again:
            fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.slow
def test_a_forked_child_leaves_the_loader_alone(tmp_path: Path, big: Big) -> None:
    target = Target.make(tmp_path, 4096, len(big.pages))
    script = f"""
import os
from test_bulk import *
target = Target(Path({str(target.database)!r}), Path({str(target.presence)!r}), 4096, {len(big.pages)})
loader = BulkLoader(target.job({big.directory.url!r}, [(stored({big.directory.url!r})[0], range(1, 6001))]))
loader.pause()
loader.start()
if not (child := os.fork()):
    loader.stop()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
loader.resume()
*_, done = loader.events()
loader.stop()
assert done == FileDone(0), done
"""
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    subprocess.run([sys.executable, "-c", script], check=True, timeout=ALWAYS, env={**os.environ, "PYTHONPATH": paths})
    assert target.check(big.pages) == set(big.pages)


@pytest.mark.parametrize("executable", ["", "/usr/sbin/uwsgi", "/nowhere/python3"])
def test_where_there_is_no_interpreter_to_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, executable: str
) -> None:
    target = Target.make(tmp_path, 4096, 8)
    monkeypatch.setattr(sys, "executable", executable)
    loader = BulkLoader(target.job(f"file://{tmp_path}", []))
    with pytest.raises(OSError, match=executable or "is ''"):
        loader.start()
    loader.stop()


def test_a_child_that_cannot_begin_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, big: Big) -> None:
    job = Target.make(tmp_path, 4096, 8).job(big.directory.url, [(big.file, [1])])
    with monkeypatch.context() as patched:
        patched.setattr(sys, "path", [])
        loader = BulkLoader(job)
        loader.start()
    (failed,) = loader.events()
    loader.stop()
    assert isinstance(failed, Failed) and isinstance(failed.exception, WorkerLost)
    assert "status 1" in str(failed.exception)
    assert "ModuleNotFoundError" in str(failed.exception)


def test_stopped_before_it_starts(tmp_path: Path, big: Big) -> None:
    target = Target.make(tmp_path, 4096, 8)
    loader = BulkLoader(target.job(big.directory.url, [(big.file, [1])]))
    loader.stop()
    loader.start()
    assert not list(loader.events())
    assert not target.present


def test_an_application_that_is_frozen_is_not_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    loader = BulkLoader(Target.make(tmp_path, 4096, 8).job(f"file://{tmp_path}", []))
    with pytest.raises(OSError, match="no process"):
        loader.start()


def test_the_child_loads_neither_apsw_nor_the_vfs() -> None:
    command = bulk._command()
    work = "main(int(parent))"
    script = next(part for part in command if work in part)
    modules = "import lazyreplica.storage.s3, lazyreplica.bulk.loader\nprint(*sys.modules)"
    command[command.index(script)] = script.replace(work, modules)
    loaded = set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert "lazyreplica.bulk.loader" in loaded
    assert not {module.partition(".")[0] for module in loaded} & {"apsw", "lazyreplica_vfs", "site"}


# -- values --

bitmaps = st.binary(max_size=40)


@given(bitmaps)
def test_a_page_table_says_what_its_bitmap_says(bits: bytes) -> None:
    file = BulkFile(StoredFile(9, FileName(1, 1), 1, "etag", 0.0), bits)
    table = file.page_table()
    wanted = [pgno for pgno in range(1, len(table)) if table[pgno]]
    assert bitmap(wanted) == bits.rstrip(b"\0")
    assert file.count == len(wanted)
    assert [pgno for start, end in runs(table) for pgno in range(start, end)] == wanted
    assert all(end < start for (_, end), (start, _) in pairwise(runs(table)))


@settings(max_examples=30)
@given(
    st.lists(bitmaps, max_size=4),
    st.lists(st.tuples(st.integers(1, (1 << 32) - 1), st.binary(max_size=20)), max_size=4),
    st.text(max_size=20),
    st.floats(0.1, 100),
)
def test_a_job_arrives_as_it_was_sent(
    bits: list[bytes], frames: list[tuple[int, bytes]], etag: str, timeout: float
) -> None:
    files = tuple(BulkFile(StoredFile(0, FileName(n, n), n, etag, 0.5), each) for n, each in enumerate(bits, 1))
    job = BulkJob("s3://b/ä", Path("/a/\udcff"), Path("b"), 512, files, 8, timeout, None, tuple(frames))
    sent = memoryview(b"".join(encode_job(job)))

    def read(size: int) -> bytes:
        nonlocal sent
        found, sent = sent[:size], sent[size:]
        return bytes(found)

    assert read_job(read) == job
    assert not sent


@pytest.mark.parametrize(
    "exception",
    [errors.AccessDenied("denied"), WorkerLost("gone"), errors.LTXError("odd"), OSError(28, "full", "/a/b")],
)
def test_an_exception_arrives_as_what_it_was(exception: Exception) -> None:
    arrived = decode_event(encode_event(Failed(exception)))
    assert isinstance(arrived, Failed)
    assert type(arrived.exception) is type(exception)
    assert str(arrived.exception) == str(exception)


@pytest.mark.skipif(sys.platform != "linux", reason="the hint is Linux's")
@pytest.mark.parametrize("knows_hints", [True, False])
def test_what_is_written_is_there_whether_the_file_system_knows_hints_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, knows_hints: bool
) -> None:
    given: list[tuple[int, int]] = []

    def hint(_: int, start: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_DONTNEED
        given.append((start, length))
        if not knows_hints:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(os, "posix_fadvise", hint)
    count = (20 << 20) // 4096
    database, presence = tmp_path / "db", tmp_path / "presence"
    database.touch()
    presence.write_bytes(bytes(count))
    target = PageFile(database, presence, 4096)
    pages = [number.to_bytes(4) * 1024 for number in range(count)]
    for first in range(0, count, 128):
        target.write(first + 1, pages[first : first + 128])
    assert database.read_bytes() == b"".join(pages)
    assert presence.read_bytes() == b"\1" * count
    assert given == [(0, 8 << 20), (8 << 20, 8 << 20)], "each byte once, and 8 MiB at a time"
