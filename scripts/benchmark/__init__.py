"""The benchmark: lazyreplica, the peer (litestream-vfs) and native SQLite, side by side. Run ``scripts/bench``."""
