"""Real engines on a GPU, a model of a few megabytes: the pool's blocks give the output that VRAM's do.

One run for each thing that changes the layout or the order of events. The engines are those of
`benchmarks.bench_ttft`: one stores and loads, a second one, started when that is gone, loads. One test at a time: a
starting vLLM fails when the GPU's free memory changes meanwhile.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.arms import QUIET
from benchmarks.offline import make_model
from benchmarks.processes import PoolDaemon, kv_transfer_config
from vllm_kvpool.config import SHM_DIR

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here"),
]

LENGTHS = (512, 4_096)
BLOCK = 16
VARIANTS = {
    "default": (),
    "runner_v1_cross_layer": ("--runner", "v1"),
    "runner_v2": ("--runner", "v2"),
    "cuda_graphs": ("--graphs",),
    "chunked_prefill": ("--engine", '{"max_num_batched_tokens": 1024}'),
    "synchronous_scheduling": ("--engine", '{"async_scheduling": false}'),
    "ngram_speculation": (
        "--engine",
        '{"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, '
        '"prompt_lookup_max": 3, "prompt_lookup_min": 1}}',
    ),
    "fp8": ("--kv-cache-dtype", "fp8"),
    "every_block_checked": ("--checksum", "all"),
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_hits_give_the_same_output(tmp_path: Path, options: tuple[str, ...]) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "benchmarks.bench_ttft", "--arms", "kvpool,kvpool-other"]
    command += ["--size", "tiny", "--lengths", ",".join(map(str, LENGTHS)), "--repeats", "1"]
    command += ["--pool-size", "2GiB", "--gpu-share", "0.2", "--json", str(report), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=590, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads(report.read_text())
    assert len(results["table"]) == 2 * len(LENGTHS), done.stdout[-3000:]
    for line in results["table"]:
        assert line["cached"] >= line["tokens"] - BLOCK, line
        assert line["as_vram"] == "2/2", line
    complaints = [note for note in results["notes"] if "KV pool:" in note]
    assert complaints == []


def run_crowded(folder: Path, **job: Any) -> dict[str, Any]:
    """What `gpu.crowded_engine` found."""
    path = folder / "job.json"
    path.write_text(json.dumps({"result": str(folder / "result.json"), **job}))
    env = {**os.environ, **QUIET, "VLLM_BATCH_INVARIANT": "1"}
    command = [sys.executable, str(Path(__file__).with_name("crowded_engine.py")), str(path)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=290, check=False, env=env
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def test_preempted_requests_give_the_same_output(tmp_path: Path) -> None:
    """Far more requests than the KV cache holds: blocks are taken from requests while they are being
    stored, and loaded back. vLLM's batch-invariant kernels make outputs comparable to the bit with
    those of requests that ran alone."""
    make_model(tmp_path / "model", "tiny")
    model = str(tmp_path / "model")
    alone = run_crowded(tmp_path, model=model, transfer=None, num_blocks=2_000, at_once=1)
    name = f"gpu-test-{os.getpid()}"
    daemon = PoolDaemon(tmp_path / "daemon.log", name=name, size="2GiB", shm_dir=SHM_DIR)
    transfer = kv_transfer_config({"pool": name})
    with daemon:
        try:
            crowded = [
                run_crowded(tmp_path, model=model, transfer=transfer, num_blocks=300, at_once=24)
                for _ in range(2)
            ]
        finally:
            shutil.rmtree(daemon.folder, ignore_errors=True)
    for result in crowded:
        assert result["preemptions"] > 0
        assert result["hit_tokens"] > 0
        assert result["outputs"] == alone["outputs"]
