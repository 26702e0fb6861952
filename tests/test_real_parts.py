"""Do the real parts work here at all? If one of these fails, look at the machine before the project."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from support.bank import bank_writer, build_bank, check_bank
from support.data import build_social, build_varied
from support.databases import assert_same_files, file_digest
from support.litestream import LitestreamError, ltx_files, replicate_once, replicating, restore
from support.servers import S3Server
from support.waiting import eventually

pytestmark = pytest.mark.slow


@pytest.fixture
def varied(tmp_path: Path) -> Path:
    return build_varied(tmp_path / "varied.db")


def test_litestream_writes_files(litestream: Path, varied: Path, file_replica_dir: Path, tmp_path: Path) -> None:
    assert replicate_once(varied, file_replica_dir) == 1
    first = ltx_files(file_replica_dir)[0]
    assert (first.level, first.min_txid, first.max_txid) == (0, 1, 1)
    assert assert_same_files(varied, restore(file_replica_dir, tmp_path / "out.db")) > 1000


def write_and_restore(server: S3Server, db: Path, tmp_path: Path) -> str:
    bucket = server.new_bucket()
    url = server.url(bucket, "a b/ä")
    with replicating(db, url, env=server.env) as writer:
        first = writer.wait_synced()
        old = file_digest(writer.restore(tmp_path / "first.db"))
        with closing(sqlite3.connect(db)) as con, con:
            con.execute("CREATE TABLE more AS SELECT 'more' AS word")
        assert writer.wait_synced() == first + 1
        assert {key.rpartition("/")[0] for key in server.keys(bucket)} >= {"a b/ä/0000"}
        assert assert_same_files(db, writer.restore(tmp_path / "latest.db")) > 1000
        assert file_digest(writer.restore(tmp_path / "again.db", txid=first)) == old
    return bucket


def test_litestream_writes_to_rclone(litestream: Path, rclone: S3Server, varied: Path, tmp_path: Path) -> None:
    bucket = write_and_restore(rclone, varied, tmp_path)
    assert rclone.root is not None
    files = sorted((rclone.root / bucket / "a b" / "ä" / "0000").iterdir())
    assert files[0].name == f"{1:016x}-{1:016x}.ltx"
    # A file that is changed or removed behind the server's back:
    files[0].write_bytes(b"other")
    rclone.settle()
    key = f"a b/ä/0000/{files[0].name}"
    assert rclone.client().get_object(Bucket=bucket, Key=key)["Body"].read() == b"other"
    files[0].unlink()
    rclone.settle()
    assert key not in rclone.keys(bucket)


def test_litestream_writes_to_seaweed(litestream: Path, seaweed: S3Server, varied: Path, tmp_path: Path) -> None:
    write_and_restore(seaweed, varied, tmp_path)


def test_a_restore_that_fails_says_why(litestream: Path, tmp_path: Path) -> None:
    with pytest.raises(LitestreamError, match="no matching backup"):
        restore(tmp_path / "nothing", tmp_path / "out.db")


def test_litestream_survives_a_kill(litestream: Path, tmp_path: Path, file_replica_dir: Path) -> None:
    db = build_social(tmp_path / "social.db")
    with replicating(db, file_replica_dir) as writer:
        first = writer.wait_synced()
        writer.kill()
        with closing(sqlite3.connect(db)) as con, con:
            con.execute("UPDATE users SET bio = 'new' WHERE id < 10")
        writer.start()
        assert writer.wait_synced() > first
        assert_same_files(db, writer.restore(tmp_path / "out.db"))


def test_a_busy_bank_restores_to_one_moment(litestream: Path, tmp_path: Path, file_replica_dir: Path) -> None:
    db = build_bank(tmp_path / "bank.db")
    options = {"levels": ["1s", "3s"], "snapshot_interval": "4s", "l0_retention": "2s"}
    with (
        replicating(db, file_replica_dir, **options) as writer,
        bank_writer(db, rate=None, delete_every=0.5, vacuum_every=1.5) as bank,
    ):
        seen = []
        for round_number in range(5):
            time.sleep(1)
            writer.wait_synced()
            out = writer.restore(tmp_path / f"{round_number}.db")
            with closing(sqlite3.connect(out)) as con:
                seen.append(check_bank(con).n)
        stats = bank.stop()
        assert seen == sorted(set(seen)) and seen[0] > 0
        assert stats.vacuums > 0 and stats.deletes > 0
        writer.wait_synced()
        # Nothing that was committed is missing, and every level was in use.
        assert_same_files(db, writer.restore(tmp_path / "last.db"))
        assert {file.level for file in writer.ltx_files()} >= {0, 1, 2, 9}


def is_running(pid: int) -> bool:
    """Whether the process is there and not merely unburied."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_servers_die_with_a_killed_test_run(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from support.servers import serve_rclone\n"
        "with serve_rclone(Path(sys.argv[1])) as server: print(server.process.pid, flush=True); time.sleep(60)"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=env
    ) as child:
        assert child.stdout is not None
        pid = int(child.stdout.readline())
        assert is_running(pid)
        child.send_signal(signal.SIGKILL)
    eventually(lambda: not is_running(pid))
