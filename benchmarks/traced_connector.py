"""KVPoolConnector that notes when each step of a request's way to its first token was done.

An engine of `bench_ttft --trace` or `bench_multiturn --trace` loads it. The file that KVPOOL_TRACE names gets a JSON
object a request, of seconds on the system's monotonic clock:

    arrived     at the scheduler
    submitted   the load was handed to the copy engine
    noticed     the worker told that the last bytes are on their way, or there
    copied      they were there: before that, or after the next step
    scheduled   a step computes the request
    launched    all kernels of that step were started; `launch_cpu`: processor time of that since `scheduled`
    finished    the scheduler has the last token

For an engine whose scheduler and worker share a process, as with one GPU.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any

from vllm_kvpool.connector import KVPoolConnector
from vllm_kvpool.connector.metadata import CopyJob, LoadJob


class _Trace:
    def __init__(self, path: str) -> None:
        self._path = path
        self.requests: dict[str, dict[str, float]] = {}
        self.in_step: list[str] = []

    def mark(self, request_id: str, step: str, value: float | None = None) -> None:
        known = self.requests.setdefault(request_id, {})
        known.setdefault(step, time.perf_counter() if value is None else value)

    def launched(self) -> None:
        for request_id in self.in_step:
            if "launched" not in self.requests.get(request_id, {"launched": 0.0}):
                self.mark(request_id, "launched")
                begun = self.requests[request_id].pop("scheduled_cpu")
                self.mark(request_id, "launch_cpu", time.thread_time() - begun)
        self.in_step = []

    def copied(self, request_id: str, seconds: float) -> None:
        if submitted := self.requests.get(request_id, {}).get("submitted"):
            self.mark(request_id, "copied", submitted + seconds)

    def finish(self, request_id: str) -> None:
        self.mark(request_id, "finished")
        with open(self._path, "a") as file:
            file.write(json.dumps(self.requests.pop(request_id)) + "\n")


_trace = _Trace(os.environ.get("KVPOOL_TRACE", os.devnull))


def _traced(count: Callable[[CopyJob, bytes, float], None]) -> Callable[..., None]:
    def counts(job: CopyJob, statuses: bytes, seconds: float) -> None:
        count(job, statuses, seconds)
        if isinstance(job, LoadJob):
            _trace.copied(job.request_id, seconds)

    return counts


class TracedKVPoolConnector(KVPoolConnector):
    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        if self._worker is not None:
            self._worker._count = _traced(self._worker._count)

    def on_new_request(self, request: Any) -> None:
        _trace.mark(request.request_id, "arrived")
        super().on_new_request(request)

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        metadata = super().build_connector_meta(scheduler_output)
        _trace.in_step = list(scheduler_output.num_scheduled_tokens)
        for request_id in _trace.in_step:
            _trace.mark(request_id, "scheduled")
            _trace.mark(request_id, "scheduled_cpu", time.thread_time())
        return metadata

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        super().start_load_kv(forward_context, **kwargs)
        for load in self._get_connector_metadata().loads:
            _trace.mark(load.request_id, "submitted")

    def get_finished(self, finished_req_ids: set[str]) -> Any:
        result = super().get_finished(finished_req_ids)
        for request_id in result[1] or ():
            _trace.mark(request_id, "noticed")
        _trace.launched()
        return result

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> Any:
        _trace.finish(request.request_id)
        return super().request_finished_all_groups(request, block_ids)
