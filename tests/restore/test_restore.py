"""`lazyreplica restore`: the bytes that `litestream restore` gives, whatever happens on the way."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sysconfig
import time
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest

from lazyreplica.cli import main
from lazyreplica.errors import ConfigError, LTXError
from lazyreplica.ltx.name import FileName, format_txid
from lazyreplica.restore import Restorer
from lazyreplica.storage import StoredFile, open_store
from support.bank import bank_writer, build_bank
from support.data import build_social
from support.faultproxy import Fault, FaultProxy
from support.litestream import LitestreamError, ltx_files, replicate_once, replicating, restore
from support.process import clean_env
from support.servers import S3Server

pytestmark = pytest.mark.slow

PROGRAM = str(Path(sysconfig.get_path("scripts")) / "lazyreplica")
ALWAYS = 30.0


@pytest.fixture(scope="module")
def social(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `file://` replica of 23 MB: one large snapshot at level 0, and two small transactions."""
    directory = tmp_path_factory.mktemp("social")
    database = build_social(directory / "app.db", posts=60_000, users=6000, likes=60_000)
    replica = directory / "replica"
    with replicating(database, replica, levels=["1h"]) as litestream:
        litestream.wait_synced()
        for number in range(2):
            with closing(sqlite3.connect(database)) as con, con:
                con.execute("UPDATE users SET bio = 'changed' WHERE id % 97 = ?", (number,))
            litestream.wait_synced()
    for level in (replica / "ltx").iterdir():
        if level.name != "0":
            shutil.rmtree(level)  # what a full hour has compacted: the chain is to be the same each time
    return replica


@pytest.fixture
def small(tmp_path: Path) -> Path:
    replica = tmp_path / "replica"
    replicate_once(build_bank(tmp_path / "bank.db", accounts=200), replica)
    return replica


def place(replica: Path, file: StoredFile | object) -> Path:
    level, low, high = (getattr(file, name) for name in ("level", "min_txid", "max_txid"))
    return replica / "ltx" / str(level) / str(FileName(low, high))


def upload(replica: Path, server: S3Server) -> str:
    """The replica in a new bucket of a server whose objects are files."""
    bucket = server.new_bucket()
    assert server.root is not None
    for level in (replica / "ltx").iterdir():
        shutil.copytree(level, server.root / bucket / "app" / f"{int(level.name):04x}")
    server.settle()
    return bucket


