"""How a thread waits for the network, or for another thread, so that its user can call the wait off.

A read that SQLite asks for blocks inside a call that cannot be cancelled from outside. So whoever starts one says how
to find out whether it is still wanted (`called_off_by`), and every wait of that thread looks every 20 ms. A thread that
has said nothing waits in one piece: no cost.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from lazyreplica.errors import Interrupted

SLICE = 0.02
"""Seconds between two looks."""


class _Wish(threading.local):
    """What the present thread was told about its waits."""

    is_off: Callable[[], bool] | None = None


_wish = _Wish()


@contextlib.contextmanager
def called_off_by(is_off: Callable[[], bool] | None) -> Iterator[None]:
    """Within: this thread's waits raise `Interrupted` once `is_off()` is true. None: nothing calls them off."""
    before, _wish.is_off = _wish.is_off, is_off
    try:
        yield
    finally:
        _wish.is_off = before


def can_be_called_off() -> bool:
    """Whether this thread has to wait in slices."""
    return _wish.is_off is not None


def check() -> None:
    """Raise `Interrupted` if what this thread does is not wanted any more."""
    is_off = _wish.is_off
    if is_off is not None and is_off():
        raise Interrupted("interrupted while waiting for storage")


def patiently(step: Callable[[float], bool], timeout: float) -> bool:
    """Call `step(seconds)`, which waits at most so long, until it is true; False after `timeout` seconds."""
    if _wish.is_off is None:
        return step(timeout)
    until = time.monotonic() + timeout
    while True:
        check()
        left = until - time.monotonic()
        if step(max(0.0, min(left, SLICE))):
            return True
        if left <= SLICE:
            return False


def wait(event: threading.Event, timeout: float) -> bool:
    """`event.wait(timeout)`, which can be called off."""
    return patiently(event.wait, timeout)
