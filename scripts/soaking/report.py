"""What all readers saw, put together and shown."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Group:
    """The readers of one kind."""

    transactions: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    anomalies: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    """Anomalies: "wrong", "late", "ended", or the name of an error that is not allowed."""
    ages: list[float] = field(default_factory=list)
    processes: int = 0


class Result:
    """Owner of everything the readers reported. Used by one thread."""

    def __init__(self) -> None:
        self.groups: dict[str, Group] = {}
        self._digests: dict[int, str] = {}
        """Of the primary's transactions that some reader saw."""
        self._txids: dict[str, int] = {}

    def add(self, kind: str, line: dict[str, Any]) -> None:
        """One report of a reader. Compares what it saw with what others saw."""
        group = self.groups.setdefault(kind, Group())
        group.transactions += line["transactions"]
        group.errors.update(line["errors"])
        group.ages += line["ages"]
        group.kinds.update(line["anomaly_kinds"])
        group.anomalies += line["anomalies"][: 20 - len(group.anomalies)]
        for txid, n, digest in line["seen"]:
            if self._digests.setdefault(n, digest) != digest:
                self.anomaly(kind, f"transaction {n} is {digest} here and {self._digests[n]} elsewhere")
            if txid and self._txids.setdefault(txid, n) != n:
                self.anomaly(kind, f"TXID {txid} is transaction {n} here and {self._txids[txid]} elsewhere")

    def expect(self, n: int, digest: str) -> None:
        """What the primary itself says of one of its transactions."""
        if self._digests.setdefault(n, digest) != digest:
            self.anomaly("primary", f"readers saw {self._digests[n]} at transaction {n}, the primary has {digest}")

    def anomaly(self, kind: str, what: str, sort: str = "wrong") -> None:
        group = self.groups.setdefault(kind, Group())
        group.kinds[sort] += 1
        if len(group.anomalies) < 20:
            group.anomalies.append(what)

    @property
    def transactions(self) -> int:
        return sum(group.transactions for group in self.groups.values())

    @property
    def anomalies(self) -> int:
        return self.anomaly_kinds.total()

    @property
    def anomaly_kinds(self) -> Counter[str]:
        return sum((group.kinds for group in self.groups.values()), Counter())

    @property
    def errors(self) -> Counter[str]:
        return sum((group.errors for group in self.groups.values()), Counter())

    @property
    def distinct(self) -> int:
        """How many different transactions of the primary were seen."""
        return len(self._digests)

    def as_json(self) -> dict[str, Any]:
        groups = {
            kind: {
                "processes": group.processes,
                "transactions": group.transactions,
                "anomalies": group.kinds.total(),
                "examples": group.anomalies,
                "errors": dict(group.errors),
                "age_p50": _percentile(group.ages, 50),
                "age_p95": _percentile(group.ages, 95),
            }
            for kind, group in self.groups.items()
        }
        return {
            "transactions": self.transactions,
            "distinct": self.distinct,
            "anomalies": self.anomalies,
            "anomaly_kinds": dict(self.anomaly_kinds),
            "errors": dict(self.errors),
            "readers": groups,
        }


def table(summary: dict[str, Any]) -> str:
    """The summary for people."""
    lines = [f"{'reader':<10} {'procs':>5} {'checked':>8} {'anomalies':>9} {'age p50':>8} {'p95':>7}  allowed errors"]
    for kind, group in summary["readers"].items():
        errors = ", ".join(f"{name} {count}" for name, count in sorted(group["errors"].items())) or "-"
        lines.append(
            f"{kind:<10} {group['processes']:>5} {group['transactions']:>8} {group['anomalies']:>9} "
            f"{group['age_p50']:>7.2f}s {group['age_p95']:>6.2f}s  {errors}"
        )
        lines += [f"    ANOMALY {what}" for what in group["examples"][:5]]
    struck = ", ".join(f"{name} {count}" for name, count in summary["strikes"].items()) or "none"
    did = ", ".join(f"{name} {count}" for name, count in summary["workload"].items())
    lines += [
        f"faults that struck: {struck}",
        f"the primary: {did}; {summary['levels']}",
        f"{summary['transactions']} transactions checked, {summary['distinct']} different states, "
        f"{summary['anomalies']} anomalies {summary['anomaly_kinds'] or ''}, "
        f"{sum(summary['errors'].values())} allowed errors",
    ]
    return "\n".join(lines)


def _percentile(values: list[float], percent: int) -> float:
    if len(values) < 2:
        return values[0] if values else 0.0
    return round(statistics.quantiles(values, n=100, method="inclusive")[percent - 1], 3)
