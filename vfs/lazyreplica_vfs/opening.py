"""From a database's name and URI parameters to an open replica."""

from __future__ import annotations

import re
from collections.abc import Mapping

import apsw

from lazyreplica.errors import ConfigError
from lazyreplica.naming import is_configured, resolve
from lazyreplica.registry import acquire, release
from lazyreplica_vfs.file import ReplicaFile
from lazyreplica_vfs.vfs import NAME


def open_replica(name: str | apsw.URIFilename | None) -> ReplicaFile:
    """The file behind what SQLite passes to xOpen. Raises `LazyReplicaError`."""
    if isinstance(name, apsw.URIFilename):
        filename, parameters = (
            name.filename(),
            {key: name.uri_parameter(key) or "" for key in name.parameters},
        )
    else:
        filename, parameters = name or "", {}
    _refuse_strangers(filename, parameters)
    named = resolve(filename, parameters)
    replica = acquire(named.url, named.options, named.credentials)
    try:
        return ReplicaFile(replica, locks=not _never_locks(parameters), start=named.start)
    except BaseException:
        release(replica)
        raise


def _refuse_strangers(filename: str, parameters: Mapping[str, str]) -> None:
    """ATTACH and VACUUM INTO inherit the connection's VFS: a plain file name must not become a replica silently."""
    if is_configured(filename) or "replica_url" in parameters or parameters.get("vfs") == NAME:
        return
    raise ConfigError(
        f"{filename!r} is not a configured replica, and this connection's VFS would open it as one: for a local file "
        f"write 'file:{filename}?vfs=unix' (ATTACH and VACUUM INTO take it too), for a replica "
        f"'file:{filename}?vfs=litestream&replica_url=...'"
    )


def _never_locks(parameters: Mapping[str, str]) -> bool:
    """Whether SQLite will read without locking."""
    return _is_true(parameters.get("immutable", "")) or _is_true(parameters.get("nolock", ""))


def _is_true(value: str) -> bool:
    """SQLite's own reading of a boolean URI parameter (``sqlite3GetBoolean``): leading digits count, as one byte."""
    digits = re.match(r"[0-9]+", value)
    if digits:
        return int(digits[0]) & 0xFF != 0
    return value.lower() in {"yes", "true", "on"}
