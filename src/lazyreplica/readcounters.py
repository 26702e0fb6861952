"""Where pages came from, counted. See `lazyreplica.stats` for what the numbers mean, and what is not counted."""

from __future__ import annotations


class ReadCounters:
    """Where the pages came from that readers asked for. One for each replica, counted by it and its fetcher."""

    __slots__ = ("ahead_hits", "local_hits", "memory_hits", "misses")

    def __init__(self) -> None:
        self.memory_hits = self.local_hits = self.ahead_hits = self.misses = 0
