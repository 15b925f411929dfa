"""The lines to type for a pool: for the commands, the daemon's messages and the engines' logs."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from vllm_kvpool._native import PoolFormatError, PoolView
from vllm_kvpool.config import POOL_PREFIX, SHM_DIR, PoolConfig, parse_size, pool_dir
from vllm_kvpool.errors import PoolUnavailable
from vllm_kvpool.paths import PoolPaths, check_folder


def pool_folders(shm_dir: str) -> list[Path]:
    return sorted(Path(shm_dir).glob(POOL_PREFIX + "*"))


def no_daemon(name: str, shm_dir: str, options: Sequence[str] = ()) -> str:
    """Said of a pool that nobody serves: what there is instead, and how to start its daemon (with
    further `options`)."""
    there = "its blocks are kept"
    if not os.path.exists(PoolPaths(pool_dir(name, shm_dir)).pool):
        pools = [folder.name.removeprefix(POOL_PREFIX) for folder in pool_folders(shm_dir)]
        there = f"pools here: {', '.join(pools) or 'none'}"
    line = serve_line(name, shm_dir, options)
    return f"no daemon serves pool '{name}' in {shm_dir} ({there}); start it: {line}"


def serve_line(name: str, shm_dir: str, options: Sequence[str] = ()) -> str:
    """With the size that a kept pool has: another one would be refused."""
    paths = PoolPaths(pool_dir(name, shm_dir))
    try:
        check_folder(paths.folder)
        info = PoolView.open(str(paths.pool)).info()
    except (OSError, PoolFormatError, PoolUnavailable):
        return _line("serve", name, shm_dir, *options)
    sizes = ["--size", info["size"]]
    if info["min_slot_bytes"] != parse_size("min_block", PoolConfig().min_block):
        sizes += ["--min-block", info["min_slot_bytes"]]
    return _line("serve", name, shm_dir, *sizes, *options)


def clear_line(name: str, shm_dir: str) -> str:
    return _line("clear", name, shm_dir)


def _line(verb: str, name: str, shm_dir: str, *options: object) -> str:
    where = [] if shm_dir == SHM_DIR else ["--shm-dir", shm_dir]
    return shlex.join(["vllm-kvpool", verb, "--name", name, *map(str, options), *where])
