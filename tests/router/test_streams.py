"""Answers pass through as they come: byte by byte the same, at once, and no faster than the client
takes them."""

from __future__ import annotations

import asyncio
import fcntl
import json
import socket
import struct
import termios
from collections.abc import Callable

import pytest
from helpers import until
from router.conftest import CHAT, RouterUnderTest, chat_body, receive, receive_until
from router.fake_replica import (
    FakeReplica,
    Received,
    answer,
    chunk,
    event,
    head,
    raw,
    silent,
    stream,
)

MakeRouter = Callable[..., RouterUnderTest]
FULL_ROUNDS = 40
"""Answers of 48 KiB: more than the router and its kernel keep for a client."""


def post(router: RouterUnderTest, body: object, *lines: str, version: str = "1.1") -> socket.socket:
    data = json.dumps(body).encode()
    connection = router.connect()
    lines = (f"POST {CHAT} HTTP/{version}", "host: x", f"content-length: {len(data)}", *lines)
    connection.sendall("\r\n".join((*lines, "", "")).encode() + data)
    return connection


def test_each_chunk_is_passed_on_before_the_next(
    router: RouterUnderTest, replica: FakeReplica
) -> None:
    more = asyncio.Event()

    async def behave(request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(head(200, "transfer-encoding: chunked"))
        for number in range(3):
            writer.write(chunk(event({"number": number})))
            await more.wait()
            more.clear()
        writer.write(b"0\r\n\r\n")

    replica.behave = behave
    with post(router, chat_body(stream=True)) as connection:
        for number in range(3):
            receive_until(connection, event({"number": number}))
            replica._loop.call_soon_threadsafe(more.set)
        receive_until(connection, b"0\r\n\r\n")
    router.wait_idle()


def test_framing_and_trailers_are_not_touched(
    router: RouterUnderTest, replica: FakeReplica
) -> None:
    body = b"3;name=value\r\nabc\r\n" + b"1\r\nd\r\n" + b"0\r\nx-trailer: 1\r\n\r\n"
    replica.behave = raw(head(200, "transfer-encoding: chunked") + body)
    for _ in range(2):  # the connection to the replica can be used again
        with post(router, chat_body()) as connection:
            received = receive_until(connection, b"x-trailer: 1\r\n\r\n")
            assert received.endswith(b"\r\n\r\n" + body)
    assert len(replica.requests) == 2


def test_a_long_stream_is_whole(router: RouterUnderTest, replica: FakeReplica) -> None:
    replica.behave = stream(2_000)
    body = router.chat(stream=True).body
    numbers = [json.loads(line[6:]).get("number") for line in body.splitlines() if b"{" in line]
    assert numbers == [*range(2_000), None]


def test_a_large_answer_is_whole(router: RouterUnderTest, replica: FakeReplica) -> None:
    big = bytes(range(256)) * 65_536
    replica.behave = raw(head(200, f"content-length: {len(big)}") + big)
    assert router.chat().body == big


def test_http_1_0_gets_no_chunks(router: RouterUnderTest, replica: FakeReplica) -> None:
    replica.behave = stream(3)
    with post(router, chat_body(stream=True), version="1.0") as connection:
        top, _, body = receive(connection).partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in top.lower()
    assert b"connection: close" in top.lower()
    assert body.startswith(event({"number": 0}) + event({"number": 1}))
    assert body.endswith(b"data: [DONE]\n\n")


def test_a_body_that_ends_with_the_connection(
    router: RouterUnderTest, replica: FakeReplica
) -> None:
    replica.behave = raw(head(200) + b"all there is", close=True)
    with post(router, chat_body()) as connection:
        top, _, body = receive(connection).partition(b"\r\n\r\n")
    assert b"connection: close" in top.lower()
    assert body == b"all there is"


@pytest.mark.parametrize("status", [204, 304])
def test_answers_without_a_body(router: RouterUnderTest, replica: FakeReplica, status: int) -> None:
    replica.behave = raw(head(status))
    assert router.chat().status == status
    assert router.chat().status == status


def test_interim_answers_are_left_out(router: RouterUnderTest, replica: FakeReplica) -> None:
    replica.behave = raw(head(102) + head(103) + head(200, "content-length: 2") + b"ok")
    got = router.chat()
    assert (got.status, got.body) == (200, b"ok")


def test_an_engine_that_closes_after_each_answer(
    router: RouterUnderTest, replica: FakeReplica
) -> None:
    replica.behave = raw(head(200, "connection: close", "content-length: 2") + b"ok", close=True)
    assert [router.chat().body for _ in range(5)] == [b"ok"] * 5
    assert router.metric("retries_total") == 0
    assert router.state(replica.id) == "accepting"


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("behave", [silent, stream(10_000, 0.01)])
def test_a_client_that_leaves_ends_the_engines_work(
    router: RouterUnderTest, replica: FakeReplica, behave: object, reset: bool
) -> None:
    replica.behave = behave
    connection = post(router, chat_body(stream=True))
    until(lambda: replica.in_flight == 1)
    assert router.metric("in_flight_requests") == 1
    if reset:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    until(lambda: replica.gone == 1, "the engine to learn of it")
    router.wait_idle()
    assert router.metric("disconnects_total") == 1
    replica.behave = answer()
    assert router.chat().status == 200


def test_a_slow_client_holds_the_engine_back(router: RouterUnderTest, replica: FakeReplica) -> None:
    """What it does not take stays with the engine, but for some buffers; others go on."""
    written = 0

    async def behave(request: Received, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        size = 1 << 20
        writer.write(head(200, f"content-length: {64 * size}"))
        for _ in range(64):
            writer.write(bytes(size))
            await writer.drain()
            written += size

    replica.behave = behave
    with router.connect() as connection:
        data = json.dumps(chat_body()).encode()
        top = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n"
        connection.sendall(top.encode() + data)
        received = len(receive_until(connection, b"\r\n\r\n").partition(b"\r\n\r\n")[2])
        steady = -1
        while steady != written:
            steady = written
            assert router.ask("/health").status == 200
            replica._do(asyncio.sleep(0.3))
        assert written < 32 << 20
        while received < 64 << 20 and (part := connection.recv(1 << 20)):
            received += len(part)
        assert received == 64 << 20
    router.wait_idle()


def test_a_connection_that_waited_for_a_slow_client_serves_the_next(
    make_router: MakeRouter, replica: FakeReplica
) -> None:
    """Whole answers of one read each: one of them fills the slow client's buffers with its end."""
    size = 48 << 10
    replica.behave = raw(head(200, f"content-length: {size}") + bytes(size))
    router = make_router(replica)
    data = json.dumps(chat_body()).encode()
    lines = (f"POST {CHAT} HTTP/1.1", "host: x", f"content-length: {len(data)}", "", "")
    request = "\r\n".join(lines).encode() + data

    def arrived(connection: socket.socket) -> int:
        (count,) = struct.unpack("i", fcntl.ioctl(connection, termios.FIONREAD, bytes(4)))
        return int(count)

    with socket.socket() as slow:
        slow.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1_200)  # or buffers are of megabytes
        slow.connect(("127.0.0.1", router.port))
        number = full_since = held = 0
        while number - full_since < FULL_ROUNDS:
            number += 1
            slow.sendall(request)
            until(lambda number=number: len(replica.requests) == 2 * number - 1)
            until(lambda: router.metric("in_flight_requests") == 0)
            assert router.chat().status == 200
            if arrived(slow) > held:
                held, full_since = arrived(slow), number
        zeros = 0
        while zeros < number * size and (part := slow.recv(1 << 20)):
            zeros += part.count(0)
        assert zeros == number * size, "it gets all of them in the end"
    assert router.metric("replica_ejections_total") == 0
    router.wait_idle()


def test_an_answer_that_breaks_off_breaks_off_for_the_client(
    make_router: MakeRouter, replicas: list[FakeReplica]
) -> None:
    """It is neither ended properly nor asked for again elsewhere."""
    for replica in replicas:
        replica.behave = stream(10, break_after=3)
    router = make_router(*replicas)
    with post(router, chat_body(stream=True)) as connection:
        received = receive(connection)
    assert event({"number": 2}) in received
    assert not received.endswith(b"0\r\n\r\n")
    assert sum(len(replica.requests) for replica in replicas) == 1
    assert router.metric("lost_answers_total") == 1
    router.wait_idle()


def test_an_answer_shorter_than_announced(router: RouterUnderTest, replica: FakeReplica) -> None:
    replica.behave = raw(head(200, "content-length: 100") + b"only this", close=True)
    with post(router, chat_body()) as connection:
        assert receive(connection).endswith(b"only this")
    router.wait_idle()


def test_silence_of_an_engine_is_a_504(make_router: MakeRouter, replica: FakeReplica) -> None:
    replica.behave = silent
    router = make_router(replica, options=("--response-timeout-s", "0.5"))
    assert router.chat().status == 504
    until(lambda: replica.gone == 1)
    replica.behave = answer()
    until(lambda: router.chat().status == 200)  # half a second is little where all stands still
    assert router.metric("replica_ejections_total") == 0, "it may only be generating"
    router.wait_idle()
