"""Two real engines on two hosts, which meet in Redis and on a CURVE connection only."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from connector.real_engines import (
    BLOCK,
    ENV,
    OPTIONS,
    PATIENT,
    metric,
    patient,
    prompt_of,
    reset,
)
from helpers import WAIT_S, until
from redis_server import RedisServer

from benchmarks.completions import complete
from benchmarks.processes import Engine, PoolDaemon, free_port
from vllm_kvpool.host_keys import make_keys
from vllm_kvpool.pool.admin import fetch_stats

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

POOL = "shared"
TOKENS = 30 * BLOCK + 17


class RealHost(NamedTuple):
    daemon: PoolDaemon
    engine: Engine
    shm_dir: Path

    def counter(self, name: str) -> int:
        return int(fetch_stats(POOL, str(self.shm_dir), WAIT_S)["counters"].get(name, 0))


class Hosts(NamedTuple):
    a: RealHost
    b: RealHost
    redis: RedisServer

    def wait_listed(self, blocks: int) -> None:
        """Until the directory knows of so many blocks."""
        until(lambda: self.num_listed() >= blocks, "the directory")

    def num_listed(self) -> int:
        with self.redis.client as client:
            return sum(b":{hosts}" not in key for key in client.keys(f"kvpool:1:{POOL}:*"))


@pytest.fixture(scope="module")
def hosts(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    logs = tmp_path_factory.mktemp("hosts")
    shm = Path(tempfile.mkdtemp(prefix="kvpool-test-", dir="/dev/shm"))
    keys = [logs / "keys-a", logs / "keys-b"]
    public = [make_keys(folder, folder.name)[0] for folder in keys]
    for folder, other in zip(keys, reversed(public), strict=True):
        shutil.copy(other, folder)
    made = []
    with contextlib.ExitStack() as stack:
        redis = RedisServer(logs).start()
        stack.callback(redis.kill)
        for folder in keys:
            shm_dir = shm / folder.name
            shm_dir.mkdir()
            listen = f"tcp://127.0.0.1:{free_port()}"
            options = {"listen": listen, "keys": str(folder), "directory": redis.url}
            log = logs / f"{folder.name}.log"
            daemon = PoolDaemon(log, name=POOL, size="256MiB", shm_dir=str(shm_dir), **options)
            stack.enter_context(patient(daemon))
            extra: dict[str, Any] = {"pool": POOL, "shm_dir": str(shm_dir), "checksum": "all"}
            # Tiny models compute faster than this machine moves bytes: ask for the bytes anyway.
            extra |= {"pull_deadline_ms": 10_000, "prefill_tokens_per_s": 100}
            engine = Engine(
                tiny_model,
                logs / f"{folder.name}-engine.log",
                extra={**extra, "load_deadline_ms": 30_000},
                connector_class=PATIENT,
                options=OPTIONS,
                env=ENV,
            )
            made.append(RealHost(daemon, stack.enter_context(engine), shm_dir))
        for host in made:
            host.engine.wait_ready()
        yield Hosts(*made, redis)
        for host in made:
            assert "Traceback" not in host.engine.log.read_text()
            assert "Traceback" not in host.daemon.log.read_text()
    shutil.rmtree(shm)


def test_what_a_computed_b_loads(hosts: Hosts) -> None:
    a, b, _ = hosts
    prompt = prompt_of(1, TOKENS)
    first = complete(a.engine, prompt)
    hosts.wait_listed(TOKENS // BLOCK)
    second = complete(b.engine, prompt)
    assert second.tokens == first.tokens
    full = TOKENS // BLOCK * BLOCK
    assert second.cached_tokens >= 0.95 * full
    assert b.counter("pulled_blocks") >= 0.95 * TOKENS // BLOCK
    assert metric(b.engine, "kvpool_pulled_tokens") >= 0.95 * full


def test_the_other_way_round_and_without_redis(hosts: Hosts) -> None:
    """What B has pulled it keeps: nobody is asked for it again."""
    a, b, _ = hosts
    prompt = prompt_of(2, TOKENS)
    before = hosts.num_listed()
    first = complete(b.engine, prompt)
    hosts.wait_listed(before + TOKENS // BLOCK)
    assert complete(a.engine, prompt).tokens == first.tokens
    pulled = a.counter("pulled_blocks")
    assert pulled >= 0.95 * TOKENS // BLOCK
    reset(a.engine)
    b.daemon.kill()
    again = complete(a.engine, prompt)
    assert (again.tokens, a.counter("pulled_blocks")) == (first.tokens, pulled)
    assert again.cached_tokens >= 0.95 * TOKENS // BLOCK * BLOCK
