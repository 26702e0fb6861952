"""Brings many pages into a local database file at once, in a child process; this is the parent's side.

A child process, because threads that decode keep readers from the interpreter lock: with four of them a local point
query took 3.9 ms (p99) instead of 63 us.

    worker     the child process                  loader   its work: decode, write, verify, take back
    plan       which bytes of a file              pieces   reads of them, side by side
    pages      the file and its presence map      job      what the two processes say to each other
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import selectors
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from queue import SimpleQueue
from typing import IO

from lazyreplica.bulk.job import (
    LISTENING,
    BulkFile,
    BulkJob,
    Event,
    Failed,
    FileDamaged,
    FileDone,
    FileGone,
    Progress,
    WorkerLost,
    decode_event,
    encode_job,
)

__all__ = [
    "BulkFile",
    "BulkJob",
    "BulkLoader",
    "Event",
    "Failed",
    "FileDamaged",
    "FileDone",
    "FileGone",
    "Progress",
    "WorkerLost",
]

log = logging.getLogger(__name__)

_JOIN_SECONDS = 2.0
_END_SECONDS = 1.0
_LOOK_SECONDS = 1.0
"""After that it is seen whether the process must still be told something."""
_PAUSE, _RESUME = b"p", b"r"
_PYTHON = re.compile(r"(python|pypy)[\w.-]*", re.IGNORECASE)
_BOOTSTRAP = """
import sys, types
parent, package, *sys.path = sys.argv[1:]
for name in ("lazyreplica", "lazyreplica.bulk", "lazyreplica.ltx"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [package + name[11:].replace(".", "/")]
from lazyreplica.bulk.worker import main
main(int(parent))
"""
"""Imports modules without the packages' own `__init__`: the first registers the VFS, which takes APSW and 80 ms.

And without `site`: the parent knows where modules are.
"""


class BulkLoader:
    """One job, in a process of its own. `start` it, take its `events`, `stop` it. Thread-safe."""

    def __init__(
        self, job: BulkJob, *, on_pages: Callable[[int], None] | None = None, kept_fds: tuple[int, ...] = ()
    ) -> None:
        """`on_pages` is told of each `Progress`'s pages, by whoever takes `events`. The child inherits `kept_fds`."""
        self._kept_fds = kept_fds
        self._left = len(job.files)
        """Files that the child has not ended yet."""
        self._job = encode_job(job)
        """What it has not been given yet; and `_rest`, of the part that it is given now."""
        self._rest = memoryview(b"")
        self._on_pages = on_pages
        self._owner = os.getpid()
        self._events: SimpleQueue[Event | None] = SimpleQueue()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._attend, name="lazyreplica-bulk", daemon=True)
        self._last_words = ""
        self._lock = threading.Lock()
        """Guards what follows, and is not held for long."""
        self._listening = False
        """The process has read the job, and its standard input is open."""
        self._paused = self._told = False
        """What is wanted, and what the process has been told."""
        self._stopped = False

    def start(self) -> None:
        """Start the process, unless it is stopped already. Once. Raises `OSError` if that cannot be done here."""
        if self._stopped:
            return
        pipe = subprocess.PIPE
        process = subprocess.Popen(_command(), bufsize=0, stdin=pipe, stdout=pipe, stderr=pipe, pass_fds=self._kept_fds)
        with self._lock:
            self._process = process
        try:
            self._thread.start()
        except RuntimeError as exc:  # no more threads, or the interpreter is ending
            process.kill()
            _end(process)
            raise OSError(f"the bulk loader cannot be attended to: {exc}") from exc
        if self._stopped:  # meanwhile, by somebody who may have found no process
            process.kill()

    def pause(self) -> None:
        """Send no request, decode and write nothing from about now on: requests under way are received to their end."""
        self._let(paused=True)

    def resume(self) -> None:
        """Go on."""
        self._let(paused=False)

    def stop(self) -> None:
        """End the process, at once; `events` end without another word. May be called at any time, and again."""
        if os.getpid() != self._owner:
            return  # in a forked child: the process is the parent's, and so may be a lock that is held
        with self._lock:
            self._stopped = True
            process = self._process
        if process is None:
            self._events.put(None)
            return
        process.kill()
        if self._thread.ident is not None:
            self._thread.join(_JOIN_SECONDS)

    def events(self) -> Iterator[Event]:
        """What happens, as it happens, until every file is done, damaged or gone, or the job has `Failed`."""
        while (event := self._events.get()) is not None:
            if isinstance(event, Progress) and self._on_pages is not None:
                self._on_pages(event.pages)
            yield event
        self._events.put(None)

    def _let(self, *, paused: bool) -> None:
        with self._lock:
            self._paused = paused
            self._tell()

    def _tell(self) -> None:
        """Tell the process whether to pause, unless it knows. Under `_lock`.

        What it cannot be told (it has read nothing for 64 KiB of letters, or has ended) keeps nobody waiting: it is
        told later.
        """
        if self._listening and self._told != self._paused:
            assert self._process is not None and self._process.stdin is not None
            with contextlib.suppress(OSError):
                os.write(self._process.stdin.fileno(), _PAUSE if self._paused else _RESUME)
                self._told = self._paused

    def _attend(self) -> None:
        """The thread: gives the process its job, and passes on what it says."""
        process = self._process
        assert process is not None
        try:
            for event in self._talk(process):
                if event == LISTENING:
                    self._it_listens()
                    continue
                if isinstance(event, FileDone | FileDamaged | FileGone):
                    self._left -= 1
                elif isinstance(event, Failed):
                    self._left = 0
                self._events.put(event)
        except Exception as exc:  # noqa: BLE001 (told, or whoever waits for events would wait for ever)
            self._left = 0
            # An `OSError` would be one of the local files.
            lost = WorkerLost(f"the bulk worker cannot be attended to: {exc}") if isinstance(exc, OSError) else exc
            self._events.put(Failed(lost))
        finally:
            with self._lock:
                self._listening = False
            status = _end(process)
            if self._left and not self._stopped:
                ended = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
                said = f"; its last words: {self._last_words}" if self._last_words else ""
                self._events.put(Failed(WorkerLost(f"the bulk worker {ended} with {self._left} files to go{said}")))
            self._events.put(None)

    def _give(self, stdin: int) -> bool:
        """Give the process as much of its job as it takes now; False when there is nothing more to give."""
        parts: Iterator[bytes | memoryview] = chain((self._rest,), self._job)
        for part in parts:
            rest = memoryview(part)
            while rest:
                try:
                    rest = rest[os.write(stdin, rest) :]
                except BlockingIOError:
                    self._rest = rest
                    return True
                except BrokenPipeError:  # it has ended: then it says nothing more, either
                    return False
        self._rest = memoryview(b"")
        return False

    def _it_listens(self) -> None:
        """The process has read its job: there is room for a letter, and it will be read."""
        with self._lock:
            self._listening = True
            self._tell()

    def _talk(self, process: subprocess.Popen[bytes]) -> Iterator[Event]:
        """Events until the process closes its output; what it writes to standard error is logged.

        All at once: a process that waits until it is rid of what it says reads no job, and the other way round.
        """
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        os.set_blocking(process.stdin.fileno(), False)
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdin, selectors.EVENT_WRITE)
            for pipe in (process.stdout, process.stderr):
                selector.register(pipe, selectors.EVENT_READ, bytearray())
            talking = 2
            while talking:
                ready = selector.select(_LOOK_SECONDS)
                with self._lock:
                    self._tell()
                for key, _ in ready:
                    if key.fileobj is process.stdin:
                        if not self._give(key.fd):
                            selector.unregister(key.fd)
                        continue
                    partial = key.data
                    if not (data := os.read(key.fd, 1 << 16)):
                        selector.unregister(key.fd)
                        talking -= 1
                    *lines, rest = (partial + data).split(b"\n")
                    partial[:] = rest
                    for line in lines:
                        if key.fileobj is process.stdout:
                            yield decode_event(bytes(line))
                        else:
                            self._last_words = line.decode(errors="replace")
                            log.debug("bulk worker: %s", self._last_words)


def _end(process: subprocess.Popen[bytes]) -> int:
    """Wait for a process that has ended or is about to; its status. Its input is its life."""
    pipes: list[IO[bytes] | None] = [process.stdin, process.stdout, process.stderr]
    for pipe in pipes:
        if pipe is not None:
            pipe.close()
    try:
        return process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _command() -> list[str]:
    executable = sys.executable or ""
    # An embedding program (a server, a frozen application) would start itself once more.
    if getattr(sys, "frozen", False) or not _PYTHON.fullmatch(Path(executable).name):
        raise OSError(f"sys.executable is {executable!r}, expected a Python interpreter: no process for bulk loading")
    paths = [path for path in sys.path if isinstance(path, str)]
    package = str(Path(__file__).parents[1])
    return [executable, "-S", "-P", "-c", _BOOTSTRAP, str(os.getpid()), package, *paths]
