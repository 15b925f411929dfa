"""Eight engines store and load the same chains at once, in a pool too small for them, while engines
and the daemon are killed: every hit has the right bytes, and the pool is in order at the end (a
daemon that ends cleanly checks it)."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable

import pytest
from helpers import Daemon, EngineProcess, until

ENGINES = 8
TOGETHER_S = 20
KILLS_S = 20


def start(engine: EngineProcess, seed: int, seconds: int) -> None:
    engine.process.stdin.write(f"churn {seed} {seconds}\n")
    engine.process.stdin.flush()


def results(engines: list[EngineProcess]) -> list[dict[str, int]]:
    return [json.loads(engine.process.stdout.readline()) for engine in engines]


def is_idle(daemon: Daemon) -> bool:
    return daemon.stats()["clients"] == [] and daemon.counter("writing") == 0


@pytest.mark.slow
def test_together(daemon: Daemon, make_engine: Callable[..., EngineProcess]) -> None:
    engines = [make_engine() for _ in range(ENGINES)]
    for seed, engine in enumerate(engines):
        start(engine, seed, TOGETHER_S)
    done = results(engines)
    assert all(result["stored"] > 0 and result["hits"] > 0 for result in done), done
    for engine in engines:
        engine.end()
    until(lambda: is_idle(daemon), "all slots back")
    assert daemon.counter("evicted") > 0
    assert daemon.stop() == 0, daemon.errors()


@pytest.mark.slow
def test_with_kills(daemon: Daemon, make_engine: Callable[..., EngineProcess]) -> None:
    draw = random.Random(11)
    engines = [make_engine() for _ in range(ENGINES)]
    for seed, engine in enumerate(engines):
        start(engine, seed, KILLS_S)
    begin = time.monotonic()
    survivors = list(engines)
    while time.monotonic() < begin + KILLS_S - 5:
        time.sleep(draw.uniform(0.5, 2.0))
        if draw.random() < 0.5:
            daemon.kill()
            time.sleep(draw.uniform(0, 0.5))
            daemon.start()
        elif len(survivors) > 3:
            survivors.pop(draw.randrange(len(survivors))).end()
    done = results(survivors)
    assert all(result["hits"] > 0 for result in done), done
    for engine in survivors:
        engine.end()
    until(lambda: is_idle(daemon), "all slots back")
    assert daemon.stop() == 0, daemon.errors()
