"""Download a whole database, then read it: the download beside the peer, local reads beside native SQLite.

Local reads take milliseconds: each is done several times after a warm-up, we and native SQLite taking turns. What is
told is the median of the ratios of neighbours. The peer, which takes up to a minute for a step, does each once.
"""

from __future__ import annotations

import random
from collections import defaultdict
from contextlib import ExitStack

from benchmark.figures import Each, Failed, ask, check
from benchmark.local.scene import HYDRATE, SCAN, Setting
from benchmark.process import Worker
from benchmark.workloads import POINT, Step

MEMORY_GOAL = 300
"""MB of anonymous memory, parent and child."""


def hydrate(setting: Setting) -> None:
    """The downloads, then the local reads by the last round's processes."""
    effort = setting.effort
    with ExitStack() as last:
        found: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
        workers: dict[str, Worker] = {}
        for number in range(effort.rounds):
            with ExitStack() as stack:
                workers = {}
                for name in setting.remote:
                    directory = stack.enter_context(setting.bench.scratch())
                    worker = stack.enter_context(setting.bench.start(name, "big", directory, hydrate=True))
                    with setting.trying(name):
                        found[name].append(_download(setting, worker))
                        workers[name] = worker
                if number == effort.rounds - 1:
                    last.enter_context(stack.pop_all())
        _tell(setting, found)
        directory = last.enter_context(setting.bench.scratch())
        native = last.enter_context(setting.bench.start("native", "big", directory, setting.data.database))
        _read(setting, {"native": native, **workers})


def _download(setting: Setting, worker: Worker) -> tuple[float, float, float]:
    """Seconds, CPU seconds, bytes of memory."""
    worker.memory.reset()
    setting.bench.traffic()
    answer = ask(worker, HYDRATE, setting.timeout)
    peak, _ = worker.memory.peak()
    received = setting.bench.traffic().get("down", 0)
    if received < setting.data.facts["ltx_bytes"] * 0.8:
        raise Failed(f"only {received} bytes were received")
    if worker.children:
        raise Failed("a child process still runs: its CPU time is not counted")
    return answer["seconds"], answer["cpu"], (peak or 0) + (worker.memory.base or 0)


def _tell(setting: Setting, found: dict[str, list[tuple[float, float, float]]]) -> None:
    far = setting.link.rtt > 0
    for name, runs in found.items():
        setting.add(name, "open + hydrate, s", [seconds for seconds, _, _ in runs])
        setting.add(name, "CPU, child included, s", [cpu for _, cpu, _ in runs])
        peaks = [memory / 1e6 for _, _, memory in runs]
        setting.add(name, "RssAnon peak, child included, MB", peaks, at_most=MEMORY_GOAL if far else None)
    pairs = list(zip(found["us"], found["peer"], strict=False))
    if pairs:
        setting.add("us", "times as fast as the peer", [peer[0] / us[0] for us, peer in pairs], at_least=2.5)
        half = 0.5 if far else None
        setting.add("us", "CPU / the peer's", [us[1] / peer[1] for us, peer in pairs], at_most=half)


def _read(setting: Setting, workers: dict[str, Worker]) -> None:
    effort = setting.effort
    rng = random.Random(9)
    keys = [rng.randint(1, setting.data.facts["posts"]) for _ in range(effort.points)]
    count = f"{effort.points:,}"
    steps = (
        (SCAN, 0.95),
        (Step(f"{count} random points, a transaction each", "points", {"sql": POINT, "keys": keys}), 0.8),
        (Step(f"{count} random points, one transaction", "points", {"sql": POINT, "keys": keys, "one": True}), 1.1),
        (Step(f"one point {count} times", "points", {"sql": POINT, "keys": keys[:1] * effort.points}), 0.9),
    )
    for worker in workers.values():  # native opens its file here
        ask(worker, HYDRATE, setting.timeout)
    gone: set[str] = set()
    """Contenders that have failed."""
    for step, goal in steps:
        truth = ask(workers["native"], step, setting.timeout)["digest"]
        times: dict[str, Each] = defaultdict(list)
        for number in range(effort.repeats + 1):
            for name, worker in workers.items():
                if name in gone or (name == "peer" and number):
                    continue
                gone.add(name)
                with setting.trying(name):
                    seconds = check(worker, step, truth, setting.timeout)["seconds"]
                    gone.remove(name)
                    if number or name == "peer":
                        times[name].append(seconds)
        for name, each in times.items():
            if name in setting.contenders:
                setting.add(name, f"{step.name}, ms", [seconds * 1e3 for seconds in each])
        for name in setting.remote:
            ratios = [ours / native for ours, native in zip(times[name], times["native"], strict=False)]
            if ratios:
                setting.add(name, f"{step.name} / native", ratios, at_most=goal)
