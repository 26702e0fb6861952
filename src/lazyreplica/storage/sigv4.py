"""AWS Signature Version 4 in the ``Authorization`` header. Pure: bytes and a moment in, headers out.

https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from urllib.parse import quote

from lazyreplica.storage.credentials import Credentials

UNSIGNED_PAYLOAD = "UNSIGNED-PAYLOAD"
EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()

_ALGORITHM = "AWS4-HMAC-SHA256"


def encode_path(path: str) -> str:
    """A URL path as S3 signs it: every byte but unreserved characters and slashes percent-encoded, once."""
    return quote(path, safe="/-._~")


def encode_query(pairs: Iterable[tuple[str, str]]) -> str:
    """A query string in the order and encoding that is signed; send it as it is."""
    encoded = sorted((quote(name, safe="-._~"), quote(value, safe="-._~")) for name, value in pairs)
    return "&".join(f"{name}={value}" for name, value in encoded)


def sign(
    *,
    method: str,
    path: str,
    query: str,
    headers: Mapping[str, str],
    payload_hash: str,
    credentials: Credentials,
    region: str,
    now: datetime,
    service: str = "s3",
) -> dict[str, str]:
    """The headers to add to a request.

    `path` and `query` come from `encode_path` and `encode_query`. `headers` must hold ``host``, and everything
    in it is signed. `payload_hash` is the body's SHA-256 in hex, or `UNSIGNED_PAYLOAD`.
    """
    moment = now.astimezone(UTC).strftime("%Y%m%dT%H%M%SZ")
    added = {"x-amz-content-sha256": payload_hash, "x-amz-date": moment}
    if credentials.session_token:
        added["x-amz-security-token"] = credentials.session_token
    signed = {name.lower(): " ".join(value.split()) for name, value in {**headers, **added}.items()}
    names = ";".join(sorted(signed))
    canonical = "\n".join(
        [method, path, query, *(f"{name}:{signed[name]}" for name in sorted(signed)), "", names, payload_hash]
    )
    scope = f"{moment[:8]}/{region}/{service}/aws4_request"
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    key = f"AWS4{credentials.secret_key}".encode()
    for part in (moment[:8], region, service, "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.digest(key, "\n".join([_ALGORITHM, moment, scope, digest]).encode(), "sha256").hex()
    added["authorization"] = (
        f"{_ALGORITHM} Credential={credentials.access_key}/{scope}, SignedHeaders={names}, Signature={signature}"
    )
    return added
