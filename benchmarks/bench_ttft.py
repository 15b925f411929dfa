"""How long until the first token: recompute, VRAM hit, pool hit, and a hit on another engine's blocks?

    python -m benchmarks.bench_ttft [--arms none,kvpool,kvpool-other] [--lengths 1024,8192,32768] [--json FILE]

One engine an arm, in a process of its own, with the shape of Llama 3 8B and dummy weights in bfloat16; one request at a
time, of random tokens (seed 7), one token each; the time is that of `LLM.generate`. For each length: new prompts
(recompute), the same again (VRAM hit), and again with the engine's own prefix cache emptied before each (pool hit).
`kvpool-other` is a second engine that starts after the one of `kvpool` is gone: its first requests find the other's
blocks. Further prompts give 16 greedy tokens by recompute and by each kind of hit, which are compared. The other arms
are peers, in the same run.

Caveats. Dummy weights make near ties of tokens: recompute rounds differently than a hit, of whatever kind, so "as VRAM"
(pool hit against VRAM hit: the same computation) must hold for all prompts, and "as recompute" may not. Eager mode, the
default here, hides nothing of a load; `--graphs` turns it off. "x link" is the time of a hit in the pool less that of
one in VRAM, over the time that its bytes take as one big pinned copy, measured before the arms. LMCache needs its
package.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.arms import (
    Arm,
    add_arms,
    kind_of,
    measure_link,
    numbers,
    run_arms,
    run_child,
    run_script,
    script_parser,
)
from benchmarks.offline import OfflineEngine, kv_bytes_per_token, random_prompt

MODULE = "benchmarks.bench_ttft"
STEPS = ("arrived", "submitted", "copied", "noticed", "scheduled", "launched", "finished")
"""As `traced_connector` notes them, which is not imported here: it needs vLLM."""
ARMS = "none,kvpool,kvpool-other,offloading,simple,lmcache,lmcache-mp"
SEED = 7
CHECKS = 2
CHECK_TOKENS = 16
STORE_SETTLE_S = 1.0


# in the arm's process -----------------------------------------------------------------------------


class Prompts:
    """The same in every process."""

    def __init__(self, length: int, repeats: int) -> None:
        draw = random.Random(f"{SEED} {length}")
        made = [random_prompt(draw, length) for _ in range(1 + repeats + CHECKS)]
        self.length = length
        self.warm_up, self.timed, self.checks = made[0], made[1:-CHECKS], made[-CHECKS:]


def time_all(engine: OfflineEngine, prompts: Prompts, *, forget: bool) -> dict[str, list[Any]]:
    times, cached, begun_s = [], [], []
    for prompt in prompts.timed:
        if forget:
            engine.forget_vram()
        begun_s.append(time.perf_counter())
        seconds, _, num_cached = engine.generate(prompt, 1)
        times.append(seconds * 1e3)
        cached.append(num_cached)
    return {"ms": times, "cached": cached, "begun_s": begun_s}


def outputs(engine: OfflineEngine, prompts: Prompts, *, forget: bool = False) -> list[list[int]]:
    tokens = []
    for prompt in prompts.checks:
        if forget:
            engine.forget_vram()
        tokens.append(engine.generate(prompt, CHECK_TOKENS)[1])
    return tokens


def measure_storing(engine: OfflineEngine, prompts: Prompts, pool: bool) -> dict[str, Any]:
    """The engine that computes the prompts; with a `pool`, it loads them back as well."""
    result: dict[str, Any] = {"length": prompts.length}
    engine.generate(prompts.warm_up, 1)
    result["recompute"] = time_all(engine, prompts, forget=False)
    result["vram"] = time_all(engine, prompts, forget=False)
    result["recompute_tokens"] = outputs(engine, prompts)
    result["vram_tokens"] = outputs(engine, prompts)
    if pool:
        time.sleep(STORE_SETTLE_S)
        engine.forget_vram()
        engine.generate(prompts.warm_up, 1)
        result["pool"] = time_all(engine, prompts, forget=True)
        result["pool_tokens"] = outputs(engine, prompts, forget=True)
    return result


def measure_other(engine: OfflineEngine, prompts: Prompts) -> dict[str, Any]:
    """An engine that never computed the prompts."""
    result: dict[str, Any] = {"length": prompts.length}
    engine.generate(prompts.warm_up, 1)
    result["pool"] = time_all(engine, prompts, forget=False)
    result["vram"] = time_all(engine, prompts, forget=False)
    result["pool_tokens"] = outputs(engine, prompts)
    result["vram_tokens"] = outputs(engine, prompts)
    return result


def run_job(job: dict[str, Any]) -> None:
    engine = OfflineEngine(job["model"], job["transfer"], **job["engine"])
    engine.generate(random_prompt(random.Random(SEED), 3_000), 1)
    rows = []
    for length in job["lengths"]:
        prompts = Prompts(length, job["repeats"])
        if job["other"]:
            rows.append(measure_other(engine, prompts))
        else:
            rows.append(measure_storing(engine, prompts, job["transfer"] is not None))
        print(f"{length} tokens done", flush=True)
        result = {"start_s": engine.start_s, "rows": rows}
        Path(job["result"]).write_text(json.dumps(result))


# all arms -----------------------------------------------------------------------------------------


def summary(
    arm: str, row: dict[str, Any], expected: list[list[int]], tokens_per_ms: float
) -> dict[str, Any]:
    """`expected`: greedy tokens of the check prompts by recompute. `tokens_per_ms`: whose KV the link
    carries."""
    line: dict[str, Any] = {"arm": arm, "tokens": row["length"]}
    for kind in ("recompute", "vram", "pool"):
        if kind in row:
            line[kind] = statistics.median(row[kind]["ms"])
    if "pool" in row:
        line["pool_min"] = min(row["pool"]["ms"])
        line["cached"] = min(row["pool"]["cached"])
        line["as_vram"] = same(row["pool_tokens"], row["vram_tokens"])
        if tokens_per_ms and line["cached"]:
            line["x_link"] = (line["pool"] - line["vram"]) / (line["cached"] / tokens_per_ms)
    if expected:
        line["as_recompute"] = same(row.get("pool_tokens", row["vram_tokens"]), expected)
    return line


def same(left: list[list[int]], right: list[list[int]]) -> str:
    return f"{sum(a == b for a, b in zip(left, right, strict=True))}/{len(right)}"


def print_table(lines: list[dict[str, Any]]) -> None:
    print(
        "\n| arm | tokens | recompute | VRAM hit | pool hit, median | best | x link | cached | as VRAM "
        "| as recompute |\n"
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    )
    for line in lines:
        cells = [line["arm"], f"{line['tokens']:,}"]
        kinds = ("recompute", "vram", "pool", "pool_min")
        cells += [f"{line[kind]:.1f}" if kind in line else "" for kind in kinds]
        cells.append(f"{line['x_link']:.2f}" if "x_link" in line else "")
        cells += [str(line.get(name, "")) for name in ("cached", "as_vram", "as_recompute")]
        print("| " + " | ".join(cells) + " |")


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    names = args.arms.split(",")
    if "kvpool-other" in names and "kvpool" not in names:
        names.insert(names.index("kvpool-other"), "kvpool")
    args.engine = {"enforce_eager": not args.graphs, **args.engine}
    link = measure_link()
    token_bytes = kv_bytes_per_token(args.size, args.kv_cache_dtype)
    tokens_per_ms = link["load"] * 1e6 / token_bytes if link else 0.0
    arms: dict[str, Any] = {}
    lines: list[dict[str, Any]] = []

    def run(arm: Arm) -> None:
        other = kind_of(arm.name) == "kvpool-other"
        job = {"lengths": args.lengths, "repeats": args.repeats, "other": other}
        result = run_child(MODULE, arm, job, folder, args)
        if result is None:
            return
        arms[arm.name] = result
        if "KVPOOL_TRACE" in arm.env:
            result["trace"] = trace(result["rows"], Path(arm.env["KVPOOL_TRACE"]))
        computed = arms.get(arm.name.replace("-other", ""), {"rows": []}) if other else result
        by_length = {row["length"]: row["recompute_tokens"] for row in computed["rows"]}
        for row in result["rows"]:
            expected = by_length.get(row["length"], [])
            lines.append(summary(arm.name, row, expected, tokens_per_ms))

    notes = run_arms(names, run, args, folder)
    return {"link_gb_per_s": link, "table": lines, "notes": notes, "arms": arms}


def trace(rows: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """Median milliseconds between the steps of the timed requests, by length and kind."""
    requests = [json.loads(line) for line in path.read_text().splitlines()]
    lines = []
    for row in rows:
        for kind in ("vram", "pool"):
            spans = [
                spans_ms(found, begun_s, begun_s + ms / 1e3)
                for begun_s, ms in zip(row[kind]["begun_s"], row[kind]["ms"], strict=True)
                for found in requests
                if begun_s < found["arrived"] < begun_s + ms / 1e3
            ]
            names = dict.fromkeys(name for span in spans for name in span)
            medians = {
                name: statistics.median(span.get(name, 0.0) for span in spans) for name in names
            }
            lines.append({"tokens": row["length"], "kind": kind, "ms": medians, "all": spans})
    return lines


def spans_ms(found: dict[str, float], begun_s: float, ended_s: float) -> dict[str, float]:
    """To each step from the one before."""
    spans = {}
    last_s = begun_s
    for step in sorted((name for name in STEPS if name in found), key=found.__getitem__):
        spans[step] = (found[step] - last_s) * 1e3
        last_s = found[step]
    spans["returned"] = (ended_s - last_s) * 1e3
    spans["launch_cpu"] = found.get("launch_cpu", 0.0) * 1e3
    return spans


def print_trace(name: str, lines: list[dict[str, Any]]) -> None:
    print(f"\n{name}: ms from step to step, median ({', '.join(STEPS)}, returned)")
    for line in lines:
        spans = ", ".join(f"{step} {ms:.1f}" for step, ms in line["ms"].items())
        print(f"{line['tokens']:,} {line['kind']}: {spans}")


def print_results(results: dict[str, Any]) -> None:
    print("\n" + "\n".join(results["notes"]))
    print_table(results["table"])
    for name, arm in results["arms"].items():
        if "trace" in arm:
            print_trace(name, arm["trace"])
    starts = {name: arm["start_s"] for name, arm in results["arms"].items()}
    print("\nms; engine start: " + ", ".join(f"{name} {s:.1f} s" for name, s in starts.items()))
    print(f"one big pinned copy, GB/s: {results['link_gb_per_s']}")


def main() -> None:
    parser = script_parser(__doc__)
    add_arms(parser, ARMS)
    parser.add_argument("--lengths", type=numbers, default="1024,8192,32768")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--graphs", action="store_true", help="CUDA graphs instead of eager mode")
    parser.add_argument(
        "--trace", action="store_true", help="of our own arms: what a hit waits for"
    )
    run_script(parser, run_job, measure, print_results)


if __name__ == "__main__":
    main()
