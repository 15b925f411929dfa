"""How fast are the pool's verbs, in an index of a million blocks, through a real daemon?

    python -m benchmarks.bench_pool [--blocks 1000000] [--json FILE] [--no-peer]

Everything is measured from Python, as the connector calls it. The peer is LMCache 0.5.6's server answering a lookup
of the same 32,768 tokens, in the same run (`scripts/venv-lmcache` makes its environment).
"""

from __future__ import annotations

import argparse
import random
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.processes import PoolDaemon
from benchmarks.report import percentile, write_json
from vllm_kvpool.channel import call_daemon
from vllm_kvpool.client import PoolClient
from vllm_kvpool.protocol import Namespace, Stats, StatsReply
from vllm_kvpool.types import KEY_BYTES, BlockKeys, SlotRefs, num_refs

SLOT_BYTES = 4096
PROMPT_BLOCKS = 2_048  # 32,768 tokens in blocks of 16
STORE_BATCH = 64
IN_FLIGHT = 8  # store batches that a busy engine has under way
REPEAT = 1_000
RESTARTS = 5
SEED = 7


def start_daemon(folder: Path, blocks: int) -> PoolDaemon:
    size = int(blocks * SLOT_BYTES * 1.1) + (64 << 20)
    return PoolDaemon(
        folder / "daemon.log",
        name="bench",
        size=str(size),
        shm_dir=str(folder),
        min_block=str(SLOT_BYTES),
    ).start()


def wait_for(what: Callable[[], bool], timeout_s: float = 60) -> None:
    give_up = time.monotonic() + timeout_s
    while not what():
        if time.monotonic() > give_up:
            raise TimeoutError("the daemon did not get there")
        time.sleep(0.01)


def stats(daemon: PoolDaemon) -> StatsReply:
    reply = call_daemon(daemon.paths, Stats())
    assert isinstance(reply, StatsReply)
    return reply


def connect(daemon: PoolDaemon) -> PoolClient:
    namespace = Namespace(digest=bytes(32), slot_bytes=SLOT_BYTES, fields={"model": "bench"})
    client = PoolClient(daemon.folder, namespace, timeout_ms=10_000)

    def connected() -> bool:
        client.poll()
        return client.connected

    wait_for(connected)
    return client


def store_all(client: PoolClient, keys: bytes) -> float:
    """Blocks a second through ZeroMQ: prepare, then complete, `IN_FLIGHT` batches at a time."""
    batches = range(0, len(keys) // KEY_BYTES, STORE_BATCH)
    open_batches = stored = 0
    begun = time.perf_counter()
    todo = iter(batches)
    while stored < len(keys) // KEY_BYTES:
        while open_batches < IN_FLIGHT and (start := next(todo, None)) is not None:
            chain = keys[start * KEY_BYTES : (start + STORE_BATCH) * KEY_BYTES]
            parent = (
                keys[(start - 1) * KEY_BYTES : start * KEY_BYTES] if start % PROMPT_BLOCKS else b""
            )
            assert client.prepare_store(BlockKeys(chain), parent) is not None
            open_batches += 1
        for grant in client.poll():
            assert grant.refs is not None, grant.reason
            client.complete_store(grant.request_id)
            stored += num_refs(grant.refs)
            open_batches -= 1
    return stored / (time.perf_counter() - begun)


def prompts(keys: bytes) -> list[BlockKeys]:
    """`REPEAT` chains of `PROMPT_BLOCKS`, in random order."""
    bytes_each = PROMPT_BLOCKS * KEY_BYTES
    starts = list(range(0, len(keys) - bytes_each + 1, bytes_each))
    chosen = random.Random(SEED).choices(starts, k=REPEAT)
    return [BlockKeys(keys[start : start + bytes_each]) for start in chosen]


def time_us(calls: list[Callable[[], object]]) -> dict[str, float]:
    times = []
    for call in calls:
        begun = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - begun) / 1e3)
    return {"p50_us": percentile(times, 0.5), "p99_us": percentile(times, 0.99)}


