"""The main job, shown: one pool, two engines, and a prompt that neither has to compute twice.

    python -m benchmarks.demo [--json FILE] [--prompts 5] [--keep-logs FOLDER]

Makes a tiny random model, starts a pool daemon and two `vllm serve` engines, and asks each prompt in four ways: for the
first time (recompute), again (VRAM hit), again after the engine's own cache was emptied (pool hit), and at the other
engine, which never computed it (pool hit of another engine's blocks). Then it kills the daemon during traffic and
starts it again. At last it puts a router in front of both, kills the engine that a conversation runs on, and goes on
with the conversation. Ends with a table, and with status 1 if a claim did not hold.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from benchmarks.completions import SETTLE_S, Completion, complete, reset_prefix_cache, wake
from benchmarks.conversation import Turn, converse
from benchmarks.processes import Engine, PoolDaemon, Router
from benchmarks.report import write_json
from benchmarks.tiny_model import make_tiny_model
from vllm_kvpool.channel import call_daemon
from vllm_kvpool.protocol import Stats, StatsReply

PROMPT_TOKENS = 6_000
BLOCK_TOKENS = 128  # vLLM's block size on the CPU
MODEL_CACHE = Path.home() / ".cache" / "vllm-kvpool" / "tiny-model"
SEED = 11
KV_CACHE = ("--num-gpu-blocks-override", "80", "--max-model-len", "8192")
"""10,240 tokens: the warm-up uses all of that memory once. In a larger cache every prompt would lie in pages that the
process has never touched, and a load would be charged with the kernel making them."""
ROUNDS, REPEATS = 2, 4
"""Turns of the engines for each prompt, and hits of a kind in each turn."""
TURNS, KILLED_AFTER = 8, 4
"""Of the conversation through the router."""
ROWS = ("recompute", "VRAM hit", "pool hit, same engine", "pool hit, other engine")


Run = dict[str, list[Completion]]
"""What was asked of one prompt, by row."""


class Claim(NamedTuple):
    text: str
    holds: bool


def answer(run: Run) -> list[int]:
    """The tokens that all rows must have."""
    return run["recompute"][0].tokens


class Show:
    """Progress for people: one line a step, with the time since the start."""

    def __init__(self) -> None:
        self._begun = time.monotonic()

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._begun:6.1f} s] {text}", flush=True)


class Stage:
    """The daemon and the two engines."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.daemon = PoolDaemon(
            folder / "daemon.log", name="demo", size="4GiB", shm_dir=str(folder / "shm")
        )
        extra = {"pool": "demo", "shm_dir": str(folder / "shm")}
        self.engines = [
            Engine(model, folder / f"engine-{name}.log", extra=extra, options=KV_CACHE)
            for name in "AB"
        ]

    def stored_blocks(self) -> int:
        reply = call_daemon(self.daemon.paths, Stats())
        assert isinstance(reply, StatsReply)
        return reply.counters["ready"]

    def wait_stored(self, blocks: int, timeout_s: float = 30) -> None:
        give_up = time.monotonic() + timeout_s
        while self.stored_blocks() < blocks:
            if time.monotonic() > give_up:
                raise TimeoutError(f"{self.stored_blocks()} blocks in the pool, {blocks} expected")
            time.sleep(0.05)


def make_prompts(count: int, seed: int = SEED) -> list[list[int]]:
    draw = random.Random(seed)
    return [
        [draw.randrange(256) for _ in range(PROMPT_TOKENS + draw.randrange(100))]
        for _ in range(count)
    ]


