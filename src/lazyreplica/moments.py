"""Moments of the past: what people write for them, and what is shown. Pure: the caller says what time it is.

All times are UTC. A moment is held in milliseconds since the Unix epoch, as LTX headers hold theirs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from lazyreplica.errors import ConfigError


@dataclass(frozen=True, slots=True)
class AtTime:
    """The newest state that was written strictly before a time."""

    ms: int
    """Milliseconds since the Unix epoch; a finer time is rounded up, so that the same states lie before it."""


@dataclass(frozen=True, slots=True)
class AtTXID:
    """The state right after a transaction."""

    txid: int


Moment = AtTime | AtTXID
EXPECTED_TIME = (
    "expected a time such as '2026-11-22T10:00:00Z' (UTC where no zone is named), '2026-11-22', '5 minutes ago', "
    "'yesterday' (24 hours ago), 'now', Unix seconds, or 'latest'"
)
_AGO = re.compile(r"(\d+|an?) ?([a-z]+) ago")
_UNITS = {
    "second": ("s", "sec", "secs", "seconds"),
    "minute": ("m", "min", "mins", "minutes"),
    "hour": ("h", "hr", "hrs", "hours"),
    "day": ("d", "days"),
    "week": ("w", "weeks"),
}
_MS = {"second": 1000, "minute": 60_000, "hour": 3_600_000, "day": 86_400_000, "week": 7 * 86_400_000}
_UNIT_MS = {word: _MS[unit] for unit, words in _UNITS.items() for word in (unit, *words)}
_UNIX = re.compile(r"(\d{9,})(?:\.(\d+))?")
"""At least nine digits (since 1973): eight are a date, 20261122."""
_FRACTION = re.compile(r"(T\d\d:?\d\d:?\d\d)[.,](\d+)")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def parse_moment(kind: str, text: str, now_ms: int) -> Moment | None:
    """The moment that `text` names, as a "time" or a "txid"; None for 'latest'. Raises `ConfigError`."""
    if text.strip().lower() == "latest":
        return None
    return AtTime(parse_time(text, now_ms)) if kind == "time" else AtTXID(_parse_txid(text))


def _parse_txid(text: str) -> int:
    if not re.fullmatch(r"[0-9a-fA-F]{16}", text.strip()):
        raise ConfigError(f"TXID is {text!r}, expected 16 hexadecimal digits such as 00000000000000a4, or 'latest'")
    return int(text, 16)


def parse_time(text: str, now_ms: int) -> int:
    """Milliseconds since the Unix epoch, rounded up to a whole one. `now_ms`: the present, in the same unit.

    Understands ISO 8601 (RFC 3339; without a zone: UTC), dates (their first moment), "5 minutes ago", "yesterday" (24
    hours ago), "now", and Unix seconds. Raises `ConfigError` for anything else.
    """
    words = " ".join(text.lower().split())
    try:
        if words in ("now", "yesterday"):
            return now_ms - (_UNIT_MS["day"] if words == "yesterday" else 0)
        if (ago := _AGO.fullmatch(words)) and ago[2] in _UNIT_MS:
            return now_ms - (1 if ago[1].startswith("a") else int(ago[1])) * _UNIT_MS[ago[2]]
        if unix := _UNIX.fullmatch(words):
            return 1000 * int(unix[1]) + _milliseconds(unix[2] or "")
        return _parse_iso(words.upper())
    except (ValueError, OverflowError):
        raise ConfigError(f"time is {text!r}, {EXPECTED_TIME}") from None


def _parse_iso(text: str) -> int:
    fraction = _FRACTION.search(text.replace(" ", "T", 1))
    if fraction:
        # Python cuts off what is finer than a microsecond, and would so take the moment for an earlier one.
        text = text[: fraction.end(1)] + text[fraction.end() :]
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return (moment - _EPOCH) // timedelta(milliseconds=1) + (_milliseconds(fraction[2]) if fraction else 0)


def _milliseconds(digits: str) -> int:
    """Of the digits behind a decimal point of seconds, rounded up."""
    whole = int(digits[:3].ljust(3, "0"))
    return whole + (1 if digits[3:].strip("0") else 0)


def format_ms(ms: int) -> str:
    """RFC 3339 in UTC, with milliseconds; a number where no calendar has that moment."""
    try:
        moment = datetime.fromtimestamp(ms // 1000, UTC)
    except (ValueError, OverflowError, OSError):
        return f"{ms} ms"
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{ms % 1000:03d}Z"
