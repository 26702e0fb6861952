"""Which replica a database name stands for, as in ``file:NAME?vfs=litestream``."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lazyreplica.config import OPTION_NAMES, Options
from lazyreplica.errors import ConfigError
from lazyreplica.storage.url import parse_replica_url

if TYPE_CHECKING:
    from lazyreplica.storage.credentials import CredentialSource

URL_VARIABLE = "LITESTREAM_REPLICA_URL"


@dataclass(frozen=True, slots=True)
class Named:
    """What a name stands for."""

    url: str
    options: Options
    credentials: CredentialSource | None = None
    """Those that come with the URL, from litestream.yml; None: look in the environment."""
    start: tuple[str, str] | None = None
    """The moment to open it at: "time" or "txid", and its text. None: the newest state."""


def _after_fork_in_child() -> None:
    global _lock  # noqa: PLW0603 (another thread of the parent may have held it at the moment of the fork)
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork_in_child)

_configured: dict[str, Named] = {}
_lock = threading.Lock()


def configure(name: str, url: str, *, time: object = None, txid: object = None, **options: object) -> None:
    """Let the database `name` (as in ``file:NAME?vfs=litestream``) stand for the replica at `url`.

    Options are those of `Options`, over what the environment says. `time` or `txid`: connections show that moment of
    the past (a relative one, such as "yesterday", counts from each connection's opening). Configuring a name again
    replaces what it stands for; connections that are open keep theirs. Raises `ConfigError` for an unknown option, a
    moment that makes no sense, or a malformed URL.
    """
    if not name:
        raise ConfigError("configure() needs a database name such as 'app.db'")
    parse_replica_url(url)  # complain here, where the mistake is, rather than at the first open
    parsed = Options.from_environment().updated(options, "configure()")
    start = _moment({kind: str(given) for kind, given in (("time", time), ("txid", txid)) if given is not None})
    with _lock:
        _configured[name] = Named(url, parsed, start=start)


@contextlib.contextmanager
def adopted(name: str) -> Iterator[None]:
    """While the block runs, the database `name` stands for its replica in litestream.yml, whatever else is configured.

    Raises `ConfigError` as `replica_of` does.
    """
    url, credentials = replica_of(name)
    named = Named(url, Options.from_environment(), credentials)
    with _lock:
        before = _configured.get(name)
        _configured[name] = named
    try:
        yield
    finally:
        with _lock:
            if before is not None:
                _configured[name] = before
            else:
                del _configured[name]


def is_configured(name: str) -> bool:
    """Whether `configure` was called for that name."""
    with _lock:
        return name in _configured


def resolve(name: str, parameters: Mapping[str, str]) -> Named:
    """The replica and options for a database name and its URI parameters.

    First found wins: parameter ``replica_url``, `configure`, ``LITESTREAM_REPLICA_URL``, litestream.yml. Parameters
    that are option names go over the options, and ``time`` or ``txid`` over a configured moment. Raises `ConfigError`
    when no replica is named, or a parameter makes no sense.
    """
    with _lock:
        configured = _configured.get(name)
    if explicit := parameters.get("replica_url", ""):
        named = Named(explicit, Options.from_environment())
    elif configured is not None:
        named = configured
    elif url := os.environ.get(URL_VARIABLE, ""):
        named = Named(url, Options.from_environment())
    else:
        url, credentials = _of_the_writer(name)
        named = Named(url, Options.from_environment(), credentials)
    options = named.options
    for option in OPTION_NAMES:
        if option in parameters:
            options = options.updated({option: parameters[option]}, f"URI parameter {option}")
    start = _moment({kind: parameters[kind] for kind in ("time", "txid") if parameters.get(kind, "") != ""})
    return Named(named.url, options, named.credentials, start or named.start)


def _moment(given: Mapping[str, str]) -> tuple[str, str] | None:
    if len(given) > 1:
        raise ConfigError(f"time is {given['time']!r} and txid is {given['txid']!r}: give one of them")
    for kind, text in given.items():
        from lazyreplica.moments import parse_moment

        parse_moment(kind, text, 0)  # complain here, where the mistake is
        return kind, text
    return None


def replica_of(name: str) -> tuple[str, CredentialSource | None]:
    """Where Litestream replicates a database to: the replica's URL, and the keys for it (None: the environment's).

    `name` is a path, or the base name of one, that litestream.yml lists. The pair is what `open_store` takes. Raises
    `ConfigError` when there is no such file, it cannot be understood, or it does not list the database.
    """
    from lazyreplica import litestream_yml  # only for those who have no URL

    config = litestream_yml.load()
    if config is None:
        raise ConfigError(f"{name!r} is not a replica's URL, and there is no {litestream_yml.PLACES} that lists it")
    return config.replica_of(name)


def _of_the_writer(name: str) -> tuple[str, CredentialSource | None]:
    from lazyreplica import litestream_yml  # only for those who have no URL

    config = litestream_yml.load()
    listed = f" (there is no {litestream_yml.PLACES})"
    if config is not None:
        if config.lists(name):
            return config.replica_of(name)
        listed = f" ({config.inventory})"
    raise ConfigError(
        f"no replica is configured for {name!r}: set {URL_VARIABLE}=s3://bucket/path, call "
        f"lazyreplica.configure({name!r}, 's3://bucket/path'), open "
        f"'file:{name}?vfs=litestream&replica_url=s3%3A%2F%2Fbucket%2Fpath', or list it in litestream.yml{listed}"
    )
