"""Right after an open: fetch the interior pages of the b-trees, level by level, all of a level at once.

They are about one page in a hundred, every lookup goes through them, and each one that is not here yet is a round trip
in front of the page that is asked for.
"""

from __future__ import annotations

import logging

from lazyreplica import btree
from lazyreplica.gather import Gatherer
from lazyreplica.snapshot import Snapshot
from lazyreplica.trees import Trees

log = logging.getLogger(__name__)

_MOST = 256
"""Pages in all: larger databases get their upper levels."""
_INTERIOR = (btree.INTERIOR_INDEX, btree.INTERIOR_TABLE)


def crawl(snapshot: Snapshot, gatherer: Gatherer, trees: Trees) -> None:
    """Bring the schema, the roots, and the interior pages below them, as long as there are few enough.

    All pages of a level are of one kind. Where nobody knows which, its first page is looked at before the others are
    asked for, while other trees go on. Never raises for what storage does: what does not come is not there.
    """
    left = _MOST
    known = [[root] for root in _roots(snapshot, gatherer, trees)]
    unknown: list[list[int]] = []
    log.debug("%d b-trees in the schema", len(known))
    while (known or unknown) and left > 0:
        wanted = [pgno for pages in known for pgno in pages] + [pages[0] for pages in unknown]
        found = gatherer.gather(snapshot, wanted[:left])
        left -= len(wanted)
        below = []
        for pages in known:
            children = [c for p in pages if p in found and (i := trees.interior(p)) is not None for c in i.children]
            if children:
                below.append(children)
        known = [c for c in unknown if c[0] in found and btree.kind(found[c[0]], c[0]) in _INTERIOR]
        unknown = []
        for children in below:
            (known if trees.knows_any(children) else unknown).append(children)


def _roots(snapshot: Snapshot, gatherer: Gatherer, trees: Trees) -> list[int]:
    """Root pages of all tables and indexes, in the order of the schema."""
    first = gatherer.gather(snapshot, [1]).get(1)
    if first is None:
        return []
    interior = trees.learn(1, first)
    # A schema of more than one page; one of more than two levels has hundreds of tables.
    leaves = {1: first} if interior is None else gatherer.gather(snapshot, interior.children[: _MOST // 4])
    return trees.learn_schema(leaves, first[56:60])
