"""``python killing.py DIRECTORY KILLS SEED``: processes that share a local copy of a changing replica are killed.

One process forks the others, which inherit the truth: all versions of all pages. Two or three live at any time; each
compares what it sees, and dies at a random moment. Prints what was compared, as JSON; fails at the first wrong page.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

from replicas import History, ReplicaDirectory, SpyStore, complete, local_database, opened

from lazyreplica import filling, hydrator, layers
from lazyreplica.local import deltalog
from lazyreplica.replica import Replica
from support.waiting import eventually

SIZE = 60
TRANSACTIONS = 1500


def make_history(rng: random.Random) -> History:
    history = History()
    history.commit(size=SIZE)
    for _ in range(TRANSACTIONS - 1):
        size = min(2 * SIZE, max(SIZE // 2, len(history.states[-1]) + rng.choice([0, 0, 0, 2, -2, 20, -20])))
        history.commit(rng.sample(range(1, size + 1), rng.randint(1, 12)), size)
    return history


class Primary:
    """Publishes the history, one transaction after the other, compacts, and removes what is old."""

    def __init__(self, directory: ReplicaDirectory, history: History) -> None:
        self.directory, self.history, self.txid = directory, history, 0

    def step(self) -> None:
        if self.txid == self.history.txid:
            return
        self.txid += 1
        self.directory.write(self.history, 0, self.txid)
        if self.txid % 10 == 0:
            self.directory.write(self.history, 1, max(1, self.txid - 9), self.txid)
        if self.txid % 100 == 0:
            self.directory.write(self.history, 9, 1, self.txid, whole=True)
        if self.txid % 10 == 0 and self.txid > 30:
            for old in range(self.txid - 39, self.txid - 29):
                if old != 1:
                    self.directory.remove(0, old)


def compare(replica: Replica, history: History) -> int:
    """Every page that is local, of what a transaction sees now. How many there were."""
    snapshot = replica.begin(replica.head.lineage.number)
    try:
        state, view, found = history.states[snapshot.txid], replica.view(snapshot), 0
        assert snapshot.commit == len(state)
        for pgno, page in state.items() if view is not None else ():
            here = view.page(pgno)  # type: ignore[union-attr]
            if here is not None:
                found += 1
                assert here == page, f"page {pgno} at TXID {snapshot.txid} is another one"
        return found
    finally:
        replica.end(snapshot)


def live(directory: ReplicaDirectory, target: Path, history: History, tell: int, seed: int) -> None:
    rng = random.Random(seed)
    while True:
        store = SpyStore(directory.url)
        store.before_read = lambda file, offset, length: time.sleep(rng.random() * 0.004)
        with opened(store, hydrate=True, hydration_path=str(target), poll_interval=0.01) as replica:
            end = time.monotonic() + rng.random() * 0.2
            while time.monotonic() < end:
                os.write(tell, compare(replica, history).to_bytes(4, "big"))
                time.sleep(rng.random() * 0.01)


def main(path: Path, kills: int, seed: int) -> None:
    layers.KEEP_FILE = layers.KEEP_TOTAL = layers.PASSING_TOTAL = 0
    filling.CHUNK, filling._RUN, hydrator.FOLD_AT, deltalog._GROW = 8192, 8, 20_000, 64 << 10
    rng = random.Random(seed)
    history = make_history(rng)
    directory, target = ReplicaDirectory(path / "replica"), path / "local.db"
    primary = Primary(directory, history)
    primary.step()
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    alive: list[int] = []
    done = {"kills": 0, "transactions": 0, "compared": 0, "pages": 0}
    while done["kills"] < kills:
        while len(alive) < rng.choice([1, 2, 2, 3]):
            pid = os.fork()
            if not pid:
                try:
                    live(directory, target, history, writing, rng.randrange(1 << 30))
                except BaseException:  # noqa: BLE001
                    sys.excepthook(*sys.exc_info())
                finally:
                    os._exit(1)
            alive.append(pid)
        for _ in range(rng.choice([0, 1, 4, 12])):
            time.sleep(rng.random() * 0.02)
            primary.step()
        victim = alive.pop(rng.randrange(len(alive)))
        os.kill(victim, signal.SIGKILL)
        if os.waitpid(victim, 0)[1] != signal.SIGKILL:
            raise SystemExit(f"after {done['kills']} kills one had failed")
        done["kills"] += 1
        while True:
            try:
                counts = os.read(reading, 65536)
            except BlockingIOError:
                break
            done["compared"] += len(counts) // 4
            done["pages"] += sum(int.from_bytes(counts[n : n + 4], "big") for n in range(0, len(counts), 4))
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    done["transactions"] = primary.txid
    with opened(directory, hydrate=True, hydration_path=str(target)) as replica:
        assert replica.head.txid == primary.txid
        compare(replica, history)
        eventually(lambda: complete(replica))
        assert local_database(replica) == history.database(primary.txid)
    assert target.read_bytes() == history.database(primary.txid)
    print(json.dumps(done))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
