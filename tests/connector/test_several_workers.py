"""Two tensor-parallel ranks: each has its shard of every slot, and both have to be done."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from connector.mini_engine import BLOCK, MiniEngine, expected_output, prompt_of
from connector.test_failed_loads import view_of
from helpers import Daemon, until

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
    shard_bytes = engine.connector._scheduler._link._layouts[0].shard_bytes
    request_id = engine.add(PROMPT)
    record = engine.connector._scheduler._records[request_id]
    refs = engine.connector._scheduler._link.client.match_prefix(
        record.keys(engine.connector._scheduler._link.mask)
    )
    view_of(engine).payload(int.from_bytes(refs[32:40], "little"))[shard_bytes + 9] ^= 1
    engine.run()
    assert engine.outputs[request_id] == expected_output(PROMPT)
    assert engine.stats["load_failed_blocks:checksum"] == 1
    until(lambda: daemon.counter("dropped") == 1)


def test_engines_of_another_width_share_nothing(make_engine: MakeEngine) -> None:
    one, two = make_engine(), make_engine(tensor_parallel_size=2)
    one.generate(PROMPT)
    assert two.generate(PROMPT) == (expected_output(PROMPT), 0)