def time_matches(client: PoolClient, chains: list[BlockKeys]) -> dict[str, float]:
    assert all(num_refs(client.match_prefix(chain)) == PROMPT_BLOCKS for chain in chains[:20])
    return time_us([lambda chain=chain: client.match_prefix(chain) for chain in chains])  # type: ignore[misc]


def time_leases(client: PoolClient, chains: list[BlockKeys]) -> dict[str, float]:
    matches = [client.match_prefix(chain) for chain in chains]

    def lease_and_release(refs: SlotRefs) -> None:
        client.lease(refs)
        client.release(refs)

    return time_us([lambda refs=refs: lease_and_release(refs) for refs in matches])  # type: ignore[misc]


def time_restarts(daemon: PoolDaemon) -> dict[str, float]:
    """SIGKILL, then from starting the process to the first answer, with all blocks there."""
    before = stats(daemon).counters["ready"]
    seconds = []
    for _ in range(RESTARTS):
        daemon.kill()
        begun = time.perf_counter()
        daemon.start()
        after = stats(daemon).counters["ready"]
        seconds.append(time.perf_counter() - begun)
        assert after == before, (before, after)
    return {"p50_s": percentile(seconds, 0.5), "worst_s": max(seconds), "ready_blocks": before}


def measure(blocks: int) -> dict[str, Any]:
    keys = random.Random(SEED).randbytes(blocks * KEY_BYTES)
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="bench-pool-") as folder:
        daemon = start_daemon(Path(folder), blocks)
        try:
            wait_for(
                lambda: stats(daemon).pool["populated_slabs"] == stats(daemon).pool["num_slabs"]
            )
            client = connect(daemon)
            results: dict[str, Any] = {"store_blocks_per_s": store_all(client, keys)}
            chains = prompts(keys)
            results["match_prefix"] = time_matches(client, chains)
            daemon.signal(signal.SIGSTOP)
            results["match_prefix_daemon_stopped"] = time_matches(client, chains)
            daemon.signal(signal.SIGCONT)
            results["lease_and_release"] = time_leases(client, chains)
            results["restart"] = time_restarts(daemon)
            client.close()
        finally:
            daemon.stop()
    return results


def measure_peer() -> dict[str, float]:
    from benchmarks.lmcache_peer import measure_lookups

    times_us = [seconds * 1e6 for seconds in measure_lookups()]
    return {"p50_us": percentile(times_us, 0.5), "p99_us": percentile(times_us, 0.99)}


def print_table(results: dict[str, Any]) -> None:
    print("| what | p50 | p99 |\n|---|---:|---:|")
    for name in (
        "match_prefix",
        "match_prefix_daemon_stopped",
        "lease_and_release",
        "lmcache_lookup",
    ):
        if name in results:
            print(
                f"| {name}, us | {results[name]['p50_us']:,.0f} | {results[name]['p99_us']:,.0f} |"
            )
    print(
        f"\nstore (prepare + complete, batches of {STORE_BATCH}): {results['store_blocks_per_s']:,.0f} blocks/s"
    )
    restart = results["restart"]
    print(
        f"restart with {restart['ready_blocks']:,} READY blocks: serving after "
        f"{restart['p50_s']:.2f} s (median of {RESTARTS}), {restart['worst_s']:.2f} s (worst)"
    )
    if "lmcache_lookup" in results:
        ratio = results["lmcache_lookup"]["p50_us"] / results["match_prefix"]["p50_us"]
        print(f"LMCache's lookup takes {ratio:,.0f} x as long (p50)")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--no-peer", action="store_true", help="leave LMCache out")
    args = parser.parse_args()
    results = measure(args.blocks)
    if not args.no_peer:
        results["lmcache_lookup"] = measure_peer()
    print_table(results)
    if args.json:
        write_json(args.json, results)


if __name__ == "__main__":
    main()
