"""Conversations that do not fit into VRAM: how long until the first token of a turn, and how many turns a second?

    python -m benchmarks.bench_multiturn [--arms none,kvpool,offloading] [--concurrency 1,8,32] [--json FILE]

One engine an arm, with the shape of Llama 3 8B and dummy weights in bfloat16, CUDA graphs for decoding. 96 users have
sent a first message of 1,920 random tokens (seed 13), all at once, which is not timed. Then each turn says 128 tokens
more, behind the conversation so far, and gets 8 tokens: one round of all users with one request under way, two rounds
with 8, two with 32. The order of users is drawn anew for each round. The KV cache has room for a third of what they all
have said in the end (`--share`), so that most of a conversation was dropped by the time it goes on; the pool and each
peer's memory have room for all of it (30.6 of 32 GiB).

All engines live at the same time and take turns (see the module `turns`): each goes on with its conversations for a
slice of 12 turns (1 at once), 32 (8) or 64 (32), until all of these have ended; then the next engine has its slice. The
figures are over all slices of a concurrency, and seconds those within them. The median of each slice is told too: what
the machine did to all arms shows there.

A slice begins no turn after `--limit-s` seconds; of an arm that was lost there are fewer slices: "turns" tells how many
were done of all that there are to do. What a user says in a turn is the same in all arms, also after a turn that one of
them left out. With `--json` the counters say what our connector did in each slice;
`--trace` tells what the requests of ours waited for, step by step.

Caveats. Users answer at once: there is no time to think, which would be time to store. At the end of a slice the engine
runs empty, which costs throughput, all arms alike. `tokens/s` counts prompt tokens, cached or not. An arm that reaches
the time limit has shorter conversations afterwards than one that does not.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.arms import add_arms, salt_of, take_turns, trace_file
from benchmarks.gpu_script import numbers, run_script, script_parser
from benchmarks.offline import OfflineEngine, kv_bytes_per_token, random_prompt
from benchmarks.report import percentile
from benchmarks.traced_steps import STEPS, by_step, spans_of, told, traced_requests

MODULE = "benchmarks.bench_multiturn"
ARMS = "none,kvpool,offloading,simple"
SEED = 13
MORE_TOKENS, OUTPUT_TOKENS = 128, 8
BATCHED_TOKENS = 4_096
"""A step of 32 turns of 128 tokens; more would need memory that the KV cache of a fifth engine needs."""
GRAPH_SIZES = [1, 2, 4, 8, 16, 32]


# in the arm's process -----------------------------------------------------------------------------


class Said(NamedTuple):
    user: int
    round: int

    def tokens(self, count: int) -> list[int]:
        """Of this turn alone: a turn that was left out changes none after it."""
        return random_prompt(random.Random(f"{SEED} {self.user} {self.round}"), count)


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
        """Of the order of users only: the same in all arms, whatever their time allows."""
        self._texts: list[list[int]] = [[] for _ in range(users)]
        self._rounds = 0

    def plan(self, rounds: int) -> list[Said]:
        """In each round everybody has a turn."""
        users = range(len(self._texts))
        plan = []
        for _ in range(rounds):
            plan += [Said(user, self._rounds) for user in self._draw.sample(users, len(users))]
            self._rounds += 1
        return plan

    def go_on(
        self, plan: list[Said], num_tokens: int, concurrency: int, limit_s: float
    ) -> dict[str, Any]:
        """They say `num_tokens` more, one after the other; nobody begins after `limit_s`."""
        waiting = deque(plan)
        busy: dict[str, Turn] = {}
        ended: list[Turn] = []
        self._engine.wake()
        counted = self._engine.counters()
        begun_s = time.perf_counter()
        while waiting or busy:
            while waiting and len(busy) < concurrency and is_free(waiting[0].user, busy.values()):
                self._ask(waiting.popleft(), num_tokens, busy)
            ended += self._step(busy)
            if time.perf_counter() > begun_s + limit_s:
                waiting.clear()
        seconds = time.perf_counter() - begun_s
        return {
            "concurrency": concurrency,
            "turns": len(ended),
            "planned_turns": len(plan),
            "begun_s": begun_s,
            "seconds": seconds,
            "ttft_ms": [turn.ttft_ms for turn in ended],
            "prompt_tokens": sum(turn.prompt_tokens for turn in ended),
            "cached_tokens": sum(turn.cached_tokens for turn in ended),
            "counters": {
                name: value - counted[name] for name, value in self._engine.counters().items()
            },
        }

    def _ask(self, said: Said, num_tokens: int, busy: dict[str, Turn]) -> None:
        text = self._texts[said.user]
        text += said.tokens(num_tokens)
        request_id = f"turn-{said.round}-{said.user}"
        busy[request_id] = Turn(said.user, len(text), time.perf_counter())
        self._engine.llm.llm_engine.add_request(
            request_id, self._engine.salted(list(text)), self._engine.sampling(OUTPUT_TOKENS)
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


def run_job(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    options = {
        "max_num_seqs": GRAPH_SIZES[-1],
        "max_model_len": job["longest"],
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": GRAPH_SIZES,
        },
    }
    engine = OfflineEngine(
        job["model"], job["transfer"], salt=job["salt"], **(options | job["engine"])
    )
    engine.generate(random_prompt(random.Random(SEED), job["first_tokens"]), OUTPUT_TOKENS)
    talks = Conversations(engine, job["users"])
    yield {"start_s": engine.start_s}
    yield talks.go_on(talks.plan(1), job["first_tokens"], GRAPH_SIZES[-1], job["first_limit_s"])
    for concurrency in job["concurrency"]:
        plan = talks.plan(num_rounds(concurrency))
        size = slice_turns(concurrency)
        for first in range(0, len(plan), size):
            some = plan[first : first + size]
            yield talks.go_on(some, MORE_TOKENS, concurrency, job["limit_s"])


def num_rounds(concurrency: int) -> int:
    return 1 if concurrency == 1 else 2


def slice_turns(concurrency: int) -> int:
    return 12 if concurrency == 1 else max(32, 2 * concurrency)


# all arms -----------------------------------------------------------------------------------------


def longest_tokens(args: argparse.Namespace) -> int:
    """A conversation in the end."""
    rounds = sum(num_rounds(concurrency) for concurrency in args.concurrency)
    return args.first_tokens + OUTPUT_TOKENS + rounds * (MORE_TOKENS + OUTPUT_TOKENS)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    longest = longest_tokens(args)
    token_bytes = kv_bytes_per_token(args.size, args.kv_cache_dtype)
    if args.kv_gib is None:
        args.kv_gib = args.users * longest * args.share * token_bytes / 2**30
    args.engine = {"max_num_batched_tokens": BATCHED_TOKENS, **args.engine}
    job = {
        "users": args.users,
        "first_tokens": args.first_tokens,
        "longest": longest,
        "concurrency": args.concurrency,
        "limit_s": args.limit_s,
        "first_limit_s": args.timeout_s,
    }
    results: dict[str, Any] = {**job, "kv_gib": args.kv_gib}

    def job_of(name: str) -> dict[str, Any]:
        return {**job, "salt": salt_of(name)}

    take_turns(MODULE, job_of, results, folder, args)
    turns = results["turns"]
    results["table"] = [
        summary(name, slices, args.users * num_rounds(concurrency))
        for name in turns
        for concurrency in args.concurrency
        if (slices := slices_of(turns[name], concurrency))
    ]
    results["trace"] = {
        name: trace(turns[name], args.concurrency, trace_file(folder, name))
        for name in turns
        if trace_file(folder, name).exists()
    }
    return results


def slices_of(turns: list[Any], concurrency: int) -> list[dict[str, Any]]:
    """The first value tells of the start, the second of the first messages."""
    return [one for one in turns[2:] if one["concurrency"] == concurrency]


def summary(name: str, slices: list[dict[str, Any]], planned_turns: int) -> dict[str, Any]:
    """`planned_turns`: of all slices, those too that were not reached."""
    sums = ("turns", "seconds", "prompt_tokens", "cached_tokens")
    line: dict[str, Any] = {figure: sum(one[figure] for one in slices) for figure in sums}
    line["planned_turns"] = planned_turns
    ttft_ms = [ms for one in slices for ms in one["ttft_ms"]]
    quantiles = {f"ttft_p{p}": percentile(ttft_ms, p / 100) for p in (50, 95)}
    return {"arm": name, "concurrency": slices[0]["concurrency"], **line, **quantiles}


def trace(turns: list[Any], concurrencies: list[int], path: Path) -> list[dict[str, Any]]:
    """Milliseconds between the steps of the requests, by how many were under way."""
    requests = traced_requests(path)
    lines = []
    for concurrency in concurrencies:
        spans = [
            spans_of(found, found["arrived"])
            for one in slices_of(turns, concurrency)
            for found in requests
            if 0 < found["arrived"] - one["begun_s"] < one["seconds"]
        ]
        steps = by_step(spans, (*STEPS[1:], "launch_cpu"))
        lines.append({"concurrency": concurrency, "steps": steps})
    return lines


# the report ---------------------------------------------------------------------------------------


def print_results(results: dict[str, Any]) -> None:
    print("\n" + "\n".join(results["notes"]))
    print_slices(results["turns"], results["concurrency"])
    print(
        f"\n{results['users']} conversations, {results['kv_gib']:.1f} GiB of KV cache\n\n"
        "| arm | at once | turns | TTFT p50, ms | p95, ms | turns/s | tokens/s | cached |\n"
        "|---|---:|---:|---:|---:|---:|---:|---:|"
    )
    for line in results["table"]:
        print_row(line)
    for name, lines in results["trace"].items():
        print(f"\n{name}: ms to each step from the one before, median / p95")
        for line in lines:
            print(f"{line['concurrency']} at once: {told(line['steps'])}")


def print_slices(turns: dict[str, list[Any]], concurrencies: list[int]) -> None:
    print("\nmedian TTFT of each slice, ms:\n")
    print("| at once | slice | " + " | ".join(turns) + " |")
    print("|---:|---:|" + "---:|" * len(turns))
    for concurrency in concurrencies:
        by_arm = [slices_of(values, concurrency) for values in turns.values()]
        for number in range(max(map(len, by_arm), default=0)):
            cells = [
                f"{percentile(slices[number]['ttft_ms'], 0.5):.1f}" if number < len(slices) else ""
                for slices in by_arm
            ]
            print("| " + " | ".join([str(concurrency), str(1 + number), *cells]) + " |")


def print_row(line: dict[str, Any]) -> None:
    seconds = line["seconds"]
    cells = [line["arm"], str(line["concurrency"]), f"{line['turns']}/{line['planned_turns']}"]
    cells += [f"{line[f'ttft_p{p}']:.1f}" for p in (50, 95)]
    cells += [f"{line['turns'] / seconds:.1f}", f"{line['prompt_tokens'] / seconds:,.0f}"]
    cells.append(f"{line['cached_tokens'] / line['prompt_tokens']:.0%}")
    print("| " + " | ".join(cells) + " |")


def main() -> None:
    parser = script_parser(__doc__)
    add_arms(parser, ARMS)
    parser.set_defaults(kv_gib=None, pool_size="32GiB")
    parser.add_argument("--concurrency", type=numbers, default="1,8,32")
    parser.add_argument("--users", type=int, default=96)
    parser.add_argument("--first-tokens", type=int, default=1_920)
    parser.add_argument("--share", type=float, default=1 / 3, help="of all that VRAM holds")
    parser.add_argument("--limit-s", type=float, default=10, help="for one slice")
    parser.add_argument(
        "--trace", action="store_true", help="of our own arms: what a request waits for"
    )
    run_script(parser, run_job, measure, print_results)


if __name__ == "__main__":
    main()
