"""From a starting engine to a client of the pool.

An engine tells what its namespace needs bit by bit: the configuration at once, the workers' layouts
when the KV cache is allocated, NONE_HASH after that, at some time before the first request. Only
then can a client say hello.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from enum import Enum, auto
from pathlib import Path
from typing import Any

from vllm_kvpool._native import PoolView
from vllm_kvpool.advice import no_daemon
from vllm_kvpool.client import PoolClient
from vllm_kvpool.config import ConnectorConfig, pool_dir
from vllm_kvpool.connector import compat
from vllm_kvpool.connector.metadata import PoolAttachment, WorkerLayout
from vllm_kvpool.connector.namespace import build_namespace, static_fields
from vllm_kvpool.connector.shards import SlotDivision, divide_slot
from vllm_kvpool.errors import PoolUnavailable
from vllm_kvpool.keys import key_mask
from vllm_kvpool.launch import ensure_daemon
from vllm_kvpool.ledger import StoreGrant
from vllm_kvpool.liveness import is_locked
from vllm_kvpool.paths import PoolPaths, check_folder
from vllm_kvpool.types import REF_BYTES, BlockKeys, SlotRefs, unpack_refs

logger = logging.getLogger(__name__)

FIRST_HELLO_S = 0.5
"""How long the first requests of an engine may be put off (not blocked) until the daemon has
answered."""
ABSENT_S = 2.0
"""Without a connection for so long, the log says that there is none; a restart is faster."""
GROUP = 0
"""The only KV cache group that is shared."""


class _Daemon(Enum):
    """What the last step saw of it."""

    GREETED = auto()
    """It may still answer the first Hello at once."""
    MISSED = auto()
    """No connection; it may be back before anybody has to hear of that."""
    ABSENT = auto()
    """The log says so."""
    THERE = auto()


class PoolLink:
    def __init__(self, vllm_config: Any, kv_cache_config: Any, config: ConnectorConfig) -> None:
        self._config = config
        self._algorithm = str(vllm_config.cache_config.prefix_caching_hash_algo)
        self.block_tokens = compat.block_tokens(vllm_config, kv_cache_config)
        self._fields = static_fields(vllm_config, config, self.block_tokens)
        self._num_workers = int(vllm_config.parallel_config.world_size)
        self._slot: SlotDivision | None = None
        """None before the workers have told their layouts."""
        self._attachment: PoolAttachment | None = None
        self._digest = b""
        self._salt = b""
        self._daemon = _Daemon.GREETED
        self._missed_since_s = 0.0
        """Means nothing while it is there."""
        self._damaged: set[int] = set()
        """In the pool that is mapped now: one reference for each checksum that failed. It may stay here as long
        as that pool, which never uses it again."""
        self._pool_id = ""
        """Of that pool; "" before there is one."""
        self.device_off = False
        """A worker's device refuses all copies with that pool for good: none is to be asked for."""
        self.client: PoolClient | None = None
        self.mask = b""
        """Turns block hashes into block keys."""
        self._folder = pool_dir(config.pool_name, config.shm_dir)
        assert PoolPaths(self._folder).endpoint  # a path too long is an error now, not at a request
        if config.starts_daemon:
            self._ensure_daemon()

    def _ensure_daemon(self) -> None:
        config = self._config
        try:
            ensure_daemon(config.pool_name, config.pool_size, config.shm_dir, self._options)
        except PoolUnavailable as error:
            logger.error("KV pool: going on without a daemon until one is started: %s", error)

    @property
    def _options(self) -> list[str]:
        """Of the daemon that we start, beside the pool's name and size."""
        config = self._config
        upstream = ["--upstream", config.upstream] if config.upstream else []
        return upstream + (["--keys", str(Path(config.keys).absolute())] if config.keys else [])

    @property
    def num_workers(self) -> int:
        return 0 if self._slot is None else len(self._slot.shards)

    @property
    def usable(self) -> bool:
        """Whether blocks can be found and leased: a daemon has answered once (it may be gone by now)."""
        return self.client is not None and self.client.readable

    @property
    def connected(self) -> bool:
        """Whether stores are taken now."""
        return self.client is not None and self.client.connected

    @property
    def awaiting(self) -> bool:
        """Whether a Hello is still to be answered, or its answer to be missed in the log."""
        waiting = self._daemon in (_Daemon.GREETED, _Daemon.MISSED)
        return self.client is not None and waiting

    def set_layouts(self, layouts: Mapping[tuple[int, int], WorkerLayout]) -> None:
        """By (pipeline rank, tensor rank), as vLLM collects them."""
        if len(layouts) != self._num_workers:
            logger.error(
                "KV pool: off, %d of %d workers told their layout", len(layouts), self._num_workers
            )
            return
        self._slot = divide_slot(layouts)

    # client ---------------------------------------------------------------------------------------

    def start(self) -> None:
        """Make the client as soon as everything is known. Cheap to call again."""
        if self.client is not None or self._slot is None:
            return
        none_hash = compat.none_hash()
        if none_hash is None:
            return
        if compat.none_hash_is_random(self._algorithm):
            logger.warning(
                "KV pool: this engine draws its block hashes from a random seed: no other engine "
                "can use its blocks, nor can it after a restart. Start every engine of the pool "
                "with: export PYTHONHASHSEED=0"
            )
        slot = self._slot
        namespace = build_namespace(self._fields, none_hash, slot.layouts, slot.slot_bytes)
        self._digest = namespace.digest
        self.mask = key_mask(self._digest, GROUP, self._salt)
        self.client = PoolClient(self._folder, namespace)
        self._daemon, self._missed_since_s = _Daemon.GREETED, time.monotonic()
        logger.info(
            "KV pool: %s, namespace %s, %s", self._folder, self._digest.hex()[:16], namespace.fields
        )

    def poll(self) -> list[StoreGrant]:
        """Once a step, at its end."""
        if self.client is None:
            return []
        knew_pool = self.usable
        grants = self.client.poll()
        self._notice_pool(self.client.view)
        if self.client.connected:
            self._note_there(self.client.client_id, knew_pool)
        else:
            self._note_missed(time.monotonic())
        return grants

    def _notice_pool(self, view: PoolView | None) -> None:
        """Another one counts its references from the beginning: there the same one names a good block."""
        if view is not None and view.pool_id != self._pool_id:
            self._pool_id = view.pool_id
            self._damaged.clear()
            self.device_off = False

    def _note_there(self, client_id: str, knew_pool: bool) -> None:
        if not knew_pool:
            logger.info("KV pool: connected as client %s", client_id)
        elif self._daemon is _Daemon.ABSENT:
            name = self._config.pool_name
            logger.info("KV pool: the daemon of pool '%s' is back: blocks are stored", name)
        self._daemon = _Daemon.THERE

    def _note_missed(self, now_s: float) -> None:
        """One line in the log, if it lasts."""
        if self._daemon is _Daemon.THERE:
            self._daemon, self._missed_since_s = _Daemon.MISSED, now_s
        missed_s = now_s - self._missed_since_s
        if self._daemon is _Daemon.GREETED and missed_s >= FIRST_HELLO_S:
            self._daemon = _Daemon.MISSED
        if self._daemon is _Daemon.MISSED and missed_s >= ABSENT_S:
            self._daemon = _Daemon.ABSENT
            logger.warning("KV pool: %s", self._absence())

    def _absence(self) -> str:
        name = self._config.pool_name
        try:
            check_folder(self._folder)
            runs = is_locked(PoolPaths(self._folder).daemon_lock)
        except (OSError, PoolUnavailable) as error:
            return f"pool '{name}' is out of reach: {error}"
        what = f"the daemon of pool '{name}' {'does not answer' if runs else 'is gone'}"
        if self.usable:
            return f"{what}: storing nothing until it is back, loads go on"
        if runs:
            return f"{what}: nothing is stored or loaded until it takes this engine; ask `vllm-kvpool doctor`"
        return no_daemon(name, self._config.shm_dir, self._options)

    def take_skipped(self) -> dict[str, int]:
        """What the client left undone since the last call, by reason."""
        if self.client is None or not self.client.skipped:
            return {}
        skipped = dict(self.client.skipped)
        self.client.skipped.clear()
        return skipped

    @property
    def settling(self) -> bool:
        """Whether it is worth asking again in a moment: the first Hello is on its way.

        The same for all lookups of a step. vLLM puts those off ahead of those that load; were they
        mixed, vLLM up to 0.29 would wait with the former for blocks that the latter hold, for ever.
        """
        return self.client is not None and self._daemon is _Daemon.GREETED

    # blocks -----------------------------------------------------------------------------------------

    def match_prefix(self, keys: BlockKeys) -> SlotRefs:
        """The leading READY blocks, as far as none of them is known to be damaged."""
        assert self.client is not None
        refs = self.client.match_prefix(keys)
        if self._damaged:
            for i, ref in enumerate(unpack_refs(refs)):
                if ref in self._damaged:
                    return SlotRefs(refs[: i * REF_BYTES])
        return refs

    def drop_damaged(self, refs: SlotRefs) -> None:
        """The daemon forgets them when it hears of it; here nobody finds them from now on."""
        assert self.client is not None
        self._damaged.update(unpack_refs(refs))
        self.client.drop(refs)

    def attachment(self) -> PoolAttachment | None:
        """What workers need to copy to and from the pool that is mapped now."""
        assert self.client is not None
        assert self._slot is not None
        view = self.client.view
        if view is None:
            return None
        if self._attachment is None or self._attachment.pool_id != view.pool_id:
            path, lock = str(self.client.pool_path), str(self.client.lock_path)
            self._attachment = PoolAttachment(path, view.pool_id, lock, self._slot.shards)
        return self._attachment

    def hide_stored_blocks(self) -> None:
        """From now on no block stored before matches: in this engine, under a salt that nobody else
        has, because nobody else is known to have changed in the same way."""
        self._salt = os.urandom(16)
        if self._digest:
            self.mask = key_mask(self._digest, GROUP, self._salt)

    def close(self) -> None:
        self._slot = None  # no new client is made
        if self.client is not None:
            self.client.close()
            self.client = None
