"""A pool's folder, from the side of whoever serves or deletes it: one daemon at a time, made or
attached.

Everything that cannot work is refused before anything is made, with what to do instead.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import stat
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from vllm_kvpool._native import PoolFormatError, PoolOwner
from vllm_kvpool.advice import clear_line
from vllm_kvpool.config import PoolConfig, parse_size, pool_dir
from vllm_kvpool.errors import ConfigError, PoolUnavailable
from vllm_kvpool.liveness import is_locked, lock_file, names
from vllm_kvpool.paths import PoolPaths, check_folder
from vllm_kvpool.pool.mount import Mount

logger = logging.getLogger(__name__)

_LOOK_WAIT_S = 10.0
"""Longer than anybody looks at the lock (`liveness.is_locked`), even on a machine that pauses."""
_LOCK_TRY_S = 0.2
"""Between looks at who holds it: a daemon that does will not go away."""
MIN_SLAB_BYTES, MAX_SLAB_BYTES, SLABS = 2 << 20, 1 << 30, 256
"""How the native core cuts a pool, for messages (native/src/format.cpp decides)."""
MAX_SLOTS = 1 << 32
_FRESH_LOCK_S = 60
"""Younger lock files may belong to an engine that is just about to lock them. By the wall clock, as files are
dated: when it jumps, a file goes too early (its engine notices and makes another) or later."""


def size_text(size: float) -> str:
    """64.0 GiB"""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


class PoolFolder:
    """The folder of one pool, locked for a daemon (or for deleting it) until `close`."""

    def __init__(self, name: str, shm_dir: str, *, group_access: bool = False) -> None:
        """PoolUnavailable: a daemon serves it. ConfigError: it cannot be ours."""
        self.name = name
        self.paths = PoolPaths(pool_dir(name, shm_dir))
        # Set-group-id: what engines of other users make there belongs to the pool's group as well.
        self._make(0o2770 if group_access else 0o700)
        self._lock = self._take_lock()
        os.truncate(self._lock, 0)
        # For people only, and a full mount must not keep a pool from being served again.
        with contextlib.suppress(OSError):
            os.write(self._lock, f"{os.getpid()}\n".encode())

    def _make(self, mode: int) -> None:
        folder = self.paths.folder
        try:
            folder.mkdir(mode=mode, exist_ok=True)
            check_folder(folder)
            _set_mode(folder, mode)
            self.paths.clients.mkdir(exist_ok=True)
            _set_mode(self.paths.clients, mode)
        except PoolUnavailable as error:
            raise ConfigError("name", self.name, str(error)) from None
        except OSError as error:
            raise ConfigError("shm_dir", str(folder.parent), str(error)) from None

    def _take_lock(self) -> int:
        """PoolUnavailable: a daemon has it. Who just looks at it shares it for an instant, and lets go."""
        give_up = time.monotonic() + _LOOK_WAIT_S
        while True:
            fd = lock_file(self.paths.daemon_lock, exclusive=True, timeout_s=_LOCK_TRY_S)
            if fd is not None:
                return fd
            if is_locked(self.paths.daemon_lock) or time.monotonic() > give_up:
                raise PoolUnavailable(
                    f"pool '{self.name}' is served by a daemon already{self._holder()}: "
                    "stop that one first, or choose another --name"
                )

    def _holder(self) -> str:
        try:
            return f" (process {self.paths.daemon_lock.read_text().strip()})"
        except OSError:
            return ""

    def sweep_locks(self) -> None:
        """Delete lock files that nobody holds: left by engines that died before their Hello. Those
        of known clients are held, or are in the hands of `PoolOwner.reap_clients`."""
        for path in self.paths.clients.glob("*.lock"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime < _FRESH_LOCK_S:
                    continue
                fd = lock_file(path, exclusive=True)
                if fd is not None:
                    path.unlink()
                    os.close(fd)

    @property
    def is_ours(self) -> bool:
        return names(self.paths.daemon_lock, self._lock)

    def remove(self) -> None:
        """Delete the pool. Whoever still has it mapped keeps that memory until it lets go.

        Where the folder was deleted under us, another daemon may have made it anew: that is not
        ours to delete.
        """
        if self.is_ours:
            shutil.rmtree(self.paths.folder, ignore_errors=True)
        else:
            logger.warning("%s is not ours any more: not deleted", self.paths.folder)

    def close(self) -> None:
        os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _set_mode(folder: Path, mode: int) -> None:
    """Only if need be: of another user's folder we may not."""
    if stat.S_IMODE(folder.stat().st_mode) != mode:
        folder.chmod(mode)


