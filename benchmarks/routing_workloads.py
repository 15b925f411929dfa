"""Requests to route, from a trace or drawn at random, as a router would see them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vllm_kvpool.router.keys import TEXT_BLOCK_TOKENS
from vllm_kvpool.router.rendezvous import hash64, mix
from vllm_kvpool.router.types import RouteRequest

TRACE_BLOCK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Arrival:
    at_s: float
    request: RouteRequest
    output_tokens: int


def from_trace(path: Path) -> list[Arrival]:
    """Lines with `timestamp` (ms), `input_length`, `output_length`, `hash_ids`: the format of the traces in
    github.com/kvcache-ai/Mooncake (FAST '25). All prompts of its conversation trace begin with the same block,
    which is taken for the stable prefix; the second block names the session."""
    arrivals = []
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        ids, prompt_tokens = entry["hash_ids"], entry["input_length"]
        per_id = TRACE_BLOCK_TOKENS // TEXT_BLOCK_TOKENS
        blocks = [mix(hash64(b"%d" % i), part) for i in ids for part in range(per_id)]
        request = RouteRequest(
            model="trace",
            stable=hash64(b"stable %d" % ids[0]),
            session=hash64(b"session %d" % ids[min(1, len(ids) - 1)]),
            session_source="fingerprint",
            blocks=tuple(blocks[: prompt_tokens // TEXT_BLOCK_TOKENS]),
            stable_tokens=min(TRACE_BLOCK_TOKENS, prompt_tokens),
            prompt_tokens=prompt_tokens,
        )
        arrivals.append(Arrival(entry["timestamp"] / 1000, request, entry["output_length"]))
    return arrivals


def tasks(
    seed: int, num_tasks: int = 40, num_sessions: int = 3_000, duration_s: float = 1_800
) -> list[Arrival]:
    """Agents: each session belongs to a task with a stable prefix of 4k to 16k tokens, and has one to six
    turns that add 200 to 2,000 tokens each. Task k is drawn with a chance of 1/k."""
    draw = random.Random(seed)
    stable_blocks = [draw.randrange(32, 128) for _ in range(num_tasks)]
    chances = [1 / (rank + 1) for rank in range(num_tasks)]
    arrivals: list[Arrival] = []
    for session in range(num_sessions):
        task = draw.choices(range(num_tasks), chances)[0]
        arrivals += _session(draw, session, task, stable_blocks[task], duration_s)
    return sorted(arrivals, key=lambda arrival: arrival.at_s)


def _session(
    draw: random.Random, session: int, task: int, stable_blocks: int, duration_s: float
) -> Iterator[Arrival]:
    blocks = [mix(hash64(b"task %d" % task), part) for part in range(stable_blocks)]
    at_s = draw.uniform(0, duration_s)
    for _ in range(draw.randint(1, 6)):
        added = draw.randint(200, 2_000) // TEXT_BLOCK_TOKENS + 1
        name = hash64(b"own %d" % session)
        blocks += [mix(name, len(blocks) + part) for part in range(added)]
        request = RouteRequest(
            model="tasks",
            stable=hash64(b"stable %d" % task),
            session=hash64(b"session %d" % session),
            session_source="header",
            blocks=tuple(blocks),
            stable_tokens=stable_blocks * TEXT_BLOCK_TOKENS,
            prompt_tokens=len(blocks) * TEXT_BLOCK_TOKENS + draw.randrange(1, TEXT_BLOCK_TOKENS),
        )
        yield Arrival(at_s, request, draw.randint(20, 400))
        at_s += draw.uniform(5, 60)
