"""The bulk loader's child process. `lazyreplica.bulk` starts it, and explains why it is one.

On standard input comes the job, then a letter for each pause and resume, and its end ends us, whatever we are doing;
on standard output go events.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading

from lazyreplica.bulk.job import LISTENING, Event, Failed, encode_event, read_job
from lazyreplica.bulk.pieces import PieceReader
from lazyreplica.storage import open_store
from lazyreplica.storage.credentials import from_texts

PAUSE, RESUME = b"p", b"r"
_NICE = 10
_LOOK = 50
"""Milliseconds between two looks whether the parent still lives. The pipe's end tells at once, unless a process that
the parent forked holds it open."""


class Parent:
    """The process that started us, at the other end of standard input and output."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._input = select.poll()
        self._input.register(0, select.POLLIN)

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; none when it is gone."""
        while not self._input.poll(_LOOK):
            if os.getppid() != self._pid:
                return b""
        return os.read(0, size)

    def read_exactly(self, size: int) -> bytes:
        """Ends this process when the parent is gone."""
        data = bytearray()
        while len(data) < size:
            if not (part := self.read(size - len(data))):
                os._exit(0)
            data += part
        return bytes(data)

    def obey(self, gate: threading.Event) -> None:
        """Close and open the gate as we are told; end this process with the parent, whatever it is doing."""
        while told := self.read(64):
            if told.endswith(PAUSE):
                gate.clear()
            else:
                gate.set()
        os._exit(0)

    @staticmethod
    def tell(event: Event) -> None:
        line = encode_event(event)
        while line:
            line = line[os.write(1, line) :]


def main(parent_pid: int) -> None:
    """Do the job on standard input; never returns."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C at the terminal is the parent's; its end is ours
    _stand_back()
    parent = Parent(parent_pid)
    gate = threading.Event()
    gate.set()
    try:
        _work(parent, gate)
    except Exception as exc:  # noqa: BLE001 (told to the parent, which raises or reports it)
        parent.tell(Failed(exc))
    finally:
        # Threads that still read what nobody wants any more need no waiting for.
        os._exit(0)


def _stand_back() -> None:
    """Readers come first: take what time they leave, and do not interrupt one when there is something to do.

    The second is SCHED_BATCH (sched(7)): threads that wait for the network wake thousands of times a second.
    """
    os.nice(_NICE)
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # musl, or a sandbox that knows no such thing
            if os.sched_getscheduler(0) == os.SCHED_OTHER:  # SCHED_IDLE is more than that
                os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _work(parent: Parent, gate: threading.Event) -> None:
    job = read_job(parent.read_exactly)
    parent.tell(LISTENING)
    threading.Thread(target=parent.obey, args=(gate,), daemon=True).start()
    store = open_store(job.url, None if job.keys is None else from_texts(job.keys))
    reader = PieceReader(store, job.connections, job.timeout, gate)
    reader.prepare()
    from lazyreplica.bulk.loader import Loader  # takes as long as a handshake: meanwhile

    loader = Loader(job, store, reader, gate, parent.tell)
    del job  # its frames are needed until they are written
    loader.run()
