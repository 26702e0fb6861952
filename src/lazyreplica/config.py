"""Options of a replica."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lazyreplica.errors import ConfigError

MIB = 1 << 20

ENVIRONMENT = {
    "hydrate": "LITESTREAM_HYDRATION_ENABLED",
    "hydrate_max": "LITESTREAM_HYDRATION_MAX",
    "hydration_path": "LITESTREAM_HYDRATION_PATH",
    "cache_dir": "LITESTREAM_CACHE_DIR",
    "cache_size": "LITESTREAM_CACHE_SIZE",
    "poll_interval": "LITESTREAM_POLL_INTERVAL",
    "max_staleness": "LITESTREAM_MAX_STALENESS",
    "read_timeout": "LITESTREAM_READ_TIMEOUT",
    "prefetch": "LITESTREAM_PREFETCH",
}
"""Option name -> environment variable (the peer's name where it has one)."""

TECHNIQUES = ("sequential", "siblings", "rows", "overflow", "interior")
"""Ways to predict which pages are read next: runs of page numbers; children of a known page; the rows that an index
leaf names; chains of overflow pages; and the interior pages of all b-trees, as soon as the replica is open."""


@dataclass(frozen=True, slots=True)
class Options:
    """How a replica is read. Raises `ConfigError` for a value that makes no sense."""

    hydrate: bool | None = None
    """Download the rest in the background. None: while the database is smaller than `hydrate_max`."""
    hydrate_max: int | None = None
    """Bytes. None: the smaller of 1 GiB and a quarter of the free space."""
    hydration_path: str | None = None
    """Where the local copy appears: shared by all processes that name it, and kept. None: see `cache_dir`."""
    cache_dir: str | None = None
    """A directory for the local copies of many replicas, each under a name made of its URL; as `hydration_path` else.
    None as well: a private temporary file, gone at close."""
    cache_size: int = 32 * MIB
    """Bytes of memory for pages, shared by all connections to the replica. Without a local copy the rest takes up to
    32 MiB more."""
    poll_interval: float = 1.0
    """Seconds between two looks for new transactions. 0: no thread, the head stays until `refresh`."""
    max_staleness: float | None = None
    """A transaction that starts when the last poll is older than this many seconds polls first.
    None: five poll intervals, at least 5 seconds; never with `poll_interval` 0."""
    read_timeout: float = 30.0
    """Seconds after which a read that storage does not answer fails."""
    prefetch: frozenset[str] = frozenset(TECHNIQUES)
    """What is fetched before it is asked for. "all", "none", or some of the names in `TECHNIQUES`."""

    def __post_init__(self) -> None:
        _require(
            self.hydrate_max is None or self.hydrate_max >= 0,
            "hydrate_max",
            self.hydrate_max,
            "bytes, 0 or more",
        )
        _require(self.cache_size >= 0, "cache_size", self.cache_size, "bytes, 0 or more")
        _require(_is_duration(self.poll_interval), "poll_interval", self.poll_interval, "seconds, 0 to 1e9")
        _require(
            self.max_staleness is None or _is_duration(self.max_staleness),
            "max_staleness",
            self.max_staleness,
            "seconds, 0 to 1e9",
        )
        _require(
            _is_duration(self.read_timeout) and self.read_timeout > 0,
            "read_timeout",
            self.read_timeout,
            "seconds, more than 0, up to 1e9",
        )
        _require(
            self.hydration_path is None
            or (Path(self.hydration_path).name not in ("", "..") and "\0" not in self.hydration_path),
            "hydration_path",
            self.hydration_path,
            "the path of a file",
        )

    def local_path(self, url: str) -> str | None:
        """Where the local copy of the replica at the canonical `url` appears; None: in a private temporary file."""
        if self.hydration_path is not None or self.cache_dir is None:
            return self.hydration_path
        import hashlib  # OpenSSL's: 3 ms

        name = re.sub(r"[^A-Za-z0-9_.-]", "_", url.partition("?")[0].rstrip("/").rpartition("/")[2])[:80] or "replica"
        return str(Path(self.cache_dir) / f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:16]}.db")

    @property
    def staleness_limit(self) -> float:
        """`max_staleness` with its default filled in; infinite when a transaction never polls."""
        if self.max_staleness is not None:
            return self.max_staleness
        return max(5.0, 5 * self.poll_interval) if self.poll_interval else math.inf

    def updated(self, values: Mapping[str, object], source: str) -> Options:
        """A copy with `values` over it; texts are parsed. `source` is named in error messages."""
        parsed: dict[str, Any] = {
            name: _parse(name, value, f"{source}: {name}" if source.endswith("()") else source)
            for name, value in values.items()
        }
        return dataclasses.replace(self, **parsed)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Options:
        """The defaults, with what the environment says over them."""
        environ = os.environ if environ is None else environ
        options = cls()
        for name, variable in ENVIRONMENT.items():
            if environ.get(variable, "") != "":
                options = options.updated({name: environ[variable]}, variable)
        return options


