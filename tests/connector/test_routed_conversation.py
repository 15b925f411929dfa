"""A conversation through the router whose engine dies: the next turn goes on elsewhere, from the pool.

Two engines, one pool, the router in front. Nothing but the router's address is known to the client.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers import until

from benchmarks.conversation import Turn, converse
from benchmarks.processes import Engine, PoolDaemon, Router
from vllm_kvpool.connector import compat
from vllm_kvpool.pool.admin import fetch_stats

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

POOL = f"routed-{os.getpid()}"
BLOCK = 64
OPTIONS = (f"--block-size={BLOCK}", "--max-model-len=8192", "--enable-prefix-caching")
TURNS = 10
KILLED_AFTER = 5


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


def wait_stored(blocks: int) -> None:
    """All that the conversation has filled so far can be found in the pool."""
    until(lambda: fetch_stats(POOL, "/dev/shm")["counters"]["ready"] >= blocks, "the pool")


def test_a_conversation_survives_its_engine(served: Served) -> None:
    def kill_its_engine(number: int, turn: Turn) -> None:
        if number == KILLED_AFTER:
            wait_stored(turn.prompt_tokens // BLOCK)
            served.engines[turn.replica].kill()

    turns = converse(served.router.url, TURNS, kill_its_engine)
    before, after = turns[:KILLED_AFTER], turns[KILLED_AFTER:]
    first, second = before[0].replica, after[0].replica
    assert [turn.replica for turn in before] == [first] * KILLED_AFTER
    assert [turn.replica for turn in after] == [second] * (TURNS - KILLED_AFTER)
    assert {first, second} == set(served.engines)
    assert before[0].cached_tokens == 0
    for turn in turns[1:]:
        assert turn.cached_tokens >= 0.9 * (turn.prompt_tokens // BLOCK) * BLOCK, turn

    # the engine that took over had computed nothing of it: what it found came from the pool
    metrics = served.engines[second].metrics()
    loaded = sum(
        float(line.rpartition(" ")[2])
        for line in metrics.splitlines()
        if line.startswith("vllm:external_prefix_cache_hits_total{")
    )
    assert loaded >= after[0].cached_tokens - BLOCK
