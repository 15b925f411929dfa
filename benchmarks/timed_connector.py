"""KVPoolConnector with a stopwatch on every scheduler-side hook: an engine of bench_connector.py loads it.

The times go to the file that KVPOOL_HOOK_TIMES names, a JSON object a line: {hook: [[wall, processor], ...]} in
microseconds. Where engine and benchmark share few cores, wall time is mostly that of others; processor time is the
hook's own.
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from vllm_kvpool.connector import KVPoolConnector

HOOKS = (
    "on_new_request",
    "get_num_new_matched_tokens",
    "update_state_after_alloc",
    "build_connector_meta",
    "update_connector_output",
    "request_finished_all_groups",
    "has_pending_push_work",
    "has_pending_block_frees",
)
WRITE_EVERY_S = 0.5


class _Times:
    def __init__(self, path: str) -> None:
        self._path = path
        self._times: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
        self._written = time.monotonic()

    def add(self, hook: str, wall_us: float, processor_us: float) -> None:
        self._times[hook].append((round(wall_us, 1), round(processor_us, 1)))
        if time.monotonic() - self._written > WRITE_EVERY_S:
            with open(self._path, "a") as file:
                file.write(json.dumps(self._times) + "\n")
            self._times.clear()
            self._written = time.monotonic()


_times = _Times(os.environ.get("KVPOOL_HOOK_TIMES", os.devnull))


def _timed(hook: str) -> Callable[..., Any]:
    inner = getattr(KVPoolConnector, hook)

    def call(self: TimedKVPoolConnector, *args: Any, **kwargs: Any) -> Any:
        begun, processor = time.perf_counter_ns(), time.thread_time_ns()
        result = inner(self, *args, **kwargs)
        processor = time.thread_time_ns() - processor
        _times.add(hook, (time.perf_counter_ns() - begun) / 1e3, processor / 1e3)
        return result

    return call


class TimedKVPoolConnector(KVPoolConnector):
    pass


for _hook in HOOKS:
    setattr(TimedKVPoolConnector, _hook, _timed(_hook))
