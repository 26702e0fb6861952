"""What SQLite talks to: the ``litestream`` VFS, its files, pragmas and SQL functions, over APSW.

Knows the engine's `Replica` and `Snapshot` and SQLite's interface; nothing of HTTP, LTX bytes or threads.
"""

import lazyreplica  # noqa: F401 (the engine's package imports and registers us; see `lazyreplica_vfs.register`)
