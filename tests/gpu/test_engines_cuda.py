"""Real engines on a GPU: what `engine_variants` checks, variant by variant."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gpu.engine_variants import VARIANTS, Runs, num_gpus, pool_for_variants

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pool_for_variants(tmp_path_factory.mktemp("pool")) as name:
        yield name


@pytest.mark.parametrize("name", VARIANTS)
def test_the_pool_gives_the_output_that_vram_gives(name: str, pool: str, tmp_path: Path) -> None:
    if torch.cuda.device_count() < num_gpus(name):
        pytest.skip(f"needs {num_gpus(name)} GPUs")
    assert Runs(name, pool, tmp_path, {}).run() == []
