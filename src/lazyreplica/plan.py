"""Which files make a state of the database. Pure: a listing in, a chain of files out.

The rules are those of ``litestream restore``: start from the newest full snapshot (level 9), then repeatedly take
the file of levels 0..8 that continues the state and reaches furthest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lazyreplica.errors import EmptyReplica, NoSuchState, ReplicaGap
from lazyreplica.ltx.name import format_txid
from lazyreplica.storage import SNAPSHOT_LEVEL, StoredFile

Chain = tuple[StoredFile, ...]
"""Files in the order in which they apply; the first one holds the whole database."""


def plan(files: Iterable[StoredFile], txid: int | None = None) -> Chain:
    """The chain for the newest state, or for the newest state at or below `txid`.

    For the newest state a hole in front of remaining files is an error. A bounded plan ends where it ends: its last
    file's MaxTXID says which TXID was reached, which is `txid` only if that is still a boundary between files.

    Raises `EmptyReplica` without files, `ReplicaGap` where transactions are missing.
    """
    usable = [file for file in files if txid is None or file.name.max_txid <= txid]
    if not usable:
        where = "" if txid is None else f" at or below TXID {format_txid(txid)}"
        raise EmptyReplica(f"the replica has no LTX files{where}")
    snapshots = [file for file in usable if file.level == SNAPSHOT_LEVEL]
    base = max(snapshots, key=lambda file: file.name.max_txid, default=None)
    start = base.name.max_txid if base else 0
    rest = _furthest([file for file in usable if file.level != SNAPSHOT_LEVEL], start)
    chain = (*((base,) if base else ()), *rest)
    if not chain:
        first = min(file.name.min_txid for file in usable)
        raise ReplicaGap(
            f"the replica has no snapshot: its oldest file starts at TXID {format_txid(first)}, expected one that "
            "starts at 1; the primary writes a new snapshot with `litestream reset` or when its replica path is emptied"
        )
    if txid is None:
        _refuse_hole(usable, chain[-1].name.max_txid)
    return chain


def plan_before(files: Sequence[StoredFile], older: Sequence[StoredFile]) -> Chain:
    """The chain for the newest state that `older` makes: those of `files` that were written before some time.

    A compacted file whose last transaction is too new is out as a whole; lower levels reach closer to the time, as far
    as they are left. Where ``litestream restore -timestamp`` silently ends at transactions that are in no file, this
    raises `ReplicaGap`: they, too, may have been written before that time. Raises `NoSuchState` when `older` makes no
    state at all.
    """
    try:
        chain = plan(older, max((file.name.max_txid for file in older), default=0))
    except (EmptyReplica, ReplicaGap) as exc:
        raise NoSuchState(str(exc)) from exc
    reached = chain[-1].name.max_txid
    rest = [file for file in files if file.level != SNAPSHOT_LEVEL and file.name.max_txid > reached]
    if rest and not any(file.name.min_txid <= reached + 1 for file in rest):
        _refuse_hole(rest, reached)
    return chain


def reach(files: Sequence[StoredFile], txid: int) -> int:
    """The newest TXID at or below `txid` whose state can be made; 0 if there is none."""
    try:
        return plan(files, txid)[-1].name.max_txid
    except (EmptyReplica, ReplicaGap):
        return 0


def extend(files: Iterable[StoredFile], txid: int) -> Chain:
    """The files that lead from the state at `txid` to the newest one; empty when there is nothing newer.

    Level 9 is used only to cross a hole that retention left: a new snapshot of what we already have would make every
    page a new version. Raises `ReplicaGap` when newer files are there but none leads to them.
    """
    newer = [file for file in files if file.name.max_txid > txid]
    chain = _furthest([file for file in newer if file.level != SNAPSHOT_LEVEL], txid)
    reached = chain[-1].name.max_txid if chain else txid
    if any(file.name.max_txid > reached for file in newer):
        chain = _furthest(newer, txid)
        _refuse_hole(newer, chain[-1].name.max_txid if chain else txid)
    return chain


def _furthest(files: Sequence[StoredFile], current: int) -> Chain:
    """Greedy interval covering: of the files that continue `current`, always the one that reaches furthest.

    Ties go to the lower MinTXID, then the higher level, then the older object, as in ``litestream restore``.
    """
    waiting = sorted(files, key=lambda file: file.name.min_txid, reverse=True)
    best: StoredFile | None = None
    chain: list[StoredFile] = []
    while True:
        while waiting and waiting[-1].name.min_txid <= current + 1:
            candidate = waiting.pop()
            if best is None or _rank(candidate) > _rank(best):
                best = candidate
        if best is None or best.name.max_txid <= current:
            return tuple(chain)
        chain.append(best)
        current = best.name.max_txid


def _rank(file: StoredFile) -> tuple[int, int, int, float]:
    return (file.name.max_txid, -file.name.min_txid, file.level, -file.modified)


def _refuse_hole(files: Iterable[StoredFile], reached: int) -> None:
    beyond = min((file for file in files if file.name.min_txid > reached + 1), key=lambda f: f.name, default=None)
    if beyond is not None:
        raise ReplicaGap(
            f"transactions {format_txid(reached + 1)} to {format_txid(beyond.name.min_txid - 1)} are missing: the "
            f"files that can be joined end at {format_txid(reached)}, the next one is {beyond}"
        )
