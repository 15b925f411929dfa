"""What `traced_connector` has noted, read by the scripts' own process, which has no vLLM."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path

from benchmarks.report import percentile

STEPS = ("arrived", "submitted", "copied", "noticed", "scheduled", "launched", "finished")
Spans = dict[str, float]
"""Milliseconds to a step from the one before, and `launch_cpu`."""


def traced_requests(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def spans_of(found: dict[str, float], begun_s: float) -> Spans:
    """In the order in which a request took its steps."""
    spans = {}
    last_s = begun_s
    for step in sorted((name for name in STEPS if name in found), key=found.__getitem__):
        spans[step] = (found[step] - last_s) * 1e3
        last_s = found[step]
    if "launch_cpu" in found:
        spans["launch_cpu"] = found["launch_cpu"] * 1e3
    return spans


def by_step(several: list[Spans], names: Iterable[str]) -> dict[str, tuple[float, float]]:
    """Median and 95th percentile of those that took the step."""
    taken = {name: [spans[name] for spans in several if name in spans] for name in names}
    return {
        name: (statistics.median(values), percentile(values, 0.95))
        for name, values in taken.items()
        if values
    }


def told(steps: dict[str, tuple[float, float]]) -> str:
    return ", ".join(f"{name} {median:.1f} / {p95:.1f}" for name, (median, p95) in steps.items())
