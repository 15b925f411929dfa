"""Everything in which vLLM 0.24 to 0.33 differ, by feature detection: no version is compared.

The only other place that knows about a version is the namespace, which carries the minor version so
that engines of different ones never share blocks (their hashes and layouts may differ silently).
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    MLAAttentionSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.version import __version__ as VLLM_VERSION  # noqa: N812

__all__ = [
    "KVConnectorBase_V1",
    "KVConnectorHandshakeMetadata",
    "KVConnectorMetadata",
    "KVConnectorRole",
    "KVConnectorWorkerMetadata",
    "SupportsHMA",
]


def vllm_minor() -> str:
    """ "0.32" of "0.32.0", "0.32.1.dev3+cpu" ..."""
    return ".".join(VLLM_VERSION.split(".")[:2])


def join_vllm_log() -> None:
    """vLLM sets up its own logger only: let ours appear beside it, in the same form."""
    ours, theirs = logging.getLogger("vllm_kvpool"), logging.getLogger("vllm")
    if not ours.handlers and theirs.handlers:
        ours.handlers = list(theirs.handlers)
        ours.setLevel(theirs.level)
        ours.propagate = theirs.propagate


# engine -------------------------------------------------------------------------------------------


SHAREABLE_SPECS = (FullAttentionSpec, MLAAttentionSpec)
"""Kinds of KV cache that keep every block of a request, so that block i always holds the tokens
from i * block_size on. Named one by one: their subclasses (windows, sinks ...) need not."""


def why_unsupported(vllm_config: Any, kv_cache_config: Any) -> str | None:
    """Why blocks of this engine cannot be shared safely (yet), for the log; None when they can."""
    if reason := _why_unsupported_platform(vllm_config):
        return reason
    if reason := _why_unsupported_cache(kv_cache_config.kv_cache_groups):
        return reason
    if not getattr(vllm_config.model_config, "is_prefix_caching_supported", True):
        return "vLLM does not support prefix caching for this model"
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(vllm_config.parallel_config, name, 1) > 1:
            return f"{name} is above 1"
    if getattr(vllm_config.cache_config, "calculate_kv_scales", False):
        return "calculate_kv_scales gives every engine KV scales of its own"
    return None


def _why_unsupported_platform(vllm_config: Any) -> str | None:
    kind = platform_kind()
    if kind not in ("cpu", "cuda"):
        return f"blocks are copied on CPUs and CUDA GPUs only, this is {kind}"
    if kind == "cuda" and getattr(vllm_config.model_config, "enable_sleep_mode", False):
        return "enable_sleep_mode takes the KV cache's memory away under copies in flight"
    return None


def _why_unsupported_cache(groups: Sequence[Any]) -> str | None:
    if len(groups) != 1:
        return f"the model has {len(groups)} KV cache groups (only models with one are supported)"
    for spec in layer_specs(groups[0].kv_cache_spec):
        if type(spec) not in SHAREABLE_SPECS:
            return f"its KV cache is a {type(spec).__name__} (only full attention is supported)"
        if getattr(spec, "non_causal", False):
            return "a block's bytes depend on tokens after it (attention is not causal)"
    return None


def layer_specs(spec: Any) -> list[Any]:
    """The specs of a group's layers: one for all, or one each."""
    if isinstance(spec, UniformTypeKVCacheSpecs):
        return list(spec.kv_cache_specs.values())
    return [spec]


def layer_page_bytes(kv_cache_config: Any) -> dict[str, int]:
    """Layer -> bytes of one block in it, padding included."""
    pages: dict[str, int] = {}
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        own = spec.kv_cache_specs if isinstance(spec, UniformTypeKVCacheSpecs) else {}
        for layer in group.layer_names:
            pages[layer] = own.get(layer, spec).page_size_bytes
    return pages


def ranks_hold_the_same(vllm_config: Any, kv_cache_config: Any) -> bool:
    """Whether every tensor-parallel rank has the whole KV of its layers, as with MLA: one vector a token, not one a
    head. A drafter with heads beside it has shards. `kv_cache_config`: a worker's, which knows each layer."""
    groups = kv_cache_config.kv_cache_groups
    specs = [spec for group in groups for spec in layer_specs(group.kv_cache_spec)]
    return bool(vllm_config.model_config.use_mla) and all(
        isinstance(spec, MLAAttentionSpec) for spec in specs
    )


def attention_backend(vllm_config: Any, layer: str) -> str:
    """Name of the attention backend of a layer ("" when vLLM does not tell): it decides how a page
    is laid out inside."""
    module = vllm_config.compilation_config.static_forward_context.get(layer)
    backend = getattr(module, "attn_backend", None)
    if backend is None and hasattr(module, "get_attn_backend"):
        backend = module.get_attn_backend()
    return "" if backend is None else str(backend.get_name())


