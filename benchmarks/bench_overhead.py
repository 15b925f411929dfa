"""What does storing cost an engine when nothing is ever used again?

    python -m benchmarks.bench_overhead [--arms none,kvpool,offloading,none-again] [--rounds 10] [--json FILE]

One engine an arm, with the shape of Llama 3 8B and dummy weights in bfloat16, CUDA graphs for decoding. All engines
live at the same time and take turns (see `turns`); a turn is 48 fresh prompts of 2,048 random tokens (seed 11) with 192
tokens of output each, all at once, the same in all arms of a round. They wait at the engine until the last one is
there, so that the steps of a round are the same each time; the time is from the first one's way to the engine to the
last one's end. The first round is for warming up. The time between the tokens of each request (ITL) is taken meanwhile.

"against none" is the median over the rounds of the time over that of the engines without a connector (`none` and
`none-again`, their mean) in the same round, and its quartiles; ITL likewise, from the percentiles of each round.
`none-again` is told against `none`: what two equal engines differ by is what this way of measuring can see.

Caveats. All blocks of a round are stored, 13.8 GB, into a pool that overflows in the second: eviction is part of it.
The p99 of ITL falls on steps that prefill other requests, p50 on those that only decode.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.arms import add_arms, salt_of, take_turns
from benchmarks.gpu_script import run_script, script_parser
from benchmarks.offline import OfflineEngine, random_prompt
from benchmarks.report import percentile, quartiles

MODULE = "benchmarks.bench_overhead"
ARMS = "none,kvpool,offloading,none-again"
SEED = 11
NUM_PROMPTS = 48
PROMPT_TOKENS = 2_048
OUTPUT_TOKENS = 192
SIZES = [1, 2, 4, 8, 16, 32, 48, 64]
FIGURES = ("seconds", "itl_p50", "itl_p99")


# in the arm's process -----------------------------------------------------------------------------


def run_job(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    graphs = {
        "mode": 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": SIZES,
    }
    engine = OfflineEngine(
        job["model"],
        job["transfer"],
        salt=job["salt"],
        max_num_seqs=SIZES[-1],
        compilation_config=graphs,
        **job["engine"],
    )
    yield {"start_s": engine.start_s}
    for number in range(job["rounds"]):
        draw = random.Random(f"{SEED} {number}")
        prompts = [random_prompt(draw, PROMPT_TOKENS) for _ in range(job["prompts"])]
        yield time_round(engine, prompts, number)


def time_round(engine: OfflineEngine, prompts: list[list[int]], number: int) -> dict[str, Any]:
    from vllm.sampling_params import RequestOutputKind

    core = engine.llm.llm_engine
    sampling = engine.sampling(OUTPUT_TOKENS, output_kind=RequestOutputKind.DELTA)
    with engine.held():
        begun = time.perf_counter()
        for i, prompt in enumerate(prompts):
            core.add_request(f"{number}-{i}", engine.salted(prompt), sampling)
    intervals = intervals_ms(core)
    seconds = time.perf_counter() - begun
    itl = {f"itl_p{p}": percentile(intervals, p / 100) for p in (50, 99)}
    return {"seconds": seconds, **itl}


def intervals_ms(core: Any) -> list[float]:
    """Between the tokens of each request, until all have ended."""
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


# all arms -----------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = {"prompts": args.prompts}

    def job_of(name: str) -> dict[str, Any]:
        return {"rounds": args.rounds, "prompts": args.prompts, "salt": salt_of(name)}

    take_turns(MODULE, job_of, results, folder, args)
    results["table"] = table(results["turns"])
    return results


def table(turns: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """The first value of an arm tells of its start, the second of the round that warms it up."""
    counted = {name: values[2:] for name, values in turns.items() if len(values) > 2}
    lines = []
    for name, rounds in counted.items():
        line: dict[str, Any] = {"arm": name, "start_s": turns[name][0]["start_s"]}
        line["rounds"] = len(rounds)
        line |= {figure: statistics.median(one[figure] for one in rounds) for figure in FIGURES}
        bases = [counted[other] for other in bases_of(name) if other in counted]
        line["rounds_against_none"] = min(map(len, [rounds, *bases])) if bases else 0
        line["against_none"] = {
            figure: quartiles(ratios(figure, rounds, bases)) for figure in FIGURES if bases
        }
        lines.append(line)
    return lines


def bases_of(name: str) -> tuple[str, ...]:
    """What an arm is told against."""
    return {"none": (), "none-again": ("none",)}.get(name, ("none", "none-again"))


def ratios(
    figure: str, rounds: list[dict[str, float]], bases: list[list[dict[str, float]]]
) -> list[float]:
    """By round, as far as all have come."""
    return [
        one[figure] / statistics.mean(base[figure] for base in plain)
        for one, *plain in zip(rounds, *bases, strict=False)
    ]


# the report ---------------------------------------------------------------------------------------


def print_results(results: dict[str, Any]) -> None:
    print("\n" + "\n".join(results["notes"]))
    print(
        "\n| arm | rounds | a round, s | against none (quartiles) | tokens/s | ITL p50, ms | against none "
        "| ITL p99, ms | against none | start, s |\n"
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    )
    for line in results["table"]:
        against = {name: told(values) for name, values in line["against_none"].items()}
        cells = [line["arm"], counts(line), f"{line['seconds']:.3f}", against.get("seconds", "")]
        cells.append(f"{results['prompts'] * OUTPUT_TOKENS / line['seconds']:,.0f}")
        for figure in FIGURES[1:]:
            cells += [f"{line[figure]:.2f}", against.get(figure, "")]
        print("| " + " | ".join([*cells, f"{line['start_s']:.1f}"]) + " |")
    print("\nseconds of all rounds, the first to warm up:")
    for name, turns in results["turns"].items():
        print(f"{name}: " + " ".join(f"{one['seconds']:.3f}" for one in turns[1:]))


def counts(line: dict[str, Any]) -> str:
    """Of how many rounds the figures are."""
    rounds, against = line["rounds"], line["rounds_against_none"]
    return f"{rounds}, {against} against none" if against not in (0, rounds) else str(rounds)


def told(values: tuple[float, float, float]) -> str:
    first, median, third = (f"{value - 1:+.2%}" for value in values)
    return f"{median} ({first} to {third})"


def main() -> None:
    parser = script_parser(__doc__)
    add_arms(parser, ARMS)
    parser.set_defaults(kv_gib=14)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--prompts", type=int, default=NUM_PROMPTS)
    run_script(parser, run_job, measure, print_results)


if __name__ == "__main__":
    main()
