"""What S3Store makes of servers that refuse, lie, stall and break."""

from __future__ import annotations

import io
import logging
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from scripted import (
    CONTENT,
    FILE,
    NAME,
    Asked,
    ScriptedServer,
    Step,
    answer,
    failure,
    hang,
    listing,
    ranged,
    reset_after,
)

from lazyreplica.errors import AccessDenied, BucketNotFound, FileVanished, StoreError, StoreUnavailable
from lazyreplica.ltx.name import FileName
from lazyreplica.storage import Store, open_store
from lazyreplica.storage.s3 import S3Store
from lazyreplica.storage.url import S3URL, parse_replica_url

SECRET = "very-secret-indeed"
GOOD = ranged()

pytestmark = pytest.mark.slow  # deadlines take their time


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)


Play = Callable[..., tuple[ScriptedServer, Store]]


@pytest.fixture
def play() -> Iterator[Play]:
    """A store whose server answers with the given steps."""
    started: list[tuple[ScriptedServer, Store]] = []

    def start(*steps: Step, path: str = "app") -> tuple[ScriptedServer, Store]:
        server = ScriptedServer(steps)
        started.append((server, open_store(server.url(path))))
        return started[-1]

    yield start
    for server, store in started:
        store.close()
        with server:
            pass


def read(store: Store, timeout: float = 10, offset: int = 100, length: int = 50) -> bytes:
    data = store.read(FILE, offset, length, timeout)
    assert data == CONTENT[offset : offset + length]
    return data


HALF = b'HTTP/1.1 206 X\r\nETag: "tag"\r\nContent-Range: bytes 100-149/1024\r\nContent-Length: 50\r\n\r\nhalf'


@pytest.mark.parametrize(
    "first",
    [
        failure(503, "SlowDown"),
        failure(500, "InternalError"),
        failure(429, "TooManyRequests"),
        answer(408),
        answer(502, b"<html>bad gateway</html>"),
        failure(400, "RequestTimeout"),
        reset_after(b""),
        reset_after(HALF),
        answer(206, b"half", content_length="50", etag='"tag"', content_range="bytes 100-149/1024"),
        ranged(etag='"tag"', content_range="bytes 100-149/1024", content_length="10"),
    ],
    ids=["503", "500", "429", "408", "502", "400t", "reset", "reset in body", "truncated", "short"],
)
def test_a_passing_fault_is_retried(play: Play, first: Step) -> None:
    server, store = play(first, first, GOOD)
    read(store)
    assert len(server.asked) == 3
    assert {asked.headers["range"] for asked in server.asked} == {"bytes=100-149"}


def test_connections_are_reused(play: Play) -> None:
    server, store = play(GOOD)
    for offset in range(20):
        read(store, offset=offset)
    assert (len(server.asked), server.connections) == (20, 1)


def test_request_is_signed_and_asks_for_plain_bytes(play: Play) -> None:
    server, store = play(GOOD)
    read(store)
    (asked,) = server.asked
    assert asked.target == f"/bucket/app/0000/{NAME}"
    assert asked.headers["accept-encoding"] == "identity"
    assert "Credential=someone/" in asked.headers["authorization"]
    for name in ("host", "range", "x-amz-date", "x-amz-content-sha256", "accept-encoding"):
        assert name in asked.headers["authorization"]


def test_anonymous(play: Play) -> None:
    server, _ = play(GOOD)
    store = open_store(server.url() + "&anonymous=true")
    try:
        read(store)
    finally:
        store.close()
    assert "authorization" not in server.asked[0].headers


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (ranged(etag='"other"'), "changed since it was listed: ETag 'other'"),
        (ranged(CONTENT + b"more"), "1028 bytes; listed were 'tag', 1024"),
        (failure(404, "NoSuchKey"), "is gone or shorter"),
        (failure(416, "InvalidRange"), "is gone or shorter"),
        (failure(412, "PreconditionFailed"), "is gone or shorter"),
        (answer(200, CONTENT, etag='"other"'), "changed since"),
        (answer(200, CONTENT[:-1], etag='"tag"'), "1023 bytes"),
    ],
)
def test_file_vanished(play: Play, step: Step, message: str) -> None:
    server, store = play(step)
    with pytest.raises(FileVanished, match=message):
        read(store)
    assert len(server.asked) == 1


