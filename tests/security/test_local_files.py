"""What lies on the disk: for its owner alone, never written through a link, and never believed when it was altered."""

from __future__ import annotations

import json
import logging
import os
import random
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import apsw
import pytest

import lazyreplica
from lazyreplica.errors import ConfigError
from lazyreplica.local.base import Base
from lazyreplica.local.state import read_state
from support.manyfiles import ManyFiles, marks

pytestmark = pytest.mark.slow

QUERY = "SELECT id, mark FROM t ORDER BY id"
PRECIOUS = "precious"


@pytest.fixture
def files(tmp_path: Path) -> ManyFiles:
    made = ManyFiles(tmp_path / "replica" / "ltx" / "0")
    made.commit(9)
    return made


@pytest.fixture
def url(files: ManyFiles, tmp_path: Path) -> str:
    return f"file://{tmp_path / 'replica'}"


@pytest.fixture(autouse=True)
def shared_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary directory as ``/tmp`` is, of this test alone."""
    path = tmp_path / "shared"
    path.mkdir()
    path.chmod(0o1777)
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    return path


@pytest.fixture
def no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def hydrated(url: str, **options: Any) -> apsw.Connection:
    db = lazyreplica.connect(url, hydrate=True, poll_interval=0, **options)
    deadline = time.monotonic() + 20
    while float(db.pragma("litestream_hydration_progress")) < 100:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return db


def modes(top: Path) -> dict[str, int]:
    found = {str(path.relative_to(top)): stat.S_IMODE(path.lstat().st_mode) for path in top.rglob("*")}
    assert found
    return found


def test_local_files_are_for_their_owner_whatever_the_umask(
    url: str, tmp_path: Path, shared_tmp: Path, no_umask: None
) -> None:
    target = tmp_path / "hydrated" / "app.db"
    target.parent.mkdir()
    with closing(hydrated(url, hydration_path=str(target))) as db:
        assert db.execute(QUERY).fetchall() == marks(10)
        found = modes(target.with_name("app.db.d"))
        assert {"state.json", "control", "published.json", "lazyreplica.lock", "owner.lock"} < set(found)
        assert {name.split("-")[0] for name in found if "-" in name} == {"base", "present", "log"}
        assert set(found.values()) == {0o600}
        assert stat.S_IMODE(target.stat().st_mode) == 0o600
        assert stat.S_IMODE(target.with_name("app.db.d").stat().st_mode) == 0o700


def test_a_private_copy_is_for_its_owner_whatever_the_umask(url: str, shared_tmp: Path, no_umask: None) -> None:
    with closing(hydrated(url)):
        found = modes(shared_tmp)
        assert all(mode == (0o700 if (shared_tmp / name).is_dir() else 0o600) for name, mode in found.items()), found
        assert len(found) >= 6


def test_an_export_is_for_its_owner_whatever_the_umask(url: str, tmp_path: Path, no_umask: None) -> None:
    with closing(lazyreplica.connect(url, hydrate=False, poll_interval=0)) as db:
        lazyreplica.export(db, tmp_path / "exported.db")
    assert stat.S_IMODE((tmp_path / "exported.db").stat().st_mode) == 0o600


# -- shared temporary directories --


def a_link(path: Path, elsewhere: Path) -> None:
    path.symlink_to(elsewhere)


def a_dangling_link(path: Path, elsewhere: Path) -> None:
    path.symlink_to(elsewhere / "not there")


def open_to_all(path: Path, elsewhere: Path) -> None:
    path.mkdir()
    path.chmod(0o777)


def of_another_user(path: Path, elsewhere: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a directory away")
    path.mkdir(mode=0o700)
    os.chown(path, 12345, 12345)


def a_file(path: Path, elsewhere: Path) -> None:
    path.write_text(PRECIOUS)


@pytest.mark.parametrize("attack", [a_link, a_dangling_link, open_to_all, of_another_user, a_file])
def test_a_prepared_name_in_a_shared_directory_is_not_used(
    url: str, tmp_path: Path, shared_tmp: Path, attack: Callable[[Path, Path], None]
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    prepared = shared_tmp / f"lazyreplica-{os.getuid()}"
    attack(prepared, elsewhere)
    with closing(hydrated(url)) as db:
        assert db.execute(QUERY).fetchall() == marks(10)
        (own,) = [path for path in shared_tmp.iterdir() if path != prepared]
        assert stat.S_IMODE(own.stat().st_mode) == 0o700
    assert list(shared_tmp.iterdir()) == [prepared], "nothing of ours is left"
    assert not list(elsewhere.iterdir())
    assert not prepared.is_dir() or not list(prepared.iterdir())


@pytest.mark.parametrize("attack", [open_to_all, of_another_user])
@pytest.mark.parametrize("marked", [True, False])
def test_a_prepared_directory_at_the_hydration_path_is_refused(
    url: str, tmp_path: Path, shared_tmp: Path, attack: Callable[[Path, Path], None], marked: bool
) -> None:
    """Whoever may write there could put in any pages."""
    target = shared_tmp / "app.db"
    attack(shared_tmp / "app.db.d", tmp_path)
    if marked:
        (shared_tmp / "app.db.d" / "lazyreplica.lock").touch()
    with pytest.raises(ConfigError, match="expected user"):
        lazyreplica.connect(url, hydrate=True, hydration_path=str(target))
    assert len(list((shared_tmp / "app.db.d").iterdir())) == marked


NAMES = ["state.json", "state.json.new", "control", "base-1", "present-1", "log-1", "log-2", "lazyreplica.lock"]
NAMES += ["owner.lock", "published.json", "published.new", "base-2", "present-2"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fresh", [True, False])
def test_nothing_is_written_through_a_link(files: ManyFiles, url: str, tmp_path: Path, name: str, fresh: bool) -> None:
    target, precious = tmp_path / "app.db", tmp_path / "precious"
    precious.write_text(PRECIOUS)
    directory = tmp_path / "app.db.d"
    if fresh:
        directory.mkdir(mode=0o700)
        if name != "lazyreplica.lock":
            (directory / "lazyreplica.lock").touch()
    else:
        hydrated(url, hydration_path=str(target)).close()
        (directory / name).unlink(missing_ok=True)
        if name == "published.json":
            target.unlink()  # without its note it is nobody's
    (directory / name).symlink_to(precious)
    files.commit()
    with closing(lazyreplica.connect(url, hydrate=True, hydration_path=str(target), poll_interval=0)) as db:
        deadline = time.monotonic() + 1
        while float(db.pragma("litestream_hydration_progress")) < 100 and time.monotonic() < deadline:
            time.sleep(0.005)
        assert db.execute(QUERY).fetchall() == marks(11)
    assert precious.read_text() == PRECIOUS
    assert stat.S_IMODE(precious.stat().st_mode) == 0o644


# -- files that were altered --


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Bytes as a bad disk or a careless hand leaves them."""
    spoiled = bytearray(data)
    match rng.randrange(5):
        case 0:
            return bytes(spoiled[: rng.randrange(len(data) + 1)])
        case 1:
            return rng.randbytes(rng.randrange(300))
        case 2:
            at = rng.randrange(len(data))
            spoiled[at : at + rng.randrange(1, 64)] = rng.randbytes(rng.randrange(1, 64))
        case 3:
            spoiled[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case _:
            at = rng.randrange(len(data))
            spoiled[at] = ord(rng.choice('0123456789[]{}"x'))
    return bytes(spoiled)


@pytest.mark.parametrize("kind", ["state.json", "log", "published.json", "control", "base cut off"])
def test_what_was_altered_is_never_believed(tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    """In none of many variants do other rows come out, nor an error: the copy is made anew, or its pages fetched."""
    caplog.set_level(logging.CRITICAL)
    rng = random.Random(kind)
    files = ManyFiles(tmp_path / "replica" / "ltx" / "0")
    url, target = f"file://{tmp_path / 'replica'}", tmp_path / "app.db"
    for _ in range(12):
        files.commit(2)
        with (
            closing(hydrated(url, hydration_path=str(target))) as db,
            closing(lazyreplica.connect(url, hydrate=True, hydration_path=str(target))),
        ):
            files.commit(3)
            lazyreplica.refresh(db)
            _kill_like(tmp_path / "app.db.d", tmp_path / "left")
        kept = {path.name: path.read_bytes() for path in (tmp_path / "left").iterdir()}
        name = {"base cut off": "base"}.get(kind, kind)
        (name,) = [found for found in kept if found.startswith(name)]
        for file, data in kept.items():
            if file == name:
                data = data[: rng.randrange(len(data))] if kind == "base cut off" else damaged(data, rng)
            path = tmp_path / "app.db.d" / file
            path.unlink(missing_ok=True)
            path.write_bytes(data)
        (tmp_path / "app.db").unlink(missing_ok=True)
        with closing(lazyreplica.connect(url, hydrate=True, hydration_path=str(target), poll_interval=0)) as db:
            assert db.execute(QUERY).fetchall() == marks(files.txid)


def test_a_state_of_which_one_byte_has_changed_is_none(url: str, tmp_path: Path) -> None:
    """One digit of a transaction's number, and the base would be taken for another state's."""
    hydrated(url, hydration_path=str(tmp_path / "app.db")).close()
    path = tmp_path / "app.db.d" / "state.json"
    data = path.read_bytes()
    assert read_state(path.parent) is not None
    for at, byte in enumerate(data):
        for other in b"07Z]":
            if other != byte:
                path.write_bytes(data[:at] + bytes([other]) + data[at + 1 :])
                assert read_state(path.parent) is None, data[max(0, at - 20) : at + 20]
    path.write_bytes(b"[" * 100_000)
    assert read_state(path.parent) is None


def test_presence_that_nobody_has_written_is_not_believed(tmp_path: Path) -> None:
    base = Base(tmp_path / "base", tmp_path / "present", 512, 64, create=True)
    base.write(1, b"x" * 512 * 32)
    assert base.count() == 32
    base.forget_garbage()
    assert base.count() == 32
    (tmp_path / "present").write_bytes(random.Random(1).randbytes(64))
    base = Base(tmp_path / "base", tmp_path / "present", 512, 64)
    base.forget_garbage()
    assert base.count() == 0


def _kill_like(source: Path, target: Path) -> None:
    """The files as a process that is killed now leaves them."""
    target.mkdir(exist_ok=True)
    for path in target.iterdir():
        path.unlink()
    for path in source.iterdir():
        if not path.name.endswith(".lock") and path.suffix != ".new":
            (target / path.name).write_bytes(path.read_bytes())


def test_no_secret_is_in_the_files_of_a_copy(rclone: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of the environment, of litestream.yml, and SSE-C: the directory outlives the process."""
    assert rclone.root is not None
    bucket = rclone.new_bucket()
    ManyFiles(rclone.root / bucket / "app" / "0000").commit(9)
    config = tmp_path / "litestream.yml"

    config.write_text(
        json.dumps(
            {
                "dbs": [
                    {
                        "path": str(tmp_path / "app.db"),
                        "replica": {
                            "url": f"s3://{bucket}/app",
                            "endpoint": rclone.endpoint,
                            "region": "us-east-1",
                            "access-key-id": rclone.access_key,
                            "secret-access-key": rclone.secret_key,
                        },
                    }
                ]
            }
        )
    )
    monkeypatch.setenv("LITESTREAM_CONFIG", str(config))
    uri = f"file:{tmp_path}/app.db?vfs=litestream&hydrate=true&hydration_path={tmp_path}/copy.db"
    script = f"""
import time, apsw, lazyreplica
db = apsw.Connection({uri!r}, flags=apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI)
while float(db.pragma("litestream_hydration_progress")) < 100:
    time.sleep(0.01)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path != config]
    assert any(path.name == "state.json" for path in files)
    for path in files:
        data = path.read_bytes()
        assert rclone.secret_key.encode() not in data and rclone.access_key.encode() not in data, path
