"""Are the kernels of a CUDA graph later once something else of the process has used the GPU?

    python -m benchmarks.bench_replay [--actions nothing,staged,driver,kernels,graphs] [--json FILE]

What an engine decodes with is a CUDA graph; here one of 400 small kernels, replayed 60 times before and after an
action, each action in a process of its own, because what it leaves stays. `staged` and `driver` are a store and a load
of 512 MiB by our copy engine, that way; `kernels` are 300 launches of one kernel of PyTorch's on a stream of their own,
`graphs` 300 launches there of a graph with the same kernel. Each replay begins behind a kernel that waits, so that the
processor is not part of the time. Seed 7.

Caveats. Nothing else runs on the GPU. An action that leaves nothing may still differ by 1.5 % from before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench_copy import BLOCK_BYTES, POLL_S, BenchPool, KVMemory, run, wait_registered
from benchmarks.report import write_json
from vllm_kvpool._native import CopyEngine

MODULE = "benchmarks.bench_replay"
NUM_BLOCKS = 256
FRAGMENT = 32 << 10
WAYS = {"staged": "stores staged", "driver": "stores by the driver"}
LAUNCHES = 300
REPLAYS = 60
WAIT_CYCLES = 3_000_000
TIMEOUT_S = 120


# in the action's process --------------------------------------------------------------------------


def decoding_graph() -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]:
    """And what it computes with, to be kept."""
    x = torch.full((48, 4096), 0.5, device="cuda", dtype=torch.bfloat16)
    weights = torch.full((4096, 4096), 0.01, device="cuda", dtype=torch.bfloat16)
    y, z = torch.empty_like(x), torch.empty_like(x)

    def step() -> None:
        for _ in range(100):
            torch.mm(x, weights, out=y)
            torch.add(y, x, out=z)
            torch.mul(z, z, out=y)
            torch.neg(y, out=z)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph, [x, weights, y, z]


def replay_us(graph: torch.cuda.CUDAGraph) -> float:
    times = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(WAIT_CYCLES)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times)


def copy_blocks(way: str) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        slot_bytes = CopyEngine.shard_bytes([(0, BLOCK_BYTES, BLOCK_BYTES)])
        pool = BenchPool(Path(folder), NUM_BLOCKS, slot_bytes)
        memory = KVMemory(FRAGMENT, NUM_BLOCKS, "cuda")
        engine = CopyEngine(pool.view, memory.regions, 0, 0, device=0, way=way)
        wait_registered(engine, pool.slab_bytes)
        assert WAYS[way] in engine.backend, f"copies by {engine.backend}: {engine.error}"
        slots = pool.make_slots(NUM_BLOCKS)
        near, far = (array("I", rows).tobytes() for rows in (memory.near, memory.far))
        run(engine, [lambda: engine.submit_store(slots, near, 0)], POLL_S)
        pool.publish(slots)
        run(engine, [lambda: engine.submit_load(slots, far, 0)], POLL_S)
        memory.check()
        engine.close()


def launch(prepare: Callable[[torch.Tensor], Callable[[], Any]]) -> None:
    """On a stream of its own."""
    memory = torch.zeros(1 << 20, device="cuda", dtype=torch.uint8)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        once = prepare(memory)
        for _ in range(LAUNCHES):
            once()


def graph_of_one(memory: torch.Tensor) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        memory.add_(1)
    return graph.replay


ACTIONS: dict[str, Callable[[], None]] = {
    "nothing": lambda: None,
    "staged": lambda: copy_blocks("staged"),
    "driver": lambda: copy_blocks("driver"),
    "kernels": lambda: launch(lambda memory: lambda: memory.add_(1)),
    "graphs": lambda: launch(graph_of_one),
}


def take(action: str) -> dict[str, float]:
    graph, _tensors = decoding_graph()
    replay_us(graph)  # warms up
    before = replay_us(graph)
    ACTIONS[action]()
    torch.cuda.synchronize()
    return {"before_us": before, "after_us": replay_us(graph)}


# all actions --------------------------------------------------------------------------------------


def measure(action: str) -> dict[str, Any]:
    """Empty where it failed, which its process has told."""
    command = [sys.executable, "-m", MODULE, "--take", action]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, timeout=TIMEOUT_S)
    if done.returncode:
        print(f"ATTENTION: {action} failed with exit status {done.returncode}", flush=True)
        return {}
    return {"action": action, **json.loads(done.stdout.splitlines()[-1])}


def print_table(lines: list[dict[str, Any]]) -> None:
    print("| action | a replay before, us | after, us | |\n|---|---:|---:|---:|")
    for line in lines:
        before, after = line["before_us"], line["after_us"]
        print(f"| {line['action']} | {before:.0f} | {after:.0f} | {after / before - 1:+.1%} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--actions", default=",".join(ACTIONS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--take", choices=ACTIONS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.take:
        print(json.dumps(take(args.take)))
        return
    lines = [line for line in map(measure, args.actions.split(",")) if line]
    print_table(lines)
    if args.json:
        write_json(args.json, {"actions": lines})


if __name__ == "__main__":
    main()
