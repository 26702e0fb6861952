"""What the end-to-end tests share: opening replicas, waiting, and programs that run in a process of their own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import apsw

import lazyreplica
from support.process import clean_env
from support.waiting import eventually

POLL = 0.05
DEFAULT_FLAGS = apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE | apsw.SQLITE_OPEN_URI
"""APSW's default flags and URI names, whatever the order in which pytest imported the test modules."""


def file_url(directory: Path) -> str:
    return f"file://{quote(str(directory.absolute()))}"


def uri(url: str, name: str = "app.db", **parameters: object) -> str:
    """``file:NAME?vfs=litestream&...`` for a replica."""
    options = "".join(f"&{key}={quote(str(value), safe='')}" for key, value in parameters.items())
    return f"file:{name}?vfs=litestream&replica_url={quote(url, safe='')}{options}"


@contextlib.contextmanager
def open_replica(url: str, **options: object) -> Iterator[apsw.Connection]:
    """A connection for the block: plain (never hydrating) and polling often unless ``options`` say otherwise."""
    connection = lazyreplica.connect(url, **{"hydrate": False, "poll_interval": POLL, **options})
    try:
        yield connection
    finally:
        connection.close()


@contextlib.contextmanager
def open_uri(name: str, flags: int = DEFAULT_FLAGS) -> Iterator[apsw.Connection]:
    """A connection with flags that allow writing wherever the file does."""
    connection = apsw.Connection(name, flags=flags)
    try:
        yield connection
    finally:
        connection.close()


def txid_of(connection: apsw.Connection, schema: str = "main") -> int:
    return int(one(connection, f"PRAGMA {schema}.litestream_txid"), 16)


def one(connection: apsw.Connection, sql: str, bindings: Any = None) -> Any:
    """The only value of the only row."""
    ((value,),) = connection.execute(sql, bindings)
    return value


def wait_hydrated(connection: apsw.Connection, timeout: float = 60) -> Path:
    """Wait until every page is local; return the local file."""
    eventually(lambda: one(connection, "PRAGMA litestream_hydration_progress") == "100.0", timeout)
    return Path(one(connection, "PRAGMA litestream_hydration_file"))


def run_python(
    script: str, *arguments: str, cwd: Path, env: Mapping[str, str] | None = None, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a script in a fresh interpreter, as a user would."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=cwd,
        env=python_env(env),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def python_env(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a child that imports the tests' ``support`` package."""
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return clean_env({"PYTHONPATH": os.pathsep.join(filter(None, paths)), **(extra or {})})