OPTION_NAMES = tuple(field.name for field in dataclasses.fields(Options))


_LONGEST = 1e9
"""Seconds, 31 years: what every clock and lock of the system can still count."""


def _is_duration(value: float) -> bool:
    return 0 <= value <= _LONGEST


def _require(good: bool, name: str, value: object, expected: str) -> None:
    if not good:
        raise ConfigError(f"{name} is {value!r}, expected {expected}")


_SIZE = re.compile(r"(\d+)\s*([kmgt]?)(i?b)?", re.IGNORECASE)
_DURATION = re.compile(r"((?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?)\s*(ms|s|m|h)?", re.IGNORECASE)
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, None: 1.0}
_TRUE = {"1", "t", "true", "yes", "on"}
_FALSE = {"0", "f", "false", "no", "off"}


def _parse(name: str, value: object, source: str) -> object:
    if name not in OPTION_NAMES:
        raise ConfigError(f"{name!r} is not an option; options are {', '.join(OPTION_NAMES)}")
    if value is None:
        return getattr(Options(), name)
    if name == "prefetch":
        return _parse_techniques(value, source)
    if name == "hydrate":
        return _parse_bool(value, source)
    if name in ("hydrate_max", "cache_size"):
        return _parse_size(value, source)
    if name in ("hydration_path", "cache_dir"):
        if not isinstance(value, str | os.PathLike):
            raise ConfigError(f"{source}: {value!r} is not a path")
        return os.fspath(value)
    return _parse_seconds(value, source)


def _parse_bool(value: object, source: str) -> bool:
    text = str(value).strip().lower()
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise ConfigError(f"{source} is {value!r}, expected true or false")


def _parse_techniques(value: object, source: str) -> frozenset[str]:
    names = value.replace(",", " ").split() if isinstance(value, str) else value
    if names in (["all"], ["none"]):
        return frozenset(TECHNIQUES if names == ["all"] else ())
    if not isinstance(names, list | tuple | set | frozenset) or not all(name in TECHNIQUES for name in names):
        raise ConfigError(f"{source} is {value!r}, expected all, none, or some of {', '.join(TECHNIQUES)}")
    return frozenset(names)


def _parse_size(value: object, source: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = _SIZE.fullmatch(str(value).strip())
    if match is None:
        raise ConfigError(f"{source} is {value!r}, expected a number of bytes such as 67108864 or 64MiB")
    return int(match[1]) << {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}[match[2].lower()]


def _parse_seconds(value: object, source: str) -> float:
    match = _DURATION.fullmatch(str(value).strip())
    if isinstance(value, bool) or match is None:
        raise ConfigError(f"{source} is {value!r}, expected seconds such as 0.5, or a duration such as 500ms or 2s")
    seconds = float(match[1]) * _SECONDS[match[2] and match[2].lower()]
    if not _is_duration(seconds):
        raise ConfigError(f"{source} is {value!r}, expected seconds, 0 to {_LONGEST:.0g}")
    return seconds
