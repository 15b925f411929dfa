"""A conversation through the router whose engine dies: the next turn goes on elsewhere, from the pool.

Two engines, one pool, the router in front. Nothing but the router's address is known to the client.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from helpers import until

from benchmarks.processes import Engine, PoolDaemon, Router
from vllm_kvpool.connector import compat
from vllm_kvpool.pool.admin import fetch_stats

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

POOL = f"routed-{os.getpid()}"
BLOCK = 64
OPTIONS = (f"--block-size={BLOCK}", "--max-model-len=8192", "--enable-prefix-caching")
SYSTEM_TOKENS = 2_500
TURNS = 10
KILLED_AFTER = 5


class Turn(NamedTuple):
    replica: str
    answer: str
    prompt_tokens: int
    cached_tokens: int

    @property
    def full_blocks(self) -> int:
        return self.prompt_tokens // BLOCK


class Served(NamedTuple):
    router: Router
    engines: dict[str, Engine]
    """By the router's name of the replica."""


@pytest.fixture(scope="module")
def served(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    logs = tmp_path_factory.mktemp("routed")
    seeds = {"PYTHONHASHSEED": "0"} if compat.none_hash_is_random("sha256") else {}
    env = {"OMP_NUM_THREADS": "1", **seeds}
    extra = {"pool": POOL, "load_deadline_ms": 30_000, "checksum": "all"}
    daemon = PoolDaemon(logs / "daemon.log", name=POOL, size="512MiB", shm_dir="/dev/shm")
    a, b = (
        Engine(tiny_model, logs / f"{name}.log", extra=extra, options=OPTIONS, env=env)
        for name in "ab"
    )
    with daemon, a, b:
        a.wait_ready()
        b.wait_ready()
        with Router(logs / "router.log", "--probe-interval-s", "1", a.url, b.url) as router:
            names = {engine.url.removeprefix("http://"): engine for engine in (a, b)}
            yield Served(router, names)
            assert "Traceback" not in router.log.read_text()
    shutil.rmtree(daemon.folder)


def ask(router: Router, messages: list[dict[str, str]]) -> Turn:
    """urllib.error.HTTPError: the request failed."""
    body = {"model": "tiny", "messages": messages, "max_tokens": 24, "temperature": 0}
    request = urllib.request.Request(
        f"{router.url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        answer: dict[str, Any] = json.loads(response.read())
        usage = answer["usage"]
        return Turn(
            response.headers["x-kvpool-replica"],
            answer["choices"][0]["message"]["content"],
            usage["prompt_tokens"],
            (usage["prompt_tokens_details"] or {}).get("cached_tokens") or 0,
        )


def wait_stored(blocks: int) -> None:
    """All that the conversation has filled so far can be found in the pool."""
    until(lambda: fetch_stats(POOL, "/dev/shm")["counters"]["ready"] >= blocks, "the pool")


def text_of(draw: random.Random, length: int) -> str:
    return "".join(draw.choices("abcdefghij klmnop", k=length))


def test_a_conversation_survives_its_engine(served: Served) -> None:
    draw = random.Random(5)
    messages = [{"role": "system", "content": text_of(draw, SYSTEM_TOKENS)}]
    turns: list[Turn] = []
    for number in range(1, TURNS + 1):
        messages.append({"role": "user", "content": text_of(draw, 50)})
        turn = ask(served.router, messages)
        messages.append({"role": "assistant", "content": turn.answer})
        turns.append(turn)
        if number == KILLED_AFTER:
            wait_stored(turn.full_blocks)
            served.engines[turn.replica].kill()

    before, after = turns[:KILLED_AFTER], turns[KILLED_AFTER:]
    first, second = before[0].replica, after[0].replica
    assert [turn.replica for turn in before] == [first] * KILLED_AFTER
    assert [turn.replica for turn in after] == [second] * (TURNS - KILLED_AFTER)
    assert {first, second} == set(served.engines)
    assert before[0].cached_tokens == 0
    for turn in turns[1:]:
        assert turn.cached_tokens >= 0.9 * turn.full_blocks * BLOCK, turn

    # the engine that took over had computed nothing of it: what it found came from the pool
    metrics = served.engines[second].metrics()
    loaded = sum(
        float(line.rpartition(" ")[2])
        for line in metrics.splitlines()
        if line.startswith("vllm:external_prefix_cache_hits_total{")
    )
    assert loaded >= after[0].cached_tokens - BLOCK
