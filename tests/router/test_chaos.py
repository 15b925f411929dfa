"""Everything goes wrong at once, for a while; then nothing is left of it.

Three replicas that answer, stream, refuse, stall, break off and die; clients that leave in the middle,
by the hundreds. In the end all loads are zero, memory is what it was, and each request is served.
"""

from __future__ import annotations

import json
import os
import random
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import until
from router.conftest import CHAT, RouterUnderTest, chat_body
from router.fake_replica import FakeReplica, answer, raw, silent, stream

pytestmark = pytest.mark.slow

CHAOS_S = 20.0
CLIENTS = 12
SEED = 11
BEHAVIOURS = (
    answer(), answer(), answer(429), answer(503), answer(500), silent, stream(20, 0.002), stream(200, 0.001),
    stream(20, 0.002, break_after=5), raw(b"", close=True), raw(b"nonsense\r\n\r\n"),
    raw(b"HTTP/1.1 200 OK\r\ncontent-length: 50\r\n\r\nshort", close=True),
)  # fmt: skip


def resident_kib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])


class Clients:
    """Threads that send requests and leave whenever they like."""

    def __init__(self, router: RouterUnderTest) -> None:
        self._router = router
        self._stop = threading.Event()
        self.sent = self.left = self.answered = 0
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(CLIENTS)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        draw = random.Random(f"{SEED} {number}")
        while not self._stop.is_set():
            try:
                self._one(draw)
            except OSError:
                self.left += 1

    def _one(self, draw: random.Random) -> None:
        session = f"{draw.randrange(1_000_000)}"
        body = json.dumps(chat_body("word " * draw.randrange(2_000), user=session)).encode()
        top = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
        data = top + body
        with self._router.connect() as connection:
            connection.settimeout(draw.choice([0.001, 0.01, 0.1, 3.0]))
            self.sent += 1
            if draw.random() < 0.1:
                connection.sendall(data[: draw.randrange(len(data))])
                return
            connection.sendall(data)
            if draw.random() < 0.2:
                connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(65_536):
                if b"usage" in part or b"error" in part or draw.random() < 0.02:
                    self.answered += 1
                    return


def rage(replicas: list[FakeReplica], draw: random.Random, until_s: float) -> None:
    """Replicas change their minds, die and come back."""
    dead: set[FakeReplica] = set()
    while time.monotonic() < until_s:
        time.sleep(0.02)
        replica = draw.choice(replicas)
        if replica in dead:
            replica.open()
            dead.discard(replica)
        elif draw.random() < 0.1:
            replica.die()
            dead.add(replica)
        replica.behave = draw.choice(BEHAVIOURS)
    for replica in dead:
        replica.open()


def test_nothing_is_left_of_it(
    make_router: Callable[..., RouterUnderTest], replicas: list[FakeReplica]
) -> None:
    options = ("--response-timeout-s", "1", "--client-timeout-s", "2", "--retry-share", "1")
    router = make_router(*replicas, options=options)
    (worker,) = router.workers()
    draw = random.Random(SEED)
    with Clients(router) as clients:
        rage(replicas, draw, time.monotonic() + CHAOS_S / 2)
        halfway, sent = resident_kib(worker), clients.sent
        rage(replicas, draw, time.monotonic() + CHAOS_S / 2)
    for replica in replicas:
        replica.behave = answer()
        router.wait_state(replica.id, "accepting")
    router.wait_idle()
    until(lambda: router.metric("client_connections") == 1, "all clients' connections to end")
    assert [router.chat(str(number)).status for number in range(20)] == [200] * 20
    router.wait_idle()

    # it did rage
    assert clients.left > 50
    assert clients.answered > 50
    for name in ("disconnects_total", "retries_total", "lost_answers_total", "rejected_total"):
        assert router.metric(name) > 0, name
    assert router.metric("worker_restarts_total") == 0
    # half of the requests came after `halfway`: what each left behind would show
    grown = resident_kib(worker) - halfway
    assert grown < 6_000, f"{grown} KiB more after {clients.sent - sent} further requests"
    assert len(os.listdir(f"/proc/{worker}/fd")) < 60
    assert all(replica.in_flight == 0 for replica in replicas)
