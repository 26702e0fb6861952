"""How each contender opens the database. Runs inside the worker; nothing is imported before `load`."""

from __future__ import annotations

import os
from importlib import import_module
from pkgutil import walk_packages
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import apsw

NAMES = ("peer", "native", "us")

PACKAGES = {
    "peer": ("litestream-vfs",),
    "native": ("apsw",),
    "us": ("lazyreplica", "apsw", "lz4", "fastcrc", "cachetools"),
}
"""Distributions whose versions belong into the report."""


class Contender(Protocol):
    def load(self) -> None:
        """Import everything. Connect to nothing."""

    def connect(self) -> apsw.Connection: ...


class Native:
    """SQLite on the restored file, as an application opens it: in WAL mode, read-write, with WAL's read locks."""

    def __init__(self, target: dict[str, Any]) -> None:
        self._path = target["database"]

    def load(self) -> None:
        import_module("apsw")

    def connect(self) -> apsw.Connection:
        import apsw

        connection = apsw.Connection(self._path, flags=apsw.SQLITE_OPEN_READWRITE, vfs="unix")
        assert connection.pragma("journal_mode") == "wal", "the restored file is in WAL mode"
        return connection


class Us:
    def __init__(self, target: dict[str, Any]) -> None:
        self._url = target["url"]
        self._options: dict[str, object] = {"hydrate": target["hydrate"]}
        if target["hydrate"]:
            self._options |= {"hydrate_max": 1 << 40, "hydration_path": target["hydration_path"]}
        if "poll_interval" in target:
            self._options["poll_interval"] = target["poll_interval"]

    def load(self) -> None:
        import lazyreplica
        import lazyreplica_vfs

        # The installed package is the checkout, which somebody may be editing.
        frozen = os.environ["PYTHONPATH"]
        assert str(lazyreplica.__file__).startswith(frozen) and str(lazyreplica_vfs.__file__).startswith(frozen)
        for package in (lazyreplica, lazyreplica_vfs):
            for module in walk_packages(package.__path__, f"{package.__name__}."):
                # The command line needs an extra; botocore (credentials) is imported where it is used, if at all.
                if not module.name.startswith("lazyreplica.cli"):
                    import_module(module.name)

    def connect(self) -> apsw.Connection:
        import lazyreplica

        return lazyreplica.connect(self._url, **self._options)


class Peer:
    """litestream-vfs, an extension in Go. It takes its settings from the environment (`environment`)."""

    def __init__(self, _: dict[str, Any]) -> None:
        self._loader: apsw.Connection | None = None

    def load(self) -> None:
        import apsw
        import litestream_vfs  # type: ignore[import-untyped]

        # It stays loaded for the process; any connection will do. It connects when a database is opened.
        self._loader = apsw.Connection(":memory:")
        self._loader.enable_load_extension(True)
        self._loader.load_extension(litestream_vfs.loadable_path(), "sqlite3_litestreamvfs_init")

    def connect(self) -> apsw.Connection:
        import apsw

        flags = apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI
        return apsw.Connection("file:bench.db?vfs=litestream", flags=flags)


CONTENDERS: dict[str, type[Native] | type[Us] | type[Peer]] = {"peer": Peer, "native": Native, "us": Us}


def environment(name: str, target: dict[str, Any]) -> dict[str, str]:
    """What must stand in the environment before the contender's process starts."""
    if name == "us":
        return {"LITESTREAM_PREFETCH": target["prefetch"]}
    if name != "peer":
        return {}
    env = {"LITESTREAM_REPLICA_URL": target["url"], "LITESTREAM_LOG_LEVEL": "ERROR"}
    if target["hydrate"]:
        env |= {"LITESTREAM_HYDRATION_ENABLED": "true", "LITESTREAM_HYDRATION_PATH": target["hydration_path"]}
    return env


def clean_environment() -> dict[str, str]:
    """Ours, less what would steer a contender or its HTTP client."""
    prefixes = ("AWS_", "LITESTREAM_", "LAZYREPLICA_")
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(prefixes) and not name.lower().endswith("_proxy")
    }
