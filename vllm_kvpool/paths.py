"""Names of the files in a pool's folder: the one place that knows them, and whose folder it may be.

<folder>/pool                     the pool file: shared memory
         daemon.lock              exclusively locked while a daemon runs; holds its pid
         launch.lock              held while somebody starts a daemon for "pool": "auto"
         control.sock             where the daemon listens
         clients/<client id>.lock share-locked by every living process of an engine
         daemon.log               output of daemons that nobody's terminal watches
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import NamedTuple

from vllm_kvpool.errors import ConfigError, PoolUnavailable

MAX_SOCKET_PATH = 107
"""Bytes of `sockaddr_un.sun_path`, less the closing zero."""


class PoolPaths(NamedTuple):
    folder: Path

    @property
    def pool(self) -> Path:
        return self.folder / "pool"

    @property
    def daemon_lock(self) -> Path:
        return self.folder / "daemon.lock"

    @property
    def launch_lock(self) -> Path:
        return self.folder / "launch.lock"

    @property
    def daemon_log(self) -> Path:
        return self.folder / "daemon.log"

    @property
    def clients(self) -> Path:
        return self.folder / "clients"

    def client_lock(self, client_id: str) -> Path:
        return self.clients / f"{client_id}.lock"

    @property
    def endpoint(self) -> str:
        socket = str(self.folder / "control.sock")
        if len(socket.encode()) > MAX_SOCKET_PATH:
            fix = f"take a shorter folder or name: {socket} is longer than a socket's path may be"
            raise ConfigError("shm_dir", str(self.folder.parent), fix)
        return f"ipc://{socket}"


def check_folder(folder: Path) -> None:
    """PoolUnavailable: what lies at `folder` is not to be trusted.

    Anybody may make any name in /dev/shm, and whoever made the pool's could hand out bytes of his
    own. Trusted is a directory (no link) of our user, of root, or one that is open to a group of
    ours; never one that everybody may write to. A missing one passes: there is nothing to trust.
    """
    try:
        there = folder.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise PoolUnavailable(f"cannot look at {folder}: {error.strerror}") from None
    if not stat.S_ISDIR(there.st_mode):
        raise PoolUnavailable(f"{folder} is not a directory: delete it, or use another name")
    if not _is_ours(there):
        raise PoolUnavailable(
            f"{folder} belongs to user {there.st_uid}, and is not open to a group of ours: use "
            "another name, or serve the pool with --group-access"
        )
    if there.st_mode & stat.S_IWOTH:
        raise PoolUnavailable(f"everybody may write to {folder}: delete it, or use another name")


def _is_ours(there: os.stat_result) -> bool:
    if there.st_uid in {0, os.geteuid()}:
        return True
    group_access = there.st_mode & stat.S_IRWXG == stat.S_IRWXG
    return group_access and there.st_gid in {os.getegid(), *os.getgroups()}
