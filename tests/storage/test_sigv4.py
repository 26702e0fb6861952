"""Our signatures against botocore's."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

import botocore.auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials as TheirCredentials
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyreplica.storage.credentials import Credentials
from lazyreplica.storage.sigv4 import EMPTY_SHA256, UNSIGNED_PAYLOAD, encode_path, encode_query, sign

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
HEADER = st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=20)
HEADER_NAME = st.from_regex(r"[a-z][a-z0-9-]{0,12}", fullmatch=True)


def theirs(url: str, method: str, headers: dict[str, str], payload: str, keys: Credentials, now: datetime) -> Any:
    request = AWSRequest(method=method, url=url, headers=dict(headers))
    request.context["payload_signing_enabled"] = True
    request.headers["X-Amz-Content-SHA256"] = payload
    signer = botocore.auth.S3SigV4Auth(
        TheirCredentials(keys.access_key, keys.secret_key, keys.session_token), "s3", "eu-west-1"
    )
    with (
        mock.patch.object(botocore.auth, "get_current_datetime", return_value=now, create=True),
        mock.patch.object(type(signer), "payload", lambda *_: payload),
    ):
        signer.add_auth(request)
    return request


@settings(deadline=None)  # a busy machine is no failure
@given(
    key=TEXT,
    query=st.dictionaries(TEXT.filter(bool), TEXT, max_size=4),
    extra=st.dictionaries(HEADER_NAME.map("x-amz-meta-{}".format), HEADER, max_size=3),
    token=st.none() | st.just("session/token+="),
    method=st.sampled_from(["GET", "PUT", "POST", "DELETE"]),
    payload=st.sampled_from([EMPTY_SHA256, UNSIGNED_PAYLOAD, hashlib.sha256(b"x").hexdigest()]),
    now=st.datetimes(datetime(2000, 1, 1), datetime(2099, 1, 1), timezones=st.just(UTC)),
)
def test_equals_botocore(
    key: str,
    query: dict[str, str],
    extra: dict[str, str],
    token: str | None,
    method: str,
    payload: str,
    now: datetime,
) -> None:
    keys = Credentials("AKID", "se/cret+key", token)
    path, encoded = encode_path(f"/bucket/{key}"), encode_query(query.items())
    url = f"http://127.0.0.1:9000{path}" + (f"?{encoded}" if encoded else "")
    headers = {"host": urlsplit(url).netloc, "range": "bytes=0-9", **extra}
    ours = sign(
        method=method,
        path=path,
        query=encoded,
        headers=headers,
        payload_hash=payload,
        credentials=keys,
        region="eu-west-1",
        now=now,
    )
    other = theirs(url, method, {k: v for k, v in headers.items() if k != "host"}, payload, keys, now)
    assert ours["x-amz-date"] == other.headers["X-Amz-Date"]
    assert ours["authorization"] == other.headers["Authorization"]
    assert ours.get("x-amz-security-token") == other.headers.get("X-Amz-Security-Token")


def test_example_of_the_documentation() -> None:
    """GET Object with a range, from "Examples: Signature Calculations" of the S3 API reference."""
    headers = sign(
        method="GET",
        path="/test.txt",
        query="",
        headers={"host": "examplebucket.s3.amazonaws.com", "range": "bytes=0-9"},
        payload_hash=EMPTY_SHA256,
        credentials=Credentials("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"),
        region="us-east-1",
        now=datetime(2013, 5, 24, tzinfo=UTC),
    )
    assert headers["authorization"].endswith(
        "Signature=f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"
    )
