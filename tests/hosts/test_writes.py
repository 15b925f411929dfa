"""Writes that other hosts begin and do not go on with, by an implementation of its own as docs/protocol.md says."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import msgpack
import pytest
import zmq
from helpers import PATIENT_MS, SLOT_BYTES, keys_of, namespace_of, until
from hosts.conftest import Host, MakeHost, make_upstream, patient

from vllm_kvpool._native import crc32c
from vllm_kvpool.types import KEY_BYTES, BlockKeys, num_refs

SPACE = namespace_of("a")
BLOCK = b"x" * SLOT_BYTES
SUM = crc32c(BLOCK).to_bytes(4, "little")


IDLE_S = 8.0


@pytest.fixture
def upstream(make: MakeHost) -> Host:
    idle_ms = int(IDLE_S * 1_000)
    return make_upstream(make, tune=lambda daemon: patient(daemon).tuned(inbox__IDLE_MS=idle_ms))


class Writer:
    """One connection."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self._answers: dict[int, dict[str, Any]] = {}
        """By the request's number: one may come while another is waited for."""
        now_ms = time.monotonic_ns() // 1_000_000
        welcome = self.call(type="hello", id=1, version=1, now_ms=now_ms, pid=1)
        assert welcome["writes"]

    def send(self, *frames: bytes, **message: Any) -> None:
        self._socket.send_multipart([msgpack.packb(message), *frames])

    def call(self, **message: Any) -> dict[str, Any]:
        self.send(**message)
        return self.receive(message["id"])

    def receive(self, number: int) -> dict[str, Any]:
        while number not in self._answers:
            self._take()
        return self._answers.pop(number)

    def answered(self, number: int) -> bool:
        while self._socket.poll(0):
            self._take()
        return number in self._answers

    def _take(self) -> None:
        reply: dict[str, Any] = msgpack.unpackb(self._socket.recv())
        self._answers[reply["id"]] = reply

    def begin(self, write_id: int, keys: BlockKeys) -> None:
        fields = {"digest": SPACE.digest, "slot_bytes": SLOT_BYTES, "fields": SPACE.fields}
        wanted = self.call(type="write_blocks", id=write_id, namespace=fields, keys=keys)
        assert wanted["places"] == b"\1" * (len(keys) // KEY_BYTES), wanted

    def send_block(self, write_id: int, place: int, *, last: bool = False) -> None:
        self.send(BLOCK, type="blocks", id=write_id, first=place, sums=SUM, last=last)


@pytest.fixture
def writer(upstream: Host) -> Iterator[Writer]:
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.rcvtimeo = PATIENT_MS
        dealer.connect(f"tcp://127.0.0.1:{upstream.port}")
        yield Writer(dealer)


def test_a_write_that_is_not_gone_on_with_ends(upstream: Host, writer: Writer) -> None:
    """Though others of its connection are written all the time. What has arrived whole stays."""
    idle = keys_of("idle", 5)
    writer.begin(1_000, idle)
    writer.send_block(1_000, 0)
    for number in range(2_000, 2_200):
        if writer.answered(1_000):
            break
        writer.begin(number, keys_of(f"busy {number}", 1))
        writer.send_block(number, 0, last=True)
        assert writer.receive(number) == {"type": "written", "id": number, "blocks": 1}
        time.sleep(0.1)
    ended = {"type": "written", "id": 1_000, "blocks": 1, "reason": "deadline"}
    assert writer.receive(1_000) == ended
    until(lambda: upstream.counter("writing") == 0, "its slots to be free")
    assert num_refs(upstream.client.match_prefix(idle)) == 1


def test_a_write_that_waits_behind_another_does_not_end(upstream: Host, writer: Writer) -> None:
    """A slow link: bytes come in the order of asking."""
    slow, behind = keys_of("slow", 8), keys_of("behind", 1)
    writer.begin(2, slow)
    writer.begin(3, behind)
    for place in range(8):
        writer.send_block(2, place, last=place == 7)
        time.sleep(1.25 * IDLE_S / 8)
    assert writer.receive(2) == {"type": "written", "id": 2, "blocks": 8}
    writer.send_block(3, 0, last=True)
    assert writer.receive(3) == {"type": "written", "id": 3, "blocks": 1}
    assert upstream.counter("write_deadline") == 0
