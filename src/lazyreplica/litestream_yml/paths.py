"""Paths as Litestream expands them."""

from __future__ import annotations

import os
import pwd


def absolute(path: str) -> str:
    """An absolute path, without ``.`` and ``..``.

    A leading ``sqlite://`` is passed over, ``~/`` is the home directory of the process's user, and other relative paths
    begin where the process works.
    """
    path = path.removeprefix("sqlite3://").removeprefix("sqlite://")
    if path == "~" or path.startswith("~/"):
        path = _home() + path[1:]
    path = os.path.abspath(path)  # noqa: PTH100 (Path.absolute keeps "..")
    return "/" + path.lstrip("/")  # POSIX gives two slashes at the start a meaning of their own, Go does not


def _home() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        return os.environ.get("HOME", "/")
