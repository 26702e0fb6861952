"""The code in docs/time-travel.md runs, block after block, as it is written."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path

import apsw
import pytest
from e2e_helpers import file_url

from support.guides import run_guide
from support.litestream import replicating


def test_the_guides_code_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    primary = apsw.Connection(str(tmp_path / "app.db"))
    primary.execute("pragma journal_mode = wal; create table orders(id integer primary key, state)").fetchall()
    primary.execute("insert into orders values (1, 'new'), (2, 'new')")
    with replicating(tmp_path / "app.db", tmp_path / "replica") as litestream:
        litestream.wait_synced()
        time.sleep(0.01)
        moment = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        time.sleep(0.01)
        primary.execute(
            "update orders set state = 'paid' where id = 1; insert into orders values (3, 'new')"
        ).fetchall()
        litestream.wait_synced()
    primary.close()

    names = run_guide("time-travel.md", {"URL": file_url(tmp_path / "replica"), "MOMENT": moment}, expect=5)
    assert names["new_or_changed"] == [(1, "paid"), (3, "new")]
    assert names["gone_or_before"] == [(1, "new")]
    past, future, reading = capsys.readouterr().out.splitlines()
    assert "begins at" in past
    assert "in the future" in future
    assert "while this connection reads" in reading
