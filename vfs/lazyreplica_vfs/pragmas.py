"""The pragmas, under the names of Litestream's own extension. SQLite hands a pragma it does not know to the VFS."""

from __future__ import annotations

import json
from collections.abc import Callable

from lazyreplica.errors import ConfigError
from lazyreplica.ltx.name import format_txid
from lazyreplica.replica import Replica
from lazyreplica.snapshot import Snapshot


def format_time(snapshot: Snapshot) -> str:
    """When the primary wrote the snapshot's last transaction: RFC 3339 in UTC, milliseconds."""
    from lazyreplica.moments import format_ms  # dates: 3 ms that an open does not need

    return format_ms(snapshot.timestamp_ms)


_ANSWERS: dict[str, Callable[[Replica, Snapshot], str]] = {
    "litestream_txid": lambda _, snapshot: format_txid(snapshot.txid),
    "litestream_time": lambda _, snapshot: format_time(snapshot),
    "litestream_lag": lambda replica, _: f"{replica.lag:.3f}" if replica.lag >= 0 else "-1",
    "litestream_hydration_progress": lambda replica, _: f"{replica.hydration_progress:.1f}",
    "litestream_hydration_file": lambda replica, _: replica.hydration_file or "",
    "litestream_stats": lambda replica, _: json.dumps(replica.stats().as_dict()),
    "litestream_hydration_txid": lambda replica, _: format_txid(txid) if (txid := replica.hydration_txid) else "",
}

FUNCTIONS: dict[str, Callable[[Replica, Snapshot], str | float]] = {
    "litestream_txid": _ANSWERS["litestream_txid"],
    "litestream_time": _ANSWERS["litestream_time"],
    "litestream_lag": lambda replica, _: replica.lag,
}
"""SQL functions that tell something -> what they give."""

SETTABLE = {"litestream_time": "time", "litestream_txid": "txid"}
"""Pragma -> the kind of moment that it takes as its value."""

PRAGMAS: dict[str, tuple[str, ...] | None] = {
    **dict.fromkeys(_ANSWERS),
    **{f"{name}=": ("latest",) for name in SETTABLE},
}
"""For completion: names, with = those that can be set; and the values that can be listed."""


def answer(replica: Replica, snapshot: Snapshot, name: str, value: str | None) -> str | None:
    """The text that pragma `name` gives, or None if it is not one of ours.

    Raises `ConfigError` for a value: those that can be set are `SETTABLE`, and set by the file.
    """
    known = _ANSWERS.get(name.lower())
    if known is None:
        return None
    if value is not None:
        raise ConfigError(f"PRAGMA {name} = {value!r}: this pragma can only be read")
    return known(replica, snapshot)
