"""Counts on their way from both sides into Prometheus."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from vllm_kvpool.connector.connector import KVPoolConnector
from vllm_kvpool.connector.metadata import JobReport, KVPoolWorkerMetadata
from vllm_kvpool.connector.stats import KVPoolPromMetrics, KVPoolStats


def test_stats_add_up_and_survive_the_way() -> None:
    one, other = KVPoolStats(), KVPoolStats()
    assert one.is_empty()
    assert one.taken() is None
    one.count("hit_blocks", 3)
    one.observe("load_seconds", 0.5)
    other.count("hit_blocks", 4)
    other.count("misses", reason="short")
    other.observe("load_seconds", 0.25)
    travelled = KVPoolConnector.build_kv_connector_stats(pickle.loads(pickle.dumps(other.data)))
    taken = one.taken()
    assert taken is not None
    assert one.is_empty()
    total = taken.aggregate(travelled)
    assert total.data == {"hit_blocks": 7, "misses:short": 1, "load_seconds": [0.5, 0.25]}
    assert total.reduce() == {"hit_blocks": 7, "misses:short": 1, "load_seconds": 0.75}
    assert travelled.data["load_seconds"] == [0.25]


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def test_metrics_by_engine_and_reason(registry: CollectorRegistry) -> None:
    def bound(kind: type) -> object:
        return lambda **options: kind(registry=registry, **options)

    kinds = {kind: bound(kind) for kind in (Counter, Gauge, Histogram)}
    metrics = KVPoolPromMetrics(
        SimpleNamespace(kv_transfer_config=None),
        kinds,
        ["model", "engine"],
        {0: ["m", "0"], 1: ["m", "1"]},
    )
    metrics.observe({"hit_tokens": 128, "misses:short": 2, "load_seconds": [0.003, 4.0]}, 1)
    metrics.observe({"hit_tokens": 128}, 1)

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"vllm:kvpool_{name}", {"model": "m", **labels})

    assert value("hit_tokens_total", engine="1") == 256
    assert value("hit_tokens_total", engine="0") == 0
    assert value("misses_total", engine="1", reason="short") == 2
    assert value("load_seconds_count", engine="1") == 2
    assert value("load_seconds_bucket", engine="1", le="0.005") == 1


def test_reports_of_several_workers_are_merged() -> None:
    """Trap 23: a job is over when all workers have told of it, and as bad as the worst of them."""
    one = KVPoolWorkerMetadata({1: JobReport(1, b"\0\0"), 2: JobReport(1, b"\0")})
    other = KVPoolWorkerMetadata({1: JobReport(1, b"\0\2")})
    assert one.aggregate(other).reports == {1: JobReport(2, b"\0\2"), 2: JobReport(1, b"\0")}
    assert not one.aggregate(other).device_off
    other.device_off = True
    assert one.aggregate(other).device_off
    assert other.aggregate(one).device_off
