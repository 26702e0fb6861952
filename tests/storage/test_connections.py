"""Connections at rest and in bursts: few, alive, never waiting for each other, and never with somebody else's bytes."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted import CONTENT, FILE, Asked, ScriptedServer, Step, answer, hang, ranged, reset_after

from lazyreplica.errors import Interrupted, StoreError, StoreUnavailable
from lazyreplica.storage import Store, idle, open_store, reach, transport
from lazyreplica.storage.waiting import called_off_by, wait
from support.waiting import eventually

pytestmark = pytest.mark.slow

GOOD = ranged()


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")


Play = Callable[..., tuple[ScriptedServer, Store]]


@pytest.fixture
def play() -> Iterator[Play]:
    started: list[tuple[ScriptedServer, Store]] = []

    def start(*steps: Step) -> tuple[ScriptedServer, Store]:
        server = ScriptedServer(steps)
        started.append((server, open_store(server.url())))
        return started[-1]

    yield start
    for server, store in started:
        store.close()
        with server:
            pass


def expect(store: Store, offset: int = 100, timeout: float = 10) -> None:
    assert store.read(FILE, offset, 50, timeout) == CONTENT[offset : offset + 50]


# -- at rest --


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


@pytest.fixture
def secure(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    """A server's side of TLS 1.3, which sends four session tickets after the handshake."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 4
    context.load_cert_chain(certificate, f"{certificate}.key")
    return context


def test_prepared_tls_connections_survive_session_tickets(secure: ssl.SSLContext) -> None:
    with ScriptedServer([GOOD], secure) as server:
        store = open_store(server.url())
        for _ in range(5):
            store.prepare(5)
        assert store.ready == 5
        time.sleep(0.2)  # the tickets are here now
        wanted = [(FILE, offset, 50) for offset in range(5)]
        assert list(store.read_many(wanted, 5)) == [CONTENT[n : n + 50] for n in range(5)]
        expect(store)
        assert server.connections == 5
        store.close()


def test_a_tls_connection_that_the_server_has_ended_is_not_used(secure: ssl.SSLContext) -> None:
    with ScriptedServer([GOOD], secure) as server:
        store = open_store(server.url())
        store.prepare(5)
        expect(store)
        server.end_connections()
        expect(store)
        assert (server.connections, len(server.asked)) == (2, 2)
        store.close()


def test_what_a_burst_leaves_behind_is_closed_soon(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle, "_QUIET_SECONDS", 0.2)
    server, store = play(GOOD)
    for _ in range(30):
        store.prepare(5)
    assert len(list(store.read_many([(FILE, n, 50) for n in range(30)], 5))) == 30
    assert server.connections == 30
    eventually(lambda: store.ready == idle.KEPT)
    eventually(lambda: server.open_connections == idle.KEPT)
    expect(store)
    assert server.connections == 30
    monkeypatch.setattr(idle, "IDLE_SECONDS", 0.3)
    eventually(lambda: store.ready == 1)  # without anybody asking for anything


