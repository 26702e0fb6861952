"""A contender's process: steps in, results out; its memory is watched from outside."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import IO, Any, cast

from benchmark.workloads import Step
from support.memory import status
from support.process import tail

_SAMPLE_EVERY = 0.02
_CHILDREN_EVERY = 10
"""Samples between two looks for children: with dozens of threads one takes a millisecond. The children in question live
for seconds."""
_END_TIMEOUT = 20.0


class Memory:
    """Peaks of a process's memory, sampled from outside (Linux; elsewhere nothing is known).

    Anonymous memory is the sum over the process and its children: we hydrate in one.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._clear = Path(f"/proc/{pid}/clear_refs")
        self._children: list[int] = []
        self._lock = threading.Lock()
        self._peak = 0
        self._stop = threading.Event()
        self.base = self._anonymous()
        """What the imports take, in bytes."""
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def reset(self) -> None:
        with suppress(OSError):
            self._clear.write_text("5")  # the kernel's own peak of RSS starts again
        with self._lock:
            self._peak = 0

    def peak(self) -> tuple[int | None, int | None]:
        """Anonymous memory above the start, and resident memory, since `reset`."""
        self._look()
        resident = status("VmHWM", self._pid)
        if self.base is None:
            return None, None
        with self._lock:
            return max(0, self._peak - self.base), resident

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        for number in count(1):
            if self._stop.wait(_SAMPLE_EVERY):
                return
            if number % _CHILDREN_EVERY == 0:
                self._children = children(self._pid)
            self._look()

    def _look(self) -> None:
        now = self._anonymous()
        with self._lock:
            self._peak = max(self._peak, now or 0)

    def _anonymous(self) -> int | None:
        own = status("RssAnon", self._pid)
        return None if own is None else own + sum(status("RssAnon", pid) or 0 for pid in self._children)


def children(pid: int) -> list[int]:
    """The processes that any thread of that process has started, and not yet waited for."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += map(int, path.read_text().split())
    return found


class Worker:
    """A contender's process. After a timeout or its death, `gone` says so and it takes no more steps."""

    def __init__(self, target: dict[str, Any], env: dict[str, str], log: Path) -> None:
        self._log = log
        self.gone = ""
        self.died = False
        self._lines: queue.Queue[str] = queue.Queue()
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "benchmark.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=env,
                cwd=log.parent,
                text=True,
            )
        self._in, out = cast(IO[str], self._process.stdin), cast(IO[str], self._process.stdout)
        threading.Thread(target=self._listen, args=(out,), daemon=True).start()
        self._tell(target)
        if self._answer(60) is None:
            self.kill()
            raise RuntimeError(f"{target['contender']} cannot be loaded:\n{tail(log)}")
        self.memory = Memory(self._process.pid)

    def ask(self, step: Step, timeout: float) -> dict[str, Any] | None:
        """The step's result; None when there is none in time, or never will be."""
        self._tell({"kind": step.kind, "args": step.args})
        answer = self._answer(timeout)
        if answer is None:
            self.died = self._process.poll() is not None
            how = (
                f"died with {self._process.returncode}: {tail(self._log, 500)}" if self.died else f"over {timeout:g} s"
            )
            self.gone = f"{step.name}: {how}"
            self.kill()
        return answer

    def end(self) -> str:
        """Let it close its connections. Returns what is wrong with how it ended, if anything."""
        with suppress(OSError):
            self._in.close()
        try:
            status = self._process.wait(_END_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.kill()
            return f"had not ended {_END_TIMEOUT:g} s after its last step"
        finally:
            self.memory.stop()
        return "" if status == 0 or self.gone else f"ended with status {status}: {tail(self._log, 500)}"

    @property
    def children(self) -> list[int]:
        return children(self._process.pid)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _tell(self, message: object) -> None:
        with suppress(BrokenPipeError):
            print(json.dumps(message), file=self._in, flush=True)

    def _listen(self, out: IO[str]) -> None:
        for line in out:
            self._lines.put(line)
        self._lines.put("")

    def _answer(self, timeout: float) -> dict[str, Any] | None:
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            return None
        return cast(dict[str, Any], json.loads(line)) if line else None


@contextmanager
def running(target: dict[str, Any], env: dict[str, str], log: Path) -> Iterator[Worker]:
    worker = Worker(target, env, log)
    try:
        yield worker
        wrong = worker.end()
        if wrong:
            print(f"warning: {target['contender']} {wrong}", file=sys.stderr)
    finally:
        worker.kill()