def ask_all_ways(stage: Stage, prompt: list[int]) -> Run:
    """Each kind of hit several times, in turns, so that what else the machine does meets all kinds alike."""

    def ask(row: str, engine: Engine, *, forget: bool = False) -> None:
        wake(engine)
        if run[row]:
            complete(engine, prompt)
        if forget:
            reset_prefix_cache(engine)
        run[row].append(complete(engine, prompt))

    a, b = stage.engines
    run: Run = {row: [] for row in ROWS}
    before = stage.stored_blocks()
    ask("recompute", a)
    stage.wait_stored(before + len(prompt) // BLOCK_TOKENS)
    for _ in range(ROUNDS):
        for _ in range(REPEATS):
            ask("VRAM hit", a)
            ask("pool hit, same engine", a, forget=True)
        time.sleep(SETTLE_S)
        for _ in range(REPEATS):
            ask("pool hit, other engine", b, forget=True)
        time.sleep(SETTLE_S)
    return run


def traffic(
    stage: Stage, prompts: list[list[int]], during: Callable[[], None]
) -> list[Completion | Exception]:
    """Known and new prompts at both engines at once, while `during` does its worst."""
    draw = random.Random(SEED + 1)
    work = [(engine, prompt) for prompt in prompts[:3] for engine in stage.engines]
    work += [(engine, [draw.randrange(256) for _ in range(700)]) for engine in stage.engines * 3]
    draw.shuffle(work)

    def one(job: tuple[Engine, list[int]]) -> Completion | Exception:
        try:
            return complete(*job)
        except (OSError, RuntimeError) as error:
            return error

    for engine in stage.engines:
        reset_prefix_cache(engine)
    with ThreadPoolExecutor(4) as threads:
        answers = [threads.submit(one, job) for job in work]
        time.sleep(0.5)
        during()
        return [answer.result() for answer in answers]


def medians(runs: list[Run]) -> dict[str, dict[str, float]]:
    table = {}
    for row in ROWS:
        completions = [c for run in runs for c in run[row]]
        shares = [c.cached_tokens / c.prompt_tokens for c in completions]
        table[row] = {
            "ttft_ms": statistics.median(c.ttft_s for c in completions) * 1e3,
            "cached_tokens": statistics.median(c.cached_tokens for c in completions),
            "prompt_tokens": statistics.median(c.prompt_tokens for c in completions),
            "cached_share": min(shares),
        }
    return table


def judge(runs: list[Run], table: dict[str, dict[str, float]]) -> list[Claim]:
    ttft = {row: values["ttft_ms"] for row, values in table.items()}
    slowest = max(ttft["pool hit, same engine"], ttft["pool hit, other engine"])
    different = [row for run in runs for row in ROWS for c in run[row] if c.tokens != answer(run)]
    varied = len({tuple(answer(run)) for run in runs}) == len(runs)
    share = table["pool hit, other engine"]["cached_share"]
    return [
        Claim(f"the other engine had >= 95% of each prompt cached ({share:.1%})", share >= 0.95),
        Claim(
            f"greedy tokens are the same in all four rows {different or ''}".rstrip(), not different
        ),
        Claim("different prompts have different answers (the comparison means something)", varied),
        Claim(
            f"a pool hit takes <= 1.25 x a VRAM hit ({slowest / ttft['VRAM hit']:.2f} x)",
            slowest <= 1.25 * ttft["VRAM hit"],
        ),
        Claim(
            f"a pool hit takes <= 1/5 of recompute (1/{ttft['recompute'] / slowest:.1f})",
            slowest * 5 <= ttft["recompute"],
        ),
    ]


def judge_outage(
    answers: list[Completion | Exception], prompts: list[list[int]], again: Completion
) -> list[Claim]:
    failed = [answer for answer in answers if isinstance(answer, Exception)]
    share = again.cached_tokens / again.prompt_tokens
    return [
        Claim(f"the daemon died during {len(answers)} requests, {len(failed)} failed", not failed),
        Claim(
            f"after its restart the pool still serves what it held ({share:.1%} cached)",
            share >= 0.95,
        ),
    ]


def conversation(stage: Stage, show: Show) -> list[Turn]:
    """Through a router; the engine that it runs on is killed when its blocks are in the pool."""
    stored = stage.stored_blocks()

    def after_turn(number: int, turn: Turn) -> None:
        share = turn.cached_tokens / turn.prompt_tokens
        show.say(
            f"turn {number}, on {turn.replica}: {share:.0%} of {turn.prompt_tokens} tokens cached"
        )
        if number == KILLED_AFTER:
            stage.wait_stored(stored + turn.prompt_tokens // BLOCK_TOKENS)
            show.say(f"killing {turn.replica} (SIGKILL)")
            next(engine for engine in stage.engines if turn.replica in engine.url).kill()

    urls = [engine.url for engine in stage.engines]
    with Router(stage.folder / "router.log", "--probe-interval-s", "1", *urls) as router:
        return converse(router.url, TURNS, after_turn)


def judge_conversation(turns: list[Turn]) -> list[Claim]:
    before, after = turns[:KILLED_AFTER], turns[KILLED_AFTER:]
    places = len({turn.replica for turn in before}), len({turn.replica for turn in after})
    moved = before[0].replica != after[0].replica
    full = after[0].prompt_tokens // BLOCK_TOKENS * BLOCK_TOKENS
    share = after[0].cached_tokens / full
    return [
        Claim(
            f"the router kept {len(turns)} turns together until their engine died, and then again",
            places == (1, 1) and moved,
        ),
        Claim(
            f"the first turn on the other engine found >= 90% of its full blocks ({share:.1%})",
            share >= 0.9,
        ),
    ]


def run(
    stage: Stage, show: Show, num_prompts: int
) -> tuple[dict[str, dict[str, float]], list[Claim]]:
    prompts = make_prompts(num_prompts)
    runs = []
    for number, prompt in enumerate(prompts, 1):
        runs.append(ask_all_ways(stage, prompt))
        middle = {row: statistics.median(c.ttft_s for c in runs[-1][row]) * 1e3 for row in ROWS}
        times = ", ".join(f"{row} {ms:,.0f} ms" for row, ms in middle.items())
        show.say(f"prompt {number}/{num_prompts}, {len(prompt)} tokens: {times}")
    table = medians(runs)
    claims = judge(runs, table)
    show.say("traffic at both engines; killing the daemon (SIGKILL) in the middle")
    answers = traffic(stage, prompts, stage.daemon.kill)
    show.say("starting the daemon again")
    stage.daemon.start()
    reset_prefix_cache(stage.engines[0])
    again = complete(stage.engines[0], prompts[-1])
    claims += judge_outage(answers, prompts, again)
    claims.append(Claim("and gives the same answer", again.tokens == answer(runs[-1])))
    show.say("a conversation through the router")
    claims += judge_conversation(conversation(stage, show))
    return table, claims


def print_table(table: dict[str, dict[str, float]]) -> None:
    print("\n| prompt of about 6k tokens | TTFT, ms (median) | cached tokens |\n|---|---:|---:|")
    for row, values in table.items():
        print(
            f"| {row} | {values['ttft_ms']:,.0f} | {values['cached_tokens']:,.0f} of {values['prompt_tokens']:,.0f} |"
        )
    print()


def start(stage: Stage, stack: ExitStack, show: Show) -> None:
    show.say("starting the pool daemon and two engines (vllm serve; about a minute)")
    stack.enter_context(stage.daemon)
    for engine in stage.engines:
        stack.enter_context(engine)
    for engine in stage.engines:
        engine.wait_ready()
    for engine in stage.engines:
        for prompt in make_prompts(2, SEED + 2):
            complete(engine, prompt)
    show.say("both engines answer")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--prompts", type=int, default=5)
    parser.add_argument("--keep-logs", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    show = Show()
    model = make_tiny_model(MODEL_CACHE)
    with ExitStack() as stack:
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm", prefix="kvpool-demo-"))
        )
        (folder / "shm").mkdir()
        if args.keep_logs:
            stack.callback(
                shutil.copytree,
                folder,
                args.keep_logs,
                ignore=shutil.ignore_patterns("shm"),
                dirs_exist_ok=True,
            )
        stage = Stage(folder, model)
        start(stage, stack, show)
        table, claims = run(stage, show, args.prompts)
    print_table(table)
    for claim in claims:
        print(f"{'holds' if claim.holds else 'FAILS'}  {claim.text}")
    if args.json:
        write_json(args.json, {"rows": table, "claims": [claim._asdict() for claim in claims]})
    return 0 if all(claim.holds for claim in claims) else 1


if __name__ == "__main__":
    sys.exit(main())
