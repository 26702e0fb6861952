"""What stands for other machines does not interrupt what is measured."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path


def stand_back(pid: int) -> None:
    """No thread of that process, and none that it starts from now on, takes a CPU away from another that works on it.

    It gets its share all the same, in turns. A server's threads wake thousands of times a second; each of those times
    would cost a reader on this machine 7 us or more, and a server that is another machine costs it nothing. This is
    SCHED_BATCH (sched(7)); elsewhere than on Linux nothing is done.
    """
    if sys.platform == "linux":
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):  # the thread has ended
                os.sched_setscheduler(int(task.name), os.SCHED_BATCH, os.sched_param(0))
