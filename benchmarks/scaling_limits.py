"""From what a fleet does to what is full: Redis's processor, the links, and the memory of each daemon."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.scaled_fleet import FleetSimulation
from vllm_kvpool.pool.directory import BEAT_S, MAX_CACHED, MAX_WRITES
from vllm_kvpool.pool.peer import CONNECTIONS
from vllm_kvpool.protocol import POOL_ID_BYTES

Row = dict[str, Any]


def row_of(simulation: FleetSimulation, seconds: float) -> Row:
    """Rates are per second, of the whole fleet; shares are of all prompt tokens."""
    tally, traffic = simulation.tally, simulation.directory.traffic
    hosts, model = len(simulation.hosts), simulation.model
    ttft_s = sorted(tally.ttft_s)
    out = [host.out.busy_s / seconds for host in simulation.hosts]
    return {
        "hosts": hosts,
        "requests": tally.requests,
        **{name: getattr(tally, name) / tally.prompt for name in ("vram", "pool", "pulled", "computed")},
        "ttft_mean_ms": sum(ttft_s) / len(ttft_s) * 1e3,
        "ttft_p95_ms": ttft_s[int(len(ttft_s) * 0.95)] * 1e3,
        "prompt_tokens_per_s": tally.prompt / seconds,
        "pulled_bytes_per_s": tally.pulled_blocks * model.block_bytes / seconds,
        "late_share": tally.late_blocks / max(1, tally.late_blocks + tally.pulled_blocks),
        "link_busy": sum(out) / hosts,
        "link_busy_most": max(out),
        "peers": tally.peers / max(1, tally.pulls),
        "peers_most": tally.max_peers,
        "lookups_per_s": traffic.lookups / seconds,
        "lookup_trips_per_s": traffic.lookup_trips / seconds,
        "keys_read_per_s": traffic.keys_read / seconds,
        "ids_read_per_s": traffic.ids_read / seconds,
        "added_per_s": traffic.added / seconds,
        "removed_per_s": traffic.removed / seconds,
        "write_trips_per_s": traffic.write_trips / seconds,
        "renewed_per_s": traffic.renewed / seconds,
        "renew_trips_per_s": traffic.renew_trips / seconds,
        "beats_per_s": hosts / BEAT_S,
        "entries": simulation.directory.entries,
        "holders": simulation.directory.copies / max(1, simulation.directory.entries),
        "decide_us": tally.decide_s / tally.requests * 1e6,
    }  # fmt: skip


def redis_load(row: Row, cost: dict[str, Any]) -> dict[str, float]:
    """Seconds of one core in a second, by what for."""

    def spent(name: str, trips: float, number: float) -> float:
        return float(trips * cost[name]["trip_s"] + number * cost[name]["each_s"])

    written = row["added_per_s"] + row["removed_per_s"]
    added_share = row["added_per_s"] / max(written, 1e-9)
    trips = row["write_trips_per_s"]
    more_holders = max(0.0, row["ids_read_per_s"] - row["keys_read_per_s"])
    return {
        "beats": spent("beat", row["beats_per_s"], row["beats_per_s"] * row["hosts"]),
        "new": spent("add", trips * added_share, row["added_per_s"])
        + spent("remove", trips * (1 - added_share), row["removed_per_s"]),
        "renewals": spent("renew", row["renew_trips_per_s"], row["renewed_per_s"]),
        "lookups": spent("read", row["lookup_trips_per_s"], row["keys_read_per_s"])
        + more_holders * cost["holder_s"],
    }


def wire_bytes_per_s(row: Row, cost: dict[str, Any]) -> float:
    """Between all daemons and Redis, both ways."""
    wire = cost["wire_bytes"]
    added = row["added_per_s"] + row["renewed_per_s"]
    beats = row["beats_per_s"] * row["hosts"] * wire["beat_host"]
    more_holders = max(0.0, row["ids_read_per_s"] - row["keys_read_per_s"])
    return float(
        added * wire["add"]
        + row["removed_per_s"] * wire["remove"]
        + row["keys_read_per_s"] * wire["read"]
        + more_holders * (POOL_ID_BYTES + 7)  # "$16", and two line ends
        + beats
    )


def full_at(row: Row, cost: dict[str, Any], share: float = 0.7) -> int:
    """Hosts that one Redis carries with so much of its core, if all but the beats grows as the fleet does."""
    load = redis_load(row, cost)
    a_host = (sum(load.values()) - load["beats"]) / row["hosts"] + cost["beat"]["trip_s"] / BEAT_S
    squared = cost["beat"]["each_s"] / BEAT_S
    if squared <= 0:
        return int(share / a_host)
    return int((math.sqrt(a_host**2 + 4 * squared * share) - a_host) / (2 * squared))


def memory(row: Row, cost: dict[str, Any]) -> dict[str, float]:
    """Bytes: Redis's, and what a daemon has at most for the directory and for its peers' sockets."""
    entries, copies = row["entries"], row["entries"] * row["holders"]
    return {
        "redis": entries * cost["entry_bytes"] + (copies - entries) * cost["holder_bytes"],
        "cache_most": MAX_CACHED * cost["cached_bytes"],
        "pending_most": MAX_WRITES * cost["pending_bytes"],
        "connections_most": 2 * CONNECTIONS * row["peers_most"],
    }
