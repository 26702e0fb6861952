"""The writer's own configuration: which databases litestream.yml lists, and where their replicas are.

Read as Litestream 0.5.17 reads it (its binary was asked where its documentation is silent), at every open: nothing of
it is kept. https://litestream.io/reference/config/
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from lazyreplica.errors import ConfigError
from lazyreplica.litestream_yml import go
from lazyreplica.litestream_yml.databases import Database, databases_of
from lazyreplica.litestream_yml.document import parse
from lazyreplica.litestream_yml.paths import absolute
from lazyreplica.storage.credentials import CredentialSource

CONFIG_VARIABLE = "LITESTREAM_CONFIG"
RAW_VARIABLE = "LITESTREAM_NO_EXPAND_ENV"
"""Litestream's flag ``-no-expand-env``, as a variable."""
_USUAL = ("litestream.yml", "/etc/litestream.yml")
PLACES = f"litestream.yml (${CONFIG_VARIABLE}, ./litestream.yml or /etc/litestream.yml)"

_NAME = re.compile(r"\w{1,64}")


class WriterConfig:
    """A litestream.yml."""

    def __init__(self, path: str, databases: list[Database], unset: frozenset[str]) -> None:
        self._path = path
        self._databases = databases
        self._unset = unset

    @property
    def inventory(self) -> str:
        """What it lists, for messages."""
        names = ", ".join(str(database) for database in self._databases[:8]) or "no database"
        return f"{self._path} lists {names}{', ...' if len(self._databases) > 8 else ''}"

    def lists(self, name: str) -> bool:
        """Whether a database of that path or base name is there."""
        return any(True for _ in self._matches(name))

    def replica_of(self, name: str) -> tuple[str, CredentialSource | None]:
        """URL and credentials of a database's replica. Raises `ConfigError` where that is not one, or none."""
        found = dict(self._matches(name))
        if not found:
            raise ConfigError(f"{self._path} does not list {name!r}; {self.inventory}")
        if len(found) > 1:
            raise ConfigError(
                f"{self._path} lists {len(found)} databases called {name!r}: {' and '.join(sorted(found))}; "
                "write the whole path"
            )
        (path, database), *_ = found.items()
        try:
            return database.replica_of(path)
        except ConfigError as exc:
            if not self._unset:
                raise
            hint = f"{exc} (not set, and so empty in the file: {', '.join(sorted(self._unset))})"
            raise ConfigError(hint) from None

    def _matches(self, name: str) -> Iterator[tuple[str, Database]]:
        """Paths that `name` may mean. What ``path:`` names goes before what a ``dir:`` might hold."""
        if not name or "\0" in name:
            return
        whole = absolute(name) if "/" in name else None
        for listed in (True, False):
            found = False
            for database in self._databases:
                path = database.path_of(name, whole) if database.is_listed is listed else None
                if path is not None:
                    found = True
                    yield path, database
            if found:
                return


def load(environ: Mapping[str, str] = os.environ) -> WriterConfig | None:
    """The file that the writer on this machine uses; None where there is none.

    Raises `ConfigError` for one that cannot be read or understood.
    """
    path = _find(environ)
    if path is None:
        return None
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as exc:
        raise ConfigError(f"{path} cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text") from None
    unset: set[str] = set()
    if environ.get(RAW_VARIABLE, "").lower() not in {"1", "t", "true", "yes"}:
        text = go.expand(text, lambda name: _value_of(name, environ, unset))
    top = parse(text, path)
    return WriterConfig(path, databases_of(top), frozenset(unset))


def _find(environ: Mapping[str, str]) -> str | None:
    if named := environ.get(CONFIG_VARIABLE, ""):
        path = absolute(named)
        if not Path(path).is_file():
            raise ConfigError(f"{CONFIG_VARIABLE} is {named!r}, which is not a file")
        return path
    return next((place for place in _USUAL if Path(place).is_file()), None)


def _value_of(name: str, environ: Mapping[str, str], unset: set[str]) -> str:
    if name == "PID":  # Litestream's own; ours is another one, and the path with it as good as unknown
        unset.add("PID (of the writer)")
        return str(os.getpid())
    if name not in environ:
        # Where a brace was left open, what follows is taken for a name up to the next one: keys, perhaps.
        unset.add(name if _NAME.fullmatch(name) else "what stands in a ${...} that is no name")
    return environ.get(name, "")
