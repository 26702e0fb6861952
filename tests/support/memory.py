"""The most memory that this process has had, by its own count.

`getrusage` does not say that: `ru_maxrss` survives `execve`, so that in a process started by a large test run it is the
run's own peak (getrusage(2), proc_pid_status(5)).
"""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path


def peak_resident() -> int:
    """Bytes, since this program was started or `forget_peak` was called."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak() -> None:
    """What `peak_resident` says starts again at what is resident now."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
