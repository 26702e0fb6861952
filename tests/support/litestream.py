"""The real Litestream 0.5.17, as writer and as the judge of what a replica holds.

Option names were tried against the binary. What must not be used is its control socket's ``litestream sync``
(nor ``sync -wait``) while somebody writes: with 0.5.17 the replica then loses pages, for good, at the next
checkpoint (tried: 31 of 40 restores of a bank at work had a wrong sum, against 0 of 550 without it).
So :meth:`Litestream.wait_synced` only looks on.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from support.process import Process, clean_env
from support.servers import free_port

PROJECT = Path(__file__).resolve().parents[2]


class LitestreamError(RuntimeError):
    """A litestream command failed; the message ends with its output."""


def find_litestream() -> Path:
    """The binary that $LAZYREPLICA_LITESTREAM names, else the one that scripts/install put into .venv."""
    named = os.environ.get("LAZYREPLICA_LITESTREAM")
    path = Path(named) if named else PROJECT / ".venv" / "litestream" / "litestream"
    if not path.is_file():
        raise FileNotFoundError(f"no Litestream binary at {path}: run scripts/install dev")
    return path


def run_litestream(*arguments: str, env: Mapping[str, str] | None = None, timeout: float = 120) -> str:
    """Run one command to its end and return its standard output."""
    done = subprocess.run(
        [str(find_litestream()), *arguments],
        env=clean_env(env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if done.returncode:
        raise LitestreamError(f"litestream {' '.join(arguments)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def replica_url(replica: str | Path) -> str:
    """A path becomes the file:// URL that Litestream's commands take (it does no percent-decoding)."""
    return replica if isinstance(replica, str) else f"file://{replica.absolute()}"


@dataclass(frozen=True)
class LTXFile:
    """One file of a replica as ``litestream ltx`` reports it."""

    level: int
    min_txid: int
    max_txid: int
    size: int
    timestamp: datetime


def ltx_files(replica: str | Path, *, level: int | None = None, env: Mapping[str, str] | None = None) -> list[LTXFile]:
    """Every file of a replica, at every level or at one, by level and first TXID."""
    levels = "all" if level is None else str(level)
    out = run_litestream("ltx", "-level", levels, "-json", replica_url(replica), env=env)
    files = [
        LTXFile(
            level=row["level"],
            min_txid=int(row["min_txid"], 16),
            max_txid=int(row["max_txid"], 16),
            size=row["size"],
            timestamp=datetime.fromisoformat(row["timestamp"]),
        )
        for row in json.loads(out) or []
    ]
    return sorted(files, key=lambda file: (file.level, file.min_txid, file.max_txid))


def restore(
    replica: str | Path,
    out: Path,
    *,
    txid: int | None = None,
    timestamp: str | datetime | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 120,
) -> Path:
    """``litestream restore``: the reference for what any state of a replica must look like."""
    arguments = ["restore", "-o", str(out)]
    if txid is not None:
        arguments += ["-txid", f"{txid:016x}"]
    if timestamp is not None:
        moment = timestamp if isinstance(timestamp, str) else timestamp.isoformat().replace("+00:00", "Z")
        arguments += ["-timestamp", moment]
    run_litestream(*arguments, replica_url(replica), env=env, timeout=timeout)
    return out


def _config(
    db: Path,
    replica: str | Path,
    metrics_port: int,
    *,
    sync_interval: str,
    monitor_interval: str,
    levels: Sequence[str],
    snapshot_interval: str,
    snapshot_retention: str,
    l0_retention: str,
    l0_retention_check_interval: str,
    db_options: Mapping[str, Any] | None,
    options: Mapping[str, Any] | None,
) -> str:
    """litestream.yml, written as JSON: every JSON document is YAML, and nothing needs quoting by hand."""
    where = {"url": replica} if isinstance(replica, str) else {"path": str(replica.absolute())}
    return json.dumps(
        {
            "addr": f"127.0.0.1:{metrics_port}",
            "levels": [{"interval": interval} for interval in levels],
            "snapshot": {"interval": snapshot_interval, "retention": snapshot_retention},
            "l0-retention": l0_retention,
            "l0-retention-check-interval": l0_retention_check_interval,
            **(options or {}),
            "dbs": [
                {
                    "path": str(db.absolute()),
                    # how often the WAL is looked at: one level-0 file, one TXID each time it grew
                    "monitor-interval": monitor_interval,
                    # how often level-0 files are uploaded
                    "replica": {**where, "sync-interval": sync_interval},
                    **(db_options or {}),
                }
            ],
        },
        indent=2,
    )


