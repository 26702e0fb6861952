"""What only directories can do wrong."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from lazyreplica.errors import AccessDenied, BucketNotFound, FileVanished, StoreError
from lazyreplica.ltx.name import FileName
from lazyreplica.storage import open_store
from lazyreplica.storage.local import LocalStore
from lazyreplica.storage.url import FileURL

ONE = FileName(1, 1)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(FileURL(tmp_path))


def put(store: LocalStore, level: int = 0, name: FileName = ONE, data: bytes = b"data") -> Path:
    store.put(level, name, io.BytesIO(data), len(data), 1_700_000_000.123, 1)
    return Path(store.url.removeprefix("file://")) / "ltx" / str(level) / str(name)


def test_layout_and_time(store: LocalStore, tmp_path: Path) -> None:
    path = put(store, 9)
    assert path == tmp_path / "ltx" / "9" / "0000000000000001-0000000000000001.ltx"
    assert path.stat().st_mtime_ns == 1_700_000_000_123_000_000
    assert [p.name for p in path.parent.iterdir()] == [path.name], "no temporary file stays"


def test_put_makes_parents(tmp_path: Path) -> None:
    store = LocalStore(FileURL(tmp_path / "not" / "yet"))
    put(store)
    assert len(store.list_all(1).files) == 1


def test_strangers(store: LocalStore, tmp_path: Path) -> None:
    path = put(store)
    (tmp_path / "generations").mkdir()
    (path.parent / "0000000000000002-0000000000000002.ltx.tmp").touch()
    (path.parent / str(FileName(2, 2)).upper()).touch()
    (path.parent / str(FileName(3, 3))).mkdir()
    (tmp_path / "ltx" / "10").mkdir()
    listing = store.list_all(1)
    assert [file.name for file in listing.files] == [ONE]
    assert listing.strangers == {"generations"}


def test_symbolic_links_are_followed(store: LocalStore, tmp_path: Path) -> None:
    target = put(store, 1)
    (tmp_path / "ltx" / "0").symlink_to(target.parent)
    assert [file.level for file in store.list_all(1).files] == [0, 1]


def test_missing_directory(tmp_path: Path) -> None:
    store = LocalStore(FileURL(tmp_path / "gone"))
    for call in (
        lambda: store.list_all(1),
        lambda: store.list_level(0, None, 1),
        lambda: store.get(0, ONE, 10, 1),
        lambda: store.read_note("n", 1),
    ):
        with pytest.raises(BucketNotFound, match="gone does not exist"):
            call()


def test_litestreams_undecoded_directory(tmp_path: Path) -> None:
    (tmp_path / "my%20app").mkdir()
    store = open_store(f"file://{tmp_path}/my%20app")
    with pytest.raises(BucketNotFound, match=r"my app does not exist; there is .*my%20app: .*my%2520app"):
        store.list_all(1)


def test_cut_file(store: LocalStore) -> None:
    path = put(store)
    (file,) = store.list_all(1).files
    status = path.stat()
    os.truncate(path, 2)
    os.utime(path, ns=(status.st_mtime_ns, status.st_mtime_ns))
    with pytest.raises(FileVanished, match="changed since"):
        store.read(file, 0, 4, 1)
    path.unlink()
    with pytest.raises(FileVanished, match="gone"):
        store.read(file, 0, 4, 1)


def test_directory_in_place_of_a_file(store: LocalStore) -> None:
    path = put(store)
    (file,) = store.list_all(1).files
    path.unlink()
    path.mkdir()
    with pytest.raises(StoreError, match="is a directory, expected a file"):
        store.read(file, 0, 4, 1)
    with pytest.raises(StoreError, match="is a directory"):
        store.get(0, ONE, 4, 1)
    with pytest.raises(StoreError, match="writing"):
        put(store)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_fifo(store: LocalStore) -> None:
    path = put(store)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(StoreError, match="not a regular file"):
        store.get(0, ONE, 4, 1)
    assert store.list_all(1).files == ()


def test_link_to_itself(store: LocalStore, tmp_path: Path) -> None:
    path = put(store)
    (file,) = store.list_all(1).files
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(StoreError, match="symbolic links"):
        store.read(file, 0, 4, 1)
    with pytest.raises(StoreError, match="symbolic links"):
        store.get(0, ONE, 4, 1)
    other = put(store, name=FileName(2, 2))
    (other.parent / str(FileName(3, 3))).symlink_to("nowhere")
    assert [listed.name for listed in store.list_all(1).files] == [FileName(2, 2)]
    (tmp_path / "ltx" / "1").symlink_to(tmp_path / "ltx" / "1")
    with pytest.raises(StoreError, match="symbolic links"):
        store.list_all(1)


@pytest.mark.parametrize("place", ["ltx", "ltx/0", "note"])
def test_fifo_in_place_of_anything(store: LocalStore, tmp_path: Path, place: str) -> None:
    (tmp_path / place).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / place)
    with pytest.raises(StoreError, match=r"Not a directory|not a regular file"):
        if place == "note":
            store.read_note("note", 1)
        else:
            store.list_all(1)


def test_file_in_place_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = LocalStore(FileURL(tmp_path / "file"))
    with pytest.raises(StoreError, match="Not a directory"):
        store.list_all(1)
    with pytest.raises(StoreError):
        put(store)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may do everything")
def test_no_permission(store: LocalStore) -> None:
    path = put(store)
    (file,) = store.list_all(1).files
    path.chmod(0)
    with pytest.raises(AccessDenied, match="Permission denied"):
        store.read(file, 0, 4, 1)
    path.parent.chmod(0)
    with pytest.raises(AccessDenied, match="Permission denied"):
        store.list_all(1)
    path.parent.chmod(0o700)


def test_permission_error_is_translated(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(AccessDenied, match=r"opening .*: Permission denied; give this user"):
        store.get(0, ONE, 4, 1)


def test_failed_put_leaves_nothing(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(store, data=b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left on device"):
        put(store, data=b"new")
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert path.read_bytes() == b"old"


def test_oversized_note(store: LocalStore, tmp_path: Path) -> None:
    (tmp_path / "note").write_bytes(bytes((1 << 20) + 1))
    with pytest.raises(StoreError, match="it is not ours"):
        store.read_note("note", 1)
