"""What does the connector cost a real engine? Time in each scheduler-side hook, and throughput without any reuse.

    python -m benchmarks.bench_connector [--hooks | --overhead] [--json FILE]

Hooks: prompts of 32k tokens in blocks of 32 tokens (the smallest that vLLM has on a CPU: 1,024
blocks) with 64 tokens of output, each new, then loaded from the pool twelve times. The engine's first request, which
connects to the pool, is left out. Overhead: four engines, two with the connector and two
without, take turns with new prompts, after a rest each. Two of each kind, because on a CPU equal engines differ (by how
their memory happens to lie) more than by what is measured here.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.completions import SETTLE_S, complete, reset_prefix_cache, wake
from benchmarks.processes import Engine, PoolDaemon
from benchmarks.report import percentile, write_json
from benchmarks.tiny_model import make_tiny_model

SEED = 5
LONG_PROMPTS, LONG_TOKENS, LONG_OUTPUT, LOADS = 16, 32_768, 64, 12
TWINS, ROUNDS, BATCH = 2, 12, 4
PROMPT_TOKENS, OUTPUT_TOKENS = 1_000, 48
WARM_UP_ROUNDS = 1


class Bench:
    """A daemon and engines that end with the `with`."""

    def __init__(self) -> None:
        self.stack = ExitStack()

    def __enter__(self) -> Bench:
        folder = tempfile.TemporaryDirectory(dir="/dev/shm", prefix="bench-connector-")
        self.folder = Path(self.stack.enter_context(folder))
        shm_dir = self.folder / "shm"
        shm_dir.mkdir()
        log = self.folder / "daemon.log"
        daemon = PoolDaemon(log, name="bench", size="2GiB", shm_dir=str(shm_dir))
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


@contextmanager
def core_apart() -> Iterator[int]:
    """A core that nothing runs on of what is started inside, for the scheduler's process to take."""
    cores = os.sched_getaffinity(0)
    core, *others = sorted(cores)
    os.sched_setaffinity(0, others or cores)
    try:
        yield core
    finally:
        os.sched_setaffinity(0, cores)


def measure_hooks() -> dict[str, dict[str, float]]:
    with core_apart() as core, Bench() as bench:
        return hook_times(bench, core)


def hook_times(bench: Bench, core: int) -> dict[str, dict[str, float]]:
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
        env={"KVPOOL_HOOK_TIMES": str(times), "KVPOOL_HOOK_CORE": str(core)},
    )
    engine.wait_ready()
    complete(engine, [1] * 20)
    time.sleep(1)
    complete(engine, [2] * 20)
    first_lines = len(times.read_text().splitlines())
    draw = random.Random(SEED)
    for _ in range(LONG_PROMPTS):
        prompt = random_prompt(draw, LONG_TOKENS)
        new = complete(engine, prompt, max_tokens=LONG_OUTPUT)
        for _ in range(LOADS):
            reset_prefix_cache(engine)
            loaded = complete(engine, prompt, max_tokens=LONG_OUTPUT)
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
            "max_us": max(walls),
            "processor_p50_us": percentile(processors, 0.5),
            "processor_p99_us": percentile(processors, 0.99),
        }
    return table


# overhead -------------------------------------------------------------------------------------------------------------


def run_batch(engine: Engine, prompts: list[list[int]]) -> float:
    """Tokens a second, prompt and output."""
    time.sleep(SETTLE_S)
    wake(engine)
    begun = time.perf_counter()
    with ThreadPoolExecutor(BATCH) as threads:
        done = list(
            threads.map(lambda prompt: complete(engine, prompt, max_tokens=OUTPUT_TOKENS), prompts)
        )
    tokens = sum(c.prompt_tokens + len(c.tokens) for c in done)
    return tokens / (time.perf_counter() - begun)


def measure_overhead() -> dict[str, Any]:
    with Bench() as bench:
        model = make_tiny_model(bench.folder / "model")
        engines = {
            f"{arm} {number}": bench.engine(f"{arm}-{number}", model, connector=arm == "with")
            for arm in ("with", "without")
            for number in range(1, TWINS + 1)
        }
        for engine in engines.values():
            engine.wait_ready()
        return compare(take_turns(engines))


def take_turns(engines: dict[str, Engine]) -> dict[str, list[float]]:
    """Throughputs by engine. Every batch has new prompts, as twins share the pool; the order of engines changes."""
    draw = random.Random(SEED)
    speeds: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(WARM_UP_ROUNDS + ROUNDS):
        names = list(engines)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            prompts = [random_prompt(draw, PROMPT_TOKENS) for _ in range(BATCH)]
            speed = run_batch(engines[name], prompts)
            if number >= WARM_UP_ROUNDS:
                speeds[name].append(speed)
    return speeds


def compare(speeds: dict[str, list[float]]) -> dict[str, Any]:
    def median_of(arm: str) -> float:
        return statistics.median(
            speed for name, values in speeds.items() if name.split()[0] == arm for speed in values
        )

    return {
        "tokens_per_s": speeds,
        "engines": {name: statistics.median(values) for name, values in speeds.items()},
        "with_over_without": median_of("with") / median_of("without"),
    }


def print_hooks(hooks: dict[str, dict[str, float]]) -> None:
    columns = ("calls", "p50_us", "p99_us", "max_us", "processor_p50_us", "processor_p99_us")
    print(f"| scheduler-side hook | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
    for hook, row in hooks.items():
        print(f"| {hook} | {' | '.join(f'{row[column]:,.0f}' for column in columns)} |")


def print_results(results: dict[str, Any]) -> None:
    if "hooks" in results:
        print_hooks(results["hooks"])
    if "overhead" in results:
        overhead = results["overhead"]
        print("| engine | tokens/s (median) |\n|---|---:|")
        for name, speed in overhead["engines"].items():
            print(f"| {name} | {speed:,.0f} |")
        print(
            f"throughput with / without the connector, nothing reused: {overhead['with_over_without']:.3f} "
            f"({TWINS * ROUNDS} batches each; equal engines differ as the table shows)"
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
    if not args.overhead:
        results["hooks"] = measure_hooks()
    if not args.hooks:
        results["overhead"] = measure_overhead()
    print_results(results)
    if args.json:
        write_json(args.json, results)


if __name__ == "__main__":
    main()
