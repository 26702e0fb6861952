"""Background work of the process that owns a local copy: fill it, keep it at the head, leave it in order.

Its thread brings every page of the newest state into the base, and folds the log into it from time to time. New
transactions are handed over by the follower, with their bytes, and are in the log before they become visible.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterable

from lazyreplica import bulkfilling, listeners
from lazyreplica.attachment import Apply, Attachment
from lazyreplica.bulkfilling import BulkFiller
from lazyreplica.errors import LazyReplicaError, LTXError, SnapshotGone, StoreError
from lazyreplica.filling import Filler, Stopped, Wanted, pages_of, share_out
from lazyreplica.head import Head
from lazyreplica.layers import Arrival, Layers
from lazyreplica.local.continuation import continuation, leads_on
from lazyreplica.local.copy import LocalCopy
from lazyreplica.local.state import CopyState, Proof
from lazyreplica.ltx.name import format_txid
from lazyreplica.pagemap import Layer
from lazyreplica.snapshot import Snapshot
from lazyreplica.storage import Store, StoredFile

log = logging.getLogger(__name__)

JOIN_TIMEOUT = 5.0
"""Seconds that closing waits for a thread; closing the store has ended its request."""
FOLD_AT = 16 << 20
"""The log is folded into the base when it has grown beyond this many bytes, and beyond half the base."""
_RETRY = 5.0
_LOOKS = 10
_READER = 0.5
"""Seconds between two looks whether those readers have ended that keep the log from being folded."""


class Hydrator:
    """`start` begins; `stop` and then `close` end it. Where another process owns the copy, it waits to take over."""

    def __init__(
        self,
        store: Store,
        layers: Layers,
        head: Head,
        filler: Filler,
        bulk: BulkFiller,
        stop: threading.Event,
        local: Attachment,
        timeout: float,
    ) -> None:
        """Owns `local` from here on. `stop` is the filler's, `timeout` in seconds for a request."""
        self._store = store
        self._layers = layers
        self._head = head
        self._filler = filler
        self._stop = stop
        self.local = local
        self._timeout = timeout
        self._bulk = bulk
        self._by_hand = False
        """Whether what is missing now is fetched in this process: the bulk loader could not bring it."""
        self._wake = threading.Event()
        self._behind: deque[Layer] = deque()
        """Transactions that became visible before the copy had them."""
        self._leads_here = local.holds(head.current)
        """Whether `_behind` leads from the copy's newest state to the head."""
        self._patience = _LOOKS
        """How often a copy that is ahead of the head is waited for."""
        self._settled = False
        """Whether the finished database has had its chance to appear."""
        self._shown: tuple[CopyState | None, bool] = (None, False)
        """What readers were told of last: which files they read from, and whether the base is whole."""
        self._ended = False
        """Whether the thread has met what it cannot help."""
        self._pause: float | None = None
        """Seconds until the thread looks again whether a reader has ended; None where none is waited for."""
        self._thread: threading.Thread | None = None

    @property
    def progress(self) -> float:
        """0..100; 100.0 exactly when every page of the newest state is here, and the file has appeared, if it can."""
        if self.local.holds_head and (self._settled or not self.local.owned):
            return 100.0
        return min(99.9, 100 * self.local.share)

    def start(self) -> None:
        """Begin, if it is ours to do."""
        if self.local.owned and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="lazyreplica-hydrator", daemon=True)
            self._thread.start()

    def take_over(self, apply: Apply) -> bool:
        """Become the owner of the copy if the one before is gone (see `Attachment`). Cheap when it is not."""
        try:
            if not self.local.take_over(apply):
                return False
        except OSError as exc:
            self.local.give_up(exc)
        self._leads_here, self._patience = False, _LOOKS
        self.start()
        return True

    # -- called by whoever moves the head --

    def advance(self, arrival: Arrival, after: Snapshot) -> None:
        """Make `after`, the head with `arrival` applied, the new head; its pages become local first."""
        local = self.local
        with local.guard:
            copy, layer = local.copy, arrival.layer
            if copy is not None and local.owned and self._leads_here and not self._ended:
                if self._behind or copy.txid != self._head.current.txid or arrival.data is None:
                    self._behind.append(layer)
                elif copy.txid < layer.max_txid:
                    try:
                        copy.append(layer, pages_of(arrival.data, layer, layer.index.pgnos))
                        local.announce(copy)
                    except OSError as exc:
                        local.give_up(exc)
            self._head.advance(after)
        self._wake.set()

    def replace(self, after: Snapshot) -> None:
        """Make `after` the new head, which was not reached link by link."""
        local = self.local
        with local.guard:
            other = after.lineage.number != self._head.current.lineage.number
            self._head.replace(after)
            # Until the thread has found how the copy goes on.
            local.lineage, self._leads_here, self._patience = None, False, _LOOKS
            self._behind.clear()
            if other and local.copy is not None and local.owned:
                self._restart(after)
        self._wake.set()

    def wake(self) -> None:
        """What is shown has changed: the log may be folded further now."""
        self._wake.set()

    def give_up(self, exc: Exception) -> None:
        """What is local is wrong, or the disk does not do its part: use it no more."""
        self.local.give_up(exc)

    # -- the thread --

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wake.clear()
            try:
                if self._step():
                    self._wake.wait(self._pause)
            except Stopped:
                continue
            except OSError as exc:
                self.local.give_up(exc)
            except (StoreError, SnapshotGone) as exc:
                if not self._stop.is_set():
                    log.warning("hydration of %s pauses: %s", self._store.url, exc)
                    self._stop.wait(_RETRY)
            except LazyReplicaError as exc:
                log.error("hydration of %s stops, reads go on from the store: %s", self._store.url, exc)
                break
            except Exception:
                log.exception("hydration of %s failed unexpectedly, reads go on from the store", self._store.url)
                break
        self._ended = True

    def _step(self) -> bool:
        """The next piece of work; True when there is none."""
        copy, head = self.local.copy, self._head.current
        self._pause = None
        if copy is None:
            return True
        if not self._leads_here:
            self._attach(copy)
        elif self._behind:
            self._catch_up(copy)
        elif not self.local.complete:
            self._fill(copy, head)
        else:
            self._tend(copy)
            return True
        return False

    def _attach(self, copy: LocalCopy) -> None:
        """Find out how the head goes on from the copy, or begin another one."""
        head = self._head.current
        listed = self._store.list_all(self._timeout).files
        # What the head was made of was listed too, and leads to it even where a compaction goes beyond.
        files = {file for file in listed if file.name.max_txid <= head.txid}
        files.update(layer.file for layer in head.pages.layers())
        if copy.txid > head.txid and self._patience and any(file.name.max_txid >= copy.txid for file in listed):
            # Whoever had the copy before was further than we are: the follower gets there.
            self._patience -= 1
            self._wake.wait(_READER)
            return
        found = continuation(list(copy.proofs), copy.txid, files, self._alike)
        chain = self._layers.open_chain(found.chain) if found else []
        with self.local.guard:
            if self._head.current is not head or self.local.copy is not copy:
                return
            if found is None or not leads_on(found, chain, copy.txid):
                log.info("the local copy of %s does not lead to its newest state: made anew", self._store.url)
                self._restart(head)
                return
            self.local.lineage, self._leads_here = head.lineage, True
            self._head.look_again()
            self._behind.clear()
            self._behind.extend(chain)

    def _restart(self, head: Snapshot) -> None:
        old, self.local.copy = self.local.copy, None
        self._settled = self._by_hand = False
        self._behind.clear()
        try:
            self.local.begin(head)
            self._leads_here = True
        except OSError as exc:
            self.local.copy = old
            self.local.give_up(exc)
            return
        if old is not None:
            old.remove()

    def _alike(self, file: StoredFile, proof: Proof) -> bool:
        header = self._layers.header_of(file)
        return header is not None and proof.matches(header)

    def _catch_up(self, copy: LocalCopy) -> None:
        """Append the next transaction that the head has and the copy has not."""
        layer = self._behind[0]
        if copy.txid < layer.max_txid:
            try:
                self._append(copy, layer)
            except StoreError:
                self._leads_here = False  # it may be gone: look for another way
                raise
        with self.local.guard:
            if self._behind and self._behind[0] is layer:
                self._behind.popleft()
                if not self._behind:
                    self._head.look_again()
                    if copy.txid < self._head.current.txid:
                        self._leads_here = False

    def _append(self, copy: LocalCopy, layer: Layer) -> None:
        for last in (False, True):
            try:
                copy.append(layer, self._filler.pages(layer))
            except LTXError as exc:
                if last:
                    raise self._filler.distrust(layer, str(exc)) from exc
                log.warning("%s is damaged (%s); fetching it again", layer, exc)
            else:
                with self.local.guard:
                    if self.local.copy is copy:
                        self.local.announce(copy)
                return

    def _fill(self, copy: LocalCopy, head: Snapshot) -> None:
        missing = copy.missing()
        if not missing:
            self._by_hand = False
            with self.local.guard:
                if self.local.copy is copy:
                    self.local.complete = True
                    log.info("every page of %s is local", self._store.url)
                    if listeners.present:
                        from lazyreplica.events import HydrationDone

                        listeners.emit(HydrationDone(self._store.url, format_txid(copy.txid)))
            return
        if copy.txid != head.txid or head.lineage is not self.local.lineage:
            raise Stopped  # the head has moved on in this moment
        if missing[-1] > copy.base.commit:
            self._fold(copy)
        shares = share_out(head, missing)
        here: list[Wanted] = []
        large: list[Wanted] = []
        for each in shares:
            (here if self._filler.is_here(each.layer) else large).append(each)
        if sum(each.layer.file.size for each in large) >= bulkfilling.WORTH and not self._by_hand:
            self._fill_in_bulk(copy, large, self._filler.frames(here))
            return  # what it could not bring is still missing
        for wanted in shares:
            self._filler.fill(head, copy, wanted)
            if self.local.copy is not copy:
                return
        self._by_hand = False

    def _fill_in_bulk(self, copy: LocalCopy, wanted: list[Wanted], frames: Iterable[tuple[int, memoryview]]) -> None:
        held = self.local.directory.users_fd
        try:
            damaged = self._bulk.fill(copy.base, wanted, frames, held, lambda: self.local.copy is copy)
        except LazyReplicaError as exc:
            log.info("%s is not loaded in bulk: %s", self._store.url, exc)
            damaged = {}
        with self.local.guard:
            self._by_hand = self.local.copy is copy  # whatever is missing now
        for layer, reason in damaged.items():
            raise self._filler.distrust(layer, reason)

    def _tend(self, copy: LocalCopy) -> None:
        """Fold the log when it has become long, and let the finished database appear."""
        long = copy.log.end > max(FOLD_AT, copy.base.commit * copy.base.page_size // 2)
        directory = self.local.directory
        unseen = directory.shared and not directory.shows(copy.base.path)
        whole = copy.check_whole()
        if long or (copy.records and (unseen or not whole)):
            self._fold(copy)
            self._pause = _READER if copy.records else None
        self._publish()
        self._show()
        self._settled = True

    def _show(self) -> None:
        """Let readers at rest know when what they read from has changed: without news they would not ask again."""
        copy = self.local.copy
        if copy is not None and (copy.state is not self._shown[0] or copy.base.whole != self._shown[1]):
            self._shown = (copy.state, copy.base.whole)
            self._head.look_again()

    def _fold(self, copy: LocalCopy) -> None:
        """Move the log into the base: in place if nobody else uses it, else into a new base beside it."""
        directory, local = self.local.directory, self.local
        with directory.alone() as alone:
            if alone:
                directory.withdraw()  # while it changes it is no transaction's database
                with local.guard:
                    if local.copy is copy:
                        copy.fold(self._head.floor().txid)
                        local.announce(copy)
                return
        if copy.log.end > FOLD_AT:
            with local.guard:
                if local.copy is not copy:
                    return
                local.copy = copy.beside()
                local.announce(local.copy)
            copy.remove()

    def _publish(self) -> None:
        copy, directory = self.local.copy, self.local.directory
        if copy is None or not self.local.complete or not directory.shared or directory.shows(copy.base.path):
            return
        if not copy.records and copy.base.trimmed and copy.check_whole():
            copy.base.sync()
            with self.local.guard:
                if self.local.copy is copy:
                    directory.publish(copy.base.path)

    # -- the end --

    def stop(self) -> None:
        """Ask the thread to end. A request under way is ended by closing the store."""
        self._stop.set()
        self._bulk.stop()
        self._wake.set()

    def close(self) -> None:
        """After `stop`: join the thread. A private copy is removed, a shared one left as one database if it can be."""
        # A connection may be closed by the garbage collector, which runs in any thread, this one included.
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(JOIN_TIMEOUT)
            if thread.is_alive() and self.local.directory.shared:
                log.warning("the hydrator of %s does not end; its local copy is left as it is", self._store.url)
                self.local.copy = None
                return  # and the locks with it: nobody else may change what it still writes to
        try:
            if self.local.directory.shared and self.local.owned and self.local.copy is not None:
                self._leave(self.local.copy)
        except OSError as exc:
            log.warning("the local copy of %s could not be left in order: %s", self._store.url, exc)
        self.local.close()

    def _leave(self, copy: LocalCopy) -> None:
        directory = self.local.directory
        with directory.alone() as alone, self.local.guard:
            if alone:
                if copy.records:
                    directory.withdraw()
                    copy.fold(copy.txid)
                    self.local.announce(copy)
                copy.base.trim()
            copy.base.sync()
            copy.log.sync()
            if alone:
                self._publish()

    def abandon(self) -> None:
        """In a forked child: the copy and the thread are the parent's."""
        self.local.abandon()
