"""What tests of every folder use."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# The same examples each time, however slow the machine is.
settings.register_profile(
    "tests", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tests")


@pytest.fixture
def shm_dir() -> Iterator[Path]:
    """A folder in shared memory that stands for a host's /dev/shm."""
    folder = Path(tempfile.mkdtemp(prefix="kvpool-test-", dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder)
