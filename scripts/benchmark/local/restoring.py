"""A whole database out of its backup: `lazyreplica restore` beside `litestream restore`, the commands themselves."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from benchmark.figures import Failed
from benchmark.local.scene import Setting
from support.litestream import find_litestream

_OURS = "import sys; from lazyreplica.cli import main; sys.exit(main())"


def restore(setting: Setting) -> None:
    """From start to exit of a process, the two taking turns; their files must be equal."""
    rounds: list[dict[str, tuple[float, float]]] = []
    for _ in range(setting.effort.rounds):
        digests = set()
        rounds.append({})
        for name in setting.remote:
            with setting.trying(name), setting.bench.scratch() as directory:
                target = directory / "restored.db"
                rounds[-1][name] = _run(setting, name, target)
                with target.open("rb") as file:
                    digests.add(hashlib.file_digest(file, "sha256").hexdigest())
        with setting.trying("us"):
            if len(digests) > 1:
                raise Failed("the restored file is not the one that litestream restores")
    for name in setting.remote:
        runs = [each[name] for each in rounds if name in each]
        if runs:
            setting.add(name, "restore command, s", [seconds for seconds, _ in runs])
            setting.add(name, "its CPU, s", [cpu for _, cpu in runs])
    times = [each["peer"][0] / each["us"][0] for each in rounds if {"us", "peer"} <= each.keys()]
    if times:
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
        late = threading.Timer(setting.timeout, process.kill)
        late.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        finally:
            late.cancel()
        seconds = time.monotonic() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise Failed(f"{name} ended with {process.returncode}: {log.read_text(errors='replace')[-500:]}")
    return seconds, usage.ru_utime + usage.ru_stime
