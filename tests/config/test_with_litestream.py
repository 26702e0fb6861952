"""One litestream.yml for both: the real Litestream writes by it, and we read by it."""

from __future__ import annotations

import gc
import logging
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import apsw
import pytest

import lazyreplica
from lazyreplica.errors import AccessDenied
from lazyreplica.naming import replica_of
from lazyreplica.storage import open_store
from support.databases import assert_same_rows
from support.litestream import find_litestream
from support.process import Process, clean_env
from support.servers import S3Server

pytestmark = pytest.mark.slow

URI = apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI
assert lazyreplica.__version__  # imported for its VFS

Replicate = Callable[..., None]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A directory with databases: app.db, tenants/a.db, tenants/sub/b 1.db."""
    for number, name in enumerate(["app.db", "tenants/a.db", "tenants/sub/b 1.db"]):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path)) as con:
            con.execute("PRAGMA journal_mode=wal")
            con.execute("CREATE TABLE t(id INTEGER PRIMARY KEY, x TEXT)")
            con.executemany("INSERT INTO t(x) VALUES (?)", [(f"{name} {row}",) for row in range(100 + number)])
            con.commit()
    return tmp_path


@pytest.fixture
def replicate(data: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Replicate]:
    """Write the file, let Litestream replicate some databases by it, and let us read by it."""

    def run(text: str, environ: dict[str, str], *databases: str) -> None:
        path = data / "litestream.yml"
        path.write_text(text)
        for name, value in {"LITESTREAM_CONFIG": str(path), **environ}.items():
            monkeypatch.setenv(name, value)
        command = [str(find_litestream()), "replicate", "-config", str(path)]
        # It works in the directory that we work in.
        with Process(command, log=data / "litestream.log", env=clean_env(environ), cwd=data) as process:
            process.wait_until(lambda: all(_is_cut(data / name) for name in databases), 30)
            process.stop(30)  # it syncs once more before it goes

    monkeypatch.chdir(data)
    yield run


def _is_cut(database: Path) -> bool:
    """Whether Litestream has made its first file of a database."""
    return any(database.with_name(f".{database.name}-litestream").rglob("*.ltx"))


def assert_read(name: str, database: Path) -> None:
    uri = f"file:{name}?vfs=litestream&poll_interval=0"
    with closing(apsw.Connection(uri, flags=URI)) as con, closing(sqlite3.connect(database)) as primary:
        assert assert_same_rows(primary, con) >= 100


def test_replica_with_fields_and_variables(rclone: S3Server, data: Path, replicate: Replicate) -> None:
    bucket = rclone.new_bucket()
    replicate(
        "access-key-id: $THE_KEY\n"
        "dbs:\n"
        f"- path: {data}/app.db\n"
        "  replica:\n"
        "    type: s3\n"
        f"    bucket: {bucket}\n"
        "    path: a b/${WHERE}\n"
        f"    endpoint: {rclone.endpoint}\n"
        "    region: us-east-1\n"
        "    secret-access-key: ${THE_SECRET}\n",
        {"THE_KEY": rclone.access_key, "THE_SECRET": rclone.secret_key, "WHERE": "x"},
        "app.db",
    )
    assert any(key.startswith("a b/x/0000/") for key in rclone.keys(bucket))
    assert_read("app.db", data / "app.db")
    assert_read(f"{data}/app.db", data / "app.db")


def test_replicas_with_a_url_and_keys_in_the_file(
    rclone: S3Server, data: Path, replicate: Replicate, caplog: pytest.LogCaptureFixture
) -> None:
    """... which serve that replica alone, and are shown nowhere."""
    caplog.set_level(logging.DEBUG)
    bucket = rclone.new_bucket()
    keys = f"access-key-id: {rclone.access_key}\n    secret-access-key: {rclone.secret_key}"
    replicate(
        f"dbs:\n- path: app.db\n  replicas:\n  - url: {rclone.url(bucket, 'app')}\n    {keys}\n",
        {"AWS_ACCESS_KEY_ID": "somebody-else", "AWS_SECRET_ACCESS_KEY": "of the environment"},
        "app.db",
    )
    assert_read("app.db", data / "app.db")
    url, credentials = replica_of("app.db")
    with pytest.raises(AccessDenied, match="AWS_ACCESS_KEY_ID in the environment"):
        lazyreplica.connect(url).close()
    with closing(apsw.Connection("file:app.db?vfs=litestream", flags=URI)) as con:
        store = open_store(url, credentials)
        shown = [repr(con), store.url, url, repr(credentials), con.filename]
        shown += [con.pragma(f"litestream_{name}") for name in ("txid", "time", "hydration_file")]
        shown += [repr(it) for it in gc.get_objects() if str(type(it).__module__).startswith("lazyreplica")]
        store.close()
    assert rclone.secret_key not in "\n".join(map(str, shown)) + caplog.text
    (data / "litestream.yml").write_text((data / "litestream.yml").read_text().replace(rclone.secret_key, "MISTAKEN"))
    with pytest.raises(AccessDenied, match=r"Used: access-key-id in .*litestream\.yml:5; check a") as caught:
        apsw.Connection("file:app.db?vfs=litestream", flags=URI)
    assert "MISTAKEN" not in str(caught.value)


@pytest.mark.parametrize("form", ["url", "fields", "file"])
def test_directories(rclone: S3Server, data: Path, replicate: Replicate, form: str) -> None:
    bucket = rclone.new_bucket()
    replica = {
        "url": f"url: {rclone.url(bucket, 'base')}",
        "fields": f"type: s3\n    bucket: {bucket}\n    path: base\n    endpoint: {rclone.endpoint}",
        "file": "path: replicas/all",
    }[form]
    replicate(
        f"dbs:\n- dir: tenants\n  pattern: '*.db'\n  recursive: true\n  replica:\n    {replica}\n",
        {"AWS_ACCESS_KEY_ID": rclone.access_key, "AWS_SECRET_ACCESS_KEY": rclone.secret_key},
        *("tenants/a.db", "tenants/sub/b 1.db"),
    )
    assert_read("a.db", data / "tenants/a.db")
    assert_read("tenants/sub/b%201.db", data / "tenants/sub/b 1.db")


def test_file_urls_are_taken_as_they_are_written(data: Path, replicate: Replicate) -> None:
    replicate(f"dbs:\n- path: app.db\n  replica:\n    url: file://{data}/replica%20of\n", {}, "app.db")
    assert (data / "replica%20of" / "ltx").is_dir()
    assert_read("app.db", data / "app.db")
