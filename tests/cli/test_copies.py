"""Local copies from the command line: made, listed, exported, removed."""

from __future__ import annotations

import shutil
import signal
import sqlite3
import subprocess
import sysconfig
import time
from contextlib import closing
from pathlib import Path

import pytest
from cli_helpers import Bank, Run

import lazyreplica
from support.litestream import replicating, restore
from support.process import clean_env

pytestmark = pytest.mark.slow

PROGRAM = str(Path(sysconfig.get_path("scripts")) / "lazyreplica")


def test_a_copy_is_made_listed_exported_and_removed(bank: Bank, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "copy.db"
    (tmp_path / "mine.d").mkdir()
    (tmp_path / "mine.d" / "file").write_text("mine")
    done = run("hydrate", bank.url, "--hydration-path", path)
    assert done.status == 0, done.err
    native = restore(bank.replica, tmp_path / "native.db").read_bytes()
    assert path.read_bytes() == native

    (copy,) = run("cache", "--json", "ls", tmp_path).json
    assert copy["path"] == str(path) and copy["url"] == bank.url
    assert (copy["complete"], copy["in_use"]) == (True, False) and copy["bytes"] >= len(native)
    for words in (("--json", "ls", path), ("ls", "--json", path), ("ls", path, "--json")):
        assert run("cache", *words).json == [copy]
    assert run("info", "--json", bank.url).json["txid"] == copy["txid"]

    with closing(lazyreplica.connect(bank.url, hydration_path=str(path))) as connection:
        connection.execute("select count(*) from accounts").fetchall()
        assert [each["in_use"] for each in run("cache", "--json", "ls", tmp_path).json] == [True]
        refused = run("cache", "rm", path)
        assert refused.status == 1 and "is in use" in refused.err
    assert path.exists()

    out = tmp_path / "out.db"
    assert run("export", path, out).status == 0
    assert out.read_bytes() == native
    assert run("export", path, out).status == 2
    assert run("export", "--force", bank.url, out).status == 0
    assert out.read_bytes() == native

    assert run("cache", "rm", path).status == 0
    assert not path.exists() and not (tmp_path / "copy.db.d").exists()
    assert run("cache", "--json", "ls", tmp_path).json == []
    assert (tmp_path / "mine.d" / "file").read_text() == "mine"
    for stranger in ("mine", "nothing", "out.db"):
        done = run("cache", "rm", tmp_path / stranger)
        assert done.status == 1 and "nothing is removed" in done.err
    assert out.exists() and (tmp_path / "mine.d" / "file").exists()


def test_in_a_cache_dir(bank: Bank, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("hydrate", bank.url).status == 2
    assert run("cache ls").status == 2
    assert run("hydrate", "-o", f"cache_dir={tmp_path}", bank.url).status == 0
    monkeypatch.setenv("LITESTREAM_CACHE_DIR", str(tmp_path))
    (copy,) = run("cache --json ls").json
    assert Path(copy["path"]).read_bytes() == restore(bank.replica, tmp_path / "native.db").read_bytes()


def test_a_copy_that_is_not_complete_is_not_exported(bank: Bank, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "copy.db"
    assert run("hydrate", bank.url, "--hydration-path", path).status == 0
    (presence,) = (tmp_path / "copy.db.d").glob("present-*")
    with presence.open("r+b") as file:
        file.seek(2)
        file.write(b"\0")
    assert [each["complete"] for each in run("cache", "--json", "ls", path).json] == [False]
    done = run("export", path, tmp_path / "out.db")
    assert done.status == 1 and "1 of " in done.err and "lazyreplica hydrate" in done.err
    assert not (tmp_path / "out.db").exists()
    assert run("hydrate", bank.url, "--hydration-path", path).status == 0
    assert [each["complete"] for each in run("cache", "--json", "ls", path).json] == [True]


def test_what_waits_in_the_log_is_exported_without_the_replica(bank: Bank, run: Run, tmp_path: Path) -> None:
    database, replica, path = tmp_path / "bank.db", tmp_path / "replica", tmp_path / "copy.db"
    shutil.copy(bank.database, database)
    with replicating(database, replica) as litestream:
        litestream.wait_synced()
        command = [PROGRAM, "hydrate", "--follow", f"file://{replica}", "--hydration-path", str(path)]
        env = clean_env({"LITESTREAM_POLL_INTERVAL": "0.05"})
        with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and str(path) in process.stdout.readline()
            with closing(sqlite3.connect(database)) as con, con:
                con.execute("UPDATE pulse SET n = -5")
            txid = f"{litestream.wait_synced():016x}"
            deadline = time.monotonic() + 20
            while run("cache", "--json", "ls", path).json[0]["txid"] < txid and time.monotonic() < deadline:
                time.sleep(0.05)
            process.send_signal(signal.SIGKILL)  # nothing is folded
    native = restore(replica, tmp_path / "native.db").read_bytes()
    replica.rename(tmp_path / "gone")
    assert run("export", path, tmp_path / "out.db").status == 0
    assert (tmp_path / "out.db").read_bytes() == native
