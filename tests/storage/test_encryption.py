"""Customer keys and storage classes as S3 sees them: which requests carry which headers, signed."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest
from scripted import CONTENT, FILE, NAME, Asked, ScriptedServer, answer, failure, listing, ranged

from lazyreplica.errors import AccessDenied
from lazyreplica.storage import open_store
from lazyreplica.storage.credentials import Credentials, CredentialSource
from lazyreplica.storage.encryption import CustomerKey
from lazyreplica.storage.s3 import S3Store
from lazyreplica.storage.url import S3URL, parse_replica_url

KEY = "MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE="
HEADERS = {
    "x-amz-server-side-encryption-customer-algorithm": "AES256",
    "x-amz-server-side-encryption-customer-key": KEY,
    "x-amz-server-side-encryption-customer-key-md5": "KYvwGXoFFJ42a2u2GDWhwQ==",
}
KMS = {
    "x-amz-server-side-encryption": "aws:kms",
    "x-amz-server-side-encryption-aws-kms-key-id": "kid",
    "x-amz-storage-class": "STANDARD_IA",
}


@pytest.fixture(autouse=True)
def _keys(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    caplog.set_level(logging.DEBUG)
    yield
    assert KEY not in caplog.text


def extra(asked: Asked) -> dict[str, str]:
    """What a request says about encryption and storage; all of it must be signed."""
    found = {
        name: value for name, value in asked.headers.items() if "encryption" in name or name == "x-amz-storage-class"
    }
    assert all(name in asked.headers["authorization"].partition("SignedHeaders=")[2] for name in found)
    return found


@pytest.mark.parametrize("place", ["url", "credentials"])
def test_reading_with_a_customer_key(place: str) -> None:
    with ScriptedServer([listing(), ranged()]) as server:
        credentials = None
        if place == "credentials":
            found = Credentials("someone", "secret")
            key = CustomerKey.parse(KEY, where="test")
            credentials = CredentialSource("a test", lambda: found, "none", customer_key=key)
        store = open_store(server.url() + (f"&sse-customer-key={KEY}" if place == "url" else ""), credentials)
        store.list_all(10)
        assert store.read(FILE, 0, 50, 10) == CONTENT[:50]
        assert store.get(0, NAME, 50, 10) is not None
        assert list(store.read_many([(FILE, 5, 5)], 10)) == [CONTENT[5:10]]
        assert KEY not in store.url + repr(store)
        store.close()
    assert [extra(asked) for asked in server.asked] == [{}, HEADERS, HEADERS, HEADERS]


def test_another_key_is_named_as_a_reason() -> None:
    with ScriptedServer([failure(403, "AccessDenied")]) as server:
        store = open_store(server.url() + f"&sse-customer-key={KEY}")
        with pytest.raises(AccessDenied, match="or the file was written with another sse-customer-key") as caught:
            store.read(FILE, 0, 50, 10)
        assert KEY not in str(caught.value)
        store.close()


@pytest.mark.parametrize(
    ("query", "whole", "parts"),
    [
        (f"&sse-customer-key={KEY}", HEADERS, [HEADERS, HEADERS, HEADERS, {}]),
        ("&sse-kms-key-id=kid&storage-class=STANDARD_IA", KMS, [KMS, {}, {}, {}]),
    ],
)
def test_publishing(query: str, whole: dict[str, str], parts: list[dict[str, str]]) -> None:
    begun = answer(200, b"<InitiateMultipartUploadResult><UploadId>u</UploadId></InitiateMultipartUploadResult>")
    done = answer(200, b"<CompleteMultipartUploadResult/>")
    put = answer(200, etag='"e"')
    with ScriptedServer([put, put, begun, put, put, done]) as server:
        url = parse_replica_url(server.url() + query)
        assert isinstance(url, S3URL)
        store = S3Store(url, multipart_threshold=600)
        store.put(0, NAME, io.BytesIO(CONTENT[:500]), 500, 0, 10)
        store.write_note("note.json", b"{}", 10)
        store.put(0, NAME, io.BytesIO(CONTENT), len(CONTENT), 0, 10)
        store.close()
    assert [extra(asked) for asked in server.asked] == [whole, whole, *parts]
