"""Results as Markdown tables, as JSON, and as a picture."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmark.figures import Figure
from benchmark.run import Result
from benchmark.workloads import Reach, Workload

Key = tuple[float, str, str, str]
"""RTT, workload, step, contender."""

GOAL_RTT = 0.020
"""Where the goals of issue 3 hold, together with a cap of 60 MB/s."""
GOAL_CAP = 60e6


class Table:
    """Results by what they are of."""

    def __init__(self, results: Iterable[Result]) -> None:
        self._results: dict[Key, Result] = {(r.rtt, r.workload, r.step, r.contender): r for r in results}

    def get(self, rtt: float, workload: str, step: str, contender: str) -> Result | None:
        return self._results.get((rtt, workload, step, contender))

    def value(self, rtt: float, workload: str, step: str, contender: str, name: str) -> float | None:
        result = self.get(rtt, workload, step, contender)
        if result is None or result.status not in ("ok", "wrong"):
            return None
        value = getattr(result, name)
        return None if value is None else float(value)

    @property
    def rtts(self) -> list[float]:
        return sorted({key[0] for key in self._results})


# Numbers


def milliseconds(seconds: float) -> str:
    value = seconds * 1e3
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def megabytes(count: float) -> str:
    value = count / 1e6
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def whole(value: float) -> str:
    return f"{value:,.0f}"


def ratio(ours: float | None, theirs: float | None) -> str:
    if ours is None or not theirs:
        return "-"
    value = ours / theirs
    return f"{value:,.0f}x" if value >= 10 else f"{value:.2f}x" if value >= 0.1 else f"{value:.2g}x"


# Tables


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the head; columns but the first are right-aligned."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        return f"| {' | '.join(cells)} |"

    rule = "|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)) + "|"
    return "\n".join([line(rows[0]), rule, *(line(row) for row in rows[1:])])


def _time(table: Table, rtt: float, workload: str, step: str, contender: str) -> str:
    result = table.get(rtt, workload, step, contender)
    if result is None or (result.status == "ok" and result.seconds is None):
        return "-"
    if result.status == "ok":
        assert result.seconds is not None
        return milliseconds(result.seconds)
    if result.status == "wrong" and result.seconds is not None:
        return f"{milliseconds(result.seconds)} WRONG"
    if result.status == "skipped":
        near = table.value(0, workload, step, contender, "requests")
        return f"({near:,.0f} requests at RTT 0)" if near else "skipped"
    return result.status.upper()


def rtt_table(table: Table, workloads: Sequence[Workload], rtt: float, contenders: Sequence[str], goals: bool) -> str:
    """Everything that was measured at one round-trip time."""
    remote = [name for name in contenders if name != "native"]
    head = ["work", *(f"{name}, ms" for name in contenders)]
    head += [f"us/{name}" for name in contenders if name != "us" and "us" in contenders]
    for what in ("requests", "MB", "CPU ms", "memory MB"):
        head += [f"{what} {name}" for name in remote]
    if goals:
        head.append("to reach")
    rows = [head]
    for workload in workloads:
        for step in workload.steps:
            if step.minor:
                continue
            at = (rtt, workload.name, step.name)
            row = [step.name, *(_time(table, *at, name) for name in contenders)]
            ours = table.value(*at, "us", "seconds")
            row += [
                ratio(ours, table.value(*at, name, "seconds"))
                for name in contenders
                if name != "us" and "us" in contenders
            ]
            for what, show in (
                ("requests", whole),
                ("bytes", megabytes),
                ("cpu", milliseconds),
                ("memory", megabytes),
            ):
                values = [table.value(*at, name, what) for name in remote]
                row += ["-" if value is None else show(value) for value in values]
            if goals:
                row.append(_goal(table, at, step.reach))
            rows.append(row)
    return markdown(rows)


def _goal(table: Table, at: tuple[float, str, str], reach: Reach) -> str:
    """The goals of a step, each with whether we reached it."""
    goals: tuple[tuple[str, float | None, float, str], ...] = (
        ("seconds", reach.seconds, 1e-3, "ms"),
        ("requests", reach.requests, 1, "requests"),
        ("bytes", reach.bytes, 1e6, "MB"),
        ("memory", reach.memory, 1 << 20, "MiB memory"),
    )
    parts = []
    for name, goal, unit, noun in goals:
        if goal is not None:
            ours = table.value(*at, "us", name)
            verdict = "?" if ours is None else "yes" if ours <= goal else "NO"
            parts.append(f"<= {goal / unit:,.0f} {noun}: {verdict}")
    return ", ".join(parts)


def at_once(table: Table, workloads: Sequence[Workload], rtt: float, contenders: Sequence[str], goals: bool) -> str:
    """How much longer several scans take together than the slowest of them alone."""
    scans = [(w.name, s.name, s.kind) for w in workloads if w.group == "scans" for s in w.steps if s.kind != "open"]
    lines = []
    for name in contenders if scans else ():
        alone = [table.value(rtt, w, s, name, "seconds") for w, s, kind in scans if kind == "sql"]
        (together,) = [table.value(rtt, w, s, name, "seconds") for w, s, kind in scans if kind == "parallel"]
        if together is not None and None not in alone:
            times = together / max(value for value in alone if value is not None)
            verdict = f" (to reach: <= 1.3: {'yes' if times <= 1.3 else 'NO'})" if goals and name == "us" else ""
            lines.append(f"3 scans at once / the slowest alone, {name}: {times:.2f}{verdict}")
    return "\n".join(lines)


def problems(results: Iterable[Result]) -> list[str]:
    """What went wrong, a line each; skipped steps are no problem."""
    bad = [r for r in results if r.status in ("wrong", "error", "timeout")]
    return [f"{r.contender}, {r.rtt * 1e3:g} ms, {r.workload}, {r.step}: {r.status.upper()}: {r.detail}" for r in bad]


def against(results: Sequence[Result], data: dict[str, Any], baseline: dict[str, Any]) -> str:
    """Ours against an earlier run of ours: time, requests, bytes, CPU and memory, each as now / then."""
    then = Table(load(baseline))
    sections = []
    other = [name for name in data if data[name] != baseline["data"].get(name, data[name])]
    if other:
        sections.append(f"The baseline was measured on other data: {', '.join(other)}. The ratios mean little.")
    for rtt in sorted({r.rtt for r in results}):
        rows = [["work", "ms then", "ms now", "now/then", "requests", "MB", "CPU", "memory"]]
        for now in results:
            before = then.get(rtt, now.workload, now.step, "us")
            if now.rtt != rtt or now.contender != "us" or not (before and before.seconds and now.seconds):
                continue
            rows.append(
                [
                    now.step,
                    milliseconds(before.seconds),
                    milliseconds(now.seconds),
                    ratio(now.seconds, before.seconds),
                    *(
                        ratio(getattr(now, what), getattr(before, what))
                        for what in ("requests", "bytes", "cpu", "memory")
                    ),
                ]
            )
        if len(rows) > 1:
            what = f"the baseline of {baseline['machine']['time']} (code {baseline.get('code', '?')})"
            sections.append(f"us against {what}, RTT {rtt * 1e3:g} ms\n\n{markdown(rows)}")
    return "\n\n".join(sections) or "the baseline has nothing in common with this run"


def load(document: dict[str, Any]) -> list[Result]:
    """The results in a JSON document that `save` wrote."""
    return [Result(**row) for row in document["results"]]


def save(path: Path, facts: dict[str, Any], results: Sequence[Result], figures: Sequence[Figure] = ()) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {**facts, "results": [asdict(r) for r in results], "figures": [asdict(f) for f in figures]}
    path.write_text(json.dumps(document, indent=1) + "\n")


# Picture

_COLOURS = {"peer": "#c8553d", "native": "#9aa0a6", "us": "#2a7f62"}
_LABELS = {"peer": "litestream-vfs", "native": "SQLite, local file", "us": "lazyreplica"}


def picture(path: Path, table: Table, workloads: Sequence[Workload], contenders: Sequence[str], caption: str) -> None:
    """Horizontal bars on a logarithmic scale, one panel for each round-trip time."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "lazyreplica"  # the same figures make the same file
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    steps = [(w.name, s.name) for w in workloads for s in w.steps if not s.minor]
    height = 0.8 / len(contenders)
    figure, axes = plt.subplots(
        1, len(table.rtts), sharey=True, squeeze=False, figsize=(4.5 + 4.5 * len(table.rtts), 1.6 + 0.42 * len(steps))
    )
    for axis, rtt in zip(axes[0], table.rtts, strict=True):
        for place, name in enumerate(contenders):
            for row, (workload, step) in enumerate(steps):
                y = row + (place - (len(contenders) - 1) / 2) * height
                seconds = table.value(rtt, workload, step, name, "seconds")
                if not seconds:
                    why = _time(table, rtt, workload, step, name)
                    if why != "-":
                        # at the left edge, wherever that is going to be
                        where = axis.get_yaxis_transform()
                        axis.text(0.01, y, why, va="center", fontsize=6, color=_COLOURS[name], transform=where)
                    continue
                axis.barh(y, seconds * 1e3, height, color=_COLOURS[name], label=_LABELS[name] if row == 0 else None)
                axis.text(seconds * 1e3 * 1.1, y, milliseconds(seconds), va="center", fontsize=6)
        axis.set_xscale("log")
        axis.margins(x=0.15, y=0.01)
        axis.set_title(f"round trip {rtt * 1e3:g} ms", fontsize=10)
        axis.set_xlabel("milliseconds, logarithmic")
        axis.grid(axis="x", alpha=0.25)
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0][0].set_yticks(range(len(steps)), [step for _, step in steps], fontsize=8)
    axes[0][0].invert_yaxis()
    handles = [Patch(color=_COLOURS[name]) for name in contenders]
    figure.legend(handles, [_LABELS[name] for name in contenders], loc="upper center", ncols=3, frameon=False)
    figure.text(0.01, 0.005, "\n".join(textwrap.wrap(caption, 80 + 90 * len(table.rtts))), fontsize=6)
    figure.tight_layout(rect=(0, 0.02, 1, 0.96))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
