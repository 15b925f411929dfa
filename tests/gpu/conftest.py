from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

try:
    import torch
    from gpu.copies import Pool
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="needs a CUDA GPU: run scripts/test -m gpu where one is",
    )
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(no_gpu)


@pytest.fixture(scope="session")
def used_pool() -> Iterator[Pool]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Pool(Path(folder))


@pytest.fixture
def pool(used_pool: Pool) -> Iterator[Pool]:
    yield used_pool
    used_pool.empty()


@pytest.fixture
def stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


@pytest.fixture(params=["driver", "staged", ""], ids=lambda way: way or "calibrated")
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)
