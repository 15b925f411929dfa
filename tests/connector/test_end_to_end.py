"""Real vLLM engines over HTTP: three with the pool, one without it to compare with (`real_engines`)."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from connector.real_engines import BLOCK, LONG, POOL, Engines, metric, prompt_of, reset
from helpers import WAIT_S, until

from benchmarks.completions import Completion, complete
from benchmarks.processes import Engine
from vllm_kvpool._native import PoolView
from vllm_kvpool.keys import block_keys, key_mask
from vllm_kvpool.pool.admin import fetch_stats
from vllm_kvpool.types import unpack_refs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def hints(**values: Any) -> dict[str, Any]:
    return {"kv_transfer_params": {"kvpool": values}}


def counters(engines: Engines) -> dict[str, Any]:
    return dict(fetch_stats(POOL, "/dev/shm", WAIT_S)["counters"])


def store(engines: Engines, engine: Engine, prompt: list[int]) -> Completion:
    """An engine that was idle while its daemon was restarted hears of it with the next request, whose
    blocks may come too early to be stored: those that it still has are stored with another one."""
    answer = complete(engine, prompt)
    blocks = len(prompt) // BLOCK

    def stored() -> bool:
        if len(refs_of(engines, prompt)) < blocks:
            time.sleep(0.5)
            complete(engine, prompt, max_tokens=1)
        return len(refs_of(engines, prompt)) >= blocks

    until(stored, "the prompt's blocks in the pool")
    return answer


def refs_of(engines: Engines, prompt: list[int]) -> list[int]:
    """The prompt's blocks in the pool, found as an engine finds them."""
    from vllm.utils.hashing import sha256
    from vllm.v1.core import kv_cache_utils

    kv_cache_utils.init_none_hash(sha256)
    request = SimpleNamespace(
        block_hashes=[], num_tokens=len(prompt), all_token_ids=prompt, mm_features=[],
        lora_request=None, cache_salt=None, prompt_embeds=None,
    )  # fmt: skip
    hashes = kv_cache_utils.get_request_block_hasher(BLOCK, sha256)(request)
    view = PoolView.open(str(engines.daemon.paths.pool))
    (space,) = view.info()["namespaces"]
    keys = block_keys(key_mask(bytes.fromhex(space["digest"]), 0), hashes)
    now_s = int(time.clock_gettime(time.CLOCK_BOOTTIME))
    return list(unpack_refs(view.match_prefix(keys, now_s)))


def spoil(engines: Engines, prompt: list[int]) -> None:
    view = PoolView.open(str(engines.daemon.paths.pool))
    for ref in refs_of(engines, prompt):
        payload = view.payload(ref)
        noise = random.Random(ref).randbytes(4096)
        payload[:4096] = bytes(a ^ b for a, b in zip(payload[:4096], noise, strict=True))


# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [3 * BLOCK - 1, 3 * BLOCK, 3 * BLOCK + 1, LONG])
def test_same_greedy_output_computed_cached_and_loaded(engines: Engines, length: int) -> None:
    """In the engine that stored and in the other one (trap 28: they agree on the hashes)."""
    prompt = prompt_of(length, length)
    expected = complete(engines.reference, prompt).tokens
    full = (length - 1) // BLOCK * BLOCK
    assert store(engines, engines.a, prompt)[1:] == (expected, length, 0)
    assert complete(engines.a, prompt)[1:] == (expected, length, full)
    reset(engines.a)
    assert complete(engines.a, prompt)[1:] == (expected, length, full)
    assert complete(engines.b, prompt)[1:] == (expected, length, full)


def test_generated_blocks_are_found_by_the_next_turn(engines: Engines) -> None:
    prompt = prompt_of(2, 3 * BLOCK - 20)
    first = complete(engines.a, prompt, max_tokens=2 * BLOCK)
    turn = [*prompt, *first.tokens, *prompt_of(3, 50)]
    known = (len(prompt) + len(first.tokens) - 1) // BLOCK
    until(lambda: len(refs_of(engines, turn)) == known)
    expected = complete(engines.reference, turn).tokens
    assert complete(engines.b, turn)[1:] == (expected, len(turn), known * BLOCK)


