"""From vLLM's KV cache tensors to the byte ranges that make up a block.

A *region* is (base address, bytes from one block to the next, bytes of a block). vLLM gives us:

    up to 0.28   one tensor a layer, a block is one page of it ([blocks, 2, ...], MLA [blocks, ...]),
                 or two where K and V are apart ([2, blocks, ...]); or, where all layers look the
                 same, one tensor for all of them with a block of all in one run ("cross-layer")
    from 0.29    one buffer, and a [blocks, heads, tokens, content] view of it for each layer, in
                 one of several orders: layer outermost (as on a CPU) or block outermost

All become one region (or two) a layer; regions that follow each other in memory are then merged, so that a
block-outermost layout ends as a single region. Layers that share memory count once. Orders that
tear a page apart (heads outside of blocks) are refused.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch

from vllm_kvpool._native import CopyEngine
from vllm_kvpool.connector.compat import manager_blocks


class UnsupportedLayoutError(Exception):
    """The KV cache cannot be cut into blocks of whole pages."""


class Region(NamedTuple):
    base: int
    stride: int
    nbytes: int


@dataclass(frozen=True)
class KVLayout:
    regions: tuple[Region, ...]
    text: str
    """What two workers must have in common to exchange bytes, for people and for the namespace."""

    @property
    def shard_bytes(self) -> int:
        """Of a block in the pool."""
        return CopyEngine.shard_bytes(self.regions)


def layer_layout(
    kv_caches: Mapping[str, torch.Tensor],
    page_bytes: Mapping[str, int],
    num_blocks: int,
    backend: Callable[[str], str],
) -> KVLayout:
    """One region a layer (two where K and V are apart), merged where they touch. `backend` names a
    layer's attention backend."""
    regions: dict[tuple[int, int], Region] = {}
    lines = []
    for layer in sorted(page_bytes, key=_natural):
        views = _block_views(kv_caches[layer], num_blocks)
        for view in views:
            region = _page_region(layer, view, page_bytes[layer] // len(views), num_blocks)
            known = regions.setdefault((region.base, region.stride), region)
            if known.nbytes != region.nbytes:
                text = f"{layer} shares memory with a layer of another page size"
                raise UnsupportedLayoutError(text)
            shape, strides = tuple(view.shape[1:]), tuple(view.stride()[1:])
            lines.append(f"{layer} {backend(layer)} {view.dtype} {shape} {strides} {region.nbytes}")
    merged = _merged(list(regions.values()))
    return KVLayout(merged, _text(lines, merged))


def cross_layer_layout(
    tensor: torch.Tensor, page_bytes: Mapping[str, int], num_blocks: int, backend: str
) -> KVLayout:
    """One region: vLLM hands over the tensor as it was allocated, dimensions in the order of memory,
    and takes only backends that put blocks first ([blocks, layers, 2, ...], [blocks, heads, ...])."""
    if tensor.shape[0] % num_blocks or not tensor.is_contiguous():
        raise UnsupportedLayoutError("the cross-layer KV cache does not keep a block in one run")
    row_bytes = tensor.nbytes // num_blocks
    regions = (Region(tensor.data_ptr(), row_bytes, row_bytes),)
    lines = [f"{backend} {tensor.dtype} {tuple(tensor.shape[1:])} cross-layer"]
    return KVLayout(regions, _text([*lines, *sorted(page_bytes, key=_natural)], regions))


def _block_views(view: torch.Tensor, num_blocks: int) -> Sequence[torch.Tensor]:
    """What has blocks as its first dimension: the layer's tensor, or its K and its V."""
    if view.shape[0] % num_blocks and view.shape[0] == 2:
        return (view[0], view[1])
    return (view,)


def _page_region(layer: str, view: torch.Tensor, nbytes: int, num_blocks: int) -> Region:
    rows = manager_blocks(view, num_blocks)
    item = view.element_size()
    stride = view.stride(0) * rows * item
    inner = zip(view.shape[1:], view.stride()[1:], strict=True)
    row_span = (1 + sum((size - 1) * step for size, step in inner)) * item
    span = (rows - 1) * view.stride(0) * item + row_span
    payload = prod(view.shape[1:]) * rows * item
    if span > nbytes or payload > nbytes or nbytes > stride:
        raise UnsupportedLayoutError(
            f"a block of {layer} is not one run of {nbytes} bytes (it spans {span}, the next one "
            f"starts after {stride}); set VLLM_KV_CACHE_LAYOUT to LBNHC or BLHNC"
        )
    return Region(view.data_ptr(), stride, nbytes)


def _merged(regions: list[Region]) -> tuple[Region, ...]:
    """Join a region with the one whose bytes follow in every block; order otherwise kept.

    In a block-outermost layout address order is layer order, so that merging keeps the order too.
    """
    merged: list[Region] = []
    for region in regions:
        last = merged[-1] if merged else None
        if last and last.stride == region.stride and last.base + last.nbytes == region.base:
            joined = last._replace(nbytes=last.nbytes + region.nbytes)
            if joined.nbytes <= joined.stride:
                merged[-1] = joined
                continue
        merged.append(region)
    return tuple(merged)


def _text(lines: list[str], regions: tuple[Region, ...]) -> str:
    """Short: the shape of the regions, and a digest of what lies behind them."""
    sizes = ",".join(str(region.nbytes) for region in regions)
    if len({region.nbytes for region in regions}) == 1:
        sizes = f"{len(regions)}x{regions[0].nbytes}"
    digest = hashlib.sha256("\n".join([*lines, sizes]).encode()).hexdigest()
    return f"{sizes[:80]} bytes sha256:{digest[:32]}"


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts "layers.2" before "layers.10"."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
