"""Does the scheduler stall while blocks come from another host, or while that host or the directory is broken?

    python -m benchmarks.bench_hook_faults [--requests N] [--json FILE]

Time in each scheduler-side hook of one engine, measured as bench_connector.py does, in six states:

  local             the prompts' blocks are in the host's own pool
  pulls             they are on another host only, and are pulled from there
  directory hangs   SIGSTOP to Redis           directory gone   SIGKILL to Redis
  peer hangs        SIGSTOP to the other host  peer gone        SIGKILL to it

Prompts of 32k tokens (1,024 blocks of 32), which another engine has stored on the other host before; while they wait,
short requests keep the engine stepping. Greedy tokens must be the same in all states. Hosts are two daemons over
loopback.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.bench_connector import core_apart, print_hooks, random_prompt, summarise
from benchmarks.completions import complete, reset_prefix_cache
from benchmarks.processes import ChildProcess, Engine, PoolDaemon, free_port
from benchmarks.report import write_json
from benchmarks.tiny_model import make_tiny_model
from vllm_kvpool.channel import call_daemon
from vllm_kvpool.pool.admin import fetch_stats
from vllm_kvpool.protocol import Clear

SEED = 11
PROMPTS, PROMPT_TOKENS, OUTPUT_TOKENS = 4, 32_768, 32
REQUESTS = 12
SHORT_TOKENS, SHORT_OUTPUT = 100, 64
SHAPE = {
    "hidden_size": 64, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "intermediate_size": 64,
}  # fmt: skip
STATES = ("local", "pulls", "directory hangs", "directory gone", "peer hangs", "peer gone")
SEEN = ("pulled_blocks", "pull_absent", "pull_deadline", "pull_lost", "pull_no_directory")


class Hosts:
    """A Redis, two hosts' daemons, and an engine whose hooks are timed on the second host."""

    def __init__(self, folder: Path, core: int, stack: ExitStack) -> None:
        self._folder, self._stack = folder, stack
        self._model = make_tiny_model(folder / "model", **SHAPE)
        port = free_port()
        redis = shutil.which("redis-server") or sys.exit("there is no redis-server")
        self.redis = ChildProcess(
            [redis, "--port", str(port), "--bind", "127.0.0.1", "--save", ""], folder / "redis.log"
        )
        stack.enter_context(self.redis)
        self.peer, self.own = (self._daemon(name, f"redis://127.0.0.1:{port}") for name in "ab")
        self.times = folder / "hooks.jsonl"
        self._timed = {"KVPOOL_HOOK_TIMES": str(self.times), "KVPOOL_HOOK_CORE": str(core)}

    def _daemon(self, name: str, directory: str) -> PoolDaemon:
        shm_dir = self._folder / name
        shm_dir.mkdir()
        daemon = PoolDaemon(
            self._folder / f"{name}.log", name="bench", size="1GiB", shm_dir=str(shm_dir),
            listen=f"tcp://127.0.0.1:{free_port()}", directory=directory,
        )  # fmt: skip
        return self._stack.enter_context(daemon)

    def _engine(self, daemon: PoolDaemon, **options: Any) -> Engine:
        # Pulls may take as long as they like to: on few cores two daemons and an engine wait for each other.
        extra = {"pool": "bench", "shm_dir": str(daemon.folder.parent), "pull_deadline_ms": 2_000}
        log = self._folder / f"engine-{daemon.folder.parent.name}.log"
        cut = ("--block-size", "32", "--max-num-batched-tokens", "4096")
        return Engine(self._model, log, extra=extra, options=cut, **options)

    def store(self, prompts: list[list[int]]) -> list[list[int]]:
        """On the peer, by an engine that ends then; what it answers."""
        with self._engine(self.peer) as engine:
            engine.wait_ready()
            complete(engine, [1] * 20)
            time.sleep(1)
            outputs = [complete(engine, p, max_tokens=OUTPUT_TOKENS).tokens for p in prompts]
            wanted = len(prompts) * (PROMPT_TOKENS // 32)
            wait_until(lambda: stats(self.peer)["ready"] >= wanted, "stores")
        return outputs

    def timed_engine(self) -> Engine:
        timed = ("TimedKVPoolConnector", "benchmarks.timed_connector")
        engine = self._engine(self.own, connector_class=timed, env=self._timed)
        self._stack.enter_context(engine).wait_ready()
        return engine


def stats(daemon: PoolDaemon) -> dict[str, int]:
    counters: dict[str, int] = fetch_stats("bench", str(daemon.folder.parent))["counters"]
    return counters


def wait_until(probe: Callable[[], bool], what: str, timeout_s: float = 60) -> None:
    give_up = time.monotonic() + timeout_s
    while not probe():
        if time.monotonic() > give_up:
            raise TimeoutError(what)
        time.sleep(0.1)


def enter(state: str, hosts: Hosts) -> None:
    """From the state before it in `STATES`."""
    match state:
        case "directory hangs":
            hosts.redis.signal(signal.SIGSTOP)
        case "directory gone":
            hosts.redis.kill()
        case "peer hangs":
            hosts.redis.start()
            wait_until(lambda: stats(hosts.peer).get("directory_writes", 0) > 0, "the directory")
            time.sleep(5)  # both have listed all of theirs again
            hosts.peer.signal(signal.SIGSTOP)
        case "peer gone":
            hosts.peer.kill()


@contextmanager
def short_requests(engine: Engine) -> Iterator[None]:
    """One after the other, for as long as the `with` lasts."""
    draw, stopping = random.Random(SEED + 1), threading.Event()

    def run() -> None:
        while not stopping.is_set():
            complete(engine, random_prompt(draw, SHORT_TOKENS), max_tokens=SHORT_OUTPUT)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()


def measure(
    state: str,
    hosts: Hosts,
    engine: Engine,
    prompts: list[list[int]],
    outputs: list[list[int]],
    requests: int,
) -> dict[str, Any]:
    lines, before = len(hosts.times.read_text().splitlines()), stats(hosts.own)
    cached = 0
    with short_requests(engine):
        for number in range(requests):
            if state != "local":
                call_daemon(hosts.own.paths, Clear())
                reset_prefix_cache(engine)
            done = complete(engine, prompts[number % PROMPTS], max_tokens=OUTPUT_TOKENS)
            assert done.tokens == outputs[number % PROMPTS], f"{state}: another output"
            cached += done.cached_tokens
            if state == "local":
                reset_prefix_cache(engine)
    time.sleep(0.6)
    complete(engine, [1] * 20)  # a last step, which writes the times of the last but one
    after = stats(hosts.own)
    return {
        "hooks": summarise(hosts.times.read_text().splitlines()[lines:]),
        "cached_share": cached / requests / PROMPT_TOKENS,
        "counters": {name: after.get(name, 0) - before.get(name, 0) for name in SEEN},
    }


def run(requests: int) -> dict[str, Any]:
    draw = random.Random(SEED)
    prompts = [random_prompt(draw, PROMPT_TOKENS) for _ in range(PROMPTS)]
    with core_apart() as core, ExitStack() as stack:
        folder = tempfile.TemporaryDirectory(dir="/dev/shm", prefix="bench-hook-faults-")
        hosts = Hosts(Path(stack.enter_context(folder)), core, stack)
        outputs = hosts.store(prompts)
        engine = hosts.timed_engine()
        for prompt in prompts:  # connects, and pulls all of them for the first state
            complete(engine, prompt, max_tokens=1)
            reset_prefix_cache(engine)
        results = {}
        for state in STATES:
            enter(state, hosts)
            results[state] = measure(state, hosts, engine, prompts, outputs, requests)
        return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=REQUESTS, help="in each state")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = run(args.requests)
    for state, result in results.items():
        seen = ", ".join(f"{name} {n:,}" for name, n in result["counters"].items() if n)
        print(
            f"\n{state}: {result['cached_share']:.1%} of the tokens cached; {seen or 'no pulls'}\n"
        )
        print_hooks(result["hooks"])
    if args.json:
        write_json(args.json, {"seed": SEED, "requests": args.requests, "states": results})


if __name__ == "__main__":
    main()