@pytest.mark.parametrize("etag", ['"tag"', "tag", 'W/"tag"'])
def test_etag_spellings_and_whole_body(play: Play, etag: str) -> None:
    server, store = play(
        ranged(etag=etag),
        answer(200, CONTENT, etag=etag),
        # rclone: a range with status 200
        answer(200, CONTENT[100:150], etag=etag, content_range="bytes 100-149/1024"),
    )
    for _ in range(3):
        read(store)
    assert len(server.asked) == 3


def test_whole_body_is_not_read_without_bound(play: Play) -> None:
    size = 1 << 40
    huge = type(FILE)(0, NAME, size, "tag", 0.0)
    sent = threading.Event()

    def endless(connection: socket.socket, asked: Asked) -> bool:
        connection.sendall(f'HTTP/1.1 200 X\r\nETag: "tag"\r\nContent-Length: {size}\r\n\r\n'.encode())
        try:
            while True:
                connection.sendall(bytes(1 << 16))
        finally:
            sent.set()

    _, store = play(endless)
    assert store.read(huge, 1000, 10, 10) == bytes(10)
    assert sent.wait(5), "the connection stayed open"
    with pytest.raises(StoreError, match="ignores Range"):
        store.read(huge, size - 10, 10, 10)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (ranged(content_range="bytes 0-49/1024"), "Content-Range is 'bytes 0-49/1024'"),
        (ranged(content_range=""), "Content-Range is ''"),
        (ranged(content_range="lines 1-2/3"), "Content-Range is 'lines 1-2/3'"),
        (ranged(etag=""), "no ETag"),
        (ranged(content_range=f"bytes 100-149/{'9' * 5000}"), "Content-Range is 'bytes 100-149/999"),
        (answer(200, b"x", etag='"tag"', content_length="9" * 5000), "ignores Range"),
        (answer(200, b"<html>welcome</html>", content_length=""), "ignores Range"),
        (answer(204), "unexpected reply HTTP 204"),
        (failure(400, "InvalidArgument", "what?"), r"HTTP 400 InvalidArgument \(what\?\)"),
        (failure(501, "NotImplemented"), "NotImplemented"),
    ],
)
def test_nonsense_is_an_error_at_once(play: Play, step: Step, message: str) -> None:
    server, store = play(step)
    with pytest.raises(StoreError, match=message) as caught:
        read(store)
    assert len(server.asked) == 1
    assert type(caught.value) is StoreError
    assert "s3://bucket/app" in str(caught.value)


@pytest.mark.parametrize(
    ("status", "code", "advice"),
    [
        (403, "SignatureDoesNotMatch", "the secret key is wrong"),
        (403, "InvalidAccessKeyId", "unknown"),
        (403, "AccessDenied", "s3:GetObject"),
        (400, "ExpiredToken", "renew"),
        (403, "RequestTimeTooSkewed", "clock"),
        (401, "Unauthorized", "not allowed"),
    ],
)
def test_access_denied(play: Play, caplog: Any, status: int, code: str, advice: str) -> None:
    caplog.set_level(logging.DEBUG, "lazyreplica")
    server, store = play(failure(status, code, "no\nway", "<StringToSign>x</StringToSign>"))
    for call in (
        lambda: read(store),
        lambda: store.list_all(5),
        lambda: store.get(0, NAME, 10, 5),
        lambda: store.put(0, NAME, io.BytesIO(b"x"), 1, 0, 5),
        lambda: store.read_note("n", 5),
    ):
        with pytest.raises(AccessDenied, match=advice) as caught:
            call()
        text = str(caught.value)
        assert f"HTTP {status} {code} (no way)" in text
        assert "AWS_ACCESS_KEY_ID in the environment" in text
        assert SECRET not in text + caplog.text
    assert len(server.asked) == 5


def test_no_such_bucket(play: Play) -> None:
    _, store = play(failure(404, "NoSuchBucket"))
    for call in (
        lambda: read(store),
        lambda: store.list_all(5),
        lambda: store.get(0, NAME, 10, 5),
        lambda: store.read_note("n", 5),
        lambda: store.put(0, NAME, io.BytesIO(b"x"), 1, 0, 5),
    ):
        with pytest.raises(BucketNotFound, match="'bucket' does not exist at http://127"):
            call()


