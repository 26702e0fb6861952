"""The databases of a litestream.yml: those that ``path:`` names, and those that a ``dir:`` holds."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from lazyreplica.litestream_yml import go, keys
from lazyreplica.litestream_yml.document import Section
from lazyreplica.litestream_yml.paths import absolute
from lazyreplica.litestream_yml.target import Settings, source_of
from lazyreplica.storage.credentials import CredentialSource


@dataclass(frozen=True, slots=True)
class Database:
    """One item of ``dbs:``."""

    path: str
    """Absolute: of the database, or of the directory that holds databases."""
    pattern: re.Pattern[str] | None
    """What names of the databases of a directory look like; None for a single database."""
    recursive: bool
    section: Section
    defaults: Section
    """The top of the file."""

    def __str__(self) -> str:
        return self.path if self.is_listed else f"those in {self.path}"

    @property
    def is_listed(self) -> bool:
        """Whether ``path:`` names it."""
        return self.pattern is None

    def path_of(self, name: str, whole: str | None) -> str | None:
        """The path of the database that `name` may mean, if it is of these.

        `whole` is its absolute path, unless `name` is a base name. Whether there is such a file does not matter: a
        reader has none. A base name means a database at the top of a directory.
        """
        if self.pattern is None:
            return self.path if self.path == whole or (whole is None and os.path.basename(self.path) == name) else None  # noqa: PTH119
        path = os.path.join(self.path, name) if whole is None else whole  # noqa: PTH118
        directory, _, base = path.rpartition("/")
        inside = directory == self.path or (self.recursive and directory.startswith(self.path.rstrip("/") + "/"))
        return path if inside and self.pattern.fullmatch(base) else None

    def replica_of(self, path: str) -> tuple[str, CredentialSource | None]:
        """URL and credentials of the replica of the database at `path`, which `path_of` gave. Raises `ConfigError`."""
        one, several = self.section.section("replica"), self.section.sections("replicas")
        if one is not None and several:
            raise self.section.error("has both replica and replicas: Litestream refuses that", "replicas")
        if one is None and not several:
            raise self.section.error("has no replica")
        if len(several) > 1:
            self.section.warn("has more than one replica, which Litestream 0.5 refuses: the first is read", "replicas")
        replica = one if one is not None else several[0]
        replica.warn_of_strangers(keys.REPLICA)
        relative = None if self.is_listed else os.path.relpath(path, self.path)
        return source_of(Settings(replica, self.defaults), relative)


def databases_of(top: Section) -> list[Database]:
    """All of a file. Raises `ConfigError` for what Litestream would refuse, too."""
    top.warn_of_strangers(keys.TOP)
    return [_database(section, top) for section in top.sections("dbs")]


def _database(section: Section, top: Section) -> Database:
    section.warn_of_strangers(keys.DATABASE)
    path, directory, pattern = section.text("path"), section.text("dir"), section.text("pattern")
    if bool(path) == bool(directory):
        raise section.error("a database needs either path or dir")
    if path:
        return Database(absolute(path), None, False, section, top)
    if not pattern:
        raise section.error("dir needs a pattern, such as '*.db'", "dir")
    try:
        compiled = go.compile_pattern(pattern)
    except ValueError as exc:
        raise section.error(f"pattern {pattern!r} is malformed: {exc}", "pattern") from None
    return Database(absolute(directory), compiled, section.flag("recursive") or False, section, top)
