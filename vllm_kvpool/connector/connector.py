"""`KVPoolConnector`: what vLLM loads. It picks its side, checks the configuration, and
delegates."""

from __future__ import annotations

import dataclasses
import json
import logging
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from vllm_kvpool.config import ConnectorConfig
from vllm_kvpool.connector import compat
from vllm_kvpool.connector.compat import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm_kvpool.connector.metadata import KVPoolMetadata, KVPoolWorkerMetadata, WorkerLayout
from vllm_kvpool.connector.stats import KVPoolPromMetrics, KVPoolStats
from vllm_kvpool.errors import ConfigError

if TYPE_CHECKING:
    from vllm_kvpool.connector.scheduler import SchedulerSide
    from vllm_kvpool.connector.worker import WorkerSide

logger = logging.getLogger(__name__)

OPTION = "--kv-transfer-config"
DRAWN = ("engine_id",)
"""Fields of it that vLLM fills where nobody does."""


class KVPoolConnector(KVConnectorBase_V1, SupportsHMA):
    """Asynchronous loads, stores of whole blocks, never in the way: no hook waits for the pool, but for the last bytes
    of a load where they are late (`handle_preemptions`, `get_finished`), and `request_finished*` never keeps a
    request's blocks."""

    _cache_hit_source = compat.host_memory_source()

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        compat.join_vllm_log()
        config = _checked_config(vllm_config)
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        reason = compat.why_unsupported(vllm_config, kv_cache_config)
        if reason is not None:
            if role == KVConnectorRole.SCHEDULER:
                logger.warning("KV pool: off for this engine, which runs as without it: %s", reason)
        elif role == KVConnectorRole.SCHEDULER:
            from vllm_kvpool.connector.scheduler import SchedulerSide

            self._scheduler = SchedulerSide(vllm_config, kv_cache_config, config)
        else:
            from vllm_kvpool.connector.worker import WorkerSide

            self._worker = WorkerSide(vllm_config, kv_cache_config, config)

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    @property
    def prefer_cross_layer_blocks(self) -> bool:
        """Up to 0.28: one run of bytes a block, instead of one a layer."""
        return True

    # scheduler side -------------------------------------------------------------------------------

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: Mapping[tuple[int, int], WorkerLayout]
    ) -> None:
        if self._scheduler is not None:
            self._scheduler.set_layouts(metadata)

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        if self._scheduler is not None:
            self._scheduler.bind_block_pool(gpu_block_pool)

    def on_new_request(self, request: Any) -> None:
        if self._scheduler is not None:
            self._scheduler.add_request(request)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        if self._scheduler is None:
            return 0, False
        return self._scheduler.look_up(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if self._scheduler is not None:
            self._scheduler.admit(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVPoolMetadata:
        if self._scheduler is None:
            return KVPoolMetadata()
        return self._scheduler.plan_step(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        if self._scheduler is not None:
            told = connector_output.kv_connector_worker_meta
            told = told if isinstance(told, KVPoolWorkerMetadata) else KVPoolWorkerMetadata()
            self._scheduler.end_step(connector_output.finished_recving or (), told)

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        if self._scheduler is not None:
            self._scheduler.finish_request(request, block_ids[0] if block_ids else [])
        return False, None

    def has_pending_push_work(self) -> bool:
        """Keeps an engine without requests stepping: until its last copies are done (a request may
        end before its load, whose slots are leased until then), and, for an instant at its start,
        until its workers map the pool, so that no request waits for that (or until the log has said
        that no daemon answers)."""
        side = self._scheduler
        return side is not None and (side.copies_in_flight or side.introducing)

    def has_pending_block_frees(self) -> bool:
        """Whether it is better to wait for our pins than to preempt a request."""
        return self._scheduler is not None and self._scheduler.stores_in_flight

    def reset_cache(self) -> bool | None:
        if self._scheduler is not None:
            self._scheduler.reset_cache()
        return True

    # worker side ----------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        if self._worker is not None:
            self._worker.register_layers(kv_caches)

    def register_cross_layers_kv_cache(self, kv_cache: torch.Tensor, attn_backend: Any) -> None:
        if self._worker is not None:
            self._worker.register_cross_layers(kv_cache, attn_backend)

    def get_handshake_metadata(self) -> WorkerLayout | None:
        return self._worker.handshake() if self._worker is not None else None

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Called in every step before its kernels, with a preemption or without."""
        if self._worker is not None:
            assert isinstance(kv_connector_metadata, KVPoolMetadata)
            self._worker.before_forward(kv_connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Called in every step, with a forward or without, and never before the forward of the step
        that computed the blocks to be stored: those were planned a step ago."""
        if self._worker is not None:
            metadata: KVConnectorMetadata = self._get_connector_metadata()
            assert isinstance(metadata, KVPoolMetadata)
            self._worker.start(metadata)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are asynchronous: no layer has to wait."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Blocks are stored whole, once they are full."""

    def wait_for_save(self) -> None:
        """The scheduler side pins what is being stored."""

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        if self._worker is None:
            return None, None
        self._worker.poll()
        return None, self._worker.take_loaded()

    def get_block_ids_with_load_errors(self) -> set[int]:
        return set() if self._worker is None else self._worker.take_failed_blocks()

    def build_connector_worker_meta(self) -> KVPoolWorkerMetadata | None:
        return None if self._worker is None else self._worker.take_reports()

    # both sides -----------------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> KVPoolStats | None:
        side = self._scheduler or self._worker
        return None if side is None else side.take_stats()

    def shutdown(self) -> None:
        side = self._scheduler or self._worker
        if side is not None:
            side.close()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVPoolStats:
        return KVPoolStats(data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVPoolPromMetrics:
        return KVPoolPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)


def _checked_config(vllm_config: Any) -> ConnectorConfig:
    """Refuse what would make requests fail or answers wrong, with the way out."""
    transfer = vllm_config.kv_transfer_config
    policy = getattr(transfer, "kv_load_failure_policy", None)
    if policy != "recompute":
        fix = (
            "a block that cannot be loaded has to be computed, not to fail its request (vLLM's default): "
            f"{_option_with(transfer, 'kv_load_failure_policy', 'recompute')}"
        )
        raise ConfigError("kv_load_failure_policy", policy, fix)
    if transfer.kv_role != "kv_both":
        option = _option_with(transfer, "kv_role", "kv_both")
        fix = f"this connector loads and stores in every engine: {option}"
        raise ConfigError("kv_role", transfer.kv_role, fix)
    if compat.may_use_cascade_attention(vllm_config):
        fix = (
            "references to blocks being stored upset vLLM's search for a common prefix: "
            "drop --no-disable-cascade-attn"
        )
        raise ConfigError("disable_cascade_attn", False, fix)
    extra = transfer.kv_connector_extra_config
    config = ConnectorConfig.from_dict(dict(extra or {}), "kv_connector_extra_config")
    config.check_keys()
    return config


def _option_with(transfer: Any, field: str, value: str) -> str:
    """What to add, and the whole option as it should be: the user's settings and this one."""
    settings = {
        known.name: getattr(transfer, known.name)
        for known in dataclasses.fields(transfer)
        if known.name not in DRAWN and getattr(transfer, known.name) != _default(known)
    }
    text = json.dumps({**settings, field: value}, default=str)
    return f'add "{field}": "{value}", so: {OPTION} {shlex.quote(text)}'


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default
