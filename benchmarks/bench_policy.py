"""Which eviction policy keeps the most hits? Replays a request trace through the pool's own index and eviction code.

    python -m benchmarks.bench_policy --trace mooncake_conversation.jsonl [--json FILE]

The trace is one JSON object a line with `hash_ids`: one id per 512-token block of the prompt, equal ids = equal prefix
block (the format of the traces in github.com/kvcache-ai/Mooncake, FAST '25; `conversation_trace.jsonl` there).
Deterministic: no clock, no randomness. "ceiling" is a pool that never evicts.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from vllm_kvpool._native import PoolOwner, PoolView
from vllm_kvpool.types import KEY_BYTES, num_refs

BLOCK_TOKENS = 512
SLOT_BYTES = 2048  # no payload is written: small slots make small files
SLAB_BYTES = 2 << 20
POLICIES = ("lru", "arc", "s3fifo")


def read_trace(path: Path) -> list[bytes]:
    """The block keys of each request, joined."""
    requests = []
    for line in path.read_text().splitlines():
        ids = json.loads(line)["hash_ids"]
        requests.append(b"".join(hashlib.sha256(b"%d" % i).digest() for i in ids))
    return requests


class SimulatedPool:
    """One namespace, one client, `num_slabs` x 1,024 blocks."""

    def __init__(self, folder: Path, policy: str, num_slabs: int) -> None:
        size = (num_slabs + num_slabs // 8 + 2) * SLAB_BYTES  # the rest is for the tables
        self.owner = PoolOwner.create(str(folder / "pool"), size, SLOT_BYTES, policy=policy)
        for slab in range(num_slabs):
            self.owner.populate(slab)
        lock_path = folder / "lock"
        self.lock = lock_path.open("w")
        fcntl.flock(self.lock, fcntl.LOCK_SH)
        namespace = self.owner.add_namespace(bytes(KEY_BYTES), SLOT_BYTES, "simulation")
        self.client = self.owner.add_client("simulation", str(lock_path), os.getpid(), namespace)
        self.view = PoolView.open(str(folder / "pool"))

    def request(self, keys: bytes) -> tuple[int, int]:
        """Blocks hit and blocks stored."""
        refs = self.view.match_prefix(keys, 0)
        self.owner.touch(refs)
        cut = num_refs(refs) * KEY_BYTES
        parent = keys[cut - KEY_BYTES : cut] if cut else b""
        granted = self.owner.prepare_store(self.client, keys[cut:], parent, 0)
        self.owner.complete_store(self.client, granted)
        return num_refs(refs), num_refs(granted) - granted.count(bytes(8))


def simulate(requests: list[bytes], policy: str, num_slabs: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        pool = SimulatedPool(Path(folder), policy, num_slabs)
        hits = sum(pool.request(keys)[0] for keys in requests)
        pool.owner.check_integrity()
        stats = pool.owner.stats()
    blocks = sum(len(keys) for keys in requests) // KEY_BYTES
    return {"hit_rate": hits / blocks, "evicted": stats["evicted"], "stored": stats["stored"]}


def ceiling(requests: list[bytes]) -> float:
    seen: set[bytes] = set()
    hits = blocks = 0
    for keys in requests:
        chain = [keys[i : i + KEY_BYTES] for i in range(0, len(keys), KEY_BYTES)]
        hits += next((i for i, key in enumerate(chain) if key not in seen), len(chain))
        blocks += len(chain)
        seen.update(chain)
    return hits / blocks


def rows(requests: list[bytes], slabs: list[int]) -> Iterator[dict[str, object]]:
    for num_slabs in slabs:
        tokens = num_slabs * SLAB_BYTES // SLOT_BYTES * BLOCK_TOKENS
        row: dict[str, object] = {"pool_tokens": tokens}
        for policy in POLICIES:
            row[policy] = simulate(requests, policy, num_slabs)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument(
        "--slabs", default="2,3,6,12,24,48", help="pool sizes in slabs of 524,288 tokens"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    requests = read_trace(args.trace)
    best = ceiling(requests)
    print(f"{len(requests)} requests, ceiling {best:.1%}")
    print("| pool, tokens | " + " | ".join(POLICIES) + " |")
    print("|---:|" + "---:|" * len(POLICIES))
    table = []
    for row in rows(requests, [int(n) for n in args.slabs.split(",")]):
        cells = " | ".join(f"{row[policy]['hit_rate']:.1%}" for policy in POLICIES)  # type: ignore[index]
        print(f"| {row['pool_tokens']:,} | {cells} |", flush=True)
        table.append(row)
    if args.json:
        args.json.write_text(json.dumps({"ceiling": best, "rows": table}, indent=1))


if __name__ == "__main__":
    main()
