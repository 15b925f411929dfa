"""One trace for fleets of any size, at the same load per host: as many copies as it takes, each begun elsewhere.

    apart   each copy has keys of its own: so many applications, which share nothing with each other
    alike   all copies have the same keys and only their sessions differ: so many users say the very same things

Real fleets lie between. The trace compressed in time would be a third way, and says less: 256 hosts would have done
with its hour in 55 seconds, before any cache of theirs is full. A copy goes on from its beginning where the trace ends,
so the requests of its first turns follow those of its last ones there. A part of a copy is a part of its sessions.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks.routing_workloads import TRACE_BLOCK_TOKENS
from vllm_kvpool._native import derive_keys
from vllm_kvpool.router.keys import TEXT_BLOCK_TOKENS
from vllm_kvpool.router.rendezvous import MASK, hash64, mix
from vllm_kvpool.router.types import RouteRequest
from vllm_kvpool.types import KEY_BYTES

BLOCK_TOKENS = TEXT_BLOCK_TOKENS
"""Also what an entry of the directory stands for (`anchors.TOKENS_AN_ENTRY`), with vLLM's blocks of 16 tokens."""
SHARINGS = ("apart", "alike")


@dataclass(frozen=True, slots=True)
class TraceRequest:
    at_s: float
    keys: bytes
    """Of the prompt's full blocks."""
    stable: int
    session: int
    prompt_tokens: int
    output_tokens: int


class Prompt(NamedTuple):
    at_s: float
    keys: bytes
    request: RouteRequest
    output_tokens: int


def read(path: Path) -> list[TraceRequest]:
    """The format is told in `routing_workloads.from_trace`; each of its blocks becomes four."""
    return [_parsed(json.loads(line)) for line in path.read_text().splitlines()]


def _parsed(entry: dict[str, object]) -> TraceRequest:
    ids, prompt_tokens = entry["hash_ids"], entry["input_length"]
    assert isinstance(ids, list)
    assert isinstance(prompt_tokens, int)
    parts = range(TRACE_BLOCK_TOKENS // BLOCK_TOKENS)
    keys = [hashlib.sha256(b"%d %d" % (i, part)).digest() for i in ids for part in parts]
    return TraceRequest(
        at_s=float(entry["timestamp"]) / 1000,  # type: ignore[arg-type]
        keys=b"".join(keys[: prompt_tokens // BLOCK_TOKENS]),
        stable=hash64(b"stable %d" % ids[0]),
        session=hash64(b"session %d" % ids[min(1, len(ids) - 1)]),
        prompt_tokens=prompt_tokens,
        output_tokens=int(entry["output_length"]),  # type: ignore[call-overload]
    )


def prompts(
    trace: Sequence[TraceRequest], copies: float, sharing: str, seed: int, duration_s: float
) -> Iterator[Prompt]:
    """By time, from 0 to `duration_s`, which may be longer than the trace."""
    assert sharing in SHARINGS
    draw = random.Random(seed)
    streams = [_copy(trace, draw.random(), copy, sharing) for copy in range(int(copies))]
    if part := copies - int(copies):
        some = [request for request in trace if mix(request.session, seed) < part * MASK]
        streams.append(_copy(some, draw.random(), int(copies), sharing))
    for prompt in heapq.merge(*streams, key=lambda prompt: prompt.at_s):
        if prompt.at_s >= duration_s:
            return
        yield prompt


def _copy(
    trace: Sequence[TraceRequest], begin: float, number: int, sharing: str
) -> Iterator[Prompt]:
    """For ever. `begin`: with which part of the trace."""
    length_s = trace[-1].at_s + 1
    name = hash64(b"copy %d" % number)
    mask = hashlib.sha256(b"copy %d" % number).digest() if sharing == "apart" else bytes(KEY_BYTES)
    first = next((i for i, r in enumerate(trace) if r.at_s >= begin * length_s), 0)
    late_s = -begin * length_s
    while True:
        for request in trace[first:]:
            yield _prompt(request, request.at_s + late_s, mask, name, sharing)
        first, late_s = 0, late_s + length_s


def _prompt(request: TraceRequest, at_s: float, mask: bytes, name: int, sharing: str) -> Prompt:
    keys = derive_keys(mask, request.keys)
    routed = RouteRequest(
        model="trace",
        stable=mix(request.stable, name) if sharing == "apart" else request.stable,
        session=mix(request.session, name),
        session_source="header",
        blocks=tuple(tags(keys)),
        stable_tokens=min(TRACE_BLOCK_TOKENS, request.prompt_tokens),
        prompt_tokens=request.prompt_tokens,
    )
    return Prompt(at_s, keys, routed, request.output_tokens)


def tags(keys: bytes) -> array[int]:
    """64 bits of each key: what names a block for routers and engines."""
    return array("Q", keys)[:: KEY_BYTES // 8]
