"""Values that the policies and the proxy share. No behaviour."""

from __future__ import annotations

from enum import Enum

import msgspec


class Replica(msgspec.Struct, frozen=True):
    """One engine, or one data-parallel rank of one."""

    id: str
    """Names it for routers, metrics and people: affinity hangs on it, not on the address."""
    url: str
    """`http://host:port`, no slash at the end."""
    dp_rank: int | None = None
    """Sent as header `X-data-parallel-rank`."""


class ReplicaState(Enum):
    ACCEPTING = "accepting"
    DRAINING = "draining"
    """Keeps the sessions that it has, for a while; takes no new ones."""
    OUT = "out"
    """Unhealthy or ejected: takes nothing."""


class RouteRequest(msgspec.Struct, frozen=True, gc=False):
    """What a policy knows of a request. Made by `keys.route_request`; all hashes are 64 bits of
    blake2b, so that every router computes the same ones."""

    model: str
    stable: int
    """Hash of model and stable prefix: system message and tools. Names the *task*."""
    session: int
    """Hash of the session key: header, cookie or body field, else system + first user message."""
    session_source: str
    """Where `session` comes from: `header`, `cookie`, the body field's name, or `fingerprint`."""
    blocks: tuple[int, ...]
    """Chained hashes of the prompt's *text blocks* (`keys.TEXT_BLOCK_BYTES` each, the rest left
    off): equal at i means that all text up to the end of block i is equal."""
    stable_tokens: int
    prompt_tokens: int
    """Estimates from the length of the text."""
    tokens: tuple[int, ...] | None = None
    """The prompt's token ids where the body holds them."""
    token_blocks: tuple[int, ...] = ()
    """Chained hashes of the blocks of its tokens, as `token_hashes` makes them; empty where no policy
    asked for them."""


class Hits(msgspec.Struct, frozen=True, gc=False):
    """Prompt tokens predicted to be cached on the chosen replica."""

    stable: int = 0
    """Tier 1: of the stable prefix, which all sessions of a task share."""
    session: int = 0
    """Tier 2: behind it, which only this session has."""

    @property
    def total(self) -> int:
        return self.stable + self.session


class Decision(msgspec.Struct, frozen=True, gc=False):
    """Where a request goes, and why."""

    replica: Replica
    reason: str
    """One of `policy.REASONS`: for the response header and as a metric's label."""
    hits: Hits
    load_tokens: int
    """What the request weighs on the replica: for `Fleet.add_load`."""
    fallbacks: tuple[Replica, ...]
    """The other replicas that may take it, best first. Rendezvous order, so that the sessions of a
    dead replica spread over all others."""
