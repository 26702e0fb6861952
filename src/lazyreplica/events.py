"""What happens to the replicas of this process, for whoever listens: metrics, traces.

Nothing is made or called where nobody listens.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RequestDone:
    """Storage was asked for something, and has answered or failed."""

    url: str
    """The replica's, without secrets; so in all events."""
    method: str
    """``read`` (bytes of a file), ``get`` (the next transaction, if it is there) or ``list``."""
    bytes: int
    """Of the file."""
    seconds: float
    """From the call until the answer, retries included. Of reads that were sent together, from when the first was."""
    outcome: str
    """``ok``, or the name of the class in `lazyreplica.errors`: ``StoreUnavailable``, ``FileVanished``, ..."""


@dataclass(frozen=True, slots=True)
class TransactionArrived:
    """Readers that start now see a newer state."""

    url: str
    txid: str
    """16 hex digits."""
    lag: float
    """Seconds since the primary wrote it, by the primary's clock and ours."""


@dataclass(frozen=True, slots=True)
class HydrationDone:
    """Every page of the newest state is in the local copy."""

    url: str
    txid: str


Event = RequestDone | TransactionArrived | HydrationDone
Listener = Callable[[Event], object]

listeners: tuple[Listener, ...] = ()
"""Exchanged, never changed: who reads it needs no lock."""
_lock = threading.Lock()


def add_listener(listener: Listener) -> Callable[[], None]:
    """Call `listener` with each event from now on, of every replica of this process. Returns what ends that.

    It is called in the thread in which the event happens, which may be a reader's: it should take microseconds, and
    must not use a replica. An exception that it raises is logged, and harms nobody.
    """
    global listeners  # noqa: PLW0603 (so that `if events.listeners` is all that an event costs nobody)
    with _lock:
        listeners = (*listeners, listener)

    def remove() -> None:
        global listeners  # noqa: PLW0603
        with _lock:
            listeners = tuple(each for each in listeners if each is not listener)

    return remove


def emit(event: Event) -> None:
    """Tell all listeners. Callers look first whether there are any."""
    for listener in listeners:
        try:
            listener(event)
        except Exception:
            log.exception("a listener failed on %s", type(event).__name__)
