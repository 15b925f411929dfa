"""Real engines with a model of a few megabytes: a block from the pool gives the output that it gave in VRAM.

    python tests/gpu/engine_variants.py [--only cuda_graphs,fp8] [--engine JSON]

One variant for each thing that changes the layout or the order of events, one after the other: a starting vLLM fails
when the GPU's free memory changes meanwhile. Prints PASS or FAIL for each, with the end of a failing engine's log, and
goes on. `test_engines_cuda.py` is the same for pytest.

Outputs must be the same from VRAM and from the pool: the same computation. Against a recompute they may differ by how
vLLM rounds, so that is only told. Engines with vLLM's batch-invariant kernels compare to the bit however requests are
batched: preempted requests are held against requests that ran alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# A script's own folder comes first: add `benchmarks`.
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.engine_child import QUIET, runner_env
from benchmarks.gpu_script import work_folder
from benchmarks.offline import kv_bytes_per_token, make_model
from benchmarks.processes import (
    ChildProcess,
    PoolDaemon,
    free_port,
    kv_transfer_config,
    print_failure,
)
from vllm_kvpool.config import SHM_DIR
from vllm_kvpool.pool.admin import fetch_stats

ENGINE = Path(__file__).with_name("variant_engine.py")
ENGINE_TIMEOUT_S = 150.0
COMMON: dict[str, Any] = {
    "enforce_eager": True,
    "gpu_memory_utilization": 0.1,
    "max_model_len": 8_192,
    "max_num_seqs": 32,
}
DECODE_GRAPHS = {
    "mode": 0,
    "cudagraph_mode": "FULL_DECODE_ONLY",
    "cudagraph_capture_sizes": [1, 2, 4],
}
NGRAMS = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 1,
}
TWO_GPUS = {"tensor_parallel_size": 2, "disable_custom_all_reduce": True}
MLA = "tiny-mla"
SHARD_EXTRA_BYTES = 8, 264
"""A trailer, and padding."""
CROWDED_TOKENS = 4_800
"""What the KV cache holds: 24 requests of 320 to 1,020 tokens want three times that."""


@dataclass(frozen=True)
class Variant:
    engine: dict[str, Any] = field(default_factory=dict)
    runner: str = "auto"
    model: str = "tiny"
    pool: dict[str, Any] = field(default_factory=dict)
    """Options of the connector."""
    others: bool = False
    """Whether a second engine, started when the first is gone, has to find its blocks."""
    crowded: bool = False


VARIANTS = {
    "default": Variant(others=True),
    "runner_v1_cross_layer": Variant(runner="v1", others=True),
    "cuda_graphs": Variant({"enforce_eager": False, "compilation_config": DECODE_GRAPHS}),
    "chunked_prefill": Variant({"max_num_batched_tokens": 1_024}),
    "preemption": Variant(crowded=True),
    "synchronous_scheduling": Variant({"async_scheduling": False}),
    "ngram_speculation": Variant({"speculative_config": NGRAMS}),
    "fp8": Variant({"kv_cache_dtype": "fp8"}),
    "mla": Variant(model=MLA),
    "every_block_checked": Variant(pool={"checksum": "all"}),
    "tp2": Variant(TWO_GPUS, others=True),
    "tp2_mla": Variant(TWO_GPUS, model=MLA, others=True),
}


def num_gpus(name: str) -> int:
    return int(VARIANTS[name].engine.get("tensor_parallel_size", 1))


class Runs:
    """The engines of one variant, and what is wrong with their answers."""

    def __init__(self, name: str, pool: str, folder: Path, extra: dict[str, Any]) -> None:
        self.name = name
        self.problems: list[str] = []
        self.remarks: list[str] = []
        self._variant = VARIANTS[name]
        self._pool = pool
        self._folder = folder / name
        self._folder.mkdir()
        self._extra = extra

    def run(self) -> list[str]:
        """The problems. A failing engine's log is printed, and raises."""
        make_model(self._folder / "model", self._variant.model)
        if self._variant.crowded:
            self._crowded()
        else:
            self._hits()
        self._check_slots()
        return self.problems

    def _hits(self) -> None:
        first = self._engine("first", computes=True)
        self._check_hits("first", first)
        self.remarks.append(agreement("as computed", first["pool"], first["computed"]))
        if self._variant.others:
            second = self._engine("second", computes=False)
            self._check_hits("second", second)
            self.remarks.append(agreement("second as first", second["pool"], first["pool"]))

    def _check_hits(self, engine: str, result: dict[str, Any]) -> None:
        if result["pool"]["cached"] != result["vram"]["cached"] or 0 in result["pool"]["cached"]:
            found = f"{result['pool']['cached']}, from VRAM {result['vram']['cached']}"
            self.problems.append(f"{engine} engine: tokens from the pool: {found}")
        if result["pool"]["tokens"] != result["vram"]["tokens"]:
            told = agreement("as VRAM", result["pool"], result["vram"])
            self.problems.append(f"{engine} engine: other outputs from the pool: {told}")
        if not result["counters"].get("hit_tokens"):
            self.problems.append(f"{engine} engine: no hit was counted")

    def _check_slots(self) -> None:
        """A slot holds a shard for each rank, which together are the block once; with MLA, where every rank has all of
        it, the slot is one shard."""
        variant = self._variant
        stats = fetch_stats(self._pool, SHM_DIR)
        spaces = [(json.loads(one["description"]), one) for one in stats["namespaces"]]
        ((fields, space),) = (pair for pair in spaces if pair[0]["epoch"] == self.name)
        kv_dtype = variant.engine.get("kv_cache_dtype", "auto")
        block_bytes = kv_bytes_per_token(variant.model, kv_dtype) * int(fields["block_tokens"])
        shards = 1 if variant.model == MLA else num_gpus(self.name)
        least, most = (block_bytes + shards * extra for extra in SHARD_EXTRA_BYTES)
        self.remarks.append(f"{space['ready']} slots of {space['slot_bytes']:,} bytes")
        if not (least <= space["slot_bytes"] <= most and space["ready"]):
            self.problems.append(f"{self.remarks[-1]}, where a block has {block_bytes:,}")

    def _crowded(self) -> None:
        """Far more requests than the KV cache holds: blocks are taken from requests while they are stored, and loaded
        back."""
        alone = self._engine("alone", connected=False, at_once=1)
        for engine in ("crowded", "crowded-again"):
            result = self._engine(engine, at_once=24)
            for counter in ("num_preemptions", "hit_tokens"):
                if not result["counters"].get(counter):
                    self.problems.append(f"{engine}: {counter} is 0")
            if result["tokens"] != alone["tokens"]:
                self.problems.append(f"{engine}: {agreement('as alone', result, alone)}")

    def _engine(self, engine: str, *, connected: bool = True, **job: Any) -> dict[str, Any]:
        """Runs one to its end. Blocks of other variants have another epoch."""
        variant, folder = self._variant, self._folder
        transfer = kv_transfer_config({"pool": self._pool, "epoch": self.name, **variant.pool})
        options = COMMON | variant.engine | self._extra
        if variant.crowded and connected:
            block_tokens = options.get("block_size", 16)
            options |= {
                "num_gpu_blocks_override": CROWDED_TOKENS // block_tokens,
                "max_model_len": 2_048,
            }
        job |= {
            "model": str(folder / "model"),
            "transfer": transfer if connected else None,
            "engine": options,
            "result": str(folder / f"{engine}.json"),
        }
        path, log = folder / f"{engine}-job.json", folder / f"{engine}.log"
        path.write_text(json.dumps(job))
        env = QUIET | runner_env(variant.runner)
        env |= {"VLLM_BATCH_INVARIANT": "1"} if variant.crowded else {}
        run_to_end(ChildProcess([sys.executable, str(ENGINE), str(path)], log, env), self.name)
        lines = log.read_text(errors="replace").splitlines()
        self.problems += [line[:300] for line in lines if "KV pool:" in line][:5]
        result: dict[str, Any] = json.loads(Path(job["result"]).read_text())
        self.remarks.append(f"{engine} started in {result['start_s']:.0f} s")
        return result


