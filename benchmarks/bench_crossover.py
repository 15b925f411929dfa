"""From how many tokens on is a load faster than computing again, and does the connector see it?

    python -m benchmarks.bench_crossover [--lengths 128,256,...] [--json FILE] [--plot FILE.svg]

Two engines, one after the other, over one pool, with the shape of Llama 3 8B and dummy weights in bfloat16, eager.
Prompts are of random tokens (seed 19), one at a time: so many as the table says and one more, one token of output.

`always` computes new prompts and then, with its own prefix cache emptied, loads each of them, however long that takes.
`decides` is the connector as it is, but without its floor (`min_load_tokens` 16 instead of 256): it is asked for the
same prompts, in turn with new ones that teach it what computing takes, in rounds of all lengths, in random order. The
first two rounds are for learning and not counted. Predictions are those that the connector exports as metrics.

Caveats. Nothing else runs on the engine, and the connector decides for a request alone. A load of a busy engine also
hides behind the steps of other requests, which take their least time anyway: there it loads from fewer tokens on.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.arms import kvpool_arm
from benchmarks.engine_child import Arm, run_child
from benchmarks.gpu_script import numbers, run_script, script_parser
from benchmarks.offline import OfflineEngine, random_prompt
from benchmarks.populated_pool import pool_daemon
from benchmarks.processes import kv_transfer_config
from benchmarks.svg_plot import curves

MODULE = "benchmarks.bench_crossover"
ALWAYS = ("AlwaysLoadConnector", "benchmarks.always_load")
LENGTHS = "128,256,512,768,1024,1280,1536,2048"
SEED = 19
FLOOR_TOKENS = 16
LEARNING_ROUNDS = 2
STORE_SETTLE_S = 0.3


# in the arm's process -----------------------------------------------------------------------------


def stored_prompts(length: int, count: int) -> list[list[int]]:
    """The same in both engines."""
    draw = random.Random(f"{SEED} {length}")
    return [random_prompt(draw, length + 1) for _ in range(count)]


def always(engine: OfflineEngine, length: int, count: int) -> dict[str, Any]:
    prompts = stored_prompts(length, count)
    computed = [engine.generate(prompt, 1)[0] * 1e3 for prompt in prompts]
    time.sleep(STORE_SETTLE_S)
    loaded = []
    for prompt in prompts:
        engine.forget_vram()
        seconds, _, cached = engine.generate(prompt, 1)
        assert cached == length, f"{cached} of {length} tokens were loaded"
        loaded.append(seconds * 1e3)
    return {"recompute": computed[LEARNING_ROUNDS:], "load": loaded[LEARNING_ROUNDS:]}


def decides(engine: OfflineEngine, lengths: list[int], count: int) -> dict[int, Any]:
    draw = random.Random(SEED)
    stored = {length: stored_prompts(length, count) for length in lengths}
    rows: dict[int, Any] = {length: [] for length in lengths}
    for number in range(count):
        for length in draw.sample(lengths, len(lengths)):
            engine.generate(random_prompt(draw, length + 1), 1)
            before = engine.counters()
            seconds, _, cached = engine.generate(stored[length][number], 1)
            after = engine.counters()
            row = {"ms": seconds * 1e3, "loaded": cached == length}
            for kind in ("load", "compute"):
                name = f"predicted_{kind}_seconds"
                if after[f"{name}:count"] > before[f"{name}:count"]:
                    row[kind] = (after[f"{name}:sum"] - before[f"{name}:sum"]) * 1e3
            if number >= LEARNING_ROUNDS:
                rows[length].append(row)
    return rows


def run_job(job: dict[str, Any]) -> None:
    options = {"enforce_eager": True, **job["engine"]}
    engine = OfflineEngine(job["model"], job["transfer"], **options)
    for _ in range(3):  # kernels are loaded, memory is touched
        engine.generate(random_prompt(random.Random(), max(job["lengths"])), 1)
    count = LEARNING_ROUNDS + job["repeats"]
    if job["decides"]:
        result: dict[Any, Any] = decides(engine, job["lengths"], count)
    else:
        result = {length: always(engine, length, count) for length in job["lengths"]}
    Path(job["result"]).write_text(json.dumps(result))


# both arms ----------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    job = {"lengths": args.lengths, "repeats": args.repeats}
    results: dict[str, Any] = {}
    with pool_daemon(args, folder) as note:
        results["notes"] = [note]
        decider = kvpool_arm(f"kvpool+min_load_tokens={FLOOR_TOKENS}", args, folder)
        assert decider.transfer is not None
        extra = decider.transfer["kv_connector_extra_config"]
        loader = Arm("always", kv_transfer_config(extra, connector=ALWAYS))
        for arm, name in ((loader, "always"), (Arm("decides", decider.transfer), "decides")):
            result = run_child(MODULE, arm, {**job, "decides": name == "decides"}, folder, args)
            if result is None:
                raise RuntimeError(f"nothing is known without the engine {name}")
            results[name] = result
    results["table"] = [
        row_of(length, results["always"][str(length)], results["decides"][str(length)])
        for length in args.lengths
    ]
    if args.plot:
        args.plot.write_text(plot(results["table"]))
    return results


def row_of(length: int, forced: dict[str, Any], decided: list[dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {"tokens": length, "decisions": len(decided)}
    row |= {kind: statistics.median(forced[kind]) for kind in ("recompute", "load")}
    row["decided"] = statistics.median(one["ms"] for one in decided)
    row["loads"] = sum(one["loaded"] for one in decided)
    for kind in ("load", "compute"):
        known = [one[kind] for one in decided if kind in one]
        row[f"predicted {kind}"] = statistics.median(known) if known else None
    return row


def print_results(results: dict[str, Any]) -> None:
    print("\n".join(results["notes"]))
    print(
        "\n| tokens | recompute, ms | load, ms | as decided, ms | loads chosen | predicted load, ms | recompute, ms |\n"
        "|---:|---:|---:|---:|---:|---:|---:|"
    )
    for row in results["table"]:
        cells = [f"{row['tokens']:,}", *(f"{row[kind]:.1f}" for kind in ("recompute", "load"))]
        cells += [f"{row['decided']:.1f}", f"{row['loads']}/{row['decisions']}"]
        for kind in ("load", "compute"):
            value = row[f"predicted {kind}"]
            cells.append("not known" if value is None else f"{value:.1f}")
        print("| " + " | ".join(cells) + " |")


def plot(table: list[dict[str, Any]]) -> str:
    kinds = ("recompute", "load", "decided", "predicted compute", "predicted load")
    series = {
        kind: [(row["tokens"], row[kind]) for row in table if row[kind] is not None]
        for kind in kinds
    }
    return curves("Time to first token, ms, by tokens found in the pool", series)


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument(
        "--lengths", type=numbers, default=LENGTHS, help="multiples of the block size"
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--plot", type=Path)
    run_script(parser, run_job, measure, print_results)


if __name__ == "__main__":
    main()