def check_room(config: PoolConfig) -> None:
    """Refuse a new pool that its mount cannot hold, before anything is made."""
    if PoolPaths(pool_dir(config.name, config.shm_dir)).pool.exists():
        return
    mount = Mount.of(Path(config.shm_dir))
    size = parse_size("size", config.size, mount.size)
    if size > mount.free:
        raise ConfigError(
            "size",
            config.size,
            f"{size_text(size)} do not fit: {mount.path} has {size_text(mount.free)} free of "
            f"{size_text(mount.size)} ({mount.free} bytes); {mount.fix(size)}",
        )


def open_pool(folder: PoolFolder, config: PoolConfig, now_s: int) -> PoolOwner:
    """Attach to the pool file, or make it. ConfigError names the ways out of what does not fit."""
    mount = Mount.of(Path(config.shm_dir))
    size = parse_size("size", config.size, mount.size)
    min_block = parse_size("min_block", config.min_block)
    if folder.paths.pool.exists():
        return _attach(folder, config, size, min_block, now_s)
    return _create(folder, config, size, min_block, mount)


def _attach(
    folder: PoolFolder, config: PoolConfig, size: int, min_block: int, now_s: int
) -> PoolOwner:
    delete = f"delete it and start cold: {clear_line(folder.name, config.shm_dir)}"
    try:
        owner = PoolOwner.attach(str(folder.paths.pool), now_s=now_s)
    except PoolFormatError as error:
        fix = f"{error}. Start the vllm-kvpool that made it, or {delete}"
        raise ConfigError("name", folder.name, fix) from None
    for field, made, asked in (
        ("size", owner.size, size),
        ("min_block", owner.min_slot_bytes, min_block),
    ):
        if made != asked:
            kept = owner.stats()["ready"]
            value = getattr(config, field)
            share = f" ({value} of {config.shm_dir})" if str(value).strip().endswith("%") else ""
            raise ConfigError(
                field,
                value,
                f"the pool '{folder.name}' was made with {made} bytes, not {asked}{share}. Keep its "
                f"{kept} blocks with --{field.replace('_', '-')} {made}, or {delete}",
            )
    return owner


def _create(
    folder: PoolFolder, config: PoolConfig, size: int, min_block: int, mount: Mount
) -> PoolOwner:
    mode = 0o660 if config.group_access else 0o600
    try:
        return PoolOwner.create(str(folder.paths.pool), size, min_block, mode=mode)
    except PoolFormatError as error:
        folder.remove()
        raise _misfit(config, size, min_block, str(error)) from None
    except OSError as error:
        folder.remove()
        raise ConfigError("size", config.size, f"{error}; {mount.fix(size)}") from None


def _misfit(config: PoolConfig, size: int, min_block: int, why: str) -> ConfigError:
    """Slabs have about 1/256 of the pool, 2 MiB to 1 GiB, and hold whole blocks; slots have numbers
    of 32 bits."""
    if min_block > MIN_SLAB_BYTES:
        fix = f"the slabs of a pool of {size_text(size)} hold no such block: take "
        if min_block <= MAX_SLAB_BYTES:
            fix += f"--size {SLABS << (min_block - 1).bit_length()} or more, or "
        fix += "a smaller --min-block, the smallest that your engines have"
        return ConfigError("min_block", config.min_block, fix)
    if size // min_block >= MAX_SLOTS:
        fix = f"{why}; for {size_text(size)} take --min-block {2 * size // MAX_SLOTS} or more"
        return ConfigError("min_block", config.min_block, fix)
    return ConfigError("size", config.size, f"{why}: take a larger one")
