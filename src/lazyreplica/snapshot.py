"""An immutable view of the database at one TXID of one lineage."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass, field

from lazyreplica.errors import ReplicaDamaged
from lazyreplica.ltx.header import lock_pgno
from lazyreplica.ltx.name import format_txid
from lazyreplica.pagemap import Layer, PageMap, stack

_numbers = itertools.count(1)
_views = itertools.count(1)


@dataclass(frozen=True, slots=True, eq=False)
class Lineage:
    """One unbroken history; TXIDs mean something only within one.

    `number` changes when the path holds another database history: open connections must reopen. `epoch` changes when
    we went on from a newer state of the same path without having seen every transaction between: connections go on,
    but what SQLite derived from the old state (its parsed schema) must not survive, so a schema cookie is shown that
    counts the epochs.
    """

    number: int = field(default_factory=lambda: next(_numbers))
    epoch: int = 0
    counter_seed: int = field(default_factory=lambda: int.from_bytes(os.urandom(4)))

    def next_epoch(self) -> Lineage:
        """The same history after a stretch that was not followed link by link."""
        return Lineage(self.number, self.epoch + 1, self.counter_seed)


@dataclass(frozen=True, slots=True, eq=False)
class PastLineage(Lineage):
    """A lineage for one view of the past: part of the history of `origin`, whose number it has.

    SQLite must keep nothing that it derived from another moment: neither its page cache (the change counter has a seed
    of its own) nor the parsed schema. An equal schema cookie means an equal schema only within an unbroken history, and
    whether that was unbroken since the view's moment is not known; so each view counts as an epoch, a negative one.
    """

    origin: Lineage | None = None

    @classmethod
    def of(cls, origin: Lineage) -> PastLineage:
        """A new one."""
        return cls(origin.number, -next(_views), origin=origin)


def origin_of(lineage: Lineage) -> Lineage:
    """The lineage that was followed when the snapshot with `lineage` was made."""
    return lineage.origin if isinstance(lineage, PastLineage) and lineage.origin else lineage


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """What one read transaction sees. A value, and cheap: it shares its page map's runs with its neighbours."""

    lineage: Lineage
    last: Layer
    """The file that made this state: its MaxTXID, commit and timestamp are the snapshot's."""
    pages: PageMap

    def __post_init__(self) -> None:
        if self.commit == 0:
            raise ReplicaDamaged(f"{self.last} leaves a database of 0 pages, expected at least 1")
        if self.commit > self.pages.capacity + 1:  # the lock page is in no file
            raise ReplicaDamaged(
                f"{self.last} says that the database has {self.commit} pages, but the files up to it hold "
                f"{self.pages.capacity} at most; the replica is damaged"
            )

    @property
    def txid(self) -> int:
        return self.last.max_txid

    @property
    def page_size(self) -> int:
        """Bytes."""
        return self.last.header.page_size

    @property
    def commit(self) -> int:
        """Size of the database in pages: what the last file says, whatever older files hold beyond it."""
        return self.last.header.commit

    @property
    def size(self) -> int:
        """Size of the database in bytes."""
        return self.commit * self.page_size

    @property
    def timestamp_ms(self) -> int:
        """When the primary wrote this state, milliseconds since the Unix epoch (0: the file does not say)."""
        return self.last.header.timestamp_ms

    @property
    def lock_pgno(self) -> int:
        """The page at byte 0x40000000, which no file holds: all zero in any database that reaches it."""
        return lock_pgno(self.page_size)

    @property
    def change_counter(self) -> int:
        """The counter that page 1 shows: a function of (lineage, TXID), so that SQLite keeps its page cache exactly
        as long as the TXID stays (in WAL mode the primary does not count its commits there)."""
        return (self.lineage.counter_seed + self.txid) & 0xFFFFFFFF

    def owner(self, pgno: int) -> Layer:
        """The layer that holds this snapshot's version of page `pgno`, 1 <= pgno <= commit, not the lock page.

        Raises `ReplicaDamaged` when no file holds it: a chain must hold every page of the database.
        """
        layer = self.pages.owner(pgno)
        if layer is None:
            raise ReplicaDamaged(
                f"page {pgno} of {self.commit} is in no file of the chain that ends at TXID {format_txid(self.txid)}; "
                "the replica is damaged, and `litestream restore` fails on it too"
            )
        return layer

    def with_layer(self, layer: Layer, lineage: Lineage | None = None) -> Snapshot:
        """The state after `layer`."""
        return Snapshot(lineage or self.lineage, layer, self.pages.with_layer(layer))


def stack_snapshot(layers: list[Layer], lineage: Lineage) -> Snapshot:
    """The snapshot at the end of a chain of opened layers."""
    return Snapshot(lineage, layers[-1], stack(layers))
