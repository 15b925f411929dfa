"""The event index holds what the engine holds, and says less than it could rather than what is not so."""

from __future__ import annotations

from array import array

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvpool.router import event_wire
from vllm_kvpool.router.event_index import EventIndex, Trust
from vllm_kvpool.router.event_wire import Batch, Cleared, Event, Removed, Stored

SIZE = 4


def prompt(*turns: int) -> list[int]:
    return [turn * 10 + i for turn in turns for i in range(SIZE)]


def stored(first: int, tokens: list[int], seed: str = "") -> Stored:
    """Blocks of `tokens` from block `first` on, with the engine's own kind of hashes."""
    names = [hash((seed, *tokens[: end * SIZE])) for end in range(1, len(tokens) // SIZE + 1)]
    parent = names[first - 1] if first else None
    extras = [b""] * (len(names) - first)
    return Stored(list(names[first:]), parent, array("I", tokens[first * SIZE :]), SIZE, "", extras)


def removed(tokens: list[int], last: int, seed: str = "") -> Removed:
    names = stored(0, tokens, seed).hashes
    return Removed(names[len(names) - last :])


def batch(*events: Event, time_s: float = 1.0) -> Batch:
    return Batch(time_s, list(events))


def depth(index: EventIndex, tokens: list[int], replica_id: str = "a") -> int:
    index.check_integrity()
    return index.depth(index.chain("m", tokens), replica_id)


def fed(*batches: Batch) -> EventIndex:
    index = EventIndex()
    for sequence, one in enumerate(batches):
        assert index.received("a", sequence, one)
    return index


def test_blocks_come_and_go() -> None:
    index = fed(batch(stored(0, prompt(1, 2))), batch(stored(2, prompt(1, 2, 3))))
    assert index.trust("a") is Trust.EXACT
    assert depth(index, prompt(1, 2, 3, 4)) == 3
    assert depth(index, prompt(1, 5)) == 1
    index.received("a", 2, batch(removed(prompt(1, 2, 3), last=2)))
    assert depth(index, prompt(1, 2, 3)) == 1
    index.received("a", 3, batch(Cleared()))
    assert depth(index, prompt(1)) == 0


def test_engines_with_other_hashes_hold_the_same_blocks() -> None:
    index = EventIndex()
    index.received("a", 0, batch(stored(0, prompt(1, 2), seed="x")))
    index.received("b", 0, batch(stored(0, prompt(1), seed="y")))
    depths = index.depths(index.chain("m", prompt(1, 2)))
    assert [(depth, list(ids)) for depth, ids in depths] == [(2, ["a"]), (1, ["b"])]


def test_adapters_and_salts_are_kept_apart() -> None:
    event = stored(0, prompt(1))
    index = fed(
        batch(msgspec.structs.replace(event, lora_name="lora")),
        batch(msgspec.structs.replace(event, hashes=[7], extras=[b"salt"])),
    )
    assert depth(index, prompt(1)) == 0
    assert index.depth(index.chain("lora", prompt(1)), "a") == 1


def test_a_gap_waits_for_its_replay() -> None:
    index = fed(batch(stored(0, prompt(1))))
    missed, late = batch(stored(1, prompt(1, 2))), batch(stored(2, prompt(1, 2, 3)))
    assert not index.received("a", 2, late)
    assert index.trust("a") is Trust.REPLAY
    assert index.next_sequence("a") == 1
    index.replayed("a", [(1, missed), (2, late)])
    assert index.trust("a") is Trust.EXACT
    assert depth(index, prompt(1, 2, 3)) == 3
    assert index.received("a", 2, late)  # the live one, once more
    assert depth(index, prompt(1, 2, 3)) == 3


def test_a_gap_that_no_replay_closes_forgets_everything() -> None:
    index = fed(batch(stored(0, prompt(1))), batch(stored(1, prompt(1, 2))))
    late = batch(stored(0, prompt(7)))
    assert not index.received("a", 9, late)
    index.replayed("a", [(9, late)])
    assert index.trust("a") is Trust.PARTIAL
    assert depth(index, prompt(1)) == 0
    assert depth(index, prompt(7)) == 1


@pytest.mark.parametrize("answered", [True, False])
def test_a_gap_without_an_answer_takes_what_comes(answered: bool) -> None:
    index = fed(batch(stored(0, prompt(1))))
    assert not index.received("a", 5, batch(stored(0, prompt(2))))
    if answered:
        index.replayed("a", [])
    else:
        index.not_replayed("a")
    assert index.trust("a") is Trust.PARTIAL
    assert depth(index, prompt(1)) == 0
    assert index.received("a", 8, batch(stored(0, prompt(3))))
    assert depth(index, prompt(3)) == 1


def test_an_engine_that_has_published_nothing_is_known_to_be_empty() -> None:
    index = EventIndex()
    index.replayed("a", [])
    assert index.trust("a") is Trust.EXACT
    assert index.received("a", 0, batch(stored(0, prompt(1))))
    assert index.trust("a") is Trust.EXACT


def test_a_cleared_cache_is_exactly_known_again() -> None:
    index = EventIndex()
    index.not_replayed("a")
    index.received("a", 50, batch(stored(0, prompt(1))))
    assert index.trust("a") is Trust.PARTIAL
    index.received("a", 51, batch(Cleared()))
    assert index.trust("a") is Trust.EXACT


def test_a_restarted_engine_begins_anew() -> None:
    index = fed(batch(stored(0, prompt(1)), time_s=1.0), batch(time_s=2.0))
    assert index.received("a", 0, batch(stored(0, prompt(2)), time_s=9.0))
    assert index.trust("a") is Trust.EXACT
    assert depth(index, prompt(1)) == 0
    assert depth(index, prompt(2)) == 1


def test_blocks_of_another_size_are_not_understood() -> None:
    index = fed(batch(stored(0, prompt(1))))
    odd = Stored([1], None, array("I", [1, 2]), 2, "", [b""])
    index.received("b", 0, batch(odd))
    assert index.trust("b") is Trust.NONE
    assert index.trust("a") is Trust.EXACT


def test_children_of_unknown_parents_are_left_out() -> None:
    index = EventIndex()
    index.not_replayed("a")
    index.received("a", 3, batch(stored(0, prompt(9))))
    index.received("a", 4, batch(stored(1, prompt(1, 2))))
    assert depth(index, prompt(1, 2)) == 0


paths = st.lists(st.integers(1, 3), min_size=1, max_size=4)


@given(st.lists(st.tuples(st.booleans(), paths), max_size=25), paths)
def test_any_order_of_events_gives_what_the_engine_holds(
    told: list[tuple[bool, list[int]]], asked: list[int]
) -> None:
    """Leaves go first, as engines do it."""
    index, held = EventIndex(), set[tuple[int, ...]]()
    for sequence, (store, path) in enumerate(told):
        tokens, whole = prompt(*path), tuple(path)
        if store:
            first = next((i for i in range(len(whole)) if whole[: i + 1] not in held), None)
            events: list[Event] = [] if first is None else [stored(first, tokens)]
            held |= {whole[: i + 1] for i in range(len(whole))}
        elif whole in held and not any(h[:-1] == whole for h in held):
            events = [removed(tokens, last=1)]
            held.discard(whole)
        else:
            events = []
        index.received("a", sequence, batch(*events))
    index.received("a", len(told), batch(stored(0, prompt(9))))  # so that a block's size is known
    expected = next((i for i in range(len(asked)) if tuple(asked[: i + 1]) not in held), len(asked))
    assert depth(index, prompt(*asked)) == expected


# the wire -----------------------------------------------------------------------------------------

STORED_MAP = {
    "type": "BlockStored", "block_hashes": [1, 2], "parent_block_hash": None,
    "token_ids": [1, 2, 3, 4], "block_size": 2, "lora_id": None, "medium": "GPU", "lora_name": None,
    "extra_keys": [["salt"], None], "group_idx": 0, "some_later_field": 1,
}  # fmt: skip
STORED_ARRAY = ["BlockStored", [1, 2], None, [1, 2, 3, 4], 2, None, "GPU"]


def decode(*events: object) -> list[Event]:
    return event_wire.decode(msgspec.msgpack.encode([1.5, events, 0])).events


def test_both_forms_of_events_are_read() -> None:
    by_name, by_place = decode(STORED_MAP, STORED_ARRAY)
    assert isinstance(by_name, Stored)
    assert isinstance(by_place, Stored)
    assert by_name.hashes == by_place.hashes == [1, 2]
    assert by_name.extras[0] != b""
    assert by_name.extras[1] == by_place.extras[0] == b""
    assert decode(["BlockRemoved", [b"long hash"], "GPU"]) == [Removed([b"long hash"])]
    assert decode(["AllBlocksCleared"], {"type": "AllBlocksCleared"}) == [Cleared(), Cleared()]


def test_other_tiers_and_groups_do_not_count() -> None:
    assert decode(
        {**STORED_MAP, "medium": "CPU"}, {**STORED_MAP, "group_idx": 1}, {"type": "NewInTown"},
        ["BlockRemoved", [1], "STORAGE"],
    ) == []  # fmt: skip


BAD = [
    b"", b"\xc1", msgspec.msgpack.encode(3), msgspec.msgpack.encode([1.0]),
    msgspec.msgpack.encode(["x", [], 0]), msgspec.msgpack.encode([1.0, [3], 0]),
    msgspec.msgpack.encode([1.0, [{"type": "BlockStored"}], 0]),
    msgspec.msgpack.encode([1.0, [{**STORED_MAP, "token_ids": [1]}], 0]),
    msgspec.msgpack.encode([1.0, [{**STORED_MAP, "block_size": 0}], 0]),
    msgspec.msgpack.encode([1.0, [{**STORED_MAP, "extra_keys": [None]}], 0]),
    msgspec.msgpack.encode([1.0, [{**STORED_MAP, "token_ids": [-1, 2, 3, 4]}], 0]),
    msgspec.msgpack.encode([1.0, [{**STORED_MAP, "block_hashes": [[1], [2]]}], 0]),
]  # fmt: skip


@pytest.mark.parametrize("payload", BAD, ids=range(len(BAD)))
def test_what_is_no_batch_is_refused(payload: bytes) -> None:
    with pytest.raises(ValueError, match="not a batch of KV events"):
        event_wire.decode(payload)


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(payload: bytes) -> None:
    try:
        event_wire.decode(payload)
    except ValueError:
        return
