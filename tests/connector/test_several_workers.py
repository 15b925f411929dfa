"""Two tensor-parallel ranks: each has its shard of every slot, with MLA they share one; both have to be done."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from connector.mini_engine import (
    BLOCK,
    LATENT_SIZE,
    LAYERS,
    MiniEngine,
    expected_output,
    prompt_of,
)
from connector.test_failed_loads import view_of
from helpers import Daemon, until

from benchmarks.offline import make_model
from vllm_kvpool.types import unpack_refs

MakeEngine = Callable[..., MiniEngine]
PROMPT = prompt_of(1, 10 * BLOCK + 1)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("delay", [0, 3])
def test_trap_23_ranks_load_their_own_shards_and_are_waited_for(
    make_engine: MakeEngine, daemon: Daemon, asynchronous: bool, delay: int
) -> None:
    """Rank 1 tells of its copies only now and then: no block becomes visible, and no request runs,
    before it has."""
    engines = [make_engine(tensor_parallel_size=2, asynchronous=asynchronous) for _ in range(2)]
    for engine in engines:
        engine.workers[1].report_delay_steps = delay
    storing, loading = engines
    assert storing.generate(PROMPT) == (expected_output(PROMPT), 0)
    until(lambda: daemon.counter("ready") == 10)
    assert loading.generate(PROMPT) == (expected_output(PROMPT), 10 * BLOCK)
    for engine in engines:
        assert engine.free_blocks == 255
        assert view_of(engine).leased_slots == 0


def test_rank_whose_shard_is_damaged_fails_the_load_for_all(
    make_engine: MakeEngine, daemon: Daemon
) -> None:
    engine = make_engine(tensor_parallel_size=2)
    engine.workers[1].report_delay_steps = 2
    engine.generate(PROMPT, 1)
    until(lambda: daemon.counter("ready") == 10)
    engine.reset_prefix_cache()
    request_id = engine.add(PROMPT)
    damage(engine, request_id, 4, slot_bytes_of(engine) // 2 + 9)
    engine.run()
    assert engine.outputs[request_id] == expected_output(PROMPT)
    assert engine.stats["load_failed_blocks:checksum"] == 1
    until(lambda: daemon.counter("dropped") == 1)


def damage(engine: MiniEngine, request_id: str, block: int, byte: int) -> None:
    side = engine.connector._scheduler
    keys = side._records[request_id].keys(side._link.mask)
    refs = unpack_refs(side._link.client.match_prefix(keys))
    view_of(engine).payload(refs[block])[byte] ^= 1


def slot_bytes_of(engine: MiniEngine) -> int:
    return engine.connector._scheduler._link._slot.slot_bytes


def test_engines_of_another_width_share_nothing(make_engine: MakeEngine) -> None:
    one, two = make_engine(), make_engine(tensor_parallel_size=2)
    one.generate(PROMPT)
    assert two.generate(PROMPT) == (expected_output(PROMPT), 0)


# MLA ------------------------------------------------------------------------------------------------

MLA_BLOCK_BYTES = len(LAYERS) * BLOCK * LATENT_SIZE * 4


@pytest.fixture(scope="session")
def mla_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("mla"), "tiny-mla")


@pytest.fixture
def make_mla_engine(make_engine: MakeEngine, mla_model: Path) -> MakeEngine:
    def make(**options: object) -> MiniEngine:
        options = {"tensor_parallel_size": 2, **options}
        return make_engine(
            model=mla_model, load_format="dummy", skip_tokenizer_init=True, **options
        )

    return make


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("late", [0, 1])
def test_trap_22_ranks_with_mla_store_one_copy_that_both_load(
    make_mla_engine: MakeEngine, daemon: Daemon, asynchronous: bool, late: int
) -> None:
    """Each stores half of the blocks: none is visible, and no request runs, before both have told."""
    engines = [make_mla_engine(asynchronous=asynchronous) for _ in range(2)]
    for engine in engines:
        engine.workers[late].report_delay_steps = 3
    storing, loading = engines
    assert storing.generate(PROMPT) == (expected_output(PROMPT), 0)
    until(lambda: daemon.counter("ready") == 10)
    assert loading.generate(PROMPT) == (expected_output(PROMPT), 10 * BLOCK)
    assert MLA_BLOCK_BYTES < slot_bytes_of(storing) < 1.1 * MLA_BLOCK_BYTES
    assert storing.stats["store_bytes"] == 10 * MLA_BLOCK_BYTES
    assert loading.stats["load_bytes"] == 2 * 10 * MLA_BLOCK_BYTES
    for engine in engines:
        assert engine.free_blocks == 255
        assert view_of(engine).leased_slots == 0


def test_rank_that_cannot_store_keeps_the_block_from_all(
    make_mla_engine: MakeEngine, daemon: Daemon
) -> None:
    engine = make_mla_engine()
    engine.workers[1].connector._worker._next_try = math.inf  # to map the pool
    assert engine.generate(PROMPT) == (expected_output(PROMPT), 0)
    assert engine.stats["store_skipped_blocks:copy_failed"] == 10
    assert daemon.counter("ready") == daemon.counter("writing") == 0


def test_damaged_copy_of_mla_ranks_fails_the_load_for_all(
    make_mla_engine: MakeEngine, daemon: Daemon
) -> None:
    engine = make_mla_engine()
    engine.generate(PROMPT, 1)
    until(lambda: daemon.counter("ready") == 10)
    engine.reset_prefix_cache()
    request_id = engine.add(PROMPT)
    damage(engine, request_id, 4, 9)
    engine.run()
    assert engine.outputs[request_id] == expected_output(PROMPT)
    assert engine.stats["load_failed_blocks:checksum"] == 1
    until(lambda: daemon.counter("dropped") == 1)


def test_engines_with_mla_of_another_width_share_nothing(make_mla_engine: MakeEngine) -> None:
    """Their bytes are as many, but sums over other parts of the model are rounded otherwise."""
    one, two = make_mla_engine(tensor_parallel_size=1), make_mla_engine()
    one.generate(PROMPT)
    assert slot_bytes_of(one) == slot_bytes_of(two)
    assert two.generate(PROMPT) == (expected_output(PROMPT), 0)
