"""Instant read replicas of SQLite databases, straight from their Litestream backups.

    import apsw, lazyreplica
    db = apsw.Connection("file:app.db?vfs=litestream")   # LITESTREAM_REPLICA_URL=s3://bucket/app

Importing this package registers the VFS named ``litestream`` with APSW.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from lazyreplica import errors
from lazyreplica_vfs.register import register

if TYPE_CHECKING:
    from lazyreplica.listeners import add_listener
    from lazyreplica.naming import configure
    from lazyreplica.publish import Published, publish
    from lazyreplica.registry import all_stats
    from lazyreplica.stats import Stats
    from lazyreplica_vfs.connections import connect, export, refresh, stats, wait_for

__all__ = [
    "Published",
    "Stats",
    "add_listener",
    "all_stats",
    "configure",
    "connect",
    "errors",
    "export",
    "publish",
    "refresh",
    "stats",
    "wait_for",
]

__version__ = "0.1.0"

_HOMES = {
    "add_listener": "lazyreplica.listeners",
    "all_stats": "lazyreplica.registry",
    "Stats": "lazyreplica.stats",
    "stats": "lazyreplica_vfs.connections",
    "configure": "lazyreplica.naming",
    "publish": "lazyreplica.publish",
    "Published": "lazyreplica.publish",
    "connect": "lazyreplica_vfs.connections",
    "export": "lazyreplica_vfs.connections",
    "refresh": "lazyreplica_vfs.connections",
    "wait_for": "lazyreplica_vfs.connections",
}
"""Where the functions are. The engine is loaded when one is used, or a replica is opened: a program that may not need
it starts 80 ms sooner."""


class _Package(ModuleType):
    """This package. A function keeps its name where a module is called the same: ``publish``, ``export``, ``stats``."""

    def __getattr__(self, name: str) -> object:
        home = _HOMES.get(name)
        if home is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=self)
        value = getattr(import_module(home), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: object) -> None:
        # The import system binds each module that it has loaded in its package.
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_HOMES})


sys.modules[__name__].__class__ = _Package

register()
