"""From the settings of a replica to its URL, and the keys for it."""

from __future__ import annotations

import dataclasses
import os
import posixpath
import re
from pathlib import Path
from urllib.parse import parse_qsl, quote, urlencode

from lazyreplica.errors import ConfigError
from lazyreplica.litestream_yml import go
from lazyreplica.litestream_yml.document import Section
from lazyreplica.litestream_yml.paths import absolute
from lazyreplica.storage.credentials import Credentials, CredentialSource, find_credentials
from lazyreplica.storage.encryption import CustomerKey
from lazyreplica.storage.url import S3URL, FileURL, canonical_parameter, check_key_is_safe, parse_replica_url, quote_key

_SCHEME = re.compile(r"(\w+)://", re.ASCII)


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """Those of one replica, over the defaults at the top of the file."""

    replica: Section
    defaults: Section

    def text(self, key: str) -> str:
        return self.replica.text(key) or self.defaults.text(key)

    def flag(self, key: str) -> bool | None:
        own = self.replica.flag(key)
        return self.defaults.flag(key) if own is None else own

    def error(self, text: str, key: str = "") -> ConfigError:
        return self.replica.error(text, key)

    def where(self, key: str) -> str:
        return (self.replica if self.replica.text(key) else self.defaults).where(key)


def source_of(settings: Settings, relative: str | None) -> tuple[str, CredentialSource | None]:
    """URL and credentials of a replica.

    `relative` is the path of a database below a ``dir:``, which goes on its replica's path. Raises `ConfigError`.
    """
    replica = settings.replica
    url, path = replica.text("url"), replica.text("path")
    if _SCHEME.match(path):
        raise settings.error("path is a URL; write it as url", "path")
    if url and path:
        raise settings.error("has both url and path: Litestream refuses that", "url")
    age = replica.section("age") or settings.defaults.section("age")
    if age is not None and (age.has_items("identities") or age.has_items("recipients")):
        raise settings.error("is encrypted with age, which Litestream 0.5 refuses", "age")
    scheme = _SCHEME.match(url)
    kind = scheme[1].lower() if scheme else replica.text("type") or "file"
    if kind == "file":
        return _file_url(settings, url, path, relative), None
    if kind == "s3":
        return _s3_source(settings, _s3_url(settings, url, path, relative))
    raise settings.error(f"the replica's type is {kind!r}, supported are s3 and file", "type")


def _file_url(settings: Settings, url: str, path: str, relative: str | None) -> str:
    if url:
        # Litestream takes the path as it is written in the URL, encoded: file:///a%20b is a directory called a%20b.
        path, _, fragment = url.partition("://")[2].partition("?")[0].partition("#")
        path = go.escaped_path(path) + (f"#{fragment}" if fragment else "")
        if not path.startswith("/"):
            path = f"/{path}"
        relative = relative and quote(relative, safe="$&+,/:;=@")
    if not path:
        raise settings.error("a file replica needs a path")
    return str(FileURL(Path(absolute(posixpath.join(path, relative or "")))))


def _s3_url(settings: Settings, url: str, path: str, relative: str | None) -> str:
    """The replica's URL, without secrets."""
    query: dict[str, str] = {}
    force = settings.flag("force-path-style")
    endpoint = settings.text("endpoint")
    bucket = settings.text("bucket")
    if url:
        if bucket:
            raise settings.error("has both url and bucket: Litestream refuses that", "url")
        base, _, text = url.partition("?")
        query = _query(settings, text)
        if force or (force is None and endpoint):
            query["forcePathStyle"] = "true"
        if relative is not None:
            base = f"{base.rstrip('/')}/{quote(relative)}"
    else:
        if not bucket:
            raise settings.error("an s3 replica needs a bucket")
        if relative is not None:
            path = posixpath.normpath(posixpath.join(path, relative))
        base = f"s3://{bucket}/{quote_key(path.removesuffix('/') if path.strip('/') == '' else path)}"
        if force is not None:
            query["forcePathStyle"] = str(force).lower()
    if endpoint:
        # Here, without a scheme, Litestream takes even a local one for https.
        query["endpoint"] = endpoint if "://" in endpoint else f"https://{endpoint}"
    query |= {key: value for key in ("region", "sse-kms-key-id", "storage-class") if (value := settings.text(key))}
    if settings.replica.flag("skip-verify") or settings.defaults.flag("skip-verify"):
        query.setdefault("skipVerify", "true")
    return base + (f"?{urlencode(query, safe=':/', quote_via=quote)}" if query else "")


def _query(settings: Settings, text: str) -> dict[str, str]:
    """The parameters of a URL in the file; those that Litestream passes over there are named in a warning."""
    query: dict[str, str] = {}
    for given, value in parse_qsl(text):
        name = canonical_parameter(given)
        if name is None or name.startswith("sse-"):  # 0.5.17 takes what encrypts from the file's keys alone
            settings.replica.warn(f"Litestream does not take {given!r} from a URL here: ignored", "url")
        else:
            query.setdefault(name, value)
    return query


def _s3_source(settings: Settings, url: str) -> tuple[str, CredentialSource | None]:
    try:
        parsed = parse_replica_url(url)
    except ConfigError as exc:
        raise settings.error(str(exc)) from None
    assert isinstance(parsed, S3URL)
    credentials = None if parsed.anonymous else _credentials(settings)
    key = _customer_key(settings)
    if key is not None:
        if parsed.upload.kms_key:
            raise settings.error("has both sse-customer-key and sse-kms-key-id; files have one of them")
        check_key_is_safe(parsed.endpoint, settings.where("sse-customer-key"))
        credentials = credentials or find_credentials(anonymous=parsed.anonymous)
        credentials = dataclasses.replace(credentials, customer_key=key)
    return url, credentials


def _credentials(settings: Settings) -> CredentialSource | None:
    access, secret = settings.text("access-key-id"), settings.text("secret-access-key")
    if access and secret:
        found = Credentials(access, secret)
        where = settings.where("access-key-id")
        return CredentialSource(
            f"access-key-id in {where}", lambda: found, f"check access-key-id and secret-access-key in {where}"
        )
    if access or secret:
        settings.replica.warn(
            "has access-key-id or secret-access-key without the other: like Litestream, looking in the environment"
        )
    return None


def _customer_key(settings: Settings) -> CustomerKey | None:
    if place := settings.text("sse-customer-key-path"):
        where = settings.where("sse-customer-key-path")
        try:
            text = Path(place.replace("~", os.environ.get("HOME", "~"), place.startswith("~"))).read_text().strip()
        except OSError as exc:
            raise ConfigError(f"{where}: sse-customer-key-path {place!r} cannot be read: {exc.strerror}") from exc
        except UnicodeDecodeError:
            text = ""
    else:
        where, text = settings.where("sse-customer-key"), settings.text("sse-customer-key")
        if not text:
            return None
    return CustomerKey.parse(text, algorithm=settings.text("sse-customer-algorithm"), where=where)
