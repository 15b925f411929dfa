"""A peer whose host has come back under another address, while a flight still holds it."""

from __future__ import annotations

import time

import zmq
from helpers import WAIT_S

from vllm_kvpool import protocol
from vllm_kvpool.pool.directory import HostRecord
from vllm_kvpool.pool.peer import Peer
from vllm_kvpool.protocol import POOL_ID_BYTES, PROTOCOL_VERSION, ReadBlocks, Welcome

WELCOME = Welcome(id=0, version=PROTOCOL_VERSION, pool_id="", epoch=1)


def greeted_peer(context: zmq.Context[zmq.Socket[bytes]], door: zmq.Socket[bytes]) -> Peer:
    port = door.bind_to_random_port("tcp://127.0.0.1")
    peer = Peer(context, HostRecord(bytes(POOL_ID_BYTES), f"tcp://127.0.0.1:{port}", b""), None)
    give_up = time.monotonic() + WAIT_S
    while not peer.num_greeted and time.monotonic() < give_up:
        list(peer.receive())
        if door.poll(10):
            identity, _ = door.recv_multipart()
            door.send_multipart([identity, protocol.encode(WELCOME)])
    assert peer.num_greeted
    return peer


def test_what_is_asked_or_cancelled_after_its_end_goes_nowhere() -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as door:
        door.linger = 0
        peer = greeted_peer(context, door)
        read = ReadBlocks(id=1, namespace=bytes(32), keys=bytes(32))
        peer.ask(read)
        peer.close()
        peer.cancel(read.id)
        peer.ask(read)
        peer.cancel(read.id)
