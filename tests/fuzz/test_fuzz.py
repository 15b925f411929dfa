"""A few seconds of fuzzing: what is kept, and some hundred new inputs. `long_run` goes on from there."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz.all_targets import TARGETS
from tests.fuzz.frames import Message, pack, unpack
from tests.fuzz.mutator import mutate
from tests.fuzz.target import Target

NEW_INPUTS = 300
MAX_BYTES = 16_384


@pytest.fixture(params=list(TARGETS))
def target(request: pytest.FixtureRequest, shm_dir: Path) -> Iterator[Target]:
    made: Target = TARGETS[request.param](shm_dir)
    yield made
    made.close()


def test_seeds_corpus_and_new_inputs(target: Target) -> None:
    """The same ones each time. Where one fails: `target.run(data)` with what is shown."""
    inputs = target.seeds() + target.corpus()
    draw = random.Random(7)
    inputs += [mutate(draw.choice(inputs), MAX_BYTES, seed) for seed in range(NEW_INPUTS)]
    for data in inputs:
        target.run(data)


def test_frames() -> None:
    messages = [Message([b"one"]), Message([b"", b"two"], other=True), Message([b"three"])]
    assert unpack(pack(messages)) == messages
    draw = random.Random(3)
    for _ in range(1_000):
        data = draw.randbytes(draw.randrange(40))
        assert unpack(pack(unpack(data))) == unpack(data)
