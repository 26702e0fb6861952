"""The keys that Litestream 0.5.17 knows, by place: what is not among them is misspelt, or of another version."""

from __future__ import annotations

# Of these the released binary does not tell the place.
_ANYWHERE = frozenset({"max-sync-ltx-files", "max-sync-wal-bytes", "meta-dir", "retention", "source"})

REPLICA_SETTINGS = _ANYWHERE | {
    *("access-key-id", "secret-access-key", "region", "bucket", "endpoint", "force-path-style", "skip-verify"),
    *("sse-customer-algorithm", "sse-customer-key", "sse-customer-key-path", "sse-kms-key-id", "storage-class"),
    *("sign-payload", "sign-accept-encoding", "require-content-md5", "part-size", "concurrency"),
    *("sync-interval", "validation-interval", "auto-recover", "age"),
    # of Azure, SFTP, WebDAV and NATS
    *("account-name", "account-key", "sas-token"),
    *("host", "user", "password", "key-path", "concurrent-writes", "host-key"),
    *("webdav-url", "webdav-username", "webdav-password"),
    *("jwt", "seed", "creds", "nkey", "username", "token", "tls", "root-cas", "client-cert", "client-key"),
    *("max-reconnects", "reconnect-wait", "timeout"),
}
"""Of a replica, or at the top for all of them."""

REPLICA = REPLICA_SETTINGS | {"type", "name", "path", "url"}

DATABASE = _ANYWHERE | {
    *("path", "dir", "pattern", "recursive", "watch", "replica", "replicas"),
    *("meta-path", "monitor-interval", "checkpoint-interval", "busy-timeout", "min-checkpoint-page-count"),
    *("truncate-page-n", "restore-if-db-not-exists"),
}

TOP = REPLICA_SETTINGS | {
    *("dbs", "addr", "socket", "levels", "snapshot", "validation", "l0-retention", "l0-retention-check-interval"),
    *("verify-compaction", "heartbeat-url", "heartbeat-interval", "exec", "logging", "mcp-addr"),
    *("shutdown-sync-timeout", "shutdown-sync-interval"),
}
