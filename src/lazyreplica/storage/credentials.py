"""Where the keys for S3 come from. They are asked for at every request, so that roles can refresh.

Those that a service calls expired are looked for once more where they came from: somebody may have renewed them.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lazyreplica.errors import AccessDenied, ConfigError
from lazyreplica.storage.encryption import CustomerKey

logger = logging.getLogger("lazyreplica.storage.credentials")

_SET_THEM = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or LITESTREAM_ACCESS_KEY_ID and LITESTREAM_SECRET_ACCESS_KEY)"
)
_NEEDS_BOTOCORE = (
    "AWS_PROFILE",
    "AWS_ROLE_ARN",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_CONFIG_FILE",
)
_LOOK_AGAIN = 60.0
"""Seconds until an AWS chain that found nothing is asked again: looking may cost a metadata request."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """One key pair, with the token that temporary ones need."""

    access_key: str
    secret_key: str = field(repr=False)
    session_token: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class CredentialSource:
    """Gives the credentials of the moment."""

    description: str
    """Where they come from, for messages: ``AWS_ACCESS_KEY_ID in the environment``."""
    get: Callable[[], Credentials | None]
    """None means: send the request unsigned. Raises `AccessDenied` when a role cannot be refreshed."""
    advice: str
    """What to do when the service refuses them."""
    renew: Callable[[Credentials], bool] = lambda _: False
    """Look again where they came from. Whether `get` gives others now than those, which were refused."""
    customer_key: CustomerKey | None = field(default=None, repr=False)
    """What S3 decrypts the files with, where the configuration names it apart from the URL."""


def to_texts(credentials: Credentials | None, key: CustomerKey | None) -> dict[str, str]:
    """What `from_texts` in a child process makes the same of. Secrets: for a pipe, not for a disk or a log."""
    texts: dict[str, str] = {}
    if credentials is not None:
        texts |= {"access": credentials.access_key, "secret": credentials.secret_key}
        if credentials.session_token:
            texts["token"] = credentials.session_token
    if key is not None:
        texts |= {"customer_key": key.key, "customer_key_md5": key.md5}
    return texts


def from_texts(texts: Mapping[str, str]) -> CredentialSource:
    """The credentials that `to_texts` was given. They are not renewed."""
    found = Credentials(texts["access"], texts["secret"], texts.get("token")) if "access" in texts else None
    key = CustomerKey(texts["customer_key"], texts["customer_key_md5"]) if "customer_key" in texts else None
    return CredentialSource("the parent process", lambda: found, _SET_THEM, customer_key=key)


def find_credentials(environ: Mapping[str, str] = os.environ, *, anonymous: bool = False) -> CredentialSource:
    """The first of: environment (AWS's, then Litestream's names), AWS's chain (needs botocore), nothing.

    Opens no connection. Raises `ConfigError` for half a key pair.
    """
    if anonymous:
        return CredentialSource(
            "no credentials (anonymous=true)",
            lambda: None,
            f"remove anonymous=true from the URL and {_SET_THEM}",
        )
    # Like Litestream, each variable falls back on its own.
    access, access_name = _first(environ, "AWS_ACCESS_KEY_ID", "LITESTREAM_ACCESS_KEY_ID")
    secret, secret_name = _first(environ, "AWS_SECRET_ACCESS_KEY", "LITESTREAM_SECRET_ACCESS_KEY")
    if access and secret:
        keys = _EnvironmentKeys(environ, access_name, secret_name)
        return CredentialSource(
            f"{access_name} in the environment", keys.get, f"check {access_name} and {secret_name}", keys.renew
        )
    if access or secret:
        there, missing = (access_name, "SECRET_ACCESS_KEY") if access else (secret_name, "ACCESS_KEY_ID")
        prefix = there.partition("_")[0]
        raise ConfigError(f"{there} is set but {prefix}_{missing} is not; set both or neither")
    if importlib.util.find_spec("botocore") is not None:
        chain = _BotocoreChain()
        return CredentialSource(
            "the AWS credential chain (profiles, container and instance roles)",
            chain.get,
            f"check the profile or role, or {_SET_THEM}",
            chain.renew,
        )
    hints = [name for name in _NEEDS_BOTOCORE if environ.get(name)]
    if not hints and Path("~/.aws").expanduser().is_dir():
        hints = ["~/.aws"]
    advice = _SET_THEM
    if hints:
        advice += f"; for {' and '.join(hints)} install lazyreplica[aws]"
    return CredentialSource("no credentials (none found in the environment)", lambda: None, advice)


def _first(environ: Mapping[str, str], *names: str) -> tuple[str, str]:
    """Value and name of the first variable that is set and not empty."""
    for name in names:
        if value := environ.get(name, ""):
            return value, name
    return "", names[0]


class _EnvironmentKeys:
    """Two variables, and the token's. As they were at first: the environment may be changed for another replica."""

    def __init__(self, environ: Mapping[str, str], access_name: str, secret_name: str) -> None:
        self._environ = environ
        self._access_name = access_name
        self._secret_name = secret_name
        self._found = self._look()

    def _look(self) -> Credentials:
        token = self._environ.get("AWS_SESSION_TOKEN") if self._access_name == "AWS_ACCESS_KEY_ID" else None
        access, secret = self._environ.get(self._access_name, ""), self._environ.get(self._secret_name, "")
        return Credentials(access, secret, token or None)

    def get(self) -> Credentials:
        return self._found

    def renew(self, refused: Credentials) -> bool:
        found = self._look()
        if found.access_key and found.secret_key:
            self._found = found
        return self._found != refused


class _BotocoreChain:
    """botocore's chain, looked through at the first request; botocore refreshes what it found."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: Any = None  # botocore is untyped
        self._look_at = 0.0

    def get(self) -> Credentials | None:
        import botocore.exceptions  # optional, and slow to import

        with self._lock:
            if self._found is None and time.monotonic() >= self._look_at:
                import botocore.session

                try:
                    self._found = botocore.session.Session().get_credentials()
                except botocore.exceptions.ProfileNotFound as error:
                    raise ConfigError(f"{error}; check AWS_PROFILE") from None
                except botocore.exceptions.BotoCoreError as error:
                    raise AccessDenied(f"the AWS credential chain failed: {error}; {_SET_THEM}") from error
                if self._found is None:
                    self._look_at = time.monotonic() + _LOOK_AGAIN
                    logger.info("the AWS credential chain has no credentials: requests go out unsigned")
            found = self._found
        if found is None:
            return None
        try:
            frozen = found.get_frozen_credentials()
        except botocore.exceptions.BotoCoreError as error:
            raise AccessDenied(f"the AWS credentials could not be refreshed: {error}; check the role") from error
        return Credentials(frozen.access_key, frozen.secret_key, frozen.token)

    def renew(self, refused: Credentials) -> bool:
        if self.get() == refused:
            with self._lock:
                # A new session reads files anew, and asks roles again.
                self._found, self._look_at = None, 0.0
        return self.get() not in {refused, None}