def test_trap_16_speculation_gives_and_takes_the_same_blocks(engines: Engines) -> None:
    """A prompt that repeats itself, so that drafts are made; the answer's blocks are stored as well."""
    prompt = prompt_of(10, 40) * 12
    first = complete(engines.reference, prompt, max_tokens=2 * BLOCK)
    turn = [*prompt, *first.tokens, *prompt_of(11, 50)]
    known = (len(prompt) + len(first.tokens) - 1) // BLOCK
    assert complete(engines.speculating, prompt, max_tokens=2 * BLOCK).tokens == first.tokens
    assert metric(engines.speculating, "spec_decode_num_draft_tokens") > 0
    until(lambda: len(refs_of(engines, turn)) == known)
    expected = complete(engines.reference, turn).tokens
    assert complete(engines.a, turn)[1:] == (expected, len(turn), known * BLOCK)
    reset(engines.speculating)
    loaded = complete(engines.speculating, turn)
    assert loaded.tokens == expected
    assert loaded.cached_tokens >= (known - 1) * BLOCK  # vLLM may compute the last one for drafts


def test_overwritten_payload_changes_the_output_without_checksums(engines: Engines) -> None:
    prompt = prompt_of(5)
    good = store(engines, engines.a, prompt)
    reset(engines.a)
    spoil(engines, prompt)
    loaded = complete(engines.a, prompt)
    assert loaded.cached_tokens == 20 * BLOCK
    assert loaded.tokens != good.tokens


def test_overwritten_payload_is_a_counted_miss_with_checksums(engines: Engines) -> None:
    prompt = prompt_of(6)
    good = store(engines, engines.b, prompt)
    reset(engines.b)
    failed = metric(engines.b, "kvpool_load_failed_blocks", reason="checksum")
    spoil(engines, prompt)
    assert complete(engines.b, prompt).tokens == good.tokens
    assert metric(engines.b, "kvpool_load_failed_blocks", reason="checksum") == failed + 20


def test_metrics_and_hints_over_http(engines: Engines) -> None:
    prompt = prompt_of(7)
    store(engines, engines.a, prompt)
    reset(engines.a)
    hits, misses = (
        metric(engines.a, "kvpool_hit_tokens"),
        metric(engines.a, "kvpool_misses", reason="hint"),
    )
    loaded = metric(engines.a, "kvpool_load_bytes")
    assert complete(engines.a, prompt, **hints(load=False)).cached_tokens == 0
    reset(engines.a)
    assert complete(engines.a, prompt, **hints(loat=False)).cached_tokens == 20 * BLOCK
    assert metric(engines.a, "kvpool_misses", reason="hint") == misses + 1
    assert metric(engines.a, "kvpool_hit_tokens") == hits + 20 * BLOCK
    assert metric(engines.a, "kvpool_load_bytes") > loaded
    assert metric(engines.a, "kvpool_load_seconds_count") > 0
    assert metric(engines.a, "external_prefix_cache_hits") > 0
    assert "'loat' = False: unknown hint" in engines.a.log.read_text()


def test_trap_4_8_and_9_more_requests_than_memory_some_of_them_aborted(engines: Engines) -> None:
    """B holds 8k tokens: 24 requests of up to 2.6k each, half of them in the pool; every third client
    hangs up."""
    shared = [prompt_of(seed, LONG - 100 * (seed % 5)) for seed in range(20, 28)]
    for prompt in shared[::2]:
        complete(engines.a, prompt, max_tokens=1)
    jobs = [(shared[i % 8], 100 + i % 3 * 40, i % 3 == 2) for i in range(24)]
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda job: ask(engines.b, *job), jobs))
    for (prompt, max_tokens, hung_up), answer in zip(jobs, answers, strict=True):
        if not hung_up:
            expected = complete(engines.reference, prompt, max_tokens=max_tokens).tokens
            assert answer == expected
    until(lambda: metric(engines.b, "num_requests_running") == 0, timeout_s=60)
    until(
        lambda: metric(engines.b, "kv_cache_usage_perc") == 0, "all blocks given back", timeout_s=60
    )


