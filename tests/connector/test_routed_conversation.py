"""A conversation through the router whose engine dies: the next turn goes on elsewhere, from the pool.

Two engines, one pool, the router in front. Nothing but the router's address is known to the client.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from connector.real_engines import BLOCK, POOL, Engines, metric
from helpers import WAIT_S, until

from benchmarks.conversation import Turn, converse
from benchmarks.processes import Engine, Router
from vllm_kvpool.pool.admin import fetch_stats

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TURNS = 10
KILLED_AFTER = 5


class Served(NamedTuple):
    router: Router
    replicas: dict[str, Engine]
    """By the router's name of the replica."""


@pytest.fixture
def served(engines: Engines, tmp_path: Path) -> Iterator[Served]:
    pair = (engines.a, engines.speculating)
    addresses = [engine.url for engine in pair]
    times = ("--probe-interval-s", "1", "--connect-timeout-s", "30")  # engines are busy
    with Router(tmp_path / "router.log", *times, *addresses) as router:
        yield Served(router, {engine.url.removeprefix("http://"): engine for engine in pair})
        assert "Traceback" not in router.log.read_text()


def num_stored() -> int:
    return int(fetch_stats(POOL, "/dev/shm", WAIT_S)["counters"]["stored"])


def test_a_conversation_survives_its_engine(served: Served, engines: Engines) -> None:
    """The last test of these engines."""
    stored = num_stored()
    loaded = {name: loaded_tokens(engine) for name, engine in served.replicas.items()}

    def kill_its_engine(number: int, turn: Turn) -> None:
        if number == KILLED_AFTER:
            # all that the conversation has filled so far can be found in the pool
            until(lambda: num_stored() >= stored + turn.prompt_tokens // BLOCK, "the pool")
            engines.killed.append(served.replicas[turn.replica])
            engines.killed[-1].kill()

    turns = converse(served.router.url, TURNS, kill_its_engine)
    before, after = turns[:KILLED_AFTER], turns[KILLED_AFTER:]
    first, second = before[0].replica, after[0].replica
    assert [turn.replica for turn in before] == [first] * KILLED_AFTER
    assert [turn.replica for turn in after] == [second] * (TURNS - KILLED_AFTER)
    assert {first, second} == set(served.replicas)
    assert before[0].cached_tokens == 0
    for turn in turns[1:]:
        assert turn.cached_tokens >= 0.9 * (turn.prompt_tokens // BLOCK) * BLOCK, turn

    # the engine that took over had computed nothing of it: what it found came from the pool
    found = loaded_tokens(served.replicas[second]) - loaded[second]
    assert found >= after[0].cached_tokens - BLOCK


def loaded_tokens(engine: Engine) -> float:
    return metric(engine, "external_prefix_cache_hits")
