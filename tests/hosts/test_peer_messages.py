"""What strangers may send to the door for other hosts: an error for an answer, and it goes on."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import msgpack
import pytest
import zmq
from helpers import PATIENT_MS, keys_of, namespace_of, store, until
from hosts.conftest import Host
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_kvpool import protocol
from vllm_kvpool.pool.outbox import MAX_READS
from vllm_kvpool.pool.peer_door import PeerDoor
from vllm_kvpool.pool.requests import RefusedError
from vllm_kvpool.protocol import MAX_KEYS, MAX_MESSAGE_BYTES

DIGEST = namespace_of("a").digest
KEYS = keys_of("chain", 20)


@pytest.fixture
def host(make_host: Callable[..., Host]) -> Host:
    made = make_host()
    store(made.client, KEYS)
    return made


@pytest.fixture
def socket(host: Host) -> Iterator[zmq.Socket[bytes]]:
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.rcvtimeo = PATIENT_MS
        dealer.connect(f"tcp://127.0.0.1:{host.port}")
        yield dealer


def call(socket: zmq.Socket[bytes], **message: Any) -> dict[str, Any]:
    return answer(socket, msgpack.packb(message))


def answer(socket: zmq.Socket[bytes], payload: bytes) -> dict[str, Any]:
    socket.send(payload)
    reply: dict[str, Any] = msgpack.unpackb(socket.recv_multipart()[0])
    return reply


def hello(socket: zmq.Socket[bytes]) -> None:
    now_ms = time.monotonic_ns() // 1_000_000
    assert call(socket, type="hello", id=1, version=1, now_ms=now_ms, pid=1)["type"] == "welcome"


def test_match_and_read(socket: zmq.Socket[bytes]) -> None:
    """By an implementation of their own, as docs/protocol.md says."""
    hello(socket)
    longer = KEYS + keys_of("other", 3)
    matched = call(socket, type="match_blocks", id=2, namespace=DIGEST, keys=longer)
    assert matched == {"type": "matched", "id": 2, "blocks": 20, "slot_bytes": 64 << 10}
    socket.send(
        msgpack.packb({"type": "read_blocks", "id": 3, "namespace": DIGEST, "keys": longer})
    )
    blocks = []
    while True:
        head, *frames = socket.recv_multipart()
        header = msgpack.unpackb(head)
        assert header.get("first", 0) == len(blocks)
        assert len(header["sums"]) == 4 * len(frames)
        blocks += frames
        if header.get("last"):
            break
    assert b"".join(block[:32] for block in blocks) == KEYS


def test_nothing_to_read(socket: zmq.Socket[bytes]) -> None:
    hello(socket)
    blocks = call(socket, type="read_blocks", id=2, namespace=DIGEST, keys=keys_of("other", 3))
    assert blocks == {"type": "blocks", "id": 2, "last": True}
    matched = call(socket, type="match_blocks", id=3, namespace=bytes(32), keys=KEYS)
    assert matched == {"type": "matched", "id": 3}


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ({"type": "read_blocks", "namespace": DIGEST, "keys": b"odd"}, "malformed"),
        ({"type": "read_blocks", "namespace": b"short", "keys": KEYS}, "malformed"),
        ({"type": "read_blocks", "namespace": bytes(32), "keys": KEYS}, "namespace"),
        ({"type": "match_blocks", "namespace": DIGEST}, "malformed"),
        (
            {"type": "match_blocks", "namespace": DIGEST, "keys": bytes(32 * (MAX_KEYS + 1))},
            "too_large",
        ),
        ({"type": "match_blocks", "namespace": DIGEST, "keys": KEYS, "deadline_ms": 1}, "deadline"),
        ({"type": "prepare_store", "keys": KEYS}, "malformed"),
        ({"type": "clear"}, "malformed"),
        ({"type": "stats"}, "malformed"),
    ],
)
def test_refused(socket: zmq.Socket[bytes], message: dict[str, Any], code: str) -> None:
    """Other hosts can read, and nothing else."""
    hello(socket)
    error = call(socket, id=7, **message)
    assert (error["type"], error["id"], error["code"]) == ("error", 7, code)


def test_before_hello(socket: zmq.Socket[bytes]) -> None:
    error = call(socket, type="match_blocks", id=2, namespace=DIGEST, keys=KEYS)
    assert error["code"] == "hello"


def test_too_large(socket: zmq.Socket[bytes]) -> None:
    hello(socket)
    assert answer(socket, bytes(MAX_MESSAGE_BYTES + 1))["code"] == "too_large"


def test_too_much_at_once(host: Host, socket: zmq.Socket[bytes]) -> None:
    hello(socket)
    read = msgpack.packb({"type": "read_blocks", "id": 5, "namespace": DIGEST, "keys": KEYS})
    for _ in range(10 * MAX_READS):
        socket.send(read)
    ends: Counter[str] = Counter()

    def all_ended() -> bool:
        """What there is no room for in the queue to us is counted, and lost."""
        while socket.poll(0):
            header = msgpack.unpackb(socket.recv_multipart()[0])
            ends[header["type"]] += header["type"] == "error" or header.get("last", False)
        return ends.total() + host.counter("replies_lost") == 10 * MAX_READS

    until(all_ended, "the end of all reads")
    assert ends["blocks"] >= MAX_READS
    assert host.counter("error_busy") > 0
    assert call(socket, type="match_blocks", id=6, namespace=DIGEST, keys=KEYS)["blocks"] == 20
    until(lambda: host.leases == 0, "the leases to go")


def test_noise(host: Host, socket: zmq.Socket[bytes]) -> None:
    hello(socket)
    draw = random.Random(5)
    for _ in range(300):
        reply = answer(socket, draw.randbytes(draw.randrange(200)))
        assert (reply["type"], reply["code"]) == ("error", "malformed")
    assert host.counter("exchange_errors") == 0


class _Nowhere:
    """No pool: only what happens before one is asked."""

    def get(self, digest: bytes, now_ms: int) -> None:
        return None

    def open(self, namespace: protocol.Namespace, now_ms: int) -> None:
        raise RefusedError("busy", "there is no pool")


VALID = [
    protocol.encode(protocol.Hello(id=1, version=1, now_ms=5, pid=7)),
    protocol.encode(protocol.MatchBlocks(id=2, namespace=DIGEST, keys=KEYS)),
    protocol.encode(protocol.ReadBlocks(id=3, namespace=DIGEST, keys=KEYS)),
    protocol.encode(protocol.WriteBlocks(id=4, namespace=namespace_of("a"), keys=KEYS)),
]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A real message with some bytes changed, cut, or doubled."""
    message = bytearray(draw(st.sampled_from(VALID)))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(message) - 1))
        match draw(st.sampled_from(["change", "cut", "double", "insert"])):
            case "change":
                message[place] = draw(st.integers(0, 255))
            case "cut":
                del message[place : place + draw(st.integers(1, 8))]
            case "double":
                message[place:place] = message[place : place + 8]
            case _:
                message[place:place] = draw(st.binary(max_size=8))
        if not message:
            return b""
    return bytes(message)