def test_trap_4_preempted_while_blocks_are_stored(engines: Engines) -> None:
    """B has 64 blocks: 24 requests come in with two each, and all grow to four. Where the machine has much else to do,
    they may not meet: then others are sent."""

    def answers(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
        with ThreadPoolExecutor(len(prompts)) as pool:
            done = pool.map(lambda prompt: complete(engine, prompt, max_tokens=2 * BLOCK), prompts)
            return [completion.tokens for completion in done]

    preemptions = metric(engines.b, "num_preemptions")
    for attempt in range(3):
        prompts = [prompt_of(100 * attempt + seed, 2 * BLOCK - 20) for seed in range(40, 64)]
        assert answers(engines.b, prompts) == answers(engines.reference, prompts)
        if metric(engines.b, "num_preemptions") > preemptions:
            return
    pytest.fail("nothing was preempted")


def ask(engine: Engine, prompt: list[int], max_tokens: int, hang_up: bool) -> list[int] | None:
    if not hang_up:
        return complete(engine, prompt, max_tokens=max_tokens).tokens
    body = {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True}
    try:
        engine.post("/v1/completions", body, timeout_s=random.Random(max_tokens).uniform(0.05, 2))
    except TimeoutError:
        return None
    return None


def test_trap_30_daemon_killed_with_a_single_request_in_flight(engines: Engines) -> None:
    """And after its restart all blocks are served as before."""
    prompt = prompt_of(8)
    store(engines, engines.a, prompt)
    expected = complete(engines.reference, prompt).tokens
    reset(engines.a)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(complete, engines.a, prompt)
        engines.daemon.kill()
        assert answer.result(timeout=120)[1:] == (expected, LONG, 20 * BLOCK)
    reset(engines.a)
    assert complete(engines.a, prompt)[1:] == (expected, LONG, 20 * BLOCK)
    fresh = prompt_of(9)
    assert complete(engines.a, fresh).tokens == complete(engines.reference, fresh).tokens
    engines.daemon.start()
    reset(engines.a)
    assert complete(engines.a, prompt)[1:] == (expected, LONG, 20 * BLOCK)

    def stored_again() -> bool:
        reset(engines.a)
        complete(engines.a, fresh, max_tokens=20)
        return len(refs_of(engines, fresh)) >= 20

    until(stored_again, "stores after the daemon came back", timeout_s=60)


def test_bad_configuration_is_refused_with_the_flag_to_add(engines: Engines) -> None:
    until(lambda: not engines.refused.running, "end of the engine that is refused", timeout_s=120)
    assert '"kv_load_failure_policy": "recompute"' in engines.refused.log.read_text()


def test_trap_27_reset_of_the_external_cache_misses_until_stored_again(engines: Engines) -> None:
    """The last test: from then on B shares with nobody."""
    prompt = prompt_of(4)
    store(engines, engines.b, prompt)
    reset(engines.b)
    assert complete(engines.b, prompt).cached_tokens == 20 * BLOCK
    before = counters(engines)["ready"]
    reset(engines.b, external=True)
    skipped = metric(engines.b, "kvpool_store_skipped_blocks")
    assert complete(engines.b, prompt).cached_tokens == 0

    def stored_again() -> bool:
        if (
            metric(engines.b, "kvpool_store_skipped_blocks") > skipped
        ):  # a pause, and its patience is a second
            complete(engines.b, prompt, max_tokens=1)
        return counters(engines)["ready"] >= before + 20

    until(stored_again, "the prompt's blocks in the pool")
    reset(engines.b)
    assert complete(engines.b, prompt).cached_tokens == 20 * BLOCK
    assert complete(engines.a, prompt).cached_tokens == 20 * BLOCK
