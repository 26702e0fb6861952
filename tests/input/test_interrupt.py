"""`Connection.interrupt()` ends a query that waits for storage, and nothing else."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import apsw
import pytest
from handmade import STILL, History, opened, upload

from lazyreplica import layers
from lazyreplica.errors import Interrupted
from support.servers import S3Server


class Road:
    """The way to a server. While it is closed, replies stay on it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.open = threading.Event()
        self.open.set()
        self.held = threading.Event()
        """Set when a reply waits."""
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                ours, _ = self._listener.accept()
                theirs = socket.create_connection(("127.0.0.1", self._port))
                self._sockets += [ours, theirs]
                for pair in ((ours, theirs, False), (theirs, ours, True)):
                    thread = threading.Thread(target=self._carry, args=pair)
                    self._threads.append(thread)
                    thread.start()

    def _carry(self, source: socket.socket, target: socket.socket, may_be_held: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if may_be_held and not self.open.is_set():
                    self.held.set()
                    self.open.wait()
                target.sendall(data)
        for each in (source, target):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.open.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._threads[0].join()
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for each in self._sockets:
            each.close()


@pytest.fixture
def road(rclone: S3Server) -> Iterator[Road]:
    road = Road(rclone.port)
    yield road
    road.close()


@pytest.fixture
def url(road: Road, rclone: S3Server, history: History, monkeypatch: pytest.MonkeyPatch) -> str:
    """A replica whose pages all have to come over the road."""
    for name, value in rclone.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(layers, "KEEP_FILE", 100)
    monkeypatch.setattr(layers, "KEEP_TOTAL", 0)
    monkeypatch.setattr(layers, "PASSING_TOTAL", 0)
    bucket = rclone.new_bucket()
    upload(rclone, bucket, history)
    return rclone.url(bucket, "app", endpoint=road.endpoint)


QUERY = "SELECT * FROM t ORDER BY id"


class Query:
    """A query in a thread of its own."""

    def __init__(self, connection: apsw.Connection) -> None:
        self.rows: list[tuple[object, ...]] | None = None
        self.problem: apsw.Error | None = None
        self.ended = 0.0
        self._connection = connection
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.rows = self._connection.execute(QUERY).fetchall()
        except apsw.Error as exc:
            self.problem = exc
        self.ended = time.monotonic()

    def join(self) -> None:
        self._thread.join(10)
        assert not self._thread.is_alive()


def interrupted(connection: apsw.Connection, road: Road) -> Query:
    """A query that was interrupted while it waited for the road."""
    road.open.clear()
    road.held.clear()
    query = Query(connection)
    assert road.held.wait(5)
    time.sleep(0.1)
    moment = time.monotonic()
    connection.interrupt()
    query.join()
    assert query.ended - moment < 0.5, query.ended - moment
    return query


def test_a_query_that_waits_for_storage_is_interrupted(url: str, road: Road, history: History) -> None:
    with opened(url, **STILL, prefetch="none") as connection:
        connection.execute("SELECT * FROM sqlite_schema").fetchall()
        for _ in range(2):
            problem = interrupted(connection, road).problem
            assert isinstance(problem, apsw.InterruptError)
            assert isinstance(problem, Interrupted)
            assert problem.result == apsw.SQLITE_INTERRUPT
        assert connection.in_transaction is False
        road.open.set()
        assert connection.execute(QUERY).fetchall() == history.rows[2]


def test_what_reads_without_a_statement_goes_on_after_an_interrupt(url: str, road: Road, history: History) -> None:
    with opened(url, **STILL, prefetch="none") as connection, contextlib.closing(apsw.Connection("")) as copy:
        connection.execute("SELECT * FROM sqlite_schema").fetchall()
        interrupted(connection, road)
        assert connection.is_interrupted, "until the next statement"
        road.open.set()
        with copy.backup("main", connection, "main") as backup:
            backup.step(-1)
        assert copy.execute(QUERY).fetchall() == history.rows[2]


def test_others_that_wait_for_the_same_pages_go_on(url: str, road: Road, history: History) -> None:
    with opened(url, **STILL) as connection, opened(url, **STILL) as other:
        for each in (connection, other):
            each.execute("SELECT * FROM sqlite_schema").fetchall()
        road.open.clear()
        road.held.clear()
        first = Query(connection)
        assert road.held.wait(5)
        second = Query(other)
        time.sleep(0.2)
        connection.interrupt()
        first.join()
        assert isinstance(first.problem, Interrupted)
        assert second.ended == 0.0
        road.open.set()
        second.join()
        assert (second.problem, second.rows) == (None, history.rows[2])
        assert connection.execute(QUERY).fetchall() == history.rows[2]
