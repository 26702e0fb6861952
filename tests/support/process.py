"""Child processes that cannot outlive the tests.

The servers are started once a session and left alone, so a test run that is killed (a time limit, an
out-of-memory kill) would leave them behind. PR_SET_PDEATHSIG is Linux only, needs a preexec function, and fires
when the *thread* that forked ends. Instead one small reaper process watches its parent and kills what was
registered with it once the parent is gone.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

_REAPER = """
import os, select, signal, sys
parent, pids, rest = int(sys.argv[1]), set(), b""
while os.getppid() == parent:
    if select.select([0], [], [], 0.5)[0]:
        data = os.read(0, 65536)
        if not data:
            break  # the parent said goodbye, or died
        *lines, rest = (rest + data).split(b"\\n")
        for line in lines:
            (pids.add if line[:1] == b"+" else pids.discard)(int(line[1:]))
for pid in pids:
    try:
        os.kill(pid, signal.SIGKILL)
    except OSError:
        pass
"""

_reaper: subprocess.Popen[bytes] | None = None


def _tell_reaper(message: str) -> None:
    global _reaper
    if _reaper is None or _reaper.poll() is not None:
        _reaper = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _REAPER, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,  # a Ctrl-C at the terminal must not take the reaper first
        )
        atexit.register(_dismiss, _reaper)
    assert _reaper.stdin is not None
    _reaper.stdin.write(message.encode())


def _dismiss(reaper: subprocess.Popen[bytes]) -> None:
    assert reaper.stdin is not None
    reaper.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        reaper.wait(5)


def clean_env(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without anything that steers Litestream or an AWS client, plus ``extra``.

    AWS_CA_BUNDLE matters most: Litestream refuses to start where it is set.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "LITESTREAM_"))}
    return {**kept, **(extra or {})}


def find_program(name: str) -> str:
    """The program that pip installed beside this interpreter, else the one on PATH."""
    path = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if path is None:
        raise FileNotFoundError(f"{name} is not installed: run scripts/install dev")
    return path


def tail(path: Path, size: int = 4000) -> str:
    """The end of a log, for an error message."""
    return path.read_text(errors="replace")[-size:] if path.exists() else "(no log)"


class Process:
    """A running program whose output goes to a log file."""

    def __init__(
        self, command: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> None:
        self.command = list(command)
        self.log = log
        with log.open("ab") as output:
            self._popen = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=clean_env() if env is None else dict(env),
                cwd=cwd,
            )
        self._owner = os.getpid()
        _tell_reaper(f"+{self.pid}\n")

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def running(self) -> bool:
        return self._popen.poll() is None

    def failure(self, what: str) -> RuntimeError:
        state = "still running" if self.running else f"exited with {self._popen.returncode}"
        return RuntimeError(f"{what}: {' '.join(self.command)} ({state})\n{tail(self.log)}")

    def wait_until(self, ready: Callable[[], bool], timeout: float, *, interval: float = 0.02) -> None:
        """Poll ``ready`` until it is true; raise with the end of the log if the program dies or time is up."""
        deadline = time.monotonic() + timeout
        while not ready():
            if not self.running:
                raise self.failure("died while starting")
            if time.monotonic() > deadline:
                raise self.failure(f"not ready after {timeout:g} s")
            time.sleep(interval)

    def signal(self, number: signal.Signals) -> None:
        self._popen.send_signal(number)

    def stop(self, timeout: float = 10) -> int:
        """Ask it to end, wait, then insist. Returns the exit status (negative: the signal)."""
        if self._owner != os.getpid():
            raise RuntimeError("a forked child must not stop its parent's programs")
        if self.running:
            self._popen.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(timeout)
        return self.kill()

    def kill(self) -> int:
        if self.running:
            self._popen.kill()
        status = self._popen.wait(30)
        _tell_reaper(f"-{self.pid}\n")
        return status

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
