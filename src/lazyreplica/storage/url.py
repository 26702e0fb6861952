"""Replica URLs: text in, frozen values out.

The spellings are Litestream 0.5's, so that one URL serves the primary and its readers. What its binary does
with each part was observed (0.5.17, against a server that logs requests); where we differ on purpose, a
comment says why.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlencode, urlsplit

from lazyreplica.errors import ConfigError
from lazyreplica.storage.encryption import CustomerKey, Upload
from lazyreplica.storage.providers import AWS_HOST, DEFAULT_REGION, bucket_in_host, misplaced

if TYPE_CHECKING:
    import ipaddress

_SCHEMES = "s3://bucket/path?endpoint=... and file:///absolute/directory"
_SPELLINGS = {
    "endpoint": "endpoint",
    "region": "region",
    "forcePathStyle": "forcePathStyle",
    "force-path-style": "forcePathStyle",
    "skipVerify": "skipVerify",
    "skip-verify": "skipVerify",
    "anonymous": "anonymous",
    "sseCustomerAlgorithm": "sse-customer-algorithm",
    "sse-customer-algorithm": "sse-customer-algorithm",
    "sseCustomerKey": "sse-customer-key",
    "sse-customer-key": "sse-customer-key",
    "sseCustomerKeyMD5": "sse-customer-key-md5",
    "sse-customer-key-md5": "sse-customer-key-md5",
    # How objects are written: `publish` does as Litestream does.
    "sseKmsKeyId": "sse-kms-key-id",
    "sse-kms-key-id": "sse-kms-key-id",
    "storageClass": "storage-class",
    "storage-class": "storage-class",
    # How Litestream uploads and deletes. Accepted so that its URLs work here, and of no effect: we sign every
    # payload and delete nothing.
    "signPayload": "signPayload",
    "sign-payload": "signPayload",
    "requireContentMD5": "requireContentMD5",
    "require-content-md5": "requireContentMD5",
    "partSize": "part-size",
    "part-size": "part-size",
    "concurrency": "concurrency",
}
_KNOWN = (
    "endpoint, region, forcePathStyle (force-path-style), skipVerify (skip-verify), sse-customer-key and anonymous, "
    "and for writers sse-kms-key-id, storage-class, sign-payload, require-content-md5, part-size and concurrency"
)
_TRUE = frozenset({"true", "1", "t", "yes"})
_FALSE = frozenset({"false", "0", "f", "no"})
_LABEL = 63
"""Characters of a part of a host name, at most (RFC 1035)."""
_SHOWN = 300
"""Characters of a URL, or of a part of it, that a message quotes, at most."""
_PARAMETER = re.compile(r"[A-Za-z_-]{1,40}")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_REGION = re.compile(r"[A-Za-z0-9-]+")
_ACCESS_POINT = re.compile(
    r"arn:(?P<partition>aws|aws-cn|aws-us-gov):s3:(?P<region>[a-z0-9-]+):(?P<account>[0-9]{12})"
    r":accesspoint/(?P<name>[a-z0-9][a-z0-9-]*)"
)


@dataclass(frozen=True, slots=True)
class FileURL:
    """A replica in a local directory. ``str()`` is canonical and safe to show."""

    path: Path
    """Absolute, without ``.`` and ``..``; symbolic links are left alone."""

    def __str__(self) -> str:
        return "file://" + quote(str(self.path))


@dataclass(frozen=True, slots=True)
class S3URL:
    """A replica on S3 or a service that speaks it. ``str()`` is canonical and holds no secret."""

    bucket: str
    """Its name, or the ARN of an access point to it."""
    path: str
    """Key prefix without the slash at its end; empty for the bucket's root."""
    endpoint: str | None
    """``scheme://host[:port][/base]``, or None for AWS itself."""
    region: str
    path_style: bool
    """``endpoint/bucket/key`` instead of ``bucket.endpoint/key``."""
    skip_verify: bool = False
    """Accept any TLS certificate."""
    anonymous: bool = False
    """Send unsigned requests, whatever credentials there are."""
    customer_key: CustomerKey | None = field(default=None, repr=False, compare=False)
    """A secret, and no part of what the URL names: it is in no canonical URL."""
    upload: Upload = field(default=Upload(), compare=False)
    """How new objects are stored; no part of what the URL names, either."""

    @property
    def origin(self) -> str:
        """``scheme://host[:port][/base]`` that requests go to, without the bucket."""
        if self.endpoint is not None:
            return self.endpoint
        return f"https://s3.{self.region}.amazonaws.com" + (".cn" if self.region.startswith("cn-") else "")

    @property
    def base_url(self) -> str:
        """The bucket's address: keys are appended to it after a slash."""
        if self.path_style:
            return f"{self.origin}/{self.bucket}"
        scheme, _, rest = self.origin.partition("://")
        if point := _ACCESS_POINT.fullmatch(self.bucket):
            # https://docs.aws.amazon.com/AmazonS3/latest/userguide/access-points-naming.html
            rest = rest if self.endpoint is not None else rest.replace("s3.", "s3-accesspoint.", 1)
            return f"{scheme}://{point['name']}-{point['account']}.{rest}"
        return f"{scheme}://{self.bucket}.{rest}"

    def __str__(self) -> str:
        query = {"endpoint": self.endpoint} if self.endpoint else {}
        query["region"] = self.region
        if self.path_style != _default_path_style(self.bucket, self.endpoint):
            query["forcePathStyle"] = str(self.path_style).lower()
        if self.skip_verify:
            query["skipVerify"] = "true"
        if self.anonymous:
            query["anonymous"] = "true"
        return f"s3://{self.bucket}/{quote_key(self.path)}?{urlencode(query, safe=':/', quote_via=quote)}"


