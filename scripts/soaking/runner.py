"""Puts the parts together: server, proxy, primary, Litestream, readers; plays the weather; ends in order."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from soaking.invariants import look
from soaking.report import Group, Result
from soaking.weather import Weather, forecast
from soaking.workload import build
from support.faultproxy import FaultProxy
from support.litestream import Litestream, replicating
from support.process import clean_env
from support.servers import S3Server, serve_rclone, serve_seaweed

_PROGRESS = 10.0


@dataclass(frozen=True)
class Plan:
    """What is asked for on the command line."""

    seconds: float
    seed: int
    faults: str
    readers: tuple[str, ...]
    server: str
    rate: float
    peer: bool
    sabotage: str
    l0_retention: str


@dataclass(frozen=True)
class _Reader:
    kind: str
    process: subprocess.Popen[str]
    pump: threading.Thread

    def tell(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError, ValueError):
            stdin = cast("IO[str]", self.process.stdin)
            stdin.write(line + "\n")
            stdin.flush()


class Crew:
    """The readers' processes. A short-lived one is followed by the next."""

    def __init__(self, plan: Plan, url: str, env: dict[str, str], directory: Path) -> None:
        self._plan, self._url, self._env, self._directory = plan, url, env, directory
        self._reports: queue.SimpleQueue[tuple[str, dict[str, Any]]] = queue.SimpleQueue()
        self._readers: list[_Reader] = []
        self._started = 0
        # A reader that was made to lie never gets there.
        self._patience = 10.0 if plan.sabotage else 90.0
        self.result = Result()
        for kind in plan.readers:
            self._start(kind)

    def _start(self, kind: str) -> None:
        self._started += 1
        number = self._started
        orders = {
            "url": self._url,
            "peer": self._plan.peer,
            "faults": self._plan.faults,
            "sabotage": self._plan.sabotage,
            "seed": self._plan.seed * 1000 + number,
            "options": self._options(kind),
            "threads": 4 if kind == "threads" else 1,
            "hold": (2.0, 12.0) if kind == "long" else None,
            # Most of what a short-lived process costs is its start: not all of the machine is to go there.
            "pace": {"threads": (0.3, 0.8), "short": (0.5, 1.5)}.get(kind, (0.05, 0.4)),
            "patience": self._patience,
            "transactions": 3 if kind == "short" else None,
        }
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "soaking.readers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(self._directory / f"{kind}.log").open("a"),
            text=True,
            env=self._env | self._peer_environment(kind, number),
        )
        pump = threading.Thread(target=self._pump, args=(kind, process), daemon=True)
        reader = _Reader(kind, process, pump)
        reader.tell(json.dumps(orders))
        pump.start()
        self._readers.append(reader)
        self.result.groups.setdefault(kind, Group()).processes += 1

    def _options(self, kind: str) -> dict[str, object]:
        options: dict[str, object] = {"hydrate": False, "poll_interval": 0.3, "read_timeout": 5}
        if kind == "plain":
            options["cache_size"] = 256 << 10
        if kind in ("hydrating", "shared", "threads"):
            options["hydrate"] = True
        if kind == "shared":
            options["hydration_path"] = str(self._directory / "shared.db")
        return options

    def _peer_environment(self, kind: str, number: int) -> dict[str, str]:
        if not self._plan.peer:
            return {}
        env = {"LITESTREAM_REPLICA_URL": self._url, "LITESTREAM_LOG_LEVEL": "ERROR"}
        if kind in ("hydrating", "shared", "threads"):
            path = str(self._directory / f"peer-{number}.db")  # two of its processes cannot share one
            env |= {"LITESTREAM_HYDRATION_ENABLED": "true", "LITESTREAM_HYDRATION_PATH": path}
        return env

    def _pump(self, kind: str, process: subprocess.Popen[str]) -> None:
        for line in cast("IO[str]", process.stdout):
            self._reports.put((kind, json.loads(line)))

    def collect(self) -> None:
        """Take in what was reported."""
        while not self._reports.empty():
            self.result.add(*self._reports.get())

    def look_after(self) -> None:
        """Start short-lived readers again, and note those that ended although nobody asked them to."""
        for reader in [each for each in self._readers if each.process.poll() is not None]:
            self._bury(reader)
            self._start(reader.kind)

    def _bury(self, reader: _Reader) -> None:
        reader.pump.join(10)
        self._readers.remove(reader)
        status = reader.process.wait()
        if status or reader.kind != "short":
            log = (self._directory / f"{reader.kind}.log").read_text(errors="replace")[-1500:]
            self.result.anomaly(reader.kind, f"its process ended with {status}: {log}", "ended")

    def finish(self, final: int) -> None:
        """Let everybody catch up with the primary's last transaction, and end."""
        timeout = self._patience + 45
        for reader in self._readers:
            reader.tell(str(final))
        deadline = time.monotonic() + timeout
        for reader in self._readers:
            try:
                status = reader.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.result.anomaly(reader.kind, f"did not end within {timeout:g} s", "ended")
                continue
            reader.pump.join(10)
            if status:
                log = (self._directory / f"{reader.kind}.log").read_text(errors="replace")[-1500:]
                self.result.anomaly(reader.kind, f"its process ended with {status}: {log}", "ended")
        self.collect()

    def kill(self) -> None:
        for reader in self._readers:
            reader.process.kill()
            reader.process.wait()


