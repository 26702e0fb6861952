"""Whether a replica is hydrated, and where to: options, free space, and who else is there."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable, Iterable

from lazyreplica.attachment import Attachment, Foreign
from lazyreplica.bulkfilling import BulkFiller
from lazyreplica.config import Options
from lazyreplica.fetcher import Fetcher
from lazyreplica.filling import Filler
from lazyreplica.head import Head
from lazyreplica.hydrator import Hydrator
from lazyreplica.layers import Layers
from lazyreplica.local.directory import CopyDirectory
from lazyreplica.snapshot import Snapshot
from lazyreplica.storage import Store, StoredFile

log = logging.getLogger(__name__)

_DEFAULT_MAX = 1 << 30

MakeFiller = Callable[[threading.Event], Filler]


def make_hydrator(
    store: Store,
    layers: Layers,
    head: Head,
    fetcher: Fetcher,
    make_filler: MakeFiller,
    options: Options,
    listed: Iterable[StoredFile],
) -> Hydrator | None:
    """The hydrator that the options ask for, or None: also where the disk does not allow it, with a warning.

    Raises `ConfigError` when `hydration_path` names something that is not ours.
    """
    try:
        local = _attachment(store.url, layers, head, options, list(listed))
    except OSError as exc:
        log.warning("%s is not hydrated, reads go to the store: %s", store.url, exc)
        return None
    if local is None:
        return None
    stop = threading.Event()
    bulk = BulkFiller(store, fetcher.listen, options.read_timeout)
    return Hydrator(store, layers, head, make_filler(stop), bulk, stop, local, options.read_timeout)


def _attachment(url: str, layers: Layers, head: Head, options: Options, listed: list[StoredFile]) -> Attachment | None:
    path = options.local_path(url)
    while True:
        directory = _directory(options, path, head.current, url)
        if directory is None:
            return None
        try:
            return Attachment(url, layers, head, directory, listed)
        except Foreign as exc:
            directory.abandon()
            log.warning("%s; %s is hydrated into a private temporary file instead", exc, url)
            path = None
        except OSError:
            directory.close()
            raise


def _directory(options: Options, path: str | None, snapshot: Snapshot, url: str) -> CopyDirectory | None:
    """The directory for the local copy of `snapshot`'s database, or None where it should not be kept."""
    if options.hydrate is False:
        return None
    directory = CopyDirectory.open(path)
    free = shutil.disk_usage(directory.path).free + directory.size
    limit = options.hydrate_max
    if limit is None:
        limit = min(_DEFAULT_MAX, free // 4) if options.hydrate is None else free
    if snapshot.size < limit:
        return directory
    directory.close()
    if options.hydrate is None:
        log.info(
            "%s is not hydrated: %d bytes, hydrate_max is %d; hydrate=true (LITESTREAM_HYDRATION_ENABLED) turns it on",
            url,
            snapshot.size,
            limit,
        )
    else:
        log.warning("%s is not hydrated: it has %d bytes, the limit is %d", url, snapshot.size, limit)
    return None