@pytest.mark.parametrize(
    "step",
    [
        failure(301, "PermanentRedirect", extra="<Endpoint>bucket.s3.eu-west-1.amazonaws.com</Endpoint>"),
        failure(301, "PermanentRedirect", x_amz_bucket_region="eu-west-1"),
        failure(307, "TemporaryRedirect", location="http://bucket.s3.eu-west-1.amazonaws.com/x"),
        failure(400, "AuthorizationHeaderMalformed", extra="<Region>eu-west-1</Region>"),
        answer(301, x_amz_bucket_region="eu-west-1"),
    ],
)
def test_wrong_region(play: Play, step: Step) -> None:
    server, store = play(step)
    with pytest.raises(BucketNotFound, match="eu-west-1"):
        store.list_all(5)
    assert len(server.asked) == 1


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    store = open_store(f"s3://bucket/app?endpoint=http://127.0.0.1:{port}")
    started = time.monotonic()
    with pytest.raises(StoreUnavailable, match=rf"nothing listens at http://127.0.0.1:{port}") as caught:
        store.list_all(60)
    assert time.monotonic() - started < 6
    assert "s3://bucket/app" in str(caught.value)
    store.close()


def test_unknown_host() -> None:
    store = open_store("s3://bucket/app?endpoint=http://no-such-host.invalid:9000")
    with pytest.raises(StoreUnavailable, match=r"host name of http://no-such-host.invalid:9000 is unknown"):
        store.list_all(60)
    store.close()


def trickle(connection: socket.socket, asked: Asked) -> bool:
    """A byte now and then: each alone would keep a read timeout from ever passing."""
    connection.sendall(
        b'HTTP/1.1 206 X\r\nETag: "tag"\r\nContent-Range: bytes 100-149/1024\r\nContent-Length: 50\r\n\r\n'
    )
    while True:
        connection.sendall(b"x")
        time.sleep(0.1)


def trickle_head(connection: socket.socket, asked: Asked) -> bool:
    connection.sendall(b"HTTP/1.1 206 X\r\nX-Slow: ")
    while True:
        connection.sendall(b"x")
        time.sleep(0.1)


@pytest.mark.parametrize("step", [hang, trickle, trickle_head])
@pytest.mark.parametrize("timeout", [0.3, 1.5])
def test_deadline(play: Play, step: Step, timeout: float) -> None:
    _, store = play(step)
    started = time.monotonic()
    with pytest.raises(StoreUnavailable, match="stopped answering"):
        read(store, timeout=timeout)
    assert timeout * 0.9 < time.monotonic() - started < timeout + 1.0


def test_the_server_says_when_to_ask_again(play: Play) -> None:
    server, store = play(failure(503, "SlowDown", retry_after="1"), GOOD)
    started = time.monotonic()
    read(store)
    assert 1.0 <= time.monotonic() - started < 5
    assert len(server.asked) == 2


@pytest.mark.parametrize("text", ["60", "Fri, 01 Jan 2100 00:00:00 GMT"])
def test_a_server_that_wants_to_be_left_alone_beyond_the_deadline_is_unavailable(play: Play, text: str) -> None:
    server, store = play(failure(429, "SlowDown", retry_after=text))
    started = time.monotonic()
    with pytest.raises(StoreUnavailable, match="HTTP 429 SlowDown"):
        read(store, timeout=10)
    assert time.monotonic() - started < 5
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "text", ["soon", "-1", "9" * 5000, "Fri, 02 Jan 2026 03:04:05", "Fri, 02 Jan 2026 03:04:05 GMT"]
)
def test_nonsense_about_when_to_ask_again_is_passed_over(play: Play, text: str) -> None:
    _, store = play(failure(503, "SlowDown", retry_after=text), GOOD)
    read(store, timeout=2)


RENEWABLE = [(400, "ExpiredToken"), (403, "InvalidAccessKeyId"), (403, "TokenRefreshRequired")]


@pytest.mark.parametrize(("status", "code"), RENEWABLE)
def test_renewed_credentials_are_used(play: Play, monkeypatch: pytest.MonkeyPatch, status: int, code: str) -> None:
    valid = "renewed"

    def step(connection: socket.socket, asked: Asked) -> bool:
        good = f"Credential={valid}/" in asked.headers["authorization"]
        return (GOOD if good else failure(status, code))(connection, asked)

    server, store = play(step)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", valid)
    read(store)
    assert len(server.asked) == 2
    valid = "again"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", valid)
    store.prepare(5)
    assert list(store.read_many([(FILE, 0, 5), (FILE, 5, 5)], 5)) == [CONTENT[:5], CONTENT[5:10]]
    assert 4 <= len(server.asked) <= 6


