"""From tensors as vLLM makes them to regions, and through a copy engine back to the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from connector.mini_engine import MiniEngine

from vllm_kvpool.connector.layout import (
    KVLayout,
    UnsupportedLayoutError,
    cross_layer_layout,
    layer_layout,
)

LAYERS = [f"model.layers.{i}.attn" for i in range(12)]
BLOCKS, HEADS, TOKENS, CONTENT = 6, 2, 16, 8
PAGE = HEADS * TOKENS * CONTENT * 4


def views(buffer: torch.Tensor, order: str) -> dict[str, torch.Tensor]:
    """[B, H, N, C] views of one buffer whose dimensions lie in `order`, as vLLM from 0.29 on."""
    sizes = {"L": len(LAYERS), "B": BLOCKS, "H": HEADS, "N": TOKENS, "C": CONTENT}
    strides, step = {}, 1
    for dimension in reversed(order):
        strides[dimension] = step
        step *= sizes[dimension]
    whole = buffer.view(torch.float32).as_strided(
        [sizes[d] for d in "LBHNC"], [strides[d] for d in "LBHNC"]
    )
    return {layer: whole[i] for i, layer in enumerate(LAYERS)}


def make_buffer() -> torch.Tensor:
    return torch.zeros(len(LAYERS) * BLOCKS * PAGE, dtype=torch.int8)


def layout_of(
    caches: Mapping[str, torch.Tensor], page: int = PAGE, blocks: int = BLOCKS
) -> KVLayout:
    return layer_layout(caches, dict.fromkeys(caches, page), blocks, lambda layer: "CPU_ATTN")


@pytest.mark.parametrize("order", ["LBHNC", "LBNHC"])
def test_layer_outermost_gives_a_region_a_layer(order: str) -> None:
    buffer = make_buffer()
    layout = layout_of(views(buffer, order))
    bases = [buffer.data_ptr() + i * BLOCKS * PAGE for i in range(len(LAYERS))]
    assert layout.regions == tuple((base, PAGE, PAGE) for base in bases)


@pytest.mark.parametrize("order", ["BLHNC", "BLNHC"])
def test_block_outermost_gives_one_region(order: str) -> None:
    buffer = make_buffer()
    row = len(LAYERS) * PAGE
    assert layout_of(views(buffer, order)).regions == ((buffer.data_ptr(), row, row),)


@pytest.mark.parametrize("order", ["LHBNC", "BHLNC"])
def test_pages_torn_apart_by_head_are_refused(order: str) -> None:
    with pytest.raises(UnsupportedLayoutError, match="VLLM_KV_CACHE_LAYOUT to LBNHC or BLHNC"):
        layout_of(views(make_buffer(), order))


def test_one_tensor_a_layer_and_shared_ones_once() -> None:
    """As vLLM up to 0.28: K and V within a page, layers of a shared cache name the same tensor."""
    shape = (BLOCKS, 2, TOKENS, HEADS, CONTENT // 2)
    caches = {layer: torch.zeros(shape) for layer in LAYERS}
    caches[LAYERS[5]] = caches[LAYERS[4]]
    regions = layout_of(caches).regions
    assert len(regions) == len(LAYERS) - 1
    assert {region.nbytes for region in regions} == {PAGE}


def test_kernel_blocks_are_gathered_into_manager_blocks() -> None:
    """A kernel may work on blocks of a quarter of the manager's."""
    cache = torch.zeros((BLOCKS * 4, HEADS, TOKENS // 4, CONTENT))
    layout = layout_of({"layer": cache})
    assert layout.regions == ((cache.data_ptr(), PAGE, PAGE),)


def test_padded_pages_are_copied_whole() -> None:
    padded = PAGE + 256
    raw = torch.zeros(BLOCKS * padded, dtype=torch.int8).view(torch.float32)
    strides = (padded // 4, TOKENS * CONTENT, CONTENT, 1)
    cache = raw.as_strided((BLOCKS, HEADS, TOKENS, CONTENT), strides)
    assert layout_of({"layer": cache}, padded).regions == ((cache.data_ptr(), padded, padded),)


@pytest.mark.parametrize("kernel_blocks", [1, 2])
def test_cross_layer_tensor_is_one_region(kernel_blocks: int) -> None:
    """As vLLM's runner passes it: in the order of memory, not in the order of the layers' views."""
    inner = (2, TOKENS // kernel_blocks, HEADS, CONTENT // 2)
    tensor = torch.zeros((BLOCKS * kernel_blocks, len(LAYERS), *inner))
    pages = dict.fromkeys(LAYERS, PAGE)
    row = len(LAYERS) * PAGE
    layout = cross_layer_layout(tensor, pages, BLOCKS, "FLASH_ATTN")
    assert layout.regions == ((tensor.data_ptr(), row, row),)
    for other in (tensor.transpose(0, 1), tensor[:-1]):
        with pytest.raises(UnsupportedLayoutError):
            cross_layer_layout(other, pages, BLOCKS, "FLASH_ATTN")


def test_k_and_v_apart_give_two_regions_a_layer() -> None:
    shape = (2, BLOCKS, TOKENS, HEADS, CONTENT // 2)
    caches = {layer: torch.zeros(shape) for layer in LAYERS}
    layout = layout_of(caches)
    half = PAGE // 2
    bases = [cache[i].data_ptr() for cache in caches.values() for i in range(2)]
    assert layout.regions == tuple((base, half, half) for base in bases)
    together = {layer: torch.zeros((BLOCKS, 2, *shape[2:])) for layer in LAYERS}
    assert layout.text != layout_of(together).text
    longer = {layer: torch.zeros((2, BLOCKS + 1, *shape[2:])) for layer in LAYERS}
    assert layout.text == layout_of(longer, blocks=BLOCKS + 1).text


def test_mla_and_8_bit_caches() -> None:
    """[blocks, tokens, latent], one byte an element."""
    caches = {layer: torch.zeros((BLOCKS, TOKENS, 36), dtype=torch.uint8) for layer in LAYERS}
    page = TOKENS * 36
    regions = layout_of(caches, page).regions
    assert {(region.stride, region.nbytes) for region in regions} == {(page, page)}
    assert len(regions) == len(LAYERS)


def test_text_tells_layouts_apart_but_not_addresses() -> None:
    texts = {layout_of(views(make_buffer(), "LBHNC")).text for _ in range(2)}
    assert len(texts) == 1
    texts.add(layout_of(views(make_buffer(), "LBNHC")).text)
    texts.add(layout_of(views(make_buffer(), "BLHNC")).text)
    other_backend = layer_layout(
        views(make_buffer(), "LBHNC"), dict.fromkeys(LAYERS, PAGE), BLOCKS, lambda layer: "FLASH"
    )
    assert len({*texts, other_backend.text}) == 4


def test_layers_are_ordered_by_number_not_by_name() -> None:
    """ "layers.10" comes after "layers.9": a block's bytes have one order in every engine."""
    regions = layout_of(views(make_buffer(), "LBHNC")).regions
    assert [region.base for region in regions] == sorted(region.base for region in regions)


@pytest.mark.parametrize("order", ["LBHNC", "BLHNC"])
def test_engine_with_that_layout_gets_its_bytes_back(
    make_engine: Callable[..., MiniEngine], order: str
) -> None:
    """Both layouts through a real pool: the copy engine's shard is as long as we told the daemon."""
    from connector.mini_engine import BLOCK, expected_output, prompt_of

    engine = make_engine(kv_order=order)
    prompt = prompt_of(1, 5 * BLOCK + 1)
    engine.generate(prompt)
    engine.reset_prefix_cache()
    assert engine.generate(prompt) == (expected_output(prompt), 5 * BLOCK)
