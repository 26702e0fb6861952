"""The command line: ``scripts/bench`` runs this."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmark import figures, report
from benchmark.contenders import NAMES
from benchmark.data import FULL, QUICK, Dataset, dataset
from benchmark.figures import Figure
from benchmark.local import SCENES, scene
from benchmark.proxy import Link, Proxy
from benchmark.run import Bench, Result, Run, Skip, judge, machine, summarize
from benchmark.workloads import GROUPS, Step, Workload
from support.servers import serve_seaweed

PROJECT = Path(__file__).resolve().parents[2]
CACHE = PROJECT / ".cache" / "bench"


def main() -> int:
    given = _arguments()
    start = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - start:6.1f} s] {text}", file=sys.stderr, flush=True)

    size = QUICK if given.quick else FULL
    CACHE.mkdir(parents=True, exist_ok=True)
    groups = [name for name in given.only if name in GROUPS]
    names = dict.fromkeys("big" if name in SCENES else GROUPS[name][0] for name in given.only)
    sets = {name: dataset(name, size, CACHE, say) for name in names}
    workloads = [workload for group in groups for workload in GROUPS[group][1](sets[GROUPS[group][0]])]
    facts: dict[str, Any] = {
        "machine": machine(),
        "options": {
            "rtt_ms": given.rtt,
            "cap_mb": given.cap,
            "repeat": given.repeat,
            "prefetch": given.prefetch,
            "quick": given.quick,
            "full": given.full,
        },
        "data": {name: {k: v for k, v in d.facts.items() if k not in ("keys", "rows")} for name, d in sets.items()},
    }
    _sweep()
    say("starting SeaweedFS")
    with (
        tempfile.TemporaryDirectory(prefix=f"run-{os.getpid()}-", dir=CACHE) as directory,
        serve_seaweed(Path(directory)) as server,
        Proxy(server.port) as proxy,
    ):
        bench = Bench(server, proxy, Path(directory), say, given.prefetch)
        facts["code"] = bench.fingerprint
        for data in sets.values():
            bench.upload(data)
        results: Run = []
        found: list[Figure] = []
        problems: list[str] = []
        for rtt in given.rtt:
            link = Link(rtt / 1e3, given.cap * 1e6 if rtt and given.cap else None)
            for workload in workloads:
                say(f"RTT {rtt:g} ms: {workload.name}")
                results += _measure(bench, workload, sets[workload.dataset], link, given)
                if given.json:  # each time: an interrupted run of an hour is not lost
                    report.save(given.json, facts, results, found)
            for name in given.only:
                if name in SCENES and (rtt or SCENES[name].near):
                    say(f"RTT {rtt:g} ms: {name}")
                    _play(bench, name, sets["big"], link, given, found, problems)
                    if given.json:
                        report.save(given.json, facts, results, found)
    return _tell(given, facts, workloads, results, found, problems)


def _play(
    bench: Bench,
    name: str,
    big: Dataset,
    link: Link,
    given: argparse.Namespace,
    found: list[Figure],
    problems: list[str],
) -> None:
    """One scene; appends to `found` and `problems`."""
    bench.link(link)
    effort = scene.QUICK if given.quick else scene.FULL
    setting = scene.Setting(name, bench, big, link, given.contenders, effort, given.timeout, scene.truth(big))
    SCENES[name].play(setting)
    found += setting.figures
    problems += setting.problems


def _sweep() -> None:
    """Remove what killed runs have left: a gigabyte each."""
    for path in CACHE.glob("run-*-*"):
        try:
            os.kill(int(path.name.split("-")[1]), 0)
        except ProcessLookupError:
            shutil.rmtree(path, ignore_errors=True)


def _measure(bench: Bench, workload: Workload, data: Dataset, link: Link, given: argparse.Namespace) -> Run:
    """All contenders in turn, as often as asked for."""
    # Native is always asked: it knows the right answers.
    order = [name for name in NAMES if name in given.contenders or name == "native"]
    if data.database is None:
        order.remove("native")
    runs: dict[str, list[Run]] = {name: [] for name in order}
    for _ in range(given.repeat):
        found = {name: bench.run(workload, name, data, link, given.timeout, _skip(name, link, given)) for name in order}
        for name, run in found.items():
            judge(run, workload, found.get("native"))
            runs[name].append(run)
    return [result for name in order if name in given.contenders for result in summarize(runs[name])]


def _skip(contender: str, link: Link, given: argparse.Namespace) -> Skip:
    def skip(step: Step) -> str:
        if step.whole_scan and contender == "peer" and link.rtt and not given.full:
            return "a request a page: minutes; --full runs it"
        return ""

    return skip


def _tell(
    given: argparse.Namespace,
    facts: dict[str, Any],
    workloads: list[Workload],
    results: list[Result],
    found: list[Figure],
    problems: list[str],
) -> int:
    table = report.Table(results)
    contenders = [name for name in NAMES if name in given.contenders]
    about = facts["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    where = f"{about['cpus']} CPUs ({about['cpu']}), Python {about['python']}"
    caption = f"{where}; {versions}; code {facts['code']}; {about['time']}"
    print(f"{caption}\n\nMedian of {given.repeat}. Memory: anonymous, above what the imports take; MB: received.")
    for rtt in sorted({*table.rtts, *(figure.rtt for figure in found)}):
        cap = given.cap if rtt else 0
        goals = rtt == report.GOAL_RTT and cap * 1e6 == report.GOAL_CAP and not given.quick and "us" in contenders
        limit = f", {cap:g} MB/s a connection" if cap else ""
        print(f"\n### RTT {rtt * 1e3:g} ms{limit}\n")
        if workloads:
            print(report.rtt_table(table, workloads, rtt, contenders, goals))
        rows = figures.table(found, rtt, contenders)
        if len(rows) > 1:
            print(f"\n{report.markdown(rows)}")
        together = report.at_once(table, workloads, rtt, contenders, goals)
        if together:
            print(f"\n{together}")
    if given.baseline:
        print(f"\n{report.against(results, facts['data'], given.baseline)}")
    if given.picture and workloads:
        report.picture(given.picture, table, workloads, contenders, caption)
    bad = report.problems(results) + problems
    if bad:
        print("\n" + "\n".join(bad), file=sys.stderr)
    # The peer's failures are findings; ours, and native's, are ours to mend.
    ours = [line for line in bad if not line.startswith("peer,")]
    if ours:
        print(f"\nFAILED: {len(ours)} steps gave wrong answers or none", file=sys.stderr)
    return 1 if ours else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench", description="lazyreplica, litestream-vfs and native SQLite, measured side by side."
    )

    def names(known: object) -> Any:
        def parse(value: str) -> list[str]:
            chosen = value.split(",")
            for name in chosen:
                if name not in known:  # type: ignore[operator]
                    raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")  # type: ignore[arg-type]
            return chosen

        return parse

    def numbers(value: str) -> list[float]:
        return sorted({float(part) for part in value.split(",")})

    add = parser.add_argument
    add("--rtt", type=numbers, default=[0.0, 20.0], metavar="MS,..", help="round trips in ms (0,20)")
    add("--cap", type=float, default=60.0, metavar="MB/S", help="of each connection, where RTT > 0; 0: none (60)")
    add("--repeat", type=int, default=1, metavar="N", help="runs, of which the medians are shown (1)")
    known = [*GROUPS, *SCENES]
    add("--only", type=names(known), default=known, metavar="NAME,..", help=f"of {', '.join(known)}")
    add("--contenders", type=names(NAMES), default=list(NAMES), metavar="NAME,..", help=f"of {', '.join(NAMES)}")
    add("--prefetch", default="all", metavar="NAME,..", help="our option of that name: what a technique gives alone")
    add("--timeout", type=float, default=None, metavar="S", help="of one step (180; with --full 1800)")
    add("--full", action="store_true", help="let the peer scan whole tables where RTT > 0: 10 minutes each at 20 ms")
    add("--quick", action="store_true", help="little data: does everything work?")
    add("--json", type=Path, metavar="FILE", help="write everything there")
    add("--picture", type=Path, metavar="FILE", help="draw it: .svg or .png")
    add("--baseline", type=Path, metavar="FILE", help="compare our figures with this JSON of an earlier run")
    given = parser.parse_args()
    if given.repeat < 1:
        parser.error("--repeat is at least 1")
    if given.baseline:  # now: not after an hour
        given.baseline = json.loads(given.baseline.read_text())
    if given.timeout is None:
        given.timeout = 1800.0 if given.full else 180.0
    return given


if __name__ == "__main__":
    sys.exit(main())
