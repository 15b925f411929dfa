"""Which blocks reach the pool, with the right bytes, and that nothing stays pinned."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from connector.mini_engine import BLOCK, MiniEngine, expected_output, prompt_of
from helpers import Daemon, connect, keys_of, prepare, until

from vllm_kvpool.connector import stores
from vllm_kvpool.pool.admin import clear

MakeEngine = Callable[..., MiniEngine]


def wait_ready(daemon: Daemon, blocks: int) -> None:
    until(
        lambda: daemon.counter("ready") == blocks, f"{blocks} blocks, not {daemon.counter('ready')}"
    )


def check_pool(make_engine: MakeEngine, prompt: list[int], blocks: int, **options: Any) -> None:
    """Another engine finds `blocks` blocks of the prompt, and they hold its tokens."""
    reader = make_engine(num_blocks=1024, **options)
    assert reader.generate(prompt) == (expected_output(prompt), blocks * BLOCK)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("max_tokens", [1, 2, 5 * BLOCK, 5 * BLOCK + 1, 5 * BLOCK + 2])
def test_trap_15_blocks_of_generated_tokens_are_stored_once_their_hash_is_known(
    make_engine: MakeEngine, daemon: Daemon, asynchronous: bool, max_tokens: int
) -> None:
    """With asynchronous scheduling hashes lag behind: count == floor(computed tokens / block)."""
    engine = make_engine(asynchronous=asynchronous)
    prompt = prompt_of(1, 7 * BLOCK + 3)
    output, _ = engine.generate(prompt, max_tokens)
    computed = len(prompt) + max_tokens - 1  # the last token is sampled, not computed
    wait_ready(daemon, computed // BLOCK)
    check_pool(make_engine, [*prompt, *output, 0], computed // BLOCK)


@pytest.mark.parametrize("chunk", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1])
def test_trap_19_chunked_prefill_with_steps_that_bring_no_block(
    make_engine: MakeEngine, daemon: Daemon, chunk: int
) -> None:
    engine = make_engine(max_tokens=chunk, max_num_seqs=1)
    prompt = prompt_of(2, 6 * BLOCK + 5)
    assert engine.generate(prompt) == (expected_output(prompt), 0)
    wait_ready(daemon, 6)
    check_pool(make_engine, prompt, 6)


def test_local_hits_complete_a_chain_that_the_pool_lost(
    make_engine: MakeEngine, daemon: Daemon
) -> None:
    engine = make_engine()
    prompt = prompt_of(3, 8 * BLOCK)
    engine.generate(prompt)
    wait_ready(daemon, 8)
    clear(daemon.name, str(daemon.shm_dir))
    engine.generate(prompt)
    wait_ready(daemon, 8)
    check_pool(make_engine, prompt, 7)


@pytest.mark.parametrize(
    ("extra", "hints", "stored"),
    [
        ({"store": "prompt"}, None, 3),
        ({"store": "all"}, None, 5),
        ({"min_store_tokens": 3 * BLOCK + 1}, None, 0),
        ({"min_store_tokens": 3 * BLOCK}, None, 5),
        ({}, {"store": False}, 0),
    ],
)
def test_admission(
    make_engine: MakeEngine,
    daemon: Daemon,
    extra: dict[str, Any],
    hints: dict[str, Any] | None,
    stored: int,
) -> None:
    engine = make_engine(extra=extra)
    engine.generate(prompt_of(4, 3 * BLOCK), 2 * BLOCK + 1, hints=hints)
    wait_ready(daemon, stored)


def test_hints_reach_the_pool(engine: MiniEngine, daemon: Daemon) -> None:
    prompt, other = prompt_of(5, 3 * BLOCK), prompt_of(6, 2 * BLOCK)
    engine.generate(prompt, 1, hints={"pin": True})
    engine.generate(other, 1, hints={"ttl_s": 1})
    until(lambda: daemon.counter("pinned") == 3)
    until(lambda: daemon.counter("expired") == 2)
    engine.reset_prefix_cache()
    assert engine.generate(other, 1)[1] == 0
    assert engine.generate(prompt, 1)[1] == 2 * BLOCK


def test_pins_are_capped_and_what_is_left_follows_later(
    make_engine: MakeEngine, daemon: Daemon
) -> None:
    """Half of 80 blocks may be pinned: a prompt of 60 blocks takes several steps."""
    engine = make_engine(num_blocks=80, max_tokens=2048)
    engine.unhurried = True
    engine.delay_stores(2)
    engine.generate(prompt_of(7, 60 * BLOCK), 40)
    wait_ready(daemon, 62)
    assert engine.free_blocks == 79


def test_prompts_that_fill_a_third_of_the_cache_and_end_at_once_are_stored_whole(
    make_engine: MakeEngine, daemon: Daemon
) -> None:
    """Nobody offers again what found no room when its request ended."""
    engine = make_engine(max_tokens=2048)
    engine.delay_stores(2)
    for seed in range(4):
        engine.add(prompt_of(seed, 20 * BLOCK), 1)
    engine.run()
    wait_ready(daemon, 80)
    assert engine.free_blocks == 255


def test_the_end_of_a_long_prompt_is_stored_when_its_request_ends_at_once(
    make_engine: MakeEngine, daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last step brings more blocks than one question to the daemon may have."""
    monkeypatch.setattr(stores, "MAX_ASK_BLOCKS", 8)
    engine = make_engine(max_tokens=2048)
    engine.generate(prompt_of(16, 60 * BLOCK), 1)
    wait_ready(daemon, 60)
    assert "store_skipped_blocks:ended" not in engine.stats


