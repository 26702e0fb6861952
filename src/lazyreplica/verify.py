"""Reads a whole replica and tells what is wrong with it: file by file, and then what the files make together.

Every byte is read once. On the way the pages of the newest state can be written to a database file, by the rules of
``litestream restore``: a page is that of the chain's last file that holds it, the size is the last file's commit.
"""

from __future__ import annotations

import logging
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import BinaryIO

from lazyreplica.errors import EmptyReplica, FileVanished, LegacyLayout, LTXError, ReplicaGap
from lazyreplica.layers import prepare
from lazyreplica.ltx.decoder import StreamDecoder
from lazyreplica.ltx.header import Header, Trailer, lock_pgno
from lazyreplica.ltx.index import PageIndex
from lazyreplica.ltx.name import format_txid
from lazyreplica.plan import Chain, plan
from lazyreplica.storage import SNAPSHOT_LEVEL, Listing, Store, StoredFile

log = logging.getLogger(__name__)

TIMEOUT = 120.0
"""Seconds for a listing, and for a batch of reads."""
_PIECE = 512 << 10
_BATCH = 48
_ATTEMPTS = 8

Progress = Callable[[int, int], None]
"""Told (bytes read, bytes in all)."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that must not be."""

    kind: str
    """damaged, name, page size, overlap, contradiction, gap, or missing pages."""
    text: str
    file: StoredFile | None = None
    """The file at fault, if it is one."""


@dataclass(frozen=True, slots=True)
class FileChecked:
    """One file, read to its end."""

    file: StoredFile
    header: Header | None
    """None: the file cannot be read as LTX."""
    pages: int
    problem: Problem | None


@dataclass(frozen=True, slots=True)
class ReplicaChecked:
    """The last report: what the files make together."""

    problems: tuple[Problem, ...]
    """All, those of single files included."""
    files: int
    size: int
    """Bytes of those files."""
    vanished: int
    """Files that were deleted while we looked, as compaction does."""
    chain: Chain
    """The files of the newest state; empty when there is none."""
    last: Header | None
    """The header of the chain's last file."""
    rebuilt: bool
    """Whether the newest state was written to the database file that the caller gave."""


@dataclass(frozen=True, slots=True)
class _Facts:
    """What is remembered of a file; 4 bytes for each page of an increment."""

    header: Header
    trailer: Trailer
    pgnos: array[int] = field(repr=False)
    """Empty for a snapshot, which the decoder has found to hold every page."""


def verify(
    store: Store, state: BinaryIO | None = None, progress: Progress | None = None, timeout: float = TIMEOUT
) -> Iterator[FileChecked | ReplicaChecked]:
    """Report on every file of the replica, and at the end on all of them.

    `state` (empty, unbuffered) receives the newest state. A file that vanishes meanwhile, or a hole that is there for
    a moment, is no problem: the replica is listed again. Raises `StoreError` when storage cannot be read,
    `EmptyReplica` or `LegacyLayout` when there is no LTX file.
    """
    return _Verification(store, state, progress, timeout).run()


