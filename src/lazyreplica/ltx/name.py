"""LTX file names: ``<MinTXID>-<MaxTXID>.ltx``, 16 lower-case hexadecimal digits each."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lazyreplica.errors import LTXError

_NAME = re.compile(r"([0-9a-f]{16})-([0-9a-f]{16})\.ltx")
_TXID = re.compile(r"[0-9a-f]{16}")


def format_txid(txid: int) -> str:
    """A transaction id the way Litestream writes it: 16 lower-case hex digits."""
    return f"{txid:016x}"


def parse_txid(text: str) -> int:
    """The number behind 16 lower-case hex digits. Raises `LTXError` for anything else."""
    if not _TXID.fullmatch(text):
        raise LTXError(f"TXID is {text!r}, expected 16 lower-case hexadecimal digits such as 00000000000000a4")
    return int(text, 16)


@dataclass(frozen=True, slots=True, order=True)
class FileName:
    """The transactions a file holds, both ends included."""

    min_txid: int
    max_txid: int

    def __post_init__(self) -> None:
        if not 1 <= self.min_txid <= self.max_txid < 1 << 64:
            raise LTXError(
                f"LTX file name has MinTXID {self.min_txid} and MaxTXID {self.max_txid}, "
                "expected 1 <= MinTXID <= MaxTXID < 2**64"
            )

    def __str__(self) -> str:
        return f"{self.min_txid:016x}-{self.max_txid:016x}.ltx"

    @property
    def is_snapshot(self) -> bool:
        """A file from TXID 1 on holds the whole database."""
        return self.min_txid == 1

    @classmethod
    def parse(cls, text: str) -> FileName | None:
        """The name, or None if `text` is not one: every other name in a replica is to be ignored."""
        match = _NAME.fullmatch(text)
        if match is None:
            return None
        low, high = int(match[1], 16), int(match[2], 16)
        return cls(low, high) if 1 <= low <= high else None
