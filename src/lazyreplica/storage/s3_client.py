"""Signed, retried requests to one bucket, and S3's refusals as our exceptions."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import BinaryIO, TypeVar
from urllib.parse import urlsplit

from lazyreplica.errors import AccessDenied, BucketNotFound, StoreError
from lazyreplica.storage.credentials import Credentials, CredentialSource, to_texts
from lazyreplica.storage.encryption import object_headers
from lazyreplica.storage.retry import Deadline, TransientError, retrying
from lazyreplica.storage.s3_xml import S3Failure, parse_failure
from lazyreplica.storage.sigv4 import EMPTY_SHA256, encode_path, encode_query, sign
from lazyreplica.storage.transport import Connections, Exchange, Head, Pending, Reply, Window
from lazyreplica.storage.url import S3URL
from lazyreplica.storage.waiting import wait

logger = logging.getLogger("lazyreplica.storage.s3")

T = TypeVar("T")
_CHUNK = 1 << 16
_ERROR_BYTES = 1 << 16
"""How much of a refusal is read."""
_RETRIED = frozenset({408, 429})
_RETRIED_CODES = frozenset({"RequestTimeout", "InternalError", "SlowDown", "ServiceUnavailable"})
_NOT_RETRIED = frozenset({501, 505})
_EXPIRED = "the session is over: renew the credentials"
_DENIED = {
    "SignatureDoesNotMatch": "the secret key is wrong",
    "InvalidAccessKeyId": "the access key is unknown there",
    "ExpiredToken": _EXPIRED,
    "InvalidToken": "the session token does not belong to the keys",
    "TokenRefreshRequired": _EXPIRED,
    "RequestTimeTooSkewed": "this machine's clock is wrong: set it (NTP)",
    "AccessDenied": "the keys lack s3:ListBucket, s3:GetObject or (to publish) s3:PutObject there",
}
_RENEWED = frozenset({"ExpiredToken", "TokenRefreshRequired", "InvalidToken", "InvalidAccessKeyId"})
"""Refusals of keys that may have been replaced meanwhile."""
_ELSEWHERE = frozenset(
    {
        "PermanentRedirect",
        "TemporaryRedirect",
        "AuthorizationHeaderMalformed",
        "IllegalLocationConstraintException",
    }
)


@dataclass(frozen=True, slots=True)
class Body:
    """A stretch of a seekable file, sent again from its start at each attempt."""

    source: BinaryIO
    start: int
    size: int
    sha256: str
    """Hex; part of the signature."""

    def chunks(self) -> Iterator[bytes]:
        self.source.seek(self.start)
        left = self.size
        while left and (chunk := self.source.read(min(_CHUNK, left))):
            left -= len(chunk)
            yield chunk


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked; everything that differs between attempts (date, signature) is added later."""

    method: str
    key: str | None
    """None addresses the bucket."""
    what: str
    """For messages: ``reading level 0 file ...``."""
    query: Sequence[tuple[str, str]] = ()
    headers: Mapping[str, str] | None = None
    body: Body | None = None


@dataclass(frozen=True, slots=True)
class Started:
    """A request under way, and the keys that signed it."""

    pending: Pending
    credentials: Credentials | None


