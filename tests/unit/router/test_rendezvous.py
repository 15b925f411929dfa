"""Orders by key: minimal moves, an even spread, the same in every router, bounded memory."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from tests.unit.router.values import fleet_of
from vllm_kvpool.router.fleet import Fleet
from vllm_kvpool.router.rendezvous import Rendezvous, hash64, mix
from vllm_kvpool.router.types import Replica, ReplicaState

KEYS = [hash64(b"key %d" % i) for i in range(4_000)]
names = st.sets(st.text(min_size=1, max_size=12), min_size=1, max_size=16)
keys = st.integers(0, 2**64 - 1)


def fleet_named(ids: set[str]) -> Fleet:
    return Fleet(tuple(Replica(name, "http://x") for name in ids))


def ids(rendezvous: Rendezvous, key: int, fleet: Fleet) -> list[str]:
    return [member.replica.id for member in rendezvous.order(key, fleet)]


@given(names, keys)
def test_who_goes_changes_nothing_among_the_others(ids_of_fleet: set[str], key: int) -> None:
    fleet = fleet_named(ids_of_fleet)
    before = ids(Rendezvous(), key, fleet)
    gone = before[0]
    fleet.remove(gone)
    assert ids(Rendezvous(), key, fleet) == [name for name in before if name != gone]


@given(names, keys, st.integers(0, 3))
def test_every_router_orders_alike(ids_of_fleet: set[str], key: int, seed: int) -> None:
    """However the fleet came about."""
    one = fleet_named(ids_of_fleet)
    other = Fleet()
    for name in sorted(ids_of_fleet, reverse=True):
        other.add(Replica(name, "http://elsewhere"))
    assert ids(Rendezvous(seed), key, one) == ids(Rendezvous(seed), key, other)


@given(names, keys, keys, st.data())
def test_a_group_is_ordered_by_the_session_and_the_rest_by_the_task(
    ids_of_fleet: set[str], key: int, group: int, data: st.DataObject
) -> None:
    fleet, rendezvous = fleet_named(ids_of_fleet), Rendezvous()
    size = data.draw(st.integers(1, len(fleet)))
    order = rendezvous.order_in_group(key, group, size, fleet)
    by_group = rendezvous.order(group, fleet)
    assert set(order[:size]) == set(by_group[:size])
    assert order[size:] == by_group[size:]
    members = set(by_group[:size])
    assert list(order[:size]) == [m for m in rendezvous.order(key, fleet) if m in members]


def test_keys_spread_evenly() -> None:
    fleet, rendezvous = fleet_of(16), Rendezvous()
    firsts = Counter(ids(rendezvous, key, fleet)[0] for key in KEYS)
    assert len(firsts) == 16
    assert max(firsts.values()) < 1.25 * len(KEYS) / 16


def test_every_order_is_as_likely() -> None:
    """Of four replicas there are 24."""
    fleet, rendezvous = fleet_of(4), Rendezvous()
    orders = Counter(tuple(ids(rendezvous, key, fleet)) for key in KEYS)
    expected = len(KEYS) / 24
    assert len(orders) == 24
    chi_squared = sum((count - expected) ** 2 / expected for count in orders.values())
    assert chi_squared < 50  # 23 degrees of freedom: one in a thousand is above


def test_one_more_takes_its_part_from_each() -> None:
    fleet, rendezvous = fleet_of(8), Rendezvous()
    before = {key: ids(rendezvous, key, fleet)[0] for key in KEYS}
    fleet.add(Replica("new", "http://new"))
    after = {key: ids(rendezvous, key, fleet)[0] for key in KEYS}
    moved = [key for key in KEYS if before[key] != after[key]]
    assert {after[key] for key in moved} == {"new"}
    assert 0.8 / 9 < len(moved) / len(KEYS) < 1.2 / 9
    assert len({before[key] for key in moved}) == 8


def test_the_keys_of_a_dead_replica_spread_over_all_others() -> None:
    fleet, rendezvous = fleet_of(8), Rendezvous()
    seconds = Counter(
        ids(rendezvous, k, fleet)[1] for k in KEYS if ids(rendezvous, k, fleet)[0] == "r3"
    )
    assert len(seconds) == 7
    assert max(seconds.values()) < 1.5 * sum(seconds.values()) / 7


def test_a_warming_replica_has_its_share_of_its_keys_and_loses_none() -> None:
    fleet, rendezvous = fleet_of(8), Rendezvous()

    def own(share: float) -> set[int]:
        fleet.set_share("r1", share)
        return {
            key for key in KEYS
            if rendezvous.candidates(rendezvous.order(key, fleet), key, None)[0].replica.id == "r1"
        }  # fmt: skip

    tenth, half, full = own(0.1), own(0.5), own(1.0)
    assert tenth < half < full
    assert 0.35 < len(half) / len(full) < 0.65


def test_candidates_accept_or_are_bound() -> None:
    fleet, rendezvous = fleet_of(4), Rendezvous()
    fleet.set_state("r0", ReplicaState.OUT)
    fleet.set_state("r1", ReplicaState.DRAINING)
    order = rendezvous.order(1, fleet)
    assert {m.replica.id for m in rendezvous.candidates(order, 1, None)} == {"r2", "r3"}
    assert {m.replica.id for m in rendezvous.candidates(order, 1, "r1")} == {"r1", "r2", "r3"}
    assert {m.replica.id for m in rendezvous.candidates(order, 1, "r0")} == {"r2", "r3"}


def test_no_more_orders_are_kept_than_told() -> None:
    fleet, rendezvous = fleet_of(4), Rendezvous(capacity=10)
    for key in KEYS[:100]:
        rendezvous.order(key, fleet)
        rendezvous.order_in_group(key, 7, 2, fleet)
        rendezvous.check_integrity()


def test_mixing_tells_small_numbers_apart() -> None:
    assert len({mix(left, right) for left in range(100) for right in range(100)}) == 10_000
