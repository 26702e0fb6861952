"""Who listens to what happens to the replicas of this process: metrics, traces.

Where something happens, it is first looked whether anybody does; only then an event is made.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lazyreplica.events import Event

log = logging.getLogger(__name__)

present: tuple[Callable[[Event], object], ...] = ()
"""Exchanged, never changed: who reads it needs no lock."""
_lock = threading.Lock()


def add_listener(listener: Callable[[Event], object]) -> Callable[[], None]:
    """Call `listener` with each event from now on, of every replica of this process. Returns what ends that.

    It is called in the thread in which the event happens, which may be a reader's: it should take microseconds, and
    must not use a replica. An exception that it raises is logged, and harms nobody.
    """
    global present  # noqa: PLW0603 (so that `if listeners.present` is all that an event costs nobody)
    with _lock:
        present = (*present, listener)

    def remove() -> None:
        global present  # noqa: PLW0603
        with _lock:
            present = tuple(each for each in present if each is not listener)

    return remove


def emit(event: Event) -> None:
    """Tell all listeners. Callers look first whether there are any."""
    for listener in present:
        try:
            listener(event)
        except Exception:
            log.exception("a listener failed on %s", type(event).__name__)


def _after_fork_in_child() -> None:
    global _lock  # noqa: PLW0603 (another thread of the parent may have held it at the moment of the fork)
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork_in_child)