def agreement(what: str, one: dict[str, Any], other: dict[str, Any]) -> str:
    same = sum(a == b for a, b in zip(one["tokens"], other["tokens"], strict=True))
    return f"{what} {same}/{len(other['tokens'])}"


def run_to_end(child: ChildProcess, name: str) -> None:
    begun = time.monotonic()
    with child:
        assert child.process is not None
        while child.running and time.monotonic() < begun + ENGINE_TIMEOUT_S:
            time.sleep(0.1)
        status = child.process.poll()
    if status != 0:
        what = "timeout" if status is None else f"exit status {status}"
        print_failure(name, what, f"{time.monotonic() - begun:.0f} s", child.log)
        raise RuntimeError(f"{name}: an engine failed: {what}")


@contextlib.contextmanager
def pool_for_variants(folder: Path) -> Iterator[str]:
    """The name of a running pool, gone afterwards."""
    name = f"gpu-test-{free_port()}"
    daemon = PoolDaemon(folder / "daemon.log", name=name, size="2GiB", shm_dir=SHM_DIR)
    try:
        with daemon:
            yield name
    finally:
        shutil.rmtree(daemon.folder, ignore_errors=True)


def passes(runs: Runs) -> bool:
    """Prints the verdict."""
    begun = time.monotonic()
    try:
        runs.run()
    except (RuntimeError, OSError) as error:
        runs.problems.append(str(error))
    verdict = "FAIL" if runs.problems else "PASS"
    took, told = f"{time.monotonic() - begun:.0f} s", "; ".join(runs.remarks)
    print(f"{verdict} {runs.name} ({took}): {told}", flush=True)
    print("".join(f"    {problem}\n" for problem in runs.problems), end="", flush=True)
    return not runs.problems


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(VARIANTS), help="variants, with commas")
    parser.add_argument("--gpus", type=int, default=1, help="variants that need more are left out")
    parser.add_argument("--engine", type=json.loads, default={}, help="more options of the engines")
    args = parser.parse_args()
    failed = []
    with work_folder() as folder, pool_for_variants(folder) as pool:
        for name in args.only.split(","):
            if num_gpus(name) > args.gpus:
                print(f"left out {name}: needs {num_gpus(name)} GPUs, see --gpus", flush=True)
            elif not passes(Runs(name, pool, folder, args.engine)):
                failed.append(name)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
