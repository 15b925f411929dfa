"""How a slot is divided: a shard for each worker, but one for all that hold the same bytes.

With MLA the KV of a token is one vector, not one a head, and every tensor-parallel rank computes it whole. Then a slot
holds one copy: each rank loads all of it, and the ranks share out the blocks of a store, so that each GPU's link moves
its part of the bytes. A block is READY when all ranks have reported, as ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vllm_kvpool.connector.metadata import Shard, WorkerLayout


@dataclass(frozen=True)
class SlotDivision:
    slot_bytes: int
    layouts: tuple[str, ...]
    """Of the shards, in their order: for the namespace."""
    shards: dict[str, Shard]
    """By worker."""


def divide_slot(layouts: Mapping[tuple[int, int], WorkerLayout]) -> SlotDivision:
    """`layouts`: by (pipeline rank, tensor rank), which is the order of the shards."""
    holders: dict[tuple[int, int | str], list[WorkerLayout]] = {}
    for stage, rank in sorted(layouts):
        layout = layouts[stage, rank]
        bytes_of = layout.layout if layout.replicated else rank
        holders.setdefault((stage, bytes_of), []).append(layout)
    offset, shards = 0, {}
    for equal in holders.values():
        for turn, layout in enumerate(equal):
            shards[layout.worker] = Shard(offset, turn, len(equal))
        offset += equal[0].shard_bytes
    return SlotDivision(offset, tuple(equal[0].layout for equal in holders.values()), shards)
