"""Which policy keeps sessions on their caches, and the load even? Replays a trace against modelled replicas.

    python -m benchmarks.bench_affinity --trace conversation_trace.jsonl [--events] [--svg FILE] [--json FILE]
    python -m benchmarks.bench_affinity --tasks [--seed 1]

In simulated time, in this process (`routing_simulation.py`): the policies' own code, and replicas with the cache and
the speed of `modelled_engine.py`, which the mock replicas have too. Nothing is drawn at random but the workload of
`--tasks`, by its seed. The trace's format and source are told in `routing_workloads.py`.

"ideal" is ideal session affinity: each session on one replica for ever, the one with the least tokens so far when it
began. `hit rate` is cached tokens of all prompt tokens. `hotspot` is N x the largest share of tokens (prompt and
output) that one replica got, 1.0 at best; "computed" is the same of the tokens that were not cached. With `--events`
one of N replicas is added at a quarter of the time, one crashes at half and comes back empty a minute later, and one
is drained and removed at three quarters; `hotspot` is then of the fleet as it was.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.modelled_engine import EngineModel
from benchmarks.report import percentile, write_json
from benchmarks.routing_simulation import Served, Simulation
from benchmarks.routing_workloads import Arrival, from_trace, tasks
from benchmarks.svg_plot import plot
from vllm_kvpool.router.fleet import Fleet
from vllm_kvpool.router.policies import POLICIES
from vllm_kvpool.router.policy import NO_HITS, Policy, weight
from vllm_kvpool.router.types import Decision, ReplicaState, RouteRequest

SIMULATED = [name for name in POLICIES if name != "kv_events"]
"""The modelled replicas send no events here, and without them kv_events is task."""
STEP_S = 60.0
"""Of the plot."""


class Ideal(Policy):
    """Knows every session, and what each replica got so far."""

    name = "ideal"

    def __init__(self) -> None:
        self.homes: dict[int, str] = {}
        self.tokens: dict[str, int] = defaultdict(int)

    def decide(self, request: RouteRequest, fleet: Fleet, now: float) -> Decision | None:
        home = fleet.get(self.homes.get(request.session, ""))
        if home is None or home.state is ReplicaState.OUT:
            able = [member for member in fleet if member.state is ReplicaState.ACCEPTING]
            home = min(able, key=lambda member: self.tokens[member.replica.id])
        return Decision(home.replica, "session", NO_HITS, weight(request), ())

    def dispatched(self, request: RouteRequest, replica_id: str, now: float) -> None:
        self.homes[request.session] = replica_id
        self.tokens[replica_id] += weight(request)


def simulate(policy: Policy, arrivals: Sequence[Arrival], args: argparse.Namespace) -> Simulation:
    model = EngineModel(
        cache_tokens=args.cache_tokens,
        block_tokens=128,
        prefill_tokens_per_s=args.prefill_rate,
        decode_tokens_per_s=args.decode_rate,
    )
    simulation = Simulation(policy, model, args.replicas)
    if args.events:
        added, crash, drain = moments(arrivals)
        simulation.at(added, lambda: simulation.add("added"))
        simulation.at(crash, lambda: simulation.crash("r2", back_after_s=60))
        simulation.at(drain, lambda: simulation.drain("r5", remove_after_s=120))
    simulation.run(arrivals)
    return simulation


def moments(arrivals: Sequence[Arrival]) -> tuple[float, float, float]:
    end_s = arrivals[-1].at_s
    return end_s / 4, end_s / 2, end_s * 3 / 4


def hit_rate(served: Sequence[Served]) -> float:
    return sum(s.cached_tokens for s in served) / max(1, sum(s.prompt_tokens for s in served))


def hotspot(served: Sequence[Served], computed: bool = False) -> float:
    """The most that a replica got over what would have been fair. Of all tokens, or of those that
    were not cached."""
    tokens: dict[str, float] = defaultdict(float)
    fair = 0.0
    for request in served:
        count = request.load_tokens - (request.cached_tokens if computed else 0)
        tokens[request.replica] += count
        fair += count * request.fair_share
    return max(tokens.values()) / fair if fair else 0.0


def summary(simulation: Simulation) -> dict[str, Any]:
    served = simulation.served
    ttft = [request.ttft_s for request in served]
    prompt_tokens = sum(request.prompt_tokens for request in served)
    stable = sum(request.cached_stable_tokens for request in served)
    predicted = sum(request.predicted_tokens for request in served)
    reasons: dict[str, int] = defaultdict(int)
    for request in served:
        reasons[request.reason] += 1
    return {
        "hit_rate": hit_rate(served),
        "hit_rate_stable": stable / prompt_tokens,
        "predicted_hit_rate": predicted / prompt_tokens,
        "hotspot": hotspot(served),
        "hotspot_computed": hotspot(served, computed=True),
        "ttft_p50_ms": percentile(ttft, 0.5) * 1e3,
        "ttft_p95_ms": percentile(ttft, 0.95) * 1e3,
        "retried": simulation.retried,
        "broken": simulation.broken,
        "reasons": dict(reasons),
    }


def over_time(served: Sequence[Served]) -> list[list[Served]]:
    steps: list[list[Served]] = [[] for _ in range(int(served[-1].at_s // STEP_S) + 1)]
    for request in served:
        steps[int(request.at_s // STEP_S)].append(request)
    return steps


def picture(runs: dict[str, Simulation], arrivals: Sequence[Arrival], events: bool) -> str:
    steps = {name: over_time(run.served) for name, run in runs.items()}

    def p95_ms(served: Sequence[Served]) -> float:
        return percentile([s.ttft_s for s in served], 0.95) * 1e3 if served else 0.0

    marks = {}
    if events:
        marks = dict(zip(moments(arrivals), ("one more", "crash", "drain"), strict=True))
    panels = [
        ("hit rate", {name: [hit_rate(s) for s in all_] for name, all_ in steps.items()}),
        ("hotspot", {name: [hotspot(s) for s in all_] for name, all_ in steps.items()}),
        ("TTFT p95, ms", {name: [p95_ms(s) for s in all_] for name, all_ in steps.items()}),
    ]
    return plot(panels, STEP_S, marks)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    workload = parser.add_mutually_exclusive_group(required=True)
    workload.add_argument("--trace", type=Path)
    workload.add_argument("--tasks", action="store_true", help="agents, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--events", action="store_true")
    parser.add_argument("--replicas", type=int, default=8)
    parser.add_argument("--cache-tokens", type=int, default=800_000, help="of one replica")
    parser.add_argument("--prefill-rate", type=float, default=12_000, help="tokens per second")
    parser.add_argument(
        "--decode-rate", type=float, default=40, help="tokens per second and request"
    )
    parser.add_argument("--policies", default=",".join(SIMULATED))
    parser.add_argument("--svg", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    arrivals = tasks(args.seed) if args.tasks else from_trace(args.trace)
    print(f"{len(arrivals)} requests, {args.replicas} replicas of {args.cache_tokens:,} tokens")
    print(
        "| policy | hit rate | of it stable | predicted | hotspot | computed | TTFT p50 | p95, ms "
        "| retried | broken |"
    )
    print("|---" + "|---:" * 9 + "|")
    runs, results = {}, {}
    for name in ["ideal", *args.policies.split(",")]:
        policy = Ideal() if name == "ideal" else POLICIES[name](args.seed)
        runs[name] = simulate(policy, arrivals, args)
        row = results[name] = summary(runs[name])
        print(
            f"| {name} | {row['hit_rate']:.1%} | {row['hit_rate_stable']:.1%} | "
            f"{row['predicted_hit_rate']:.1%} | {row['hotspot']:.2f} | {row['hotspot_computed']:.2f} | "
            f"{row['ttft_p50_ms']:.0f} | "
            f"{row['ttft_p95_ms']:.0f} | {row['retried']} | {row['broken']} |",
            flush=True,
        )
    if args.svg:
        args.svg.write_text(picture(runs, arrivals, args.events))
    if args.json:
        given = {name: str(value) for name, value in vars(args).items() if value is not None}
        write_json(args.json, {"arguments": given, "policies": results})


if __name__ == "__main__":
    main()
