"""A whole database out of its backup: `lazyreplica restore` beside `litestream restore`, the commands themselves."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmark.figures import Failed
from benchmark.local.scene import Setting
from support.litestream import find_litestream

_OURS = "import sys; from lazyreplica.cli import main; sys.exit(main())"


def restore(setting: Setting) -> None:
    """From start to exit of a process, the two taking turns; their files must be equal."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in setting.remote}
    for _ in range(setting.effort.rounds):
        digests = set()
        for name in setting.remote:
            with setting.trying(name), setting.bench.scratch() as directory:
                target = directory / "restored.db"
                found[name].append(_run(setting, name, target))
                with target.open("rb") as file:
                    digests.add(hashlib.file_digest(file, "sha256").hexdigest())
        if len(digests) > 1:
            raise Failed("the restored files differ")
    for name, runs in found.items():
        setting.add(name, "restore command, s", [seconds for seconds, _ in runs])
        setting.add(name, "its CPU, s", [cpu for _, cpu in runs])
    pairs = list(zip(found.get("us", []), found.get("peer", []), strict=False))
    if pairs:
        times = [theirs / ours for (ours, _), (theirs, _) in pairs]
        setting.add("us", "times as fast as `litestream restore`", times, at_least=2.5)


def _run(setting: Setting, name: str, target: Path) -> tuple[float, float]:
    """Wall and CPU seconds, children included."""
    command = [sys.executable, "-P", "-c", _OURS] if name == "us" else [str(find_litestream())]
    command += ["restore", "-o", str(target), setting.bench.url("big")]
    log = target.with_name("log")
    with log.open("wb") as output:
        begun = time.monotonic()
        process = subprocess.Popen(
            command, env=setting.bench.environment(), stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise Failed(f"{name} ended with {process.returncode}: {log.read_text(errors='replace')[-500:]}")
    return seconds, usage.ru_utime + usage.ru_stime
