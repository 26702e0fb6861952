"""Uploads: digests, Litestream's timestamp, and files too large for one PUT."""

from __future__ import annotations

import hashlib
import io
import logging
from datetime import UTC, datetime, timedelta
from typing import BinaryIO

from lazyreplica.errors import StoreError
from lazyreplica.storage.retry import Deadline, TransientError
from lazyreplica.storage.s3_client import Body, Request, S3Client, ignore_body, whole_body
from lazyreplica.storage.s3_xml import complete_upload, parse_failure, parse_upload_id
from lazyreplica.storage.transport import Reply, Window

logger = logging.getLogger("lazyreplica.storage.s3")

_MAX_PARTS = 10_000  # S3's
_ABORT_SECONDS = 10.0
_CHUNK = 1 << 20


def rfc3339(milliseconds: int) -> str:
    """A moment since the Unix epoch as Litestream stores it: Go's RFC3339Nano, which drops trailing zeros."""
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=milliseconds)
    fraction = f".{milliseconds % 1000:03d}".rstrip("0").rstrip(".")
    return f"{moment:%Y-%m-%dT%H:%M:%S}{fraction}Z"


def digest(source: BinaryIO, start: int, size: int) -> str:
    """SHA-256, in hex, of `size` bytes from `start`. Raises `StoreError` if there are fewer."""
    sha256 = hashlib.sha256()
    source.seek(start)
    left = size
    while left:
        chunk = source.read(min(_CHUNK, left))
        if not chunk:
            raise StoreError(f"the data to upload ends after {size - left} bytes, {size} were announced")
        sha256.update(chunk)
        left -= len(chunk)
    return sha256.hexdigest()


def upload_parts(
    client: S3Client, begin: Request, source: BinaryIO, size: int, *, part_size: int, timeout: float
) -> None:
    """A multipart upload of `size` bytes from where `source` stands: atomic, or aborted.

    `begin` is CreateMultipartUpload. `timeout` bounds each request. Parts have `part_size` bytes, more where
    S3's limit on their number wants it.
    """
    start = source.tell()
    key, what = begin.key, begin.what
    part_size = max(part_size, -(-size // _MAX_PARTS))
    upload_id = _begin(client, begin, timeout)
    upload = ("uploadId", upload_id)
    try:
        etags = []
        for number, offset in enumerate(range(0, size, part_size), 1):
            length = min(part_size, size - offset)
            body = Body(source, start + offset, length, digest(source, start + offset, length))
            query = [("partNumber", str(number)), upload]
            etags.append(_send(client, Request("PUT", key, f"{what} (part {number})", query, body=body), timeout))
        document = complete_upload(etags)
        body = Body(io.BytesIO(document), 0, len(document), hashlib.sha256(document).hexdigest())
        _complete(client, Request("POST", key, what, [upload], body=body), size, timeout)
    except BaseException:
        _abort(client, Request("DELETE", key, f"{what} (aborting)", [upload]))
        raise


def _begin(client: S3Client, request: Request, timeout: float) -> str:
    def accept(reply: Reply) -> str:
        if reply.head.status != 200:
            raise client.refusal(reply, request)
        return parse_upload_id(reply.body)

    return client.call(request, Deadline.after(timeout), accept, whole_body)


def _send(client: S3Client, request: Request, timeout: float) -> str:
    def accept(reply: Reply) -> str:
        etag = reply.head.headers.get("etag")
        if reply.head.status != 200:
            raise client.refusal(reply, request)
        if not etag:
            raise StoreError(f"{client.url}: {request.what}: the reply has no ETag; the server cannot be used")
        return etag

    return client.call(request, Deadline.after(timeout), accept, ignore_body)


def _complete(client: S3Client, request: Request, size: int, timeout: float) -> None:

    def accept(reply: Reply) -> None:
        failure = parse_failure(reply.body)
        if reply.head.status == 200 and failure.code:
            # S3 sends the 200 before it has put the parts together, and the outcome in the body.
            raise TransientError(f"{failure.code} ({failure.message})")
        if reply.head.status == 200:
            return
        if failure.code == "NoSuchUpload" and _has_size(client, request, size, timeout):
            return  # an attempt whose reply was lost had done it
        raise client.refusal(reply, request)

    client.call(request, Deadline.after(timeout), accept, whole_body)


def _has_size(client: S3Client, request: Request, size: int, timeout: float) -> bool:
    """Whether the key holds an object of that size."""
    probe = Request("GET", request.key, request.what, headers={"range": "bytes=0-0"})

    def accept(reply: Reply) -> bool:
        # rclone answers ranges with 200 and Content-Range.
        return reply.head.status in {200, 206} and reply.head.headers.get("content-range") == f"bytes 0-0/{size}"

    return client.call(probe, Deadline.after(timeout), accept, lambda _: Window(0, 1))


def _abort(client: S3Client, request: Request) -> None:
    """Let S3 forget the parts, which it would charge for; a failure must not hide the first one."""
    try:
        client.call(request, Deadline.after(_ABORT_SECONDS), lambda _: None, ignore_body)
    except StoreError as error:
        logger.warning("an unfinished upload stays behind, remove it by a bucket lifecycle rule: %s", error)
