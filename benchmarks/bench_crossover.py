"""From how many tokens on is a load faster than computing again, and does the connector see it?

    python -m benchmarks.bench_crossover [--lengths 128,256,...] [--repeats 14] [--json FILE] [--plot FILE.svg]

Two engines over one pool, with the shape of Llama 3 8B and dummy weights in bfloat16, eager. Both live at the same time
and take turns (see `turns`). Prompts are of random tokens (seed 19), one at a time: so many as the table says and one
more, one token of output; each is timed behind three requests of a few tokens.

`always` loads what it finds, however long that takes. `decides` is the connector as it is, but without its floor
(`min_load_tokens` 16 instead of 256). In each round all lengths have two pairs of turns, in random order: `always`
computes a new prompt ("recompute") and stores it, and `decides` another one, which teaches it what computing takes;
then `always`, with its own prefix cache emptied, loads that prompt ("load"), and `decides` is asked for the same
("as decided"). The first two rounds are for learning and not counted, nor is one in which `decides` did not find the
prompt in the pool. Predictions are those that the connector exports as metrics.

The times are medians over the rounds; "load - recompute" is the median of the differences in each round, and its
quartiles. "within 1 ms": in how many rounds what `decides` did took at most 1 ms longer than the better of recompute
and load in the same round; "choice within 1 ms": the same of what that choice took `always`, so that the noise between
two engines is left out.

Caveats. Nothing else runs on the engine, and the connector decides for a request alone. A load of a busy engine also
hides behind the steps of other requests, which take their least time anyway: there it loads from fewer tokens on.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.arms import take_turns
from benchmarks.gpu_script import numbers, run_script, script_parser
from benchmarks.offline import OfflineEngine, random_prompt
from benchmarks.report import quartiles
from benchmarks.svg_plot import curves

MODULE = "benchmarks.bench_crossover"
DECIDES = "kvpool+min_load_tokens=16"
ALWAYS = f"{DECIDES}+load=always"
LENGTHS = "128,256,512,768,1024,1280,1536,2048"
SEED = 19
LEARNING_ROUNDS = 2
WAKES = 3
"""Before a timed request. The first one after a rest takes longer, and `decides` learns from all of them what a step
takes at least: the median is to be that of an engine at work."""
CLOSE_MS = 1.0
MORE_TOKENS = 256
"""That an engine takes beyond the longest prompt."""


# in the arm's process -----------------------------------------------------------------------------


def new_prompt(kind: str, length: int, number: int) -> list[int]:
    """The same in both engines."""
    return random_prompt(random.Random(f"{SEED} {kind} {length} {number}"), length + 1)


def run_job(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    lengths: list[int] = job["lengths"]
    options = {"max_model_len": max(lengths) + MORE_TOKENS, **job["engine"]}
    engine = OfflineEngine(job["model"], job["transfer"], **options)
    for _ in range(3):  # kernels are loaded, memory is touched
        engine.generate(random_prompt(random.Random(), max(lengths)), 1)
    yield {"start_s": engine.start_s}
    for number in range(LEARNING_ROUNDS + job["repeats"]):
        for length in random.Random(f"{SEED} {number}").sample(lengths, len(lengths)):
            which = {"tokens": length, "round": number}
            stored, other = (new_prompt(kind, length, number) for kind in ("stored", "other"))
            first, second = ("teach", "decided") if job["decides"] else ("recompute", "load")
            done = timed(engine, other if job["decides"] else stored)
            engine.forget_vram()  # with the steps that stores take to end
            yield {**which, "kind": first, **done}
            yield {**which, "kind": second, **timed(engine, stored)}


def timed(engine: OfflineEngine, prompt: list[int]) -> dict[str, Any]:
    for _ in range(WAKES):
        engine.wake()
    before = engine.counters()
    seconds, _, cached = engine.generate(prompt, 1)
    after = engine.counters()
    done = {"ms": seconds * 1e3, "cached": cached}
    for kind in ("load", "compute"):
        name = f"predicted_{kind}_seconds"
        if after[f"{name}:count"] > before[f"{name}:count"]:
            done[f"predicted {kind}"] = (after[f"{name}:sum"] - before[f"{name}:sum"]) * 1e3
    return done


# both arms ----------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    args.arms = f"{ALWAYS},{DECIDES}"
    args.engine = {"enforce_eager": True, **args.engine}
    results: dict[str, Any] = {}

    def job_of(name: str) -> dict[str, Any]:
        return {"lengths": args.lengths, "repeats": args.repeats, "decides": name == DECIDES}

    take_turns(MODULE, job_of, results, folder, args)
    rounds = [rounds_of(results["turns"], length) for length in args.lengths]
    rows = [row_of(found) for found in rounds]
    results["table"] = [
        {"tokens": length, "planned": args.repeats, **row}
        for length, row in zip(args.lengths, rows, strict=True)
    ]
    if args.plot and any(rows):
        args.plot.write_text(plot(results["table"]))
    return results


def rounds_of(turns: dict[str, list[dict[str, Any]]], length: int) -> list[dict[str, Any]]:
    """Those to be counted, of both arms: by kind what was timed."""
    found: dict[int, dict[str, Any]] = {}
    for turn in (turn for values in turns.values() for turn in values[1:]):
        if turn["tokens"] == length and turn["round"] >= LEARNING_ROUNDS:
            found.setdefault(turn["round"], {})[turn["kind"]] = turn
    whole = (found[number] for number in sorted(found) if len(found[number]) == 4)
    return [one for one in whole if one["load"]["cached"] and was_found(one["decided"])]


def was_found(decided: dict[str, Any]) -> bool:
    """In the pool: it was loaded, or predicted to take longer than computing."""
    return decided["cached"] > 0 or "predicted load" in decided


def row_of(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    if not rounds:
        return {}
    row: dict[str, Any] = {"rounds": len(rounds)}
    for kind in ("recompute", "load", "decided"):
        row[kind] = statistics.median(one[kind]["ms"] for one in rounds)
    row["difference"] = quartiles([one["load"]["ms"] - one["recompute"]["ms"] for one in rounds])
    row["loads"] = sum(chosen(one) == "load" for one in rounds)
    row["close"] = sum(one["decided"]["ms"] <= better_ms(one) + CLOSE_MS for one in rounds)
    row["close_choice"] = sum(one[chosen(one)]["ms"] <= better_ms(one) + CLOSE_MS for one in rounds)
    for kind in ("predicted load", "predicted compute"):
        known = [one["decided"][kind] for one in rounds if kind in one["decided"]]
        row[kind] = statistics.median(known) if known else None
    return row


def chosen(one: dict[str, Any]) -> str:
    return "load" if one["decided"]["cached"] else "recompute"


def better_ms(one: dict[str, Any]) -> float:
    return min(one["recompute"]["ms"], one["load"]["ms"])


def print_results(results: dict[str, Any]) -> None:
    print("\n" + "\n".join(results["notes"]))
    print(
        "\n| tokens | rounds | recompute, ms | load, ms | load - recompute, ms (quartiles) "
        "| as decided, ms | loads chosen | within 1 ms | choice within 1 ms "
        "| predicted: load, ms | recompute, ms more |\n"
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    )
    for row in results["table"]:
        print("| " + " | ".join(cells_of(row)) + " |")
    print(f"\nrounds: those counted, of {results['table'][0]['planned']}")


def cells_of(row: dict[str, Any]) -> list[str]:
    if "rounds" not in row:
        return [f"{row['tokens']:,}", "0", *[""] * 9]
    first, median, third = row["difference"]
    cells = [f"{row['tokens']:,}", str(row["rounds"])]
    cells += [f"{row[kind]:.1f}" for kind in ("recompute", "load")]
    cells += [f"{median:+.1f} ({first:+.1f} to {third:+.1f})", f"{row['decided']:.1f}"]
    cells += [f"{row[kind] / row['rounds']:.0%}" for kind in ("loads", "close", "close_choice")]
    for kind in ("predicted load", "predicted compute"):
        cells.append("not known" if row[kind] is None else f"{row[kind]:.1f}")
    return cells


def plot(table: list[dict[str, Any]]) -> str:
    kinds = ("recompute", "load", "decided", "predicted compute", "predicted load")
    series = {
        kind: [(row["tokens"], row[kind]) for row in table if row.get(kind) is not None]
        for kind in kinds
    }
    return curves("Time to first token, ms, by tokens found in the pool", series)


def main() -> None:
    parser = script_parser(__doc__)
    parser.set_defaults(kv_gib=2)
    parser.add_argument(
        "--lengths", type=numbers, default=LENGTHS, help="multiples of the block size"
    )
    parser.add_argument("--repeats", type=int, default=14, help="rounds of all lengths")
    parser.add_argument("--plot", type=Path)
    run_script(parser, run_job, measure, print_results)


if __name__ == "__main__":
    main()
