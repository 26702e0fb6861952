"""One local copy for several processes at once, and for the next process: bytes that were downloaded."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from benchmark.figures import Failed, ask, check
from benchmark.local.scene import HYDRATE, SCAN, Setting
from benchmark.workloads import Step

PROCESSES = 4
_PATIENCE = 5.0


def share(setting: Setting) -> None:
    """Bytes that several processes download together, which open one path at once, by those of one alone."""
    for name in setting.remote:
        with setting.trying(name):
            with setting.bench.scratch() as directory:
                alone, _ = _together(setting, name, directory, 1)
            with setting.bench.scratch() as directory:
                received, seconds = _together(setting, name, directory, PROCESSES)
            setting.add(name, f"{PROCESSES} processes at once, bytes / one alone", received / alone, at_most=1.1)
            setting.add(name, "until the last has everything, s", seconds)


def _together(setting: Setting, name: str, directory: Path, count: int) -> tuple[int, float]:
    """Bytes and seconds until all have everything. The peer cannot share: a path for each of its processes."""
    with ExitStack() as stack:
        workers = []
        for number in range(count):
            own = directory / str(number)
            own.mkdir()
            path = directory / "hydrated.db" if name == "us" else own / "hydrated.db"
            start = setting.bench.start(name, "big", own, hydrate=True, hydration_path=str(path))
            workers.append(stack.enter_context(start))
        setting.bench.traffic()
        begun = time.monotonic()
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(lambda worker: ask(worker, HYDRATE, setting.timeout), workers))
        seconds = time.monotonic() - begun
        received = setting.bench.traffic()["down"]
        for worker in workers:
            check(worker, SCAN, setting.truth, setting.timeout)
        return received, seconds


def reopen(setting: Setting) -> None:
    """Bytes that the next process downloads until it has everything, by those of a full hydration."""
    for name in setting.remote:
        with setting.trying(name):
            with setting.bench.scratch() as directory:
                full, seconds = _until(setting, name, directory)
                again, seconds_again = _until(setting, name, directory)
            setting.add(name, "after a clean close, bytes / all", again / full, at_most=0.05)
            setting.add(name, "after a clean close, s", seconds_again)
            with setting.bench.scratch() as directory:
                _killed(setting, name, directory)
                rest, seconds_rest = _until(setting, name, directory)
            setting.add(name, "after kill -9 at 50 %, bytes / all", rest / full, at_most=0.55)
            setting.add(name, "after kill -9 at 50 %, s", seconds_rest)
            setting.add(name, "a first hydration, s", seconds)


def _until(setting: Setting, name: str, directory: Path) -> tuple[int, float]:
    """Bytes and seconds of one process until it has everything.

    The peer goes on with its kept file, too, but then never says that it is complete: that a scan needs nothing more
    counts as well.
    """
    step = Step("open + hydrate", "hydrate", {"patience": _PATIENCE} if name == "peer" else {})
    with setting.bench.start(name, "big", directory, hydrate=True) as worker:
        setting.bench.traffic()
        seconds = ask(worker, step, setting.timeout)["seconds"]
        check(worker, SCAN, setting.truth, setting.timeout)
        received = setting.bench.traffic()["down"]
    return received, seconds


def _killed(setting: Setting, name: str, directory: Path) -> None:
    half = Step("open + hydrate the half", "hydrate", {"until": 50.0})
    with setting.bench.start(name, "big", directory, hydrate=True) as worker:
        ask(worker, half, setting.timeout)
        loading = worker.children
        worker.kill()
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in loading):
        if time.monotonic() > deadline:
            raise Failed("a child process survives its parent")
        time.sleep(0.01)
