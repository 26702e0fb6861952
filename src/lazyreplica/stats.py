"""What a replica has done since it was opened, and where it stands, as a value.

Counters are plain integers, and nothing is locked to count: in CPython no other thread comes between reading and
writing one (a build without the interpreter lock may lose a few). The reader's shortest way, a page out of the local
copy's mapping, counts nothing: `Stats.local_hits` says what that means.
"""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class Stats:
    """One open replica of this process, shared by all its connections. What is counted is counted since its opening.

    Numbers are read one after the other while others work on: a sum may be off by what is under way.
    """

    url: str
    """Without secrets."""
    txid: str
    """The newest state that readers get, 16 hex digits."""
    lag: float
    """Seconds since the last successful poll; -1 before the first."""
    requests: int
    """What storage was asked, repeats and each page of a listing included; calls, of a ``file://`` replica."""
    retries: int
    """Requests that were sent once more: a reset, a timeout, a 503."""
    failures: int
    """Calls of storage that ended in an error, after all their retries. A file that is not there any more is one, a
    transaction that has not come yet is none."""
    bytes: int
    """Bytes of files that storage gave."""
    listings: int
    polls: int
    """Looks for new transactions, also those that failed."""
    failed_polls: int
    transactions: int
    """Files of new transactions that were applied (one may join several transactions)."""
    memory_hits: int
    """Pages out of the page cache."""
    local_hits: int
    """Pages out of the local copy's log of newer versions. **Not** those out of its database file, which are most, and
    which a counter would slow down: `apsw.Connection.status(apsw.SQLITE_DBSTATUS_CACHE_MISS)` tells for each connection
    how many pages it has read in all."""
    ahead_hits: int
    """Pages whose compressed bytes were in memory, or on their way, when they were asked for."""
    misses: int
    """Pages that a reader had to wait a request for."""
    pages_ahead: int
    """Pages that were asked of storage because a predictor expected them to be read."""
    pages_ahead_unused: int
    """Those of them that were dropped before anybody read them: wasted. Those still in memory may be read yet."""
    cache_bytes: int
    """Memory of the page cache; its bound is the option `cache_size`."""
    ahead_bytes: int
    """Memory for compressed bytes: small files, and what was read ahead, what is under way included."""
    hydration_progress: float
    """0..100; 100.0 exactly when every page of the newest state is local."""
    hydration_txid: str | None
    """The transaction whose database the local file is, byte for byte; None while it is not whole."""

    def as_dict(self) -> dict[str, str | int | float | None]:
        """Name -> value, in the order above: what ``PRAGMA litestream_stats`` gives as JSON."""
        return {field.name: getattr(self, field.name) for field in fields(self)}
