"""Random verbs from several engine processes, some killed -9 with the daemon among them, against a
plain dictionary.

The pool is large enough for all chains, so nothing is evicted and the model knows exactly what must
be there.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from helpers import Daemon, EngineProcess, until

from vllm_kvpool.pool.admin import clear

CHAINS = ("a", "b", "c", "d")
MAX_BLOCKS = 24
STEPS = 120


class Model:
    """Which blocks (chain, number) are READY, and who writes or leases which."""

    def __init__(self) -> None:
        self.ready: set[tuple[str, int]] = set()
        self.writing: dict[EngineProcess, set[tuple[str, int]]] = {}
        self.leased: dict[EngineProcess, set[tuple[str, int]]] = {}

    def missing(self, chain: str, count: int) -> set[tuple[str, int]]:
        known = self.ready.union(*self.writing.values())
        return {(chain, i) for i in range(count)} - known

    def hit(self, chain: str, count: int) -> int:
        return next((i for i in range(count) if (chain, i) not in self.ready), count)

    def num_writing(self) -> int:
        return sum(map(len, self.writing.values()))


class Play:
    def __init__(
        self, daemon: Daemon, make_engine: Callable[..., EngineProcess], seed: int
    ) -> None:
        self.daemon, self.make_engine = daemon, make_engine
        self.draw = random.Random(seed)
        self.model = Model()
        self.engines = [make_engine() for _ in range(3)]

    def step(self) -> None:
        engine = self.draw.choice(self.engines)
        chain, count = self.draw.choice(CHAINS), self.draw.randint(1, MAX_BLOCKS)
        verbs = (self.store, self.prepare, self.complete, self.match, self.lease, self.release)
        rare = (self.kill_engine, self.kill_daemon, self.clear)
        verb = self.draw.choice(rare) if self.draw.random() < 0.08 else self.draw.choice(verbs)
        verb(engine, chain, count)

    def store(self, engine: EngineProcess, chain: str, count: int) -> None:
        if engine in self.model.writing:
            return  # a fake engine stores one chain at a time
        new = self.model.missing(chain, count)
        assert engine.do("store", chain, count) == len(new)
        self.model.ready |= new

    def prepare(self, engine: EngineProcess, chain: str, count: int) -> None:
        if engine in self.model.writing:
            return
        new = self.model.missing(chain, count)
        assert engine.do("prepare", chain, count) == len(new)
        self.model.writing[engine] = new

    def complete(self, engine: EngineProcess, _chain: str, _count: int) -> None:
        if engine not in self.model.writing:
            return
        engine.do("complete")
        self.model.ready |= self.model.writing.pop(engine)
        self.wait_writing()

    def match(self, engine: EngineProcess, chain: str, count: int) -> None:
        assert engine.do("match", chain, count) == self.model.hit(chain, count)

    def lease(self, engine: EngineProcess, chain: str, count: int) -> None:
        hit = self.model.hit(chain, count)
        assert engine.do("lease", chain, count) == hit
        self.model.leased.setdefault(engine, set()).update((chain, i) for i in range(hit))

    def release(self, engine: EngineProcess, _chain: str, _count: int) -> None:
        engine.do("release")
        self.model.leased.pop(engine, None)

    def kill_engine(self, engine: EngineProcess, _chain: str, _count: int) -> None:
        engine.end()
        self.model.writing.pop(engine, None)
        self.model.leased.pop(engine, None)
        self.engines.remove(engine)
        until(lambda: len(self.daemon.stats()["clients"]) == len(self.engines), "the reaper")
        self.engines.append(self.make_engine())
        self.wait_writing()

    def kill_daemon(self, _engine: EngineProcess, _chain: str, _count: int) -> None:
        self.daemon.kill()
        for engine in self.engines:
            chain, count = self.draw.choice(CHAINS), self.draw.randint(1, MAX_BLOCKS)
            assert engine.do("match", chain, count) == self.model.hit(chain, count)
        self.daemon.start()
        for engine in self.engines:
            until(lambda engine=engine: engine.do("connected"), "a new hello")  # type: ignore[misc]

    def clear(self, _engine: EngineProcess, _chain: str, _count: int) -> None:
        clear(self.daemon.name, str(self.daemon.shm_dir))
        self.model.ready &= set().union(*self.model.leased.values())

    def wait_writing(self) -> None:
        until(lambda: self.daemon.counter("writing") == self.model.num_writing(), "WRITING slots")

    def check(self) -> None:
        assert self.daemon.counter("ready") == len(self.model.ready)
        for chain in CHAINS:
            self.match(self.engines[0], chain, MAX_BLOCKS)


@pytest.fixture
def play(daemon: Daemon, make_engine: Callable[..., EngineProcess]) -> Callable[[int], Play]:
    return lambda seed: Play(daemon, make_engine, seed)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_pool_does_what_a_dictionary_does(play: Callable[[int], Play], seed: int) -> None:
    game = play(seed)
    for _ in range(STEPS):
        game.step()
        game.check()
    # `daemon` ends cleanly after this: it checks the integrity of its pool, and the fixture its
    # exit status
