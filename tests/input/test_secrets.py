"""Whatever goes wrong, no secret is in an error's text, in a log record, in a representation, or on a terminal."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import apsw
import pytest
from handmade import History, opened, upload

import lazyreplica
from lazyreplica.errors import LazyReplicaError
from lazyreplica.storage import open_store
from support.servers import S3Server, free_port

SECRET = "TOPSECRETtopsecret0123456789"
TOKEN = "SESSIONTOKENsessiontoken987654"


@pytest.fixture(autouse=True)
def _secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "lazyreplica-access")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)


def assert_clean(text: str) -> None:
    for secret in (SECRET, TOKEN, quote(SECRET)):
        assert secret not in text, text[max(0, text.index(secret) - 300) : text.index(secret) + 60]


def outcome_of(attempt: Callable[[], object]) -> str:
    """The whole traceback, with causes and contexts, of what `attempt` raises."""
    try:
        attempt()
    except Exception as exc:  # noqa: BLE001 (whatever it is)
        return "".join(traceback.format_exception(exc)) + repr(exc) + str(exc.args) + repr(vars(exc))
    raise AssertionError("nothing was raised")


IN_URLS = [
    f"s3://key:{SECRET}@bucket/app",
    f"s3://{SECRET}@bucket/app",
    f"s3://key:{SECRET}@[bucket/app",
    f"s3://key:{SECRET}\N{ACCOUNT OF}@bucket/app",
    f"s3://bucket/app?secret={SECRET}",
    f"s3://bucket/app?aws_secret_access_key={SECRET}&aws_access_key_id=key",
    f"s3://bucket/app?endpoint=http://key:{SECRET}@127.0.0.1:1",
    f"s3://bucket/app?endpoint=http://127.0.0.1:1/?secret={SECRET}",
    f"s3://bucket/app#{SECRET}",
    f"s3://key:{SECRET}bucket/app",
    f"s3:?/key:{SECRET}@bucket/app",
    f"s3://bucket/app?{SECRET}",
    f"http://key:{SECRET}@bucket/app",
    f"key:{SECRET}@bucket/app",
    f"file://key:{SECRET}@host/app",
]


@pytest.mark.parametrize("url", IN_URLS)
def test_a_secret_in_a_url_is_refused_and_not_shown(url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    uri = f"file:x.db?vfs=litestream&replica_url={quote(url, safe='')}"
    attempts: list[Callable[[], object]] = [
        lambda: lazyreplica.connect(url),
        lambda: lazyreplica.configure("secret.db", url),
        lambda: lazyreplica.publish(__file__, url),
        lambda: apsw.Connection(uri, flags=apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI),
    ]
    for attempt in attempts:
        with pytest.raises(LazyReplicaError) as caught:
            attempt()
        assert_clean(str(caught.value))
        assert_clean("".join(str(cause) for cause in causes(caught.value)))
    assert_clean(caplog.text)


def causes(exc: BaseException | None) -> list[BaseException]:
    found = []
    while exc is not None:
        found.append(exc)
        exc = exc.__cause__ or (None if exc.__suppress_context__ else exc.__context__)
    return found


def test_a_secret_in_the_environments_url_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for url in IN_URLS:
        monkeypatch.setenv("LITESTREAM_REPLICA_URL", url)
        assert_clean(outcome_of(lambda: apsw.Connection("file:app.db?vfs=litestream", flags=65)))


@pytest.mark.slow
def test_no_failure_shows_the_credentials(rclone: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)  # the HTTP library's own records as well
    bucket = rclone.new_bucket()
    urls = [
        rclone.url(bucket, "app"),  # wrong secret
        rclone.url("no-such-bucket", "app"),
        f"s3://bucket/app?endpoint=http://127.0.0.1:{free_port()}",
        "s3://bucket/app?endpoint=http://no-such-host.invalid",
    ]
    for url in urls:
        assert_clean(outcome_of(lambda url=url: lazyreplica.connect(url, read_timeout=2)))  # type: ignore[misc]
        assert_clean(outcome_of(lambda url=url: lazyreplica.publish(__file__, url)))  # type: ignore[misc]
    assert "127.0.0.1" in caplog.text
    assert_clean(caplog.text)


def test_half_a_key_pair_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    assert_clean(outcome_of(lambda: lazyreplica.connect("s3://bucket/app?endpoint=http://127.0.0.1:1")))


def test_no_object_of_ours_shows_the_credentials(
    rclone: S3Server, history: History, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Everything that an application's logging or a debugger may print: with credentials that work."""
    caplog.set_level(logging.DEBUG)
    secret = rclone.secret_key
    monkeypatch.delenv("AWS_SESSION_TOKEN")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    bucket = rclone.new_bucket()
    url = upload(rclone, bucket, history)
    caplog.clear()
    store = open_store(url)
    try:
        with opened(url) as connection:
            assert len(connection.execute("SELECT * FROM t").fetchall()) == 400
            lazyreplica.refresh(connection)
            shown = [repr(connection), connection.filename, connection.pragma("litestream_hydration_file"), store.url]
            shown += [repr(it) for it in gc.get_objects() if str(type(it).__module__).startswith("lazyreplica")]
            assert len(shown) > 10
            assert secret not in "\n".join(map(str, shown))
    finally:
        store.close()
    assert secret not in caplog.text and "Signature=" not in caplog.text


@pytest.mark.slow
def test_the_command_does_not_show_the_credentials(rclone: S3Server, tmp_path: Path) -> None:
    program = Path(sysconfig.get_path("scripts")) / "lazyreplica"
    url = rclone.url(rclone.new_bucket(), "app")
    for arguments in (["-v", "query", url, "select 1"], ["-v", "query", IN_URLS[3], "select 1"]):
        done = subprocess.run(
            [program, *arguments], capture_output=True, text=True, env=dict(os.environ), timeout=60, check=False
        )
        assert done.returncode == 1
        assert_clean(done.stdout + done.stderr)
