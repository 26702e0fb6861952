"""Break the reader on purpose: a soak that does not notice is worth nothing."""

from __future__ import annotations

import random
from typing import Any

PAGE, TXID = "page", "txid"


def install(kind: str) -> None:
    """From now on this process's replicas lie now and then.

    `PAGE`: a byte in the middle of a page is another. `TXID`: a page comes from the newest state, not the pinned one.
    """
    from lazyreplica.replica import Replica

    rng = random.Random(1)
    original = Replica.read

    def read(self: Replica, snapshot: Any, pgno: int, reader: Any, is_off: Any = None) -> bytes:
        if kind == TXID:
            head = self.head
            return original(self, head if pgno <= head.commit else snapshot, pgno, reader, is_off)
        page = original(self, snapshot, pgno, reader, is_off)
        if pgno > 1 and rng.random() < 0.01:
            middle = len(page) // 2
            return page[:middle] + bytes([page[middle] ^ 0x55]) + page[middle + 1 :]
        return page

    def no_view(_: Replica, __: Any) -> None:
        """Local pages would pass us by."""

    Replica.read = read  # type: ignore[method-assign]
    Replica.view = no_view  # type: ignore[method-assign, assignment]
