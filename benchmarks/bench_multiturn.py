"""Conversations that do not fit into VRAM: how long until the first token of a turn, and how many turns a second?

    python -m benchmarks.bench_multiturn [--arms none,kvpool,offloading] [--concurrency 1,8,32] [--json FILE]

One engine an arm, in a process of its own, with the shape of Llama 3 8B and dummy weights in bfloat16, CUDA graphs for
decoding. 96 users have sent a first message of 2,048 random tokens (seed 13), all at once, which is not timed. Then
each turn says 128 tokens more, behind the conversation so far, and gets 8 tokens: one round of all users with one
request under way, two rounds with 8, two with 32. The order of users is drawn anew for each round. The KV cache has
room for a third of what they all have said in the end (`--share`), so that most of a conversation was dropped by the
time it goes on.

Each concurrency ends after `--limit-s` seconds, with what was done by then; results are printed and written after each
arm. The counters in the JSON file say what our connector did meanwhile.

Caveats. Users answer at once: there is no time to think, which would be time to store. `tokens/s` counts prompt tokens,
cached or not. An arm that reaches the time limit has shorter conversations afterwards than one that does not.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.arms import (
    Arm,
    add_arms,
    numbers,
    run_arms,
    run_child,
    run_script,
    script_parser,
)
from benchmarks.offline import OfflineEngine, random_prompt
from benchmarks.report import percentile, write_json

MODULE = "benchmarks.bench_multiturn"
ARMS = "none,kvpool,offloading,simple"
SEED = 13
MORE_TOKENS, OUTPUT_TOKENS = 128, 8
BLOCK_TOKENS = 16
"""vLLM's default on a GPU; `--engine` may say otherwise."""
GRAPH_SIZES = [1, 2, 4, 8, 16, 32]


# in the arm's process -----------------------------------------------------------------------------


@dataclass
class Turn:
    user: int
    prompt_tokens: int
    begun_s: float
    ttft_ms: float = 0.0
    cached_tokens: int = 0


class Conversations:
    """What has been said so far, by everybody."""

    def __init__(self, engine: OfflineEngine, users: int) -> None:
        self._engine = engine
        self._draw = random.Random(SEED)
        self._texts: list[list[int]] = [[] for _ in range(users)]
        self._asked = 0

    def go_on(
        self, num_tokens: int, rounds: int, concurrency: int, limit_s: float
    ) -> dict[str, Any]:
        """Everybody says `num_tokens` more, `rounds` times; nobody begins after `limit_s`."""
        users = range(len(self._texts))
        waiting = deque(
            user for _ in range(rounds) for user in self._draw.sample(users, len(users))
        )
        busy: dict[str, Turn] = {}
        ended: list[Turn] = []
        begun_s = time.perf_counter()
        while waiting or busy:
            while waiting and len(busy) < concurrency and is_free(waiting[0], busy.values()):
                self._ask(waiting.popleft(), num_tokens, busy)
            ended += self._step(busy)
            if time.perf_counter() > begun_s + limit_s:
                waiting.clear()
        return {
            "concurrency": concurrency,
            "turns": len(ended),
            "planned_turns": rounds * len(users),
            "seconds": time.perf_counter() - begun_s,
            "ttft_ms": [turn.ttft_ms for turn in ended],
            "prompt_tokens": sum(turn.prompt_tokens for turn in ended),
            "cached_tokens": sum(turn.cached_tokens for turn in ended),
        }

    def _ask(self, user: int, num_tokens: int, busy: dict[str, Turn]) -> None:
        text = self._texts[user]
        text += random_prompt(self._draw, num_tokens)
        self._asked += 1
        request_id = f"turn-{self._asked}"
        busy[request_id] = Turn(user, len(text), time.perf_counter())
        self._engine.llm.llm_engine.add_request(
            request_id, {"prompt_token_ids": list(text)}, self._engine.sampling(OUTPUT_TOKENS)
        )

    def _step(self, busy: dict[str, Turn]) -> list[Turn]:
        """Those that have ended."""
        ended = []
        for output in self._engine.llm.llm_engine.step():
            turn, tokens = busy[output.request_id], output.outputs[0].token_ids
            if tokens and not turn.ttft_ms:
                turn.ttft_ms = (time.perf_counter() - turn.begun_s) * 1e3
                turn.cached_tokens = output.num_cached_tokens or 0
            if output.finished:
                self._texts[turn.user] += tokens
                ended.append(busy.pop(output.request_id))
        return ended


