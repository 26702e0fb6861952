"""What a process has of memory, by the kernel's own count (proc_pid_status(5)).

`getrusage` does not say what its peak was: `ru_maxrss` survives `execve`, so that in a process started by a large test
run it is the run's own peak.
"""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path


def status(name: str, pid: int | str = "self") -> int | None:
    """A size in a process's status, in bytes: VmHWM, VmRSS, RssAnon, ...; None where there is none."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) << 10
    return None


def peak_resident() -> int:
    """Bytes, since this program was started or `forget_peak` was called."""
    found = status("VmHWM")
    if found is not None:
        return found
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak() -> None:
    """What `peak_resident` says starts again at what is resident now."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
