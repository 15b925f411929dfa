"""What a decision costs: `route_request`, `decide` and `dispatched`, by policy, in microseconds.

    python -m benchmarks.bench_decide [--replicas 64] [--json FILE]

Chat bodies of 6 KB by 2,000 sessions of 20 tasks, in random order (`--seed`), with about four requests in flight a
replica. A third of the requests are first turns: their rendezvous orders are not cached yet. `long` is one body of
512 KB (128k tokens). Times are CPU time of the thread, so that other processes do not count as such; the garbage
collector is on.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.report import percentile, write_json
from vllm_kvpool.router.fleet import Fleet, Load
from vllm_kvpool.router.keys import route_request
from vllm_kvpool.router.policies import POLICIES, make_policy
from vllm_kvpool.router.types import Replica, RouteRequest

BODY_BYTES = 6_000
SESSIONS = 2_000
TURNS = 3


def bodies(seed: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    turns = [(session, turn) for session in range(SESSIONS) for turn in range(TURNS)]
    draw.shuffle(turns)
    return [_body(session, turn + 1) for session, turn in turns]


def _body(session: int, turns: int) -> dict[str, Any]:
    system = f"You are assistant number {session % 20}. " * 60
    each = (BODY_BYTES - len(system)) // (2 * TURNS)
    messages = [{"role": "system", "content": system}]
    for turn in range(turns):
        text = f"session {session} turn {turn} ".ljust(each, "x")
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    return {"model": "m", "messages": messages[:-1], "stream": True}


def timed_us(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.thread_time_ns()
    result = call()
    return (time.thread_time_ns() - start) / 1e3, result


def measure(name: str, requests: list[RouteRequest], replicas: int) -> dict[str, list[float]]:
    fleet = Fleet(tuple(Replica(f"r{i:02}", f"http://r{i:02}") for i in range(replicas)))
    policy = make_policy(name)
    in_flight: deque[Load] = deque()
    times: dict[str, list[float]] = {"decide": [], "dispatched": []}
    for number, request in enumerate(requests):
        now = number / 1_000
        took, decision = timed_us(lambda: policy.decide(request, fleet, now))  # noqa: B023
        times["decide"].append(took)
        in_flight.append(fleet.add_load(decision.replica.id, decision.load_tokens))
        took, _ = timed_us(lambda: policy.dispatched(request, decision.replica.id, now))  # noqa: B023
        times["dispatched"].append(took)
        if len(in_flight) > 4 * replicas:
            fleet.release_load(in_flight.popleft())
    return times


def row(name: str, times: list[float]) -> dict[str, Any]:
    p50, p99 = percentile(times, 0.5), percentile(times, 0.99)
    print(f"| {name} | {p50:.1f} | {p99:.1f} |", flush=True)
    return {"what": name, "p50_us": p50, "p99_us": p99}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--replicas", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    parsed = bodies(args.seed)
    print("| us | p50 | p99 |\n|---|---:|---:|")
    made = [timed_us(lambda body=body: route_request(body, {})) for body in parsed]
    rows = [row("route_request, 6 KB", [took for took, _ in made])]
    long = {"model": "m", "messages": [{"role": "user", "content": "x" * 512_000}]}
    rows.append(
        row(
            "route_request, long", [timed_us(lambda: route_request(long, {}))[0] for _ in range(50)]
        )
    )
    requests = [request for _, request in made]
    for name in POLICIES:
        for part, times in measure(name, requests, args.replicas).items():
            rows.append(row(f"{name}: {part}", times))
    if args.json:
        write_json(args.json, {"replicas": args.replicas, "seed": args.seed, "rows": rows})


if __name__ == "__main__":
    main()
