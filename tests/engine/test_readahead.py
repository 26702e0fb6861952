"""Threads for work ahead: what goes first, how many there are, and how they end."""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from replicas import engine_threads

from lazyreplica import readahead
from lazyreplica.errors import StoreUnavailable
from lazyreplica.readahead import Readahead, Urgency
from support.waiting import eventually


@contextlib.contextmanager
def crew(most: int) -> Iterator[Readahead]:
    ahead = Readahead(most)
    try:
        yield ahead
    finally:
        ahead.stop()
        ahead.join(5)


class Gate:
    """Work that waits until it is let go on, and counts who is in it."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.inside = 0
        self.most = 0
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
        assert self.open.wait(5)
        with self._lock:
            self.inside -= 1


def threads() -> int:
    return engine_threads().count("lazyreplica-readahead")


# -- what goes first --


@pytest.mark.parametrize("seed", range(3))
def test_the_most_urgent_goes_first_and_of_these_the_oldest(seed: int) -> None:
    done: list[tuple[Urgency, int]] = []
    with crew(1) as ahead:
        gate = Gate()
        assert ahead.do(gate, Urgency.SOON)
        eventually(lambda: gate.inside)
        jobs = [(random.Random(f"{seed} {n}").choice(list(Urgency)), n) for n in range(30)]
        for job in jobs:
            assert ahead.do(lambda job=job: done.append(job), job[0])  # type: ignore[misc]
        assert not done
        gate.open.set()
        eventually(lambda: len(done) == 30)
    assert done == sorted(jobs)
    assert len({urgency for urgency, _ in jobs}) == 3


def test_bulk_work_takes_one_thread_and_what_is_urgent_does_not_wait_for_it() -> None:
    with crew(3) as ahead:
        bulk, done = Gate(), threading.Event()
        for _ in range(5):
            ahead.do(bulk, Urgency.WHENEVER)
        eventually(lambda: bulk.inside)
        for _ in range(4):
            done.clear()
            assert ahead.do(done.set, Urgency.SOON)
            assert done.wait(5)
        assert bulk.most == 1
        bulk.open.set()
        eventually(lambda: bulk.most == 1 and not bulk.inside)


def test_interior_pages_leave_threads_for_readers() -> None:
    with crew(6) as ahead:
        perhaps, soon = Gate(), Gate()
        for _ in range(12):
            ahead.do(perhaps, Urgency.PERHAPS)
        eventually(lambda: perhaps.inside == 4)
        for _ in range(12):
            ahead.do(soon, Urgency.SOON)
        eventually(lambda: soon.inside == 2)
        assert (perhaps.inside, soon.inside) == (4, 2)
        soon.open.set()
        perhaps.open.set()
        eventually(lambda: not (soon.inside or perhaps.inside))
        assert perhaps.most <= 4


def test_with_one_thread_every_kind_of_work_is_done() -> None:
    with crew(1) as ahead:
        for urgency in (*Urgency, *Urgency):
            done = threading.Event()
            assert ahead.do(done.set, urgency)
            assert done.wait(5)


# -- how many --


def test_there_are_no_more_threads_than_allowed() -> None:
    with crew(4) as ahead:
        gate, done = Gate(), threading.Semaphore(0)
        for _ in range(50):
            ahead.do(gate, Urgency.SOON)
        eventually(lambda: gate.inside == 4)
        assert threads() == 4
        gate.open.set()
        ahead.do(done.release, Urgency.WHENEVER)
        assert done.acquire(timeout=60)
        assert gate.most == 4
        assert threads() <= 4


def test_one_job_after_the_other_is_done_by_one_thread() -> None:
    with crew(8) as ahead:
        by: list[int] = []
        for n in range(20):
            assert ahead.do(lambda: by.append(threading.get_ident()), Urgency.SOON)
            eventually(lambda n=n: len(by) == n + 1 and ahead._idle)  # type: ignore[misc]
        assert len(set(by)) == 1


def test_no_thread_runs_before_there_is_work() -> None:
    with crew(4):
        assert threads() == 0


# -- how they end --


def test_idle_threads_end_and_others_begin_when_there_is_work_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readahead, "_IDLE", 0.02)
    with crew(4) as ahead:
        for _ in range(3):
            gate = Gate()
            for _ in range(4):
                assert ahead.do(gate, Urgency.SOON)
            eventually(lambda gate=gate: gate.inside == 4)  # type: ignore[misc]
            gate.open.set()
            eventually(lambda: threads() == 0)
            assert not ahead._workers
            assert not ahead._idle


@pytest.mark.parametrize("most", [1, 3])
def test_no_job_is_lost_between_an_idle_threads_end_and_the_next(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(readahead, "_IDLE", 0.001)
    rng = random.Random(5)
    with crew(most) as ahead:
        for _ in range(250):
            done = threading.Event()
            assert ahead.do(done.set, rng.choice(list(Urgency)))
            assert done.wait(5), "nobody does it"
            time.sleep(rng.choice([0, 0.0008, 0.001, 0.0012]))


def test_stop_forgets_what_waits_and_join_waits_for_what_runs() -> None:
    ahead, gate, done = Readahead(2), Gate(), []
    for _ in range(2):
        ahead.do(gate, Urgency.SOON)
    eventually(lambda: gate.inside == 2)
    for n in range(10):
        ahead.do(lambda n=n: done.append(n), Urgency.SOON)  # type: ignore[misc]
    ahead.stop()
    threading.Timer(0.05, gate.open.set).start()
    ahead.join(5)
    assert (gate.inside, done, threads()) == (0, [], 0)


def test_after_stop_nothing_is_taken_any_more() -> None:
    ahead, done = Readahead(2), []
    ahead.stop()
    for urgency in Urgency:
        assert not ahead.do(lambda: done.append(1), urgency)
    ahead.join(1)
    assert (done, threads()) == ([], 0)


def test_idle_threads_end_at_once_when_stopped() -> None:
    ahead, gate = Readahead(5), Gate()
    gate.open.set()
    for _ in range(5):
        ahead.do(gate, Urgency.SOON)
    eventually(lambda: len(ahead._idle) == len(ahead._workers) > 0)
    started = time.monotonic()
    ahead.stop()
    ahead.join(5)
    assert time.monotonic() - started < readahead._IDLE / 2
    assert threads() == 0


def test_join_does_not_wait_for_ever() -> None:
    ahead, gate = Readahead(1), Gate()
    ahead.do(gate, Urgency.SOON)
    eventually(lambda: gate.inside)
    ahead.stop()
    started = time.monotonic()
    ahead.join(0.05)
    assert 0.04 < time.monotonic() - started < 2
    gate.open.set()
    ahead.join(5)


def test_work_may_stop_and_join_its_own_threads() -> None:
    """A connection that the garbage collector closes may be closed by any thread."""
    ahead, done = Readahead(1), threading.Event()

    def close() -> None:
        ahead.stop()
        ahead.join(5)
        done.set()

    ahead.do(close, Urgency.SOON)
    assert done.wait(2)


def test_stop_while_others_submit_leaves_nothing_behind() -> None:
    for seed in range(20):
        ahead = Readahead(3)
        ran: list[int] = []
        taken: list[int] = []

        def submit(first: int, ahead: Readahead = ahead, ran: list[int] = ran, taken: list[int] = taken) -> None:
            for n in range(first, first + 200):
                taken += [n] * ahead.do(lambda n=n: ran.append(n), Urgency.SOON)  # type: ignore[misc]

        submitting = [threading.Thread(target=submit, args=(first,)) for first in (0, 1000)]
        for thread in submitting:
            thread.start()
        time.sleep(seed / 10_000)
        ahead.stop()
        for thread in submitting:
            thread.join()
        ahead.join(5)
        assert set(ran) <= set(taken)
        assert len(ran) == len(set(ran))
        assert not ahead._jobs
        assert threads() == 0


# -- work that fails --


def storage_fails() -> None:
    raise StoreUnavailable("no answer")


def is_wrong() -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize(("work", "level"), [(storage_fails, logging.DEBUG), (is_wrong, logging.ERROR)])
def test_work_that_raises_ends_neither_the_thread_nor_its_share(
    work: Callable[[], None], level: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "lazyreplica.readahead")
    with crew(1) as ahead:
        for urgency in Urgency:
            for _ in range(4):
                assert ahead.do(work, urgency)
        done = threading.Event()
        ahead.do(done.set, Urgency.WHENEVER)
        assert done.wait(5)
    assert [record.levelno for record in caplog.records] == [level] * 12


def test_without_any_thread_nobody_is_told_that_it_will_be_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """At interpreter exit, or where the system has no more of them."""
    done = threading.Event()

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    with crew(3) as ahead:
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuse)
            assert not ahead.do(done.set, Urgency.SOON)
            assert not ahead._jobs
        gate = Gate()
        ahead.do(gate, Urgency.SOON)
        eventually(lambda: gate.inside)
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuse)
            assert ahead.do(done.set, Urgency.SOON), "the one thread that there is will come to it"
        gate.open.set()
        assert done.wait(5)


def test_many_submitters_have_each_job_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readahead, "_IDLE", 0.002)
    ran: list[tuple[int, int]] = []
    with crew(4) as ahead:

        def submit(seed: int) -> None:
            rng = random.Random(seed)
            for n in range(200):
                assert ahead.do(lambda n=n: ran.append((seed, n)), rng.choice(list(Urgency)))  # type: ignore[misc]
                if rng.random() < 0.05:
                    time.sleep(0.002)

        submitting = [threading.Thread(target=submit, args=(seed,)) for seed in range(4)]
        for thread in submitting:
            thread.start()
        for thread in submitting:
            thread.join()
        eventually(lambda: len(ran) == 800)
    assert len(set(ran)) == 800
    assert set(ahead._running.values()) == {0}
