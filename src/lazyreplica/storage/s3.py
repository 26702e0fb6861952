"""Replicas on S3 and its kin: ``<path>/<level as 4 hex digits>/<name>``."""

from __future__ import annotations

import hashlib
import io
import logging
import re
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from itertools import pairwise
from typing import BinaryIO

from lazyreplica.errors import FileVanished, StoreError
from lazyreplica.ltx.name import FileName
from lazyreplica.storage import (
    LEVELS,
    NOTE_LIMIT,
    Listing,
    StoredFile,
    check_note_name,
    timestamp_ms,
)
from lazyreplica.storage.credentials import CredentialSource, find_credentials
from lazyreplica.storage.retry import Deadline, TransientError
from lazyreplica.storage.s3_client import Body, Request, S3Client, Started, ignore_body
from lazyreplica.storage.s3_upload import digest, rfc3339, upload_parts
from lazyreplica.storage.s3_xml import Entry, Page, clean_etag, parse_failure, parse_page
from lazyreplica.storage.transport import Head, Reply, Window
from lazyreplica.storage.url import S3URL

logger = logging.getLogger("lazyreplica.storage.s3")

MULTIPART_THRESHOLD = 64 << 20
_PARALLEL = 48
"""Requests of one replica at once; the transport allows some more, for demand reads."""
_PAGE_LIMIT = 8 << 20
"""Bytes: a page of 1000 of the longest possible keys stays below."""
_SKIP_LIMIT = 64 << 20
"""Bytes: how much of a body we pass over when a server ignores Range."""
_EMPTY_PAGES = 100
_MOST_KEYS = 2_000_000
"""Keys that a listing may show: some 20 days of a transaction a second, none of them compacted away."""
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18})", re.ASCII)
_UNSATISFIED_RANGE = re.compile(r"bytes \*/(\d{1,18})", re.ASCII)


@dataclass(frozen=True, slots=True)
class _Range:
    """A range request."""

    request: Request
    accept: Callable[[Reply], bytes]
    window: Callable[[Head], Window]


