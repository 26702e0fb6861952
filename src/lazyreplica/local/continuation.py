"""Does a listing go on from where a local copy ends? Pure.

Transaction numbers mean something only within one history. A copy that was left for a while proves that the path still
has its history by a file that it remembers: one that is still listed with the same identity, or a compaction that ends
with a transaction it knows (same timestamp to the millisecond, same size of the database). Or the newest file of level
0, if all but its identity is the same, its length too: a local file's identity has its mtime in it, which Litestream
sets when the file has appeared already, so whoever is quick has seen another one.

The newest such transaction P may lie before the copy's newest H: the files that ended at H have been compacted away.
What then leads beyond H must cover P+1 too, and so holds every page that was changed since P. If the copy changed any
other page after P, it is not the same history. If not, all that the copy could have wrong is replaced anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lazyreplica.errors import ReplicaGap
from lazyreplica.local.state import Proof
from lazyreplica.pagemap import Layer
from lazyreplica.plan import Chain, extend
from lazyreplica.storage import SNAPSHOT_LEVEL, StoredFile

_TRIES = 3
"""Compactions that are looked into: each costs a request."""


@dataclass(frozen=True, slots=True)
class Continuation:
    """How a listing goes on from a copy."""

    proven: int
    """The newest transaction that the listing and the copy are known to share."""
    chain: Chain
    """Files that lead from the copy's newest state to the listing's; empty if that is not newer."""
    unproven: frozenset[int] | None
    """Pages that the copy changed after `proven`: the chain must hold all of them. None: not known."""


def continuation(
    proofs: Sequence[Proof], txid: int, files: Iterable[StoredFile], alike: Callable[[StoredFile, Proof], bool]
) -> Continuation | None:
    """How `files` go on from the state at `txid` that files of `proofs` led to; None if that cannot be shown.

    `alike` compares a listed file with what is remembered of its last transaction.
    """
    listed = list(files)
    proven = _proven(proofs, txid, listed, alike)
    if proven is None:
        return None
    unproven: set[int] | None = set()
    for proof in proofs:
        if proof.max_txid > proven and unproven is not None:
            pages = proof.pgnos()
            unproven = None if pages is None else unproven.union(pages)
    try:
        chain = tuple(file for file in extend(listed, proven) if file.name.max_txid > txid)
    except ReplicaGap:
        return None
    if chain and chain[0].name.min_txid > proven + 1:
        # Files between hold what was changed since `proven`, and they are not known to be those that the copy has.
        return None
    return Continuation(proven, chain, None if unproven is None else frozenset(unproven))


def _proven(
    proofs: Sequence[Proof], txid: int, listed: list[StoredFile], alike: Callable[[StoredFile, Proof], bool]
) -> int | None:
    known = {proof.file for proof in proofs}
    best = max((file.name.max_txid for file in listed if file in known and file.name.max_txid <= txid), default=None)
    by_end = {proof.max_txid: proof for proof in proofs if proof.timestamp_ms}
    lengths = {proof.file.name: proof.size for proof in proofs if proof.level == 0}
    candidates = [
        file
        for file in listed
        if file.level < SNAPSHOT_LEVEL
        and file.name.max_txid in by_end
        and (best is None or best < file.name.max_txid)
        and file.name.max_txid <= txid
        and (file.level > 0 or lengths.get(file.name) == file.size)
    ]
    candidates.sort(key=lambda file: file.name.max_txid, reverse=True)
    compacted = [file for file in candidates if file.level > 0][:_TRIES]
    touched = [file for file in candidates if file.level == 0][:1]
    for file in sorted((*touched, *compacted), key=lambda file: file.name.max_txid, reverse=True):
        if alike(file, by_end[file.name.max_txid]):
            return file.name.max_txid
    return best


def leads_on(found: Continuation, chain: Sequence[Layer], txid: int) -> bool:
    """Whether its chain, opened, leads from the copy at `txid` to the listing's state, whatever the copy has wrong."""
    if not found.chain:
        return found.proven == txid
    if found.unproven is None:
        return False
    held = {pgno for layer in chain for pgno in layer.index.pgnos} if found.unproven else set()
    commit = chain[-1].header.commit
    return all(pgno in held or pgno > commit for pgno in found.unproven)