def test_credentials_that_stay_the_same_are_refused_once(play: Play) -> None:
    server, store = play(failure(400, "ExpiredToken"))
    with pytest.raises(AccessDenied, match="renew the credentials"):
        read(store)
    assert len(server.asked) == 1


def test_deadline_of_unending_503(play: Play) -> None:
    server, store = play(failure(503, "SlowDown", "wait"))
    started = time.monotonic()
    with pytest.raises(StoreUnavailable, match=r"HTTP 503 SlowDown \(wait\) \(gave up after \d+ attempts"):
        read(store, timeout=1.0)
    assert time.monotonic() - started < 4
    assert len(server.asked) > 2
    with pytest.raises(StoreUnavailable, match="no time was left"):
        read(store, timeout=0)


def test_close_ends_calls_under_way(play: Play) -> None:
    server, store = play(hang)
    problems: list[Exception] = []

    def work() -> None:
        try:
            read(store, timeout=60)
        except StoreUnavailable as error:
            problems.append(error)

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    while len(server.asked) < 5:
        time.sleep(0.01)
    started = time.monotonic()
    store.close()
    for thread in threads:
        thread.join(5)
    assert time.monotonic() - started < 4
    assert len(problems) == 5
    with pytest.raises(StoreUnavailable, match="is closed"):
        store.list_all(5)
    store.close()


def keys_of(count: int, level: int = 0, start: int = 1) -> list[str]:
    return [f"app/{level:04x}/{FileName(n, n)}" for n in range(start, start + count)]


def test_listing_pages(play: Play) -> None:
    server, store = play(
        listing(*keys_of(3), "app/0000/junk", "app/0000/sub/" + str(NAME), token="a&amp;b"),
        listing(token="empty"),
        listing(*keys_of(1, level=9), "app/", "app/000a/" + str(NAME), "app/generations/x/y", "app/zz"),
    )
    found = store.list_all(5)
    assert [(f.level, f.name.min_txid) for f in found.files] == [(0, 1), (0, 2), (0, 3), (9, 1)]
    assert (found.files[0].etag, found.files[0].size) == ("e1", 7)
    assert found.files[0].modified == pytest.approx(1767323045.678)
    assert found.strangers == {"000a", "generations", "zz"}
    assert "continuation-token=a%26b" in server.asked[1].target
    assert "continuation-token=empty" in server.asked[2].target


def test_listing_leaps_over_foreign_folders(play: Play) -> None:
    server, store = play(
        listing("app/0000/" + str(NAME), "app/generations/1", "app/generations/2", token="t"),
        listing("app/other", "app/wal/1", token="u"),
        listing(),
    )
    assert store.list_all(5).strangers == {"generations", "other", "wal"}
    assert "start-after=app%2Fgenerations0" in server.asked[1].target
    assert "start-after=app%2Fwal0" in server.asked[2].target
    assert all("continuation-token" not in asked.target for asked in server.asked)


def test_list_level_starts_after(play: Play) -> None:
    server, store = play(listing(*keys_of(3, level=2)))
    assert [f.name.min_txid for f in store.list_level(2, FileName(1, 1), 5)] == [2, 3]
    assert f"start-after=app%2F0002%2F{FileName(1, 1)}" in server.asked[0].target
    assert "prefix=app%2F0002%2F" in server.asked[0].target


@pytest.mark.parametrize(
    "steps",
    [
        [listing(*keys_of(2), token="same")],
        [listing(token=str(n)) for n in range(200)],
        [listing(*keys_of(2), token="a"), listing(*keys_of(2), token="b")],
    ],
    ids=["same token", "empty pages", "same page"],
)
def test_endless_listing(play: Play, steps: Sequence[Step]) -> None:
    _, store = play(*steps)
    with pytest.raises(StoreError, match="goes in circles"):
        store.list_all(10)


@pytest.mark.parametrize(
    "steps",
    [
        [listing(*keys_of(2), *keys_of(1))],
        [listing(*keys_of(2), *keys_of(1, start=2))],
        [listing(*keys_of(2, level=1), *keys_of(2))],
        [listing(*keys_of(3), token="a"), listing(*keys_of(1), *keys_of(1, start=4))],
    ],
    ids=["back", "twice", "levels", "pages"],
)
def test_a_listing_out_of_order_is_refused(play: Play, steps: Sequence[Step]) -> None:
    server, store = play(*steps)
    with pytest.raises(StoreError, match=r"the listing shows level 0 file .* after .* once and in order"):
        store.list_all(10)
    assert len(server.asked) == len(steps)


