"""A few threads for work that makes later reads fast: what goes first, and how it ends.

Nobody ever waits for a place in its queue: a reader that needs an extent which is still waiting there claims it, and
fetches it itself. So a demand read needs no thread, and does not stand behind what was guessed.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum

from lazyreplica.errors import LazyReplicaError

log = logging.getLogger(__name__)

_IDLE = 5.0
"""Seconds after which a thread without work ends."""


class Urgency(IntEnum):
    """What goes first."""

    SOON = 0
    """A reader is on its way there."""
    PERHAPS = 1
    """Useful whatever is read: interior pages. Only in two thirds of the threads."""
    WHENEVER = 2
    """Bulk work that nobody waits for. Only in one thread."""


@dataclass(order=True, slots=True)
class _Job:
    urgency: Urgency
    number: int
    run: Callable[[], None] = field(compare=False)


class _Worker:
    """A thread, and what it waits on between two jobs."""

    __slots__ = ("called", "thread")

    def __init__(self, run: Callable[[_Worker], None]) -> None:
        self.called = threading.Event()
        self.thread = threading.Thread(target=run, args=(self,), name="lazyreplica-readahead", daemon=True)


class Readahead:
    """Threads, started when they are needed, and a queue. `stop`, and then `join`, end it.

    Of idle threads the one that worked last is called first: each has an arena of the C library's allocator, and one
    that was used grows to the size of the largest buffers.
    """

    def __init__(self, most: int) -> None:
        """At most so many threads."""
        self._most = most
        self._jobs: list[_Job] = []
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._workers: set[_Worker] = set()
        self._idle: list[_Worker] = []
        self._running = dict.fromkeys(Urgency, 0)
        self._allowed = {Urgency.SOON: most, Urgency.PERHAPS: max(1, most * 2 // 3), Urgency.WHENEVER: 1}
        self._stopped = False

    def do(self, work: Callable[[], None], urgency: Urgency) -> bool:
        """Run `work` in a thread. False, and nothing happens, when there can be none (any more)."""
        with self._lock:
            if self._stopped:
                return False
            if not self._idle and len(self._workers) < self._most:
                worker = _Worker(self._run)
                try:
                    worker.thread.start()
                except RuntimeError:  # at interpreter exit
                    if not self._workers:
                        return False
                else:
                    self._workers.add(worker)
            heapq.heappush(self._jobs, _Job(urgency, next(self._numbers), work))
            if self._idle:
                self._idle.pop().called.set()
        return True

    def _run(self, worker: _Worker) -> None:
        while (job := self._next(worker)) is not None:
            try:
                job.run()
            except LazyReplicaError as exc:
                log.debug("work ahead failed: %s", exc)
            except Exception:
                log.exception("work ahead failed unexpectedly")
            with self._lock:
                self._running[job.urgency] -= 1
            del job
        with self._lock:
            self._workers.discard(worker)

    def _next(self, worker: _Worker) -> _Job | None:
        """The next job, waited for; None when there is nothing to do for long, or any more."""
        while True:
            with self._lock:
                if self._stopped:
                    return None
                # Nothing overtakes a job whose kind has its threads: whoever ends one of that kind comes by here.
                if self._jobs and self._running[self._jobs[0].urgency] < self._allowed[self._jobs[0].urgency]:
                    job = heapq.heappop(self._jobs)
                    self._running[job.urgency] += 1
                    return job
                worker.called.clear()
                self._idle.append(worker)
            if not worker.called.wait(_IDLE):
                with self._lock:
                    if worker in self._idle:
                        self._idle.remove(worker)
                        return None

    def stop(self) -> None:
        """Take no more work, and forget what waits. Requests under way are ended by closing the store."""
        with self._lock:
            self._stopped = True
            self._jobs.clear()
            for worker in self._idle:
                worker.called.set()

    def join(self, timeout: float) -> None:
        """After `stop`: wait for each thread, at most `timeout` seconds."""
        with self._lock:
            threads = [worker.thread for worker in self._workers]
        for thread in threads:
            # A connection may be closed by the garbage collector, which runs in any thread, these included.
            if thread is not threading.current_thread():
                thread.join(timeout)
