"""How many of a sorted sequence lie below a limit, when looking at one costs a round trip. Pure.

A k-ary search: each round asks for as many values as can be fetched at once, so that hundreds of files take one or two
rounds instead of nine.
"""

from __future__ import annotations


class BoundarySearch:
    """For `count` values that do not decrease: how many are less than `limit`?

    Ask with `wanted`, answer with `tell`, until nothing is wanted; then the answer is `below`. `ordered` turns False
    when values that were told do decrease: then the answer means nothing.
    """

    def __init__(self, count: int, limit: int, guess: int | None = None) -> None:
        """`guess`: where the answer is likely to be; looked at first."""
        self._limit = limit
        self._guess = guess
        self._low = 0
        """All values before this one are below the limit."""
        self._high = count
        """This value, and those after it, are not."""
        self._told: dict[int, int] = {}

    @property
    def below(self) -> int:
        """How many values are below the limit, once nothing is wanted."""
        return self._low

    @property
    def done(self) -> bool:
        """Whether nothing is wanted any more."""
        return self._low >= self._high

    @property
    def ordered(self) -> bool:
        """Whether the values told so far do not decrease."""
        values = [self._told[index] for index in sorted(self._told)]
        return values == sorted(values)

    def wanted(self, width: int) -> list[int]:
        """At most `width` (>= 1) positions whose values narrow it down most; none when the answer is known."""
        low, high = self._low, self._high
        if high - low <= width:
            return list(range(low, high))
        near: set[int] = set()
        if self._guess is not None and width >= 4:
            # Half of them around the guess. It is not trusted: the others are spread as if there were none.
            start = self._guess - width // 4
            near = {index for index in range(start, start + width // 2) if low <= index < high}
        self._guess = None
        spread = width - len(near)
        return sorted(near | {low + (high - low) * step // (spread + 1) for step in range(1, spread + 1)})

    def tell(self, index: int, value: int) -> None:
        """The value at a position, one that was asked for or another."""
        self._told[index] = value
        if value < self._limit:
            self._low = max(self._low, index + 1)
        else:
            self._high = min(self._high, index)
