"""Where do 4 to 256 hosts stop scaling? A trace on simulated hosts, and the directory's operations on a real Redis.

    python -m benchmarks.bench_scaling --trace conversation_trace.jsonl [--redis] [--svg FILE] [--json FILE]
    python -m benchmarks.bench_scaling --trace conversation_trace.jsonl --hosts 16 --links 10,25,100

Real code: the router's policies, the pools with their eviction, which blocks the directory lists and is asked for, and
the rules that decide on loads and pulls. Simulated: time, the engines, the links (`scaled_host.py`), and Redis, whose
operations are counted. With `--redis` they are also done, by real `Directory` objects on a real redis-server, for its
processor time for each (`directory_cost.py`), and a daemon's turn with many peers is measured (`peer_cost.py`);
`--cost FILE` takes that from the JSON of an earlier run, and `--also FILE...` adds the rows of some to tables and plot.

`--sharing`: the load is that of the trace for each 4 hosts (`--hosts-a-trace`), by copies of it that have nothing in
common (apart) or everything but their sessions (alike); see `scaling_workload.py`. The trace's format and source are
told in `routing_workloads.py`. A host is one engine with its pool. 256 hosts take about four minutes for each line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.directory_cost import DirectoryCost, redis_server
from benchmarks.peer_cost import turn_s
from benchmarks.report import write_json
from benchmarks.scaled_fleet import FleetSimulation
from benchmarks.scaled_host import HostModel
from benchmarks.scaling_limits import Row, full_at, memory, redis_load, row_of, wire_bytes_per_s
from benchmarks.scaling_workload import SHARINGS, TraceRequest, prompts, read
from benchmarks.svg_plot import plot
from vllm_kvpool.router.policies import make_policy

FLEETS = (16, 64, 128)
"""Whose beats are measured: as many real directories, one process."""
PEERS = (4, 16, 64, 255)
"""To which a turn of the exchange's loop is measured (`peer_cost.py`)."""


def simulate(
    trace: Sequence[TraceRequest], policy: str, sharing: str, hosts: int, model: HostModel,
    args: argparse.Namespace,
) -> Row:  # fmt: skip
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        simulation = FleetSimulation(
            make_policy(policy, args.seed), model, hosts, Path(folder), args.seed
        )
        copies = hosts / args.hosts_a_trace
        simulation.run(prompts(trace, copies, sharing, args.seed, args.duration_s), args.warm_up_s)
        simulation.close()
    row = row_of(simulation, args.duration_s - args.warm_up_s)
    return {"policy": policy, "sharing": sharing, "link_gbit_s": model.link_gbit_s, **row}


def rows(args: argparse.Namespace) -> Iterator[Row]:
    trace = read(args.trace)
    runs = itertools.product(
        args.sharing.split(","), args.policies.split(","), numbers(args.links), numbers(args.hosts)
    )
    for sharing, policy, link, hosts in runs:
        model = HostModel(
            args.vram_tokens,
            args.pool_tokens,
            prefill_tokens_per_s=args.prefill_rate,
            link_gbit_s=link,
        )
        yield simulate(trace, policy, sharing, int(hosts), model, args)


def earlier(args: argparse.Namespace) -> Iterator[Row]:
    for path in args.also:
        yield from json.loads(path.read_text())["rows"]


def numbers(text: str) -> list[float]:
    return [float(word) for word in text.split(",")]


HEADINGS = (
    "| sharing, policy | hosts | VRAM | pool | pulled | computed | TTFT, ms | p95 | Gbit/s | link | peers |"
    " reads/s | writes/s | renewed/s | beats/s | holders |"
)


def line(row: Row) -> str:
    """Of the table: the link's speed, and the part of it that a host's pulls take."""
    shares = " | ".join(f"{row[name]:.1%}" for name in ("vram", "pool", "pulled", "computed"))
    written = row["added_per_s"] + row["removed_per_s"]
    return (
        f"| {row['sharing']}, {row['policy']} | {row['hosts']} | {shares} "
        f"| {row['ttft_mean_ms']:.0f} | {row['ttft_p95_ms']:.0f} "
        f"| {row['link_gbit_s']:g} | {row['link_busy']:.1%} | {row['peers']:.0f} "
        f"| {row['keys_read_per_s']:,.0f} | {written:,.0f} | {row['renewed_per_s']:,.0f} "
        f"| {row['beats_per_s'] * (row['hosts'] + 4):,.0f} | {row['holders']:.2f} |"
    )