class S3Client:
    """The bucket of one URL. Thread-safe."""

    def __init__(self, url: S3URL, credentials: CredentialSource) -> None:
        self.url = url
        self._credentials = credentials
        self._customer_key = credentials.customer_key or url.customer_key
        parts = urlsplit(url.base_url)
        self._host = parts.netloc
        self._base = parts.path
        self.requests = self.retries = 0
        self._connections = Connections(f"{parts.scheme}://{parts.netloc}", skip_verify=url.skip_verify)

    def call(
        self,
        request: Request,
        deadline: Deadline,
        accept: Callable[[Reply], T],
        window: Callable[[Head], Window],
    ) -> T:
        """Send until `accept` makes something of a reply.

        `window` says how much of a successful body to read. `accept` gets every reply that is not worth
        another attempt, refusals too (see `refusal`), and may raise `TransientError` to ask for one.
        """
        return retrying(
            functools.partial(self._attempt, request, deadline, accept, window),
            what=f"{self.url}: {request.what}",
            deadline=deadline,
            sleep=self._pause,
        )

    def _pause(self, seconds: float) -> None:
        """Before another attempt."""
        self.retries += 1
        wait(self._connections.closed, seconds)

    def _attempt(
        self,
        request: Request,
        deadline: Deadline,
        accept: Callable[[Reply], T],
        window: Callable[[Head], Window],
    ) -> T:
        credentials = self._credentials.get()
        self.requests += 1
        reply = self._connections.exchange(self._signed(request, credentials), _or_refusal(window), deadline)
        return self._judge(reply, accept, credentials)

    def keys(self) -> dict[str, str]:
        """Today's credentials, and the key of the files: see `Store.keys`."""
        return to_texts(self._credentials.get(), self._customer_key)

    def start(self, request: Request, deadline: Deadline, *, connect: bool) -> Started | None:
        """Send, and come back for the reply with `finish`, or `abandon` it. None: see `Connections.send`.

        No second attempts here: raises `TransientError` for what may be worth one.
        """
        credentials = self._credentials.get()
        pending = self._connections.send(self._signed(request, credentials), deadline, connect=connect)
        if pending is None:
            return None
        self.requests += 1
        return Started(pending, credentials)

    def finish(self, started: Started, accept: Callable[[Reply], T], window: Callable[[Head], Window]) -> T:
        """What `accept` makes of the reply. Raises `TransientError` too."""
        reply = self._connections.receive(started.pending, _or_refusal(window))
        return self._judge(reply, accept, started.credentials)

    def abandon(self, started: Started) -> None:
        """Nobody wants the reply."""
        self._connections.abandon(started.pending)

    def _signed(self, request: Request, credentials: Credentials | None) -> Exchange:
        body = request.body
        path = encode_path(self._base + ("" if request.key is None else f"/{request.key}")) or "/"
        query = encode_query(request.query)
        # Everything that is signed; identity because a compressed range is no range of the file.
        headers = {"host": self._host, "accept-encoding": "identity", **(request.headers or {})}
        if request.key is not None:
            names = (name for name, _ in request.query)
            headers |= object_headers(request.method, names, self._customer_key, self.url.upload)
        if credentials is not None:
            headers |= sign(
                method=request.method,
                path=path,
                query=query,
                headers=headers,
                payload_hash=body.sha256 if body else EMPTY_SHA256,
                credentials=credentials,
                region=self.url.region,
                now=datetime.now(UTC),
            )
        headers["user-agent"] = "lazyreplica"
        if body is not None or request.method in {"PUT", "POST"}:
            headers["content-length"] = str(body.size if body else 0)
        target = f"{path}?{query}" if query else path
        return Exchange(request.method, target, list(headers.items()), body.chunks() if body else None)

    def _judge(self, reply: Reply, accept: Callable[[Reply], T], credentials: Credentials | None) -> T:
        status = reply.head.status
        if status < 400:
            return accept(reply)
        failure = parse_failure(reply.body)
        if (
            status in _RETRIED
            or (status >= 500 and status not in _NOT_RETRIED)
            or (status == 400 and failure.code in _RETRIED_CODES)
        ):
            raise TransientError(f"HTTP {status} {_said(failure)}", not_before=_retry_after(reply.head))
        # Each renewal that goes on brings other keys, so this comes to an end.
        if failure.code in _RENEWED and credentials is not None and self._credentials.renew(credentials):
            logger.info("%s: %s: going on with renewed credentials", self.url, _said(failure))
            raise TransientError(f"HTTP {status} {_said(failure)}")
        return accept(reply)

    def refusal(self, reply: Reply, request: Request) -> StoreError:
        """The exception for a reply that is neither success nor a missing key."""
        status, headers = reply.head.status, reply.head.headers
        failure = parse_failure(reply.body)
        where = f"{self.url}: {request.what}"
        found = f"HTTP {status} {_said(failure)}"
        region = headers.get("x-amz-bucket-region") or failure.region
        if failure.code == "NoSuchBucket":
            return BucketNotFound(
                f"{where}: bucket {self.url.bucket!r} does not exist at {self.url.origin}; check bucket and endpoint"
            )
        if 300 <= status < 400 or failure.code in _ELSEWHERE:
            place = failure.endpoint or urlsplit(headers.get("location", "")).netloc
            advice = []
            if region:
                advice.append(f"write region={region} into the URL")
            if place:
                advice.append(f"the server names the endpoint {place}")
            todo = "; ".join(advice) or "check region and endpoint"
            return BucketNotFound(f"{where}: the bucket is not in region {self.url.region} ({found}); {todo}")
        if status in {401, 403} or failure.code in _DENIED:
            reason = _DENIED.get(failure.code, "the request was not allowed")
            if self._customer_key is not None and failure.code == "AccessDenied":
                reason += ", or the file was written with another sse-customer-key"
            return AccessDenied(
                f"{where}: {found}: {reason}. Used: {self._credentials.description}; {self._credentials.advice}"
            )
        unsigned = "" if self._credentials.get() else f"; no credentials were found: {self._credentials.advice}"
        return StoreError(
            f"{where}: unexpected reply {found} from {self.url.origin}; is that an S3 endpoint?{unsigned}"
        )

    def prepare(self, timeout: float) -> None:
        """See `Connections.prepare`."""
        self._connections.prepare(timeout)

    @property
    def ready(self) -> int:
        """See `Connections.ready`."""
        return self._connections.ready

    def close(self) -> None:
        self._connections.close()


def _or_refusal(window: Callable[[Head], Window]) -> Callable[[Head], Window]:
    return lambda head: window(head) if head.status < 300 else Window(0, _ERROR_BYTES)


def _retry_after(head: Head) -> float:
    """Seconds that the server wants to be left alone (RFC 9110, section 10.2.3); 0 if it does not say."""
    text = head.headers.get("retry-after", "").strip()
    if text.isascii() and text.isdigit() and len(text) < 10:
        return float(text)
    try:
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):  # no date, or one without a time zone
        return 0.0


def _said(failure: S3Failure) -> str:
    return f"{failure.code or 'without an S3 error code'}" + (f" ({failure.message})" if failure.message else "")


def ignore_body(_: Head) -> Window:
    """For replies whose headers say it all."""
    return Window(0, 0)


def whole_body(_: Head) -> Window:
    """For small documents."""
    return Window(0, _ERROR_BYTES)
