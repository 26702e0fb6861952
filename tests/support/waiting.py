"""Waiting for what another thread or process does."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
PATIENCE = 60.0
"""Seconds. That something comes is what a test says, not how soon: a machine that is busy with other tests is slow."""
_LONGEST = 0.01


def eventually(condition: Callable[[], T], timeout: float = PATIENCE, what: str = "") -> T:
    """Ask until `condition` is true, and return what it said; fail after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    pause = 0.001
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"not within {timeout:g} s: {what or condition}"
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST)
    return answer
