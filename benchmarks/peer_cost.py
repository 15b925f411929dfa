"""What connections to many other hosts cost the exchange's thread: one turn of its loop in which nothing has come.

As `pool.exchange.Exchange._wait` and `_turn` do it, with real `Peer` objects and one real socket at their other end.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Sequence

import zmq

from vllm_kvpool.pool.directory import HostRecord
from vllm_kvpool.pool.exchange import IO_THREADS, MAX_SOCKETS
from vllm_kvpool.pool.peer import Peer
from vllm_kvpool.protocol import POOL_ID_BYTES

TURNS = 100


def turn_s(counts: Sequence[int]) -> dict[int, float]:
    """Processor time of this thread, by the number of peers."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=IO_THREADS)
    context.set(zmq.MAX_SOCKETS, MAX_SOCKETS)
    door = context.socket(zmq.ROUTER)
    port = door.bind_to_random_port("tcp://127.0.0.1")
    peers: list[Peer] = []
    found = {}
    for count in sorted(counts):
        while len(peers) < count:
            record = HostRecord(os.urandom(POOL_ID_BYTES), f"tcp://127.0.0.1:{port}")
            peers.append(Peer(context, record, None))
        _turn(peers)  # says hello
        begun = time.thread_time()
        for _ in range(TURNS):
            _turn(peers)
        found[count] = (time.thread_time() - begun) / TURNS
    for peer in peers:
        peer.close()
    door.close(linger=0)
    context.term()
    return found


def _turn(peers: Sequence[Peer]) -> None:
    poller = zmq.Poller()
    for peer in peers:
        for socket in peer.sockets:
            poller.register(socket, zmq.POLLIN)
    poller.poll(0)
    for peer in peers:
        assert not list(peer.receive())
