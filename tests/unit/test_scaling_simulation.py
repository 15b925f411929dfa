"""The simulation of many hosts counts what it claims to. `benchmarks/bench_scaling.py` runs it on a real trace."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path

import pytest

from benchmarks.counted_directory import CountedDirectory
from benchmarks.scaled_fleet import FleetSimulation
from benchmarks.scaled_host import HostModel, SimulatedHost
from benchmarks.scaling_limits import full_at, redis_load, row_of
from benchmarks.scaling_workload import BLOCK_TOKENS, SHARINGS, TraceRequest, prompts
from vllm_kvpool.config import ConnectorConfig
from vllm_kvpool.pool.directory import CACHE_S
from vllm_kvpool.router.policies import make_policy
from vllm_kvpool.router.rendezvous import hash64
from vllm_kvpool.types import KEY_BYTES

DURATION_S = 120.0
MODEL = HostModel(vram_tokens=8_192, pool_tokens=32_768)


def small_trace() -> list[TraceRequest]:
    """60 sessions of four turns, which all begin with the same 512 tokens."""
    draw = random.Random(1)
    requests = []
    for session in range(60):
        at_s, blocks = draw.uniform(0, DURATION_S), draw.randint(8, 16)
        for _ in range(4):
            names = [b"%d %d" % (session if i >= 4 else -1, i) for i in range(blocks)]
            keys = b"".join(hashlib.sha256(name).digest() for name in names)
            tokens = blocks * BLOCK_TOKENS + draw.randrange(BLOCK_TOKENS)
            named = hash64(b"session %d" % session)
            requests.append(TraceRequest(at_s % DURATION_S, keys, hash64(b""), named, tokens, 20))
            at_s, blocks = at_s + draw.uniform(2, 10), blocks + draw.randint(2, 8)
    return sorted(requests, key=lambda request: request.at_s)


TRACE = small_trace()


def run(
    folder: Path,
    hosts: int = 4,
    policy: str = "round_robin",
    sharing: str = "apart",
    model: HostModel = MODEL,
    copies: float = 2,
) -> FleetSimulation:
    """Asserts at its end that tokens add up, and that the directory lists what the pools hold."""
    folder.mkdir()
    simulation = FleetSimulation(make_policy(policy), model, hosts, folder)
    simulation.run(prompts(TRACE, copies, sharing, seed=1, duration_s=DURATION_S), warm_up_s=20)
    simulation.close()
    return simulation


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("policy", ["task", "cache_aware", "round_robin"])
def test_every_token_is_counted_once(tmp_path: Path, policy: str, sharing: str) -> None:
    simulation = run(tmp_path / "fleet", policy=policy, sharing=sharing)
    tally = simulation.tally
    assert tally.vram + tally.pool + tally.pulled + tally.computed == tally.prompt
    assert min(tally.vram, tally.pool, tally.pulled, tally.computed) > 0
    assert tally.pulled <= tally.pulled_blocks * BLOCK_TOKENS
    assert tally.requests == len(tally.ttft_s) > 300
    sent = sum(host.out.busy_s for host in simulation.hosts) * MODEL.link_bytes_per_s
    assert sent == pytest.approx(tally.pulled_blocks * MODEL.block_bytes)
    assert sent == pytest.approx(
        sum(host.into.busy_s for host in simulation.hosts) * MODEL.link_bytes_per_s
    )


def test_one_host_asks_nobody(tmp_path: Path) -> None:
    simulation = run(tmp_path / "fleet", hosts=1, copies=0.5)
    assert simulation.tally.pulls == simulation.tally.pulled == 0
    assert simulation.directory.traffic.lookups == 0
    assert simulation.tally.pool > 0


def test_equal_runs_are_equal(tmp_path: Path) -> None:
    rows = [row_of(run(tmp_path / name, policy="task"), 100) for name in ("one", "two")]
    for row in rows:
        del row["decide_us"]
    assert rows[0] == rows[1]


def test_small_tails_are_not_worth_a_pull(tmp_path: Path) -> None:
    model = HostModel(
        MODEL.vram_tokens, MODEL.pool_tokens, connector=ConnectorConfig(min_remote_tokens=1 << 20)
    )
    tally = run(tmp_path / "fleet", model=model).tally
    assert tally.pulls == tally.pulled == 0


def test_equal_prompts_are_found_on_other_hosts(tmp_path: Path) -> None:
    shares = {}
    for sharing in SHARINGS:
        tally = run(tmp_path / sharing, sharing=sharing, copies=4).tally
        shares[sharing] = tally.computed / tally.prompt
    assert shares["alike"] < shares["apart"] - 0.1


def test_a_slow_link_brings_the_beginning_only(tmp_path: Path) -> None:
    tally = run(tmp_path / "fleet", model=HostModel(8_192, 32_768, link_gbit_s=1)).tally
    assert tally.late_blocks > 0
    assert tally.pulled < run(tmp_path / "fast").tally.pulled


def test_a_link_carries_one_transfer_at_a_time(tmp_path: Path) -> None:
    hosts = [SimulatedHost(MODEL, tmp_path / str(i)) for i in range(3)]
    one_s = MODEL.block_bytes / MODEL.link_bytes_per_s
    for asked, host in enumerate(hosts[1:], 1):
        count, done_s = host.receive(0, hosts[0], 10, 1.0, 0.0)
        assert count == 10
        assert done_s == pytest.approx(10 * asked * one_s)
    assert hosts[0].out.busy_s == pytest.approx(20 * one_s)
    for host in hosts:
        host.pool.close()


def test_what_was_read_lately_is_not_read_again() -> None:
    directory = CountedDirectory(3, BLOCK_TOKENS)
    keys = os.urandom(8 * KEY_BYTES)
    directory.announce(0, keys[: 4 * KEY_BYTES], b"", spread_s=0)
    directory.announce(1, keys, b"", spread_s=0)
    for at_s in (0.0, CACHE_S / 2, 2 * CACHE_S):
        assert list(directory.look_up(2, keys, at_s)) == [(0b10, 8), (0b1, 4)]
    assert list(directory.look_up(1, keys, 0.0)) == [(0b1, 4)]
    traffic = directory.traffic
    assert (traffic.lookups, traffic.lookup_trips, traffic.keys_read) == (4, 3, 24)
    assert traffic.ids_read == 3 * 12
    directory.announce(1, b"", keys, spread_s=0)
    assert (directory.entries, directory.copies, traffic.removed) == (4, 4, 8)


def test_where_redis_is_full_its_load_is_that(tmp_path: Path) -> None:
    cost = {name: {"trip_s": 50e-6, "each_s": 2e-6} for name in ("beat", "add", "remove", "renew")}
    cost |= {"read": {"trip_s": 60e-6, "each_s": 1e-6}, "holder_s": 1e-7}  # type: ignore[dict-item]
    row = row_of(run(tmp_path / "fleet"), 100)
    hosts = full_at(row, cost, share=0.5)
    larger = {
        name: value * hosts / row["hosts"]
        for name, value in row.items()
        if name == "hosts" or name.endswith("_per_s")
    }
    assert sum(redis_load(larger, cost).values()) == pytest.approx(0.5, rel=0.01)
