"""The command line of `scripts/soak`."""

from __future__ import annotations

import argparse
import json
import secrets
import sys
from pathlib import Path
from typing import Any

from soaking import sabotage
from soaking.follow import follow, is_flat, shown
from soaking.readers import KINDS
from soaking.report import table
from soaking.runner import Plan, soak
from soaking.weather import CALM, HEAVY, LIGHT

_READERS = "plain,hydrating,shared,shared,long,threads,short"


def _kinds(value: str) -> tuple[str, ...]:
    kinds = tuple(value.split(","))
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: expected some of {', '.join(KINDS)}")
    return kinds


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/soak", description="A live primary, bad weather, exacting readers.")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, help="replays workload and faults; default: a new one, which is printed")
    parser.add_argument("--faults", choices=(CALM, LIGHT, HEAVY), default=LIGHT)
    parser.add_argument("--readers", type=_kinds, default=_kinds(_READERS), metavar="KINDS", help=f"default {_READERS}")
    parser.add_argument("--server", choices=("seaweed", "rclone"), default="seaweed")
    parser.add_argument("--rate", type=float, default=25.0, help="the primary's transactions a second")
    parser.add_argument("--l0-retention", default="3s", help="Litestream's; with 0s it keeps every file of level 0")
    parser.add_argument("--peer", action="store_true", help="read with litestream-vfs instead")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the summary there too")
    parser.add_argument("--follow", type=int, metavar="N", help="only follow N transactions at machine speed")
    parser.add_argument("--sabotage", choices=("", sabotage.PAGE, sabotage.TXID), default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.follow:
        runs = []
        for hydrate in (False, True):
            runs.append(follow(given.follow, hydrate=hydrate))
            print(shown(runs[-1]), flush=True)
        summary: dict[str, Any] = {"runs": runs}
        bad = not all(map(is_flat, runs))
    else:
        seed = secrets.randbelow(10**6) if given.seed is None else given.seed
        plan = Plan(
            seconds=given.minutes * 60,
            seed=seed,
            faults=given.faults,
            readers=given.readers,
            server=given.server,
            rate=given.rate,
            peer=given.peer,
            sabotage=given.sabotage,
            l0_retention=given.l0_retention,
        )
        print(f"seed {seed}, {given.minutes:g} minutes, faults: {given.faults}", flush=True)
        summary = soak(plan)
        print(table(summary))
        bad = bool(summary["anomalies"]) or not summary["transactions"]
    if given.json:
        given.json.write_text(json.dumps(summary, indent=2) + "\n")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