def may_use_cascade_attention(vllm_config: Any) -> bool:
    """vLLM up to 0.31 finds the prefix that all running requests share by comparing reference
    counts, which our pins raise. Off by default."""
    return getattr(vllm_config.model_config, "disable_cascade_attn", True) is False


def lookahead_blocks(vllm_config: Any) -> int:
    """Blocks at the end of a hit that must be computed again: with a drafter in the same KV cache
    (EAGLE, MTP), the last position of a block depends on the token after it, as in vLLM's own
    lookup."""
    speculative = vllm_config.speculative_config
    if speculative is None or not hasattr(speculative, "use_eagle"):
        return 0
    return 1 if speculative.use_eagle() else 0


def platform_kind() -> str:
    """ "cpu", "cuda", or another platform by vLLM's name for it ("rocm", "xpu" ...)."""
    from vllm.platforms import current_platform

    return str(current_platform.device_name)


# block hashes -------------------------------------------------------------------------------------


def block_tokens(vllm_config: Any, kv_cache_config: Any) -> int:
    """Tokens of a block. In a single KV cache group there is one hash a block."""
    sizes: tuple[int, int] = kv_cache_utils.resolve_kv_cache_block_sizes(
        kv_cache_config, vllm_config
    )
    block, block_hash = sizes
    assert block == block_hash, f"a hash for every {block_hash} tokens, blocks of {block}"
    return block


def none_hash() -> bytes | None:
    """The hash that every chain starts from; None before the engine has drawn it."""
    value = getattr(kv_cache_utils, "NONE_HASH", None)
    return None if value is None else bytes(value)


def none_hash_is_random(algorithm: str) -> bool:
    """Whether every process draws its own NONE_HASH, so that no two engines agree on any block."""
    if os.environ.get("PYTHONHASHSEED") is not None:
        return False
    seeded = hasattr(kv_cache_utils, "DEFAULT_NONE_HASH_SEED")
    return not seeded or algorithm.startswith("xxhash")


def lora_path_is_hashed() -> bool:
    """Whether block hashes tell two adapters of the same name apart."""
    hash_keys = getattr(kv_cache_utils, "_gen_lora_extra_hash_keys", None)
    if hash_keys is None:
        return False
    adapter = SimpleNamespace(lora_name="name", lora_path="/adapter/path", lora_int_id=1)
    return "/adapter/path" in repr(hash_keys(SimpleNamespace(lora_request=adapter)))


# scheduler ----------------------------------------------------------------------------------------


def scheduled_requests(output: Any) -> Iterator[tuple[str, Sequence[int], bool, int]]:
    """(request id, block ids, whether these are all blocks or come after the known ones, computed
    tokens before this step) of every request in a step.

    Resumed requests come as cached ones with all blocks (V1 runner) or as new ones (V2 runner).
    """
    for new in output.scheduled_new_reqs:
        yield new.req_id, new.block_ids[0], True, new.num_computed_tokens
    cached = output.scheduled_cached_reqs
    rows = zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True)
    for request_id, new_ids, num_computed in rows:
        replace = request_id in cached.resumed_req_ids
        yield request_id, new_ids[0] if new_ids else (), replace, num_computed


def allocated_blocks(blocks: Any, first: int, count: int) -> Sequence[Any]:
    """vLLM's own objects, of the only KV cache group."""
    rows: Sequence[Any] = blocks.blocks[0][first : first + count]
    return rows


def block_ids(rows: Sequence[Any]) -> list[int]:
    return [row.block_id for row in rows]


class BlockPins:
    """References to GPU blocks, held while they are copied: vLLM does not hand out a pinned
    block."""

    def __init__(self, block_pool: Any) -> None:
        self._pool = block_pool
        self.num_blocks: int = block_pool.num_gpu_blocks

    def pin(self, block_ids: Iterable[int]) -> None:
        blocks = self._pool.blocks
        self._pool.touch([blocks[number] for number in block_ids])

    def unpin(self, block_ids: Sequence[int]) -> None:
        """Tail first: of blocks that nobody else holds, vLLM reuses those at the end of a chain
        first."""
        blocks = self._pool.blocks
        self._pool.free_blocks([blocks[number] for number in reversed(block_ids)])


def host_memory_source() -> Any:
    """What vLLM's metrics call hits from host memory; None where they are not told apart."""
    try:
        module = importlib.import_module("vllm.v1.metrics.cache_hit_source")
    except ImportError:
        return None
    return module.CacheHitSource.HOST


# worker -------------------------------------------------------------------------------------------


def manager_blocks(view: torch.Tensor, num_blocks: int) -> int:
    """Rows of a layer's view that make one block (kernels may work on smaller blocks than the
    manager)."""
    rows, rest = divmod(int(view.shape[0]), num_blocks)
    assert rest == 0, f"{view.shape[0]} rows do not divide into {num_blocks} blocks"
    return rows
