"""The directory of a private local copy: locked while we live, removed at close, swept if we were killed.

With a `hydration_path` it is ``<hydration_path>.d`` and the finished database also appears at that path; without, a
random directory below ``<tmp>/lazyreplica-<uid>``, which only its user can enter.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import stat
import tempfile
from pathlib import Path

from lazyreplica.errors import ConfigError

log = logging.getLogger(__name__)

_LOCK = "lazyreplica.lock"
"""Also the sign that the directory is ours."""
_PUBLISHED = "published"


class InUse(Exception):
    """Another process holds the directory."""


class WorkDirectory:
    """A locked directory of our own."""

    def __init__(self, path: Path, lock_fd: int, published_at: Path | None) -> None:
        self.path = path
        self.published_at = published_at
        """Where the finished database appears, if the user named a place."""
        self._lock_fd = lock_fd
        self._copies = 0

    @classmethod
    def open(cls, hydration_path: str | None) -> WorkDirectory:
        """Make or take over the directory, and empty it.

        Raises `InUse`, `ConfigError` if something that is not ours stands at `hydration_path`, or `OSError`.
        """
        if hydration_path is None:
            return cls._open_private()
        target = Path(hydration_path).absolute()
        path = target.with_name(target.name + ".d")
        if target.exists() and not path.is_dir():
            raise _not_ours(target)
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not (path / _LOCK).is_file() and any(path.iterdir()):
            raise ConfigError(
                f"{str(path)!r}, where the local copy for hydration_path {hydration_path!r} is built, exists and is "
                "not lazyreplica's; it will not be emptied: name another hydration_path"
            )
        lock_fd = _lock(path)
        if lock_fd is None:
            raise InUse(f"{path} is in use by another process")
        work = cls(path, lock_fd, target)
        try:
            work.withdraw()
            if os.path.lexists(target):
                raise _not_ours(target)
            work._empty()
        except BaseException:
            os.close(lock_fd)
            raise
        return work

    @classmethod
    def _open_private(cls) -> WorkDirectory:
        root = Path(tempfile.gettempdir()) / f"lazyreplica-{os.getuid()}"
        with contextlib.suppress(FileExistsError):
            root.mkdir(mode=0o700)
        info = root.lstat()
        if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
            # Somebody else made that name in a shared directory: stay out of it.
            root = Path(tempfile.mkdtemp(prefix="lazyreplica-"))
        root_fd = os.open(root, os.O_RDONLY | os.O_CLOEXEC)
        try:
            # Under this lock nobody sees a directory between its creation and its locking.
            fcntl.flock(root_fd, fcntl.LOCK_EX)
            _sweep(root)
            path = Path(tempfile.mkdtemp(prefix="replica-", dir=root))
            lock_fd = _lock(path)
            assert lock_fd is not None
        finally:
            os.close(root_fd)
        return cls(path, lock_fd, None)

    def new_copy(self) -> Path:
        """An empty directory for another local copy."""
        self._copies += 1
        path = self.path / str(self._copies)
        path.mkdir(mode=0o700)
        return path

    def publish(self, database: Path) -> None:
        """Let the finished database appear at `published_at`, at once and whole, unless something else is there."""
        if self.published_at is None:
            return
        with (self.path / _PUBLISHED).open("w") as note:
            note.write(str(database.stat().st_ino))
            note.flush()
            os.fsync(note.fileno())  # a link that outlived its note would be nobody's, and never removed
        try:
            os.link(database, self.published_at)
        except OSError as exc:
            if not os.path.lexists(self.published_at) and exc.errno in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):
                database.rename(self.published_at)  # a filesystem without hard links; our descriptor stays good
            else:
                log.warning("the local copy is complete, but does not appear at %s: %s", self.published_at, exc)

    def remove(self) -> None:
        """Remove everything, the published database too, and let go of the lock."""
        self.withdraw()
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock_fd)

    def abandon(self) -> None:
        """In a forked child: let go of what the parent goes on using, without touching it."""
        os.close(self._lock_fd)

    def withdraw(self) -> None:
        """Remove the published database, if what is there is the one that we published."""
        if self.published_at is None:
            return
        with contextlib.suppress(FileNotFoundError, ValueError):
            if int((self.path / _PUBLISHED).read_text()) == self.published_at.lstat().st_ino:
                self.published_at.unlink()

    def _empty(self) -> None:
        for entry in self.path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != _LOCK:
                entry.unlink()


def _not_ours(target: Path) -> ConfigError:
    return ConfigError(
        f"hydration_path {str(target)!r} exists and is not a copy made by lazyreplica; it will not be overwritten: "
        "name a path that does not exist"
    )


def _lock(path: Path) -> int | None:
    """A descriptor that holds the directory's lock until it is closed, or None if another process has it."""
    fd = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def _sweep(root: Path) -> None:
    """Remove the directories of processes that died without doing so: nobody holds their lock."""
    for path in root.glob("replica-*"):
        try:
            lock_fd = _lock(path)
        except OSError:
            continue
        if lock_fd is not None:
            log.info("removing %s, left behind by a process that was killed", path)
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock_fd)
