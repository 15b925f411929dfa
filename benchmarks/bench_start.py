"""Does an engine start later because of a large pool?

    python -m benchmarks.bench_start [--pool-size 64GiB] [--starts 3] [--json FILE]

A tiny model, eager, so that little else takes time. Engines without and with the connector in turn, each in a process
of its own; the pool is populated before the first one, as on a host where the daemon has been running. "start" is how
long making the engine takes, "first" the first request after it, of 3,000 random tokens: the pool is mapped and
registered with CUDA in the background meanwhile.

Caveats. The very first engine reads its files from disk: compare medians, or run the script twice.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from pathlib import Path
from typing import Any

from benchmarks.arms import kvpool_arm
from benchmarks.engine_child import Arm, run_child
from benchmarks.gpu_script import run_script, script_parser
from benchmarks.offline import OfflineEngine, random_prompt
from benchmarks.populated_pool import pool_daemon

MODULE = "benchmarks.bench_start"
PROMPT_TOKENS = 3_000


def run_job(job: dict[str, Any]) -> None:
    options = {"enforce_eager": True, "max_model_len": 8_192, **job["engine"]}
    engine = OfflineEngine(job["model"], job["transfer"], settle_s=0.0, **options)
    first_s, _, _ = engine.generate(random_prompt(random.Random(), PROMPT_TOKENS), 1)
    Path(job["result"]).write_text(json.dumps({"start_s": engine.start_s, "first_s": first_s}))


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    times: dict[str, list[dict[str, float]]] = {"none": [], "kvpool": []}
    with pool_daemon(args, folder) as note:
        print(note, flush=True)
        kinds = {"none": Arm("none"), "kvpool": kvpool_arm("kvpool", args, folder)}
        for number in range(args.starts):
            for name, arm in kinds.items():
                numbered = Arm(f"{name}-{number}", arm.transfer, arm.env)
                result = run_child(MODULE, numbered, {}, folder, args)
                if result is None:
                    raise RuntimeError(f"engine {number} of {name} did not start")
                times[name].append(result)
    return {"notes": [note], "times": times}


def print_results(results: dict[str, Any]) -> None:
    print("\n| engine | start, s | first request, s | both, median |\n|---|---|---|---:|")
    medians = []
    for name, runs in results["times"].items():
        both = statistics.median(run["start_s"] + run["first_s"] for run in runs)
        medians.append(both)
        starts, firsts = (
            " ".join(f"{run[kind]:.2f}" for run in runs) for kind in ("start_s", "first_s")
        )
        print(f"| {name} | {starts} | {firsts} | {both:.2f} |")
    print(f"\nlater with the connector: {medians[1] - medians[0]:+.2f} s")


def main() -> None:
    parser = script_parser(__doc__)
    parser.set_defaults(size="tiny", pool_size="64GiB")
    parser.add_argument("--starts", type=int, default=3)
    run_script(parser, run_job, measure, print_results)


if __name__ == "__main__":
    main()