def limits(row: Row, cost: dict[str, Any]) -> str:
    load, used = redis_load(row, cost), memory(row, cost)
    parts = " | ".join(f"{load[name]:.1%}" for name in ("beats", "new", "renewals", "lookups"))
    return (
        f"| {row['sharing']}, {row['policy']} | {row['hosts']} | {parts} | {sum(load.values()):.1%} "
        f"| {full_at(row, cost):,} | {wire_bytes_per_s(row, cost) / 1e6:.1f} "
        f"| {used['redis'] / 2**20:,.0f} |"
    )


def measured_cost(args: argparse.Namespace) -> dict[str, Any] | None:
    if args.cost:
        found: dict[str, Any] = json.loads(args.cost.read_text())["redis"]
        return found
    if not args.redis:
        return None
    with redis_server() as url:
        return DirectoryCost(url).measure(FLEETS) | {"turn_s": turn_s(PEERS)}


def picture(found: Sequence[Row], cost: dict[str, Any] | None) -> str:
    """Against the number of hosts, a step for each fourfold."""
    by_run: dict[str, list[Row]] = {}
    for row in found:
        by_run.setdefault(f"{row['sharing']}, {row['policy']}", []).append(row)

    def lines(value: Any) -> dict[str, list[float]]:
        return {name: [value(row) for row in all_] for name, all_ in by_run.items()}

    panels = [
        ("not computed, of all prompt tokens", lines(lambda row: 1 - row["computed"])),
        ("pulled, MB/s a host", lines(lambda r: r["pulled_bytes_per_s"] / r["hosts"] / 1e6)),
    ]
    if cost:
        panels.append(("of one core of Redis", lines(lambda r: sum(redis_load(r, cost).values()))))
    most = max(by_run.values(), key=len)
    return plot(panels, 1, {i + 0.5: f"{row['hosts']} hosts" for i, row in enumerate(most)})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = HostModel()
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--hosts", default="4,16,64,256")
    parser.add_argument("--policies", default="task,cache_aware,round_robin")
    parser.add_argument("--sharing", default=",".join(SHARINGS))
    parser.add_argument("--links", default=f"{default.link_gbit_s:g}", help="Gbit/s")
    parser.add_argument("--hosts-a-trace", type=float, default=4, help="how many carry the trace")
    parser.add_argument("--vram-tokens", type=int, default=default.vram_tokens)
    parser.add_argument("--pool-tokens", type=int, default=default.pool_tokens)
    parser.add_argument("--prefill-rate", type=float, default=default.prefill_tokens_per_s)
    parser.add_argument("--duration-s", type=float, default=1_200)
    parser.add_argument("--warm-up-s", type=float, default=400, help="of it, not counted")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--redis", action="store_true", help="measure a real one")
    parser.add_argument("--cost", type=Path, help="JSON of a run with --redis")
    parser.add_argument("--also", type=Path, nargs="*", default=[], help="JSON of earlier runs")
    parser.add_argument("--svg", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    cost = measured_cost(args)
    if cost:
        print(json.dumps(cost, indent=1))
    found = []
    if args.trace or args.also:
        print(HEADINGS)
        print("|---" + "|---:" * (HEADINGS.count("|") - 2) + "|")
        for row in itertools.chain(earlier(args), rows(args) if args.trace else ()):
            print(line(row), flush=True)
            found.append(row)
    if cost and found:
        print(
            "\n| of one core of Redis | hosts | beats | new | renewals | lookups | all | 70 % at | MB/s | MiB |"
        )
        print("|---" + "|---:" * 9 + "|")
        print("\n".join(limits(row, cost) for row in found))
    if args.svg and found:
        args.svg.write_text(picture(found, cost))
    if args.json:
        given = {name: str(value) for name, value in vars(args).items() if value is not None}
        write_json(args.json, {"arguments": given, "redis": cost, "rows": found})


if __name__ == "__main__":
    main()