def test_a_level_out_of_order_is_refused(play: Play) -> None:
    _, store = play(listing(*keys_of(2), *keys_of(1, start=2)))
    with pytest.raises(StoreError, match="once and in order"):
        store.list_level(0, None, 10)


def test_a_listing_without_end_is_refused(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lazyreplica.storage.s3._MOST_KEYS", 5000)
    pages = [listing(*keys_of(1000, start=1 + 1000 * page), token=str(page)) for page in range(6)]
    server, store = play(*pages)
    with pytest.raises(StoreError, match="more than 5000 keys"):
        store.list_all(30)
    assert len(server.asked) == 6


@pytest.mark.parametrize(
    ("encoding", "key"),
    [
        ("url", "a+b%2B%C3%A9%25/0000/"),  # AWS
        ("url", "a%20b+%C3%A9%25/0000/"),
        ("", "a b+é%/0000/"),
    ],
)
def test_encoded_keys(play: Play, encoding: str, key: str) -> None:
    _, store = play(listing(key + str(NAME), encoding=encoding), path="a%20b+%C3%A9%25")
    assert [f.name for f in store.list_all(5).files] == [NAME]


ENTITIES = b"""<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "aaaaaaaaaa">]><ListBucketResult>&a;</ListBucketResult>"""


HUGE = ["1" + "0" * 15, "9" * 5000]


def contents(size: str = "7", etag: str = "e") -> bytes:
    return f"<Contents><Key>app/0000/{NAME}</Key><Size>{size}</Size><ETag>{etag}</ETag></Contents>".encode()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (ENTITIES, "document type"),
        (ENTITIES.decode().encode("utf-16-le"), "not UTF-8"),
        (b"<html>hello</html>", "<html>, expected <ListBucketResult>"),
        (b"hello", "not XML"),
        (b"", "not XML"),
        (b"<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>", "NextContinuationToken"),
        (b"<ListBucketResult><Contents><Key>app/x</Key><Size>-1</Size></Contents></ListBucketResult>", "size '-1'"),
        (b"<ListBucketResult><Contents><Key>other/x</Key><Size>1</Size></Contents></ListBucketResult>", "below 'app/'"),
        (b"<ListBucketResult>" + b" " * (8 << 20), "larger than"),
        (b"<ListBucketResult>" + b"<a>" * 200_000, "more markup than any reply"),
        *((b"<ListBucketResult>%s</ListBucketResult>" % contents(size=size), f"size '{size[:20]}'") for size in HUGE),
        (b"<ListBucketResult>%s</ListBucketResult>" % contents(etag=""), "no ETag for level 0 file"),
    ],
)
def test_bad_listing(play: Play, body: bytes, message: str) -> None:
    times = 2 if "no ETag" in message else 1  # it may be a file that is just being deleted
    server, store = play(*[answer(200, body)] * times)
    with pytest.raises(StoreError, match=message):
        store.list_all(10)
    assert len(server.asked) == times


@pytest.mark.parametrize("list_level", [False, True])
def test_a_file_that_loses_its_etag_while_it_is_deleted_is_no_error(play: Play, list_level: bool) -> None:
    going = b"<ListBucketResult>%s</ListBucketResult>" % contents(etag="")
    server, store = play(answer(200, going), listing(*keys_of(2)))
    found = store.list_level(0, None, 10) if list_level else store.list_all(10).files
    assert [file.name.min_txid for file in found] == [1, 2]
    assert len(server.asked) == 2


def test_get(play: Play) -> None:
    server, store = play(
        ranged(last_modified="Fri, 02 Jan 2026 03:04:05 GMT"),
        failure(404, "NoSuchKey"),
        answer(404),
        answer(200, CONTENT, etag='"tag"'),
        failure(416, "InvalidRange"),
        failure(416, "InvalidRange", content_range="bytes */0", etag='"empty"'),
        failure(416, "InvalidRange", content_range="bytes */9"),
        answer(200, CONTENT, content_length="", etag='"tag"'),
    )
    got = store.get(0, NAME, 100, 5)
    assert got == (FILE, CONTENT[:100])
    assert got is not None
    assert got[0].modified == 1767323045
    assert store.get(0, NAME, 100, 5) is None
    assert store.get(0, NAME, 100, 5) is None
    assert store.get(0, NAME, 100, 5) == (FILE, CONTENT[:100])
    for etag in ("", "empty"):
        got = store.get(0, NAME, 100, 5)
        assert got == (type(FILE)(0, NAME, 0, etag, 0.0), b"")
    with pytest.raises(StoreError, match="unexpected reply HTTP 416"):
        store.get(0, NAME, 100, 5)
    with pytest.raises(StoreError, match="size"):
        store.get(0, NAME, 100, 5)
    assert len(server.asked) == 8
    with pytest.raises(ValueError, match="limit is 0"):
        store.get(0, NAME, 0, 5)


