"""An engine's own metrics, as far as the router uses them (vLLM 0.24 to 0.33 name them so)."""

from __future__ import annotations

import math
import re

from vllm_kvpool.router.roster import Gauges

_CACHE = re.compile(r"^vllm:cache_config_info\{([^}]*)\} 1", re.MULTILINE)
_SIZES = re.compile(r'(block_size|num_gpu_blocks)="(\d{1,15})"')
_SAMPLE = re.compile(
    r"^(vllm:num_requests_waiting|vllm:kv_cache_usage_perc|process_start_time_seconds)"
    r"(?:\{([^}]*)\})? (\S+)",
    re.MULTILINE,
)


def parse_gauges(text: str, rank: int | None) -> Gauges:
    """Of one data-parallel rank; without a rank, of all together: the sum of what waits, the fullest
    cache."""
    values: dict[str, list[float]] = {}
    for name, labels, value in _SAMPLE.findall(text):
        if rank is None or "engine=" not in labels or f'engine="{rank}"' in labels:
            values.setdefault(name, []).extend(_read(value))
    waiting = values.get("vllm:num_requests_waiting")
    usage = values.get("vllm:kv_cache_usage_perc")
    started = values.get("process_start_time_seconds")
    return Gauges(
        sum(waiting) if waiting else None,
        max(usage) if usage else None,
        _cache_tokens(text, rank),
        started[0] if started else None,
    )


def _read(value: str) -> list[float]:
    """Nothing, where it is no number."""
    try:
        number = float(value)
    except ValueError:
        return []
    return [number] if math.isfinite(number) else []


def _cache_tokens(text: str, rank: int | None) -> int | None:
    """Of all ranks, where none is named, together."""
    tokens = 0
    for labels in _CACHE.findall(text):
        if rank is None or "engine=" not in labels or f'engine="{rank}"' in labels:
            sizes = {name: int(number) for name, number in _SIZES.findall(labels)}
            tokens += sizes.get("block_size", 0) * sizes.get("num_gpu_blocks", 0)
    return tokens or None
