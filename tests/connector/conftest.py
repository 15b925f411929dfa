from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import Daemon

from benchmarks.tiny_model import make_tiny_model

try:
    with warnings.catch_warnings(action="ignore"):
        from connector.mini_engine import MiniEngine
        from connector.real_engines import engines
except ModuleNotFoundError as error:
    if error.name != "vllm":
        raise
    collect_ignore_glob = ["test_*.py"]


__all__ = ["engines"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.vllm)
            item.add_marker(pytest.mark.filterwarnings("ignore"))  # vllm's and torch's own


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return make_tiny_model(
        folder, hidden_size=256, num_layers=4, num_heads=4, num_kv_heads=2, intermediate_size=512
    )


@pytest.fixture
def daemon(shm_dir: Path) -> Iterator[Daemon]:
    daemon = Daemon(shm_dir, "--min-block", "4KiB", size="32MiB").start()
    yield daemon
    if daemon.process is not None:
        daemon.resume()
        assert daemon.stop() == 0, daemon.errors()


@pytest.fixture
def make_engine(
    tiny_model: Path, daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., MiniEngine]]:
    """Mini engines on the daemon's pool."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    engines: list[MiniEngine] = []

    def make(
        *, model: Path = tiny_model, extra: dict[str, Any] | None = None, **options: Any
    ) -> MiniEngine:
        common = {"pool": daemon.name, "shm_dir": str(daemon.shm_dir), "checksum": "all"}
        engines.append(MiniEngine(model, extra={**common, **(extra or {})}, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def engine(make_engine: Callable[..., MiniEngine]) -> MiniEngine:
    return make_engine()
