"""The guides in docs/ say what is so: their code runs, their tables and messages are looked up."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import logging
import re
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import apsw
import pytest
from e2e_helpers import file_url, open_uri, python_env

import lazyreplica
from lazyreplica import config, events, listeners
from support.guides import DOCS, blocks, run_guide, text_of

pytestmark = pytest.mark.slow

PROJECT = DOCS.parent


@pytest.fixture
def shop(tmp_path: Path) -> tuple[Path, str]:
    """A database with orders, and its replica's URL."""
    path = tmp_path / "shop.db"
    db = apsw.Connection(str(path))
    db.execute("create table orders(id integer primary key, customer text, total real, state text)").fetchall()
    with db:
        db.executemany(
            "insert into orders values (?, ?, ?, 'new')", ((i, f"c{i % 97}", i % 100) for i in range(5000))
        ).fetchall()
    db.close()
    return path, publish(path, file_url(tmp_path / "replica"))


def publish(path: Path, url: str) -> str:
    lazyreplica.publish(path, url)
    return url


def cells(guide: str) -> list[list[str]]:
    """The rows of a guide's tables."""
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in text_of(guide).splitlines()
        if line.startswith("| ")
    ]


def test_observability(shop: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    from opentelemetry import metrics
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader
    from prometheus_client import REGISTRY, generate_latest

    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    metrics.set_meter_provider(provider)
    db = lazyreplica.connect(shop[1], poll_interval=0)  # keeps the replica open while we look
    level = logging.getLogger("lazyreplica").level
    try:
        run_guide("observability.md", {"URL": shop[1]}, expect=5)
        lazyreplica.refresh(db)
        stats = lazyreplica.stats(db)
        prometheus = generate_latest(REGISTRY).decode()
        collected = str(reader.get_metrics_data())
    finally:
        db.close()
        logging.getLogger("lazyreplica").setLevel(level)
        listeners.present = ()
        for collector in [c for c in REGISTRY._collector_to_names if "eplica" in str(REGISTRY._collector_to_names[c])]:
            REGISTRY.unregister(collector)
        provider.shutdown()
    assert f'lazyreplica_requests_total{{replica="{shop[1]}"}} {float(stats.requests)}' in prometheus
    assert 'lazyreplica_request_seconds_count{method="get",outcome="ok"}' in prometheus
    assert "lazyreplica.bytes" in collected and "lazyreplica.lag" in collected
    assert '"requests": ' in capsys.readouterr().out


def test_observabilitys_tables() -> None:
    fields = [row[0].strip("`") for row in cells("observability.md")]
    known = [field.name for field in dataclasses.fields(lazyreplica.Stats)]
    assert [name for name in fields if name in known] == known
    for row in cells("observability.md"):
        kind = getattr(events, row[0].strip("`"), None)
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            for field in dataclasses.fields(kind):
                assert f"`{field.name}`" in row[1]
    formats = {text for text in strings(PROJECT) if "%" in text}
    quoted = re.findall(r"\| `([^`]*%[^`]*)` \|", text_of("observability.md"))
    assert len(quoted) == 11
    assert set(quoted) <= formats


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_analytics(shop: tuple[Path, str], tmp_path: Path) -> None:
    names = run_guide("analytics.md", {"URL": shop[1], "CACHE": str(tmp_path / "cache")}, expect=6)
    assert names["totals"].shape == (97, 2) and names["same"].shape == (97, 2)
    assert list(names["nothing"].columns) == ["id", "customer", "total", "state"] and names["nothing"].empty
    assert len(names["orders"]) == len(names["also"]) == 49 * 50
    assert names["spent"] == 5000 * 99 / 2
    with contextlib.closing(sqlite3.connect(names["path"])) as plain:  # what another tool would see
        assert plain.execute("select count(*) from orders").fetchone() == (5000,)


def test_what_analytics_says_does_not_work(shop: tuple[Path, str]) -> None:
    import pandas as pd
    import polars as pl

    db = lazyreplica.connect(shop[1], poll_interval=0)
    try:
        with pytest.warns(UserWarning, match="pandas only supports SQLAlchemy"):
            next(iter(pd.read_sql("select 1", db)))
        with pytest.warns(UserWarning), pytest.raises(apsw.ExecutionCompleteError):
            pd.read_sql("select * from orders where id < 0", db)
        with pytest.warns(UserWarning), pytest.raises(AttributeError, match="fetchmany"):
            next(pd.read_sql("select * from orders", db, chunksize=10))
        with pytest.raises(AttributeError, match="fetchmany"):
            next(pl.read_database("select * from orders", db, iter_batches=True, batch_size=10))
    finally:
        db.close()


def test_serverless(shop: tuple[Path, str]) -> None:
    path, url = shop
    names: dict[str, Any] = {"URL": url}
    assert "FIGURES" not in text_of("serverless.md")
    code = blocks("serverless.md")
    assert len(code) == 2
    for block in code:
        exec(compile(block, "docs/serverless.md", "exec"), names)
    handler: Any = names["handler"]
    db: Any = names["_db"]
    try:
        assert names["answer"] == {"status": 200, "state": "new", "total": 7.0}
        assert handler({"id": -1}, None) == {"status": 404}
        change(path, "update orders set state = 'paid' where id = 7")
        publish(path, url)
        time.sleep(1.1)  # as long as it may be stale
        assert handler({"id": 7}, None)["state"] == "paid"
    finally:
        db.close()


def change(path: Path, sql: str) -> None:
    db = apsw.Connection(str(path))
    db.execute(sql).fetchall()
    db.close()


def test_web_workers(shop: tuple[Path, str], tmp_path: Path) -> None:
    program, gunicorn = blocks("web-workers.md")
    script = tmp_path / "workers.py"
    script.write_text(f"URL, CACHE = {shop[1]!r}, {str(tmp_path / 'cache')!r}\n{program}")
    done = subprocess.run(
        [sys.executable, str(script)], env=python_env(), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    assert sorted(line[0] for line in lines) == list("0123")
    assert {line[1] for line in lines} == {"5000"}
    assert all(line[2].startswith(str(tmp_path / "cache")) for line in lines)
    opened: list[int] = []
    names: dict[str, Any] = {"connection": lambda: opened.append(1)}
    exec(gunicorn, names)
    names["post_worker_init"](None)
    assert opened == [1] and names["preload_app"]


def test_from_litestream_vfs(shop: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITESTREAM_REPLICA_URL", shop[1])
    opened = apsw.Connection
    flags = apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI  # whatever pytest imported first
    monkeypatch.setattr(apsw, "Connection", lambda name: opened(name, flags=flags))
    (block,) = blocks("from-litestream-vfs.md")
    names: dict[str, Any] = {}
    exec(block, names)
    names["db"].close()
    assert names["txid"] == f"{1:016x}" and names["time"].startswith("20")


def test_names_in_from_litestream_vfs(shop: tuple[Path, str]) -> None:
    known = {*config.ENVIRONMENT.values(), "LITESTREAM_REPLICA_URL"} | {
        f"LITESTREAM_{name}" for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY")
    }
    db = lazyreplica.connect(shop[1], poll_interval=0)
    try:
        for row in cells("from-litestream-vfs.md"):
            gone = row[1].startswith("gone")
            for name in re.findall(r"LITESTREAM_[A-Z_]*[A-Z]", row[0]):
                assert (name in known) is not gone, name
            for name in re.findall(r"PRAGMA (litestream_\w+)", row[0]):
                assert (db.execute(f"PRAGMA {name}").fetchall() == []) is gone, name
    finally:
        db.close()


# -- troubleshooting --


def strings(project: Path) -> set[str]:
    """Every text in the sources; what a formatted one fills in is a NUL."""
    found = set()
    for path in [*project.glob("src/**/*.py"), *project.glob("vfs/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
            elif isinstance(node, ast.JoinedStr):
                found.add("".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values))
    return found


MESSAGES = re.findall(r"^### `(.+)`$", text_of("troubleshooting.md"), re.MULTILINE)


@pytest.mark.parametrize("message", MESSAGES)
def test_quoted_messages_exist(message: str) -> None:
    if message == "no such vfs: litestream":  # SQLite's own
        with pytest.raises(sqlite3.OperationalError, match=message):
            sqlite3.connect("file:app.db?vfs=litestream", uri=True)
        return
    pattern = re.compile(".*".join(re.escape(part) for part in message.split("...")), re.DOTALL)
    # A log record's %s stands for what differs, as a NUL does; a literal that is quoted by !r has its quotes in there.
    texts = {re.sub(r"%[.0-9]*[sdfg]", "\0", text) for text in strings(PROJECT)}
    loose = re.compile(pattern.pattern.replace("'.*'", ".*"), re.DOTALL)
    assert any(pattern.search(text) or loose.search(text) for text in texts), message


def test_quoted_messages_are_raised(shop: tuple[Path, str], tmp_path: Path) -> None:
    """Those that a user meets first, as they really come."""
    (tmp_path / "empty").mkdir()
    cases = {
        "file:nobody.db?vfs=litestream": "no replica is configured for '...': set ...",
        f"file:a.db?vfs=litestream&replica_url={file_url(tmp_path / 'empty')}": "... holds no LTX files",
    }
    for name, message in cases.items():
        assert message in MESSAGES
        with pytest.raises(apsw.CantOpenError, match=matching(message)), open_uri(name):
            pass
    db = lazyreplica.connect(shop[1], poll_interval=0)
    inherited = "this connection's VFS"
    try:
        for sql, message in {
            "attach 'local.db' as here": f"'...' is not a configured replica, and {inherited} would open it as one",
            "delete from orders": "a Litestream replica is read-only",
        }.items():
            assert message in MESSAGES
            with pytest.raises(apsw.Error) as caught:
                db.execute(sql).fetchall()
            assert re.search(matching(message), str(caught.value)) or isinstance(caught.value, apsw.ReadOnlyError)
    finally:
        db.close()


def matching(message: str) -> str:
    return ".*".join(re.escape(part) for part in message.split("..."))


# -- all of them --


def test_every_document_is_in_the_index() -> None:
    listed = re.findall(r"\]\(([\w-]+\.md)\)", text_of("README.md"))
    assert sorted(listed) == sorted(path.name for path in DOCS.glob("*.md") if path.name != "README.md")


def test_links_lead_somewhere() -> None:
    for path in DOCS.glob("*.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"
