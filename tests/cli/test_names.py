"""A replica may be named by its database, as litestream.yml lists it, wherever a command takes a URL."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from cli_helpers import Bank, Run

from lazyreplica.ltx.name import format_txid
from lazyreplica.naming import is_configured
from support.litestream import ltx_files
from support.servers import S3Server

pytestmark = pytest.mark.slow


@pytest.fixture
def listed(bank: Bank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    config = {"dbs": [{"path": str(bank.database), "replica": {"path": str(bank.replica)}}]}
    (tmp_path / "litestream.yml").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    return str(bank.database)


@pytest.mark.parametrize(
    "command",
    [
        "info --json {}",
        "ltx --json {}",
        "timeline --json {}",
        "verify --json --no-integrity-check {}",
        "query --json {} 'select count(*) from accounts'",
    ],
)
def test_a_path_and_a_base_name_are_as_good_as_the_url(command: str, bank: Bank, listed: str, run: Run) -> None:
    def answer(name: str) -> object:
        done = run(command.format(name))
        assert done.status == 0, done.err
        found = done.json
        if isinstance(found, dict):
            found.pop("lag_seconds", None)
        return found

    by_url = answer(bank.url)
    assert by_url == answer(listed) == answer(Path(listed).name)


def test_a_file_of_a_replica_named_by_its_database(bank: Bank, listed: str, run: Run) -> None:
    newest = ltx_files(bank.replica, level=0)[-1]
    name = f"{format_txid(newest.min_txid)}-{format_txid(newest.max_txid)}.ltx"
    by_url = run("dump-file", "--json", "--level", "0", bank.url, name)
    assert by_url.status == 0
    assert by_url.json == run("dump-file", "--json", "--level", "0", Path(listed).name, name).json


def test_the_keys_in_litestream_yml_are_used(
    rclone: S3Server, bank: Bank, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = rclone.new_bucket()
    assert rclone.root is not None
    for level in (bank.replica / "ltx").iterdir():
        shutil.copytree(level, rclone.root / bucket / "app" / f"{int(level.name):04x}")
    replica = {
        "url": rclone.url(bucket, "app"),
        "access-key-id": rclone.env["AWS_ACCESS_KEY_ID"],
        "secret-access-key": rclone.env["AWS_SECRET_ACCESS_KEY"],
    }
    (tmp_path / "litestream.yml").write_text(json.dumps({"dbs": [{"path": str(bank.database), "replica": replica}]}))
    monkeypatch.chdir(tmp_path)
    assert run("query", rclone.url(bucket, "app"), "select 1 from accounts limit 1").status == 1  # no keys there
    # What the environment names is another replica: the command line goes first.
    monkeypatch.setenv("LITESTREAM_REPLICA_URL", "file:///nowhere")
    done = run("query", "--json", bank.database.name, "select count(*) as n from accounts")
    assert done.json == [{"n": 2000}]
    assert run("info", "--json", bank.database.name).status == 0
    assert not is_configured(bank.database.name)


def test_a_name_that_nothing_lists(run: Run, listed: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done = run("info other.db")
    assert done.status == 1 and "does not list 'other.db'" in done.err
    (tmp_path / "litestream.yml").unlink()
    done = run("query other.db 'select 1'")
    assert done.status == 1 and "is not a replica's URL" in done.err


def test_a_query_about_the_past(bank: Bank, run: Run) -> None:
    oldest = run("info", "--json", bank.url).json["oldest_txid"]
    first = run("query", "--json", "--txid", oldest, bank.url, "select n from pulse")
    now = run("query", "--json", bank.url, "select n from pulse").json
    assert run("query", "--json", "--time", "now", bank.url, "select n from pulse").json == now != first.json
    assert run("query", "--time", "now", "--txid", "1", bank.url, "select 1").status == 2
    done = run("query", "--time", "soon", bank.url, "select 1")
    assert done.status == 1 and "time is 'soon'" in done.err
