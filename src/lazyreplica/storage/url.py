"""Replica URLs: text in, frozen values out.

The spellings are Litestream 0.5's, so that one URL serves the primary and its readers. What its binary does
with each part was observed (0.5.17, against a server that logs requests); where we differ on purpose, a
comment says why.
"""

from __future__ import annotations

import ipaddress
import os
import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlencode, urlsplit

from lazyreplica.errors import ConfigError

DEFAULT_REGION = "us-east-1"

_SCHEMES = "s3://bucket/path?endpoint=... and file:///absolute/directory"
_SPELLINGS = {
    "endpoint": "endpoint",
    "region": "region",
    "forcePathStyle": "forcePathStyle",
    "force-path-style": "forcePathStyle",
    "skipVerify": "skipVerify",
    "skip-verify": "skipVerify",
    "anonymous": "anonymous",
    # How Litestream uploads and deletes. Accepted so that its URLs work here, and of no effect: we sign every
    # payload and delete nothing.
    "signPayload": "signPayload",
    "sign-payload": "signPayload",
    "requireContentMD5": "requireContentMD5",
    "require-content-md5": "requireContentMD5",
}
_KNOWN = "endpoint, region, forcePathStyle (force-path-style), skipVerify (skip-verify) and anonymous"
_TRUE = frozenset({"true", "1", "t", "yes"})
_FALSE = frozenset({"false", "0", "f", "no"})
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_REGION = re.compile(r"[A-Za-z0-9-]+")
_AWS_HOST = re.compile(r"s3(?:[.-](?P<region>[a-z0-9-]+))?\.amazonaws\.com(?:\.cn)?")
_PROVIDERS = (
    # Bucket in the host name: pattern, endpoint, path-style addressing.
    (re.compile(r"(?P<bucket>.+)\.(?P<host>localhost)"), "http://localhost", True),
    (
        re.compile(r"(?P<bucket>.+)\.s3\.(?P<region>[^.]+)\.backblazeb2\.com"),
        "https://s3.{region}.backblazeb2.com",
        True,
    ),
    (re.compile(r"(?P<bucket>.+)\.s3\.filebase\.com"), "https://s3.filebase.com", True),
    (
        re.compile(r"(?P<bucket>.+)\.(?P<region>[^.]+)\.digitaloceanspaces\.com"),
        "https://{region}.digitaloceanspaces.com",
        False,
    ),
    (
        re.compile(r"(?P<bucket>.+)\.s3\.(?P<region>[^.]+)\.scw\.cloud"),
        "https://s3.{region}.scw.cloud",
        False,
    ),
    (re.compile(r"(?P<bucket>.+)\.s3(?:[.-](?P<region>[a-z0-9-]+))?\.amazonaws\.com(?:\.cn)?"), None, False),
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
    path: str
    """Key prefix without slashes around it; empty for the bucket's root."""
    endpoint: str | None
    """``scheme://host[:port][/base]``, or None for AWS itself."""
    region: str
    path_style: bool
    """``endpoint/bucket/key`` instead of ``bucket.endpoint/key``."""
    skip_verify: bool = False
    """Accept any TLS certificate."""
    anonymous: bool = False
    """Send unsigned requests, whatever credentials there are."""

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
        return f"s3://{self.bucket}/{quote(self.path)}?{urlencode(query, safe=':/', quote_via=quote)}"


ReplicaURL = FileURL | S3URL


def parse_replica_url(url: str, environ: Mapping[str, str] = os.environ) -> ReplicaURL:
    """The value behind a replica URL; `environ` supplies the region and the endpoint where the URL does not.

    Equal replicas spelled differently give equal values. Raises `ConfigError` without echoing userinfo or
    query values, where secrets may lie.
    """
    if url.lower().startswith("s3://arn:"):
        raise ConfigError(f"replica URL {redact(url)!r} names an access point; write its alias as the bucket")
    try:
        parts = urlsplit(url)
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
    if parts.scheme == "file":
        return _parse_file(url, parts)
    if parts.scheme == "s3":
        return _parse_s3(url, parts, port, environ)
    if not parts.scheme or "://" not in url:
        raise ConfigError(f"replica URL {redact(url)!r} has no scheme; write {_SCHEMES}")
    raise ConfigError(f"replica URL {redact(url)!r} has the scheme {parts.scheme!r}; supported are {_SCHEMES}")


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
    return scheme + separator + rest


def _parse_file(url: str, parts: SplitResult) -> FileURL:
    path = _decode(url, parts.path)
    if parts.netloc not in {"", "localhost"} or not path.startswith("/"):
        found = parts.netloc + path
        raise ConfigError(
            f"replica URL {redact(url)!r} names the relative directory {found!r}; "
            f"write an absolute one with three slashes: file://{Path.cwd() / found}"
        )
    if parts.query:
        raise ConfigError(f"replica URL {redact(url)!r} has a query, file:// URLs take none; write %3F for a '?'")
    if "\0" in path:
        raise ConfigError(f"replica URL {redact(url)!r} contains %00, which no directory name can; remove it")
    return FileURL(Path("/" + posixpath.normpath(path).lstrip("/")))


def _parse_s3(url: str, parts: SplitResult, port: int | None, environ: Mapping[str, str]) -> S3URL:
    query = _parse_query(url, parts.query)
    bucket, endpoint, region, path_style = _parse_host(url, parts.netloc, port)
    region = query.get("region") or region
    if query.get("endpoint"):
        endpoint, path_style = _parse_endpoint(url, query["endpoint"]), None
    elif endpoint is None:
        # The SDK under Litestream takes these variables too (Tigris sets them), with the SDK's addressing.
        configured = environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL")
        if configured:
            endpoint = _parse_endpoint(url, configured)
            path_style = _must_be_path_style(endpoint)
            region = region or environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION")
    if endpoint and (aws := _AWS_HOST.fullmatch(endpoint.removeprefix("https://"))):
        named = aws["region"] or DEFAULT_REGION
        if region in {None, named}:  # AWS spelled out
            endpoint, region, path_style = None, named, None
    if region is None:
        # A custom endpoint does not inherit AWS_REGION: a Lambda function in eu-west-1 that reads from R2
        # would send R2 a region that it refuses. Litestream does the same.
        where = environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION") if endpoint is None else None
        region = where or DEFAULT_REGION
    if not _REGION.fullmatch(region):
        raise ConfigError(f"replica URL {redact(url)!r}: region is {region!r}, expected a name such as eu-west-1")
    forced = _flag(url, query, "forcePathStyle")
    if forced is not None:
        path_style = forced
    elif path_style is None:
        path_style = _default_path_style(bucket, endpoint)
    return S3URL(
        bucket=bucket,
        path=_clean(_decode(url, parts.path)),
        endpoint=endpoint,
        region=region,
        path_style=path_style,
        skip_verify=_flag(url, query, "skipVerify") or False,
        anonymous=_flag(url, query, "anonymous") or False,
    )


def _parse_host(url: str, netloc: str, port: int | None) -> tuple[str, str | None, str | None, bool | None]:
    """Bucket, endpoint, region and addressing that the URL's host tells; None for what it does not."""
    host = netloc.rpartition(":")[0] if port is not None else netloc.rstrip(":")
    suffix = f":{port}" if port is not None else ""
    for pattern, endpoint, path_style in _PROVIDERS:
        if match := pattern.fullmatch(host):
            groups = match.groupdict()
            region = groups.get("region")
            if endpoint is None and not suffix:
                return _checked_bucket(url, groups["bucket"]), None, region or DEFAULT_REGION, None
            if endpoint is not None:
                address = endpoint.format(region=region) + suffix
                return _checked_bucket(url, groups["bucket"]), address, region or DEFAULT_REGION, path_style
    if suffix:
        raise ConfigError(
            f"replica URL {redact(url)!r} has the port {port} where the bucket goes; "
            f"write s3://bucket/path?endpoint=http://{host}{suffix}"
        )
    return _checked_bucket(url, host), None, None, None


def _checked_bucket(url: str, bucket: str) -> str:
    if not bucket:
        raise ConfigError(f"replica URL {redact(url)!r} has no bucket; write s3://bucket/path")
    if not _BUCKET.fullmatch(bucket):
        raise ConfigError(
            f"replica URL {redact(url)!r}: {bucket!r} is not a bucket name (letters, digits, '.', '-', '_'); "
            "write s3://bucket/path"
        )
    return bucket


def _parse_query(url: str, text: str) -> dict[str, str]:
    query: dict[str, str] = {}
    for name, value in parse_qsl(text, keep_blank_values=True):
        known = _SPELLINGS.get(name)
        if known is None:
            raise ConfigError(f"replica URL {redact(url)!r}: parameter {name!r} is unknown; known are {_KNOWN}")
        if query.setdefault(known, value) != value:
            raise ConfigError(f"replica URL {redact(url)!r}: parameter {known!r} is given twice; keep one")
    return query


def _parse_endpoint(url: str, endpoint: str) -> str:
    """Normal form of an endpoint: lower-case host, no default port, no slash at the end."""
    try:
        if "://" not in endpoint:
            endpoint = ("http://" if _is_local(endpoint) else "https://") + endpoint
        parts = urlsplit(endpoint)
        host, port = (parts.hostname or "").encode("idna").decode(), parts.port
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


def _is_local(endpoint: str) -> bool:
    """Whether Litestream would speak plain HTTP to an endpoint that names no scheme."""
    host = urlsplit(f"//{endpoint}").hostname or ""
    if host.endswith((".local", ".localhost")) or host == "localhost":
        return True
    address = _address(host)
    return address is not None and (address.is_private or address.is_loopback)


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
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
    return endpoint is not None or "." in bucket


def _flag(url: str, query: Mapping[str, str], name: str) -> bool | None:
    text = query.get(name, "").lower()
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    if not text:
        return None
    raise ConfigError(f"replica URL {redact(url)!r}: {name} is {text!r}; write true or false")


def _decode(url: str, path: str) -> str:
    try:
        return unquote(path, errors="strict")
    except UnicodeDecodeError:
        raise ConfigError(
            f"replica URL {redact(url)!r}: the path's percent-encoding is not UTF-8; write %C3%A9 for é"
        ) from None


def _clean(path: str) -> str:
    """The path without slashes around it, without empty and dot segments."""
    cleaned = posixpath.normpath("/" + path.lstrip("/")).lstrip("/")
    return "" if cleaned == "." else cleaned
