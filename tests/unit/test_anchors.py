"""Which blocks the directory lists, and which it is asked for."""

from __future__ import annotations

import itertools

import pytest
from helpers import keys_of

from vllm_kvpool.pool.anchors import MAX_ASKED, anchors, asked, grain_of
from vllm_kvpool.types import KEY_BYTES


@pytest.mark.parametrize(
    ("fields", "grain"),
    [
        ({"block_tokens": "16"}, 8),
        ({"block_tokens": "128"}, 1),
        ({"block_tokens": "256"}, 1),
        ({"block_tokens": "0"}, 1),
        ({"block_tokens": "many"}, 1),
        ({"block_tokens": "\u00b2"}, 1),
        ({"block_tokens": "9" * 5_000}, 1),
        ({}, 1),
    ],
)
def test_grain(fields: dict[str, str], grain: int) -> None:
    assert grain_of(fields) == grain


def test_where_a_chain_is_cut_changes_nothing() -> None:
    """A host that stores a chain piece by piece lists the same blocks as one that asks for all."""
    keys = keys_of("chain", 400)
    listed = {key for _, key in anchors(keys, 8)}
    middle = 123 * KEY_BYTES
    pieces = [key for part in (keys[:middle], keys[middle:]) for _, key in anchors(part, 8)]
    assert set(pieces) == listed
    assert 25 < len(listed) < 80  # 50 in the mean, 6.6 the standard deviation


def test_places() -> None:
    keys = keys_of("chain", 100)
    assert [place for place, _ in anchors(keys, 1)] == list(range(100))
    for place, key in anchors(keys, 8):
        assert keys[place * KEY_BYTES : (place + 1) * KEY_BYTES] == key


@pytest.mark.parametrize("count", [0, 1, MAX_ASKED, MAX_ASKED + 1, 2_048, 10_000])
def test_a_long_chain_is_asked_for_in_steps(count: int) -> None:
    places = [place for place, _ in asked(keys_of("chain", count), 1)]
    assert places == sorted(set(places))
    assert places[-1:] == [count - 1][:count]
    assert places[:1] == [0][:count]
    step = -(-count // MAX_ASKED)
    even = [place for place in places if (count - 1 - place) % step == 0] if step else []
    assert len(even) == -(-count // step) if step else not even
    assert len(places) <= MAX_ASKED + step.bit_length()
    assert all(b <= 2 * a + 1 or b - a == step for a, b in itertools.pairwise(places))