ReplicaURL = FileURL | S3URL


def parse_replica_url(url: str, environ: Mapping[str, str] = os.environ) -> ReplicaURL:
    """The value behind a replica URL; `environ` supplies the region and the endpoint where the URL does not.

    Equal replicas spelled differently give equal values. Raises `ConfigError` without echoing userinfo or
    query values, where secrets may lie.
    """
    point, plain = _split_access_point(url)
    try:
        parts = urlsplit(plain)
        port = parts.port
    except ValueError:  # its text may quote a password that looks like a port
        raise ConfigError(f"replica URL {redact(url)!r} is malformed; write {_SCHEMES}") from None
    if "@" in parts.netloc:
        raise ConfigError(
            f"replica URL {redact(url)!r} carries credentials; take them out of the URL and set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment"
        )
    if "#" in url:
        raise ConfigError(f"replica URL {redact(url)!r} has a '#'; write %23 if it belongs to the path")
    if any(ord(char) < 0x20 for char in url):
        raise ConfigError(f"replica URL {redact(url)!r} contains a control character; remove it")
    if any(0xD800 <= ord(char) < 0xE000 for char in url):  # as Python reads arguments that are not UTF-8
        raise ConfigError(f"replica URL {redact(url)!r} is not UTF-8; rename what it names, or link to it")
    if parts.scheme == "file":
        return _parse_file(url, parts)
    if parts.scheme == "s3":
        return _parse_s3(url, parts, port, environ, point)
    if not parts.scheme or "://" not in url:
        raise ConfigError(f"replica URL {redact(url)!r} has no scheme; write {_SCHEMES}")
    raise ConfigError(f"replica URL {redact(url)!r} has the scheme {_brief(parts.scheme)!r}; supported are {_SCHEMES}")


def redact(url: str) -> str:
    """A URL that could not be parsed, fit for a message: without userinfo and query."""
    head = url.partition("?")[0].partition("#")[0]
    scheme, separator, rest = head.partition("://")
    if not separator:
        scheme, rest = "", head
    authority = rest.partition("/")[0]
    if "@" in authority or ":" in authority:
        # A password may itself contain slashes.
        rest = rest.rpartition("@")[2]
        host, colon, port = rest.partition("/")[0].partition(":")
        if colon and not host.startswith("[") and not port.isdigit():
            rest = host + rest[len(host) + 1 + len(port) :]  # a key whose "@" was forgotten
    return _brief(scheme + separator + rest)


