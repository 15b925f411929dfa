"""What does the connector cost a real engine? Time in each scheduler-side hook, and throughput without any reuse.

    python -m benchmarks.bench_connector [--hooks | --overhead] [--json FILE]

Hooks: prompts of 32k tokens in blocks of 32 tokens (the smallest that vLLM has on a CPU: 1,024
blocks), each new, then loaded from the pool twice. The engine's first request, which connects to
the pool, is left out. Overhead: two engines, one with the connector and one without, take turns
with the same new prompts; the order changes from round to round, and the ratio is that of each
round's pair.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.completions import complete, reset_prefix_cache
from benchmarks.processes import Engine, PoolDaemon
from benchmarks.report import percentile, write_json
from benchmarks.tiny_model import make_tiny_model

SEED = 5
LONG_PROMPTS, LONG_TOKENS = 16, 32_768
ROUNDS, BATCH, CONCURRENCY = 8, 8, 4
PROMPT_TOKENS, OUTPUT_TOKENS = 1_500, 48
WARM_UP_ROUNDS = 1


class Bench:
    """A folder with a daemon, and engines that end with the `with`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stack = ExitStack()
        (folder / "shm").mkdir()

    def __enter__(self) -> Bench:
        daemon = PoolDaemon(
            self.folder / "daemon.log", name="bench", size="2GiB", shm_dir=str(self.folder / "shm")
        )
        self.stack.enter_context(daemon)
        return self

    def __exit__(self, *exception: object) -> None:
        self.stack.close()

    def engine(self, name: str, model: Path, *, connector: bool, **options: Any) -> Engine:
        extra = {"pool": "bench", "shm_dir": str(self.folder / "shm")} if connector else None
        return self.stack.enter_context(
            Engine(model, self.folder / f"{name}.log", extra=extra, **options)
        )


def random_prompt(draw: random.Random, tokens: int) -> list[int]:
    return [draw.randrange(256) for _ in range(tokens)]


# hooks ----------------------------------------------------------------------------------------------------------------


def measure_hooks(bench: Bench) -> dict[str, dict[str, float]]:
    # One layer: the hooks see as many blocks, and a prompt takes seconds instead of minutes.
    model = make_tiny_model(
        bench.folder / "model-1",
        hidden_size=64,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        intermediate_size=64,
    )
    times = bench.folder / "hooks.jsonl"
    engine = bench.engine(
        "hooks",
        model,
        connector=True,
        connector_class=("TimedKVPoolConnector", "benchmarks.timed_connector"),
        options=("--block-size", "32", "--max-num-batched-tokens", "4096"),
        env={"KVPOOL_HOOK_TIMES": str(times)},
    )
    engine.wait_ready()
    complete(engine, [1] * 20)
    time.sleep(1)
    complete(engine, [2] * 20)
    first_lines = len(times.read_text().splitlines())
    draw = random.Random(SEED)
    for _ in range(LONG_PROMPTS):
        prompt = random_prompt(draw, LONG_TOKENS)
        new = complete(engine, prompt)
        for _ in range(2):
            reset_prefix_cache(engine)
            loaded = complete(engine, prompt)
            assert loaded.tokens == new.tokens, "the pool changed the output"
            assert loaded.cached_tokens > 0.95 * LONG_TOKENS, loaded.cached_tokens
    complete(engine, [1] * 20)  # a last step, which writes the times of the last but one
    return summarise(times.read_text().splitlines()[first_lines:])


def summarise(lines: list[str]) -> dict[str, dict[str, float]]:
    times: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for line in lines:
        for hook, values in json.loads(line).items():
            times[hook] += values
    table = {}
    for hook, pairs in times.items():
        walls, processors = zip(*pairs, strict=True)
        table[hook] = {
            "calls": len(pairs),
            "p50_us": percentile(walls, 0.5),
            "p99_us": percentile(walls, 0.99),
            "processor_p50_us": percentile(processors, 0.5),
            "processor_p99_us": percentile(processors, 0.99),
        }
    return table


# overhead -------------------------------------------------------------------------------------------------------------


def run_batch(engine: Engine, prompts: list[list[int]]) -> float:
    """Tokens a second, prompt and output."""
    begun = time.perf_counter()
    with ThreadPoolExecutor(CONCURRENCY) as threads:
        done = list(
            threads.map(lambda prompt: complete(engine, prompt, max_tokens=OUTPUT_TOKENS), prompts)
        )
    tokens = sum(c.prompt_tokens + len(c.tokens) for c in done)
    return tokens / (time.perf_counter() - begun)


def measure_overhead(bench: Bench) -> dict[str, Any]:
    model = make_tiny_model(bench.folder / "model")
    engines = {
        "without": bench.engine("without", model, connector=False),
        "with": bench.engine("with", model, connector=True),
    }
    for engine in engines.values():
        engine.wait_ready()
    draw = random.Random(SEED)
    rounds = []
    for number in range(WARM_UP_ROUNDS + ROUNDS):
        prompts = [random_prompt(draw, PROMPT_TOKENS) for _ in range(BATCH)]
        order = list(engines) if number % 2 else list(engines)[::-1]
        speeds = {name: run_batch(engines[name], prompts) for name in order}
        print(
            f"round {number}: "
            + ", ".join(f"{name} {speeds[name]:,.0f} tokens/s" for name in engines),
            flush=True,
        )
        if number >= WARM_UP_ROUNDS:
            rounds.append(speeds)
    ratios = [speeds["with"] / speeds["without"] for speeds in rounds]
    return {
        "rounds": rounds,
        "with_over_without": statistics.median(ratios),
        "quartiles": [percentile(ratios, 0.25), percentile(ratios, 0.75)],
    }


def print_results(results: dict[str, Any]) -> None:
    if "hooks" in results:
        columns = ("calls", "p50_us", "p99_us", "processor_p50_us", "processor_p99_us")
        print(f"| scheduler-side hook | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
        for hook, row in results["hooks"].items():
            print(f"| {hook} | {' | '.join(f'{row[column]:,.0f}' for column in columns)} |")
    if "overhead" in results:
        overhead = results["overhead"]
        low, high = overhead["quartiles"]
        print(
            f"throughput with / without the connector, nothing reused: {overhead['with_over_without']:.3f} "
            f"(median of {len(overhead['rounds'])} rounds; quartiles {low:.3f} to {high:.3f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--hooks", action="store_true", help="only the hooks")
    part.add_argument("--overhead", action="store_true", help="only the overhead")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results: dict[str, Any] = {}
    for name, measure, wanted in (
        ("hooks", measure_hooks, not args.overhead),
        ("overhead", measure_overhead, not args.hooks),
    ):
        if wanted:
            with (
                tempfile.TemporaryDirectory(dir="/dev/shm", prefix="bench-connector-") as folder,
                Bench(Path(folder)) as b,
            ):
                results[name] = measure(b)
    print_results(results)
    if args.json:
        write_json(args.json, results)


if __name__ == "__main__":
    main()
