"""How long until the first token: recompute, VRAM hit, pool hit, and a hit on another engine's blocks?

    python -m benchmarks.bench_ttft [--arms kvpool,kvpool-other,offloading] [--lengths 1024,8192,32768] [--json FILE]

One engine an arm, with the shape of Llama 3 8B and dummy weights in bfloat16; one request at a time, of random tokens
(seed 7), one token each; the time is that of `LLM.generate`. All engines live at the same time and take turns (see
`turns`); a turn is one timed request, after one of a few tokens. For each prompt: new (recompute), again (VRAM hit),
and again with the engine's own prefix cache emptied before (pool hit), one after the other in three rounds.
`kvpool-other` is a second engine on the pool of `kvpool` that never computes a prompt: when `kvpool` has computed and
stored it in the first round, it finds it in the second (pool hit) and has it in the third (VRAM hit). The first prompt
of each length warms up and is not counted. One further prompt gives 16 greedy tokens by each way; these and the one
token of the others are compared.

Two engines meet the same prompt within seconds, so they are compared by prompt: "hit - VRAM" is the median over the
prompts of a pool hit less the VRAM hit of the same prompt, in the round before or after; "x link" is that over the
time which the bytes take as one big pinned copy, measured before. Both are of the prompts that were loaded; "computed"
tells how many were not, because the connector took computing for faster or did not find them. "prompts" tells of how
many the figures of an arm are: an arm that was lost has fewer. Below the table: the median over the prompts of our pool
hit over that of each peer (for `kvpool-other` also of `kvpool`, whose blocks it loads), and of how many.

Caveats. Dummy weights make near ties of tokens: recompute rounds differently than a hit, of whatever kind, so "as VRAM"
(pool hit against VRAM hit: the same computation) must hold for all prompts, and "as recompute" may not. Eager mode, the
default here, hides nothing of a load; `--graphs` turns it off. The KV cache of an engine holds two of the longest
prompts, since stores may pin half of it (`--kv-gib` says otherwise). Only the latest prompts are asked for, so
`--pool-size` need not hold them all. LMCache needs its package.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from benchmarks.arms import POOL_ARMS, add_arms, kind_of, salt_of, take_turns, trace_file
from benchmarks.gpu_script import measure_link, numbers, run_script, script_parser
from benchmarks.offline import OfflineEngine, kv_bytes_per_token, random_prompt
from benchmarks.traced_steps import STEPS, Spans, by_step, spans_of, told, traced_requests
from vllm_kvpool.errors import ConfigError

MODULE = "benchmarks.bench_ttft"
ARMS = "kvpool,kvpool-other,offloading,simple,lmcache"
SEED = 7
CHECK_TOKENS = 16
FIRST_TOKENS = 3_000
"""Of what an engine computes before anything else."""
ROOM_TOKENS = 4_096
"""Of KV cache, for that and for whatever is not one of the prompts."""
REPEATS, LONG_REPEATS = {2_048: 28, 16_384: 14}, 7
"""Prompts of a length, by the longest one that so many are for, and of longer ones: single short ones say little."""
KINDS = ("recompute", "vram", "pool")
ROUNDS: dict[str, tuple[str | None, ...]] = {
    "none": ("recompute", "vram", None),
    "kvpool-other": (None, "pool", "vram"),
}
"""What an arm does with a prompt, where that is not `KINDS`, one after the other."""


# in the arm's process -----------------------------------------------------------------------------


def make_prompts(length: int, repeats: int) -> list[tuple[list[int], int]]:
    """The same in every process, each with how many tokens to generate: one to warm up, those to time, and
    one whose output is compared."""
    draw = random.Random(f"{SEED} {length}")
    num_tokens = [1, *[1] * repeats, CHECK_TOKENS]
    return [(random_prompt(draw, length), num) for num in num_tokens]


def run_job(job: dict[str, Any]) -> Iterator[dict[str, Any] | None]:
    prompts = {length: make_prompts(length, repeats) for length, repeats in job["repeats"]}
    engine = OfflineEngine(job["model"], job["transfer"], salt=job["salt"], **job["engine"])
    engine.generate(random_prompt(random.Random(), FIRST_TOKENS), 1)
    yield {"start_s": engine.start_s}
    for length, several in prompts.items():
        for number, (prompt, num_tokens) in enumerate(several):
            for kind in job["rounds"]:
                done = kind and time_request(engine, kind, prompt, num_tokens)
                yield done and {"tokens": length, "prompt": number, "kind": kind, **done}


def time_request(
    engine: OfflineEngine, kind: str, prompt: list[int], num_tokens: int
) -> dict[str, Any]:
    if kind == "pool":
        engine.forget_vram()
    engine.wake()
    begun_s = time.perf_counter()
    seconds, output, cached = engine.generate(prompt, num_tokens)
    return {"begun_s": begun_s, "ms": seconds * 1e3, "cached": cached, "output": output}


# all arms -----------------------------------------------------------------------------------------

Prompts = list[dict[str, dict[str, Any]]]
"""Of an arm, of one length: by number, what each kind of request for it gave."""


def prompts_of(turns: list[Any], length: int) -> Prompts:
    found: dict[int, dict[str, Any]] = {}
    for turn in turns[1:]:
        if turn and turn["tokens"] == length:
            found.setdefault(turn["prompt"], {})[turn["kind"]] = turn
    return [found[number] for number in sorted(found)]


def timed(prompts: Prompts, repeats: int, *kinds: str) -> Prompts:
    """Those to be counted, of which all `kinds` are there."""
    counted = prompts[1 : 1 + repeats]
    return [prompt for prompt in counted if all(kind in prompt for kind in kinds)]


def median_ms(prompts: Prompts, kind: str) -> float:
    return statistics.median(prompt[kind]["ms"] for prompt in prompts)


def summary(
    prompts: Prompts, computed: Prompts, repeats: int, tokens_per_ms: float
) -> dict[str, Any]:
    """`computed`: the same of the arm that computed the prompts. `tokens_per_ms`: whose KV the link carries."""
    kinds = [kind for kind in KINDS if any(kind in prompt for prompt in prompts)]
    counted = timed(prompts, repeats, *kinds)
    line: dict[str, Any] = {"prompts": len(counted)}
    if counted:
        line |= {kind: median_ms(counted, kind) for kind in kinds}
    if counted and {"vram", "pool"} <= set(kinds):
        loaded = [one for one in counted if one["pool"]["cached"] > 0]
        line["pool_min"] = min(one["pool"]["ms"] for one in counted)
        line["computed"] = len(counted) - len(loaded)
        line["as_vram"] = same(prompts, "pool", prompts, "vram")
        line["as_recompute"] = same(prompts, "pool", computed, "recompute")
        line |= against_link(loaded, tokens_per_ms)
    return line


def against_link(loaded: Prompts, tokens_per_ms: float) -> dict[str, float]:
    if not loaded:
        return {}
    cached = min(one["pool"]["cached"] for one in loaded)
    over_vram = statistics.median(one["pool"]["ms"] - one["vram"]["ms"] for one in loaded)
    line = {"cached": cached, "over_vram": over_vram}
    return {**line, "x_link": over_vram / (cached / tokens_per_ms)} if tokens_per_ms else line


def same(left: Prompts, kind: str, right: Prompts, other_kind: str) -> str:
    """Of how many prompts the output is the same."""
    pairs = [
        (one[kind]["output"], other[other_kind]["output"])
        for one, other in zip(left, right, strict=False)
        if kind in one and other_kind in other
    ]
    return f"{sum(one == other for one, other in pairs)}/{len(pairs)}"


def table(
    turns: dict[str, list[Any]], repeats: dict[int, int], tokens_per_ms: float
) -> list[dict[str, Any]]:
    lines = []
    for name, of_arm in turns.items():
        computed = turns.get(stored_by(name), [])
        for length, count in repeats.items():
            prompts = prompts_of(of_arm, length)
            line = summary(prompts, prompts_of(computed, length), count, tokens_per_ms)
            lines.append({"arm": name, "tokens": length, **line})
    return lines


def stored_by(name: str) -> str:
    """The arm whose blocks that one loads: its own, but for a `kvpool-other`."""
    return name.replace("-other", "")


def against_others(turns: dict[str, list[Any]], repeats: dict[int, int]) -> list[dict[str, Any]]:
    """Our pool hits over those of each peer, and of the engine whose blocks they are: the median of the
    ratios of the same prompt."""
    lines = []
    ours = [name for name in turns if kind_of(name) in POOL_ARMS]
    for length, count in repeats.items():
        for name in ours:
            line: dict[str, Any] = {"tokens": length, "arm": name, "over": {}, "prompts": {}}
            for other in compared_with(name, turns):
                pairs = zip(
                    prompts_of(turns[name], length), prompts_of(turns[other], length), strict=False
                )
                ratios = [
                    one["pool"]["ms"] / its["pool"]["ms"]
                    for one, its in list(pairs)[1 : 1 + count]
                    if "pool" in one and "pool" in its
                ]
                if ratios:
                    line["over"][other] = statistics.median(ratios)
                    line["prompts"][other] = len(ratios)
            lines.append(line)
    return lines


def compared_with(name: str, arms: Collection[str]) -> list[str]:
    """The peers, and for a `kvpool-other` the arm whose blocks it loads."""
    peers = [arm for arm in arms if kind_of(arm) not in POOL_ARMS]
    return [*peers, stored_by(name)] if stored_by(name) in set(arms) - {name} else peers


def repeats_of(lengths: list[int], repeats: list[int] | None) -> dict[int, int]:
    """How many prompts of each length are timed. ConfigError."""
    if repeats is None:
        return {
            length: next((n for most, n in REPEATS.items() if length <= most), LONG_REPEATS)
            for length in lengths
        }
    if len(repeats) != len(lengths):
        fix = f"give a number for each of the {len(lengths)} lengths, or leave it out"
        raise ConfigError("--repeats", ",".join(map(str, repeats)), fix)
    return dict(zip(lengths, repeats, strict=True))


def fit_prompts(args: argparse.Namespace, token_bytes: int) -> None:
    """Engines that take the longest prompt, where the options do not say otherwise."""
    longest = max(args.lengths)
    if args.kv_gib is None:
        args.kv_gib = (2 * longest + ROOM_TOKENS) * token_bytes / 2**30
    most = max(longest, FIRST_TOKENS) + CHECK_TOKENS
    args.engine = {"enforce_eager": not args.graphs, "max_model_len": most, **args.engine}


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    if "kvpool-other" in args.arms.split(",") and "kvpool" not in args.arms.split(","):
        args.arms = f"kvpool,{args.arms}"
    repeats = repeats_of(args.lengths, args.repeats)
    token_bytes = kv_bytes_per_token(args.size, args.kv_cache_dtype)
    fit_prompts(args, token_bytes)
    link = measure_link()
    tokens_per_ms = link["load"] * 1e6 / token_bytes if link else 0.0
    results: dict[str, Any] = {"link_gb_per_s": link}

    def job_of(name: str) -> dict[str, Any]:
        job = {"repeats": list(repeats.items()), "salt": salt_of(name)}
        return {**job, "rounds": ROUNDS.get(kind_of(name), KINDS)}

    take_turns(MODULE, job_of, results, folder, args)
    turns = results["turns"]
    results["table"] = table(turns, repeats, tokens_per_ms)
    results["against_others"] = against_others(turns, repeats)
    results["trace"] = {
        name: trace(of_arm, repeats, trace_file(folder, name))
        for name, of_arm in turns.items()
        if trace_file(folder, name).exists()
    }
    return results


def trace(turns: list[Any], repeats: dict[int, int], path: Path) -> list[dict[str, Any]]:
    """Milliseconds between the steps of the timed requests, by length and kind."""
    requests = traced_requests(path)
    lines = []
    for length, count in repeats.items():
        for kind in ("vram", "pool"):
            spans = [
                traced_spans(found, one[kind])
                for one in timed(prompts_of(turns, length), count, kind)
                for found in requests
                if 0 < found["arrived"] - one[kind]["begun_s"] < one[kind]["ms"] / 1e3
            ]
            steps = by_step(spans, (*STEPS, "returned", "launch_cpu"))
            lines.append({"tokens": length, "kind": kind, "steps": steps, "all": spans})
    return lines


def traced_spans(found: dict[str, float], request: dict[str, Any]) -> Spans:
    ended_s = request["begun_s"] + request["ms"] / 1e3
    return {
        **spans_of(found, request["begun_s"]),
        "returned": (ended_s - found["finished"]) * 1e3,
    }


# the report ---------------------------------------------------------------------------------------


def print_table(lines: list[dict[str, Any]]) -> None:
    print(
        "\n| arm | tokens | prompts | recompute | VRAM hit | pool hit, median | best | hit - VRAM "
        "| x link | cached | computed | as VRAM | as recompute |\n"
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    )
    for line in lines:
        cells = [line["arm"], f"{line['tokens']:,}", str(line["prompts"])]
        columns = (*KINDS, "pool_min", "over_vram")
        cells += [f"{line[name]:.1f}" if name in line else "" for name in columns]
        cells.append(f"{line['x_link']:.2f}" if "x_link" in line else "")
        texts = ("cached", "computed", "as_vram", "as_recompute")
        cells += [str(line.get(name, "")) for name in texts]
        print("| " + " | ".join(cells) + " |")


def print_against_others(lines: list[dict[str, Any]]) -> None:
    print("\nour pool hit over another arm's of the same prompt, median (of how many), best first:")
    for line in lines:
        others = sorted(line["over"].items(), key=lambda pair: -pair[1])
        texts = (f"{ratio:.3f} of {other} ({line['prompts'][other]})" for other, ratio in others)
        print(f"{line['tokens']:,} tokens, {line['arm']}: {', '.join(texts) or 'no other'}")


def print_trace(name: str, lines: list[dict[str, Any]]) -> None:
    print(f"\n{name}: ms to each step from the one before, median / p95")
    for line in lines:
        print(f"{line['tokens']:,} {line['kind']}: {told(line['steps'])}")


def print_results(results: dict[str, Any]) -> None:
    print("\n" + "\n".join(results["notes"]))
    print_table(results["table"])
    print_against_others(results["against_others"])
    for name, lines in results["trace"].items():
        print_trace(name, lines)
    starts = {name: turns[0]["start_s"] for name, turns in results["turns"].items() if turns}
    print("\nms; engine start: " + ", ".join(f"{name} {s:.1f} s" for name, s in starts.items()))
    print(f"one big pinned copy, GB/s: {results['link_gb_per_s']}")


def main() -> None:
    parser = script_parser(__doc__)
    add_arms(parser, ARMS)
    parser.add_argument("--lengths", type=numbers, default="1024,8192,32768")
    parser.add_argument("--repeats", type=numbers, help="prompts of each of the --lengths")
    parser.set_defaults(kv_gib=None)
    parser.add_argument("--graphs", action="store_true", help="CUDA graphs instead of eager mode")
    parser.add_argument(
        "--trace", action="store_true", help="of our own arms: what a hit waits for"
    )
    run_script(parser, run_job, measure, print_results)


if __name__ == "__main__":
    main()