def is_free(user: int, turns: Iterable[Turn]) -> bool:
    """Whether that user has an answer to the last turn."""
    return all(turn.user != user for turn in turns)


def run_job(job: dict[str, Any]) -> None:
    options = {
        "max_num_seqs": GRAPH_SIZES[-1],
        "num_gpu_blocks_override": job["num_blocks"],
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": GRAPH_SIZES,
        },
    }
    engine = OfflineEngine(job["model"], job["transfer"], **(options | job["engine"]))
    engine.generate(random_prompt(random.Random(SEED), job["first_tokens"]), OUTPUT_TOKENS)
    talks = Conversations(engine, job["users"])
    first = talks.go_on(job["first_tokens"], 1, GRAPH_SIZES[-1], job["limit_s"])
    print(f"first messages: {first['turns']} in {first['seconds']:.1f} s", flush=True)
    passes = []
    counted = engine.counters()
    for concurrency in job["concurrency"]:
        rounds = 1 if concurrency == 1 else 2
        one = talks.go_on(MORE_TOKENS, rounds, concurrency, job["limit_s"])
        before, counted = counted, engine.counters()
        one["counters"] = {name: value - before[name] for name, value in counted.items()}
        passes.append(one)
        print(f"{concurrency} at once done in {one['seconds']:.1f} s", flush=True)
        result = {"start_s": engine.start_s, "first_s": first["seconds"], "passes": passes}
        Path(job["result"]).write_text(json.dumps(result))


# all arms -----------------------------------------------------------------------------------------


def num_blocks(args: argparse.Namespace) -> int:
    rounds = sum(1 if one == 1 else 2 for one in args.concurrency)
    longest = args.first_tokens + OUTPUT_TOKENS + rounds * (MORE_TOKENS + OUTPUT_TOKENS)
    block_tokens = args.engine.get("block_size", BLOCK_TOKENS)
    return int(args.users * longest * args.share) // block_tokens


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    job = {
        "users": args.users,
        "first_tokens": args.first_tokens,
        "num_blocks": num_blocks(args),
        "concurrency": args.concurrency,
        "limit_s": args.limit_s,
    }
    results: dict[str, Any] = {**job, "arms": {}}

    def run(arm: Arm) -> None:
        result = run_child(MODULE, arm, job, folder, args)
        if result is None:
            return
        results["arms"][arm.name] = result
        print_rows(arm.name, result)
        if args.json:
            write_json(args.json, results)

    results["notes"] = run_arms(args.arms.split(","), run, args, folder)
    return results


def print_rows(name: str, arm: dict[str, Any]) -> None:
    for one in arm["passes"]:
        seconds = one["seconds"]
        cells = [name, str(one["concurrency"]), f"{one['turns']}/{one['planned_turns']}"]
        cells += [f"{percentile(one['ttft_ms'], p):.0f}" for p in (0.5, 0.95)]
        cells += [f"{one['turns'] / seconds:.1f}", f"{one['prompt_tokens'] / seconds:,.0f}"]
        cells.append(f"{one['cached_tokens'] / one['prompt_tokens']:.0%}")
        print("| " + " | ".join(cells) + " |", flush=True)


def print_results(results: dict[str, Any]) -> None:
    print("\n" + "\n".join(results["notes"]))
    print(
        f"\n{results['users']} conversations, {results['num_blocks']:,} blocks of KV cache\n\n"
        "| arm | at once | turns | TTFT p50, ms | p95, ms | turns/s | tokens/s | cached |\n"
        "|---|---:|---:|---:|---:|---:|---:|---:|"
    )
    for name, arm in results["arms"].items():
        print_rows(name, arm)


def main() -> None:
    parser = script_parser(__doc__)
    add_arms(parser, ARMS)
    parser.add_argument("--concurrency", type=numbers, default="1,8,32")
    parser.add_argument("--users", type=int, default=96)
    parser.add_argument("--first-tokens", type=int, default=2_048)
    parser.add_argument("--share", type=float, default=1 / 3, help="of all that VRAM holds")
    parser.add_argument("--limit-s", type=float, default=20, help="for one concurrency")
    run_script(parser, run_job, measure, print_results)


if __name__ == "__main__":
    main()
