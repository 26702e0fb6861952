"""The pragmas, under the names of Litestream's own extension. SQLite hands a pragma it does not know to the VFS."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

from lazyreplica.errors import ConfigError
from lazyreplica.ltx.name import format_txid
from lazyreplica.replica import Replica
from lazyreplica.snapshot import Snapshot


def format_time(snapshot: Snapshot) -> str:
    """When the primary wrote the snapshot's last transaction: RFC 3339 in UTC, milliseconds."""
    try:
        moment = datetime.fromtimestamp(snapshot.timestamp_ms // 1000, UTC)
    except (ValueError, OverflowError):
        return f"{snapshot.timestamp_ms} ms"  # no date: a file that no clock has written
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{snapshot.timestamp_ms % 1000:03d}Z"


_ANSWERS: dict[str, Callable[[Replica, Snapshot], str]] = {
    "litestream_txid": lambda _, snapshot: format_txid(snapshot.txid),
    "litestream_time": lambda _, snapshot: format_time(snapshot),
    "litestream_lag": lambda replica, _: f"{replica.lag:.3f}" if replica.lag >= 0 else "-1",
    "litestream_hydration_progress": lambda replica, _: f"{replica.hydration_progress:.1f}",
    "litestream_hydration_file": lambda replica, _: replica.hydration_file or "",
}


def answer(replica: Replica, snapshot: Snapshot, name: str, value: str | None) -> str | None:
    """The text that pragma `name` gives, or None if it is not one of ours.

    Raises `ConfigError` for a value: these pragmas tell, they do not set.
    """
    known = _ANSWERS.get(name.lower())
    if known is None:
        return None
    if value is not None:
        raise ConfigError(f"PRAGMA {name} = {value!r}: this pragma can only be read")
    return known(replica, snapshot)
