"""Engines of two hosts: what one has stored the other loads, or computes when that is not to be had."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from connector.mini_engine import BLOCK, MiniEngine, expected_output, prompt_of
from helpers import Daemon, until
from hosts.conftest import patient
from redis_server import RedisServer

from benchmarks.processes import free_port
from vllm_kvpool.client import PoolClient
from vllm_kvpool.connector.prefill_time import MIN_OBSERVATIONS
from vllm_kvpool.connector.scheduler import SchedulerSide
from vllm_kvpool.keys import block_keys
from vllm_kvpool.pool.anchors import TOKENS_AN_ENTRY, anchors
from vllm_kvpool.types import BlockKeys

EAGER = {"min_remote_tokens": BLOCK, "pull_deadline_ms": 20_000, "prefill_tokens_per_s": 1}
BLOCKS_AN_ENTRY = TOKENS_AN_ENTRY // BLOCK
MakeEngine = Callable[..., MiniEngine]


class Pair(NamedTuple):
    """Two hosts; `make_engine(host)` starts an engine on one of them."""

    a: Daemon
    b: Daemon
    make_engine: MakeEngine
    redis: RedisServer

    def store(self, engine: MiniEngine, *prompts: list[int]) -> None:
        """And wait until other hosts can know of it."""
        for prompt in prompts:
            output, _ = engine.generate(prompt)
            whole = [*prompt, *output[:-1]]
            names = [
                b"kvpool:1:test:{%02x}:%b" % (key[0], key)
                for _, key in anchors(keys_of(engine, whole), BLOCKS_AN_ENTRY)
            ]
            assert names, "nobody could find it"
            until(lambda names=names: self.redis.client.exists(*names) == len(names), "entries")
            engine.reset_prefix_cache()


def keys_of(engine: MiniEngine, tokens: list[int]) -> BlockKeys:
    request = SimpleNamespace(
        block_hashes=[], num_tokens=len(tokens), all_token_ids=tokens, mm_features=[],
        lora_request=None, cache_salt=None, prompt_embeds=None,
    )  # fmt: skip
    return block_keys(side(engine)._link.mask, engine._hasher(request))


def pull(engine: MiniEngine, prompt: list[int], count: int = 1) -> set[int]:
    """Cached tokens of so many requests at once, which store nothing."""
    requests = [engine.add(prompt, hints={"store": False}) for _ in range(count)]
    engine.run()
    for request in requests:
        assert engine.outputs[request] == expected_output(prompt)
    engine.reset_prefix_cache()
    return {engine.cached_tokens[request] for request in requests}


@pytest.fixture
def pair(
    shm_dir: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Pair]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    redis = RedisServer(tmp_path).start()
    daemons, engines = [], []
    for name in "ab":
        folder = shm_dir / name
        folder.mkdir()
        listen = f"tcp://127.0.0.1:{free_port()}"
        options = ("--min-block", "4KiB", "--listen", listen, "--directory", redis.url)
        daemons.append(patient(Daemon(folder, *options, size="32MiB")).start())
    until(lambda: len(redis.client.keys(b"kvpool:1:test:{hosts}:*")) == 2, "both in the directory")

    def make(host: Daemon, *, extra: dict[str, Any] | None = None, **options: Any) -> MiniEngine:
        common = {"pool": host.name, "shm_dir": str(host.shm_dir), "checksum": "all", **EAGER}
        engines.append(MiniEngine(tiny_model, extra={**common, **(extra or {})}, **options))
        return engines[-1]

    yield Pair(*daemons, make, redis)
    for engine in engines:
        engine.close()
    for daemon in daemons:
        if daemon.process is not None:
            daemon.resume()
            assert daemon.stop() == 0, daemon.errors()
            assert "Traceback" not in daemon.errors()
    redis.kill()


def side(engine: MiniEngine) -> SchedulerSide:
    scheduler = engine.connector._scheduler
    assert scheduler is not None
    return scheduler


def client_of(engine: MiniEngine) -> PoolClient:
    client = side(engine)._link.client
    assert client is not None
    return client


def reasons(engine: MiniEngine) -> dict[str, int]:
    return {key: n for key, n in engine.stats.items() if key.startswith("pull_ends")}


def test_loads_what_another_host_stored(pair: Pair) -> None:
    a, b = pair.make_engine(pair.a), pair.make_engine(pair.b)
    prompt = prompt_of(1, 40 * BLOCK + 5)
    pair.store(a, prompt)
    assert pull(b, prompt) == {40 * BLOCK}, (b.stats, pair.a.stats(), pair.b.stats())
    assert pair.b.counter("pulled_blocks") == 40
    assert not b._stats.data.get("load_failed_blocks:checksum")


def test_only_the_tail_comes_from_there(pair: Pair) -> None:
    a, b = pair.make_engine(pair.a), pair.make_engine(pair.b)
    b.generate(prompt_of(1, 20 * BLOCK + 1))
    b.reset_prefix_cache()
    pair.store(a, prompt_of(1, 60 * BLOCK + 1))
    assert pull(b, prompt_of(1, 60 * BLOCK + 1)) == {60 * BLOCK}
    assert pair.b.counter("pulled_blocks") == 40


def test_nobody_has_it(pair: Pair) -> None:
    b = pair.make_engine(pair.b)
    prompt = prompt_of(2, 10 * BLOCK)
    assert b.generate(prompt) == (expected_output(prompt), 0)
    assert reasons(b) == {"pull_ends:absent": 1}


def test_short_prompts_are_not_asked_for(pair: Pair) -> None:
    b = pair.make_engine(pair.b, extra={"min_remote_tokens": 20 * BLOCK})
    b.generate(prompt_of(2, 10 * BLOCK))
    assert pair.b.counter("pulls") == 0


def test_never_wait(pair: Pair) -> None:
    b = pair.make_engine(pair.b, extra={"pull_deadline_ms": 0})
    b.generate(prompt_of(2, 10 * BLOCK))
    assert pair.b.counter("pulls") == 0


def test_who_computes_at_once_waits_for_nobody(pair: Pair) -> None:
    """What its own prompts took counts, whatever is known of loads; and not what was configured."""
    b = pair.make_engine(pair.b, learn=True)
    for _ in range(MIN_OBSERVATIONS):
        side(b)._tradeoff.computed(10 * BLOCK, 0.0)
    b.generate(prompt_of(2, 10 * BLOCK))
    assert pair.b.counter("pulls") == 0


def test_the_other_host_hangs(pair: Pair) -> None:
    a, b = pair.make_engine(pair.a), pair.make_engine(pair.b, extra={"pull_deadline_ms": 500})
    prompt = prompt_of(1, 30 * BLOCK)
    pair.store(a, prompt)
    pair.a.pause()
    assert b.generate(prompt) == (expected_output(prompt), 0)
    assert reasons(b)


def test_our_daemon_hangs(pair: Pair) -> None:
    b = pair.make_engine(pair.b, extra={"pull_deadline_ms": 500})
    prompt = prompt_of(1, 30 * BLOCK)
    b.lose_patience()
    pair.b.pause()
    request = b.add(prompt)
    until(lambda: (b.step(), b.outputs[request])[1], "the request to be computed")
    pair.b.resume()
    b.run()
    assert b.outputs[request] == expected_output(prompt)
    assert reasons(b) == {"pull_ends:no_answer": 1}
    assert not client_of(b)._pulling
    assert not client_of(b)._pulled


def test_our_daemon_dies(pair: Pair) -> None:
    b = pair.make_engine(pair.b, extra={"pull_deadline_ms": 500})
    b.lose_patience()
    pair.b.pause()
    request = b.add(prompt_of(1, 30 * BLOCK))
    b.step()
    pair.b.kill()
    b.run()
    assert b.outputs[request] == expected_output(prompt_of(1, 30 * BLOCK))


def test_abort_while_waiting(pair: Pair) -> None:
    a, b = pair.make_engine(pair.a), pair.make_engine(pair.b)
    prompt = prompt_of(1, 30 * BLOCK)
    pair.store(a, prompt)
    pair.a.pause()
    free = b.free_blocks
    request = b.add(prompt)
    until(lambda: (b.step(), side(b)._pulls._pulling)[1], "the pull")
    b.abort(request)
    until(lambda: (b.step(), pair.b.counter("pulls_cancelled"))[1], "the end of the pull")
    assert not side(b)._pulls._pulling
    assert not side(b)._pulls._held
    assert b.free_blocks == free


def test_many_at_once_pull_once(pair: Pair) -> None:
    a, b = pair.make_engine(pair.a), pair.make_engine(pair.b, num_blocks=2_048)
    prompt = prompt_of(1, 40 * BLOCK + 5)
    pair.store(a, prompt)
    assert pull(b, prompt, count=32) == {40 * BLOCK}, b.stats
    assert pair.b.counter("pulled_blocks") == 40


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True])
def test_waiting_and_loading_requests_do_not_starve_each_other(
    pair: Pair, asynchronous: bool
) -> None:
    """KV memory for a few prompts only; some prompts are here, some on the other host, some nowhere,
    some are aborted. All others end, with the right tokens."""
    draw = random.Random(3)
    a = pair.make_engine(pair.a)
    extra = {"pull_deadline_ms": 2_000}
    b = pair.make_engine(pair.b, num_blocks=101, asynchronous=asynchronous, extra=extra)
    prompts = {seed: prompt_of(seed, 30 * BLOCK + seed) for seed in range(10, 26)}
    for seed in range(10, 18):
        b.generate(prompts[seed])
    pair.store(a, *(prompts[seed] for seed in range(18, 22)))
    b.reset_prefix_cache()
    asked = {}
    give_up = time.monotonic() + 120
    for _ in range(60):
        seed = draw.choice(list(prompts))
        asked[b.add(prompts[seed])] = seed
        for _ in range(draw.randrange(3)):
            b.step()
        if draw.random() < 0.1:
            request = draw.choice(list(asked))
            del asked[request]
            b.abort(request)
        if draw.random() < 0.1 and not b.scheduler.has_requests():
            b.reset_prefix_cache()
    while b.scheduler.has_requests() or b.busy:
        assert time.monotonic() < give_up, (b.scheduler.requests, vars(side(b)._pulls))
        b.step()
    for request, seed in asked.items():
        assert b.outputs[request] == expected_output(prompts[seed])
    assert pair.b.counter("pulled_blocks") > 0
    assert not side(b)._pulls._held
    assert not side(b)._pulls._pulling
    assert not side(b)._pulls._loading
