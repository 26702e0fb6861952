"""Seconds that go on counting while the machine sleeps."""

from __future__ import annotations

import time


def now() -> float:
    """Monotonic seconds that include suspension where the system can tell (Linux ``CLOCK_BOOTTIME``).

    ``time.monotonic`` stands still while a laptop or a serverless sandbox is frozen; a replica that compared ages with
    it would take hour-old data for fresh.
    """
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()