class Litestream:
    """``litestream replicate`` for one database. It may be stopped or killed, and started again."""

    def __init__(
        self,
        db: Path,
        replica: str | Path,
        *,
        env: Mapping[str, str] | None = None,
        sync_interval: str = "100ms",
        monitor_interval: str | None = None,
        levels: Sequence[str] = ("30s", "5m", "1h"),
        snapshot_interval: str = "24h",
        snapshot_retention: str = "24h",
        l0_retention: str = "5m",
        l0_retention_check_interval: str = "1s",
        db_options: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.db = db
        self.replica = replica
        self.env = dict(env or {})
        self._dir = Path(tempfile.mkdtemp(prefix="lazyreplica-litestream-"))
        self.log = self._dir / "litestream.log"
        self._metrics_url = ""
        self._options: dict[str, Any] = {
            "sync_interval": sync_interval,
            "monitor_interval": monitor_interval or sync_interval,
            "levels": levels,
            "snapshot_interval": snapshot_interval,
            "snapshot_retention": snapshot_retention,
            "l0_retention": l0_retention,
            "l0_retention_check_interval": l0_retention_check_interval,
            "db_options": db_options,
            "options": options,
        }
        self._process: Process | None = None

    @property
    def process(self) -> Process:
        if self._process is None:
            raise RuntimeError("Litestream is not running")
        return self._process

    @property
    def pid(self) -> int:
        return self.process.pid

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def start(self) -> None:
        port = free_port()
        self._metrics_url = f"http://127.0.0.1:{port}/metrics"
        yml = self._dir / "litestream.yml"
        yml.write_text(_config(self.db, self.replica, port, **self._options))
        command = [str(find_litestream()), "replicate", "-config", str(yml), "-no-expand-env"]
        self._process = Process(command, log=self.log, env=clean_env(self.env))
        self._process.wait_until(lambda: "litestream_txid" in self._metrics(), 20)

    def stop(self) -> None:
        """End it politely: it syncs once more before it goes."""
        if self._process is not None:
            self._process.stop(30)
            self._process = None

    def kill(self) -> None:
        """End it as a power loss would."""
        if self._process is not None:
            self._process.kill()
            self._process = None

    def _metrics(self) -> dict[str, float]:
        """Litestream's Prometheus counters by name, labels dropped (there is one database); {} if it is silent."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(self._metrics_url, timeout=5) as response:
                lines = response.read().decode().splitlines()
        except OSError:
            return {}
        return {line.partition("{")[0]: float(line.split()[-1]) for line in lines if line.startswith("litestream_")}

    def wait_synced(self, timeout: float = 30) -> int:
        """Return a TXID that the replica has reached and that includes every commit made before this call.

        Litestream counts its looks at the WAL, also those that find nothing. Of two more good ones the second began
        after this call, so what was committed before is in a TXID by then; the replica must list that one. Takes two
        to three monitor intervals, and the upload. It may be called while others write.
        """
        deadline = time.monotonic() + timeout

        def pause(problem: str) -> None:
            if not self.process.running or time.monotonic() > deadline:
                raise self.process.failure(f"not synced within {timeout:g} s ({problem})")
            time.sleep(0.01)

        def looks(metrics: Mapping[str, float]) -> float:
            return metrics.get("litestream_sync_count", 0) - metrics.get("litestream_sync_error_count", 0)

        before = looks(self._metrics())
        while looks(metrics := self._metrics()) < before + 2 or metrics["litestream_txid"] < 1:
            pause(f"{looks(metrics) - before:g} of 2 looks at the WAL")
        txid = int(metrics["litestream_txid"])
        # The newest file of level 0 stays there whatever the retention.
        while max((file.max_txid for file in self.ltx_files(level=0)), default=0) < txid:
            pause(f"TXID {txid} is not uploaded")
        return txid

    def restore(self, out: Path, *, txid: int | None = None, timestamp: str | datetime | None = None) -> Path:
        return restore(self.replica, out, txid=txid, timestamp=timestamp, env=self.env)

    def ltx_files(self, *, level: int | None = None) -> list[LTXFile]:
        return ltx_files(self.replica, level=level, env=self.env)

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self._dir, ignore_errors=True)


@contextlib.contextmanager
def replicating(db: Path, replica: str | Path, **options: Any) -> Iterator[Litestream]:
    """Litestream at work on ``db`` for as long as the block runs; ``options`` as for :class:`Litestream`."""
    litestream = Litestream(db, replica, **options)
    try:
        litestream.start()
        yield litestream
    finally:
        litestream.close()


def replicate_once(db: Path, replica: str | Path, **options: Any) -> int:
    """Bring a replica up to date with ``db`` and return its TXID: the quickest way to a replica that stands still."""
    with replicating(db, replica, **options) as litestream:
        return litestream.wait_synced()
