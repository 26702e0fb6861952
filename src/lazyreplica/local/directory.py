"""The directory of a local copy: who uses it, who owns it, what is swept, and where the finished database appears.

With a `hydration_path` it is ``<hydration_path>.d``, shared by every process that names the same path, and kept. The
finished database is also there under that path itself. Without, it is a random directory below
``<tmp>/lazyreplica-<uid>``, which only its user can enter, private to one process and removed at close.

Two locks, both ``flock`` (a POSIX record lock would go with the first descriptor that any code of ours closes):
*users*, held shared by every process that has the copy open, and *owner*, held by the one that changes it. A forked
child shares its parent's locks until it closes its descriptors; it never unlocks.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from lazyreplica.errors import ConfigError
from lazyreplica.local.control import Control
from lazyreplica.local.state import STATE, CopyState, read_own, sync_directory, write_own

log = logging.getLogger(__name__)

_USERS = "lazyreplica.lock"
"""Also the sign that the directory is ours."""
_OWNER = "owner.lock"
_PUBLISHED = "published.json"
_PATIENCE = 5.0
"""Seconds that opening waits for a process that changes what others may not see change."""
_CONTROL = "control"
_KEPT = {_USERS, _OWNER, _PUBLISHED, _CONTROL, STATE}
_LOOKS, _PAUSE = 20, 0.005
"""Looks at what stands at `hydration_path`, and seconds between two, before it is called somebody else's."""


