"""What does storing cost an engine when nothing is ever used again?

    python -m benchmarks.bench_overhead [--arms none,kvpool,offloading,lmcache-mp] [--json FILE]

One engine an arm, in a process of its own, with the shape of Llama 3 8B and dummy weights in bfloat16, CUDA graphs for
decoding. A round is 48 fresh prompts of 2,048 random tokens (seed 11) with 192 tokens of output each, all at once: its
time, median of `--rounds` after one to warm up. Two more rounds step the engine one by one and give the time between
the tokens of each request (ITL). The engine without a connector runs first and, as `none-again`, last: what these two
differ by is what the machine varies by.

Caveats. All blocks of a round are stored, 13.8 GB, into a pool that overflows in the third: eviction is part of it.
ITL includes the steps that prefill other requests: compare its p99 between arms, not with anything else.
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
    run_arms,
    run_child,
    run_script,
    script_parser,
)
from benchmarks.offline import OfflineEngine, random_prompt
from benchmarks.report import percentile

MODULE = "benchmarks.bench_overhead"
ARMS = "none,kvpool,offloading,lmcache-mp,none-again"
SEED = 11
NUM_PROMPTS = 48
PROMPT_TOKENS = 2_048
OUTPUT_TOKENS = 192
STEPPED_ROUNDS = 2
SIZES = [1, 2, 4, 8, 16, 32, 48, 64]


# in the arm's process -----------------------------------------------------------------------------


def make_prompts(draw: random.Random) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": random_prompt(draw, PROMPT_TOKENS)} for _ in range(NUM_PROMPTS)]


def time_round(engine: OfflineEngine, draw: random.Random) -> float:
    prompts = make_prompts(draw)
    begun = time.perf_counter()
    engine.llm.generate(prompts, engine.sampling(OUTPUT_TOKENS), use_tqdm=False)
    return time.perf_counter() - begun


def intervals_ms(engine: OfflineEngine, draw: random.Random, name: str) -> list[float]:
    """Between the tokens of each request of a round."""
    from vllm.sampling_params import RequestOutputKind

    core = engine.llm.llm_engine
    sampling = engine.sampling(OUTPUT_TOKENS, output_kind=RequestOutputKind.DELTA)
    for i, prompt in enumerate(make_prompts(draw)):
        core.add_request(f"{name}-{i}", prompt, sampling)
    last_s: dict[str, float] = {}
    intervals: list[float] = []
    while core.has_unfinished_requests():
        outputs = core.step()
        now_s = time.perf_counter()
        for output in outputs:
            num_tokens = len(output.outputs[0].token_ids)
            if num_tokens == 0:
                continue
            if output.request_id in last_s:
                each = (now_s - last_s[output.request_id]) / num_tokens * 1e3
                intervals += [each] * num_tokens
            last_s[output.request_id] = now_s
    return intervals


def run_job(job: dict[str, Any]) -> None:
    graphs = {
        "mode": 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": SIZES,
    }
    engine = OfflineEngine(
        job["model"],
        job["transfer"],
        max_num_seqs=SIZES[-1],
        compilation_config=graphs,
        **job["engine"],
    )
    draw = random.Random(SEED)
    time_round(engine, draw)
    result: dict[str, Any] = {"start_s": engine.start_s}
    result["round_s"] = [time_round(engine, draw) for _ in range(job["rounds"])]
    intervals: list[float] = []
    for number in range(STEPPED_ROUNDS):
        intervals += intervals_ms(engine, draw, f"stepped-{number}")
    result["itl_ms"] = {"p50": percentile(intervals, 0.5), "p99": percentile(intervals, 0.99)}
    Path(job["result"]).write_text(json.dumps(result))


# all arms -----------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    arms: dict[str, Any] = {}

    def run(arm: Arm) -> None:
        result = run_child(MODULE, arm, {"rounds": args.rounds}, folder, args)
        if result is not None:
            arms[arm.name] = result

    notes = run_arms(args.arms.split(","), run, args, folder)
    return {"notes": notes, "arms": arms}


def change(value: float, base: float | None) -> str:
    return f" ({value / base - 1:+.1%})" if base else ""


def print_results(results: dict[str, Any]) -> None:
    print("\n" + "\n".join(results["notes"]))
    print(
        "\n| arm | a round, s | all rounds, s | tokens/s | ITL p50, ms | ITL p99, ms | start, s |\n"
        "|---|---:|---|---:|---:|---:|---:|"
    )
    arms = results["arms"]
    plain = [arm for name, arm in arms.items() if name.startswith("none")]
    bases = {
        "round": statistics.mean(statistics.median(arm["round_s"]) for arm in plain),
        "p50": statistics.mean(arm["itl_ms"]["p50"] for arm in plain),
        "p99": statistics.mean(arm["itl_ms"]["p99"] for arm in plain),
    } if plain else {}  # fmt: skip
    for name, arm in arms.items():
        round_s = statistics.median(arm["round_s"])
        itl = arm["itl_ms"]
        cells = [name, f"{round_s:.3f}{change(round_s, bases.get('round'))}"]
        cells.append(" ".join(f"{seconds:.3f}" for seconds in arm["round_s"]))
        cells.append(f"{NUM_PROMPTS * OUTPUT_TOKENS / round_s:,.0f}")
        cells += [f"{itl[p]:.2f}{change(itl[p], bases.get(p))}" for p in ("p50", "p99")]
        print("| " + " | ".join([*cells, f"{arm['start_s']:.1f}"]) + " |")
    print("\nin brackets: against the mean of the engines without a connector")


def main() -> None:
    parser = script_parser(__doc__)
    add_arms(parser, ARMS)
    parser.add_argument("--rounds", type=int, default=4)
    run_script(parser, run_job, measure, print_results)


if __name__ == "__main__":
    main()
