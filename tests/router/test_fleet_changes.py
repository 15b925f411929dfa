"""Replicas come and go: by the fleet file, by hand. (By DNS: test_dns.py.)"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import run_cli, until
from router.conftest import RouterUnderTest
from router.fake_replica import FakeReplica, answer, silent

MakeRouter = Callable[..., RouterUnderTest]


def write(path: Path, *addresses: str) -> None:
    """As editors do: a new file in the old one's place."""
    fresh = path.with_suffix(".new")
    fresh.write_text(f"replicas = {json.dumps(addresses)}\n")
    os.replace(fresh, path)


def fleet(router: RouterUnderTest, *arguments: str) -> str:
    """By the command line, as people do."""
    done = run_cli("fleet", *arguments, "--admin", router.admin)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_file_is_read_again(
    make_router: MakeRouter, replicas: list[FakeReplica], tmp_path: Path
) -> None:
    path = tmp_path / "fleet.toml"
    write(path, replicas[0].url)
    router = make_router(options=("--fleet", str(path)))
    assert router.used(5) == {replicas[0].id}
    write(path, *(replica.url for replica in replicas))
    until(lambda: len(router.replicas()) == 3)
    for replica in replicas:
        router.wait_state(replica.id, "accepting")
    assert router.used() == {replica.id for replica in replicas}
    write(path, replicas[1].url, f"named={replicas[2].url}")
    until(lambda: set(router.replicas()) == {replicas[1].id, "named"})
    router.wait_state("named", "accepting")
    assert router.used() == {replicas[1].id, "named"}


def told(router: RouterUnderTest) -> int:
    """How often the file was found to be broken."""
    return router.log.read_text().count("the fleet stays as it is")


def test_a_broken_file_changes_nothing(
    make_router: MakeRouter, replica: FakeReplica, tmp_path: Path
) -> None:
    path = tmp_path / "fleet.toml"
    write(path, replica.url)
    router = make_router(options=("--fleet", str(path)))
    texts = ("replicas = [", "replicas = 5", 'other = ["x"]', "", 'replicas = ["ftp://x"]')
    for number, text in enumerate(texts, 1):
        fresh = path.with_suffix(".new")
        fresh.write_text(text)
        os.replace(fresh, path)
        until(lambda number=number: told(router) == number, text)
        assert set(router.replicas()) == {replica.id}
    path.unlink()
    assert router.chat().status == 200
    refused = run_cli("route", "--fleet", str(path))
    assert refused.returncode == 2
    assert "fleet" in refused.stderr


def test_requests_in_flight_outlive_their_replicas_removal(
    make_router: MakeRouter, replicas: list[FakeReplica]
) -> None:
    go_on = {replica.id: replica.hold() for replica in replicas}
    router = make_router(*replicas)
    with ThreadPoolExecutor(1) as pool:
        got = pool.submit(router.chat, stream=True)
        until(lambda: any(replica.in_flight for replica in replicas))
        busy = next(replica for replica in replicas if replica.in_flight)
        router.fleet.remove(busy.id)
        assert busy.id not in router.replicas()
        go_on[busy.id]()
        assert got.result().body.endswith(b"[DONE]\n\n")
    router.wait_idle()
    for replica in replicas:
        replica.behave = answer()
    assert busy.id not in router.used()


def test_by_hand(make_router: MakeRouter, replicas: list[FakeReplica]) -> None:
    router = make_router(replicas[0], options=("--drain-s", "1000"))
    assert replicas[1].id in fleet(router, "add", replicas[1].url)
    router.wait_state(replicas[1].id, "accepting")
    assert router.used() == {replicas[0].id, replicas[1].id}
    table = fleet(router, "ls")
    assert [line.split()[:2] for line in table.splitlines()[1:]] == [
        [replica.id, "accepting"] for replica in replicas[:2]
    ]
    fleet(router, "rm", replicas[0].id)
    assert router.used() == {replicas[1].id}
    until(lambda: set(router.replicas()) == {replicas[1].id})
    assert replicas[0].id not in router.ask("/metrics").body.decode(), "its series go with it"
    router.fleet.add(replicas[0].url)
    router.wait_state(replicas[0].id, "accepting")
    fleet(router, "drain", replicas[0].id)
    states = {
        replica["id"]: replica["state"] for replica in json.loads(fleet(router, "ls", "--json"))
    }
    assert states == {replicas[0].id: "draining", replicas[1].id: "accepting"}


