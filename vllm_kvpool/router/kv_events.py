"""As `task`, with exact knowledge of caches where the engines publish KV events.

A replica is believed by its events as far as `EventIndex` trusts them; of all others, and of prompts
whose tokens nobody knows, the approximate tree tells. The subscriber feeds `events`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import msgspec

from vllm_kvpool.router.event_index import EventIndex, Trust
from vllm_kvpool.router.task import Task
from vllm_kvpool.router.types import RouteRequest


class KvEvents(Task):
    name = "kv_events"
    needs_tokens = True

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.events = EventIndex()

    def with_tokens(self, request: RouteRequest, tokens: Sequence[int]) -> RouteRequest:
        chain = self.events.chain(request.model, tokens)
        return msgspec.structs.replace(request, token_blocks=chain, prompt_tokens=len(tokens))

    def _hit_tokens(self, request: RouteRequest, replica_id: str) -> int:
        trust = self.events.trust(replica_id) if request.token_blocks else Trust.NONE
        known = 0
        if trust in (Trust.EXACT, Trust.PARTIAL):
            known = self.events.depth(request.token_blocks, replica_id) * self.events.block_tokens
        if trust is Trust.EXACT:
            return known
        return max(known, super()._hit_tokens(request, replica_id))

    def _holders(
        self, request: RouteRequest, above: int
    ) -> Iterator[tuple[int, Collection[str], str]]:
        """By events, and by the tree those that have told no, or not all, events."""
        if not request.token_blocks:
            yield from super()._holders(request, above)
            return
        size = self.events.block_tokens
        found: list[tuple[int, Collection[str], str]] = [
            (depth * size, ids, "events")
            for depth, ids in self.events.depths(request.token_blocks, above // size)
        ]
        for tokens, ids, reason in super()._holders(request, above):
            others = [name for name in ids if self.events.trust(name) is not Trust.EXACT]
            if others:
                found.append((tokens, others, reason))
        yield from sorted(found, key=lambda entry: -entry[0])

    def forget(self, replica_id: str) -> None:
        super().forget(replica_id)
        self.events.forget(replica_id)

    def tables(self) -> dict[str, int]:
        return {**super().tables(), "events": len(self.events)}

    def check_integrity(self) -> None:
        super().check_integrity()
        self.events.check_integrity()
