"""Figures that are no step's time: ratios, percentiles, requests of several processes. Each with what is to be reached.

A scene (see `benchmark.local`) measures some of them with every contender, and checks the contender's answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmark.process import Worker
from benchmark.workloads import Step

Each = list[float]


@dataclass
class Figure:
    """One number of one contender, the median where it was measured several times."""

    scene: str
    name: str
    contender: str
    rtt: float
    """Seconds."""
    value: float | None
    """In the unit that `name` ends with; none when the contender failed."""
    at_most: float | None = None
    """The goal, of ours."""
    at_least: float | None = None
    each: Each = field(default_factory=list)
    """What the median is of."""

    @property
    def goal(self) -> str:
        """What is to be reached, and whether it was; empty where there is none."""
        bound = self.at_most if self.at_most is not None else self.at_least
        if bound is None:
            return ""
        if self.value is None:
            verdict = "?"
        else:
            verdict = "yes" if (self.value <= bound if self.at_most is not None else self.value >= bound) else "NO"
        return f"{'<=' if self.at_most is not None else '>='} {bound:g}: {verdict}"


class Failed(Exception):
    """A contender did not do what a scene asked for, or gave wrong rows."""


def ask(worker: Worker, step: Step, timeout: float) -> dict[str, Any]:
    """The step's result. Raises `Failed` when there is none."""
    answer = worker.ask(step, timeout)
    if answer is None:
        raise Failed(worker.gone)
    if "error" in answer:
        raise Failed(f"{step.name}: {answer['error']}")
    return answer


def check(worker: Worker, step: Step, truth: str, timeout: float) -> dict[str, Any]:
    """The step's result; `Failed` is raised unless its rows have the digest `truth`."""
    answer = ask(worker, step, timeout)
    if answer["digest"] != truth:
        raise Failed(f"{step.name}: WRONG rows")
    return answer


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` (0..1) of all do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def table(figures: Sequence[Figure], rtt: float, contenders: Sequence[str]) -> list[list[str]]:
    """Rows for a table: one for each number, contenders beside one another."""
    rows = [["once local", *contenders, "to reach"]]
    names = dict.fromkeys((f.scene, f.name) for f in figures if f.rtt == rtt)
    for scene, name in names:
        found = {f.contender: f for f in figures if (f.rtt, f.scene, f.name) == (rtt, scene, name)}
        goals = "".join(f.goal for f in found.values())
        rows.append([f"{scene}: {name}", *(_shown(found.get(who)) for who in contenders), goals])
    return rows


def _shown(figure: Figure | None) -> str:
    if figure is None or figure.value is None:
        return "-"
    return f"{figure.value:,.0f}" if figure.value >= 100 else f"{figure.value:.3g}"
