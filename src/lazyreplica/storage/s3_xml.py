"""The few XML documents of S3's API: a page of a listing, an error, an upload id."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import dataclass
from datetime import datetime
from urllib.parse import unquote, unquote_plus
from xml.sax.saxutils import escape

from lazyreplica.errors import StoreError

_SIZE_DIGITS = 15
"""Decimal digits: a petabyte, twenty times what S3 allows."""

_MARKUP = 200_000
"""Tags and attributes of a document: eight times what 1000 keys need. Of a tag that is a few bytes, 250 in memory."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One object of a listing."""

    key: str
    size: int
    etag: str
    """Without quotes."""
    modified: float
    """Seconds since the Unix epoch; 0 if the server sent no date."""


@dataclass(frozen=True, slots=True)
class Page:
    """One reply to ListObjectsV2."""

    entries: tuple[Entry, ...]
    next_token: str | None
    """Where to go on; None on the last page."""


@dataclass(frozen=True, slots=True)
class S3Failure:
    """What S3 says went wrong. Empty strings for what it does not say."""

    code: str = ""
    message: str = ""
    region: str = ""
    endpoint: str = ""


def parse_page(body: bytes, prefix: str) -> Page:
    """A page of a listing of `prefix`. Raises `StoreError` for anything else."""
    root = _parse(body)
    if _tag(root) != "ListBucketResult":
        raise StoreError(f"the reply to a listing is a <{_tag(root)[:40]}>, expected <ListBucketResult>; is this S3?")
    encoded = _text(root, "EncodingType") == "url"
    entries: list[Entry] = []
    for element in root:
        if _tag(element) != "Contents":
            continue
        fields = {_tag(child): (child.text or "") for child in element}
        raw, size = fields.get("Key", ""), fields.get("Size", "")
        key = raw
        if encoded:
            # AWS writes a space as '+'; some servers write %20 and leave a '+' alone. Our prefix tells which.
            key = unquote_plus(raw)
            if not key.startswith(prefix):
                key = unquote(raw)
        if not key.startswith(prefix) or not size.isascii() or not size.isdigit() or len(size) > _SIZE_DIGITS:
            raise StoreError(f"a listing shows key {key[:200]!r} of size {size[:20]!r}, expected keys below {prefix!r}")
        entries.append(
            Entry(key, int(size), clean_etag(fields.get("ETag", "")), _moment(fields.get("LastModified", "")))
        )
    if _text(root, "IsTruncated") != "true":
        return Page(tuple(entries), None)
    token = _text(root, "NextContinuationToken")
    if not token:
        raise StoreError("a listing says that it is truncated and gives no NextContinuationToken; the server is broken")
    return Page(tuple(entries), token)


def parse_failure(body: bytes) -> S3Failure:
    """The ``<Error>`` of a reply; empty when it is no such document (a proxy's HTML, nothing)."""
    try:
        root = _parse(body)
    except StoreError:
        return S3Failure()
    if _tag(root) == "ErrorResponse":  # some services wrap it
        root = next((child for child in root if _tag(child) == "Error"), root)
    if _tag(root) != "Error":
        return S3Failure()
    return S3Failure(
        code=_printable(_text(root, "Code"), 80),
        message=_printable(_text(root, "Message"), 300),
        region=_printable(_text(root, "Region"), 40),
        endpoint=_printable(_text(root, "Endpoint"), 200),
    )


def parse_upload_id(body: bytes) -> str:
    """The id in the reply to CreateMultipartUpload."""
    upload_id = _text(_parse(body), "UploadId")
    if not upload_id:
        raise StoreError(
            "the reply to CreateMultipartUpload has no UploadId; the server does not support large uploads"
        )
    return upload_id


def complete_upload(etags: list[str]) -> bytes:
    """The body of CompleteMultipartUpload; `etags` of parts 1, 2, ... as the server sent them."""
    parts = "".join(
        f"<Part><PartNumber>{number}</PartNumber><ETag>{escape(etag)}</ETag></Part>"
        for number, etag in enumerate(etags, 1)
    )
    return f"<CompleteMultipartUpload>{parts}</CompleteMultipartUpload>".encode()


def clean_etag(etag: str) -> str:
    """An ETag without quotes and weakness mark, so that a listing's and a reply's compare equal."""
    return etag.strip().removeprefix("W/").strip('"')


def _parse(body: bytes) -> ET.Element:
    # Entities need a document type; S3 never sends one. The encoding is fixed so that none can be hidden.
    if b"<!DOCTYPE" in body or b"<!ENTITY" in body or b"\0" in body:
        raise StoreError("the server's reply declares a document type or is not UTF-8; is that an S3 endpoint?")
    if body.count(b"<") + body.count(b"=") > _MARKUP:
        raise StoreError("the server's reply has more markup than any reply of S3; is that an S3 endpoint?")
    try:
        return ET.fromstring(body, ET.XMLParser(encoding="utf-8"))
    except ET.ParseError as error:
        raise StoreError(f"the server's reply is not XML ({error}): {body[:60]!r}; is that an S3 endpoint?") from None


def _tag(element: ET.Element) -> str:
    return element.tag.rpartition("}")[2]


def _text(root: ET.Element, name: str) -> str:
    return next((child.text or "" for child in root if _tag(child) == name), "")


def _moment(text: str) -> float:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return 0.0


def _printable(text: str, limit: int) -> str:
    return "".join(char if char.isprintable() else " " for char in text[:limit])