@settings(max_examples=500, suppress_health_check=list(HealthCheck))
@given(st.one_of(damaged(), st.binary(max_size=300)))
def test_any_bytes_get_an_answer(payload: bytes) -> None:
    door = PeerDoor(None, _Nowhere(), "0" * 32, Counter())  # type: ignore[arg-type]
    door.handle(b"peer", VALID[0])
    reply = door.handle(b"peer", payload)
    assert reply is not None
    assert getattr(reply, "code", "") != "internal"


def read_message(read_id: int) -> bytes:
    message = {"type": "read_blocks", "id": read_id, "namespace": DIGEST, "keys": KEYS}
    return bytes(msgpack.packb(message))


def test_a_cancelled_read_ends_once(host: Host, socket: zmq.Socket[bytes]) -> None:
    """Each of many reads has one end, whether it was cancelled before, in the middle or too late."""
    hello(socket)
    reads = range(10, 40)
    for read_id in reads:
        socket.send(read_message(read_id))
    for read_id in [*reads[5:], 7_777]:
        socket.send(msgpack.packb({"type": "cancel_read", "id": read_id}))
    ends: Counter[int] = Counter()
    frames: Counter[int] = Counter()
    while len(ends) < len(reads):
        head, *blocks = socket.recv_multipart()
        header = msgpack.unpackb(head)
        frames[header["id"]] += len(blocks)
        ends[header["id"]] += header.get("last", False)
        ends = +ends
    assert set(ends.values()) == {1}
    assert [frames[read_id] for read_id in reads[:5]] == [len(KEYS) // 32] * 5
    for read_id in reads:
        socket.send(msgpack.packb({"type": "cancel_read", "id": read_id}))  # all have ended
    matched = call(socket, type="match_blocks", id=2, namespace=DIGEST, keys=KEYS)
    assert matched["blocks"] == 20, "nothing came for them"
    assert sum(frames.values()) + 20 * host.counter("reads_cancelled") >= 20 * len(reads)
