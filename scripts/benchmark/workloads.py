"""What is measured: steps in order, the same SQL for every contender."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmark.data import RANGE, Dataset
from benchmark.huge import QUERY

RANDOM_POINTS = 100
LIKE = "SELECT count(*), sum(length(bio)), min(id), max(id) FROM users WHERE bio LIKE '%tan%'"
POINT = "SELECT id, user_id, created, title, body FROM posts WHERE id = ?"
SCANS = {
    "posts": "SELECT count(*), sum(length(body)), sum(user_id), sum(created) FROM posts NOT INDEXED",
    "likes": "SELECT count(*), sum(post_id), sum(user_id), sum(created) FROM likes NOT INDEXED",
    "users": "SELECT count(*), sum(length(bio)), sum(joined) FROM users NOT INDEXED",
}


@dataclass(frozen=True, slots=True)
class Reach:
    """The goal of a step at 20 ms and 60 MB/s (issue 3)."""

    seconds: float | None = None
    requests: int | None = None
    bytes: int | None = None
    memory: int | None = None
    """Bytes of anonymous memory above what the imports take."""


@dataclass(frozen=True, slots=True)
class Step:
    name: str
    kind: str
    """Which function of the worker runs it."""
    args: dict[str, Any] = field(default_factory=dict)
    reach: Reach = Reach()
    minor: bool = False
    """Only prepares the next step; in the JSON, not in the tables."""
    whole_scan: bool = False
    """Reads so many pages that the peer, a page a request, takes minutes as soon as there is a round trip."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Steps that one process runs on one data set, one after the other."""

    group: str
    """What --only selects."""
    name: str
    dataset: str
    steps: tuple[Step, ...]
    expected: tuple[list[Any], ...] | None = None
    """Each step's rows where there is no local database to ask."""


def _open(connections: int = 1, reach: Reach | None = None) -> Step:
    """With a goal it is of interest itself."""
    return Step("open + read the schema", "open", {"connections": connections}, reach or Reach(), minor=reach is None)


def _sql(name: str, *statements: tuple[str, Sequence[Any]], reach: Reach | None = None, whole: bool = False) -> Step:
    return Step(name, "sql", {"statements": statements}, reach or Reach(), whole_scan=whole)


def _points(sql: str, keys: Sequence[int]) -> list[tuple[str, tuple[int]]]:
    return [(sql, (key,)) for key in keys]


def session(social: Dataset) -> list[Workload]:
    facts = social.facts
    rng = random.Random(3)
    keys = [rng.randint(1, facts["posts"]) for _ in range(21)]
    point = (POINT, (facts["posts"] * 2 // 5,))
    steps = (
        _open(reach=Reach(0.110)),
        _sql("cold point query", point, reach=Reach(0.050)),
        _sql(
            f"index range ({facts['range_rows']} rows, {facts['range_pages']} pages)",
            (RANGE, (facts["range_low"], facts["range_high"])),
            reach=Reach(0.070),
        ),
        _sql("LIKE over users + 20 random posts", (LIKE, ()), *_points(POINT, keys[:20]), reach=Reach(0.600, 60)),
        _sql("scan of all posts", (SCANS["posts"], ()), reach=Reach(2.5, 60, memory=64 << 20), whole=True),
        _sql("the same scan again", (SCANS["posts"], ()), whole=True),
        _sql("the first point query again", point),
    )
    return [Workload("session", "session", "social", steps)]


def scattered(social: Dataset) -> list[Workload]:
    rng = random.Random(5)
    keys = [rng.randint(1, social.facts["posts"]) for _ in range(RANDOM_POINTS)]
    step = _sql(f"{RANDOM_POINTS} random point queries", *_points(POINT, keys), reach=Reach(bytes=60_000_000))
    return [Workload("random", "random", "social", (_open(), step))]


def scans(_: Dataset) -> list[Workload]:
    alone = [
        Workload("scans", f"scan {table}", "social", (_open(), _sql(f"scan {table} alone", (sql, ()), whole=True)))
        for table, sql in SCANS.items()
    ]
    together = Step(
        "3 scans at once", "parallel", {"statements": [(sql, ()) for sql in SCANS.values()]}, whole_scan=True
    )
    return [*alone, Workload("scans", "scans at once", "social", (_open(len(SCANS)), together))]


def huge(dataset: Dataset) -> list[Workload]:
    keys, rows = dataset.facts["keys"], dataset.facts["rows"]
    size = f"{dataset.facts['pages'] / 1e6:.2g} million pages"
    steps = (
        Step(
            f"open + point query, {size}",
            "open",
            {"connections": 1, "schema": False, "statements": _points(QUERY, keys[:1])},
            Reach(0.300, bytes=5_000_000, memory=60 << 20),
        ),
        _sql(f"{len(keys) - 1} more point queries", *_points(QUERY, keys[1:])),
    )
    return [Workload("huge", "huge", "huge", steps, expected=(rows[:1], rows[1:]))]


GROUPS: dict[str, tuple[str, Callable[[Dataset], list[Workload]]]] = {
    "session": ("social", session),
    "random": ("social", scattered),
    "scans": ("social", scans),
    "huge": ("huge", huge),
}
"""What --only takes -> its data set, and the workloads over it."""