class _Verification:
    def __init__(self, store: Store, state: BinaryIO | None, progress: Progress | None, timeout: float) -> None:
        self._store = store
        self._state = state
        self._progress = progress
        self._timeout = timeout
        self._checked: dict[StoredFile, FileChecked] = {}
        self._facts: dict[StoredFile, _Facts] = {}
        self._applied: list[StoredFile] = []
        self._vanished: set[StoredFile] = set()
        self._done = self._total = 0

    def run(self) -> Iterator[FileChecked | ReplicaChecked]:
        for attempt in range(1, _ATTEMPTS + 1):
            listing = self._store.list_all(self._timeout)
            files = listing.files
            if not files:
                raise nothing_there(listing, self._store.url)
            chain = newest_chain(files)
            before = len(self._vanished)
            yield from self._read(chain, files)
            found = find_holes(files)
            # Levels are not listed in one instant: only what is wrong a second time is wrong.
            if len(self._vanished) == before and (attempt > 1 or (chain and not found)):
                yield self._conclude(files)
                return
        raise FileVanished(f"files of {self._store.url} keep vanishing while they are read; verify it again")

    def _read(self, chain: Chain, files: Sequence[StoredFile]) -> Iterator[FileChecked]:
        if self._applied != list(chain[: len(self._applied)]):
            self._applied.clear()
            if self._state is not None:
                self._state.truncate(0)
        # What is read into the state is read in the chain's order, also if it was checked before.
        wanted = list(chain[len(self._applied) :]) if self._state is not None else []
        ordered = set(wanted)
        wanted += [file for file in files if file not in ordered and file not in self._checked]
        self._total = self._done + sum(file.size for file in wanted)
        whole = True  # whether all of the chain's files up to here are in the state
        for file, pieces in self._contents(wanted):
            sink = self._state if whole and file in ordered else None
            try:
                report = self._check(file, pieces, sink)
            except FileVanished as exc:
                log.info("%s", exc)
                self._vanished.add(file)
                whole = whole and file not in ordered
                continue
            if sink is not None:
                whole = report.problem is None
                if whole:
                    self._applied.append(file)
            if file not in self._checked:
                self._checked[file] = report
                yield report

    def _contents(self, files: Sequence[StoredFile]) -> Iterator[tuple[StoredFile, Iterator[bytes]]]:
        for file, group in groupby(_read_files(self._store, files, self._timeout), itemgetter(0)):
            yield file, self._counted(data for _, data in group)

    def _counted(self, pieces: Iterable[bytes | FileVanished]) -> Iterator[bytes]:
        for data in pieces:
            if isinstance(data, FileVanished):
                raise data
            self._done += len(data)
            if self._progress is not None:
                self._progress(self._done, self._total)
            yield data

    def _check(self, file: StoredFile, pieces: Iterator[bytes], sink: BinaryIO | None) -> FileChecked:
        try:
            header, index, trailer = decode_into(pieces, sink)
        except LTXError as first:
            log.warning("%s of %s is damaged (%s); reading it again", file, self._store.url, first)
            try:
                header, index, trailer = decode_into(_again(self._store, file, self._timeout), sink)
            except LTXError as again:
                return FileChecked(file, None, 0, Problem("damaged", f"{file}: {again}", file))
        pgnos = array("I") if header.is_snapshot else index.pgnos
        self._facts[file] = _Facts(header, trailer, pgnos)
        problem = None
        if header.name != file.name:
            problem = Problem("name", f"{file} says in its header that it is {header.name}", file)
        return FileChecked(file, header, len(index), problem)

    def _conclude(self, files: Sequence[StoredFile]) -> ReplicaChecked:
        problems = [
            report.problem for file in files if (report := self._checked.get(file)) and report.problem is not None
        ]
        problems += _contradictions([(file, self._facts[file]) for file in files if file in self._facts])
        holes = find_holes(files)
        problems += [Problem("gap", str(hole), hole.after) for hole in holes]
        chain = newest_chain(files)
        if not chain and not holes:
            problems.append(Problem("gap", _why_no_chain(files)))
        facts = [self._facts[file] for file in chain if file in self._facts]
        if facts and len(facts) == len(chain):
            problems += _state_problems(chain, facts)
        last = facts[-1].header if facts and len(facts) == len(chain) else None
        rebuilt = self._state is not None and last is not None and self._applied == list(chain)
        if rebuilt and self._state is not None and last is not None:
            self._state.truncate(last.commit * last.page_size)
        return ReplicaChecked(
            tuple(problems), len(files), sum(file.size for file in files), len(self._vanished), chain, last, rebuilt
        )


def nothing_there(listing: Listing, url: str) -> EmptyReplica | LegacyLayout:
    """The error for a path without LTX files."""
    found = f"; found there: {', '.join(sorted(listing.strangers)[:5])}" if listing.strangers else ""
    if "generations" in listing.strangers:
        return LegacyLayout(f"{url} holds a Litestream 0.3 backup (generations/), which has no LTX files")
    return EmptyReplica(f"{url} holds no LTX files{found}: check the path, and that Litestream has synced once")


def decode_into(pieces: Iterable[bytes], sink: BinaryIO | None) -> tuple[Header, PageIndex, Trailer]:
    """Decode a whole file, and write each page to its place in the database file `sink`. Raises `LTXError`."""
    decoder = StreamDecoder()
    for piece in pieces:
        for pgno, page in decoder.feed(piece):
            if sink is not None:
                sink.seek((pgno - 1) * len(page))
                sink.write(page)
    return decoder.close()


def apply(store: Store, chain: Iterable[StoredFile], state: BinaryIO, timeout: float = TIMEOUT) -> Header | None:
    """Write the pages of further files over `state`; the header of the last one, None without files.

    Raises `FileVanished`, `LTXError`, `StoreError`; then `state` is neither the old nor the new one.
    """
    header = None
    for file in chain:
        header, _, _ = decode_into(_again(store, file, timeout), state)
        state.truncate(header.commit * header.page_size)
    return header


@dataclass(frozen=True, slots=True)
class Hole:
    """Transactions that no file holds, so that the states behind them cannot be made."""

    first: int
    last: int
    """Both TXIDs are missing."""
    after: StoredFile
    """The first file behind them."""

    def __str__(self) -> str:
        return (
            f"transactions {format_txid(self.first)} to {format_txid(self.last)} are missing in front of {self.after}: "
            "no state from there to the next snapshot can be restored"
        )