class S3Store:
    """A `Store` on S3."""

    def __init__(
        self,
        url: S3URL,
        credentials: CredentialSource | None = None,
        *,
        multipart_threshold: int = MULTIPART_THRESHOLD,
    ) -> None:
        """Files larger than `multipart_threshold` bytes are uploaded in parts of that size or more."""
        if url.skip_verify:
            logger.warning("%s: skipVerify=true, TLS certificates are not checked", url)
        self._url = url
        self._client = S3Client(url, credentials or find_credentials(anonymous=url.anonymous))
        self._prefix = f"{url.path}/" if url.path else ""
        self._multipart_threshold = multipart_threshold

    @property
    def url(self) -> str:
        return str(self._url)

    def keys(self) -> dict[str, str]:
        return self._client.keys()

    @property
    def parallel(self) -> int:
        return _PARALLEL

    @property
    def ready(self) -> int:
        return self._client.ready

    @property
    def requests(self) -> int:
        return self._client.requests

    @property
    def retries(self) -> int:
        return self._client.retries

    def prepare(self, timeout: float) -> None:
        self._client.prepare(timeout)

    def list_all(self, timeout: float) -> Listing:
        strangers: set[str] = set()
        levels = {f"{level:04x}": level for level in LEVELS}
        files: list[StoredFile] = []

        def visit(page: Page) -> str | None:
            component = ""
            for entry in page.entries:
                component, slash, name = entry.key.removeprefix(self._prefix).partition("/")
                if slash and component in levels:
                    files.extend(_stored(levels[component], name, entry))
                    component = ""
                elif component or slash:
                    strangers.add(component or "/")
                    component = f"{component}/" if slash else ""
            # The last key lies in a foreign folder, which may hold millions: go on behind it. No key of a
            # level can lie between "x/..." and "x0", '0' being the character after '/'.
            return f"{self._prefix}{component[:-1]}0" if component else None

        self._list_files(self._prefix, None, f"listing {self._prefix or 'the bucket'}", timeout, visit, files)
        return Listing(tuple(files), frozenset(strangers))

    def list_level(self, level: int, after: FileName | None, timeout: float) -> Sequence[StoredFile]:
        prefix = f"{self._prefix}{level:04x}/"
        files: list[StoredFile] = []

        def visit(page: Page) -> None:
            for entry in page.entries:
                files.extend(_stored(level, entry.key.removeprefix(prefix), entry))

        start = f"{prefix}{after}" if after else None
        self._list_files(prefix, start, f"listing level {level}", timeout, visit, files)
        # A server that does not know start-after sends everything.
        return [file for file in files if after is None or file.name > after]

    def _list_files(
        self,
        prefix: str,
        start: str | None,
        what: str,
        timeout: float,
        visit: Callable[[Page], str | None],
        files: list[StoredFile],
    ) -> None:
        """Visit every page; `visit` puts what it finds into `files`, which are checked (see `_check_listed`)."""
        deadline = Deadline.after(timeout)
        self._list(prefix, start, what, deadline, visit)
        if not all(file.etag for file in files):
            # rclone shows a file so that is deleted while it lists: not another time.
            files.clear()
            self._list(prefix, start, what, deadline, visit)
        self._check_listed(files)

    def _check_listed(self, files: Sequence[StoredFile]) -> None:
        """Raise `StoreError` unless a listing went through the levels and names once, in order, and has ETags.

        Out of order, a file that is compacted meanwhile may be missed; without ETags, one that is replaced.
        """
        for file in files:
            if not file.etag:
                raise StoreError(f"{self._url}: the listing shows no ETag for {file}; the server cannot be used")
        for before, file in pairwise(files):
            if (before.level, before.name) >= (file.level, file.name):
                raise StoreError(
                    f"{self._url}: the listing shows {file} after {before}, expected each key once and in order; the "
                    "server cannot be used"
                )

    def _list(
        self, prefix: str, start: str | None, what: str, deadline: Deadline, visit: Callable[[Page], str | None]
    ) -> None:
        """Visit every page; `visit` may name a key to go on behind."""
        token: str | None = None
        empty = keys = 0
        ends: set[str] = set()  # SeaweedFS sorts by path component, so "the next key is greater" is no test
        while True:
            page = self._list_page(prefix, start, token, what, deadline)
            keys += len(page.entries)
            if keys > _MOST_KEYS:
                raise StoreError(f"{self._url}: {what}: more than {_MOST_KEYS} keys; is the path the replica's own?")
            jump = visit(page)
            if page.next_token is None:
                return
            last = page.entries[-1].key if page.entries else None
            empty = 0 if last else empty + 1
            if page.next_token == token or empty > _EMPTY_PAGES or last in ends:
                raise StoreError(f"{self._url}: {what}: the listing goes in circles at {last!r}; server bug?")
            if last:
                ends.add(last)
            token, start = (page.next_token, None) if jump is None else (None, jump)

    def _list_page(self, prefix: str, start: str | None, token: str | None, what: str, deadline: Deadline) -> Page:
        query = [("list-type", "2"), ("encoding-type", "url"), ("prefix", prefix)]
        if token is not None:
            query.append(("continuation-token", token))
        elif start is not None:
            query.append(("start-after", start))
        request = Request("GET", None, what, query)

        def accept(reply: Reply) -> Page:
            if reply.head.status != 200:
                raise self._client.refusal(reply, request)
            if not reply.complete:
                raise StoreError(f"{self._url}: {what}: a page is larger than {_PAGE_LIMIT} bytes; is this S3?")
            try:
                return parse_page(reply.body, prefix)
            except StoreError as exc:
                raise StoreError(f"{self._url}: {what}: {exc}") from exc

        return self._client.call(request, deadline, accept, lambda _: Window(0, _PAGE_LIMIT))

    def read(self, file: StoredFile, offset: int, length: int, timeout: float) -> bytes:
        return self._call(self._range(file, offset, length), timeout)

    def read_into(self, file: StoredFile, offset: int, buffer: memoryview, timeout: float) -> None:
        self._call(self._range(file, offset, len(buffer), buffer), timeout)

    def _call(self, wanted: _Range | None, timeout: float) -> bytes:
        if wanted is None:
            return b""
        return self._client.call(wanted.request, Deadline.after(timeout), wanted.accept, wanted.window)

    def read_many(self, wanted: Iterable[tuple[StoredFile, int, int]], timeout: float) -> Generator[bytes]:
        deadline = Deadline.after(timeout)
        ranges = [self._range(*each) for each in wanted]
        waiting: deque[Started | None] = deque()
        asked = 0
        try:
            for index, each in enumerate(ranges):
                # Only over connections that are there: to wait for a handshake would keep those behind it waiting.
                while asked < len(ranges) and len(waiting) < _PARALLEL:
                    pending = self._start(ranges[asked], deadline, connect=asked == index)
                    if pending is None and asked > index and ranges[asked] is not None:
                        break
                    waiting.append(pending)
                    asked += 1
                yield self._finish(waiting.popleft(), each, deadline)
        finally:
            for pending in waiting:
                if pending is not None:
                    self._client.abandon(pending)

    def _start(self, wanted: _Range | None, deadline: Deadline, *, connect: bool) -> Started | None:
        if wanted is None:
            return None
        try:
            return self._client.start(wanted.request, deadline, connect=connect)
        except TransientError as exc:
            logger.debug("%s: %s", wanted.request.what, exc)
        return None

    def _finish(self, pending: Started | None, wanted: _Range | None, deadline: Deadline) -> bytes:
        if pending is not None and wanted is not None:
            try:
                return self._client.finish(pending, wanted.accept, wanted.window)
            except TransientError as exc:
                self._client.retries += 1
                logger.debug("%s: %s", wanted.request.what, exc)
        return self._call(wanted, max(deadline.left(), 0.001))

    def _range(self, file: StoredFile, offset: int, length: int, into: memoryview | None = None) -> _Range | None:
        """The request for those bytes, and what is made of its reply. None for no bytes: HTTP has no such range."""
        if offset < 0 or length < 0 or offset + length > file.size:
            raise ValueError(f"bytes {offset}..{offset + length} of {file}, which has {file.size}")
        if length == 0:
            return None
        wanted = {"range": f"bytes={offset}-{offset + length - 1}"}
        request = Request("GET", self._key(file.level, file.name), f"reading {file}", headers=wanted)

        def window(head: Head) -> Window:
            if head.status != 200 or _is_partial(head):
                return Window(0, length, into)
            # The server ignores Range: take the slice out of the whole, if that is not absurdly much.
            size = _declared_size(head)
            if size is None or offset + length > _SKIP_LIMIT:
                raise StoreError(f"{self._url}: reading {file}: the server ignores Range; use one that does not")
            self._check_identity(file, head, size)
            return Window(offset, length, into)

        def accept(reply: Reply) -> bytes:
            head = reply.head
            if head.status in {412, 416} or _is_missing(reply):
                raise FileVanished(f"{self._url}: {file} is gone or shorter than listed (HTTP {head.status})")
            if head.status not in {200, 206}:
                raise self._client.refusal(reply, request)
            if _is_partial(head):
                self._check_identity(file, head, self._total(head, request, offset))
            if reply.received != length:
                raise TransientError(f"the body ended after {reply.received} of {length} bytes")
            return reply.body

        return _Range(request, accept, window)

    def get(self, level: int, name: FileName, limit: int, timeout: float) -> tuple[StoredFile, bytes] | None:
        if limit < 1:
            raise ValueError(f"limit is {limit}, expected at least 1 byte")
        wanted = {"range": f"bytes=0-{limit - 1}"}
        request = Request("GET", self._key(level, name), f"getting level {level} file {name}", headers=wanted)

        def accept(reply: Reply) -> tuple[StoredFile, bytes] | None:
            head = reply.head
            if _is_missing(reply):
                return None
            if _is_partial(head):
                size = self._total(head, request, 0)
            elif head.status == 200:
                declared = _declared_size(head)
                if declared is None and not reply.complete:
                    raise StoreError(f"{self._url}: {request.what}: the reply does not tell the size; is this S3?")
                size = len(reply.body) if declared is None else declared
            elif head.status == 416 and _unsatisfied_size(head) == 0:
                size = 0  # no byte 0: the file is empty
                return StoredFile(level, name, size, _etag(head), _date(head)), b""
            else:
                raise self._client.refusal(reply, request)
            if not _etag(head):
                raise StoreError(f"{self._url}: {request.what}: no ETag in the reply; the server cannot be used")
            if len(reply.body) != min(limit, size):
                raise TransientError(f"the body ended after {len(reply.body)} of {min(limit, size)} bytes")
            return StoredFile(level, name, size, _etag(head), _date(head)), reply.body

        return self._client.call(request, Deadline.after(timeout), accept, lambda _: Window(0, limit))

    def put(self, level: int, name: FileName, source: BinaryIO, size: int, timestamp: float, timeout: float) -> None:
        """See `Store.put`; `source` must be seekable, and is read twice: its digest is signed."""
        key, what = self._key(level, name), f"writing level {level} file {name}"
        metadata = {"x-amz-meta-litestream-timestamp": rfc3339(timestamp_ms(timestamp))}
        start = source.tell()
        if size > self._multipart_threshold:
            begin = Request("POST", key, what, [("uploads", "")], metadata)
            upload_parts(self._client, begin, source, size, part_size=self._multipart_threshold, timeout=timeout)
            return
        body = Body(source, start, size, digest(source, start, size))
        self._put(Request("PUT", key, what, headers=metadata, body=body), timeout)

    def _put(self, request: Request, timeout: float) -> None:
        def accept(reply: Reply) -> None:
            if reply.head.status != 200:
                raise self._client.refusal(reply, request)

        self._client.call(request, Deadline.after(timeout), accept, ignore_body)

    def read_note(self, name: str, timeout: float) -> bytes | None:
        request = Request("GET", self._prefix + check_note_name(name), f"reading note {name}")

        def accept(reply: Reply) -> bytes | None:
            if _is_missing(reply):
                return None
            if reply.head.status != 200:
                raise self._client.refusal(reply, request)
            if not reply.complete:
                raise StoreError(f"{self._url}: note {name} is larger than {NOTE_LIMIT} bytes; it is not ours")
            return reply.body

        return self._client.call(request, Deadline.after(timeout), accept, lambda _: Window(0, NOTE_LIMIT))

    def write_note(self, name: str, data: bytes, timeout: float) -> None:
        source = io.BytesIO(data)
        body = Body(source, 0, len(data), hashlib.sha256(data).hexdigest())
        self._put(Request("PUT", self._prefix + check_note_name(name), f"writing note {name}", body=body), timeout)

    def close(self) -> None:
        self._client.close()

    def _key(self, level: int, name: FileName) -> str:
        return f"{self._prefix}{level:04x}/{name}"

    def _total(self, head: Head, request: Request, first: int) -> int:
        """The file's size, out of the Content-Range of a reply that begins at `first`."""
        match = _CONTENT_RANGE.fullmatch(text := head.headers.get("content-range", ""))
        if match is None or int(match[1]) != first:
            raise StoreError(
                f"{self._url}: {request.what}: Content-Range is {text[:80]!r}, expected 'bytes {first}-LAST/SIZE'"
            )
        return int(match[2])

    def _check_identity(self, file: StoredFile, head: Head, size: int | None) -> None:
        etag = _etag(head)
        if not etag:
            raise StoreError(f"{self._url}: reading {file}: no ETag in the reply; the server is unfit")
        if etag != file.etag or size != file.size:
            raise FileVanished(
                f"{self._url}: {file} changed since it was listed: ETag {etag!r}, {size} bytes; "
                f"listed were {file.etag!r}, {file.size}"
            )


def _stored(level: int, name: str, entry: Entry) -> list[StoredFile]:
    """The file behind a key, or nothing for a name that is none."""
    parsed = FileName.parse(name)
    return [StoredFile(level, parsed, entry.size, entry.etag, entry.modified)] if parsed else []


def _is_missing(reply: Reply) -> bool:
    return reply.head.status == 404 and parse_failure(reply.body).code != "NoSuchBucket"


def _is_partial(head: Head) -> bool:
    # rclone answers ranges with 200 and Content-Range.
    return head.status == 206 or (head.status == 200 and "content-range" in head.headers)


def _etag(head: Head) -> str:
    return clean_etag(head.headers.get("etag", ""))


def _declared_size(head: Head) -> int | None:
    text = head.headers.get("content-length", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None


def _unsatisfied_size(head: Head) -> int | None:
    # Not every server sends Content-Range with a 416, but only an empty file lacks byte 0.
    text = head.headers.get("content-range")
    match = _UNSATISFIED_RANGE.fullmatch(text) if text is not None else None
    return 0 if text is None else int(match[1]) if match else None


def _date(head: Head) -> float:
    try:
        return parsedate_to_datetime(head.headers.get("last-modified", "")).timestamp()
    except ValueError:
        return 0.0
