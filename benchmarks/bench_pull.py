"""How fast do blocks come from another host, beside plain TCP over the same way?

    python -m benchmarks.bench_pull [--keys] [--rate 10gbit] [--json FILE]

Two daemons in network namespaces of their own (root needed; `--rate` shapes the link with tc tbf), or
both in this one with `--loopback`. Three questions, in the same run:

  throughput   1 GiB of blocks by one pull over four connections, beside four TCP streams
  prefix       128 MiB (1,024 tokens of an 8B model, blocks of 2 MiB) from the question to READY
  directory    who holds a chain of 2,048 blocks? as the daemon asks it
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.bench_pool import wait_for
from benchmarks.processes import ChildProcess, PoolDaemon, free_port
from benchmarks.report import percentile, write_json
from vllm_kvpool.client import PoolClient
from vllm_kvpool.host_keys import make_keys
from vllm_kvpool.pool.anchors import anchors, asked
from vllm_kvpool.pool.directory import Directory, HostRecord
from vllm_kvpool.protocol import Namespace
from vllm_kvpool.types import KEY_BYTES, BlockKeys, num_refs, unpack_refs

SLOT_BYTES = 2 << 20
PREFIX_BLOCKS = 64
BULK_BLOCKS = 512
STREAMS = 4
REPEAT = 7
LOOKUP_BLOCKS = 2_048
LOOKUPS = 200
CHUNK_BYTES = 1 << 20


class Network:
    """Names and addresses of two hosts; a link between namespaces, or the loopback."""

    def __init__(self, loopback: bool, rate: str) -> None:
        self.addresses = ["127.0.0.1", "127.0.0.1"]
        self.prefixes: list[list[str]] = [[], []]
        self._names: list[str] = []
        if not loopback:
            self._make(rate)

    def _make(self, rate: str) -> None:
        self._names = [f"kvpool-bench-{os.getpid()}-{i}" for i in range(2)]
        for name in self._names:
            _run("ip", "netns", "add", name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
        ends = ["kvp0", "kvp1"]
        _run(
            "ip", "link", "add", ends[0], "netns", self._names[0],
            "type", "veth", "peer", "name", ends[1], "netns", self._names[1],
        )  # fmt: skip
        for i, (name, end) in enumerate(zip(self._names, ends, strict=True)):
            self.addresses[i] = f"10.213.77.{i + 1}"
            _run("ip", "-n", name, "addr", "add", f"{self.addresses[i]}/24", "dev", end)
            _run("ip", "-n", name, "link", "set", end, "up", "mtu", "9000")
            if rate:
                _run(
                    "tc", "-n", name, "qdisc", "add", "dev", end, "root",
                    "tbf", "rate", rate, "burst", "2mb", "latency", "50ms",
                )  # fmt: skip
            self.prefixes[i] = ["ip", "netns", "exec", name]

    def close(self) -> None:
        for name in self._names:
            _run("ip", "netns", "del", name)


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


# plain TCP ----------------------------------------------------------------------------------------

TCP_SERVER = """
import socket, sys, threading
data = bytearray({chunk})
def serve(stream):
    with stream:
        while ask := stream.recv(8):
            left = int.from_bytes(ask, "little")
            while left > 0:
                left -= stream.send(memoryview(data)[:left])
listener = socket.create_server((sys.argv[1], int(sys.argv[2])))
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""
TCP_CLIENT = """
import socket, sys, threading, time
host, port, streams, nbytes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
def take(stream, nbytes, buffer):
    stream.sendall(nbytes.to_bytes(8, "little"))
    while nbytes:
        nbytes -= stream.recv_into(buffer)
open_streams = [socket.create_connection((host, port)) for _ in range(streams)]
buffers = [bytearray({chunk}) for _ in open_streams]
for _ in range(int(sys.argv[5])):
    begun = time.perf_counter()
    threads = [threading.Thread(target=take, args=(s, nbytes // streams, b))
               for s, b in zip(open_streams, buffers)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    print(time.perf_counter() - begun)
"""


def time_tcp(network: Network, folder: Path, nbytes: int) -> list[float]:
    port = str(free_port())
    server = TCP_SERVER.format(chunk=CHUNK_BYTES)
    command = [*network.prefixes[0], sys.executable, "-c", server, network.addresses[0], port]
    with ChildProcess(command, folder / "tcp.log"):
        client = TCP_CLIENT.format(chunk=CHUNK_BYTES)
        arguments = [network.addresses[0], port, str(STREAMS), str(nbytes), str(REPEAT)]
        time.sleep(0.5)
        done = subprocess.run(
            [*network.prefixes[1], sys.executable, "-c", client, *arguments],
            capture_output=True, text=True, check=True, timeout=300,
        )  # fmt: skip
    return [float(line) for line in done.stdout.split()]


