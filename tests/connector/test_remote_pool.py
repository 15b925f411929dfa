"""A real engine on a host without a pool of its own: it names another host's, over CURVE."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from connector.real_engines import BLOCK, ENV, OPTIONS, PATIENT, metric, prompt_of, reset
from helpers import WAIT_S, until

from benchmarks.completions import complete
from benchmarks.processes import Engine, PoolDaemon, free_port
from vllm_kvpool.config import ConnectorConfig, pool_dir
from vllm_kvpool.host_keys import make_keys
from vllm_kvpool.liveness import is_locked
from vllm_kvpool.paths import PoolPaths
from vllm_kvpool.pool.admin import clear, fetch_stats

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TOKENS = 30 * BLOCK + 17
FULL = TOKENS // BLOCK * BLOCK


class Remote(NamedTuple):
    daemon: PoolDaemon
    """Of the remote pool."""
    engine: Engine
    name: str
    """Of the pool in front of it, which the engine has started."""
    shm_dir: str

    def counter(self, name: str) -> int:
        return int(fetch_stats(self.name, self.shm_dir, WAIT_S)["counters"].get(name, 0))

    def ask(self, prompt: list[int]) -> list[int]:
        """The answer to a prompt that is nowhere yet; all of its blocks are in both pools then."""
        before = self._num_computed
        tokens = complete(self.engine, prompt).tokens
        until(lambda: self._num_computed >= before + len(prompt) // BLOCK, "the store")
        until(lambda: self.counter("push_waiting") == 0, "the push")
        until(lambda: self.counter("pushed_blocks") >= self._num_computed, "the push")
        return tokens

    @property
    def _num_computed(self) -> int:
        """Blocks that the engine has stored; what was pulled is counted as stored, too."""
        return self.counter("stored") - self.counter("pulled_blocks")


@pytest.fixture(scope="module")
def remote(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    logs = tmp_path_factory.mktemp("remote")
    shm = Path(tempfile.mkdtemp(prefix="kvpool-test-", dir="/dev/shm"))
    public = {name: make_keys(logs / name, name)[0] for name in ("there", "here")}
    shutil.copy(public["here"], logs / "there")
    shutil.copy(public["there"], logs / "here" / "upstream.key")
    for name in ("there", "here"):
        (shm / name).mkdir()
    address = f"tcp://127.0.0.1:{free_port()}"
    daemon = PoolDaemon(
        logs / "there.log", name="shared", size="256MiB", shm_dir=str(shm / "there"),
        listen=address, keys=str(logs / "there"),
    )  # fmt: skip
    config = {"pool": address, "keys": str(logs / "here"), "size": "128MiB"}
    # Tiny models compute faster than this machine moves bytes: ask for the bytes anyway.
    patient = {"pull_deadline_ms": 10_000, "prefill_tokens_per_s": 100, "load_deadline_ms": 30_000}
    engine = Engine(
        tiny_model,
        logs / "engine.log",
        extra={**config, **patient, "shm_dir": str(shm / "here"), "checksum": "all"},
        connector_class=PATIENT,
        options=OPTIONS,
        env=ENV,
    )
    name = ConnectorConfig(pool=address).pool_name
    paths = PoolPaths(pool_dir(name, str(shm / "here")))
    with daemon, engine:
        engine.wait_ready()
        yield Remote(daemon, engine, name, str(shm / "here"))
        assert "Traceback" not in engine.log.read_text()
        assert "Traceback" not in daemon.log.read_text()
        assert "Traceback" not in paths.daemon_log.read_text()
    os.kill(int(paths.daemon_lock.read_text()), signal.SIGTERM)
    until(lambda: not is_locked(paths.daemon_lock), "the end of the pool in front")
    shutil.rmtree(shm)


def forget_here(remote: Remote) -> None:
    """In VRAM and in the pool in front."""
    reset(remote.engine)
    clear(remote.name, remote.shm_dir)


def test_what_was_stored_there_comes_back(remote: Remote) -> None:
    prompt = prompt_of(1, TOKENS)
    first = remote.ask(prompt)
    forget_here(remote)
    second = complete(remote.engine, prompt)
    assert second.tokens == first
    assert second.cached_tokens >= 0.95 * FULL
    assert remote.counter("pulled_blocks") >= 0.95 * FULL // BLOCK
    assert metric(remote.engine, "kvpool_pulled_tokens") >= 0.95 * FULL


def test_without_the_remote_pool_the_engine_goes_on(remote: Remote) -> None:
    prompt = prompt_of(2, TOKENS)
    first = remote.ask(prompt)
    remote.daemon.kill()
    reset(remote.engine)
    again = complete(remote.engine, prompt)  # what is in front is still there
    assert again.tokens == first
    assert again.cached_tokens >= 0.95 * FULL
    forget_here(remote)
    assert complete(remote.engine, prompt).tokens == first
    remote.daemon.start()

    def comes_from_there() -> bool:
        forget_here(remote)
        completion = complete(remote.engine, prompt)
        assert completion.tokens == first
        return completion.cached_tokens >= 0.95 * FULL

    until(comes_from_there, "the remote pool to be back", timeout_s=60)
