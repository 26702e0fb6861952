"""Deadlines, and which failures are worth another attempt."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from lazyreplica.errors import StoreUnavailable

logger = logging.getLogger("lazyreplica.storage.retry")

T = TypeVar("T")
_RANDOM = random.SystemRandom()  # a forked child must not draw its parent's jitter


class TransientError(Exception):
    """An attempt failed in a way that the next one may not: a timeout, a reset, a 503."""

    def __init__(self, message: str, *, not_before: float = 0.0) -> None:
        """`not_before`: seconds until the server wants to be asked again."""
        super().__init__(message)
        self.not_before = not_before


class UnreachableError(TransientError):
    """Nobody listens at the endpoint, or its name is unknown: rarely better within a deadline."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """A moment on the monotonic clock."""

    at: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        return cls(time.monotonic() + seconds)

    def left(self) -> float:
        """Seconds until then; negative afterwards."""
        return self.at - time.monotonic()


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how long; the deadline ends everything anyway."""

    attempts: int = 20
    unreachable_attempts: int = 4
    unreachable_seconds: float = 5.0
    base: float = 0.1
    """Seconds: the first pause is random in 0..base, then the range doubles (full jitter)."""
    cap: float = 3.0
    """Seconds: the longest pause."""

    def pause(self, failures: int) -> float:
        """Seconds to wait after that many failures."""
        return _RANDOM.uniform(0.0, min(self.cap, self.base * 2.0 ** (failures - 1)))


def retrying(
    attempt: Callable[[], T],
    *,
    what: str,
    deadline: Deadline,
    sleep: Callable[[float], object],
    policy: RetryPolicy = RetryPolicy(),
) -> T:
    """The first result of `attempt` that is not a `TransientError`.

    Raises `StoreUnavailable`, naming `what` and the last failure, when the policy or the deadline ends it.
    Any other exception of `attempt` passes through.
    """
    started = time.monotonic()
    failures = unreachable = 0
    problem: TransientError | None = None
    while deadline.left() > 0:
        try:
            return attempt()
        except TransientError as error:
            problem = error
        failures += 1
        unreachable = unreachable + 1 if isinstance(problem, UnreachableError) else 0
        # Jitter comes on top of what the server says: it says so to everybody.
        pause = problem.not_before + policy.pause(failures)
        gone = unreachable and (
            unreachable >= policy.unreachable_attempts or time.monotonic() - started >= policy.unreachable_seconds
        )
        if gone or failures >= policy.attempts or pause >= deadline.left():
            break
        logger.debug("%s: %s (attempt %d), again in %.2f s", what, problem, failures, pause)
        sleep(pause)
    taken = time.monotonic() - started
    last = problem or "no time was left for an attempt"
    raise StoreUnavailable(f"{what}: {last} (gave up after {failures} attempts in {taken:.1f} s)") from problem
