"""What a scene is given, and what it gives."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median

from benchmark.data import Dataset
from benchmark.figures import Each, Failed, Figure
from benchmark.proxy import Link
from benchmark.run import Bench
from benchmark.worker import digest
from benchmark.workloads import SCANS, Step

HYDRATE = Step("open + hydrate", "hydrate")
SCAN = Step("scan of all posts", "sql", {"statements": [(SCANS["posts"], ())]})


@dataclass(frozen=True, slots=True)
class Effort:
    """How often, how many, how long."""

    rounds: int
    """Of what takes seconds."""
    repeats: int
    """Of what takes milliseconds."""
    points: int
    transactions: int
    seconds: float
    """That something is watched."""


FULL = Effort(rounds=3, repeats=5, points=20_000, transactions=200, seconds=20)
QUICK = Effort(rounds=1, repeats=2, points=500, transactions=10, seconds=3)


@dataclass
class Setting:
    """One scene's surroundings; collects its figures."""

    name: str
    bench: Bench
    data: Dataset
    link: Link
    contenders: Sequence[str]
    effort: Effort
    timeout: float
    """Seconds, of one step."""
    truth: str
    """The digest of what `SCAN` finds in the data set."""
    figures: list[Figure] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def remote(self) -> list[str]:
        """The contenders that read the replica."""
        return [name for name in self.contenders if name != "native"]

    def add(
        self,
        contender: str,
        name: str,
        values: float | Each,
        *,
        at_most: float | None = None,
        at_least: float | None = None,
    ) -> float:
        """One figure, of several measurements their median. Goals are ours alone."""
        each = values if isinstance(values, list) else [values]
        value = median(each)
        goals = (at_most, at_least) if contender == "us" else (None, None)
        each = each if len(each) > 1 else []
        self.figures.append(Figure(self.name, name, contender, self.link.rtt, value, *goals, each))
        return value

    @contextmanager
    def trying(self, contender: str) -> Iterator[None]:
        """What fails in the block is a finding."""
        try:
            yield
        except Failed as exc:
            problem = f"{contender}, {self.link.rtt * 1e3:g} ms, {self.name}: {exc}"
            self.problems.append(problem)
            print(problem, file=sys.stderr)


@dataclass(frozen=True, slots=True)
class Scene:
    name: str
    play: Callable[[Setting], None]
    near: bool = False
    """Whether it is of interest without a round trip, too."""


def truth(data: Dataset) -> str:
    """The digest of what `SCAN` finds in the data set, by SQLite."""
    import apsw

    assert data.database is not None
    connection = apsw.Connection(str(data.database), flags=apsw.SQLITE_OPEN_READONLY)
    rows = connection.execute(SCANS["posts"]).fetchall()
    connection.close()
    return digest(rows)
