"""An hour's worth of trouble (`benchmarks/chaos.py` says what that is); then nothing is left of it.

python -m benchmarks.chaos --hours 10        the longer form
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.chaos import HOUR, chaos, text_of

pytestmark = pytest.mark.slow

SEED = 11


def test_nothing_is_left_of_an_hour(tmp_path: Path) -> None:
    report = chaos(tmp_path, hours=1, policy="task", seed=SEED)
    print(text_of(report))
    assert sum(report.counts.values()) > 0.99 * sum(HOUR.values())
    assert not report.wrong(), text_of(report)
    assert "Traceback" not in (tmp_path / "router.log").read_text()
