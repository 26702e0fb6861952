"""What every store promises, against real servers and a real directory."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from lazyreplica.errors import BucketNotFound, FileVanished, StoreError
from lazyreplica.ltx.name import FileName
from lazyreplica.storage import Store, open_store
from lazyreplica.storage.s3 import S3Store
from lazyreplica.storage.url import S3URL, parse_replica_url

ONE, TWO, SNAPSHOT = FileName(1, 1), FileName(2, 2), FileName(1, 200)
ODD_PATHS = ["odd path/a+b", "ünï/cödé", "100%/50%25", "a&b=c/'q'~(x)", ""]


@pytest.fixture(params=["file", "rclone", pytest.param("seaweed", marks=pytest.mark.slow)])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def url_of(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], str]:
    """Replica URLs in a new bucket or directory."""
    if kind == "file":
        return lambda path: f"file://{quote(str(tmp_path / path))}"
    server: Any = request.getfixturevalue(kind)
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    bucket = server.new_bucket()
    return lambda path: str(server.url(bucket, path))


@pytest.fixture
def store(url_of: Callable[[str], str], kind: str, tmp_path: Path) -> Iterator[Store]:
    if kind == "file":
        (tmp_path / "app").mkdir()
    store = open_store(url_of("app"))
    yield store
    store.close()


def put(store: Store, level: int, name: FileName, data: bytes) -> None:
    store.put(level, name, io.BytesIO(data), len(data), 1_700_000_000.25, 20)


def test_empty(store: Store) -> None:
    listing = store.list_all(20)
    assert (listing.files, listing.strangers) == ((), frozenset())
    assert list(store.list_level(0, None, 20)) == []
    assert store.get(0, ONE, 100, 20) is None
    assert store.read_note("note.json", 20) is None


def test_put_list_read_get(store: Store) -> None:
    data = os.urandom(70_000)
    put(store, 9, SNAPSHOT, b"snapshot")
    put(store, 0, TWO, b"two")
    put(store, 0, ONE, data)
    put(store, 1, ONE, b"one")
    listing = store.list_all(20)
    assert [(f.level, f.name, f.size) for f in listing.files] == [
        (0, ONE, len(data)),
        (0, TWO, 3),
        (1, ONE, 3),
        (9, SNAPSHOT, 8),
    ]
    assert list(store.list_level(0, None, 20)) == list(listing.files[:2])
    assert list(store.list_level(0, ONE, 20)) == [listing.files[1]]
    assert list(store.list_level(0, TWO, 20)) == []
    file = listing.files[0]
    assert store.read(file, 0, file.size, 20) == data
    assert store.read(file, 1, 1, 20) == data[1:2]
    assert store.read(file, 69_990, 10, 20) == data[-10:]
    assert store.read(file, 5, 0, 20) == b""
    assert store.get(0, ONE, 1 << 20, 20) == (file, data)
    assert store.get(0, ONE, 100, 20) == (file, data[:100])
    assert store.get(0, FileName(3, 3), 100, 20) is None
    for offset, length in ((-1, 3), (0, file.size + 1), (3, -1)):
        with pytest.raises(ValueError, match="which has 70000"):
            store.read(file, offset, length, 20)


def test_empty_file(store: Store) -> None:
    put(store, 0, ONE, b"")
    got = store.get(0, ONE, 100, 20)
    assert got is not None
    assert (got[0].size, got[1]) == (0, b"")
    assert [f.size for f in store.list_all(20).files] == [0]


def test_source_from_the_middle(store: Store) -> None:
    source = io.BytesIO(b"before-data-after")
    source.seek(7)
    store.put(0, ONE, source, 4, 0.0, 20)
    got = store.get(0, ONE, 100, 20)
    assert got is not None
    assert got[1] == b"data"
    with pytest.raises(StoreError, match="ends after 3 bytes, 9 were announced"):
        store.put(0, TWO, io.BytesIO(b"xyz"), 9, 0.0, 20)
    assert len(store.list_all(20).files) == 1


def test_notes_and_strangers(store: Store) -> None:
    put(store, 0, ONE, b"x")
    store.write_note("note.json", b'{"a": 1}', 20)
    store.write_note("note.json", b'{"a": 2}', 20)
    assert store.read_note("note.json", 20) == b'{"a": 2}'
    listing = store.list_all(20)
    assert listing.strangers == {"note.json"}
    assert len(listing.files) == 1
    for bad in ("", "a/b", "..", "ltx", "0000"):
        with pytest.raises(ValueError, match="note name"):
            store.write_note(bad, b"", 20)


def test_changed_file_vanished(store: Store) -> None:
    put(store, 0, ONE, b"the first bytes")
    (file,) = store.list_all(20).files
    put(store, 0, ONE, b"other bytes now")  # as many
    with pytest.raises(FileVanished, match="changed since it was listed"):
        store.read(file, 0, 5, 20)
    (file,) = store.list_all(20).files
    put(store, 0, ONE, b"shorter")
    with pytest.raises(FileVanished):
        store.read(file, 12, 3, 20)
    (file,) = store.list_all(20).files
    assert store.read(file, 0, 7, 20) == b"shorter"


def test_missing_file_vanished(store: Store, url_of: Callable[[str], str]) -> None:
    put(store, 0, ONE, b"bytes")
    (file,) = store.list_all(20).files
    elsewhere = open_store(url_of("app"))
    try:
        with pytest.raises(FileVanished, match="gone"):
            elsewhere.read(type(file)(1, TWO, file.size, file.etag, 0.0), 0, 5, 20)
    finally:
        elsewhere.close()


@pytest.mark.parametrize("path", ODD_PATHS)
def test_odd_paths(url_of: Callable[[str], str], path: str) -> None:
    store = open_store(url_of(path))
    try:
        put(store, 0, ONE, b"odd")
        store.write_note("note.json", b"n", 20)
        (file,) = store.list_all(20).files
        assert store.read(file, 0, 3, 20) == b"odd"
        assert list(store.list_level(0, None, 20)) == [file]
        assert open_store(store.url).url == store.url
    finally:
        store.close()


def test_one_store_many_threads(store: Store) -> None:
    data = os.urandom(1 << 20)
    put(store, 0, ONE, data)
    (file,) = store.list_all(20).files
    wrong: list[int] = []

    def work(number: int) -> None:
        for i in range(5):
            offset = (number * 5 + i) * 7000
            if store.read(file, offset, 9000, 60) != data[offset : offset + 9000]:
                wrong.append(offset)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_missing_bucket_or_directory(
    kind: str, request: pytest.FixtureRequest, monkeypatch: Any, tmp_path: Path
) -> None:
    if kind == "file":
        url = f"file://{tmp_path}/nowhere"
    else:
        server = request.getfixturevalue(kind)
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        url = server.url("no-such-bucket", "app")
    store = open_store(url)
    try:
        with pytest.raises(BucketNotFound, match=r"nowhere|no-such-bucket"):
            store.list_all(20)
        with pytest.raises(BucketNotFound, match=r"nowhere|no-such-bucket"):
            store.list_level(0, None, 20)
    finally:
        store.close()


@pytest.mark.slow
def test_more_than_a_page(rclone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in rclone.env.items():
        monkeypatch.setenv(name, value)
    bucket = rclone.new_bucket()
    root = rclone.root / bucket / "app"
    for level, count in ((0, 2300), (1, 3), (9, 1)):
        (root / f"{level:04x}").mkdir(parents=True)
        for txid in range(1, count + 1):
            (root / f"{level:04x}" / str(FileName(txid, txid))).write_bytes(b"x")
    (root / "0000" / "junk.txt").write_bytes(b"")
    (root / "0000" / (str(ONE).upper())).write_bytes(b"")
    (root / "generations" / "deep").mkdir(parents=True)
    for number in range(2100):
        (root / "generations" / "deep" / f"{number:05}").write_bytes(b"")
    (root / "zzz").write_bytes(b"")
    store = open_store(rclone.url(bucket, "app"))
    try:
        listing = store.list_all(60)
        assert [f.level for f in listing.files] == [0] * 2300 + [1] * 3 + [9]
        assert [f.name.min_txid for f in listing.files[:2300]] == list(range(1, 2301))
        assert listing.strangers == {"generations", "zzz"}
        after = store.list_level(0, FileName(1200, 1200), 60)
        assert [f.name.min_txid for f in after] == list(range(1201, 2301))
    finally:
        store.close()


@pytest.mark.parametrize("server_name", ["rclone", pytest.param("seaweed", marks=pytest.mark.slow)])
def test_multipart(server_name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    server = request.getfixturevalue(server_name)
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    url = parse_replica_url(server.url(server.new_bucket(), "app"))
    assert isinstance(url, S3URL)
    store = S3Store(url, multipart_threshold=5 << 20)
    try:
        data = os.urandom((11 << 20) + 17)
        put(store, 9, SNAPSHOT, data)
        (file,) = store.list_all(20).files
        assert file.size == len(data)
        assert store.read(file, 0, file.size, 60) == data
        got = store.get(9, SNAPSHOT, 10, 20)
        assert got == (file, data[:10])
    finally:
        store.close()
