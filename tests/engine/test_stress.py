"""Everything at once: a primary that writes, compacts and deletes, a follower, a hydrator, and readers."""

from __future__ import annotations

import random
import threading
import time

import pytest
from replicas import ReplicaDirectory, local_database, opened, read_page, start

from lazyreplica import filling, follower, hydrator, layers
from lazyreplica.errors import LineageChanged, ReplicaError, SnapshotGone
from support.waiting import eventually


@pytest.mark.slow
@pytest.mark.parametrize("hydrate", [True, False])
def test_readers_see_one_transaction_or_an_honest_error(
    directory: ReplicaDirectory, monkeypatch: pytest.MonkeyPatch, hydrate: bool, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(layers, "KEEP_FILE", 0)
    monkeypatch.setattr(layers, "KEEP_TOTAL", 0)
    monkeypatch.setattr(layers, "PASSING_TOTAL", 0)
    monkeypatch.setattr(filling, "CHUNK", 4096)
    monkeypatch.setattr(hydrator, "_RETRY", 0.01)
    monkeypatch.setattr(follower, "LIST_EVERY", 0.05)  # level-0 files live for milliseconds here, not for minutes
    history, _ = start(directory.path, 20)
    deadline = time.monotonic() + 1.3
    failures: list[BaseException] = []
    counts = {"pages": 0, "gone": 0, "transactions": 0}
    rng = random.Random(5)

    def primary() -> None:
        base = 1
        while time.monotonic() < deadline:
            for _ in range(rng.randrange(1, 6)):
                history.commit(
                    rng.sample(range(1, 31), 4), rng.choice([15, 20, 25, 30, 30]), restart_wal=rng.random() < 0.2
                )
                directory.sync(history)
                time.sleep(0.002)
            newest = history.txid
            directory.write(history, 1, base + 1, newest)
            if rng.random() < 0.3:
                directory.write(history, 9, 1, newest)
                for level, low, high in directory.files():
                    if level in (1, 9) and (low, high) not in ((1, newest), (base + 1, newest)):
                        directory.remove(level, low, high)
            base = newest
            for level, _, high in directory.files():
                if level == 0 and high < newest - 3 and rng.random() < 0.7:
                    if high == 1 and not any(f[0] == 9 for f in directory.files()):
                        continue
                    directory.remove(0, high)

    def reader(seed: int) -> None:
        mine = random.Random(seed)
        while time.monotonic() < deadline:
            try:
                snapshot = replica.begin(replica.head.lineage.number)
            except LineageChanged:
                continue  # between the two
            try:
                truth = history.states[snapshot.txid]
                assert snapshot.commit == len(truth)
                counts["transactions"] += 1
                for pgno in mine.sample(sorted(truth), min(len(truth), mine.randrange(1, 20))):
                    assert read_page(replica, snapshot, pgno) == truth[pgno], f"page {pgno} at TXID {snapshot.txid}"
                    counts["pages"] += 1
                    if mine.random() < 0.1:
                        time.sleep(0.003)
            except SnapshotGone:
                counts["gone"] += 1
            finally:
                replica.end(snapshot)

    def guarded(work: object, *args: object) -> None:
        try:
            work(*args)  # type: ignore[operator]
        except BaseException as exc:  # noqa: BLE001 (raised again by the test)
            failures.append(exc)

    with opened(directory, hydrate=hydrate, poll_interval=0.003, cache_size=8 * 512) as replica:
        threads = [threading.Thread(target=guarded, args=(primary,))]
        threads += [threading.Thread(target=guarded, args=(reader, seed)) for seed in (1, 2, 3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        assert counts["pages"] > 500, counts
        eventually(lambda: replica.head.txid == history.txid)
        if hydrate:
            eventually(lambda: replica.hydration_progress == 100.0)
            assert local_database(replica) == history.database()
    unexpected = [r for r in caplog.records if r.levelname == "ERROR"]
    assert not unexpected, unexpected
    assert issubclass(SnapshotGone, ReplicaError)