def _brief(text: str) -> str:
    """What a message quotes of a text of any length."""
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def _parse_file(url: str, parts: SplitResult) -> FileURL:
    path = _decode(url, parts.path)
    if parts.netloc not in {"", "localhost"} or not path.startswith("/"):
        found = _brief(parts.netloc + path)
        raise ConfigError(
            f"replica URL {redact(url)!r} names the relative directory {found!r}; "
            f"write an absolute one with three slashes: file://{Path.cwd() / found}"
        )
    if parts.query:
        raise ConfigError(f"replica URL {redact(url)!r} has a query, file:// URLs take none; write %3F for a '?'")
    if "\0" in path:
        raise ConfigError(f"replica URL {redact(url)!r} contains %00, which no directory name can; remove it")
    return FileURL(Path("/" + posixpath.normpath(path).lstrip("/")))


def _split_access_point(url: str) -> tuple[re.Match[str] | None, str]:
    """The access point that a URL names, and the URL with the point's name as its bucket: an ARN is no host."""
    if not url.lower().startswith("s3://arn:"):
        return None, url
    arn, marker, rest = url[len("s3://") :].partition(":accesspoint/")
    name = re.split(r"[/?#]", rest, maxsplit=1)[0]
    point = _ACCESS_POINT.fullmatch(f"{arn}{marker}{name}")
    if point is None:
        raise ConfigError(
            f"replica URL {redact(url)!r} is not the ARN of an access point in one region; "
            "write s3://arn:aws:s3:REGION:ACCOUNT:accesspoint/NAME/path, or the access point's alias as the bucket"
        )
    return point, f"s3://{rest}"


def _parse_s3(
    url: str, parts: SplitResult, port: int | None, environ: Mapping[str, str], point: re.Match[str] | None
) -> S3URL:
    query = _parse_query(url, parts.query)
    bucket, endpoint, region, path_style = _parse_host(url, parts.netloc, port)
    region = query.get("region") or region
    if point is not None:
        bucket, region = point[0], point["region"]  # which signs, whatever else is said: so does the SDK
    if query.get("endpoint"):
        endpoint, path_style = _parse_endpoint(url, query["endpoint"]), None
    elif endpoint is None:
        # The SDK under Litestream takes these variables too (Tigris sets them), with the SDK's addressing.
        configured = environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL")
        if configured:
            endpoint = _parse_endpoint(url, configured)
            path_style = _must_be_path_style(endpoint)
            region = region or environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION")
    if endpoint and (aws := AWS_HOST.fullmatch(endpoint.removeprefix("https://"))):
        named = aws["region"] or DEFAULT_REGION
        if region in {None, named}:  # AWS spelled out
            endpoint, region, path_style = None, named, None
    if region is None:
        # A custom endpoint does not inherit AWS_REGION: a Lambda function in eu-west-1 that reads from R2
        # would send R2 a region that it refuses. Litestream does the same.
        where = environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION") if endpoint is None else None
        region = where or DEFAULT_REGION
    if not _REGION.fullmatch(region):
        raise ConfigError(
            f"replica URL {redact(url)!r}: region is {_brief(region)!r}, expected a name such as eu-west-1"
        )
    forced = _flag(url, query, "forcePathStyle")
    if point is not None:
        if forced:
            raise ConfigError(f"replica URL {redact(url)!r}: an access point has no path style; remove forcePathStyle")
        path_style = False
    elif forced is not None:
        path_style = forced
    elif path_style is None:
        path_style = _default_path_style(bucket, endpoint)
    return S3URL(
        bucket=bucket,
        path=_decode(url, _clean(parts.path)),
        endpoint=endpoint,
        region=region,
        path_style=path_style,
        skip_verify=_flag(url, query, "skipVerify") or False,
        anonymous=_flag(url, query, "anonymous") or False,
        customer_key=_customer_key(url, query, endpoint),
        upload=Upload.parse(
            query.get("sse-kms-key-id", ""), query.get("storage-class", ""), where=f"replica URL {redact(url)!r}"
        ),
    )


