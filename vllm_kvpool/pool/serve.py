"""`vllm-kvpool serve`: from a configuration to a running daemon, and its clean end."""

from __future__ import annotations

import logging
import os
import resource
from pathlib import Path

from vllm_kvpool._native import IntegrityError, PoolOwner
from vllm_kvpool.clock import pool_time_s
from vllm_kvpool.config import PoolConfig
from vllm_kvpool.errors import ConfigError, KVPoolError
from vllm_kvpool.pool.daemon import Daemon, stop_on_signals
from vllm_kvpool.pool.exchange import Exchange
from vllm_kvpool.pool.files import PoolFolder, check_room, open_pool, size_text
from vllm_kvpool.pool.mount import Mount
from vllm_kvpool.pool.notify import notify
from vllm_kvpool.pool.prefault import Prefault
from vllm_kvpool.pool.service import PoolService

logger = logging.getLogger(__name__)


def serve(config: PoolConfig) -> None:
    """Serve the pool until SIGTERM or SIGINT. ConfigError, PoolUnavailable: refused, with the way
    out."""
    os.umask(0o007 if config.group_access else 0o077)
    check_room(config)
    _warn(config)
    with PoolFolder(config.name, config.shm_dir, group_access=config.group_access) as folder:
        owner = open_pool(folder, config, pool_time_s())
        _place(owner, config)
        _serve_owner(owner, folder, config)
        try:
            _check(owner)
        finally:
            _say_end(owner, folder, config)


def _warn(config: PoolConfig) -> None:
    """Of what works, and not as it was meant."""
    mount = Mount.of(Path(config.shm_dir))
    if why := mount.why_slow():
        logger.warning("%s", why)
    if config.hugepages and (why := mount.why_no_hugepages()):
        logger.warning("no huge pages for the pool: %s", why)


def _place(owner: PoolOwner, config: PoolConfig) -> None:
    if config.hugepages:
        try:
            owner.advise_hugepages()
        except OSError as error:
            fix = f"{error}: this kernel has none for shared memory, leave it out"
            raise ConfigError("hugepages", True, fix) from None
    if config.numa:
        try:
            owner.bind_numa([int(node) for node in config.numa.split(",")])
        except OSError as error:
            fix = f"{error}: name nodes that `numactl --hardware` lists, or leave it out"
            raise ConfigError("numa", config.numa, fix) from None


def _serve_owner(owner: PoolOwner, folder: PoolFolder, config: PoolConfig) -> None:
    prefault = Prefault(owner, Mount.of(Path(config.shm_dir)))
    exchange = None
    if config.has_exchange:
        _allow_many_files()
        exchange = Exchange(folder.paths, config, owner)
    service = PoolService(owner, folder, prefault, exchange)
    tools = [config.listen] if config.listen.startswith("ipc://") else []
    daemon = Daemon(service, owner, [folder.paths.endpoint, *tools], exchange)
    try:
        with stop_on_signals(daemon):
            prefault.start()
            if exchange is not None:
                exchange.start()
            shown = [folder.paths.endpoint, *([config.listen] if config.listen else [])]
            _say_ready(owner, config.name, shown)
            daemon.run()
            notify("STOPPING=1")
    finally:
        if exchange is not None:
            exchange.stop()
        daemon.close()
        prefault.stop()


def _allow_many_files() -> None:
    """As many as we may have: a peer has a dozen, and the usual limit is 1,024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _say_ready(owner: PoolOwner, name: str, endpoints: list[str]) -> None:
    kept = owner.stats()["ready"]
    print(
        f"vllm-kvpool: pool '{name}' ready: {size_text(owner.size)}, {kept} blocks kept, "
        f"{', '.join(endpoints)}",
        flush=True,
    )
    notify("READY=1")


def _say_end(owner: PoolOwner, folder: PoolFolder, config: PoolConfig) -> None:
    kept = owner.stats()["ready"]
    if config.remove:
        folder.remove()
        logger.info("pool '%s' removed, with %d blocks", config.name, kept)
    elif folder.is_ours and folder.paths.pool.exists():
        logger.info("pool '%s' kept, %d blocks", config.name, kept)


def _check(owner: PoolOwner) -> None:
    """A clean end proves that the pool is in order: the next daemon will believe it."""
    try:
        owner.check_integrity()
    except IntegrityError as error:
        raise KVPoolError(f"the pool is damaged, please report this: {error}") from None
