"""The tree says what an LRU of the replica's size would hold, for any prompts, and stays in its bounds."""

from __future__ import annotations

from collections import OrderedDict

from hypothesis import given
from hypothesis import strategies as st

from vllm_kvpool.router.rendezvous import mix
from vllm_kvpool.router.tree import CacheTree


def chain(path: list[int]) -> tuple[int, ...]:
    blocks, parent = [], 7
    for turn in path:
        parent = mix(parent, turn + 1)
        blocks.append(parent)
    return tuple(blocks)


prompts = st.lists(st.integers(0, 2), min_size=0, max_size=10).map(chain)
steps = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c"]), prompts, st.sampled_from(["touch"] * 9 + ["forget"])
    ),
    max_size=40,
)


class Reference:
    """One plain LRU."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.blocks: OrderedDict[int, None] = OrderedDict()

    def touch(self, blocks: tuple[int, ...]) -> None:
        for block in reversed(blocks):
            self.blocks[block] = None
            self.blocks.move_to_end(block)
        while len(self.blocks) > self.capacity:
            self.blocks.popitem(last=False)

    def depth(self, blocks: tuple[int, ...]) -> int:
        return next((i for i, b in enumerate(blocks) if b not in self.blocks), len(blocks))


@given(steps, st.integers(1, 12), prompts)
def test_depths_are_those_of_an_lru(
    told: list[tuple[str, tuple[int, ...], str]], capacity: int, asked: tuple[int, ...]
) -> None:
    tree = CacheTree(default_blocks=capacity)
    references: dict[str, Reference] = {}
    for replica_id, blocks, what in told:
        if what == "forget":
            tree.forget(replica_id)
            references.pop(replica_id, None)
        else:
            tree.touch(replica_id, blocks)
            references.setdefault(replica_id, Reference(capacity)).touch(blocks)
        tree.check_integrity()
    for replica_id, reference in references.items():
        assert tree.depth(asked, replica_id) == reference.depth(asked)
    expected = {name: reference.depth(asked) for name, reference in references.items()}
    found = {name: depth for depth, names in tree.depths(asked) for name in names}
    assert found == {name: depth for name, depth in expected.items() if depth}
    deepest_first = [depth for depth, _ in tree.depths(asked)]
    assert deepest_first == sorted(set(deepest_first), reverse=True)


def test_a_smaller_cache_forgets_its_leaves_at_once() -> None:
    tree = CacheTree()
    blocks = chain([0] * 10)
    tree.touch("a", blocks)
    tree.resize("a", 4)
    tree.check_integrity()
    assert tree.depth(blocks, "a") == 4


def test_replicas_that_come_and_go_leave_nothing_behind() -> None:
    tree = CacheTree()
    for number in range(200):
        tree.resize(f"r{number}", 8)
        tree.touch(f"r{number}", chain([number % 3] * 12))
        tree.forget(f"r{number}")
        tree.check_integrity()
    assert not list(tree.depths(chain([0] * 12)))
    assert tree._index.bit("another") == 1
