"""How old the newest visible row is while the real Litestream replicates, and what it costs to wait for nothing."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import apsw

from benchmark.figures import ask, percentile
from benchmark.local.scene import HYDRATE, Setting
from benchmark.workloads import Step
from support.litestream import replicating

INTERVALS = {1.0: 1.2, 0.25: 0.6}
"""Our poll interval -> goal for the 95th percentile, seconds."""
SYNC = "100ms"
WRITE_EVERY = 0.02
PROCESSES, CONNECTIONS = 3, 4
_NEWEST = "SELECT written FROM beats ORDER BY rowid DESC LIMIT 1"


def age(setting: Setting) -> None:
    """A primary writes a row every 20 ms; the peer always polls once a second."""
    bench = setting.bench
    with bench.scratch() as directory:
        database = directory / "primary.db"
        with closing(apsw.Connection(str(database))) as connection:
            connection.execute("PRAGMA journal_mode = WAL; CREATE TABLE beats(written REAL)").fetchall()
            connection.execute("INSERT INTO beats VALUES (?)", (time.time(),))
        prefix = f"age-{setting.link.rtt:g}"
        env = bench.server.env
        with replicating(database, bench.url(prefix, direct=True), sync_interval=SYNC, env=env) as litestream:
            litestream.wait_synced()
            stop = threading.Event()
            writer = threading.Thread(target=_write, args=(database, stop))
            writer.start()
            try:
                for name in setting.remote:
                    for interval, goal in INTERVALS.items() if name == "us" else [(1.0, 0.0)]:
                        with setting.trying(name):
                            _watch(setting, name, prefix, interval, goal)
            finally:
                stop.set()
                writer.join()


def _write(database: Path, stop: threading.Event) -> None:
    with closing(apsw.Connection(str(database))) as connection:
        connection.set_busy_timeout(5000)
        while not stop.wait(WRITE_EVERY):
            connection.execute("INSERT INTO beats VALUES (?)", (time.time(),))


def _watch(setting: Setting, name: str, prefix: str, interval: float, goal: float) -> None:
    watch = Step("ages", "ages", {"sql": _NEWEST, "seconds": setting.effort.seconds})
    with (
        setting.bench.scratch() as directory,
        setting.bench.start(name, prefix, directory, hydrate=True, poll_interval=interval) as worker,
    ):
        ask(worker, HYDRATE, setting.timeout)
        ages = ask(worker, watch, setting.timeout)["ages"]
    setting.add(name, f"poll every {interval:g} s, p50, s", percentile(ages, 0.5))
    setting.add(name, f"poll every {interval:g} s, p95, s", percentile(ages, 0.95), at_most=goal)


def polling(setting: Setting) -> None:
    """Requests of several processes with several connections each, on one copy, while nothing happens."""
    seconds = setting.effort.seconds
    for name in setting.remote:
        with setting.trying(name), setting.bench.scratch() as directory, ExitStack() as stack:
            workers = []
            for number in range(PROCESSES):
                own = directory / str(number)
                own.mkdir()
                # The peer keeps no copy for several connections: it polls as one that reads page by page does.
                path = str(directory / "hydrated.db")
                start = setting.bench.start(name, "big", own, hydrate=name == "us", hydration_path=path)
                workers.append(stack.enter_context(start))
            for worker in workers:
                ask(worker, Step("open", "open", {"connections": CONNECTIONS}), setting.timeout)
                if name == "us":
                    ask(worker, HYDRATE, setting.timeout)
            time.sleep(2)
            setting.bench.traffic()
            wait = Step("wait", "wait", {"seconds": seconds})
            with ThreadPoolExecutor(PROCESSES) as pool:
                waits = [pool.submit(ask, worker, wait, setting.timeout) for worker in workers]
            cpu = sum(each.result()["cpu"] for each in waits)
            traffic = setting.bench.traffic()
        others = traffic.get("requests", 0) - traffic.get("LIST", 0)
        setting.add(name, "GETs a second", others / seconds, at_most=1.05)
        setting.add(name, "LISTs a second", traffic.get("LIST", 0) / seconds, at_most=0.1)
        setting.add(name, "CPU, % of one core", 100 * cpu / seconds)
