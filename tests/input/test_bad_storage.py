"""Storage that cannot be reached, refuses us, or is none: a specific error within seconds, never a hang."""

from __future__ import annotations

import contextlib
import http.server
import importlib
import shutil
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import apsw
import pytest
from handmade import SECONDS, STILL, History, failure, opened, read, upload

import lazyreplica
from lazyreplica import layers
from lazyreplica.errors import (
    AccessDenied,
    BucketNotFound,
    ConfigError,
    EmptyReplica,
    ReplicaError,
    StoreError,
    StoreUnavailable,
)
from support.servers import S3Server, free_port, serve_rclone

_QUICK = {"read_timeout": 2}

pytestmark = pytest.mark.slow  # servers that do not answer


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "lazyreplica-access")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "lazyreplica-secret")


# -- nobody there --


def test_a_refused_port_is_an_error_that_names_the_endpoint() -> None:
    endpoint = f"http://127.0.0.1:{free_port()}"
    message = failure(f"s3://bucket/app?endpoint={endpoint}", StoreUnavailable)
    assert endpoint in message and "nothing listens" in message


def test_an_unknown_host_is_an_error_that_names_it() -> None:
    message = failure("s3://bucket/app?endpoint=http://no-such-host.invalid", StoreUnavailable)
    assert "no-such-host.invalid" in message and "host name" in message


