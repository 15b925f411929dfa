"""What tests of every folder use."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def shm_dir() -> Iterator[Path]:
    """A folder in shared memory that stands for a host's /dev/shm."""
    folder = Path(tempfile.mkdtemp(prefix="kvpool-test-", dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder)
