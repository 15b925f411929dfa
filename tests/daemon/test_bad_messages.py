"""Malformed, oversized and unknown messages: an error reply and a counter; the connection goes
on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgpack
import pytest
import zmq
from helpers import PATIENT_MS, Daemon, keys_of, until

from vllm_kvpool.client import PoolClient
from vllm_kvpool.protocol import MAX_KEYS, MAX_MESSAGE_BYTES

HELLO = msgpack.packb({"type": "hello", "id": 1, "version": 1, "now_ms": 0, "pid": 1})


@pytest.fixture
def socket(daemon: Daemon) -> Iterator[zmq.Socket[bytes]]:
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.rcvtimeo = PATIENT_MS
        dealer.connect(daemon.paths.endpoint)
        yield dealer


def reply_to(socket: zmq.Socket[bytes], payload: bytes) -> dict[str, Any]:
    socket.send(payload)
    reply: dict[str, Any] = msgpack.unpackb(socket.recv())
    return reply


def say_hello(socket: zmq.Socket[bytes]) -> dict[str, Any]:
    return reply_to(socket, HELLO)


@pytest.mark.parametrize(
    ("payload", "request_id"),
    [
        (b"", 0),
        (b"\xc1", 0),
        (b"GET / HTTP/1.1\r\n", 0),
        (msgpack.packb([1, 2, 3]), 0),
        (msgpack.packb({"id": 7}), 7),
        (msgpack.packb({"type": "make_coffee", "id": 8}), 8),
        (msgpack.packb({"type": "prepare_store", "id": 9}), 9),
        (msgpack.packb({"type": "prepare_store", "id": 10, "keys": "text"}), 10),
        (msgpack.packb({"type": "hello", "id": "one"}), 0),
        (msgpack.packb({"type": "touch", "id": 11, "refs": b""})[:-2], 0),
        (b"\x82\xa4type\xa5stats\xa2id" + b"\x91" * 6_000 + b"\xc0", 0),
        (b"\x83\xa4type\xa5bogus\xa1x" + b"\x91" * 6_000 + b"\xc0\xa2id\x07", 0),
        (b"\x83\xa4type\xa5stats\xa1x" + b"\x91" * 6_000 + b"\xc0\xa2id\x07", 0),
        (b"\x82\xa4type\xa1\xff\xa2id\x0c", 12),
        (b"\x81\xa4typ\xff\xa5hello", 0),
        (b"\x82\xa2id\x0c\xa4type\xa2\xff\xfe", 12),
    ],
)
def test_malformed(
    daemon: Daemon, socket: zmq.Socket[bytes], payload: bytes, request_id: int
) -> None:
    error = reply_to(socket, payload)
    assert (error["type"], error["code"]) == ("error", "malformed")
    assert error.get("id", 0) == request_id
    assert daemon.counter("error_malformed") == 1
    assert say_hello(socket)["type"] == "welcome"


def test_several_frames(socket: zmq.Socket[bytes]) -> None:
    socket.send_multipart([b"", msgpack.packb({"type": "stats", "id": 1})])
    assert msgpack.unpackb(socket.recv())["code"] == "malformed"


def test_before_hello(socket: zmq.Socket[bytes]) -> None:
    error = reply_to(socket, msgpack.packb({"type": "stats", "id": 3}))
    assert (error["id"], error["code"]) == (3, "hello")


def test_admin_cannot_store(socket: zmq.Socket[bytes]) -> None:
    assert "client" not in say_hello(socket)
    prepare = {"type": "prepare_store", "id": 3, "keys": keys_of("x", 1)}
    assert reply_to(socket, msgpack.packb(prepare))["code"] == "hello"


def test_oversized_message(daemon: Daemon, socket: zmq.Socket[bytes]) -> None:
    error = reply_to(socket, bytes(MAX_MESSAGE_BYTES + 1))
    assert error["code"] == "too_large"
    assert daemon.counter("error_too_large") == 1
    assert say_hello(socket)["type"] == "welcome"


def test_gigantic_message_ends_only_its_own_connection(
    daemon: Daemon, socket: zmq.Socket[bytes], client: PoolClient
) -> None:
    socket.send(bytes(5 * MAX_MESSAGE_BYTES))
    until(daemon.stats, "an answer")
    assert client.prepare_store(keys_of("x", 1)) is not None
    # Over a new connection, made by ZeroMQ. What was sent while the old one ended may be lost with it.
    until(lambda: (socket.send(HELLO), socket.poll(1_000))[1], "an answer")
    assert msgpack.unpackb(socket.recv())["type"] == "welcome"


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"keys": b"x" * 33}, "malformed"),
        ({"keys": b"x" * 32, "parent": b"y"}, "malformed"),
        ({"keys": b"x" * 32, "ttl_s": -1}, "malformed"),
        ({"keys": b"x" * 32, "ttl_s": 1 << 40}, "malformed"),
        ({"keys": bytes(32 * (MAX_KEYS + 1))}, "too_large"),
    ],
)
def test_bad_store(client: PoolClient, fields: dict[str, Any], code: str) -> None:
    """Sent over the connection of a real client, past the checks that it makes itself."""
    channel = client._channel._socket
    channel.send(msgpack.packb({"type": "prepare_store", "id": 999, **fields}))
    assert channel.poll(PATIENT_MS)
    error = msgpack.unpackb(channel.recv())
    assert (error["id"], error["code"]) == (999, code)
