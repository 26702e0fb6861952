"""``python sharing.py DIRECTORY``: two processes with eight reading threads each share a copy of a changing replica.

Its owner is stopped for a while, goes on, and is killed; a child that it forked opens its own. Nobody may see a wrong
page, nor fall behind. Prints what was compared, as JSON.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

from killing import Primary, compare, make_history
from replicas import History, ReplicaDirectory, complete, local_database, opened, read_database

from lazyreplica import hydrator
from lazyreplica.local import deltalog
from lazyreplica.replica import Replica
from support.waiting import eventually

THREADS = 8
POLL = 0.05


class Board:
    """Numbers that all processes see: of each process the TXID that it shows, whether it owns, and how much it saw."""

    def __init__(self) -> None:
        self._words = memoryview(mmap.mmap(-1, 4096)).cast("Q")

    def put(self, process: int, replica: Replica, compared: int) -> None:
        assert replica._hydrator is not None
        self._words[3 * process : 3 * process + 3] = memoryview(
            b"".join(n.to_bytes(8, sys.byteorder) for n in (replica.head.txid, replica._hydrator.local.owned, compared))
        ).cast("Q")

    def txid(self, process: int) -> int:
        return self._words[3 * process]

    def owned(self, process: int) -> bool:
        return bool(self._words[3 * process + 1])

    def compared(self, process: int) -> int:
        return self._words[3 * process + 2]


def read_on(replica: Replica, history: History, going: Callable[[], bool], report: Callable[[int], None]) -> None:
    """Eight threads compare for as long as `going`; raises what went wrong in any."""
    failures: list[BaseException] = []
    counts = [0] * THREADS

    def work(number: int) -> None:
        rng = random.Random(number)
        try:
            while going() and not failures:
                compare(replica, history)
                if rng.random() < 0.1:
                    snapshot = replica.begin(replica.head.lineage.number)
                    try:
                        time.sleep(rng.random() * 0.05)  # a long transaction
                        assert read_database(replica, snapshot) == history.database(snapshot.txid)
                    finally:
                        replica.end(snapshot)
                counts[number] += 1
                time.sleep(0.002)
                report(sum(counts))
        except BaseException as exc:  # noqa: BLE001
            failures.append(exc)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def process(number: int, path: Path, history: History, board: Board, *, fork: bool) -> NoReturn:
    status = 1
    try:
        target = str(path / "local.db")
        directory = ReplicaDirectory(path / "replica")
        with opened(directory, hydrate=True, hydration_path=target, poll_interval=POLL) as replica:
            if fork and not os.fork():
                replica.abandon()  # what is done after a fork wherever a replica was opened by its URL
                process(2, path, history, board, fork=False)
            read_on(replica, history, lambda: True, lambda count: board.put(number, replica, count))
    except BaseException:  # noqa: BLE001
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)


def main(path: Path) -> None:
    hydrator.FOLD_AT, deltalog._GROW = 40_000, 64 << 10
    history = make_history(random.Random(7))
    directory, board = ReplicaDirectory(path / "replica"), Board()
    primary = Primary(directory, history)
    primary.step()
    pids: list[int] = []

    def spawn(number: int, *, fork: bool = False) -> None:
        pid = os.fork()
        if not pid:
            process(number, path, history, board, fork=fork)
        pids.append(pid)

    def go_on(seconds: float, *keep_up: int) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            primary.step()
            time.sleep(0.02)
        for number in keep_up:
            eventually(
                lambda number=number: board.txid(number) == primary.txid, what=f"process {number} is at the newest"
            )

    spawn(0, fork=True)
    eventually(lambda: board.owned(0))
    spawn(1)
    eventually(lambda: board.txid(1) and board.txid(2))
    go_on(2, 0, 1, 2)
    assert [board.owned(n) for n in range(3)] == [True, False, False]
    os.kill(pids[0], signal.SIGSTOP)
    go_on(2, 1, 2)
    os.kill(pids[0], signal.SIGCONT)
    go_on(1, 0, 1, 2)
    assert [board.owned(n) for n in range(3)] == [True, False, False]
    os.kill(pids[0], signal.SIGKILL)
    os.waitpid(pids[0], 0)
    eventually(lambda: board.owned(1) or board.owned(2), what="somebody takes over")
    go_on(1, 1, 2)
    compared = [board.compared(n) for n in range(3)]
    time.sleep(0.2)
    assert all(board.compared(n) > compared[n] for n in (1, 2)), "both go on"
    os.kill(pids[1], signal.SIGKILL)
    assert os.waitpid(pids[1], 0)[1] == signal.SIGKILL
    with opened(directory, hydrate=True, hydration_path=str(path / "local.db"), poll_interval=POLL) as replica:
        eventually(lambda: complete(replica))
        assert local_database(replica) == history.database(primary.txid)
    print(json.dumps({"transactions": primary.txid, "compared": compared}))


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    finally:
        sys.stdout.flush()
        os.killpg(0, signal.SIGKILL)  # the grandchild too
