"""Registers the VFS and switches SQLite's URI file names on, once, when `lazyreplica` is imported."""

from __future__ import annotations

import atexit
import logging
import os
import sys

import apsw

from lazyreplica_vfs.deferred import remember
from lazyreplica_vfs.functions import add_functions
from lazyreplica_vfs.vfs import LitestreamVFS

log = logging.getLogger("lazyreplica.vfs")

_vfs: LitestreamVFS | None = None


def register() -> None:
    """Make ``vfs=litestream`` known to APSW's SQLite. Idempotent."""
    global _vfs  # noqa: PLW0603 (APSW unregisters a VFS whose object is collected)
    if _vfs is not None:
        return
    _enable_uri_names()
    _vfs = LitestreamVFS()
    apsw.connection_hooks.extend((remember, add_functions))
    # Now, not when the engine is loaded: what the user registers from here on still finds replicas open.
    atexit.register(_close_replicas)


def _close_replicas() -> None:
    registry = sys.modules.get("lazyreplica.registry")
    if registry is not None:
        registry.close_all()


def _enable_uri_names() -> None:
    """Let ``apsw.Connection("file:app.db?vfs=litestream")`` work with APSW's default flags.

    SQLite takes that setting only while it is shut down, which is possible until the first connection is opened; its
    own copy of SQLite is used here alone, so nobody but APSW's users notices. ``LAZYREPLICA_NO_URI=1`` skips it.
    """
    if os.environ.get("LAZYREPLICA_NO_URI", "") not in ("", "0") or not apsw.using_amalgamation:
        return
    default = apsw.vfs_names()[0]
    try:
        apsw.shutdown()
    except apsw.MisuseError:
        log.warning(
            "lazyreplica was imported after an APSW connection was opened, so SQLite's URI file names cannot be "
            "switched on any more: import lazyreplica first, or pass "
            "flags=apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI to apsw.Connection"
        )
        return
    try:
        apsw.config(apsw.SQLITE_CONFIG_URI, 1)
    finally:
        apsw.initialize()
        if apsw.vfs_names()[0] != default:
            apsw.set_default_vfs(default)
