"""Whatever bytes come in: the right status, nothing hangs, and nobody else is hurt."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import until
from router.conftest import (
    CHAT,
    PATIENT,
    RouterUnderTest,
    chat_body,
    receive,
    receive_until,
)
from router.fake_replica import FakeReplica, Received, answer, head, silent

from vllm_kvpool.router.downstream import LINGER_S

MakeRouter = Callable[..., RouterUnderTest]
BODY = json.dumps(chat_body()).encode()
LEFT_AFTER_S = 5.0
"""For clients that send nothing, or take nothing. Before its first bytes one is idle, and left without an answer: this
process may stand still just then."""


@pytest.fixture(scope="module")
def replica() -> Iterator[FakeReplica]:
    with FakeReplica() as replica:
        yield replica


@pytest.fixture(autouse=True)
def fresh(replica: FakeReplica) -> None:
    until(lambda: replica.in_flight == 0, "the end of what others asked")
    replica.behave = answer()
    replica.requests.clear()
    replica.gone = 0


@pytest.fixture(scope="module")
def router(
    replica: FakeReplica, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RouterUnderTest]:
    """One for all of them: what it survives it survives in any order."""
    log = tmp_path_factory.mktemp("bad") / "router.log"
    with RouterUnderTest(log, *PATIENT, "--drain-s", "5", replica.url) as router:
        yield router
        assert "Traceback" not in log.read_text()


@pytest.fixture
def healthy(router: RouterUnderTest) -> Iterator[RouterUnderTest]:
    """Others are served before and after, on connections of their own."""
    assert router.chat().status == 200
    yield router
    assert router.chat().status == 200
    router.wait_idle()


def send(router: RouterUnderTest, *parts: bytes, pause_s: float = 0.0) -> bytes:
    """All that comes back until the router closes. What goes on coming after its refusal it reads for a while, and no
    longer: not for as long as this process may stand still."""
    with router.connect() as connection:
        begun = time.monotonic()
        try:
            for part in parts:
                connection.sendall(part)
                time.sleep(pause_s)
        except ConnectionError:
            assert time.monotonic() - begun > 0.9 * LINGER_S, "the answer could have been lost"
        return receive(connection)


def status_of(answer: bytes) -> int:
    assert answer.startswith(b"HTTP/1.1 "), answer
    return int(answer[9:12])


def request(*lines: str, body: bytes = b"", first: str = f"POST {CHAT} HTTP/1.1") -> bytes:
    return "\r\n".join((first, "host: x", *lines, "", "")).encode("latin-1") + body


LENGTH = f"content-length: {len(BODY)}"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),  # TLS
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"hello\r\n\r\n", 400),
        (b"\x00" * 100, 400),
        (request(first="GET / HTTP/9.9"), 400),
        (request(first="FETCH / HTTP/1.1"), 400),
        (request("content-length: -1"), 400),
        (request("content-length: 1e3"), 400),
        (request("content-length: 99999999999999999999"), 400),
        (request("content-length: 5", "content-length: 6", body=b"12345"), 400),
        (request(LENGTH, "transfer-encoding: chunked", body=BODY), 400),
        (request("transfer-encoding: chunked, gzip", body=b"0\r\n\r\n"), 400),
        (request("transfer-encoding: chunked", body=b"zz\r\n"), 400),
        (request("transfer-encoding: chunked", body=b"fffffffffffffffff\r\n"), 400),
        (request("bad header: 1"), 400),
        (request("no-colon"), 400),
        (request("folded: 1", " more"), 400),
        (request("nul: a\x00b"), 400),
        (request(f"big: {'x' * 70_000}"), 431),
        (request(*(f"header-{i}: {'x' * 50}" for i in range(2_000))), 431),
        (request(first=f"GET /{'x' * 70_000} HTTP/1.1"), 431),
        (b"GET /" + b"x" * 200_000, 431),
        (request("connection: upgrade", "upgrade: websocket", first="GET /v1/realtime HTTP/1.1"), 501),
        (b"CONNECT example.com:443 HTTP/1.1\r\nhost: example.com\r\n\r\n", 501),
        (request("expect: something", LENGTH, body=BODY), 417),
    ],
)  # fmt: skip
def test_refused(healthy: RouterUnderTest, replica: FakeReplica, data: bytes, status: int) -> None:
    asked = len(replica.requests)
    counted = healthy.metric("rejected_total", status=str(status))
    got = send(healthy, data)
    assert status_of(got) == status
    assert healthy.metric("rejected_total", status=str(status)) == counted + 1
    top, _, body = got.partition(b"\r\n\r\n")
    assert b"connection: close" in top
    assert json.loads(body)["error"]["code"] == status
    assert len(replica.requests) == asked


def test_a_head_counts_once_however_it_comes(healthy: RouterUnderTest) -> None:
    """In pieces, and behind a large request that is waiting for its answer."""
    lines = [f"header-{number}: {'x' * 1_000}" for number in range(40)]
    data = request(LENGTH, *lines, body=BODY)
    large = b'{"prompt": "%b"}' % (b"x" * 80_000)
    first = request(f"content-length: {len(large)}", body=large)
    with healthy.connect() as connection:
        connection.sendall(first + data[:100])
        for begin in range(100, len(data), 4_000):
            connection.sendall(data[begin : begin + 4_000])
            time.sleep(0.01)
        received = b""
        while received.count(b"HTTP/1.1 200") < 2:
            received += receive_until(connection, b"\r\n\r\n")
            assert b"HTTP/1.1 431" not in received


def test_a_header_without_end_is_refused(healthy: RouterUnderTest) -> None:
    parts = [b"GET / HTTP/1.1\r\nbig: ", *[b"x" * 10_000] * 10]
    assert status_of(send(healthy, *parts, pause_s=0.01)) == 431


def test_refusal_is_seen_though_the_client_goes_on_sending(healthy: RouterUnderTest) -> None:
    assert status_of(send(healthy, request("content-length: 1000000000"), bytes(1 << 20))) == 413


@pytest.mark.parametrize("chunked", [False, True])
def test_bodies_above_the_limit(
    make_router: MakeRouter, replica: FakeReplica, chunked: bool
) -> None:
    router = make_router(replica, options=("--max-body", "10KB"))
    framing = "transfer-encoding: chunked"
    for size, status in ((10_000, 200), (10_001, 413)):
        if chunked:
            data = request(framing, body=b"%x\r\n%b\r\n0\r\n\r\n" % (size, b"x" * size))
        else:
            data = request(f"content-length: {size}", body=b"x" * size)
        with router.connect() as connection:
            connection.sendall(data)
            assert status_of(receive_until(connection, b"\r\n\r\n")) == status
    assert [len(request.body) for request in replica.requests] == [10_000]


def test_chunked_bodies_reach_the_engine_with_a_length(
    healthy: RouterUnderTest, replica: FakeReplica
) -> None:
    body = b"".join(b"1\r\n%c\r\n" % byte for byte in BODY) + b"0\r\nx-trailer: 1\r\n\r\n"
    with healthy.connect() as connection:
        connection.sendall(request("transfer-encoding: chunked", body=body))
        receive_until(connection, b"usage")
    assert replica.requests[-1].body == BODY
    assert replica.requests[-1].header("content-length") == [str(len(BODY))]
    assert not replica.requests[-1].header("transfer-encoding")
    assert not replica.requests[-1].header("x-trailer")


def test_one_byte_at_a_time(healthy: RouterUnderTest) -> None:
    with healthy.connect() as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in request(LENGTH, body=BODY):
            connection.sendall(bytes([byte]))
        assert status_of(receive_until(connection, b"usage")) == 200


def test_expect_100_continue(healthy: RouterUnderTest) -> None:
    with healthy.connect() as connection:
        connection.sendall(request(LENGTH, "expect: 100-continue"))
        assert receive_until(connection, b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(BODY)
        assert status_of(receive_until(connection, b"usage")) == 200


def test_pipelined_requests_are_answered_in_order(
    healthy: RouterUnderTest, replica: FakeReplica
) -> None:
    count = 50
    many = b"".join(
        request(LENGTH, first=f"POST /{number} HTTP/1.1", body=BODY) for number in range(count)
    )
    with healthy.connect() as connection:
        connection.sendall(many + request("connection: close", first="GET /health HTTP/1.1"))
        received = receive(connection)
    paths = [part.split(b'"')[0] for part in received.split(b'"path": "')[1:]]
    assert paths == [b"/%d" % number for number in range(count)]
    assert received.endswith(b"ok\n")


def test_a_bad_request_behind_good_ones(healthy: RouterUnderTest) -> None:
    received = send(healthy, request(LENGTH, body=BODY) * 2 + b"nonsense\r\n\r\n")
    assert received.count(b"HTTP/1.1 200") == 2
    assert b"HTTP/1.1 400" in received.split(b"usage")[-1]


def test_smuggled_requests_are_not_seen(healthy: RouterUnderTest, replica: FakeReplica) -> None:
    """A body that looks like a request stays a body."""
    inner = request(first="GET /smuggled HTTP/1.1")
    for lines in (
        ("content-length: 0",),
        ("transfer-encoding : chunked",),
        ("content-length:\t3x",),
    ):
        send(healthy, request(*lines, "connection: close", body=inner))
    assert not any("smuggled" in request.target for request in replica.requests)
    with healthy.connect() as connection:
        connection.sendall(request(f"content-length: {len(inner)}", body=inner))
        receive_until(connection, b"usage")
    assert replica.requests[-1].body == inner


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe", b"{" * 100_000, b"[" * 100_000, b"1e999",
        b'{"messages": 5}', b'{"messages": [[[]]], "tools": {}}', b'{"prompt": {}}',
        b'{"messages": [{"role": 1, "content": [{"type": 2}]}]}', b'{"model": [], "input": [null]}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}], "user": {"id": 3}}',
    ],
)  # fmt: skip
def test_odd_bodies_are_the_engines_to_judge(
    healthy: RouterUnderTest, replica: FakeReplica, body: bytes
) -> None:
    replica.behave = answer(400)
    assert healthy.ask(CHAT, body, method="POST").status == 400
    assert replica.requests[-1].body == body
    assert healthy.ask("/route", body, method="POST").status == 200
    replica.behave = answer()


def test_slow_clients_are_left(make_router: MakeRouter, replica: FakeReplica) -> None:
    """A head that trickles, a body that stops, a connection without a request."""
    router = make_router(replica, options=("--client-timeout-s", str(LEFT_AFTER_S)))
    began = time.monotonic()
    with router.connect() as trickle, router.connect() as stopped, router.connect() as idle:
        stopped.sendall(request(LENGTH, body=BODY[:10]))
        trickle.settimeout(0.3)
        received = b""
        for byte in request(f"long: {'x' * 100}"):
            trickle.sendall(bytes([byte]))
            try:
                received = trickle.recv(1_000)
                break
            except TimeoutError:
                pass
        assert status_of(received) == 408
        assert time.monotonic() - began > LEFT_AFTER_S
        assert status_of(receive(stopped)) == 408
        assert receive(idle) == b""
    assert not replica.requests


def test_a_client_that_takes_nothing_is_left(make_router: MakeRouter, replica: FakeReplica) -> None:
    async def behave(request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(head(200, f"content-length: {64 << 20}") + bytes(64 << 20))
        await writer.drain()

    replica.behave = behave
    router = make_router(replica, options=("--client-timeout-s", str(LEFT_AFTER_S)))
    with router.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        connection.sendall(request(LENGTH, body=BODY))
        until(lambda: replica.gone == 1, "the engine to be released")
        router.wait_idle()


def test_many_idle_connections_hurt_nobody(healthy: RouterUnderTest) -> None:
    idle = [healthy.connect() for _ in range(300)]
    for connection in idle[::2]:
        connection.sendall(b"POST /v1/chat/comp")
    with ThreadPoolExecutor(8) as pool:
        assert {answer.status for answer in pool.map(healthy.chat, map(str, range(50)))} == {200}
    for connection in idle:
        connection.close()


def test_garbage(healthy: RouterUnderTest, replica: FakeReplica) -> None:
    """Random changes of a good request: an answer or a closed connection, and never a hang."""
    draw = random.Random(1)
    good = request(LENGTH, "connection: close", body=BODY)
    for _ in range(200):
        data = bytearray(good)
        for _ in range(draw.randrange(1, 6)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        with healthy.connect() as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            received = receive(connection, timeout_s=10)
            assert received == b"" or received.startswith(b"HTTP/1.1 ")


def test_requests_in_flight_survive_the_bad_ones(
    router: RouterUnderTest, replica: FakeReplica
) -> None:
    go_on = replica.hold()
    with ThreadPoolExecutor(5) as pool:
        good = [pool.submit(router.chat, stream=True) for _ in range(5)]
        until(lambda: replica.in_flight == 5)
        for _ in range(50):
            send(router, b"\x00\r\n\r\n")
        go_on()
        assert all(answer.result().body.endswith(b"[DONE]\n\n") for answer in good)


def test_half_closed_clients_leave_nothing_behind(
    router: RouterUnderTest, replica: FakeReplica
) -> None:
    replica.behave = silent
    with router.connect() as connection:
        connection.sendall(request(LENGTH, body=BODY))
        until(lambda: replica.in_flight == 1)
        connection.shutdown(socket.SHUT_WR)
        until(lambda: replica.gone == 1)
    router.wait_idle()
