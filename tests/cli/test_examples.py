"""Help texts cannot rot: every example that a command's help shows is run, word for word."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import ModuleType

import pytest
from cli_helpers import Run

from lazyreplica.cli import COMMANDS, build_parser
from support.data import build_social
from support.litestream import replicate_once
from support.servers import S3Server

pytestmark = pytest.mark.slow

PROJECT = Path(__file__).resolve().parents[2]


def load_docs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_script", PROJECT / "scripts" / "docs.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


docs = load_docs()


def examples() -> Iterator[str]:
    for parser in docs.commands():
        title, *lines = (parser.epilog or "").splitlines()
        assert title == "examples:" and lines, f"{parser.prog} has no example"
        yield from (line.strip() for line in lines)


@pytest.fixture(scope="module")
def world(rclone: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with app.db, its replica at s3://bucket/app, and the first file of that."""
    directory = tmp_path_factory.mktemp("examples")
    assert rclone.root is not None
    (rclone.root / "bucket").mkdir()
    rclone.settle()
    database = build_social(directory / "app.db", posts=100)
    replicate_once(database, rclone.url("bucket", "app"), env=rclone.env)
    config = {"dbs": [{"path": str(database), "replica": {"url": "s3://bucket/app"}}]}
    (directory / "litestream.yml").write_text(json.dumps(config))  # JSON is YAML
    for file in (rclone.root / "bucket" / "app" / "0000").iterdir():
        shutil.copy(file, directory)
    return directory


@pytest.mark.parametrize("example", [*examples()])
def test_an_example_runs(
    example: str, world: Path, rclone: S3Server, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**rclone.env, "AWS_ENDPOINT_URL_S3": rclone.endpoint}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(world)
    program, _, arguments = example.partition(" ")
    assert program == "lazyreplica"
    done = run(arguments)
    assert (done.status, done.err) == (0, "")
    assert done.out.strip()
    if "--json" in arguments:
        assert done.json is not None
    with closing(sqlite3.connect(world / "app.db")) as con:
        assert con.execute("SELECT count(*) FROM posts").fetchone() == (100,)


def test_every_command_is_listed_and_described() -> None:
    assert [parser.prog.removeprefix("lazyreplica ").replace("-", "_") for parser in docs.commands()] == list(COMMANDS)
    for parser in docs.commands():
        assert parser.description and parser.description.endswith(".")
        assert all(action.help for action in parser._actions), f"{parser.prog}: an argument is not explained"
    assert all(f"  {name.replace('_', '-')}" in build_parser().format_help() for name in COMMANDS)


def test_the_documentation_is_up_to_date() -> None:
    """If this fails: scripts/docs."""
    assert (PROJECT / "docs" / "cli.md").read_text() == docs.document()
