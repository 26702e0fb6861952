"""Which faults strike when: a schedule that depends on the seed alone."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from support.faultproxy import Fault, FaultProxy, Rule

OBJECT = r"\.ltx$"
VERIFIED = 256 << 10
"""Bytes up to which a file is fetched whole and checked: docs/architecture.md, "What is verified". A flipped bit in a
page of a larger file that is read alone cannot be seen by anybody, and nothing is promised about it."""

CALM, LIGHT, HEAVY = "none", "some", "all"

_LIGHT: list[tuple[Fault, dict[str, Any]]] = [
    (Fault.DELAY, {"chance": 0.3, "seconds": 0.05}),
    (Fault.DELAY, {"chance": 0.05, "seconds": 1.0}),
    (Fault.SERVER_ERROR, {"chance": 0.2}),
    (Fault.SLOW_DOWN, {"chance": 0.5}),
    (Fault.TOO_MANY, {"chance": 0.3}),
    (Fault.RESET, {"chance": 0.2, "key": OBJECT}),
    (Fault.TRUNCATED, {"chance": 0.2, "key": OBJECT}),
    (Fault.STALL, {"chance": 0.02}),
]
_HEAVY: list[tuple[Fault, dict[str, Any]]] = [
    (Fault.SERVER_ERROR, {"chance": 0.9}),
    (Fault.STALL, {"chance": 0.2}),
    (Fault.TRUNCATED, {"chance": 0.3}),
    (Fault.WRONG_RANGE, {"chance": 0.2}),
    (Fault.WHOLE_BODY, {"chance": 0.2}),
    (Fault.NOT_FOUND, {"chance": 0.1, "key": OBJECT}),
    (Fault.EXPIRED, {"chance": 0.3}),
    (Fault.STALE_LISTING, {"chance": 0.3}),
    (Fault.FLIPPED, {"chance": 0.2, "key": OBJECT, "largest": VERIFIED}),
]


@dataclass(frozen=True)
class Spell:
    """A fault that goes on for some seconds. None: nobody listens."""

    start: float
    seconds: float
    fault: Fault | None
    options: dict[str, Any] = field(default_factory=dict)


def forecast(kind: str, seconds: float, seed: int) -> list[Spell]:
    """The spells of a run, in the order of their beginnings. They overlap, and leave gaps in which all is well."""
    rng = random.Random(seed)
    spells: list[Spell] = []
    if kind == CALM:
        return spells
    choices = _LIGHT if kind == LIGHT else _LIGHT + _HEAVY
    at = 2.0
    number = 0
    while at < seconds:
        length = rng.uniform(2, 8)
        if rng.random() < 0.08:
            length = rng.uniform(0.5, 3) if kind == LIGHT else rng.uniform(5, 40)
            spells.append(Spell(at, length, None))
            at += length
        else:
            fault, options = rng.choice(choices)
            number += 1
            spells.append(Spell(at, length, fault, {**options, "seed": seed * 1000 + number}))
        at += rng.uniform(0.5, 5)
    return spells


class Weather:
    """Plays a forecast on a proxy, whenever `turn` is called."""

    def __init__(self, proxy: FaultProxy, spells: list[Spell]) -> None:
        self._proxy = proxy
        self._todo = [*spells]
        self._now: list[tuple[float, Callable[[], object]]] = []
        self._rules: list[Rule] = []

    def turn(self, elapsed: float) -> None:
        """Begin and end what is due `elapsed` seconds after the start."""
        while self._todo and self._todo[0].start <= elapsed:
            self._begin(self._todo.pop(0))
        for end, stop in [each for each in self._now if each[0] <= elapsed]:
            stop()
            self._now.remove((end, stop))

    def clear(self) -> None:
        self._todo.clear()
        self._now.clear()
        self._proxy.clear()
        self._proxy.listen()

    @property
    def strikes(self) -> dict[str, int]:
        """How often each fault struck."""
        counts: Counter[str] = Counter()
        for rule in self._rules:
            counts[rule.fault.value] += rule.strikes
        if self._proxy.refusals:
            counts["refused"] = self._proxy.refusals
        return dict(sorted(counts.items()))

    def _begin(self, spell: Spell) -> None:
        end = spell.start + spell.seconds
        if spell.fault is None:
            self._proxy.refuse()
            self._now.append((end, self._proxy.listen))
            return
        rule = self._proxy.add(spell.fault, **spell.options)
        self._rules.append(rule)
        self._now.append((end, lambda: self._proxy.remove(rule)))
