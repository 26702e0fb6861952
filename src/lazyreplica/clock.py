"""Seconds that go on counting while the machine sleeps."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Final

now: Final[Callable[[], float]] = (
    partial(time.clock_gettime, time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic
)
"""Monotonic seconds that include suspension where the system can tell (Linux ``CLOCK_BOOTTIME``).

``time.monotonic`` stands still while a laptop or a serverless sandbox is frozen; a replica that compared ages with it
would take hour-old data for fresh. 0.1 us: each transaction asks.
"""
