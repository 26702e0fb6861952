"""Which pages next? Pure predictors: told of each miss, they answer how far to read on."""

from __future__ import annotations

MAX_PAGES = 256
MAX_BYTES = 1 << 20
_HEADS = 4


class SequentialWindow:
    """Read-ahead that doubles while misses follow one another, with several heads.

    A scan of a table and one of its index advance in different parts of the file; each keeps its own head. A miss
    that continues no head starts a new one with a window of one page, so that random reads fetch nothing in vain.
    """

    def __init__(self, page_size: int) -> None:
        """`page_size` in bytes."""
        self._limit = max(1, min(MAX_PAGES, MAX_BYTES // page_size))
        self._heads: list[tuple[int, int]] = []
        """(page after the window, its length), most recent last."""

    def missed(self, pgno: int) -> int:
        """Page `pgno` has to be fetched; the number of pages to fetch from there on, itself included."""
        window = 1
        for head in self._heads:
            after, length = head
            if after <= pgno <= after + length:
                window = min(2 * length, self._limit)
                self._heads.remove(head)
                break
        self._heads.append((pgno + window, window))
        del self._heads[:-_HEADS]
        return window
