"""How fast does the copy engine move blocks between a GPU and a pool, fragment by fragment?

    python -m benchmarks.bench_copy [--gib 2] [--repeats 7] [--fragments 8KiB,64KiB] [--json FILE]

A block of 2 MiB lies in as many CUDA tensors as it has fragments (as vLLM keeps a tensor a layer), at rows in random
order; in the pool, a real file in shared memory with slots of a real daemon's layout, it is one run. Compared with one
big copy of as many bytes from and to pinned memory, in the same run. Seed 7.

Caveats. Nothing else runs on the GPU. The pool is populated, and the copy engine has registered it and chosen its way
of copying (`--way` forces one), before anything is timed. "processor" is the time of all threads of this process (user
and system) for a GiB, less what polling once a millisecond takes when nothing is copied; "submit" is how long the call
that starts all blocks keeps its caller. The second table says where that time goes: asking the device for copies and
waiting for batches of them, as the copying threads measure it, and the rest: checks before and after each block, and
handing work from thread to thread. Checksums are off but in the last rows: there the processor reads every block
that carries one (the connector's default is "sampled", one block in 64).
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import statistics
import tempfile
import time
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.pinned import GIB, pinned_rates
from benchmarks.report import write_json
from vllm_kvpool._native import CopyEngine, PoolOwner, PoolView
from vllm_kvpool.config import SHM_DIR, parse_size
from vllm_kvpool.types import KEY_BYTES, NO_REF, SlotRefs, num_refs, unpack_refs

BLOCK_BYTES = 2 << 20
FRAGMENTS = "8KiB,16KiB,32KiB,64KiB,128KiB,512KiB,2MiB"
CHECKED_FRAGMENT = 64 << 10
CHECKSUMS = {"off": 0, "sampled": 64, "all": 1}
SEED = 7
REGISTER_TIMEOUT_S = 30.0
POLL_S = 50e-6
CALM_POLL_S = 1e-3
POLLING_S = 0.2
TIMEOUT_S = 60.0

Submit = Callable[[], int]


class BenchPool:
    """A pool file, and this process as its daemon and as its only client."""

    def __init__(self, folder: Path, num_blocks: int, slot_bytes: int) -> None:
        path = str(folder / "pool")
        # Small pools have small slabs, of which a slot of 2 MiB and a bit wastes a good part.
        size = int(num_blocks * slot_bytes * 1.3) + GIB
        self._owner = PoolOwner.create(path, size)
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
            list(threads.map(self._owner.populate, range(self._owner.num_slabs)))
        self._space = self._owner.add_namespace(bytes(32), slot_bytes, "{}")
        lock = folder / "lock"
        lock.touch()
        self._client = self._owner.add_client("0" * 32, str(lock), os.getpid(), self._space)
        self._draw = random.Random(SEED)
        self.view = PoolView.open(path)
        self.slab_bytes = self._owner.num_slabs * self._owner.slab_bytes

    def make_slots(self, count: int) -> SlotRefs:
        """Slots to store to, until `publish`: then to load from."""
        keys = self._draw.randbytes(count * KEY_BYTES)
        now_s = int(time.clock_gettime(time.CLOCK_BOOTTIME))
        refs = SlotRefs(self._owner.prepare_store(self._client, keys, b"", now_s))
        assert NO_REF not in unpack_refs(refs), "the pool is too small"
        return refs

    def publish(self, refs: SlotRefs) -> None:
        assert self._owner.complete_store(self._client, refs) == num_refs(refs)

    def clear(self) -> None:
        self._owner.clear(self._space)


class KVMemory:
    """Tensors with a fragment of each block. Blocks of `near` are stored, those of `far` loaded."""

    def __init__(self, fragment: int, num_blocks: int, device: str) -> None:
        self.layers = [
            torch.empty((2 * num_blocks, fragment), dtype=torch.uint8, device=device)
            for _ in range(BLOCK_BYTES // fragment)
        ]
        torch.manual_seed(SEED)
        for layer in self.layers:
            layer.random_(0, 256)
        self.regions = [(layer.data_ptr(), fragment, fragment) for layer in self.layers]
        rows = list(range(2 * num_blocks))
        random.Random(SEED).shuffle(rows)
        self.near, self.far = rows[:num_blocks], rows[num_blocks:]
        self._settle()

    def forget_far(self) -> None:
        for layer in self.layers:
            layer[self.far] = 0
        self._settle()

    def _settle(self) -> None:
        if self.layers[0].is_cuda:
            torch.cuda.synchronize()

    def check(self) -> None:
        for i, layer in enumerate(self.layers):
            assert torch.equal(layer[self.near], layer[self.far]), f"wrong bytes in layer {i}"


class Cost(NamedTuple):
    """Of one copy, or of several at once."""

    seconds: float
    submit_s: float
    processor_s: float


def processor_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def run(engine: CopyEngine, submits: list[Submit], poll_s: float) -> Cost:
    used, begun = processor_seconds(), time.perf_counter()
    open_jobs = {submit() for submit in submits}
    submitted = time.perf_counter()
    while open_jobs:
        for number, statuses, _ in engine.poll():
            if any(statuses):
                raise RuntimeError(f"copies ended with {set(statuses)}: {engine.error}")
            open_jobs.discard(number)
        if time.perf_counter() > begun + TIMEOUT_S:
            raise TimeoutError("copies do not end")
        if open_jobs:
            time.sleep(poll_s)
    seconds = time.perf_counter() - begun
    return Cost(seconds, submitted - begun, processor_seconds() - used)


def measure(engine: CopyEngine, submits: list[Submit], num_bytes: int, repeats: int) -> Any:
    run(engine, submits, POLL_S)
    quick = [run(engine, submits, POLL_S) for _ in range(repeats)]
    before = engine.costs
    calm = [run(engine, submits, CALM_POLL_S) for _ in range(repeats)]
    after = engine.costs
    polling = polling_share(engine)
    own_s = statistics.median(cost.processor_s - polling * cost.seconds for cost in calm)
    gib = num_bytes / GIB
    per_gib = {name: (after[name] - before[name]) / repeats / gib for name in after}
    return {
        "gb_per_s": num_bytes / statistics.median(cost.seconds for cost in quick) / 1e9,
        "submit_us": statistics.median(cost.submit_s for cost in quick) * 1e6,
        "processor_ms_per_gib": own_s * 1e3 / gib,
        "polling_ms_per_s": polling * 1e3,
        "copies_per_gib": per_gib["copies"],
        "batches_per_gib": per_gib["batches"],
        "start_ms_per_gib": per_gib["start_ns"] / 1e6,
        "wait_ms_per_gib": per_gib["wait_ns"] / 1e6,
    }


def polling_share(engine: CopyEngine) -> float:
    """Processor seconds a second of a process that only polls."""
    used, begun = processor_seconds(), time.perf_counter()
    while time.perf_counter() < begun + POLLING_S:
        engine.poll()
        time.sleep(CALM_POLL_S)
    return (processor_seconds() - used) / (time.perf_counter() - begun)


def measure_fragment(
    pool: BenchPool, fragment: int, checksum: str, num_blocks: int, args: argparse.Namespace
) -> dict[str, Any]:
    memory = KVMemory(fragment, num_blocks, args.device)
    gpu = args.device == "cuda"
    device = torch.cuda.current_device() if gpu else -1
    stream = torch.cuda.current_stream().cuda_stream if gpu else 0
    every = CHECKSUMS[checksum]
    engine = CopyEngine(pool.view, memory.regions, 0, every, device=device, way=args.way)
    try:
        if gpu:
            wait_registered(engine, pool.slab_bytes)
        near, far = (array("I", rows).tobytes() for rows in (memory.near, memory.far))
        stored, spare = pool.make_slots(num_blocks), pool.make_slots(num_blocks)
        store: Submit = lambda: engine.submit_store(stored, near, stream)  # noqa: E731
        load: Submit = lambda: engine.submit_load(stored, far, stream)  # noqa: E731
        store_spare: Submit = lambda: engine.submit_store(spare, near, stream)  # noqa: E731
        num_bytes = num_blocks * BLOCK_BYTES
        result = {"fragment_bytes": fragment, "checksum": checksum, "backend": engine.backend}
        result["store"] = measure(engine, [store], num_bytes, args.repeats)
        pool.publish(stored)
        memory.forget_far()
        result["load"] = measure(engine, [load], num_bytes, args.repeats)
        memory.check()
        both = measure(engine, [load, store_spare], 2 * num_bytes, args.repeats)
        memory.check()
        pool.publish(spare)
        return result | {"both": both}
    finally:
        engine.close()
        pool.clear()


def wait_registered(engine: CopyEngine, num_bytes: int) -> None:
    give_up = time.monotonic() + REGISTER_TIMEOUT_S
    while engine.registered_bytes < num_bytes:
        if time.monotonic() > give_up:
            known = f"{engine.registered_bytes:,} of {num_bytes:,} bytes"
            print(f"ATTENTION: {known} registered with CUDA: {engine.error}", flush=True)
            return
        time.sleep(0.01)


def measure_all(args: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """Appends to `results` as it goes: what is done by then survives an error."""
    num_blocks = int(args.gib * GIB) // BLOCK_BYTES
    fragments = [parse_size("fragments", text, BLOCK_BYTES) for text in args.fragments.split(",")]
    rows = [(fragment, "off") for fragment in fragments]
    rows += [(CHECKED_FRAGMENT, checksum) for checksum in args.checksums.split(",") if checksum]
    shape = [(0, BLOCK_BYTES, BLOCK_BYTES)]
    folder = Path(tempfile.mkdtemp(prefix="kvpool-bench-", dir=args.shm_dir))
    try:
        pool = BenchPool(folder, 2 * num_blocks, CopyEngine.shard_bytes(shape))
        for fragment, checksum in rows:
            results.append(measure_fragment(pool, fragment, checksum, num_blocks, args))
            print(f"{results[-1]['fragment_bytes']:,} {checksum}: {results[-1]['backend']}")
            print_row(results[-1], {})
    finally:
        shutil.rmtree(folder)


def row_name(result: dict[str, Any]) -> str:
    size = f"{result['fragment_bytes'] >> 10:,} KiB"
    return size if result["checksum"] == "off" else f"{size}, {result['checksum']}"


def print_row(result: dict[str, Any], best: dict[str, float]) -> None:
    cells = [row_name(result)]
    for kind in ("load", "store", "both"):
        rate = result[kind]["gb_per_s"]
        share = f" ({rate / best[kind]:.0%})" if best else ""
        cells.append(f"{rate:.1f}{share}")
    for what in ("processor_ms_per_gib", "submit_us"):
        cells += [f"{result[kind][what]:,.2f}" for kind in ("load", "store")]
    print("| " + " | ".join(cells) + " |", flush=True)


def print_table(results: list[dict[str, Any]], best: dict[str, float]) -> None:
    print(
        "\n| fragment | load, GB/s | store, GB/s | both at once, GB/s | processor of loads, ms/GiB | of stores "
        "| submit a load, us | a store, us |\n|---|---:|---:|---:|---:|---:|---:|---:|"
    )
    for result in results:
        print_row(result, best)
    print_processor_time(results)
    print(f"\none big pinned copy: {', '.join(f'{k} {v:.1f}' for k, v in best.items())} GB/s")


def print_processor_time(results: list[dict[str, Any]]) -> None:
    print(
        "\n| a GiB of | copies | batches | processor, ms | to start copies | to wait | the rest |"
        "\n|---|---:|---:|---:|---:|---:|---:|"
    )
    for result in results:
        for kind in ("load", "store"):
            cost = result[kind]
            whole, start, wait = (cost[f"{of}_ms_per_gib"] for of in ("processor", "start", "wait"))
            counts = [f"{cost[f'{what}_per_gib']:,.1f}" for what in ("copies", "batches")]
            times = [f"{ms:.2f}" for ms in (whole, start, wait, whole - start - wait)]
            print("| " + " | ".join([f"{row_name(result)} {kind}s", *counts, *times]) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=2, help="moved by one copy")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--fragments", default=FRAGMENTS)
    parser.add_argument("--checksums", default="sampled,all", help="settings for the last rows")
    parser.add_argument("--shm-dir", default=SHM_DIR)
    parser.add_argument("--way", choices=("", "driver", "staged"), default="")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    best = pinned_rates(int(args.gib * GIB), args.repeats, args.device)
    print(f"pinned: {best}", flush=True)
    if args.device == "cuda":
        torch.cuda.empty_cache()
    results: list[dict[str, Any]] = []
    try:
        measure_all(args, results)
    finally:
        print_table(results, best)
        if args.json:
            write_json(args.json, {"pinned_gb_per_s": best, "copies": results})


if __name__ == "__main__":
    main()
