"""Instant read replicas of SQLite databases, straight from their Litestream backups.

    import apsw, lazyreplica
    db = apsw.Connection("file:app.db?vfs=litestream")   # LITESTREAM_REPLICA_URL=s3://bucket/app

Importing this package registers the VFS named ``litestream`` with APSW.
"""

from lazyreplica import errors
from lazyreplica.naming import configure
from lazyreplica.publish import Published, publish
from lazyreplica_vfs.connections import connect, export, refresh, wait_for
from lazyreplica_vfs.register import register

__all__ = ["Published", "configure", "connect", "errors", "export", "publish", "refresh", "wait_for"]

__version__ = "0.1.0"

register()
