"""States of the past: from a time or a TXID to the opened files that make it, in few round trips.

Which files were written before a time is said by nothing but their headers (an object's date is when it was stored, or
copied; a compacted file takes the time of its last transaction). So headers are read, many at once, by a k-ary search
in each level, and remembered.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from lazyreplica.boundary import BoundarySearch
from lazyreplica.errors import FileVanished, LTXError, NoSuchState, ReplicaDamaged, ReplicaGap
from lazyreplica.layers import Layers, prepare
from lazyreplica.ltx.header import HEADER_SIZE, Header
from lazyreplica.ltx.name import format_txid
from lazyreplica.moments import AtTime, AtTXID, Moment, format_ms
from lazyreplica.pagemap import Layer
from lazyreplica.plan import Chain, plan, plan_before, reach
from lazyreplica.snapshot import Lineage, PastLineage, Snapshot, stack_snapshot
from lazyreplica.storage import SNAPSHOT_LEVEL, Store, StoredFile

log = logging.getLogger(__name__)

_ATTEMPTS = 4
_NEIGHBOURS = 64
"""How many TXIDs above one that cannot be had are tried, to name the next one that can."""


Files = Sequence[StoredFile]


class History:
    """Finds and opens states of the past. Thread-safe."""

    def __init__(
        self,
        store: Store,
        layers: Layers,
        poll: Callable[[], None],
        known: Callable[[], tuple[Lineage, Files]],
        timeout: float,
    ) -> None:
        """`poll` lists the store anew; `known` gives the lineage and its files as far as they are known without.

        `timeout`: seconds for each round of requests.
        """
        self._store = store
        self._layers = layers
        self._poll = poll
        self._known = known
        self._planner = PastPlanner(store, layers, timeout)

    def at(self, moment: Moment, head: Snapshot) -> Snapshot:
        """The snapshot of that moment. `head` is the newest known.

        Raises `NoSuchState` (which names what can be had), `ReplicaGap` when transactions before that time are missing,
        `StoreError`, `LTXError`, `ReplicaDamaged`.
        """
        if isinstance(moment, AtTime):
            _refuse_future(moment)
            listed = moment.ms > head.timestamp_ms
        else:
            listed = moment.txid > head.txid
        # Of what lies before the head every file is known, though some may have been compacted: without a listing then,
        # as long as that works.
        for attempt in range(1, _ATTEMPTS + 1):
            if listed:
                self._poll()
            lineage, files = self._known()
            try:
                layers = self._planner.open(moment, files)
            except (FileVanished, ReplicaGap, NoSuchState) as exc:
                if attempt == _ATTEMPTS or (listed and not isinstance(exc, FileVanished)):
                    raise
                log.debug("%s: looking for %s again: %s", self._store.url, moment, exc)
                listed = True
                continue
            if layers[-1].header.page_size != head.page_size:
                raise NoSuchState(
                    f"{self._store.url} had pages of {layers[-1].header.page_size} bytes then, and has "
                    f"{head.page_size} now: one connection cannot show both; `litestream restore` gives that state"
                )
            return stack_snapshot(layers, PastLineage.of(lineage))
        raise AssertionError("unreachable")


class PastPlanner:
    """Which of the files of a replica make a state of the past. Thread-safe.

    Remembers the time in the header of each file that it has looked at, as long as that file is there.
    """

    def __init__(self, store: Store, layers: Layers, timeout: float) -> None:
        """`timeout`: seconds for each round of requests."""
        self._store = store
        self._layers = layers
        self._timeout = timeout
        self._lock = threading.Lock()
        """Held while headers are read: who asks for nearly the same moment finds them read."""
        self._times: dict[StoredFile, int] = {}
        """Milliseconds since the Unix epoch, from headers."""

    def open(self, moment: Moment, files: Files) -> list[Layer]:
        """The chain of `moment`, opened.

        A file in it that is too new after all shows that a clock was set back: then every header is read. Raises what
        `chain` raises, and `FileVanished`.
        """
        layers = self._layers.open_chain(self.chain(moment, files))
        if isinstance(moment, AtTime) and any(layer.header.timestamp_ms >= moment.ms for layer in layers):
            self._read_times(files)
            layers = self._layers.open_chain(self.chain(moment, files))
        return layers

    def chain(self, moment: Moment, files: Files) -> Chain:
        """The chain of `moment`, out of `files`, which are in order of level and name.

        Raises `NoSuchState`, `ReplicaGap`, `StoreError`, `LTXError`, `ReplicaDamaged`.
        """
        with self._lock:
            if isinstance(moment, AtTXID):
                return self._chain_at(moment, files)
            _refuse_future(moment)
            return self._chain_before(moment, files)

    def _chain_at(self, moment: AtTXID, files: Files) -> Chain:
        below = reach(files, moment.txid)
        if below == moment.txid:
            return plan(files, below)
        ends = sorted({file.name.max_txid for file in files if file.name.max_txid > moment.txid})
        above = next((end for end in ends[:_NEIGHBOURS] if reach(files, end) == end), 0)
        near = " and ".join(format_txid(end) for end in (below, above) if end)
        where = "newest" if not above else "nearest" if below else "oldest"
        raise NoSuchState(
            f"{self._store.url} has no state at TXID {format_txid(moment.txid)}: its files do not end there (any more: "
            f"compaction joins transactions, retention removes them); {where}: {near or 'none'}"
        )

    def _chain_before(self, moment: AtTime, files: Files) -> Chain:
        older = self._older(files, moment.ms)
        try:
            return plan_before(files, older)
        except ReplicaGap as exc:
            raise ReplicaGap(
                f"{self._store.url} before {format_ms(moment.ms)}: {exc}; `litestream restore` would silently stop "
                "there, which can be had with PRAGMA litestream_txid"
            ) from exc
        except NoSuchState as exc:
            raise self._too_old(moment, files) from exc

    def _bases(self, files: Files) -> list[StoredFile]:
        return [file for file in files if file.level == SNAPSHOT_LEVEL or file.name.is_snapshot]

    def _too_old(self, moment: AtTime, files: Files) -> NoSuchState:
        self._read_times(self._bases(files))
        bases = sorted((self._times[file], file.name.max_txid) for file in self._bases(files))
        newest = max(files, key=lambda file: file.name.max_txid, default=None)
        left = "it holds no snapshot"
        if bases and newest is not None:
            self._read_times([newest])
            left = (
                f"what its files make begins at {format_ms(bases[0][0])} (TXID {format_txid(bases[0][1])}) and ends at "
                f"{format_ms(self._times[newest])} (TXID {format_txid(newest.name.max_txid)})"
            )
        return NoSuchState(f"{self._store.url} has no state from before {format_ms(moment.ms)}: {left}")

    def _older(self, files: Files, limit: int) -> list[StoredFile]:
        """Those of the files whose headers have a time strictly before `limit`, in milliseconds."""
        self._times = {file: self._times[file] for file in files if file in self._times}
        self._remember(self._layers.headers(file for file in files if file not in self._times))
        levels = [
            sorted(group, key=lambda file: (file.name.max_txid, file.name.min_txid))
            for _, group in itertools.groupby(files, key=lambda file: file.level)
        ]
        searches = [self._search(level, limit) for level in levels]
        while wanted := self._next(levels, searches):
            self._read_times(level[index] for level, _, index in wanted)
            for level, search, index in wanted:
                search.tell(index, self._times[level[index]])
        older: list[StoredFile] = []
        for level, search in zip(levels, searches, strict=True):
            if search.ordered:
                older += level[: search.below]
            else:
                log.info("times of %s are out of order: a clock was set back; reading all of them", self._store.url)
                self._read_times(level)
                older += [file for file in level if self._times[file] < limit]
        return older

    def _search(self, level: Files, limit: int) -> BoundarySearch:
        dated = sum(1 for file in level if file.modified * 1000 < limit)
        search = BoundarySearch(len(level), limit, dated)
        for index, file in enumerate(level):
            if (ms := self._times.get(file)) is not None:
                search.tell(index, ms)
        return search

    def _next(
        self, levels: Sequence[Files], searches: Sequence[BoundarySearch]
    ) -> list[tuple[Files, BoundarySearch, int]]:
        """What to look at in the next round: as much as can be asked for at once."""
        going = [each for each in zip(levels, searches, strict=True) if not each[1].done]
        width = max(1, self._store.parallel // max(1, len(going)))
        return [(level, search, index) for level, search in going for index in search.wanted(width)]

    def _read_times(self, files: Iterable[StoredFile]) -> None:
        missing = [file for file in files if file not in self._times]
        for file in missing:
            if file.size < HEADER_SIZE:
                raise LTXError(f"{file} of {self._store.url} has {file.size} bytes, expected a header of {HEADER_SIZE}")
        store = self._store
        prepare(store, min(len(missing), store.parallel) - max(1, store.ready), self._timeout)
        parts = store.read_many([(file, 0, HEADER_SIZE) for file in missing], self._timeout)
        self._remember({file: _header(file, part, store.url) for file, part in zip(missing, parts, strict=True)})

    def _remember(self, headers: dict[StoredFile, Header]) -> None:
        self._times.update((file, header.timestamp_ms) for file, header in headers.items())


def _refuse_future(moment: AtTime) -> None:
    present = time.time_ns() // 1_000_000
    if moment.ms > present:
        raise NoSuchState(
            f"{format_ms(moment.ms)} is in the future: it is {format_ms(present)}; 'latest' follows what comes"
        )


def _header(file: StoredFile, data: bytes, url: str) -> Header:
    try:
        header = Header.parse(data)
    except LTXError as exc:
        raise LTXError(f"{file} of {url} is damaged: {exc}") from exc
    if header.name != file.name:
        raise ReplicaDamaged(f"{file} of {url} says in its header that it is {header.name}: name and content disagree")
    return header
