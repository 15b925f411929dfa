"""How a slot is divided among the workers."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    MLAAttentionSpec,
    UniformTypeKVCacheSpecs,
)

from vllm_kvpool.connector.compat import ranks_hold_the_same
from vllm_kvpool.connector.metadata import Shard, WorkerLayout
from vllm_kvpool.connector.shards import divide_slot


def ranks(stages: int, width: int, *, replicated: bool) -> dict[tuple[int, int], WorkerLayout]:
    """Stage 1 has more layers than stage 0."""
    return {
        (stage, rank): WorkerLayout(
            f"{stage}.{rank}", 256 * (stage + 1), f"of stage {stage}", replicated
        )
        for stage in reversed(range(stages))
        for rank in range(width)
    }


def test_each_rank_has_a_shard_in_the_order_of_ranks() -> None:
    slot = divide_slot(ranks(2, 2, replicated=False))
    assert slot.slot_bytes == 2 * 256 + 2 * 512
    assert slot.layouts == ("of stage 0", "of stage 0", "of stage 1", "of stage 1")
    offsets = {"0.0": 0, "0.1": 256, "1.0": 512, "1.1": 1024}
    assert slot.shards == {name: Shard(offset, 0, 1) for name, offset in offsets.items()}


def test_ranks_of_a_stage_that_hold_the_same_share_a_shard() -> None:
    slot = divide_slot(ranks(2, 4, replicated=True))
    assert slot.slot_bytes == 256 + 512
    assert slot.layouts == ("of stage 0", "of stage 1")
    for rank in range(4):
        assert slot.shards[f"0.{rank}"] == Shard(0, rank, 4)
        assert slot.shards[f"1.{rank}"] == Shard(256, rank, 4)


def test_other_layouts_are_other_bytes() -> None:
    layouts = ranks(1, 2, replicated=True)
    layouts[0, 1] = WorkerLayout("0.1", 256, "with padding", True)
    slot = divide_slot(layouts)
    assert slot.slot_bytes == 512
    assert slot.shards == {"0.0": Shard(0, 0, 1), "0.1": Shard(256, 0, 1)}


@pytest.mark.parametrize("num_blocks", [1, 2, 7])
@pytest.mark.parametrize("num_holders", [1, 2, 3])
def test_each_block_of_a_store_is_one_holders(num_holders: int, num_blocks: int) -> None:
    holders = [Shard(0, turn, num_holders) for turn in range(num_holders)]
    totals = [0] * num_holders
    for job in range(12):
        parts = [list(range(num_blocks))[one.stored_blocks(job, num_blocks)] for one in holders]
        assert sorted(itertools.chain.from_iterable(parts)) == list(range(num_blocks))
        totals = [total + len(part) for total, part in zip(totals, parts, strict=True)]
    assert totals == [12 * num_blocks // num_holders] * num_holders


def kv_config(*specs: FullAttentionSpec) -> SimpleNamespace:
    one = specs[0]
    if len(specs) > 1:
        named = {f"layer {i}": spec for i, spec in enumerate(specs)}
        one = UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs=named)
    return SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=one)])


def test_only_mla_in_every_layer_makes_ranks_hold_the_same() -> None:
    size = {"block_size": 16, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
    heads, latent = FullAttentionSpec(**size), MLAAttentionSpec(**size)
    mla, other = (
        SimpleNamespace(model_config=SimpleNamespace(use_mla=used)) for used in (True, False)
    )
    assert ranks_hold_the_same(mla, kv_config(latent))
    assert ranks_hold_the_same(mla, kv_config(latent, latent))
    assert not ranks_hold_the_same(mla, kv_config(latent, heads)), "a drafter with heads"
    assert not ranks_hold_the_same(mla, kv_config(heads))
    assert not ranks_hold_the_same(other, kv_config(latent))
