"""The router's metrics: counted in each worker, added up and written by the parent.

Prometheus' text format 0.0.4. All values of workers are sums (counters, histograms, requests in
flight), so adding them up over workers is right for each.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from typing import NamedTuple

PREFIX = "kvpool_router_"
SECONDS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    120.0,
)
BOUNDS = (*(f"{second:g}" for second in SECONDS), "+Inf")

Sample = tuple[str, tuple[str, ...], float]
"""Name, the values of its labels, value. Histograms are three names: `_bucket`, `_sum`, `_count`."""


class Metric(NamedTuple):
    kind: str
    labels: tuple[str, ...]
    text: str


METRICS = {
    "requests_total": Metric("counter", ("replica", "status"), "Answers passed on to clients."),
    "decisions_total": Metric("counter", ("reason",), "Decisions of the policy."),
    "rejected_total": Metric("counter", ("status",), "Requests answered by the router itself."),
    "retries_total": Metric("counter", ("replica", "cause"), "Requests taken on from a replica."),
    "retries_refused_total": Metric("counter", (), "Retries that were not allowed."),
    "lost_answers_total": Metric("counter", ("replica",), "Answers that broke off on the way."),
    "disconnects_total": Metric("counter", (), "Clients that left before their answer's end."),
    "first_byte_seconds": Metric("histogram", ("replica",), "From the whole request to the answer's head."),
    "answers_total": Metric("counter", ("policy", "replica"), "Complete answers to prompts."),
    "answers_unreported_total": Metric("counter", ("policy", "replica"), "Those without cached_tokens."),
    "prompt_tokens_total": Metric("counter", ("policy", "replica"), "Prompt tokens, as engines report."),
    "predicted_hit_tokens_total": Metric(
        "counter", ("policy", "replica", "tier"), "Of them predicted to be cached."),
    "reported_hit_tokens_total": Metric(
        "counter", ("policy", "replica", "tier"), "Of them cached, as engines report."),
    "in_flight_requests": Metric("gauge", ("replica",), "Requests at the replica now."),
    "in_flight_tokens": Metric("gauge", ("replica",), "What they weigh, as the policy counts it."),
    "client_connections": Metric("gauge", (), "Open connections of clients."),
    "replica_state": Metric("gauge", ("replica", "state"), "1 for the state that the replica is in."),
    "replica_share": Metric("gauge", ("replica",), "Below 1 while the replica warms up."),
    "replica_ejections_total": Metric("counter", ("replica",), "Times the replica was taken out."),
    "replica_waiting_requests": Metric("gauge", ("replica",), "Queued in the engine, as it says."),
    "replica_cache_usage": Metric("gauge", ("replica",), "Share of its KV memory in use, as it says."),
    "replica_connections": Metric("gauge", ("state",), "Connections to replicas: active, or idle."),
    "table_entries": Metric("gauge", ("table",), "Entries of what the router remembers."),
    "retry_budget": Metric("gauge", (), "Retries after 429 or 503 that may be made now."),
    "worker_restarts_total": Metric("counter", (), "Workers that ended by themselves."),
}  # fmt: skip


class Histogram:
    """Observations by the first bound that they do not exceed, and their sum."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(SECONDS) + 1)
        self.total = 0.0


class Metrics:
    """The counters of one process."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, ...], float] = {}
        self._histograms: dict[tuple[str, ...], Histogram] = {}

    def count(self, *name_and_labels: str) -> None:
        self._counts[name_and_labels] = self._counts.get(name_and_labels, 0) + 1

    def observe(self, seconds: float, *name_and_labels: str) -> None:
        histogram = self._histograms.get(name_and_labels)
        if histogram is None:
            histogram = self._histograms[name_and_labels] = Histogram()
        histogram.counts[bisect_left(SECONDS, seconds)] += 1
        histogram.total += seconds

    def forget(self, replica_id: str) -> None:
        """It is gone from the fleet."""
        for key in [key for key in self._counts if replica_of(key[0], key[1:]) == replica_id]:
            del self._counts[key]
        for key in [key for key in self._histograms if replica_of(key[0], key[1:]) == replica_id]:
            del self._histograms[key]

    def samples(self) -> list[Sample]:
        """Buckets are not added up yet: `metrics_text` does."""
        samples: list[Sample] = [(n, tuple(labels), v) for (n, *labels), v in self._counts.items()]
        for (name, *labels), histogram in self._histograms.items():
            for bound, number in zip(BOUNDS, histogram.counts, strict=True):
                samples.append((f"{name}_bucket", (*labels, bound), number))
            samples.append((f"{name}_sum", tuple(labels), histogram.total))
            samples.append((f"{name}_count", tuple(labels), sum(histogram.counts)))
        return samples


def _metric_of(name: str) -> Metric:
    """Of a sample's name."""
    return METRICS.get(name) or METRICS[name.rpartition("_")[0]]


def is_gauge(name: str) -> bool:
    return _metric_of(name).kind == "gauge"


def replica_of(name: str, labels: tuple[str, ...]) -> str | None:
    """Whom a sample is about, if it is about one replica."""
    names = _metric_of(name).labels
    return labels[names.index("replica")] if "replica" in names else None


def counters_of(samples: Iterable[Sample]) -> list[Sample]:
    """What stays of processes that ended: all but the gauges, added up."""
    sums: dict[tuple[str, tuple[str, ...]], float] = {}
    for name, labels, value in samples:
        if not is_gauge(name):
            key = name, tuple(labels)
            sums[key] = sums.get(key, 0) + value
    return [(name, labels, value) for (name, labels), value in sums.items()]


def metrics_text(samples: Iterable[Sample]) -> str:
    """Samples of equal name and labels are added up."""
    by_name: dict[str, dict[tuple[str, ...], float]] = {}
    for name, labels, value in samples:
        series = by_name.setdefault(name, {})
        series[tuple(labels)] = series.get(tuple(labels), 0) + value
    lines: list[str] = []
    for name, metric in METRICS.items():
        lines += [f"# HELP {PREFIX}{name} {metric.text}", f"# TYPE {PREFIX}{name} {metric.kind}"]
        if metric.kind == "histogram":
            lines += _histogram(name, metric.labels, by_name)
        else:
            lines += _series(name, metric.labels, by_name.get(name, {}))
    return "\n".join(lines) + "\n"


def _series(
    name: str, labels: tuple[str, ...], series: dict[tuple[str, ...], float]
) -> Iterable[str]:
    for values, value in sorted(series.items()):
        pairs = ",".join(
            f'{key}="{_escaped(text)}"' for key, text in zip(labels, values, strict=True)
        )
        yield f"{PREFIX}{name}{{{pairs}}} {value:.10g}" if pairs else f"{PREFIX}{name} {value:.10g}"


def _histogram(
    name: str, labels: tuple[str, ...], by_name: dict[str, dict[tuple[str, ...], float]]
) -> list[str]:
    counts = by_name.get(name + "_bucket", {})
    buckets: dict[tuple[str, ...], float] = {}
    for values in sorted({key[:-1] for key in counts}):
        total = 0.0
        for bound in BOUNDS:
            total += counts.get((*values, bound), 0)
            buckets[*values, bound] = total
    lines = [
        line
        for values, value in buckets.items()
        for line in _series(name + "_bucket", (*labels, "le"), {values: value})
    ]
    for part in ("_sum", "_count"):
        lines += _series(name + part, labels, by_name.get(name + part, {}))
    return lines


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