def test_nothing_prepared_is_closed_while_the_listing_takes_long(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle, "_QUIET_SECONDS", 0.05)
    go_on = threading.Event()

    def slow(connection: socket.socket, asked: Asked) -> bool:
        go_on.wait(5)
        return answer(200, b"<ListBucketResult/>")(connection, asked)

    server, store = play(slow)
    listing = threading.Thread(target=store.list_all, args=(5,))
    listing.start()
    eventually(lambda: len(server.asked) == 1)
    for _ in range(20):
        store.prepare(5)
    time.sleep(0.5)
    assert store.ready == 20
    go_on.set()
    listing.join()
    eventually(lambda: store.ready == idle.KEPT)


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts descriptors where Linux shows them")
def test_sixty_replicas_do_not_use_up_descriptors(rclone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in rclone.env.items():
        monkeypatch.setenv(name, value)
    bucket, before = rclone.new_bucket(), descriptors()
    stores = [open_store(rclone.url(bucket, f"app{number}")) for number in range(60)]
    most = 0
    try:
        for store in stores:
            for _ in range(store.parallel):  # what an open does
                store.prepare(5)
            assert store.list_all(5).files == ()
            most = max(most, descriptors())
        assert most - before < 60 + idle.KEPT_IN_ALL + 40
        eventually(lambda: all(store.ready <= idle.KEPT for store in stores))
        for store in stores:
            assert store.ready >= 1
            store.list_all(5)
    finally:
        for store in stores:
            store.close()
    assert descriptors() <= before + 2


# -- bursts --


def test_bursts_do_not_wait_for_each_other(play: Play) -> None:
    _, store = play(GOOD)
    for _ in range(transport.MAX_CONNECTIONS):
        store.prepare(5)
    wanted = [(FILE, n, 50) for n in range(60)]
    bursts = [store.read_many(wanted, 10) for _ in range(4)]
    started = time.monotonic()
    # All of them are under way, and hold what they could get, before any goes on.
    got = [[next(burst)] for burst in bursts]
    expect(store)
    for pieces, burst in zip(got, bursts, strict=True):
        pieces += burst
        assert pieces == [CONTENT[n : n + 50] for n in range(60)]
    assert time.monotonic() - started < 5


def test_bursts_whose_connections_break_do_not_wait_for_each_other(play: Play) -> None:
    _, store = play(*[reset_after(b"")] * 50, GOOD)
    for _ in range(transport.MAX_CONNECTIONS):
        store.prepare(5)
    got: list[list[bytes]] = []

    def work() -> None:
        got.append(list(store.read_many([(FILE, n, 50) for n in range(60)], 20)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [[CONTENT[n : n + 50] for n in range(60)]] * 4
    assert time.monotonic() - started < 10


def test_a_reply_in_a_burst_that_never_comes_ends_at_the_deadline(play: Play) -> None:
    _, store = play(GOOD, GOOD, hang)
    for _ in range(5):
        store.prepare(5)
    started = time.monotonic()
    with pytest.raises(StoreUnavailable):
        list(store.read_many([(FILE, n, 50) for n in range(5)], 0.5))
    assert 0.4 < time.monotonic() - started < 5


def test_a_burst_that_is_given_up_leaves_no_unread_bytes_behind(play: Play) -> None:
    server, store = play(GOOD)
    for _ in range(10):
        store.prepare(5)
    burst = store.read_many([(FILE, n, 50) for n in range(10)], 5)
    assert next(burst) == CONTENT[:50]
    burst.close()
    assert store.ready == 1
    for offset in range(200, 220):
        expect(store, offset)
    assert server.connections == 10


def test_an_empty_range_asks_for_nothing(play: Play) -> None:
    server, store = play(GOOD)
    empty = type(FILE)(0, FILE.name, 0, "tag", 0.0)
    assert store.read(FILE, 7, 0, 5) == b""
    assert store.read(empty, 0, 0, 5) == b""
    store.read_into(FILE, 7, memoryview(bytearray()), 5)
    assert list(store.read_many([(FILE, 7, 0), (empty, 0, 0)], 5)) == [b"", b""]
    assert server.asked == []
    mixed = [(FILE, 3, 0), (FILE, 1, 2), (empty, 0, 0), (FILE, 5, 1), (FILE, 6, 0)]
    assert list(store.read_many(mixed, 5)) == [b"", CONTENT[1:3], b"", CONTENT[5:6], b""]
    assert {asked.headers["range"] for asked in server.asked} == {"bytes=1-2", "bytes=5-5"}
    with pytest.raises(ValueError, match="which has 1024"):
        store.read(FILE, -1, 0, 5)


# -- reaching a server --


def test_a_resolver_that_hangs_ends_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    free, calls = threading.Event(), []
    real = socket.getaddrinfo

    def stuck(host: bytes, *args: Any, flags: int = 0, **more: Any) -> Any:
        if flags & socket.AI_NUMERICHOST:
            return real(host, *args, flags=flags, **more)
        calls.append(host)
        free.wait(10)
        raise socket.gaierror(socket.EAI_AGAIN, "later")

    monkeypatch.setattr(socket, "getaddrinfo", stuck)
    store = open_store("s3://bucket/app?endpoint=http://slow.invalid:9000")
    try:
        started = time.monotonic()
        with pytest.raises(StoreUnavailable, match=r"slow\.invalid"):
            store.list_all(0.5)
        assert time.monotonic() - started < 4
        with pytest.raises(Interrupted), called_off_by(lambda: time.monotonic() - started > 0.6):
            store.list_all(30)
        assert time.monotonic() - started < 6
        assert len(calls) == 1, "one question at a time"
        closing = threading.Timer(0.1, store.close)
        closing.start()
        with pytest.raises(StoreUnavailable):
            store.list_all(30)
        assert time.monotonic() - started < 8
        closing.join()
    finally:
        free.set()
        store.close()


def test_addresses_that_do_not_answer_leave_time_for_one_that_does(monkeypatch: pytest.MonkeyPatch) -> None:
    with ScriptedServer([GOOD]) as server, socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for each in waiting:  # nobody accepts them, so the next one gets no answer
            each.setblocking(False)
            each.connect_ex(full.getsockname())
        port = int(server.endpoint.rpartition(":")[2])
        there = [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", place) for place in (full.getsockname(), ("127.0.0.1", port))
        ]
        monkeypatch.setattr(reach, "_look_up", lambda *_: there)
        store = open_store("s3://bucket/app?endpoint=http://two.invalid:9000")
        started = time.monotonic()
        expect(store, timeout=2)
        assert time.monotonic() - started < 1.8
        store.close()
        for each in waiting:
            each.close()


# -- calling a wait off --


@pytest.mark.parametrize("step", [hang, reset_after(b"HTTP/1.1 503 X\r\nRetry-After: 20\r\nContent-Length: 0\r\n\r\n")])
def test_a_wait_that_is_called_off_ends_at_once(play: Play, step: Step) -> None:
    _, store = play(step, GOOD)
    off = threading.Event()
    moment: list[float] = []

    def call_off() -> None:
        moment.append(time.monotonic())
        off.set()

    timer = threading.Timer(0.3, call_off)
    timer.start()
    with pytest.raises(Interrupted), called_off_by(off.is_set):
        expect(store, timeout=30)
    assert time.monotonic() - moment[0] < 0.2
    timer.join()
    expect(store)  # not this thread's any more, and the connection is gone


def test_slices_change_nothing(play: Play, secure: ssl.SSLContext) -> None:
    def slowly(connection: socket.socket, asked: Asked) -> bool:
        time.sleep(0.1)
        return GOOD(connection, asked)

    with ScriptedServer([slowly], secure) as server:
        store = open_store(server.url())
        with called_off_by(lambda: False):
            expect(store)
            assert list(store.read_many([(FILE, n, 50) for n in range(3)], 5)) == [
                CONTENT[n : n + 50] for n in range(3)
            ]
        store.close()
    _, silent = play(hang)
    started = time.monotonic()
    with pytest.raises(StoreUnavailable), called_off_by(lambda: False):
        expect(silent, timeout=0.4)
    assert 0.3 < time.monotonic() - started < 5


def test_waiting_for_a_thread() -> None:
    event = threading.Event()
    assert not wait(event, 0.01)
    with called_off_by(lambda: False):
        assert not wait(event, 0.06)
        timer = threading.Timer(0.05, event.set)
        timer.start()
        assert wait(event, 5)
        timer.join()
    event.clear()
    with called_off_by(lambda: True):
        with pytest.raises(Interrupted):
            wait(event, 5)
        with called_off_by(None):
            assert not wait(event, 0.01)
    assert not wait(event, 0.01)
    assert issubclass(Interrupted, StoreError)
