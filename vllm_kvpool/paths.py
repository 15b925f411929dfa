"""Names of the files in a pool's folder: the one place that knows them.

<folder>/pool                     the pool file: shared memory
         daemon.lock              exclusively locked while a daemon runs; holds its pid
         launch.lock              held while somebody starts a daemon for "pool": "auto"
         control.sock             where the daemon listens
         clients/<client id>.lock share-locked by every living process of an engine
         daemon.log               output of daemons that nobody's terminal watches
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from vllm_kvpool.errors import ConfigError

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
