"""Who is alive: a lock that the kernel holds for a process, never a timer.

A lock counts only while its path still names the locked file: whoever removes a lock file first
takes the exclusive lock on it, and a process that was just about to lock the removed file finds out
by comparing inodes. Works across containers that share the mount. Nothing here waits in the kernel:
a stopped holder must not stop us.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from pathlib import Path

_RETRY_S = 0.002
_MODE = 0o660
"""For the group where the folder lets it in: taking a lock needs the file to be readable."""


def lock_file(path: Path, *, exclusive: bool, timeout_s: float = 0.0) -> int | None:
    """Make `path` if it is missing and lock it: a descriptor, or None when others held it until
    `timeout_s` passed.

    Closing the descriptor gives the lock back, as the death of the process does. OSError: the file
    cannot be made.
    """
    give_up = time.monotonic() + timeout_s
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, _MODE)
        _let_group_in(path, fd)
        if _try_lock(fd, exclusive) and names(path, fd):
            return fd
        os.close(fd)
        if time.monotonic() >= give_up:
            return None
        time.sleep(_RETRY_S)


def _let_group_in(path: Path, fd: int) -> None:
    """In a folder that a group shares, our umask must not keep the others from the file."""
    here = os.fstat(fd)
    ours = here.st_uid == os.geteuid()
    if ours and path.parent.stat().st_mode & stat.S_IWGRP and stat.S_IMODE(here.st_mode) != _MODE:
        os.fchmod(fd, _MODE)


def is_locked(path: Path) -> bool:
    """Whether somebody holds `path` exclusively. Looks by sharing the lock for an instant."""
    return _is_refused(path, exclusive=False)


def is_held(path: Path) -> bool:
    """Whether any process holds `path`, shared or not. A missing file is held by nobody."""
    return _is_refused(path, exclusive=True)


def _is_refused(path: Path, *, exclusive: bool) -> bool:
    """Whether others hold `path` in a way that keeps us from locking it so."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return not _try_lock(fd, exclusive=exclusive)
    finally:
        os.close(fd)


def names(path: Path, fd: int) -> bool:
    """Whether `path` is (still) the file behind `fd`."""
    try:
        there = os.stat(path)
    except OSError:
        return False
    here = os.fstat(fd)
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)


def _try_lock(fd: int, exclusive: bool) -> bool:
    try:
        fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _make_like_parent(folder: Path) -> None:
    """`folder`, if it is missing, open to those to whom its parent is."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
        folder.chmod(stat.S_IMODE(folder.parent.stat().st_mode))


class ClientLock:
    """A process's share of its engine's lock file.

    Every process of an engine (scheduler side and workers) has one on the same path: as long as any
    of them lives, stopped or not, the daemon takes back neither leases nor WRITING slots of that
    client.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None

    def hold(self, timeout_s: float = 0.0) -> bool:
        """Make sure that the file now at `path` is locked by us. False: not yet (no pool folder, or
        the daemon was just looking); ask again."""
        if self.held:
            return True
        try:
            _make_like_parent(self.path.parent)
            fd = lock_file(self.path, exclusive=False, timeout_s=timeout_s)
        except OSError:
            return False
        if fd is None:
            return False
        self.close()  # only now: at no time do we hold neither file
        self._fd = fd
        return True

    @property
    def held(self) -> bool:
        return self._fd is not None and names(self.path, self._fd)

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
