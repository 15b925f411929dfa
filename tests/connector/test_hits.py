"""What a lookup finds, and that exactly that is loaded."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from connector.mini_engine import BLOCK, MiniEngine, expected_output, prompt_of
from helpers import WAIT_S, Daemon, until

from vllm_kvpool.config import pool_dir
from vllm_kvpool.liveness import is_locked
from vllm_kvpool.paths import PoolPaths
from vllm_kvpool.pool.admin import fetch_stats

MakeEngine = Callable[..., MiniEngine]


def test_other_engine_loads_what_one_stored(make_engine: MakeEngine) -> None:
    prompt = prompt_of(1, 20 * BLOCK + 5)
    storing, loading = make_engine(), make_engine()
    assert storing.generate(prompt) == (expected_output(prompt), 0)
    assert loading.generate(prompt) == (expected_output(prompt), 20 * BLOCK)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_trap_17_and_18_partial_last_block_and_full_prompt(
    make_engine: MakeEngine, asynchronous: bool
) -> None:
    """Of a hit on the whole prompt the last block is computed: nothing could be sampled otherwise."""
    storing, loading = make_engine(), make_engine(asynchronous=asynchronous)
    storing.generate(prompt_of(2, 6 * BLOCK))
    for length in range(4 * BLOCK, 5 * BLOCK + 1):
        prompt = prompt_of(2, length)
        full_blocks = (length - 1) // BLOCK
        assert loading.generate(prompt) == (expected_output(prompt), full_blocks * BLOCK)
        loading.reset_prefix_cache()


def test_local_blocks_are_not_loaded_again(engine: MiniEngine) -> None:
    """The load begins where the engine's own prefix cache ends."""
    long, short = prompt_of(3, 12 * BLOCK), prompt_of(3, 5 * BLOCK + 1)
    engine.generate(long)
    engine.reset_prefix_cache()
    engine.generate(short, hints={"load": False})
    before = dict(engine.stats)
    assert engine.generate(long) == (expected_output(long), 11 * BLOCK)
    assert engine.stats["hit_blocks"] - before.get("hit_blocks", 0) == 6


def test_miss_reasons_are_counted_once_an_admission(make_engine: MakeEngine) -> None:
    engine = make_engine(extra={"min_load_tokens": 4 * BLOCK})
    engine.generate(prompt_of(4, 3 * BLOCK + 1))
    engine.generate(prompt_of(4, 3 * BLOCK + 1))
    engine.reset_prefix_cache()
    engine.generate(prompt_of(4, 3 * BLOCK + 1))
    engine.generate(prompt_of(5, 9 * BLOCK), hints={"load": False})
    misses = {key: value for key, value in engine.stats.items() if key.startswith("misses")}
    assert misses == {
        "misses:absent": 1,
        "misses:local": 1,
        "misses:short": 1,
        "misses:hint": 1,
    }


def test_request_that_must_not_read_caches_loads_nothing(engine: MiniEngine) -> None:
    prompt = prompt_of(6, 8 * BLOCK)
    engine.generate(prompt)
    engine.reset_prefix_cache()
    request = engine.scheduler.requests[engine.add(prompt)]
    request.skip_reading_prefix_cache = True
    engine.run()
    assert engine.cached_tokens[request.request_id] == 0
    assert engine.stats["misses:engine"] == 1


def test_lookup_changes_nothing(engine: MiniEngine) -> None:
    prompt = prompt_of(7, 8 * BLOCK)
    engine.generate(prompt)
    engine.reset_prefix_cache()
    request = engine.scheduler.requests[engine.add(prompt)]
    view = engine.connector._scheduler._link.client.view
    answers = {engine.connector.get_num_new_matched_tokens(request, 0) for _ in range(3)}
    assert answers == {(7 * BLOCK, True)}
    assert view.leased_slots == 0
    engine.run()
    assert view.leased_slots == 0
    assert engine.outputs[request.request_id] == expected_output(prompt)


def test_first_request_waits_for_the_first_hello_but_not_long(
    make_engine: MakeEngine, daemon: Daemon
) -> None:
    prompt = prompt_of(8, 8 * BLOCK)
    make_engine().generate(prompt)
    daemon.pause()
    late = make_engine(connect=False)
    assert late.generate(prompt) == (expected_output(prompt), 0)
    daemon.resume()
    prompt = prompt_of(8, 7 * BLOCK)
    until(late.scheduler.reset_prefix_cache, "reset")

    def hit() -> bool:
        late.reset_prefix_cache()
        output, cached = late.generate(prompt, hints={"store": False})
        assert output == expected_output(prompt)
        return cached == 6 * BLOCK

    until(hit, "a hit after the daemon came back")


def test_adapters_of_the_same_name_share_nothing_where_hashes_do_not_tell(
    engine: MiniEngine,
) -> None:
    prompt = prompt_of(9, 8 * BLOCK)
    engine.generate(prompt)
    engine.connector._scheduler._lora_is_hashed = False
    request = engine.scheduler.requests[engine.add(prompt)]
    request.lora_request = SimpleNamespace(lora_name="a", lora_path="/a", lora_int_id=1)
    record = engine.connector._scheduler.add_request(request)
    assert record.ambiguous_lora
    assert not record.may_store
    assert engine.connector.get_num_new_matched_tokens(request, 0) == (0, False)
    assert record.lookup == replace(record.lookup, miss="lora")


def test_auto_starts_a_daemon_that_outlives_the_engine(
    make_engine: MakeEngine, shm_dir: Path
) -> None:
    prompt = prompt_of(10, 8 * BLOCK)
    auto = {"pool": "auto", "size": "16MiB"}
    first, second = make_engine(extra=auto), make_engine(extra=auto)
    daemon_lock = PoolPaths(pool_dir("default", str(shm_dir))).daemon_lock
    pid = int(daemon_lock.read_text())

    def is_populated() -> bool:
        pool = fetch_stats("default", str(shm_dir), WAIT_S)["pool"]
        return bool(pool["populated_slabs"] == pool["num_slabs"])

    try:
        until(is_populated, "prefault")
        first.generate(prompt)
        first.close()
        assert second.generate(prompt) == (expected_output(prompt), 7 * BLOCK)
    finally:
        os.kill(pid, signal.SIGTERM)
    until(lambda: not is_locked(daemon_lock), "end of the daemon")