def test_put_is_repeated_from_the_start(play: Play) -> None:
    server, store = play(failure(503, "SlowDown"), reset_after(b""), answer(200))
    data = bytes(range(256)) * 1000
    source = io.BytesIO(b"skip" + data + b"rest")
    source.seek(4)
    store.put(9, NAME, source, len(data), 1_700_000_000.12, 10)
    assert [asked.method for asked in server.asked] == ["PUT"] * 3
    assert all(asked.body == data for asked in server.asked)
    headers = server.asked[2].headers
    assert headers["x-amz-meta-litestream-timestamp"] == "2023-11-14T22:13:20.12Z"
    assert "x-amz-meta-litestream-timestamp" in headers["authorization"]
    assert server.asked[2].target == f"/bucket/app/0009/{NAME}"


def small_parts(server: ScriptedServer) -> S3Store:
    url = parse_replica_url(server.url())
    assert isinstance(url, S3URL)
    return S3Store(url, multipart_threshold=1000)


BEGUN = answer(200, b"<InitiateMultipartUploadResult><UploadId>id/1+</UploadId></InitiateMultipartUploadResult>")
PART = answer(200, etag='"part"')
DONE = answer(200, b"<CompleteMultipartUploadResult/>")


@pytest.mark.parametrize(
    "steps",
    [
        [BEGUN, PART, PART, PART, DONE],
        [failure(503, "SlowDown"), BEGUN, PART, reset_after(b""), PART, PART, failure(200, "InternalError"), DONE],
        # the reply to the first completion was lost
        [BEGUN, PART, PART, PART, reset_after(b""), failure(404, "NoSuchUpload"), ranged(bytes(2500))],
    ],
)
def test_upload_in_parts(steps: Sequence[Step]) -> None:
    with ScriptedServer(steps) as server:
        store = small_parts(server)
        data = bytes(range(250)) * 10
        store.put(9, NAME, io.BytesIO(data), len(data), 1.5, 10)
        store.close()
    assert len(server.asked) == len(steps)
    parts = {asked.target: asked.body for asked in server.asked if asked.method == "PUT"}
    assert b"".join(parts[target] for target in sorted(parts)) == data
    assert all("uploadId=id%2F1%2B" in target for target in parts)
    begin = next(asked for asked in server.asked if asked.target.endswith("?uploads="))
    assert begin.headers["x-amz-meta-litestream-timestamp"] == "1970-01-01T00:00:01.5Z"
    complete = next(asked for asked in server.asked if b"CompleteMultipartUpload" in asked.body)
    assert complete.body.count(b'<ETag>"part"</ETag>') == 3


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([BEGUN, PART, failure(403, "AccessDenied"), answer(204)], "part 2"),
        ([BEGUN, answer(200), answer(204)], "no ETag"),
        ([BEGUN, PART, PART, PART, failure(400, "InvalidPart"), answer(204)], "InvalidPart"),
        (
            [BEGUN, PART, PART, PART, failure(404, "NoSuchUpload"), failure(404, "NoSuchKey"), answer(204)],
            "NoSuchUpload",
        ),
        ([BEGUN, failure(403, "AccessDenied"), failure(403, "AccessDenied")], "part 1"),
    ],
)
def test_failed_upload_is_aborted(steps: Sequence[Step], message: str) -> None:
    with ScriptedServer(steps) as server:
        store = small_parts(server)
        with pytest.raises(StoreError, match=message):
            store.put(9, NAME, io.BytesIO(bytes(2500)), 2500, 0, 10)
        store.close()
    assert (server.asked[-1].method, "uploadId=" in server.asked[-1].target) == ("DELETE", True)


