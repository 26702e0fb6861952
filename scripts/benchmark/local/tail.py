"""Point queries on pages that are all local, while the rest of the database is downloaded, and afterwards."""

from __future__ import annotations

import random
from collections.abc import Sequence

from benchmark.figures import Each, Failed, ask, percentile
from benchmark.local.scene import HYDRATE, Setting
from benchmark.workloads import POINT, Step

ROWS = 20_000
"""Whose pages are read first: 6 MB, more than SQLite's own page cache."""
_PEER_POINTS = 1000


def p99(setting: Setting) -> None:
    """The 99th percentile of a query's time while the rest hydrates, by that with an idle hydrator."""
    posts = setting.data.facts["posts"]
    low = posts // 2
    high = low + min(ROWS, posts // 10)
    rng = random.Random(11)
    keys = [rng.randint(low, high) for _ in range(setting.effort.points)]
    range_sql = "SELECT sum(length(body)) FROM posts WHERE id BETWEEN ? AND ?"
    steps = (
        Step("open", "hydrate", {"until": 0.0}),
        Step("read the range", "sql", {"statements": [(range_sql, (low, high))]}),
    )
    for name in setting.contenders:
        # The peer takes milliseconds for a local one.
        some = keys[:_PEER_POINTS] if name == "peer" else keys
        with setting.trying(name):
            found = [_measure(setting, name, steps, some) for _ in range(setting.effort.repeats)]
            _tell(setting, name, found)


def _measure(setting: Setting, name: str, steps: Sequence[Step], keys: list[int]) -> tuple[Each, Each]:
    """Seconds of each query: while the rest hydrates, and afterwards."""
    with setting.bench.scratch() as directory:
        start = setting.bench.start(name, "big", directory, setting.data.database, hydrate=name != "native")
        with start as worker:
            for step in steps:
                ask(worker, step, setting.timeout)
            busy = ask(worker, _points(keys, hydrating=True), setting.timeout)["latencies"]
            ask(worker, HYDRATE, setting.timeout)
            ask(worker, _points(keys[:1000], hydrating=False), setting.timeout)
            idle: Each = []
            while not idle or len(idle) < len(busy):
                idle += ask(worker, _points(keys, hydrating=False), setting.timeout)["latencies"]
    if not busy and name != "native":
        raise Failed("everything was local before the first query")
    return busy, idle


def _tell(setting: Setting, name: str, found: list[tuple[Each, Each]]) -> None:
    if name != "native":
        setting.add(name, "queries while hydrating", [len(busy) for busy, _ in found])
        for share in (0.5, 0.99):
            each = [percentile(busy, share) * 1e6 for busy, _ in found]
            setting.add(name, f"p{share * 100:.0f} while hydrating, us", each)
    for share in (0.5, 0.99):
        setting.add(name, f"p{share * 100:.0f} idle, us", [percentile(idle, share) * 1e6 for _, idle in found])
    if name != "native":
        ratios = [percentile(busy, 0.99) / percentile(idle, 0.99) for busy, idle in found]
        setting.add(name, "p99 while hydrating / idle", ratios, at_most=3)


def _points(keys: list[int], *, hydrating: bool) -> Step:
    return Step("point queries", "latencies", {"sql": POINT, "keys": keys, "hydrating": hydrating})
