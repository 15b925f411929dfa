"""Everything at once: two engines on one small pool, and somebody who breaks things at random.

No answer may differ, no step may attend to a wrong byte, and nothing may be left over.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from connector.mini_engine import BLOCK, MiniEngine, expected_output, prompt_of
from helpers import Daemon

from vllm_kvpool.types import unpack_refs

MakeEngine = Callable[..., MiniEngine]
STEPS = 2_000


class Breaker:
    def __init__(self, draw: random.Random, engines: list[MiniEngine], daemon: Daemon) -> None:
        self.draw, self.engines, self.daemon = draw, engines, daemon
        self.alive: dict[tuple[int, str], tuple[list[int], int]] = {}
        self.paused = False
        self.num_checked = 0

    def act(self) -> None:
        action = self.draw.choices(
            [self.add, self.abort, self.flip, self.pause, self.kill, self.reset],
            [60, 10, 6, 2, 1, 1],
        )[0]
        action()

    def add(self) -> None:
        number = self.draw.randrange(len(self.engines))
        prompt = prompt_of(self.draw.randrange(12), self.draw.randrange(1, 14 * BLOCK))
        prompt += prompt_of(self.draw.randrange(3), self.draw.randrange(4 * BLOCK))
        max_tokens = self.draw.choice([1, 3, BLOCK, 2 * BLOCK + 1])
        hints: dict[str, Any] = {}
        if self.draw.random() < 0.2:
            hints = {"pin": True, "ttl_s": 1}
        request_id = self.engines[number].add(prompt, max_tokens, hints=hints)
        self.alive[number, request_id] = (prompt, max_tokens)

    def abort(self) -> None:
        if self.alive:
            number, request_id = self.draw.choice(list(self.alive))
            del self.alive[number, request_id]
            self.engines[number].abort(request_id)

    def flip(self) -> None:
        """A byte of some block that is in the pool."""
        scheduler = self.engines[0].connector._scheduler
        client = scheduler._link.client
        for record in scheduler._records.values():
            refs = client.match_prefix(record.keys(scheduler._link.mask))
            for ref in unpack_refs(refs)[-1:]:
                client.view.payload(ref)[self.draw.randrange(6_000)] ^= 1 << self.draw.randrange(8)

    def pause(self) -> None:
        if self.paused:
            self.daemon.resume()
        else:
            self.daemon.pause()
        self.paused = not self.paused

    def kill(self) -> None:
        if not self.paused:
            self.daemon.kill()
            self.daemon.start()

    def reset(self) -> None:
        self.draw.choice(self.engines).connector.reset_cache()

    def check_finished(self) -> None:
        for (number, request_id), (prompt, max_tokens) in list(self.alive.items()):
            engine = self.engines[number]
            if engine.status(request_id) is None and not engine.busy:
                assert engine.outputs[request_id] == expected_output(prompt, max_tokens)
                del self.alive[number, request_id]
                self.num_checked += 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_soak(make_engine: MakeEngine, daemon: Daemon, seed: int) -> None:
    sizes = {"num_blocks": 64, "max_tokens": 96, "max_num_seqs": 8}
    engines = [make_engine(**sizes), make_engine(asynchronous=True, **sizes)]
    for engine in engines:
        engine.generate(prompt_of(99, 2 * BLOCK), 1)
        engine.lose_patience()
    draw = random.Random(seed)
    breaker = Breaker(draw, engines, daemon)
    for _ in range(STEPS):
        if draw.random() < 0.3 and len(breaker.alive) < 20:
            breaker.act()
        for engine in engines:
            engine.delay_stores(draw.randrange(3))
            engine.step()
        breaker.check_finished()
    if breaker.paused:
        breaker.pause()
    for engine in engines:
        engine.run()
        engine.connector._scheduler._link.client.view.check_integrity()
    breaker.check_finished()
    assert not breaker.alive
    assert breaker.num_checked > 100
    for engine in engines:
        assert engine.free_blocks == 63
        assert engine.connector._scheduler._link.client.view.leased_slots == 0
        assert engine.stats["hit_blocks"] > 0
    failed = {reason for engine in engines for reason in engine.stats if "load_failed" in reason}
    print(breaker.num_checked, [dict(engine.stats) for engine in engines])
    assert "load_failed_blocks:checksum" in failed
