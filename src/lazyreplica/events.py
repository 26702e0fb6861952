"""What happens to the replicas of this process, as values, for whoever listens (`lazyreplica.add_listener`).

Imported only where somebody does: nothing of it costs a program that does not listen.
"""

from __future__ import annotations

from dataclasses import dataclass


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