def test_notes(play: Play) -> None:
    server, store = play(answer(200), answer(200, b"{}"), answer(200, bytes((1 << 20) + 1)))
    store.write_note("n.json", b"{}", 5)
    assert store.read_note("n.json", 5) == b"{}"
    assert [(a.method, a.target, a.body) for a in server.asked] == [
        ("PUT", "/bucket/app/n.json", b"{}"),
        ("GET", "/bucket/app/n.json", b""),
    ]
    with pytest.raises(StoreError, match="larger than"):
        store.read_note("n.json", 5)


def test_proxy_of_the_environment(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    server, _ = play(GOOD)
    monkeypatch.setenv("http_proxy", server.endpoint.replace("://", "://us%40er:pass@"))
    monkeypatch.setenv("no_proxy", "elsewhere")
    store = open_store("s3://bucket/app?endpoint=http://minio.invalid:9000")
    try:
        read(store)
    finally:
        store.close()
    assert server.asked[0].target == f"http://minio.invalid:9000/bucket/app/0000/{NAME}"
    assert server.asked[0].headers["proxy-authorization"] == "Basic dXNAZXI6cGFzcw=="


def test_skip_verify_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    open_store("s3://bucket/app?endpoint=https://127.0.0.1:1&skipVerify=true").close()
    assert "skipVerify=true, TLS certificates are not checked" in caplog.text


def test_https_to_an_http_server(rclone: Any) -> None:
    store = open_store(f"s3://b/app?endpoint={rclone.endpoint.replace('http:', 'https:')}")
    with pytest.raises(StoreError, match=r"TLS with https://127.* failed .* plain http://"):
        store.list_all(30)
    store.close()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1 that is its own authority, with its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the openssl program")
    path = tmp_path_factory.mktemp("tls") / "certificate.pem"
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-out", str(path), "-keyout", f"{path}.key"]
    subprocess.run(command, check=True, capture_output=True)
    return path


@pytest.mark.parametrize("trusted", ["AWS_CA_BUNDLE", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "skipVerify", None])
def test_tls(certificate: Path, monkeypatch: pytest.MonkeyPatch, trusted: str | None) -> None:
    for name in ("AWS_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    if trusted and trusted.isupper():
        monkeypatch.setenv(trusted, str(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, f"{certificate}.key")
    with ScriptedServer([GOOD], context) as server:
        store = open_store(server.url() + ("&skipVerify=true" if trusted == "skipVerify" else ""))
        if trusted is None:
            with pytest.raises(StoreError, match=r"certificate of https://127.* is not trusted .*SSL_CERT_FILE"):
                read(store)
        else:
            read(store)
            read(store)
            assert server.connections == 1
        store.close()


def test_unreadable_authorities_are_passed_over(
    certificate: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "empty").touch()
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "empty"))
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    open_store("s3://bucket/app?endpoint=https://127.0.0.1:1").close()
    assert "AWS_CA_BUNDLE is" in caplog.text
    assert "SSL_CERT_FILE" not in caplog.text


def test_imports_are_lazy() -> None:
    program = """if True:
        import sys
        import lazyreplica.storage
        assert not {"http.client", "httpx", "ssl", "xml.etree"} & set(sys.modules)
        lazyreplica.storage.open_store("file:///tmp").close()
        assert not {"http.client", "httpx", "ssl", "xml.etree"} & set(sys.modules)
        import ssl
        def refuse(*_, **__): raise AssertionError("TLS context for http://")
        ssl.create_default_context = ssl.SSLContext = refuse
        lazyreplica.storage.open_store("s3://b/p?endpoint=http://127.0.0.1:1&anonymous=true").close()
        assert "http.client" in sys.modules
    """
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=60)


@pytest.mark.parametrize(("key", "secret"), [("wrong", None), (None, "wrong")])
def test_wrong_keys(rclone: Any, monkeypatch: pytest.MonkeyPatch, key: str | None, secret: str | None) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key or rclone.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret or rclone.secret_key)
    store = open_store(rclone.url(rclone.new_bucket(), "app"))
    try:
        with pytest.raises(AccessDenied, match="AWS_ACCESS_KEY_ID"):
            store.list_all(10)
    finally:
        store.close()


@pytest.mark.slow
@pytest.mark.parametrize(("key", "secret"), [("wrong", None), (None, "wrong")])
def test_wrong_keys_seaweed(seaweed: Any, monkeypatch: pytest.MonkeyPatch, key: str | None, secret: str | None) -> None:
    test_wrong_keys(seaweed, monkeypatch, key, secret)
