"""What the environment says about networks: certificate authorities and proxies."""

from __future__ import annotations

import logging
import os
import ssl
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from lazyreplica.errors import ConfigError

logger = logging.getLogger("lazyreplica.storage.network_env")


def tls_context(skip_verify: bool) -> ssl.SSLContext:
    """Certificates to trust: AWS_CA_BUNDLE, SSL_CERT_FILE, SSL_CERT_DIR or REQUESTS_CA_BUNDLE, else certifi's."""
    if skip_verify:
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context
    for name in ("AWS_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"):
        place = os.environ.get(name)
        if not place:
            continue
        try:
            if Path(place).is_dir():
                return ssl.create_default_context(capath=place)
            return ssl.create_default_context(cafile=place)
        except OSError as error:
            logger.warning("%s is %r, which cannot be read as certificates (%s): ignored", name, place, error)
    import certifi  # needed for https only

    return ssl.create_default_context(cafile=certifi.where())


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy, and the credentials for it."""

    url: str
    auth: tuple[str, str] | None = field(repr=False)
    """User name and password."""


def proxy_for(scheme: str, host: str) -> Proxy | None:
    """The proxy that HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY name for a host."""
    proxies = urllib.request.getproxies_environment()
    url = proxies.get(scheme) or proxies.get("all")
    if not url or urllib.request.proxy_bypass_environment(  # type: ignore[attr-defined]
        host, proxies
    ):
        return None
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ConfigError(
            f"the proxy for {scheme}:// has the scheme {parts.scheme!r}, supported are http:// and https:// "
            f"proxies; put {host} into NO_PROXY to go without"
        )
    auth = (unquote(parts.username), unquote(parts.password or "")) if parts.username else None
    shown = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    port = f":{parts.port}" if parts.port else ""
    return Proxy(f"{parts.scheme}://{shown}{port}/", auth)
