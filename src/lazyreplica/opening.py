"""From a URL to its newest state, in few round trips: one listing, and then all files of the chain at once.

One listing of the whole path beats one for each level: nearly all files are in level 0, so nothing is gained beside it
but nine requests. While it is on its way, the connections that the files need are made.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from functools import partial

from lazyreplica.clock import now
from lazyreplica.errors import EmptyReplica, FileVanished, LegacyLayout, LTXError, ReplicaDamaged, ReplicaGap
from lazyreplica.extents import State
from lazyreplica.layers import Layers
from lazyreplica.pagemap import Layer
from lazyreplica.plan import Chain, plan
from lazyreplica.readahead import Readahead, Urgency
from lazyreplica.snapshot import Lineage, Snapshot, stack_snapshot
from lazyreplica.spans import peek
from lazyreplica.storage import Listing, Store, StoredFile
from lazyreplica.trees import Trees

log = logging.getLogger(__name__)

FAR = 0.03
"""Seconds for a connection and a listing: a store that answers faster is not worth guessing for."""
_MOST_ROOTS = 24
_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Opened:
    """What an open has found."""

    files: tuple[StoredFile, ...]
    """The listing."""
    snapshot: Snapshot
    """The newest state."""
    far: bool
    """Whether the store is so far away that guesses pay."""


def open_newest(store: Store, layers: Layers, readahead: Readahead, timeout: float) -> Opened:
    """The newest state that can be made from a listing.

    `timeout`: seconds for each listing. Raises `StoreError`, `EmptyReplica`, `LegacyLayout`, `ReplicaGap`,
    `ReplicaDamaged`, `LTXError`; `FileVanished` when files keep vanishing while they are opened.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        start = now()
        files = list_files(store, timeout)
        far = now() - start > FAR
        asking = partial(_ask_for_roots, store, layers, readahead) if far else None
        try:
            chain = layers.open_chain(_plan(files, store.url), quick=store.parallel > 1, opened=asking)
            if not far:
                _verify(layers, chain, store.url)
            return Opened(files, stack_snapshot(chain, Lineage()), far)
        except (FileVanished, ReplicaGap) as exc:
            # Compaction moves files while we look, and levels are not listed in one instant: what is wrong only for a
            # moment is not wrong.
            if attempt == _ATTEMPTS:
                raise
            log.info("planning %s again: %s", store.url, exc)
        except (LTXError, ReplicaDamaged) as exc:
            # So is a file that is being replaced: if the listing shows others by now, these may be whole.
            if attempt == _ATTEMPTS or store.list_all(timeout).files == files:
                raise
            log.warning("planning %s again: %s", store.url, exc)
    raise AssertionError("unreachable")


def _verify(layers: Layers, chain: list[Layer], url: str) -> None:
    """At once, where that takes only moments; else it is done a little later (see `Replica`)."""
    for layer in chain:
        damage = layers.verify(layer)
        if damage is not None:
            raise LTXError(f"{layer} of {url} is damaged: {damage}; a new snapshot by the primary replaces it")


def list_files(store: Store, timeout: float) -> tuple[StoredFile, ...]:
    """All files of a replica; meanwhile connections are made for what is asked next.

    Raises `StoreError`, `EmptyReplica`, `LegacyLayout`, `ReplicaDamaged` where there is nothing to read.
    """
    with contextlib.ExitStack() as ending:
        if store.parallel > 1:
            from concurrent.futures import ThreadPoolExecutor  # a store near by needs none

            # The chain's files are asked for right after this. (No new threads at interpreter exit: then without.)
            crew = ThreadPoolExecutor(store.parallel, thread_name_prefix="lazyreplica-open")
            ending.callback(crew.shutdown, wait=False, cancel_futures=True)
            with contextlib.suppress(RuntimeError):
                for _ in range(store.parallel - 1):
                    crew.submit(store.prepare, timeout)
        listing = store.list_all(timeout)
    if not listing.files:
        raise _nothing(listing, store.url)
    if not any(file.size for file in listing.files):
        raise ReplicaDamaged(
            f"all {len(listing.files)} LTX files of {store.url} have 0 bytes, the newest is {listing.files[-1]}: the "
            "copy that made them failed (a full disk?); copy the replica again, or let the primary write a new one"
        )
    return listing.files


def _ask_for_roots(store: Store, layers: Layers, readahead: Readahead, layer: Layer) -> None:
    """As soon as its base is here: fetch the roots of all b-trees, while the rest of the chain may be on its way.

    SQLite reads sqlite_stat1 together with the schema, and the root of every table that is queried. Newer files may
    hold newer ones; then these were fetched in vain.
    """
    if not layer.holds_everything:
        return
    first = _page(layers, layer, 1)
    if first is None:
        return
    trees = Trees(layer.header.page_size)
    trees.learn(1, first)
    begun = []
    for root in trees.roots[:_MOST_ROOTS]:
        place = peek(layer, root)
        if place is not None:
            inner = (place.start, place.end)
            extent, new = layers.extents.begin(layer.number, *inner, State.WAITING, inner)
            if new:
                begun.append(extent)
    # One thread for all, if there are connections: each that starts takes 2 ms from the one that opens. Those for which
    # there is none are not claimed yet: to wait for one another's replies costs more.
    ready = store.ready
    together, single = begun[:ready], begun[ready:]
    if together:
        readahead.do(partial(layers.bring_together, layer, together), Urgency.SOON)
    for extent in single:
        readahead.do(partial(layers.bring, layer, extent), Urgency.SOON)


def _page(layers: Layers, layer: Layer, pgno: int) -> bytes | None:
    """A page that came with the file's head, if it did."""
    place = peek(layer, pgno)
    extent = layers.extents.find(layer.number, place.start, place.end) if place else None
    if place is None or extent is None or extent.state is not State.HERE:
        return None
    with contextlib.suppress(LTXError):
        return place.decode(extent.data, extent.start)
    return None


def _nothing(listing: Listing, url: str) -> EmptyReplica | LegacyLayout:
    if "generations" in listing.strangers:
        return LegacyLayout(
            f"{url} holds a Litestream 0.3 backup (a 'generations' folder), which has no LTX files: let Litestream "
            "0.5 write a replica there, or restore the old one with `litestream restore` and publish it"
        )
    found = f"; found there: {', '.join(sorted(listing.strangers)[:5])}" if listing.strangers else ""
    return EmptyReplica(
        f"{url} holds no LTX files{found}: check the path (it is the replica's path, as in litestream.yml), and "
        "that Litestream 0.5 has synced at least once"
    )


def _plan(files: tuple[StoredFile, ...], url: str) -> Chain:
    try:
        return plan(files)
    except ReplicaGap as exc:
        raise ReplicaGap(f"{url}: {exc}") from exc