@contextlib.contextmanager
def _primary(db: Path, plan: Plan, env: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-P", "-m", "soaking.workload", str(db)]
    command += ["--seed", str(plan.seed), "--rate", str(plan.rate)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _levels(litestream: Litestream) -> str:
    counts: dict[int, int] = {}
    for file in litestream.ltx_files():
        counts[file.level] = counts.get(file.level, 0) + 1
    return "files at the end by level: " + ", ".join(f"{level}: {count}" for level, count in sorted(counts.items()))


def soak(plan: Plan) -> dict[str, Any]:
    """Run it. Prints a line of progress every ten seconds; returns the summary."""
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lazyreplica-soak-")))
        serve = serve_seaweed if plan.server == "seaweed" else serve_rclone
        server: S3Server = stack.enter_context(serve(directory / "server"))
        proxy = stack.enter_context(FaultProxy(server))
        db = directory / "primary.db"
        build(db, plan.seed)
        bucket = server.new_bucket()
        # The writer goes to the server directly: what is put to the test is reading.
        litestream = stack.enter_context(
            replicating(
                db,
                server.url(bucket, "app"),
                env=server.env,
                sync_interval="100ms",
                levels=["2s", "6s", "20s"],
                snapshot_interval="15s",
                snapshot_retention="30s",
                l0_retention=plan.l0_retention,
                l0_retention_check_interval="1s",
            )
        )
        litestream.wait_synced()
        env = {**clean_env(server.env), "PYTHONPATH": os.environ["PYTHONPATH"], "PYTHONFAULTHANDLER": "1"}
        primary = stack.enter_context(_primary(db, plan, env))
        crew = Crew(plan, server.url(bucket, "app", endpoint=proxy.endpoint), env, directory)
        stack.callback(crew.kill)
        weather = Weather(proxy, forecast(plan.faults, plan.seconds, plan.seed))
        _play(plan, crew, weather, primary)
        weather.clear()
        done, _ = primary.communicate(timeout=60)
        litestream.wait_synced(60)
        with contextlib.closing(sqlite3.connect(db)) as con:
            last = look(con)
        crew.finish(last.n)
        crew.result.expect(last.n, last.digest)
        return {
            **vars(plan),
            **crew.result.as_json(),
            "strikes": weather.strikes,
            "requests": proxy.requests,
            "workload": json.loads(done),
            "levels": _levels(litestream),
        }


def _play(plan: Plan, crew: Crew, weather: Weather, primary: subprocess.Popen[str]) -> None:
    start = time.monotonic()
    shown = 0.0
    while (elapsed := time.monotonic() - start) < plan.seconds:
        if primary.poll() is not None:
            raise RuntimeError(f"the primary ended with {primary.returncode}; its own words are above")
        weather.turn(elapsed)
        crew.collect()
        crew.look_after()
        if elapsed - shown >= _PROGRESS:
            shown = elapsed
            result = crew.result
            print(
                f"{elapsed:6.0f} s  {result.transactions} checked, {result.distinct} states, "
                f"{result.anomalies} anomalies, errors {dict(result.errors)}, strikes {sum(weather.strikes.values())}",
                flush=True,
            )
        time.sleep(0.1)
