"""What is measured once pages are local, and of several processes: a scene for each, which gives figures.

hydration   download everything, then read it: beside the peer and native SQLite
sharing     one copy for several processes, and for the next one
tail        point queries while the rest is downloaded
following   a hydrated replica follows transactions
restoring   the commands that make a database file out of a replica
freshness   how old the newest row is, with the real Litestream; what waiting for it costs
"""

from __future__ import annotations

from benchmark.local.following import follow
from benchmark.local.freshness import age, polling
from benchmark.local.hydration import hydrate
from benchmark.local.restoring import restore
from benchmark.local.scene import Scene
from benchmark.local.sharing import reopen, share
from benchmark.local.tail import p99

SCENES: dict[str, Scene] = {
    scene.name: scene
    for scene in (
        Scene("hydrate", hydrate, near=True),
        Scene("share", share),
        Scene("reopen", reopen),
        Scene("p99", p99),
        Scene("follow", follow),
        Scene("age", age),
        Scene("polling", polling),
        Scene("restore", restore),
    )
}
"""What --only takes, besides the groups of workloads. All use the data set "big"."""
