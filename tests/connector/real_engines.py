"""Real vLLM engines over HTTP that many tests share: three with the pool, one without it to compare with.

A  checksums off    B  checksums on all blocks, and a KV cache of 8k tokens    S  speculates (n-gram)
R  no connector
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from helpers import tune, until

from benchmarks.processes import Engine, PoolDaemon
from vllm_kvpool.connector import compat

POOL = f"e2e-{os.getpid()}"
PATIENT = ("KVPoolConnector", "connector.patient_connector")
TESTS = Path(__file__).parents[1]
ENV = {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(TESTS),
    **({"PYTHONHASHSEED": "0"} if compat.none_hash_is_random("sha256") else {}),
}
"""Of every engine; PYTHONPATH for `PATIENT`."""
BLOCK = 128
LONG = 20 * BLOCK + 17
SMALL_CACHE_BLOCKS = 64
OPTIONS = (
    "--dtype=float32",  # greedy output must not hang on the last bit
    f"--block-size={BLOCK}",
    "--max-model-len=6144",
    "--max-num-batched-tokens=1024",
    "--enable-prefix-caching",
)


class Engines(NamedTuple):
    a: Engine
    b: Engine
    speculating: Engine
    reference: Engine
    refused: Engine
    daemon: PoolDaemon
    killed: list[Engine]
    """By tests: these need not live in the end."""


@pytest.fixture(scope="session")
def engines(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    """All started at once: each takes about a minute of a core."""
    logs = tmp_path_factory.mktemp("engines")
    pool = {"pool": POOL, "load_deadline_ms": 30_000}
    small = (f"--num-gpu-blocks-override={SMALL_CACHE_BLOCKS}",)
    common: dict[str, Any] = {"connector_class": PATIENT, "options": OPTIONS, "env": ENV}
    daemon = PoolDaemon(logs / "daemon.log", name=POOL, size="1GiB", shm_dir="/dev/shm")
    a = Engine(tiny_model, logs / "a.log", extra={**pool, "checksum": "off"}, **common)
    b = Engine(
        tiny_model,
        logs / "b.log",
        extra={**pool, "checksum": "all"},
        options=OPTIONS + small,
        env=ENV,
    )
    change_config(b, kv_connector_module_path=None)  # found by name, through the plugin
    drafts = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4}
    speculation = ("--speculative-config", json.dumps(drafts))
    speculating = Engine(
        tiny_model,
        logs / "s.log",
        extra=pool,
        **{**common, "options": OPTIONS + speculation},
    )
    reference = Engine(tiny_model, logs / "r.log", extra=None, options=OPTIONS, env=ENV)
    refused = Engine(tiny_model, logs / "refused.log", extra=pool, **common)
    change_config(refused, kv_load_failure_policy="fail")
    running = (a, b, speculating, reference)
    with daemon, a, b, speculating, reference, refused:
        for engine in running:
            engine.wait_ready()
        engines = Engines(*running, refused, daemon, [])
        yield engines
        for engine in running:
            assert engine.running or engine in engines.killed
            assert "Traceback" not in engine.log.read_text()
    shutil.rmtree(daemon.folder)


def change_config(engine: Engine, **changes: Any) -> None:
    place = engine.command.index("--kv-transfer-config") + 1
    engine.command[place] = json.dumps({**json.loads(engine.command[place]), **changes})


def patient(daemon: PoolDaemon) -> PoolDaemon:
    """What its directory takes long for is no reason to do without."""
    tune(daemon.command, pulls__LOOK_UP_MS=10_000, redis_url__TIMEOUT_S=10)
    return daemon


def prompt_of(seed: int, length: int = LONG) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(256) for _ in range(length)]


def reset(engine: Engine, *, external: bool = False) -> None:
    """vLLM says no while blocks are held: by a store in flight, for a moment."""
    path = f"/reset_prefix_cache?reset_external={str(external).lower()}"
    until(lambda: json.loads(engine.post(path))["success"], "reset of the prefix cache")


def metric(engine: Engine, name: str, **labels: str) -> float:
    """Sum over the series of vLLM's own /metrics that carry `labels`."""
    total = 0.0
    for line in engine.metrics().splitlines():
        found = re.fullmatch(rf"vllm:{name}(?:_total)?(?:{{(.*)}})? (\S+)", line)
        if found and all(f'{key}="{value}"' in (found[1] or "") for key, value in labels.items()):
            total += float(found[2])
    return total
