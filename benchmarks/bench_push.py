"""How fast do blocks go up to another host's pool, beside plain TCP over the same way?

    python -m benchmarks.bench_push [--keys] [--rate 10gbit] [--loopback] [--json FILE]

A pool in front of another one, each in a network namespace of its own (root needed; `--rate` shapes the
link), or both in this one with `--loopback`. From the moment in which 1 GiB of blocks is READY in front
until it is READY upstream, beside four TCP streams of as many bytes in the same run.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.bench_pool import wait_for
from benchmarks.bench_pull import (
    BULK_BLOCKS,
    REPEAT,
    SLOT_BYTES,
    Network,
    run_between_hosts,
    store,
    time_tcp,
)
from benchmarks.processes import PoolDaemon, free_port
from vllm_kvpool.client import PoolClient
from vllm_kvpool.host_keys import make_keys
from vllm_kvpool.pool.admin import fetch_stats
from vllm_kvpool.protocol import Namespace
from vllm_kvpool.types import KEY_BYTES, BlockKeys, num_refs

POOL = "bench"


@contextlib.contextmanager
def front_and_upstream(
    network: Network, folder: Path, secure: bool
) -> Iterator[tuple[PoolClient, PoolClient]]:
    """Connected clients of both."""
    address = f"tcp://{network.addresses[0]}:{free_port()}"
    keys = _keys(folder) if secure else [{}, {}]
    roles = [{"listen": address}, {"upstream": address}]
    with contextlib.ExitStack() as stack:
        clients = []
        for i, role in enumerate(roles):
            shm_dir = folder / f"host{i}"
            shm_dir.mkdir()
            daemon = PoolDaemon(
                folder / f"daemon{i}.log", name=POOL, size=str(BULK_BLOCKS * SLOT_BYTES * 3 // 2),
                shm_dir=str(shm_dir), min_block=str(SLOT_BYTES), **role, **keys[i],
            )  # fmt: skip
            daemon.command = [*network.prefixes[i], *daemon.command]
            if not secure and i == 0:
                daemon.command.append("--insecure")
            stack.enter_context(daemon)
            namespace = Namespace(digest=bytes(32), slot_bytes=SLOT_BYTES, fields={})
            clients.append(PoolClient(daemon.folder, namespace, timeout_ms=10_000))
            stack.callback(clients[-1].close)
            wait_for(lambda client=clients[-1]: (client.poll(), client.connected)[1])  # type: ignore[misc]
            wait_for(lambda shm_dir=shm_dir: _populated(shm_dir))  # type: ignore[misc]
        yield clients[0], clients[1]


def _populated(shm_dir: Path) -> bool:
    pool = fetch_stats(POOL, str(shm_dir))["pool"]
    return bool(pool["populated_slabs"] == pool["num_slabs"])


def _keys(folder: Path) -> list[dict[str, str]]:
    public = [make_keys(folder / f"keys{i}", f"h{i}")[0] for i in range(2)]
    shutil.copy(public[1], folder / "keys0")
    shutil.copy(public[0], folder / "keys1" / "upstream.key")
    return [{"keys": str(folder / f"keys{i}")} for i in range(2)]


def time_push(upstream: PoolClient, front: PoolClient) -> float:
    keys = BlockKeys(os.urandom(BULK_BLOCKS * KEY_BYTES))
    store(front, keys)
    begun = time.perf_counter()
    while num_refs(upstream.match_prefix(keys)) < BULK_BLOCKS:
        time.sleep(0.001)
        assert time.perf_counter() - begun < 120, "the push does not end"
    elapsed = time.perf_counter() - begun
    for client in (front, upstream):
        client.drop(client.match_prefix(keys))
        wait_for(lambda client=client: num_refs(client.match_prefix(keys)) == 0)  # type: ignore[misc]
    return elapsed


def compared(nbytes: int, tcp: list[float], pushes: list[float]) -> dict[str, float]:
    raw_s, push_s = statistics.median(tcp), statistics.median(pushes)
    found = {
        "tcp_gb_s": nbytes / raw_s / 1e9, "push_gb_s": nbytes / push_s / 1e9,
        "push_best_gb_s": nbytes / min(pushes) / 1e9, "share": raw_s / push_s,
    }  # fmt: skip
    print({key: round(value, 3) for key, value in found.items()})
    return found


def measure(network: Network, folder: Path, secure: bool) -> dict[str, Any]:
    nbytes = BULK_BLOCKS * SLOT_BYTES
    with front_and_upstream(network, folder, secure) as (upstream, front):
        tcp = time_tcp(network, folder, nbytes)
        pushes = [time_push(upstream, front) for _ in range(REPEAT)]
    return {"push": compared(nbytes, tcp, pushes)}


if __name__ == "__main__":
    run_between_hosts(__doc__, measure)