def start(url: str, output: Path, *more: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [PROGRAM, "restore", url, "-o", str(output), *more],
        env=clean_env(env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def present(output: Path) -> int:
    """How many pages of an unfinished restore are there."""
    try:
        return sum(map(bool, output.with_name(f"{output.name}.part").joinpath("presence").read_bytes()))
    except FileNotFoundError:
        return 0


# -- the same bytes --


@pytest.mark.parametrize("page_size", [512, 4096, 65536])
def test_the_same_bytes_as_litestream_at_every_moment(page_size: int, tmp_path: Path) -> None:
    database = build_bank(tmp_path / "bank.db", page_size=page_size)
    replica = tmp_path / "replica"
    options = {"levels": ["1s", "2s"], "snapshot_interval": "2s", "l0_retention": "1s"}
    with replicating(database, replica, **options) as litestream:
        with bank_writer(database, rate=200, delete_every=0.5, vacuum_every=1.5):
            time.sleep(4.5)
        litestream.wait_synced()
    files = ltx_files(replica)
    rng = random.Random(page_size)
    ends = sorted({file.max_txid for file in files})
    moments = [["--txid", format_txid(end)] for end in {ends[0], ends[-1], *rng.sample(ends, min(5, len(ends)))}]
    moments += [
        ["--time", (file.timestamp + timedelta(milliseconds=1)).isoformat().replace("+00:00", "Z")]
        for file in rng.sample(files, 4)
    ]
    compared = 0
    for number, moment in enumerate([[], *moments]):
        native, ours = tmp_path / f"{number}.native", tmp_path / f"{number}.db"
        status = main(["restore", f"file://{replica}", "-o", str(ours), "--verify", *moment])
        try:
            if moment[:1] == ["--txid"]:
                restore(replica, native, txid=int(moment[1], 16))
            else:
                restore(replica, native, timestamp=moment[1] if moment else None)
        except LitestreamError:
            assert status == 1, moment
            continue
        assert status == 0 and ours.read_bytes() == native.read_bytes(), moment
        compared += 1
    assert compared >= 5
    assert not list(tmp_path.glob("*.part"))


def test_a_large_replica_from_s3(social: Path, rclone: S3Server, tmp_path: Path) -> None:
    bucket = upload(social, rclone)
    process = start(rclone.url(bucket, "app"), tmp_path / "out.db", "--json", "--verify", env=rclone.env)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    told = json.loads(out)
    native = restore(social, tmp_path / "native.db")
    assert told["bytes"] == native.stat().st_size and told["txid"] == format_txid(ltx_files(social)[-1].max_txid)
    assert (tmp_path / "out.db").read_bytes() == native.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["native.db", "out.db"]


def test_where_no_process_can_be_started(social: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/true")
    assert main(["restore", f"file://{social}", "-o", str(tmp_path / "out.db")]) == 0
    assert (tmp_path / "out.db").read_bytes() == restore(social, tmp_path / "native.db").read_bytes()


# -- interrupted --


def test_killed_at_any_moment_it_goes_on(social: Path, rclone: S3Server, tmp_path: Path) -> None:
    bucket = upload(social, rclone)
    output = tmp_path / "out.db"
    rng = random.Random(7)
    with FaultProxy(rclone) as proxy:
        url = rclone.url(bucket, "app", endpoint=proxy.endpoint)
        before = 0
        for seed in range(4):
            proxy.clear()
            proxy.add(Fault.STALL, method="GET", header=r"(?i)range: bytes=\d{7,}-", chance=0.6, seed=seed)
            process = start(url, output, env=rclone.env)
            deadline = time.monotonic() + 5
            while time.monotonic() < deadline and process.poll() is None and present(output) <= before:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.1))
            process.send_signal(signal.SIGKILL)
            process.communicate(timeout=ALWAYS)
            if process.returncode != -signal.SIGKILL:
                break  # no stretch was held back
            assert not output.exists()
            assert present(output) >= before
            before = present(output)
        proxy.clear()
        assert before or output.exists()
        if not output.exists():
            process = start(url, output, env=rclone.env)
            _, err = process.communicate(timeout=60)
            assert process.returncode == 0, err
    assert output.read_bytes() == restore(social, tmp_path / "native.db").read_bytes()
    assert not (tmp_path / "out.db.part").exists()


class Interrupting:
    """A store in which something happens before a certain large read."""

    def __init__(self, url: str, read: int, happens: Callable[[], None]) -> None:
        self.inner = open_store(url)
        self._left = read
        self._happens = happens

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def read_into(self, file: StoredFile, offset: int, buffer: memoryview, timeout: float) -> None:
        self._left -= 1
        if self._left == 0:
            self._happens()
        self.inner.read_into(file, offset, buffer, timeout)


def restore_through(store: object, output: Path, **more: object) -> list[tuple[int, int]]:
    """Restore in this process; what progress said."""
    said: list[tuple[int, int]] = []
    restorer = Restorer(store, ALWAYS, None)  # type: ignore[arg-type]
    restorer.restore(output, progress=lambda done, total: said.append((done, total)), **more)  # type: ignore[arg-type]
    return said


def interrupt() -> None:
    raise KeyboardInterrupt


def test_what_is_right_is_kept_although_the_primary_goes_on(social: Path, tmp_path: Path) -> None:
    replica, output = tmp_path / "replica", tmp_path / "out.db"
    shutil.copytree(social, replica)
    newest = place(replica, ltx_files(replica)[-1])
    aside = newest.rename(tmp_path / "newest")
    with pytest.raises(KeyboardInterrupt):
        restore_through(Interrupting(f"file://{replica}", 3, interrupt), output)
    kept = present(output)
    assert kept > 1000 and not output.exists()
    aside.rename(newest)  # one more transaction
    (done, total), *_ = restore_through(open_store(f"file://{replica}"), output)
    assert 0 < kept - done < 200 and done < total  # but for the pages that the transaction changed
    assert output.read_bytes() == restore(replica, tmp_path / "native.db").read_bytes()


def test_nothing_is_kept_of_another_replica(social: Path, small: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.db"
    with pytest.raises(KeyboardInterrupt):
        restore_through(Interrupting(f"file://{social}", 3, interrupt), output)
    assert present(output)
    (done, _), *_ = restore_through(open_store(f"file://{small}"), output)
    assert done == 0
    assert output.read_bytes() == restore(small, tmp_path / "native.db").read_bytes()


def test_another_boot_trusts_nothing_that_was_not_synced(
    social: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.db"
    with pytest.raises(KeyboardInterrupt):
        restore_through(Interrupting(f"file://{social}", 3, interrupt), output)
    with (tmp_path / "out.db.part" / "database").open("r+b") as file:
        file.write(b"never reached the disk" * 10_000)
    monkeypatch.setattr("lazyreplica.unfinished.boot_id", lambda: "another")
    (done, _), *_ = restore_through(open_store(f"file://{social}"), output)
    assert done == 0
    assert output.read_bytes() == restore(social, tmp_path / "native.db").read_bytes()


# -- vanished, damaged --


def test_a_file_that_vanishes_is_looked_for_elsewhere(social: Path, tmp_path: Path) -> None:
    replica, output = tmp_path / "replica", tmp_path / "out.db"
    shutil.copytree(social, replica)
    first = place(replica, ltx_files(replica)[0])

    def compact() -> None:
        (replica / "ltx" / "9").mkdir()  # as a snapshot it is another file
        first.rename(replica / "ltx" / "9" / first.name)

    native = restore(replica, tmp_path / "native.db")
    restore_through(Interrupting(f"file://{replica}", 2, compact), output)
    assert output.read_bytes() == native.read_bytes()


@pytest.mark.parametrize("which", [0, -1])
def test_a_damaged_file_is_an_error_and_no_database(
    social: Path, which: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replica, output = tmp_path / "replica", tmp_path / "out.db"
    shutil.copytree(social, replica)
    file = ltx_files(replica)[which]
    path = place(replica, file)
    with path.open("r+b") as damaged:
        damaged.seek(path.stat().st_size // 2)
        byte = damaged.read(1)
        damaged.seek(-1, os.SEEK_CUR)
        damaged.write(bytes([byte[0] ^ 0x10]))
    assert main(["restore", f"file://{replica}", "-o", str(output)]) == 1
    said = capsys.readouterr().err
    assert f"level {file.level} file {path.name}" in said and "damaged" in said
    assert not output.exists()


def test_a_database_that_fails_its_check_does_not_appear(small: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.db"

    def check(database: Path, _: object) -> None:
        assert database.read_bytes() == restore(small, tmp_path / "native.db").read_bytes()
        raise LTXError("not good")

    with pytest.raises(LTXError, match="not good"):
        restore_through(open_store(f"file://{small}"), output, check=check)
    assert not output.exists() and not (tmp_path / "out.db.part").exists()


# -- what is refused --


def test_nothing_is_overwritten_unless_told(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.db"
    command = ["restore", f"file://{small}", "-o", str(output)]
    output.write_bytes(b"mine")
    assert main(command) == 1
    assert "exists: name another output, or overwrite it with --force" in capsys.readouterr().err
    assert output.read_bytes() == b"mine"
    output.write_bytes(b"")  # none, as Litestream sees it
    assert main(command) == 0
    output.unlink()
    wal = tmp_path / "out.db-wal"
    wal.write_bytes(b"of another database")
    assert main(command) == 1 and "SQLite would take it for a part" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0 and not wal.exists()
    native = restore(small, tmp_path / "native.db")
    output.write_bytes(b"mine")
    assert main([*command, "--force"]) == 0 and output.read_bytes() == native.read_bytes()


def test_a_directory_that_is_not_ours_is_left_alone(small: Path, tmp_path: Path) -> None:
    part = tmp_path / "out.db.part"
    part.mkdir()
    (part / "database").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="is not lazyreplica's"):
        restore_through(open_store(f"file://{small}"), tmp_path / "out.db")
    assert (part / "database").read_bytes() == b"mine"


def test_two_at_once_do_not_mix(social: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.db"

    def second() -> None:
        with pytest.raises(OSError, match="another process restores there"):
            restore_through(open_store(f"file://{social}"), output)

    restore_through(Interrupting(f"file://{social}", 2, second), output)
    assert output.read_bytes() == restore(social, tmp_path / "native.db").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ("--txid 00000000000000ff", 1, "has no state at TXID 00000000000000ff"),
        ("--time 2001-01-01", 1, "has no state from before 2001-01-01"),
        ("--time 2999-01-01", 1, "is in the future"),
        ("--time soon", 2, "time is 'soon'"),
        ("--txid 1 --time now", 2, "not allowed with"),
    ],
)
def test_moments_that_cannot_be_had(
    arguments: str, status: int, said: str, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        found = main(["restore", f"file://{small}", "-o", str(tmp_path / "out.db"), *arguments.split()])
    except SystemExit as exc:
        found = int(exc.code or 0)
    assert found == status and said in capsys.readouterr().err
    assert not (tmp_path / "out.db").exists()


def test_a_path_without_a_replica(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["restore", f"file://{tmp_path}/empty", "-o", str(tmp_path / "out.db")]) == 1
    assert "holds no LTX files" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [tmp_path / "empty"]
