"""S3's server-side encryption: the headers that objects need, and customer keys, which are secrets.

https://docs.aws.amazon.com/AmazonS3/latest/userguide/ServerSideEncryptionCustomerKeys.html
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from lazyreplica.errors import ConfigError

_PREFIX = "x-amz-server-side-encryption"
_HEADER_VALUE = re.compile(r"[!-~]*")


@dataclass(frozen=True, slots=True)
class CustomerKey:
    """A key that S3 encrypts with and does not keep (SSE-C): every request for an object's data carries it."""

    key: str = field(repr=False)
    """32 bytes in base64."""
    md5: str = field(repr=False)
    """Of the 32 bytes, in base64."""

    @classmethod
    def parse(cls, key: str, *, algorithm: str = "", md5: str = "", where: str) -> CustomerKey:
        """The key behind a configuration's texts. Raises `ConfigError` without them; `where` begins its message."""
        if algorithm not in {"", "AES256"}:
            raise ConfigError(f"{where}: sse-customer-algorithm must be AES256")
        try:
            raw = base64.b64decode(key, validate=True)
        except (binascii.Error, ValueError):
            raw = b""
        if len(raw) != 32:
            raise ConfigError(f"{where}: sse-customer-key is not 32 bytes in base64 (see `openssl rand -base64 32`)")
        import hashlib  # OpenSSL's, 3 ms: few have such a key

        digest = base64.b64encode(hashlib.md5(raw, usedforsecurity=False).digest()).decode()
        if md5 not in {"", digest}:
            raise ConfigError(f"{where}: sse-customer-key-md5 is not the MD5 of sse-customer-key; leave it out")
        return cls(key, digest)

    @property
    def headers(self) -> dict[str, str]:
        return {
            f"{_PREFIX}-customer-algorithm": "AES256",
            f"{_PREFIX}-customer-key": self.key,
            f"{_PREFIX}-customer-key-md5": self.md5,
        }


@dataclass(frozen=True, slots=True)
class Upload:
    """How new objects are stored. Readers need nothing of it."""

    kms_key: str = ""
    """The key in AWS's key management that S3 encrypts with (SSE-KMS)."""
    storage_class: str = ""

    @classmethod
    def parse(cls, kms_key: str, storage_class: str, *, where: str) -> Upload:
        """Raises `ConfigError` for what cannot stand in a header."""
        for name, value in (("sse-kms-key-id", kms_key), ("storage-class", storage_class)):
            if not _HEADER_VALUE.fullmatch(value):
                raise ConfigError(f"{where}: {name} is {value!r}, expected visible ASCII characters")
        return cls(kms_key, storage_class)

    @property
    def headers(self) -> dict[str, str]:
        headers = {"x-amz-storage-class": self.storage_class} if self.storage_class else {}
        if self.kms_key:
            headers |= {_PREFIX: "aws:kms", f"{_PREFIX}-aws-kms-key-id": self.kms_key}
        return headers


def object_headers(
    method: str, query: Iterable[str], customer_key: CustomerKey | None, upload: Upload
) -> Mapping[str, str]:
    """What a request for one object carries; `query` holds the names of its parameters.

    The key goes with data (GET, HEAD, PUT of an object or a part) and with the begin of a multipart upload, which also
    says how the object is stored.
    """
    names = set(query)
    begins = (method == "PUT" and "partNumber" not in names) or (method == "POST" and "uploads" in names)
    headers = upload.headers if begins else {}
    if customer_key is not None and (begins or method in {"GET", "HEAD", "PUT"}):
        headers |= customer_key.headers
    return headers
