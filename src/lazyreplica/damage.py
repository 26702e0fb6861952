"""Files that were opened in haste, verified later, and found to be damaged then: what can still be read."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass

from lazyreplica.errors import FileVanished, LTXError, StoreError
from lazyreplica.layers import Layers
from lazyreplica.pagemap import Layer
from lazyreplica.snapshot import Snapshot

log = logging.getLogger(__name__)

_AGAIN = 1.0
_AT_LAST = 60.0
"""Seconds between two attempts to verify a file while storage does not answer: the first, and the longest."""


@dataclass(frozen=True, slots=True)
class _Damage:
    layer: Layer
    lineage: int
    reason: str


class Damages:
    """The damaged files of one replica. Appended to by its background threads, looked at by every read."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._found: list[_Damage] = []

    def __bool__(self) -> bool:
        return bool(self._found)

    def note(self, layer: Layer, lineage: int, reason: str) -> None:
        """The file's page index may name the wrong pages, so that older ones showed through it."""
        self._found.append(_Damage(layer, lineage, reason))

    def refuse(self, snapshot: Snapshot) -> None:
        """Raise `LTXError` if a damaged file is part of `snapshot`: no page of it is certain."""
        base = next(iter(snapshot.pages.layers()))
        for damage in self._found:
            if snapshot.lineage.number == damage.lineage and base.max_txid < damage.layer.max_txid <= snapshot.txid:
                raise LTXError(
                    f"{damage.layer} of {self._url} is damaged: {damage.reason}; which pages it changed is not known, "
                    "so none can be read until the primary writes a new snapshot"
                )


def verify_patiently(layers: Layers, layer: Layer, closing: threading.Event) -> str | None:
    """Verify a file that was opened without, however long it takes until storage answers, or `closing` is set.

    Returns what is wrong with it; None if nothing is, or nobody can tell any more.
    """
    pause = _AGAIN
    while True:
        try:
            return layers.verify(layer)
        except FileVanished:
            return None
        except StoreError as exc:
            log.info("%s cannot be verified yet: %s", layer, exc)
        if closing.wait(pause):
            return None
        pause = min(2 * pause, _AT_LAST)