class CopyDirectory:
    """A directory of ours that this process uses. `close` ends that, and removes it if it is private."""

    def __init__(self, path: Path, users_fd: int, published_at: Path | None) -> None:
        self.path = path
        self.published_at = published_at
        """Where the finished database appears, if the user named a place: then the copy is shared, and kept."""
        self._users_fd = users_fd
        self._owner_fd = -1

    @classmethod
    def open(cls, hydration_path: str | None) -> CopyDirectory:
        """Make the directory, or join those who use it.

        Raises `ConfigError` if something that is not ours stands at `hydration_path`, or `OSError`.
        """
        if hydration_path is None:
            return cls._open_private()
        target = Path(hydration_path).absolute()
        path = target.with_name(target.name + ".d")
        if os.path.lexists(target) and not path.is_dir():
            raise _not_ours(target)
        if (path.is_symlink() and path.exists()) or _is_strange(path):
            raise ConfigError(
                f"{str(path)!r}, where the local copy for hydration_path {hydration_path!r} is built, exists and is "
                "not lazyreplica's; nothing in it will be touched: name another hydration_path"
            )
        _refuse_exposed(path)
        users_fd = _use(path, kept=True)
        directory = cls(path, users_fd, target)
        try:
            _refuse_exposed(path)
            directory._refuse_stranger(target)
        except BaseException:
            os.close(users_fd)
            raise
        return directory

    @staticmethod
    def find(hydration_path: Path) -> Path | None:
        """The directory of the copy that appears at `hydration_path`, if there is one that is ours."""
        path = hydration_path.absolute()
        path = path.with_name(f"{path.name}.d")
        return path if path.is_dir() and not path.is_symlink() and (path / _USERS).is_file() else None

    @staticmethod
    def is_used(path: Path) -> bool:
        """Whether a process has the copy in that directory open. Raises `OSError`."""
        fd = os.open(path / _USERS, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        else:
            return False
        finally:
            os.close(fd)

    @classmethod
    def _open_private(cls) -> CopyDirectory:
        root = Path(tempfile.gettempdir()) / f"lazyreplica-{os.getuid()}"
        with contextlib.suppress(FileExistsError):
            root.mkdir(mode=0o700)
        info = root.lstat()
        if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
            # Somebody else made that name in a shared directory: stay out of it.
            path = Path(tempfile.mkdtemp(prefix="lazyreplica-"))
            return cls(path, _use(path), None)
        root_fd = os.open(root, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            # Under this lock nobody sees a directory between its creation and its locking.
            fcntl.flock(root_fd, fcntl.LOCK_EX)
            _sweep(root)
            path = Path(tempfile.mkdtemp(prefix="replica-", dir=root))
            users_fd = _use(path)
        finally:
            os.close(root_fd)
        return cls(path, users_fd, None)

    def _refuse_stranger(self, target: Path) -> None:
        for _ in range(_LOOKS):
            # Link and note are two files, and the copy's owner may be exchanging them.
            if not os.path.lexists(target) or self._is_ours(target):
                return
            time.sleep(_PAUSE)
        raise _not_ours(target)

    @property
    def shared(self) -> bool:
        """Whether other processes may use it, and it outlives us."""
        return self.published_at is not None

    @property
    def control(self) -> Path:
        """The file of `Control`."""
        return self.path / _CONTROL

    @property
    def size(self) -> int:
        """Bytes on the disk that its files take already."""
        return sum(entry.stat().st_blocks * 512 for entry in self.path.iterdir() if entry.is_file())

    # -- who may do what --

    @property
    def owned(self) -> bool:
        """Whether this process is the one that changes the copy."""
        return self._owner_fd >= 0

    def try_own(self) -> bool:
        """Become the owner unless another process is. A microsecond when one is."""
        if self._owner_fd >= 0:
            return True
        fd = _open_lock(self.path / _OWNER)
        if not _try_lock(fd, fcntl.LOCK_EX):
            os.close(fd)
            return False
        self._owner_fd = fd
        return True

    @property
    def users_fd(self) -> int:
        """The descriptor that holds the users' lock: a child process that writes to the copy keeps it open as well, so
        that nobody is alone with the copy while it lives."""
        return self._users_fd

    @contextlib.contextmanager
    def alone(self) -> Iterator[bool]:
        """Whether no other process uses the copy, nor begins to while the block runs.

        A private directory is always ours alone.
        """
        if not self.shared:
            yield True
            return
        # From shared to exclusive is not atomic, but who is the owner loses nothing in between.
        if not _try_lock(self._users_fd, fcntl.LOCK_EX):
            fcntl.flock(self._users_fd, fcntl.LOCK_SH)  # a conversion that fails may have dropped what we had
            yield False
            return
        try:
            yield True
        finally:
            fcntl.flock(self._users_fd, fcntl.LOCK_SH)

    def sweep(self, state: CopyState | None) -> None:
        """As the owner: remove every file that `state` does not name, what a crash left behind."""
        used = _KEPT | {path.name for path in (state.paths(self.path) if state else ())}
        for entry in list(self.path.iterdir()):
            if entry.name not in used and entry.is_file() and not entry.is_symlink():
                entry.unlink(missing_ok=True)

    # -- the database at hydration_path --

    def publish(self, database: Path) -> None:
        """Let the finished database appear at `published_at`, at once and whole, unless something else is there."""
        target = self.published_at
        if target is None:
            return
        status = database.stat()
        note = self.path / _PUBLISHED
        # On the disk before the link: one that outlived its note would be nobody's, and never removed.
        new = write_own(note.with_suffix(".new"), json.dumps([status.st_dev, status.st_ino]))
        self.withdraw()
        new.rename(note)
        sync_directory(self.path)
        try:
            os.link(database, target)
        except OSError as exc:
            log.warning("the local copy is complete, but does not appear at %s: %s", target, exc)
            if exc.errno not in (errno.EEXIST, errno.EPERM, errno.ENOTSUP, errno.EMLINK):
                raise
        sync_directory(target.parent)

    def withdraw(self) -> None:
        """Remove the published database, if what is there is the one that we published. Raises `OSError`.

        What may change from now on is not there any more after a power loss either.
        """
        if self.published_at is not None and self._is_ours(self.published_at):
            self.published_at.unlink(missing_ok=True)
            sync_directory(self.published_at.parent)
            (self.path / _PUBLISHED).unlink(missing_ok=True)

    def shows(self, database: Path) -> bool:
        """Whether what is at `published_at` is that database, and not one of ours that was there before it."""
        try:
            return (
                self.published_at is not None
                and self._is_ours(self.published_at)
                and os.path.samestat(self.published_at.lstat(), database.lstat())
            )
        except FileNotFoundError:
            return False

    def _is_ours(self, target: Path) -> bool:
        try:
            device, inode = json.loads(read_own(self.path / _PUBLISHED))
            status = target.lstat()
        except (OSError, ValueError, TypeError, RecursionError):
            return False
        return (status.st_dev, status.st_ino) == (device, inode)

    # -- the end --

    def close(self) -> None:
        """Let go of the locks. A private directory goes with them, and one in which there is no copy."""
        if not self.shared or not (self.path / STATE).exists():
            self.remove()
        self.abandon()

    def remove(self) -> bool:
        """Remove everything, the published database too, unless another process uses it. Says whether it did."""
        if self._users_fd < 0:
            return False
        with self.alone() as alone:
            if alone:
                with contextlib.suppress(OSError):
                    self.withdraw()
                _remove(self.path)
        return alone

    def abandon(self) -> None:
        """Let go of the locks and touch nothing. In a forked child the parent goes on holding them."""
        for fd in (self._owner_fd, self._users_fd):
            if fd >= 0:
                os.close(fd)
        self._owner_fd = self._users_fd = -1


def _not_ours(target: Path) -> ConfigError:
    return ConfigError(
        f"hydration_path {str(target)!r} exists and is not a copy made by lazyreplica; it will not be overwritten: "
        "name a path that does not exist"
    )


def _open_lock(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _is_strange(path: Path) -> bool:
    """Whether the directory is not ours. One look at all names: others may be making it in this moment."""
    try:
        names = [entry.name for entry in path.iterdir()]
    except FileNotFoundError:
        return False
    return bool(names) and _USERS not in names and not (path / _USERS).is_file()


def _refuse_exposed(path: Path) -> None:
    """Raise `ConfigError` for a directory into which others may write: they could give us any pages."""
    try:
        info = path.lstat()
    except FileNotFoundError:
        return  # we make it
    if stat.S_ISLNK(info.st_mode):
        return  # to nowhere: it cannot be made
    if info.st_uid != os.geteuid() or info.st_mode & 0o022:
        raise ConfigError(
            f"{str(path)!r}, where the local copy is built, belongs to user {info.st_uid} with mode "
            f"{stat.S_IMODE(info.st_mode):o}; expected user {os.geteuid()}, and nobody else with the right to write: "
            "remove it, or name another hydration_path"
        )


def _use(path: Path, *, kept: bool = False) -> int:
    """A descriptor that holds the users' lock until it is closed. Raises `OSError` when it is not to be had.

    `kept`: what is in the directory is to survive a power loss.
    """
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = _open_lock(path / _USERS)
        except (FileNotFoundError, FileExistsError):
            if time.monotonic() > deadline or path.is_symlink() or path.is_file():
                raise
            continue  # it was removed by its last user in this moment
        try:
            first = _try_lock(fd, fcntl.LOCK_EX)
            if first and _names(path / _USERS, fd):
                _begin(path, kept)
            if first or _try_lock(fd, fcntl.LOCK_SH):
                fcntl.flock(fd, fcntl.LOCK_SH)
                if _names(path / _USERS, fd):
                    return fd
            elif time.monotonic() > deadline:
                raise OSError(errno.EBUSY, f"{path} is being changed by another process")
            else:
                time.sleep(0.01)
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _begin(path: Path, kept: bool) -> None:
    """As the only user: nothing that was said to those before us counts."""
    if kept and not (path / _CONTROL).exists():
        # New. The sign that it is ours is there before anything else, and it before what is published out of it.
        sync_directory(path)
        sync_directory(path.parent)
    fd = _open_lock(path / _OWNER)
    try:
        # An owner that is just changing its users' lock may for a moment hold none.
        if _try_lock(fd, fcntl.LOCK_EX):
            Control.make(path / _CONTROL)
    finally:
        os.close(fd)


def _try_lock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove(path: Path) -> None:
    """Remove a directory of ours; the lock last, which shows that what is left is ours. It may be gone already."""
    with contextlib.suppress(FileNotFoundError):
        for entry in list(path.iterdir()):
            if entry.name != _USERS:
                with contextlib.suppress(OSError):
                    entry.unlink()
    shutil.rmtree(path, ignore_errors=True)


def _names(path: Path, fd: int) -> bool:
    """Whether the file at `path` is the open one."""
    try:
        return os.path.samestat(path.stat(), os.fstat(fd))
    except FileNotFoundError:
        return False


def _sweep(root: Path) -> None:
    """Remove the directories of processes that died without doing so: nobody holds their lock."""
    for path in root.glob("replica-*"):
        try:
            fd = _open_lock(path / _USERS)
        except OSError:
            continue
        try:
            if _try_lock(fd, fcntl.LOCK_EX):
                log.info("removing %s, left behind by a process that was killed", path)
                _remove(path)
        finally:
            os.close(fd)
