"""An HTTP server that answers what a test tells it to, byte by byte."""

from __future__ import annotations

import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

from lazyreplica.ltx.name import FileName
from lazyreplica.storage import StoredFile

Step = Callable[[socket.socket, "Asked"], bool]
"""Answers one request; False closes the connection."""


@dataclass(frozen=True)
class Asked:
    """A request as it came in."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes


class ScriptedServer:
    """Plays one step a request, in order; the last one again and again."""

    def __init__(self, steps: Sequence[Step], tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self.asked: list[Asked] = []
        self.connections = 0
        self._steps = list(steps)
        self._lock = threading.Lock()
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"{'https' if tls else 'http'}://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def url(self, path: str = "app") -> str:
        return f"s3://bucket/{path}?endpoint={self.endpoint}"

    @property
    def open_connections(self) -> int:
        with self._lock:
            return len(self._open)

    def end_connections(self) -> None:
        """Close all from this side, and wait until that is done."""
        with self._lock:
            for connection in self._open:
                socket.socket.shutdown(connection, socket.SHUT_RDWR)  # without TLS's own
        while self.open_connections:
            time.sleep(0.01)

    def __enter__(self) -> ScriptedServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for connection in self._open:
                try:
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)
                except OSError:
                    pass
        for thread in list(self._threads):
            thread.join(5)
            assert not thread.is_alive()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self.connections += 1
                self._open.append(connection)
                thread = threading.Thread(target=self._serve, args=(connection,))
                self._threads.append(thread)
                thread.start()

    def _serve(self, plain: socket.socket) -> None:
        connection = plain
        try:
            if self._tls is not None:
                secured = self._tls.wrap_socket(plain, server_side=True, do_handshake_on_connect=False)
                with self._lock:  # the plain one is nothing any more
                    self._open[self._open.index(plain)] = connection = secured
                secured.do_handshake()
            self._converse(connection)
        except OSError:  # a handshake that the client gave up
            pass
        finally:
            connection.close()
            plain.close()
        with self._lock:
            self._open.remove(connection)

    def _converse(self, connection: socket.socket) -> None:
        with connection.makefile("rb") as reader:
            try:
                while asked := _read_request(reader.readline, reader.read):
                    with self._lock:
                        self.asked.append(asked)
                        step = self._steps[min(len(self.asked), len(self._steps)) - 1]
                    if not step(connection, asked):
                        break
            except OSError:
                pass


def _read_request(readline: Callable[[], bytes], read: Callable[[int], bytes]) -> Asked | None:
    line = readline().decode("latin-1")
    if not line:
        return None
    method, target, _ = (line + "  ").split(" ", 2)
    headers: dict[str, str] = {}
    while (line := readline().decode("latin-1").strip()) != "":
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    return Asked(method, target, headers, read(int(headers.get("content-length", "0"))))


def answer(status: int, body: bytes = b"", **headers: str) -> Step:
    """A reply with a Content-Length, unless one is given (``content_length=...``)."""
    fields = {"content-length": str(len(body))} | {name.replace("_", "-"): value for name, value in headers.items()}
    text = "".join(f"{name}: {value}\r\n" for name, value in fields.items() if value)

    def step(connection: socket.socket, asked: Asked) -> bool:
        connection.sendall(f"HTTP/1.1 {status} X\r\n{text}\r\n".encode() + body)
        return fields["content-length"] == str(len(body))

    return step


def failure(status: int, code: str, message: str = "m", extra: str = "", **headers: str) -> Step:
    """S3's <Error> document."""
    text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message>{extra}</Error>"
    return answer(status, text.encode(), **headers)


def hang(connection: socket.socket, asked: Asked) -> bool:
    """Say nothing until the test ends."""
    connection.recv(1)
    return False


def reset_after(reply: bytes) -> Step:
    """Send a piece of a reply, then reset the connection."""

    def step(connection: socket.socket, asked: Asked) -> bool:
        connection.sendall(reply)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return False

    return step


CONTENT = bytes(range(256)) * 4
NAME = FileName(1, 3)
FILE = StoredFile(0, NAME, len(CONTENT), "tag", 0.0)


def ranged(content: bytes = CONTENT, etag: str = '"tag"', **headers: str) -> Step:
    """What S3 does: the range that was asked for."""

    def step(connection: socket.socket, asked: Asked) -> bool:
        first, _, last = asked.headers["range"].removeprefix("bytes=").partition("-")
        stop = min(int(last) + 1, len(content))
        fields = {"etag": etag, "content_range": f"bytes {first}-{stop - 1}/{len(content)}"} | headers
        return answer(206, content[int(first) : stop], **fields)(connection, asked)

    return step


def listing(*keys: str, token: str = "", encoding: str = "") -> Step:
    """A page of ListObjectsV2."""
    contents = "".join(
        f"<Contents><Key>{key}</Key><Size>7</Size><ETag>&quot;e{key[-5:-4]}&quot;</ETag>"
        "<LastModified>2026-01-02T03:04:05.678Z</LastModified></Contents>"
        for key in keys
    )
    more = f"<IsTruncated>true</IsTruncated><NextContinuationToken>{token}</NextContinuationToken>" if token else ""
    kind = f"<EncodingType>{encoding}</EncodingType>" if encoding else ""
    head = '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
    return answer(200, f"{head}{kind}{more}{contents}</ListBucketResult>".encode())
