"""KVPoolConnector with a stopwatch on every scheduler-side hook: an engine of bench_connector.py loads it.

The times go to the file that KVPOOL_HOOK_TIMES names, a JSON object a line: {hook: [[wall, processor], ...]} in
microseconds. The scheduler gets the core that KVPOOL_HOOK_CORE names, as it has one on a host with enough of them; it
is up to the benchmark to keep other processes away from there. The engine's other Python threads share it, as they
share the interpreter: wall time has in it what they do when a system call of ours lets them, processor time does not.
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
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
            _arrange_threads(int(os.environ["KVPOOL_HOOK_CORE"]))
            self._written = time.monotonic()


_times = _Times(os.environ.get("KVPOOL_HOOK_TIMES", os.devnull))


def _arrange_threads(core: int) -> None:
    """Python's to `core`, ZeroMQ's to the others. Again and again, for new ones."""
    others = set(range(os.cpu_count() or 1)) - {core} or {core}
    for thread in Path("/proc/self/task").iterdir():
        is_zmq = (thread / "comm").read_text().startswith("ZMQbg")
        os.sched_setaffinity(int(thread.name), others if is_zmq else {core})


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