def _customer_key(url: str, query: Mapping[str, str], endpoint: str | None) -> CustomerKey | None:
    if not query.get("sse-customer-key"):
        return None
    where = f"replica URL {redact(url)!r}"
    if query.get("sse-kms-key-id"):
        raise ConfigError(f"{where} has both sse-customer-key and sse-kms-key-id; files have one of them")
    key = CustomerKey.parse(
        query["sse-customer-key"],
        algorithm=query.get("sse-customer-algorithm", ""),
        md5=query.get("sse-customer-key-md5", ""),
        where=where,
    )
    check_key_is_safe(endpoint, where)
    return key


def check_key_is_safe(endpoint: str | None, where: str) -> None:
    """Raise `ConfigError` where a customer key would travel in the clear, as Litestream and S3 refuse it."""
    if endpoint is not None and endpoint.startswith("http://") and not _is_local(endpoint.removeprefix("http://")):
        raise ConfigError(f"{where}: sse-customer-key needs an endpoint with https://")


def _parse_host(url: str, netloc: str, port: int | None) -> tuple[str, str | None, str | None, bool | None]:
    """Bucket, endpoint, region and addressing that the URL's host tells; None for what it does not."""
    host = netloc.rpartition(":")[0] if port is not None else netloc.rstrip(":")
    suffix = f":{port}" if port is not None else ""
    if found := bucket_in_host(host):
        if found.endpoint is not None:
            endpoint = _parse_endpoint(url, found.endpoint + suffix)  # without the scheme's own port
            return _checked_bucket(url, found.bucket), endpoint, found.region, found.path_style
        if not suffix:
            return _checked_bucket(url, found.bucket), None, found.region, None
    if suffix:
        raise ConfigError(
            f"replica URL {redact(url)!r} has the port {port} where the bucket goes; "
            f"write s3://bucket/path?endpoint=http://{_brief(host)}{suffix}"
        )
    if place := misplaced(host):
        raise ConfigError(
            f"replica URL {redact(url)!r} has a host where the bucket goes, which Litestream would take for a bucket "
            f"of AWS; write {_brief(place)}"
        )
    return _checked_bucket(url, host), None, None, None


def _checked_bucket(url: str, bucket: str) -> str:
    if not bucket:
        raise ConfigError(f"replica URL {redact(url)!r} has no bucket; write s3://bucket/path")
    if not _BUCKET.fullmatch(bucket):
        raise ConfigError(
            f"replica URL {redact(url)!r}: {_brief(bucket)!r} is not a bucket name (letters, digits, '.', '-', '_'); "
            "write s3://bucket/path"
        )
    if bucket_in_host(bucket) or misplaced(bucket):
        # Its canonical form would be read as that other place.
        raise ConfigError(f"replica URL {redact(url)!r}: bucket {_brief(bucket)!r} cannot be told from a host name")
    return bucket


def canonical_parameter(name: str) -> str | None:
    """The one spelling of a URL's parameter; None for one that is unknown."""
    return _SPELLINGS.get(name)


def _parse_query(url: str, text: str) -> dict[str, str]:
    query: dict[str, str] = {}
    for name, value in parse_qsl(text, keep_blank_values=True):
        known = _SPELLINGS.get(name)
        if known is None:
            shown = f"parameter {name!r}" if _PARAMETER.fullmatch(name) else "a parameter"  # a stray part may be a key
            raise ConfigError(f"replica URL {redact(url)!r}: {shown} is unknown; known are {_KNOWN}")
        if query.setdefault(known, value) != value:
            raise ConfigError(f"replica URL {redact(url)!r}: parameter {known!r} is given twice; keep one")
    return query


