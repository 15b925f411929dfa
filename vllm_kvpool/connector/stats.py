"""What the connector did, on the way into vLLM's own `/metrics`.

Both sides count into a `KVPoolStats`; vLLM carries its plain `data` to the API server, where
`KVPoolPromMetrics` adds it up. Names below are the metrics' names without the prefix (Prometheus
appends `_total` to counters).
"""

from __future__ import annotations

from typing import Any

from prometheus_client import Counter, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

PREFIX = "vllm:kvpool_"

COUNTERS = {
    "hit_blocks": "Blocks that lookups found in the pool and whose load was started.",
    "hit_tokens": "Tokens of these blocks.",
    "pulled_tokens": "Tokens found in this pool after a wait for another host.",
    "load_bytes": "Bytes copied from the pool into the KV cache.",
    "store_bytes": "Bytes copied from the KV cache into the pool.",
    "store_blocks": "Blocks stored.",
}
REASONED_COUNTERS = {
    "misses": "Lookups at admission that loaded nothing, by reason.",
    "pull_ends": "Waits for another host that did not bring all, by reason.",
    "load_failed_blocks": "Blocks whose load failed and that were computed instead, by reason.",
    "store_skipped_blocks": "Blocks that were not stored, by reason.",
    "client_skipped": "What the pool's client left undone (lookups, requests, messages), by reason.",
}
"""These have a label `reason`; their keys in `data` are "name:reason"."""
HISTOGRAMS = {
    "load_seconds": "Time of a load, from its start in a worker to its end.",
    "store_seconds": "Time of a store, from its start in a worker to its end.",
    "predicted_load_seconds": "What a load was predicted to take, where that decided.",
    "predicted_compute_seconds": "How much longer computing the same tokens too was predicted to take.",
}
BUCKETS_S = (
    0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0,
)  # fmt: skip


class KVPoolStats(KVConnectorStats):
    """`data`: counter -> sum, histogram -> observations. Empty until something happens."""

    def reset(self) -> None:
        self.data: dict[str, Any] = {}

    def is_empty(self) -> bool:
        return not self.data

    def count(self, name: str, amount: float = 1, reason: str = "") -> None:
        key = f"{name}:{reason}" if reason else name
        self.data[key] = self.data.get(key, 0) + amount

    def observe(self, name: str, value: float) -> None:
        self.data.setdefault(name, []).append(value)

    def aggregate(self, other: KVConnectorStats) -> KVPoolStats:
        for key, value in other.data.items():
            # `+` on lists makes a new one: nobody else's observations grow.
            self.data[key] = self.data[key] + value if key in self.data else value
        return self

    def reduce(self) -> dict[str, int | float]:
        """One number each, for vLLM's log line; observations as their sum."""
        return {
            key: round(sum(value), 4) if isinstance(value, list) else value
            for key, value in sorted(self.data.items())
        }

    def taken(self) -> KVPoolStats | None:
        """What was counted since the last call, None for nothing."""
        if not self.data:
            return None
        data, self.data = self.data, {}
        return KVPoolStats(data)


class KVPoolPromMetrics(KVConnectorPromMetrics):
    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        counter, histogram = metric_types[Counter], metric_types[Histogram]
        metrics = {
            name: counter(name=PREFIX + name, documentation=text, labelnames=labelnames)
            for name, text in COUNTERS.items()
        }
        for name, text in REASONED_COUNTERS.items():
            labels = [*labelnames, "reason"]
            metrics[name] = counter(name=PREFIX + name, documentation=text, labelnames=labels)
        for name, text in HISTOGRAMS.items():
            metrics[name] = histogram(
                name=PREFIX + name, documentation=text, labelnames=labelnames, buckets=BUCKETS_S
            )
        self._metrics = metrics
        self._show_zeros()

    def _show_zeros(self) -> None:
        """Metrics without a reason appear before their first event."""
        for labels in self.per_engine_labelvalues.values():
            for name in (*COUNTERS, *HISTOGRAMS):
                self._metrics[name].labels(*labels)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        engine = self.per_engine_labelvalues[engine_idx]
        for key, value in transfer_stats_data.items():
            name, _, reason = key.partition(":")
            metric = self._metrics[name].labels(*engine, *([reason] if reason else []))
            if isinstance(value, list):
                for observation in value:
                    metric.observe(observation)
            else:
                metric.inc(value)
