"""Deadlines and retries, without a network."""

from __future__ import annotations

import pytest

from lazyreplica.errors import StoreUnavailable
from lazyreplica.storage.retry import Deadline, RetryPolicy, TransientError, UnreachableError, retrying


class Failing:
    def __init__(self, *errors: Exception | None) -> None:
        self.errors = list(errors)
        self.attempts = 0

    def __call__(self) -> str:
        self.attempts += 1
        error = self.errors[min(self.attempts, len(self.errors)) - 1]
        if error is not None:
            raise error
        return "done"


def run(attempt: Failing, seconds: float = 1000.0, policy: RetryPolicy | None = None) -> tuple[str, list[float]]:
    pauses: list[float] = []
    result = retrying(
        attempt, what="reading x", deadline=Deadline.after(seconds), sleep=pauses.append, policy=policy or RetryPolicy()
    )
    return result, pauses


def test_pauses_grow_and_are_capped() -> None:
    policy = RetryPolicy()
    assert max(policy.pause(1) for _ in range(200)) <= 0.1
    assert 0.5 < max(policy.pause(4) for _ in range(200)) <= 0.8
    assert 1 < max(policy.pause(100) for _ in range(200)) <= 3


def test_success_after_failures() -> None:
    attempt = Failing(TransientError("a"), UnreachableError("b"), TransientError("c"), None)
    result, pauses = run(attempt)
    assert (result, len(pauses)) == ("done", 3)


def test_attempts_are_bounded() -> None:
    attempt = Failing(TransientError("HTTP 503"))
    with pytest.raises(StoreUnavailable, match=r"reading x: HTTP 503 \(gave up after 20 attempts"):
        run(attempt)
    assert attempt.attempts == 20


def test_unreachable_gives_up_early() -> None:
    attempt = Failing(TransientError("reset"), UnreachableError("nothing listens"))
    with pytest.raises(StoreUnavailable, match="nothing listens"):
        run(attempt)
    assert attempt.attempts == 5


def test_a_pause_beyond_the_deadline_is_not_made() -> None:
    attempt = Failing(TransientError("HTTP 503"))
    with pytest.raises(StoreUnavailable):
        run(attempt, seconds=0.5, policy=RetryPolicy(base=1e9, cap=1e9))
    assert attempt.attempts == 1


def test_other_errors_pass() -> None:
    with pytest.raises(KeyError):
        run(Failing(KeyError("x")))
