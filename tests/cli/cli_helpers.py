"""What a command did, and a replica to run commands on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Ran:
    """What one command did."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Ran]


@dataclass(frozen=True)
class Bank:
    """A bank that Litestream has replicated while it was at work; both stand still now."""

    database: Path
    replica: Path

    @property
    def url(self) -> str:
        return f"file://{self.replica}"
