"""The fault proxy itself: what it lets pass is unchanged, and what it spoils it spoils as asked, and counts."""

from __future__ import annotations

import socket
import time
from typing import Any

import pytest
from botocore.exceptions import BotoCoreError, ClientError

from support.faultproxy import Fault, FaultProxy
from support.servers import S3Server
from support.waiting import eventually

pytestmark = pytest.mark.slow

DATA = bytes(range(256)) * 400


def client_of(proxy: FaultProxy, server: S3Server) -> Any:
    """A botocore client that signs for the proxy's host."""
    direct = server.endpoint
    try:
        server.endpoint = proxy.endpoint
        return server.client()
    finally:
        server.endpoint = direct


def passes(server: S3Server) -> None:
    with FaultProxy(server) as proxy:
        client, bucket = client_of(proxy, server), server.new_bucket()
        client.put_object(Bucket=bucket, Key="a b/ä", Body=DATA)
        assert client.get_object(Bucket=bucket, Key="a b/ä")["Body"].read() == DATA
        part = client.get_object(Bucket=bucket, Key="a b/ä", Range="bytes=100-299")
        assert part["Body"].read() == DATA[100:300] and part["ContentRange"] == f"bytes 100-299/{len(DATA)}"
        assert client.head_object(Bucket=bucket, Key="a b/ä")["ContentLength"] == len(DATA)
        assert [each["Key"] for each in client.list_objects_v2(Bucket=bucket)["Contents"]] == ["a b/ä"]
        with pytest.raises(ClientError, match=r"404|NoSuchKey"):
            client.get_object(Bucket=bucket, Key="none")
        assert proxy.requests == {"PUT": 1, "GET": 3, "HEAD": 1, "LIST": 1}
        client.close()


def test_rclone_takes_what_passes(rclone: S3Server) -> None:
    passes(rclone)


def test_seaweed_takes_what_passes(seaweed: S3Server) -> None:
    passes(seaweed)


@pytest.fixture
def stored(proxy: FaultProxy, rclone: S3Server) -> Any:
    """Fetches a range of an object: status, Content-Range, body."""
    bucket = rclone.new_bucket()
    rclone.client().put_object(Bucket=bucket, Key="key", Body=DATA)
    client = client_of(proxy, rclone)

    def get() -> tuple[int, str, bytes]:
        reply = client.get_object(Bucket=bucket, Key="key", Range="bytes=10-1009")
        status = reply["ResponseMetadata"]["HTTPStatusCode"]
        return status, reply.get("ContentRange", ""), reply["Body"].read()

    yield get
    client.close()


RIGHT = DATA[10:1010]


def test_replies_are_spoilt_as_asked(proxy: FaultProxy, stored: Any) -> None:
    with proxy.during(Fault.WRONG_RANGE, count=1) as rule:
        assert stored()[1:] == (f"bytes 11-1009/{len(DATA)}", RIGHT)
        assert stored()[1:] == (f"bytes 10-1009/{len(DATA)}", RIGHT)
        assert rule.strikes == 1
    with proxy.during(Fault.WHOLE_BODY) as rule:
        assert stored() == (200, "", DATA)
        assert rule.strikes == 1
    with proxy.during(Fault.FLIPPED, seed=3) as rule:
        body = stored()[2]
        assert len(body) == len(RIGHT) and sum(a != b for a, b in zip(body, RIGHT, strict=True)) == 1
    for fault in (Fault.RESET, Fault.TRUNCATED):
        with proxy.during(fault) as rule, pytest.raises((BotoCoreError, OSError)):
            stored()
        assert rule.strikes == 1
    for fault, status in [(Fault.SERVER_ERROR, 500), (Fault.SLOW_DOWN, 503), (Fault.TOO_MANY, 429)]:
        with proxy.during(fault), pytest.raises(ClientError) as caught:
            stored()
        assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == status
    assert stored()[2] == RIGHT


def test_rules_strike_what_they_name(proxy: FaultProxy, stored: Any) -> None:
    never = [
        proxy.add(Fault.SERVER_ERROR, key="/other"),
        proxy.add(Fault.SERVER_ERROR, method="LIST"),
        proxy.add(Fault.FLIPPED, largest=len(DATA) - 1),
        proxy.add(Fault.SERVER_ERROR, header="^x-amz-security-token: old"),
        proxy.add(Fault.SERVER_ERROR, on=False),
    ]
    assert stored()[2] == RIGHT
    assert [rule.strikes for rule in never] == [0] * 5
    with (
        proxy.during(Fault.TOO_MANY, header="^Range: bytes=10-", key="/key$", method="GET"),
        pytest.raises(ClientError),
    ):
        stored()


def test_the_seed_decides_who_is_struck(proxy: FaultProxy, stored: Any) -> None:
    def run(seed: int) -> list[int]:
        with proxy.during(Fault.WRONG_RANGE, chance=0.5, seed=seed):
            return [stored()[1].startswith("bytes 11") for _ in range(20)]

    assert run(1) == run(1) != run(2)
    assert 2 < sum(run(1)) < 18


def test_delays_stalls_and_refusals(proxy: FaultProxy, stored: Any) -> None:
    with proxy.during(Fault.DELAY, seconds=0.3):
        began = time.monotonic()
        assert stored()[2] == RIGHT
        assert time.monotonic() - began >= 0.3
    with proxy.during(Fault.STALL) as rule, socket.create_connection(("127.0.0.1", proxy.port)) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        connection.settimeout(0.3)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        proxy.remove(rule)
        connection.settimeout(5)
        assert connection.recv(1) == b"", "switched off, it lets go"
    proxy.refuse(0.4)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", proxy.port))
    eventually(lambda: _listens(proxy.port))
    assert stored()[2] == RIGHT
    assert proxy.refusals == 1


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def test_a_stale_listing_is_an_earlier_answer(proxy: FaultProxy, rclone: S3Server) -> None:
    bucket = rclone.new_bucket()
    client = client_of(proxy, rclone)

    def keys() -> list[str]:
        return [each["Key"] for each in client.list_objects_v2(Bucket=bucket).get("Contents", [])]

    with proxy.during(Fault.STALE_LISTING) as rule:
        rclone.client().put_object(Bucket=bucket, Key="first", Body=b"1")
        assert keys() == ["first"]
        assert rule.strikes == 0, "there is no other answer yet"
        rclone.client().put_object(Bucket=bucket, Key="second", Body=b"2")
        assert keys() == ["first"]
        assert rule.strikes == 1
    assert keys() == ["first", "second"]
    client.close()