def test_what_a_request_leaves_when_it_ends_is_counted(
    make_engine: MakeEngine, daemon: Daemon
) -> None:
    engine = make_engine(num_blocks=80, max_tokens=2048)
    engine.generate(prompt_of(17, 60 * BLOCK), 1)
    wait_ready(daemon, 40)
    assert engine.stats["store_skipped_blocks:ended"] == 20


def test_blocks_that_could_not_be_copied_are_offered_again(
    make_engine: MakeEngine, daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "RETRY_S", 0.0)
    engine = make_engine()
    engine.worker._worker._next_try = math.inf  # to map the pool
    prompt = prompt_of(18, 8 * BLOCK)
    request_id = engine.add(prompt, 10 * BLOCK)
    until(lambda: (engine.step(), "store_skipped_blocks:copy_failed" in engine.stats)[1])
    assert engine.status(request_id) is not None, "the request ended too early for this test"
    engine.worker._worker._next_try = 0.0
    engine.run()
    wait_ready(daemon, (18 * BLOCK - 1) // BLOCK)
    check_pool(make_engine, [*prompt, *engine.outputs[request_id]], 17)


def test_what_cannot_be_copied_for_long_is_offered_less_and_less_often(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time takes slots from others, and a copy of the ranks that can."""
    monkeypatch.setattr(stores, "RETRY_S", 0.01)
    engine = make_engine()
    engine.worker._worker._next_try = math.inf  # to map the pool
    asked: list[int] = []
    client = engine.connector._scheduler._link.client
    prepare_store = client.prepare_store
    client.prepare_store = lambda keys, **options: (
        asked.append(len(keys)),
        prepare_store(keys, **options),
    )[1]
    engine.generate(prompt_of(19, 8 * BLOCK), 800)
    assert (
        2 <= len(asked) <= 16
    )  # after 0.01, 0.02, 0.04... s: the 17th would come after ten minutes
    assert engine.stats["store_skipped_blocks:ended"] > 0


def test_no_daemon_means_no_pins(engine: MiniEngine, daemon: Daemon) -> None:
    engine.generate(prompt_of(8, 2 * BLOCK))
    engine.lose_patience()
    daemon.kill()
    prompt = prompt_of(9, 8 * BLOCK)
    assert engine.generate(prompt)[0] == expected_output(prompt)
    assert engine.free_blocks == 255
    assert not engine.connector.has_pending_push_work()


def test_stopped_daemon_delays_the_idle_engine_by_its_timeout_only(
    engine: MiniEngine, daemon: Daemon
) -> None:
    """While stores are in flight the engine keeps stepping; a daemon that never answers ends that."""
    engine.generate(prompt_of(10, 2 * BLOCK))
    engine.lose_patience()
    daemon.pause()
    engine.add(prompt_of(11, 8 * BLOCK))
    engine.run()
    assert engine.free_blocks == 255
    assert engine.stats["store_skipped_blocks:timeout"] == 8
    daemon.resume()


def test_running_requests_store_all_of_their_chain_once_the_daemon_is_back(
    make_engine: MakeEngine, daemon: Daemon
) -> None:
    engine = make_engine()
    engine.generate(prompt_of(12, 2 * BLOCK), 1)
    wait_ready(daemon, 2)
    engine.lose_patience()
    daemon.kill()
    request_id = engine.add(prompt_of(13, 8 * BLOCK), max_tokens=900)
    link = engine.connector._scheduler._link
    until(lambda: (engine.step(), not link.connected)[1])
    daemon.start()
    engine.wait_connected()
    assert engine.status(request_id) is not None, "the request ended too early for this test"
    engine.run()
    wait_ready(daemon, 2 + (8 * BLOCK + 899) // BLOCK)


def test_two_requests_of_one_prefix_store_it_once(engine: MiniEngine, daemon: Daemon) -> None:
    prompt = prompt_of(14, 6 * BLOCK)
    ids = [engine.add(prompt, 1), engine.add(prompt, 1)]
    engine.run()
    assert [engine.outputs[one] for one in ids] == [expected_output(prompt, 1)] * 2
    wait_ready(daemon, 6)


def test_pool_without_room_stops_nothing(make_engine: MakeEngine, daemon: Daemon) -> None:
    """Another engine is writing to every slot: new blocks get none."""
    engine = make_engine(num_blocks=4096)
    hog = connect(daemon.paths, "another model")
    prepare(hog, keys_of("hog", 50_000))
    assert daemon.counter("no_room") > 0
    prompt = prompt_of(15, 8 * BLOCK)
    assert engine.generate(prompt) == (expected_output(prompt), 0)
    assert engine.stats["store_skipped_blocks:not_granted"] >= 8
    hog.close()
    assert engine.free_blocks == 4095