def find_holes(files: Iterable[StoredFile]) -> list[Hole]:
    """Where the history since the oldest snapshot is broken, for any state that somebody may want to restore.

    Files older than the oldest snapshot are leftovers of retention, not islands. Nor is it a hole that some of level 0
    is deleted before the rest: a compacted file covers it. Each snapshot is a new beginning.
    """
    files = list(files)
    snapshots = sorted(file.name.max_txid for file in files if file.level == SNAPSHOT_LEVEL)
    reached = snapshots[0] if snapshots else 0
    holes: list[Hole] = []
    for file in sorted(files, key=lambda file: file.name):
        low, high = file.name.min_txid, file.name.max_txid
        if file.level == SNAPSHOT_LEVEL or high <= reached:
            continue
        begin = bisect_left(snapshots, high)
        if begin:
            reached = max(reached, snapshots[begin - 1])
        if low > reached + 1:
            holes.append(Hole(reached + 1, low - 1, file))
        reached = max(reached, high)
    return holes


def newest_chain(files: Iterable[StoredFile]) -> Chain:
    """The chain of the newest state, or () when there is none."""
    try:
        return plan(files)
    except (ReplicaGap, EmptyReplica):
        return ()


def _why_no_chain(files: Iterable[StoredFile]) -> str:
    try:
        plan(files)
    except (ReplicaGap, EmptyReplica) as exc:
        return str(exc)
    return "no chain"


def _contradictions(files: Sequence[tuple[StoredFile, _Facts]]) -> Iterator[Problem]:
    """Files that cannot belong to one history of one database."""
    commits: dict[int, tuple[StoredFile, int]] = {}
    before: StoredFile | None = None
    newest = max(files, key=lambda each: each[0].name.max_txid, default=None)
    for file, facts in files:
        txid, commit = file.name.max_txid, facts.header.commit
        other, theirs = commits.setdefault(txid, (file, commit))
        if theirs != commit:
            text = f"{file} ends with a database of {commit} pages, {other} at the same TXID with {theirs}"
            yield Problem("contradiction", text, file)
        if newest is not None and facts.header.page_size != newest[1].header.page_size:
            text = f"{file} has pages of {facts.header.page_size} bytes, the newest file {newest[1].header.page_size}"
            yield Problem("page size", text, file)
        if before is not None and before.level == file.level != SNAPSHOT_LEVEL:
            reach = before.name.max_txid
            if file.name.min_txid <= reach:
                text = f"{file} overlaps {before.name} of its level: two writers, or two histories, in one path"
                yield Problem("overlap", text, file)
            before = file if txid >= reach else before
        else:
            before = file


def _state_problems(chain: Chain, facts: Sequence[_Facts]) -> Iterator[Problem]:
    """Whether the chain's files make a whole database. Takes memory for what the database has grown since its base."""
    base, last = facts[0].header, facts[-1].header
    for (file, after), before in zip(zip(chain[1:], facts[1:], strict=True), facts, strict=False):
        expected, found = before.trailer.post_apply_checksum, after.header.pre_apply_checksum
        if expected and found and expected != found:
            text = f"{file} continues a database with checksum {found:#x}, the files before it make {expected:#x}"
            yield Problem("contradiction", text, file)
    if last.commit == 0:
        yield Problem("missing pages", f"{chain[-1]} leaves a database of 0 pages", chain[-1])
    held = base.commit if base.is_snapshot else 0
    grown = {pgno for each in facts for pgno in each.pgnos if held < pgno <= last.commit}
    lock = lock_pgno(last.page_size)
    missing = last.commit - min(held, last.commit) - len(grown) - (held < lock <= last.commit)
    if missing > 0:
        first = next(pgno for pgno in range(held + 1, last.commit + 1) if pgno not in grown and pgno != lock)
        text = f"{missing} of the newest state's {last.commit} pages are in no file of its chain, the first: {first}"
        yield Problem("missing pages", text, chain[-1])


def _read_files(
    store: Store, files: Iterable[StoredFile], timeout: float
) -> Iterator[tuple[StoredFile, bytes | FileVanished]]:
    """All bytes of all files in order, piece by piece; many small files, or pieces of a large one, at once."""
    waiting = deque((file, at, length) for file in files for at, length in _pieces(file))
    while waiting:
        batch = [waiting.popleft() for _ in range(min(_BATCH, len(waiting)))]
        prepare(store, min(len(batch), store.parallel) - max(1, store.ready), timeout)
        results = store.read_many(batch, timeout)
        for number, (file, _, _) in enumerate(batch):
            try:
                data = next(results)
            except FileVanished as exc:
                waiting.extendleft(reversed([job for job in batch[number + 1 :] if job[0] != file]))
                while waiting and waiting[0][0] == file:
                    waiting.popleft()
                yield file, exc
                break
            yield file, data


def _again(store: Store, file: StoredFile, timeout: float) -> Iterator[bytes]:
    return (store.read(file, at, length, timeout) for at, length in _pieces(file))


def _pieces(file: StoredFile) -> list[tuple[int, int]]:
    return [(at, min(_PIECE, file.size - at)) for at in range(0, file.size, _PIECE)] or [(0, 0)]
