"""Three hosts on a network of their own: links that are slow, lossy, cut, and listened to."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import Daemon, check_bytes, keys_of, store, until, wait_connected
from hosts.conftest import Host, patient, wait_listed, wait_member
from hosts.network import Network
from redis_server import RedisServer, redis_program

from vllm_kvpool.host_keys import make_keys
from vllm_kvpool.types import KEY_BYTES, BlockKeys, num_refs, unpack_refs

COUNT = 200
PORT = 7707
MakeHosts = Callable[..., list[Host]]


class RemoteRedis(RedisServer):
    """On one of the hosts."""

    def __init__(self, folder: Path, network: Network, host: int) -> None:
        super().__init__(folder, "--protected-mode", "no", host=network.addresses[host])
        self.inside = network.inside(host)

    def command(self) -> list[str]:
        return [*self.inside, *super().command()]


@pytest.fixture
def network() -> Iterator[Network]:
    made = Network(3)
    yield made
    made.close()


@pytest.fixture
def make_hosts(network: Network, shm_dir: Path, tmp_path: Path) -> Iterator[MakeHosts]:
    redis_program()
    redis = RemoteRedis(tmp_path, network, 2).start()
    hosts: list[Host] = []

    def make(*, secure: bool = False) -> list[Host]:
        for i, address in enumerate(network.addresses):
            folder = shm_dir / f"host{i}"
            folder.mkdir()
            access = ["--keys", str(_keys(tmp_path, i))] if secure else ["--insecure"]
            listen = f"tcp://{address}:{PORT}"
            daemon = Daemon(
                folder, "--listen", listen, "--directory", redis.url, *access, size="64MiB"
            )
            daemon.command = [*network.inside(i), *daemon.command]
            hosts.append(Host(patient(daemon).start(), PORT, redis))
            wait_member(hosts[-1], redis)
        return hosts

    yield make
    for host in hosts:
        host.close()
    redis.kill()


def _keys(folder: Path, host: int) -> Path:
    """Each host knows all others."""
    for i in range(3):
        if not (folder / f"keys{i}").exists():
            make_keys(folder / f"keys{i}", f"h{i}")
    for i, j in itertools.permutations(range(3), 2):
        public = folder / f"keys{j}" / f"h{j}.key"
        (folder / f"keys{i}" / public.name).write_bytes(public.read_bytes())
    return folder / f"keys{host}"


def share(host: Host, seed: str = "chain") -> BlockKeys:
    keys = keys_of(seed, COUNT)
    store(host.client, keys)
    wait_listed(host, keys)
    return keys


def check_pulled(host: Host, keys: BlockKeys) -> None:
    until(lambda: host.pull(keys).blocks == COUNT, "all blocks", timeout_s=60)
    check_bytes(host.client, keys, host.client.match_prefix(keys))


def test_partition_between_two_of_three(make_hosts: MakeHosts, network: Network) -> None:
    a, b, c = make_hosts()
    keys = share(a)
    network.cut(0, 1)
    network.cut(1, 0)
    pulled = b.pull(keys, within_ms=1_000)
    assert pulled.blocks == 0
    assert c.pull(keys).blocks == COUNT  # to the others nothing has happened
    wait_listed(c, keys)
    check_pulled(b, keys)  # from c, by now
    assert c.counter("sent_blocks") == COUNT
    network.heal(0)
    network.heal(1)
    check_pulled(b, share(a, "later"))


def test_cut_off_from_the_directory(make_hosts: MakeHosts, network: Network) -> None:
    a, b, _ = make_hosts()
    keys = share(a)
    assert b.client.pulls
    network.cut(1, 2)
    assert b.pull(keys, within_ms=2_000).blocks == 0
    store(b.client, keys_of("own", 10))  # the host itself goes on
    network.heal(1)
    check_pulled(b, keys)


def test_one_percent_of_packets_lost(make_hosts: MakeHosts, network: Network) -> None:
    a, b, _ = make_hosts()
    keys = share(a)
    for host in range(3):
        network.lose(host, 1)
    check_pulled(b, keys)
    wait_connected(b.client)


def test_a_slow_link(make_hosts: MakeHosts, network: Network) -> None:
    """80 Mbit/s: 12.5 MiB take over a second. What there is no time for is not even tried."""
    a, b, _ = make_hosts()
    keys = share(a)
    network.limit(0, "80mbit")
    first = BlockKeys(keys[: 20 * KEY_BYTES])
    until(lambda: b.pull(first, 3_000).blocks == 20, "a first pull")
    pulled = b.pull(keys, within_ms=400)
    assert 20 <= pulled.blocks < COUNT
    refs = b.client.match_prefix(keys)
    check_bytes(b.client, keys, refs)
    assert num_refs(refs) >= pulled.blocks


@pytest.mark.parametrize("secure", [True, False])
def test_what_can_be_heard_on_the_link(
    make_hosts: MakeHosts, network: Network, tmp_path: Path, secure: bool
) -> None:
    """With keys: no byte of a block. Without, they are there: this test can fail."""
    a, b, _ = make_hosts(secure=secure)
    keys = keys_of("chain", COUNT)
    refs = store(a.client, keys)
    secret = b"nobody shall read this" * 100
    for ref in unpack_refs(refs):
        a.client.view.payload(ref)[KEY_BYTES : KEY_BYTES + len(secret)] = secret
    wait_listed(a, keys)
    heard = tmp_path / "heard"
    listener = network.capture(0, heard)
    try:
        assert b.pull(keys).blocks == COUNT
        until(lambda: heard.stat().st_size > COUNT * 50_000, "the capture")
    finally:
        listener.kill()
        listener.wait()
        listener.stdout.close()
    found = b.client.view.payload(unpack_refs(b.client.match_prefix(keys))[0])
    assert bytes(found[KEY_BYTES : KEY_BYTES + len(secret)]) == secret
    assert (secret[:22] in heard.read_bytes()) == (not secure)
