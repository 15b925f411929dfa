"""An arm of a comparison: one engine in a process of its own, with a time limit and a log.

The process is the same script again, with `--child JOB`; `gpu_script.run_script` then calls the script's `run_job`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.processes import ChildProcess, print_failure
from benchmarks.turns import Player

QUIET = {
    "PYTHONHASHSEED": "0",
    "PYTHONUNBUFFERED": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "LMCACHE_TRACK_USAGE": "false",
}
FREE_SHARE = 0.05
"""Of the GPU's memory, which vLLM wants to find free at its start; no limit to what it takes."""
BATCHED_TOKENS = 8_192
"""What a step computes at most: it decides how much memory an engine needs beside its weights and its cache."""


@dataclass(frozen=True)
class Arm:
    name: str
    transfer: dict[str, Any] | None = None
    env: dict[str, str] = field(default_factory=dict)


def runner_env(runner: str) -> dict[str, str]:
    return {} if runner == "auto" else {"VLLM_USE_V2_MODEL_RUNNER": str(int(runner == "v2"))}


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """A KV cache of a given size: to measure what is left, as vLLM does otherwise, fails beside other engines that
    start. `args.engine`: further options."""
    return {
        "kv_cache_memory_bytes": int(args.kv_gib * 2**30),
        "gpu_memory_utilization": FREE_SHARE,
        "max_num_batched_tokens": BATCHED_TOKENS,
        "kv_cache_dtype": args.kv_cache_dtype,
        **args.engine,
    }


def child_command(
    module: str, arm: Arm, job: dict[str, Any], folder: Path, args: argparse.Namespace
) -> tuple[list[str], Path, dict[str, str]]:
    """`python -m module --child JOB`, its log and its environment."""
    job = {
        **job,
        "transfer": arm.transfer,
        "model": str(folder / "model"),
        "size": args.size,
        "engine": engine_options(args),
    }
    path = folder / f"{arm.name}-job.json"
    path.write_text(json.dumps(job))
    command = [sys.executable, "-m", module, "--child", str(path)]
    return command, folder / f"{arm.name}.log", {**QUIET, **runner_env(args.runner), **arm.env}


def player(
    module: str, arm: Arm, job: dict[str, Any], folder: Path, args: argparse.Namespace
) -> Player:
    """The arm as one that takes turns with others."""
    return Player(arm.name, *child_command(module, arm, job, folder, args))


def run_child(
    module: str, arm: Arm, job: dict[str, Any], folder: Path, args: argparse.Namespace
) -> dict[str, Any] | None:
    """The arm alone, until its end: what it has written to `job["result"]`, None for nothing. When it fails, the end of
    its log is shown."""
    result = folder / f"{arm.name}.json"
    job = {**job, "result": str(result)}
    command, log, env = child_command(module, arm, job, folder, args)
    begun = time.monotonic()
    print(f"{arm.name}: started", flush=True)
    with ChildProcess(command, log, env) as child:
        assert child.process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.process.wait(args.timeout_s)
        status = child.process.poll()
    took = f"{time.monotonic() - begun:.0f} s"
    if status == 0:
        print(f"{arm.name}: done in {took}", flush=True)
    else:
        what = "timeout" if status is None else f"exit status {status}"
        print_failure(arm.name, what, took, log)
    if not result.exists():
        return None
    values: dict[str, Any] = json.loads(result.read_text())
    return values