@contextlib.contextmanager
def black_hole(*, accepts: bool) -> Iterator[str]:
    """An endpoint that takes connections and never answers; without `accepts` it does not even take them."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(50 if accepts else 0)
        taken: list[socket.socket] = []
        stop = threading.Event()

        def take() -> None:
            listener.settimeout(0.1)
            while not stop.is_set():
                with contextlib.suppress(TimeoutError):
                    taken.append(listener.accept()[0])

        thread = threading.Thread(target=take)
        port = listener.getsockname()[1]
        if accepts:
            thread.start()
        else:
            for _ in range(4):  # fill the queue of connections that wait to be accepted
                waiting = socket.socket()
                waiting.setblocking(False)
                waiting.connect_ex(("127.0.0.1", port))
                taken.append(waiting)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            stop.set()
            if accepts:
                thread.join()
            for connection in taken:
                connection.close()


@pytest.mark.parametrize("accepts", [True, False])
def test_an_endpoint_that_never_answers_is_an_error_within_the_read_timeout(accepts: bool) -> None:
    with black_hole(accepts=accepts) as endpoint:
        started = time.monotonic()
        message = failure(f"s3://bucket/app?endpoint={endpoint}", StoreUnavailable, read_timeout=0.4)
        assert time.monotonic() - started < 4
        assert endpoint in message


def test_a_silent_endpoint_does_not_keep_publish_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("lazyreplica.publish")  # the package's name is the function
    monkeypatch.setattr(module, "_TIMEOUT", 0.4)
    database = tmp_path / "a.db"
    with contextlib.closing(sqlite3.connect(database)) as con, con:
        con.execute("CREATE TABLE t(a)")
    with black_hole(accepts=True) as endpoint, pytest.raises(StoreUnavailable):
        lazyreplica.publish(database, f"s3://bucket/app?endpoint={endpoint}")


# -- somebody else there --


class _Page(http.server.BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        body = b"<!DOCTYPE html><html><body>Welcome to nginx!</body></html>"
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""


@contextlib.contextmanager
def web_server(status: int) -> Iterator[str]:
    handler = type("Page", (_Page,), {"status": status})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("status", [200, 204, 400, 405, 418])
def test_a_web_server_that_is_no_s3_is_an_error_that_asks(status: int) -> None:
    with web_server(status) as endpoint:
        assert "S3" in failure(f"s3://bucket/app?endpoint={endpoint}", StoreError, **_QUICK)


def test_a_redirect_is_an_error_that_asks_for_region_and_endpoint() -> None:
    with web_server(302) as endpoint:
        assert "region" in failure(f"s3://bucket/app?endpoint={endpoint}", BucketNotFound, **_QUICK)


def test_a_page_not_found_is_an_error_that_names_the_status() -> None:
    with web_server(404) as endpoint:
        assert "404" in failure(f"s3://bucket/app?endpoint={endpoint}", StoreError, **_QUICK)


@pytest.mark.parametrize("status", [401, 403])
def test_a_web_server_that_refuses_us_is_access_denied(status: int) -> None:
    with web_server(status) as endpoint:
        assert str(status) in failure(f"s3://bucket/app?endpoint={endpoint}", AccessDenied, **_QUICK)


@pytest.mark.parametrize("status", [500, pytest.param(502, marks=pytest.mark.slow), 503])
def test_a_server_that_keeps_failing_is_unavailable(status: int) -> None:
    with web_server(status) as endpoint:
        assert str(status) in failure(f"s3://bucket/app?endpoint={endpoint}", StoreUnavailable, read_timeout=0.5)


def test_tls_to_a_plain_port_is_an_error_that_says_so() -> None:
    with web_server(200) as endpoint:
        message = failure(
            f"s3://bucket/app?endpoint={endpoint.replace('http', 'https')}&skipVerify=true", StoreError, **_QUICK
        )
        assert "http://" in message


# -- refusals of real servers --


def wrong_key(server: S3Server, history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    url = upload(server, server.new_bucket(), history)
    assert read(url) == history.rows[2]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody-else")
    message = failure(url, AccessDenied)
    assert "AWS_ACCESS_KEY_ID" in message and server.endpoint in message
    with pytest.raises(AccessDenied):
        lazyreplica.publish(__file__, url)


def wrong_secret(server: S3Server, history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    url = upload(server, server.new_bucket(), history)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    message = failure(url, AccessDenied)
    assert "AWS_SECRET_ACCESS_KEY" in message and "not-the-secret" not in message


def no_credentials(server: S3Server, history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    url = upload(server, server.new_bucket(), history)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    message = failure(url, AccessDenied)
    assert "AWS_ACCESS_KEY_ID" in message


def missing_bucket(server: S3Server, history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    message = failure(server.url("there-is-no-such-bucket", "app"), BucketNotFound)
    assert "there-is-no-such-bucket" in message and server.endpoint in message


def empty_path(server: S3Server, history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = server.new_bucket()
    failure(server.url(server.new_bucket(), "app"), EmptyReplica)
    upload(server, bucket, history, "other")
    assert f"{bucket}/app" in failure(server.url(bucket, "app"), EmptyReplica)
    # one level too high, and a name that only begins alike
    assert "found there: other" in failure(server.url(bucket), EmptyReplica)
    failure(server.url(bucket, "oth"), EmptyReplica)
    assert read(server.url(bucket, "other")) == history.rows[2]


Case = Callable[[S3Server, History, pytest.MonkeyPatch], None]
REFUSALS: list[Case] = [wrong_key, wrong_secret, no_credentials, missing_bucket, empty_path]


@pytest.mark.parametrize("case", [case for case in REFUSALS if case is not no_credentials])  # HTTP 400 from rclone
def test_rclone(
    case: Case,
    rclone: S3Server,
    history: History,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case(rclone, history, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSALS)
def test_seaweed(
    case: Case,
    seaweed: S3Server,
    history: History,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case(seaweed, history, monkeypatch)


def test_half_a_key_pair_is_an_error_that_names_the_other_half(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "AWS_SECRET_ACCESS_KEY" in failure("s3://bucket/app?endpoint=http://127.0.0.1:1", ConfigError)


# -- storage that goes away --


@pytest.mark.slow
def test_a_server_that_dies_is_an_error_of_the_query_and_heals(
    tmp_path: Path, history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "KEEP_FILE", 100)
    monkeypatch.setattr(layers, "KEEP_TOTAL", 0)
    monkeypatch.setattr(layers, "PASSING_TOTAL", 0)
    port = free_port()
    with serve_rclone(tmp_path, port=port) as server:
        bucket = server.new_bucket()
        url = upload(server, bucket, history)
        connection = lazyreplica.connect(url, **STILL, **_QUICK)
    with contextlib.closing(connection):
        started = time.monotonic()
        with pytest.raises(StoreUnavailable) as caught:
            connection.execute("SELECT * FROM t").fetchall()
        assert isinstance(caught.value, apsw.IOError)
        assert time.monotonic() - started < SECONDS
        assert str(port) in str(caught.value)
        with pytest.raises(StoreUnavailable):
            lazyreplica.refresh(connection)
        with serve_rclone(tmp_path, port=port):
            assert connection.execute("SELECT * FROM t ORDER BY id").fetchall() == history.rows[2]


def test_a_directory_that_goes_away_is_an_error_of_the_query_and_heals(
    replica: Path, tmp_path: Path, history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "KEEP_FILE", 100)
    monkeypatch.setattr(layers, "KEEP_TOTAL", 0)
    monkeypatch.setattr(layers, "PASSING_TOTAL", 0)
    with opened(history.write(replica), **STILL) as connection:
        replica.rename(tmp_path / "elsewhere")
        with pytest.raises(StoreError, match=str(replica)) as caught:
            connection.execute("SELECT * FROM t").fetchall()
        assert isinstance(caught.value, apsw.Error)
        (tmp_path / "elsewhere").rename(replica)
        assert connection.execute("SELECT * FROM t ORDER BY id").fetchall() == history.rows[2]


def test_files_that_are_deleted_by_hand_are_an_error_of_the_query(
    replica: Path, history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "KEEP_FILE", 100)
    monkeypatch.setattr(layers, "KEEP_TOTAL", 0)
    monkeypatch.setattr(layers, "PASSING_TOTAL", 0)
    with opened(history.write(replica), **STILL) as connection:
        shutil.rmtree(replica / "ltx" / "0")
        with pytest.raises(ReplicaError) as caught:
            connection.execute("SELECT * FROM t").fetchall()
        assert isinstance(caught.value, apsw.Error)