def _parse_endpoint(url: str, endpoint: str) -> str:
    """Normal form of an endpoint: lower-case host, no default port, no slash at the end."""
    try:
        if "://" not in endpoint:
            endpoint = ("http://" if _is_local(endpoint) else "https://") + endpoint
        parts = urlsplit(endpoint)
        host, port = _ascii(parts.hostname or ""), parts.port
    except (ValueError, UnicodeError):
        host, port, parts = "", None, urlsplit("")
    if "@" in parts.netloc:
        raise ConfigError(
            f"replica URL {redact(url)!r}: the endpoint carries credentials; set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY in the environment instead"
        )
    if parts.scheme not in {"http", "https"} or not host or parts.query or parts.fragment:
        raise ConfigError(
            f"replica URL {redact(url)!r}: endpoint {redact(endpoint)!r} is not an address; "
            "write https://host or http://host:port"
        )
    shown = f"[{host}]" if ":" in host else host
    default = 443 if parts.scheme == "https" else 80
    suffix = "" if port in {None, default} else f":{port}"
    base = _clean(parts.path)
    return f"{parts.scheme}://{shown}{suffix}" + (f"/{base}" if base else "")


def _ascii(host: str) -> str:
    """The host name as DNS has it (IDNA, RFC 3490). Raises `UnicodeError`."""
    if not host.isascii():
        return host.encode("idna").decode()
    # What that codec does for such a name. Python loads it when it is first asked for: 1 ms of an open.
    *labels, last = host.split(".")
    if not all(0 < len(label) <= _LABEL for label in labels) or len(last) > _LABEL:
        raise UnicodeError("a label of the host name is empty or too long")
    return host


def _is_local(endpoint: str) -> bool:
    """Whether Litestream would speak plain HTTP to an endpoint that names no scheme."""
    host = urlsplit(f"//{endpoint}").hostname or ""
    if host.endswith((".local", ".localhost")) or host == "localhost":
        return True
    address = _address(host)
    return address is not None and (address.is_private or address.is_loopback)


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    import ipaddress  # a replica in local files needs none

    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _must_be_path_style(endpoint: str) -> bool:
    """Whether no bucket can be put before the host: an address, or a name without a dot."""
    host = urlsplit(endpoint).hostname or ""
    return _address(host) is not None or "." not in host


def _default_path_style(bucket: str, endpoint: str | None) -> bool:
    # *.s3.amazonaws.com certificates cover one label, so a bucket with dots has no valid host of its own.
    return not _ACCESS_POINT.fullmatch(bucket) and (endpoint is not None or "." in bucket)


def _flag(url: str, query: Mapping[str, str], name: str) -> bool | None:
    text = query.get(name, "").lower()
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    if not text:
        return None
    raise ConfigError(f"replica URL {redact(url)!r}: {name} is {_brief(text)!r}; write true or false")


def _decode(url: str, path: str) -> str:
    try:
        return unquote(path, errors="strict")
    except UnicodeDecodeError:
        raise ConfigError(
            f"replica URL {redact(url)!r}: the path's percent-encoding is not UTF-8; write %C3%A9 for é"
        ) from None


def quote_key(path: str) -> str:
    """A key prefix as the path of a URL that is parsed to just that.

    Litestream cleans the paths of URLs, but not those of ``path:`` in litestream.yml: ``/db`` and ``db/`` are real
    prefixes there. A slash or dot that must not be cleaned away is percent-encoded. (Litestream cleans these, too; in
    its own URLs nobody writes them.)
    """
    quoted = quote(path)
    return quoted if _clean(quoted) == quoted else quote(path, safe="").replace(".", "%2E")


def _clean(path: str) -> str:
    """The path without slashes around it, without empty and dot segments."""
    cleaned = posixpath.normpath("/" + path.lstrip("/")).lstrip("/")
    return "" if cleaned == "." else cleaned
