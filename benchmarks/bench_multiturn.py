"""Conversations that do not fit into VRAM: how long until the first token of a turn, and how many turns a second?

    python -m benchmarks.bench_multiturn [--arms none,kvpool,offloading] [--concurrency 1,8,32] [--json FILE]

One engine an arm, in a process of its own, with the shape of Llama 3 8B and dummy weights in bfloat16, CUDA graphs for
decoding. 32 users talk: a first message of 4,096 random tokens (seed 13), then three of 512; each turn sends the
conversation so far, and gets 16 tokens. So many users as `--concurrency` says have a request under way; turns come in
rounds, in an order drawn anew for each, so that a user's blocks are the next to be dropped when they are asked for.
The KV cache has room for a third of all conversations (`--share`). Times are those of later turns; the first ones are
new to everybody. Each concurrency has new users, in the same engine.

Caveats. Users answer at once: there is no time to think, which would be time to store. `tokens/s` counts prompt tokens,
cached or not.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import deque
from pathlib import Path
from typing import Any

from benchmarks.arms import Arm, add_options, run_arms, run_child, work_folder
from benchmarks.offline import OfflineEngine, make_model, random_prompt
from benchmarks.report import percentile, write_json

MODULE = "benchmarks.bench_multiturn"
ARMS = "none,kvpool,offloading,simple"
SEED = 13
FIRST_TOKENS, MORE_TOKENS, TURNS = 4_096, 512, 4
OUTPUT_TOKENS = 16
BLOCK_TOKENS = 16
GRAPH_SIZES = [1, 2, 4, 8, 16, 32]


# in the arm's process -----------------------------------------------------------------------------


class Conversations:
    """All that is said at one concurrency, and what became of it."""

    def __init__(self, engine: OfflineEngine, users: int, concurrency: int) -> None:
        self._engine = engine
        self._concurrency = concurrency
        self._draw = random.Random(f"{SEED} {concurrency}")
        self._texts = [random_prompt(self._draw, FIRST_TOKENS) for _ in range(users)]
        self._waiting: deque[tuple[int, int]] = deque()
        """(turn, user), in the order in which they come."""
        for turn in range(TURNS):
            self._waiting += [(turn, user) for user in self._draw.sample(range(users), users)]
        self._busy: dict[str, tuple[int, int]] = {}
        self._begun_s: dict[str, float] = {}
        """Of requests without a token."""
        self.first_ms: list[float] = []
        self.prompt_tokens = 0
        self.cached_tokens = 0

    def go_on(self) -> bool:
        """One step of the engine. False: there is nothing left to say."""
        while self._waiting and len(self._busy) < self._concurrency and self._is_free():
            self._ask(*self._waiting.popleft())
        for output in self._engine.llm.llm_engine.step():
            self._take(output)
        return bool(self._waiting or self._busy)

    def _is_free(self) -> bool:
        """Whether the next one to talk has an answer to the last turn."""
        return self._waiting[0][1] not in {user for _, user in self._busy.values()}

    def _ask(self, turn: int, user: int) -> None:
        if turn > 0:
            self._texts[user] += random_prompt(self._draw, MORE_TOKENS)
        self.prompt_tokens += len(self._texts[user])
        request_id = f"{self._concurrency}-{turn}-{user}"
        self._busy[request_id] = (turn, user)
        self._begun_s[request_id] = time.perf_counter()
        prompt = {"prompt_token_ids": list(self._texts[user])}
        sampling = self._engine.sampling(OUTPUT_TOKENS)
        self._engine.llm.llm_engine.add_request(request_id, prompt, sampling)

    def _take(self, output: Any) -> None:
        turn, user = self._busy[output.request_id]
        tokens = output.outputs[0].token_ids
        if tokens and output.request_id in self._begun_s:
            seconds = time.perf_counter() - self._begun_s.pop(output.request_id)
            if turn > 0:
                self.first_ms.append(seconds * 1e3)
                self.cached_tokens += output.num_cached_tokens or 0
        if output.finished:
            del self._busy[output.request_id]
            self._texts[user] += tokens


def talk(engine: OfflineEngine, users: int, concurrency: int) -> dict[str, Any]:
    talks = Conversations(engine, users, concurrency)
    begun = time.perf_counter()
    while talks.go_on():
        pass
    return {
        "concurrency": concurrency,
        "seconds": time.perf_counter() - begun,
        "ttft_ms": talks.first_ms,
        "prompt_tokens": talks.prompt_tokens,
        "cached_tokens": talks.cached_tokens,
    }


def run_job(job: dict[str, Any]) -> None:
    engine = OfflineEngine(
        job["model"],
        job["transfer"],
        max_num_seqs=GRAPH_SIZES[-1],
        num_gpu_blocks_override=job["num_blocks"],
        compilation_config={
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": GRAPH_SIZES,
        },
        **job["engine"],
    )
    engine.generate(random_prompt(random.Random(SEED), 3_000), OUTPUT_TOKENS)
    passes = []
    for concurrency in job["concurrency"]:
        passes.append(talk(engine, job["users"], concurrency))
        print(f"{concurrency} at once done", flush=True)
        Path(job["result"]).write_text(json.dumps({"start_s": engine.start_s, "passes": passes}))


# all arms -----------------------------------------------------------------------------------------


def num_blocks(users: int, share: float) -> int:
    longest = FIRST_TOKENS + (TURNS - 1) * MORE_TOKENS + TURNS * OUTPUT_TOKENS
    return int(users * longest * share) // BLOCK_TOKENS


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    arms: dict[str, Any] = {}
    job = {
        "users": args.users,
        "num_blocks": num_blocks(args.users, args.share),
        "concurrency": [int(text) for text in args.concurrency.split(",")],
    }

    def run(arm: Arm) -> None:
        result = run_child(MODULE, arm, job, folder, args)
        if result is not None:
            arms[arm.name] = result

    notes = run_arms(args.arms.split(","), run, args, folder)
    return {"notes": notes, **job, "arms": arms}


def print_results(results: dict[str, Any]) -> None:
    print("\n" + "\n".join(results["notes"]))
    print(
        f"\nKV cache of {results['num_blocks'] * BLOCK_TOKENS:,} tokens\n\n"
        "| arm | at once | TTFT p50, ms | p95, ms | turns/s | tokens/s | cached tokens |\n"
        "|---|---:|---:|---:|---:|---:|---:|"
    )
    for name, arm in results["arms"].items():
        for one in arm["passes"]:
            cells = [name, str(one["concurrency"])]
            cells += [f"{percentile(one['ttft_ms'], p):.0f}" for p in (0.5, 0.95)]
            cells += [f"{results['users'] * TURNS / one['seconds']:.1f}"]
            cells += [
                f"{one['prompt_tokens'] / one['seconds']:,.0f}",
                f"{one['cached_tokens']:,}",
            ]
            print("| " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, ARMS)
    parser.add_argument("--concurrency", default="1,8,32")
    parser.add_argument("--users", type=int, default=32)
    parser.add_argument("--share", type=float, default=1 / 3, help="of all that VRAM holds")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run_job(json.loads(args.child.read_text()))
        return
    args.engine = {}
    with work_folder() as folder:
        make_model(folder / "model", args.size)
        results = measure(args, folder)
    print_results(results)
    if args.json:
        write_json(args.json, results)


if __name__ == "__main__":
    main()
