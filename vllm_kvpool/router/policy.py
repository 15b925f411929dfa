"""The contract of a policy: which replica takes a request.

The proxy calls, for each request and in this order:

    request = policy.with_tokens(request, ids)             only where `policy.needs_tokens`, ids known
    decision = policy.decide(request, fleet, now)          changes nothing; None: nobody may take it
    policy.dispatched(request, replica_id, now)            for each replica that it is really sent to
    policy.finished(request, replica_id, cached_tokens, now)   its answer is complete

and when it comes to know of it

    policy.resize(replica_id, cache_tokens)                how much a replica's cache holds; vLLM says
                                                           it in `vllm:cache_config_info`
    policy.forget(replica_id)                              it has restarted, or is gone

`now` is in seconds of any clock that never goes back. A policy does no I/O, reads no clock, and draws
nothing at random: two that were told the same decide the same, and the hash layers decide the same
without having been told anything.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

from vllm_kvpool.router.fleet import Fleet, Member
from vllm_kvpool.router.types import Decision, Hits, Replica, RouteRequest

REASONS = {
    "turn": "the next in turn",
    "load": "the least loaded",
    "session": "the session's own replica",
    "overflow": "that one carries more than its part of the load: the next in the session's order",
    "tree": "holds most of the prompt, by what was sent there",
    "events": "holds most of the prompt, by its own KV events",
}
"""What `Decision.reason` may be."""

OUTPUT_TOKENS = 256
"""What an answer is taken for. Clients set `max_tokens` far above what they get."""
NO_HITS = Hits()


class Policy(ABC):
    name: str
    needs_tokens = False
    """Whether `RouteRequest.tokens` is worth a call to an engine's `/tokenize`."""

    def __init__(self, seed: int = 0) -> None:  # noqa: B027
        """Policies with different seeds choose differently; all routers of a fleet share one."""

    def with_tokens(self, request: RouteRequest, tokens: Sequence[int]) -> RouteRequest:
        """The request with its prompt's token ids made use of. ValueError: these are none."""
        return request

    @abstractmethod
    def decide(self, request: RouteRequest, fleet: Fleet, now: float) -> Decision | None: ...

    def dispatched(self, request: RouteRequest, replica_id: str, now: float) -> None:  # noqa: B027
        """The request was sent there."""

    def finished(  # noqa: B027
        self, request: RouteRequest, replica_id: str, cached_tokens: int | None, now: float
    ) -> None:
        """Its answer is complete; `cached_tokens` as the engine reports them, None where it does not."""

    def forget(self, replica_id: str) -> None:  # noqa: B027
        """Its cache is lost."""

    def resize(self, replica_id: str, cache_tokens: int) -> None:  # noqa: B027
        """Its cache holds so many tokens."""

    def tables(self) -> dict[str, int]:
        """Entries of each table that it keeps, for metrics: all of them are bounded."""
        return {}

    def check_integrity(self) -> None:  # noqa: B027
        """Assert what the policy states about its own state."""


def weight(request: RouteRequest) -> int:
    """Tokens that a request weighs where no hits are known of."""
    return request.prompt_tokens + OUTPUT_TOKENS


def fallbacks(order: Iterable[Member], chosen: Member) -> tuple[Replica, ...]:
    return tuple([member.replica for member in order if member is not chosen])