def test_drain_keeps_sessions_and_takes_no_new_ones(
    make_router: MakeRouter, replicas: list[FakeReplica]
) -> None:
    router = make_router(*replicas, options=("--drain-s", "1000"))
    homes = {n: router.chat(headers={"X-Session-ID": str(n)}).replica for n in range(30)}
    leaving = replicas[0].id
    old = [number for number, home in homes.items() if home == leaving]
    assert old
    router.fleet.drain(leaving)
    assert router.replicas()[leaving]["state"] == "draining"
    for number in old:
        assert router.chat(headers={"X-Session-ID": str(number)}).replica == leaving
    fresh = {router.chat(headers={"X-Session-ID": f"new {n}"}).replica for n in range(30)}
    assert fresh == {replicas[1].id, replicas[2].id}
    router.fleet.add(replicas[0].url)
    assert router.replicas()[leaving]["state"] == "accepting"


def test_a_drain_ends(make_router: MakeRouter, replicas: list[FakeReplica]) -> None:
    router = make_router(*replicas, options=("--drain-s", "0.5"))
    router.fleet.drain(replicas[0].id)
    router.wait_state(replicas[0].id, "out")
    assert replicas[0].id not in router.used()


def test_a_name_of_several_workers_is_the_same_for_all(
    make_router: MakeRouter, replicas: list[FakeReplica]
) -> None:
    """A drain has reached every worker when the command returns."""
    router = make_router(*replicas, options=("--workers", "3", "--drain-s", "1000"))
    router.fleet.drain(replicas[0].id)
    assert replicas[0].id not in router.used()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("drain", "x"), "no replica 'x'"),
        (("rm", "x"), "no replica 'x'"),
        (("add", "x"), "http://host:port"),
    ],
)
def test_what_cannot_be_done_says_why(
    router: RouterUnderTest, arguments: tuple[str, ...], text: str
) -> None:
    done = run_cli("fleet", *arguments, "--admin", router.admin)
    assert done.returncode == 1
    assert text in done.stderr


def test_no_router_there() -> None:
    done = run_cli("fleet", "ls", "--admin", "127.0.0.1:1")
    assert done.returncode == 1
    assert "no router answers at 127.0.0.1:1" in done.stderr


def test_a_restarted_engine_has_lost_its_cache(
    make_router: MakeRouter, replicas: list[FakeReplica]
) -> None:
    """Another start time in its metrics: what was predicted to be cached there is forgotten."""
    for replica in replicas:
        replica.metrics = "process_start_time_seconds 1.0\n"
    router = make_router(*replicas, options=("--policy", "cache_aware"))
    text, session = "word " * 4_000, {"X-Session-ID": "s"}
    home = router.chat(text, session).replica

    def predicted() -> int:
        body = {"messages": [{"role": "user", "content": text}]}
        decision = router.ask("/route", {"model": "m", **body}, session).json
        return int(decision["predicted_hit_tokens"])

    assert predicted() > 0
    restarted = next(replica for replica in replicas if replica.id == home)
    restarted.metrics = "process_start_time_seconds 2.0\n"
    until(lambda: predicted() == 0)


def test_silent_replicas_do_not_delay_the_others(
    make_router: MakeRouter, replicas: list[FakeReplica]
) -> None:
    replicas[0].behave = silent
    replicas[1].behave = replicas[2].behave = answer()
    router = make_router(*replicas[1:])
    assert router.chat().status == 200