# pulls --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def two_hosts(
    network: Network, folder: Path, redis_url: str, secure: bool
) -> Iterator[list[PoolClient]]:
    """Connected clients of two daemons."""
    with contextlib.ExitStack() as stack:
        clients = []
        for i in range(2):
            shm_dir = folder / f"host{i}"
            shm_dir.mkdir()
            options = {"directory": redis_url, "min_block": str(SLOT_BYTES)}
            options["listen"] = f"tcp://{network.addresses[i]}:{free_port()}"
            if secure:
                options["keys"] = str(_keys(folder, i))
            size = str((BULK_BLOCKS + 2 * PREFIX_BLOCKS) * SLOT_BYTES * 5 // 4)
            daemon = PoolDaemon(
                folder / f"daemon{i}.log", name="bench", size=size, shm_dir=str(shm_dir), **options
            )
            if not secure:
                daemon.command.append("--insecure")
            daemon.command = [*network.prefixes[i], *daemon.command]
            stack.enter_context(daemon)
            namespace = Namespace(digest=bytes(32), slot_bytes=SLOT_BYTES, fields={})
            clients.append(PoolClient(daemon.folder, namespace, timeout_ms=10_000))
            stack.callback(clients[-1].close)
            wait_for(lambda client=clients[-1]: (client.poll(), client.connected)[1])  # type: ignore[misc]
            wait_for(lambda client=clients[-1]: _populated(client))  # type: ignore[misc]
        yield clients


def _populated(client: PoolClient) -> bool:
    """Whether there is room for everything; the daemon makes it in the background."""
    from vllm_kvpool.channel import call_daemon
    from vllm_kvpool.paths import PoolPaths
    from vllm_kvpool.protocol import Stats, StatsReply

    reply = call_daemon(PoolPaths(client.pool_path.parent), Stats())
    assert isinstance(reply, StatsReply)
    return reply.pool["populated_slabs"] == reply.pool["num_slabs"]


def _keys(folder: Path, host: int) -> Path:
    for i in range(2):
        if not (folder / f"keys{i}" / f"h{i}.key").exists():
            make_keys(folder / f"keys{i}", f"h{i}")
    other = folder / f"keys{1 - host}" / f"h{1 - host}.key"
    shutil.copy(other, folder / f"keys{host}")
    return folder / f"keys{host}"


def store(client: PoolClient, keys: BlockKeys) -> None:
    request_id = client.prepare_store(keys)
    grants = []
    wait_for(lambda: (grants.extend(client.poll()), grants)[1] != [])
    refs = grants[0].refs
    assert refs is not None
    assert client.view is not None
    for ref in unpack_refs(refs):
        assert ref, "no room"
        client.view.payload(ref)[:] = os.urandom(KEY_BYTES) * (SLOT_BYTES // KEY_BYTES)
    assert request_id is not None
    client.complete_store(request_id)
    wait_for(lambda: (client.poll(), not client.writing)[1])


def time_pull(client: PoolClient, keys: BlockKeys) -> float:
    """From the question to READY, as an engine sees it."""
    begun = time.perf_counter()
    assert client.pull(keys, b"", 60_000) is not None
    answers: list[Any] = []
    while not answers:
        client.channel.socket.poll(10)
        client.poll()
        answers = client.take_pulled()
    elapsed = time.perf_counter() - begun
    assert answers[0].blocks == num_refs(client.match_prefix(keys)) == len(keys) // KEY_BYTES, (
        answers
    )
    return elapsed


def drop(client: PoolClient, keys: BlockKeys) -> None:
    client.drop(client.match_prefix(keys))
    wait_for(lambda: num_refs(client.match_prefix(keys)) == 0)


def time_pulls(clients: list[PoolClient], blocks: int) -> list[float]:
    a, b = clients
    keys = BlockKeys(os.urandom(blocks * KEY_BYTES))
    store(a, keys)
    time.sleep(1.5)  # until the directory has it
    time_pull(b, keys)  # connections are made
    times = []
    for _ in range(REPEAT):
        drop(b, keys)
        times.append(time_pull(b, keys))
    drop(a, keys)
    drop(b, keys)
    return times


# directory ----------------------------------------------------------------------------------------


def time_lookups(redis_url: str, grain: int) -> dict[str, float]:
    """On the machine's own loopback: what Redis and redis-py take."""
    me = HostRecord(os.urandom(16), "tcp://127.0.0.1:1")
    counters: Counter[str] = Counter()
    directory = Directory(redis_url, "lookups", os.urandom(16).hex(), None, Counter())
    other = Directory(redis_url, "lookups", me.id.hex(), me, counters)
    times = []
    for one in (directory, other):
        one.start()
        wait_for(lambda one=one: one.available)  # type: ignore[misc]
    for ticket in range(LOOKUPS):
        keys = os.urandom(LOOKUP_BLOCKS * KEY_BYTES)
        listed = anchors(keys, grain)
        questions = asked(keys, grain)
        if ticket % 2:
            written = counters["directory_writes"] + len(listed)
            other.announce([key for _, key in listed], True)
            wait_for(lambda written=written: counters["directory_writes"] >= written)  # type: ignore[misc]
        begun = time.perf_counter()
        directory.ask(ticket, questions)
        while not (answers := directory.take_answers()):
            _wait_readable(directory.wake_fd)
        times.append((time.perf_counter() - begun) * 1e3)
        assert bool(answers[0].hosts) == bool(ticket % 2), "half of them are found"
    directory.stop()
    other.stop()
    return {"p50_ms": percentile(times, 0.5), "p99_ms": percentile(times, 0.99)}


def _wait_readable(fd: int) -> None:
    import select

    select.select([fd], [], [], 1)


@contextlib.contextmanager
def redis_server(network: Network, folder: Path) -> Iterator[str]:
    """On the first host."""
    port = free_port()
    program = shutil.which("redis-server") or sys.exit("there is no redis-server")
    command = [*network.prefixes[0], program, "--port", str(port), "--save", ""]
    command += ["--bind", network.addresses[0], "--protected-mode", "no", "--dir", str(folder)]
    with ChildProcess(command, folder / "redis.log"):
        time.sleep(0.5)
        yield f"redis://{network.addresses[0]}:{port}"


def run_between_hosts(
    text: str | None, measure: Callable[[Network, Path, bool], dict[str, Any]]
) -> None:
    """The main of a script with the docstring `text`. `measure` is given a folder on tmpfs, and whether to use keys."""
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("--keys", action="store_true", help="CURVE")
    parser.add_argument("--loopback", action="store_true", help="no namespaces, no root")
    parser.add_argument("--rate", default="", help="of the link, for tc tbf, as in 10gbit")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kvpool-bench-", dir="/dev/shm"))
    network = Network(options.loopback, options.rate)
    results: dict[str, Any] = {"rate": options.rate, "curve": options.keys}
    try:
        results |= measure(network, folder, options.keys)
    finally:
        network.close()
        shutil.rmtree(folder)
    if options.json:
        write_json(options.json, results)


def measure(network: Network, folder: Path, secure: bool) -> dict[str, Any]:
    results = {}
    with redis_server(network, folder) as url, two_hosts(network, folder, url, secure) as clients:
        for name, blocks in (("throughput", BULK_BLOCKS), ("prefix", PREFIX_BLOCKS)):
            nbytes = blocks * SLOT_BYTES
            tcp = time_tcp(network, folder, nbytes)
            results[name] = compare(name, nbytes, tcp, time_pulls(clients, blocks))
    local = Network(loopback=True, rate="")
    with redis_server(local, folder) as url:
        for grain in (8, 1):
            results[f"directory_grain_{grain}"] = found = time_lookups(url, grain)
            print(f"directory, one entry for {grain} blocks: {found}")
    return results


def compare(name: str, nbytes: int, tcp: list[float], pulls: list[float]) -> dict[str, float]:
    raw_s, pull_s = statistics.median(tcp), statistics.median(pulls)
    found = {
        "tcp_ms": raw_s * 1e3, "pull_ms": pull_s * 1e3, "pull_best_ms": min(pulls) * 1e3,
        "tcp_gb_s": nbytes / raw_s / 1e9, "pull_gb_s": nbytes / pull_s / 1e9,
        "share": raw_s / pull_s,
    }  # fmt: skip
    print(name, {key: round(value, 3) for key, value in found.items()})
    return found


if __name__ == "__main__":
    run_between_hosts(__doc__, measure)
