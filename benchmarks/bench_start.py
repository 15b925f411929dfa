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

from benchmarks.arms import Arm, add_engine_options, kvpool_arm, pool_daemon, run_child, work_folder
from benchmarks.offline import OfflineEngine, make_model, random_prompt
from benchmarks.report import write_json

MODULE = "benchmarks.bench_start"
PROMPT_TOKENS = 3_000


def run_job(job: dict[str, Any]) -> None:
    engine = OfflineEngine(job["model"], job["transfer"], settle_s=0.0, **job["engine"])
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


def print_results(times: dict[str, list[dict[str, float]]]) -> None:
    print("\n| engine | start, s | first request, s | both, median |\n|---|---|---|---:|")
    medians = []
    for name, runs in times.items():
        both = statistics.median(run["start_s"] + run["first_s"] for run in runs)
        medians.append(both)
        starts, firsts = (
            " ".join(f"{run[kind]:.2f}" for run in runs) for kind in ("start_s", "first_s")
        )
        print(f"| {name} | {starts} | {firsts} | {both:.2f} |")
    print(f"\nlater with the connector: {medians[1] - medians[0]:+.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_engine_options(parser)
    parser.set_defaults(size="tiny", pool_size="64GiB", gpu_share=0.1)
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--engine", type=json.loads, default={}, help="more options of the engines")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run_job(json.loads(args.child.read_text()))
        return
    args.engine = {"enforce_eager": True, "max_model_len": 8_192, **args.engine}
    with work_folder() as folder:
        make_model(folder / "model", args.size)
        results = measure(args, folder)
    print_results(results["times"])
    if args.json:
        write_json(args.json, results)


if __name__ == "__main__":
    main()
