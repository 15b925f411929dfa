"""Real engines on a GPU, a model of a few megabytes: the pool's blocks give the output that VRAM's do.

One run for each thing that changes the layout or the order of events. The engines are those of
`benchmarks.bench_ttft`: one stores and loads, a second one, started when that is gone, loads.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
