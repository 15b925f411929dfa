"""A client believes no answer that cannot be one: it says so once, and goes on without the pool."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zmq
from helpers import PATIENT_MS, keys_of, namespace_of, until

from vllm_kvpool import protocol
from vllm_kvpool._native import MAX_CLIENTS, PoolOwner
from vllm_kvpool.channel import call_daemon
from vllm_kvpool.client import PoolClient
from vllm_kvpool.config import pool_dir
from vllm_kvpool.errors import ProtocolError
from vllm_kvpool.ledger import StoreGrant
from vllm_kvpool.paths import PoolPaths
from vllm_kvpool.protocol import (
    AnyReply,
    AnyRequest,
    Completed,
    CompleteStore,
    Error,
    Hello,
    Prepared,
    PrepareStore,
    Stats,
    Welcome,
)
from vllm_kvpool.types import pack_refs


class LyingDaemon:
    """A real pool file and a ROUTER that answers what the test wants."""

    def __init__(self, shm_dir: Path) -> None:
        self.paths = PoolPaths(pool_dir("test", str(shm_dir)))
        self.paths.clients.mkdir(parents=True, mode=0o700)
        self.owner = PoolOwner.create(str(self.paths.pool), 16 << 20)
        self.seen: list[AnyRequest] = []
        self.lent = 0
        self.behind = 0
        """So many answers are kept back, the latest."""
        self.answers: list[list[bytes]] = []
        self.answer: Callable[[AnyRequest], AnyReply | bytes | None] = lambda _: None
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.linger = 0
        self.socket.bind(self.paths.endpoint)
        self.client = PoolClient(self.paths.folder, namespace_of("a"), timeout_ms=PATIENT_MS)
        index = self.owner.add_namespace(bytes(32), 64 << 10, "{}")
        lock, client_id = str(self.client.lock_path), self.client.client_id
        self.client.lock_path.touch()
        self.owner.add_client(client_id, lock, os.getpid(), index)

    def serve(self) -> None:
        while self.socket.poll(5):
            connection, payload = self.socket.recv_multipart()
            request = protocol.decode_request(payload)
            self.seen.append(request)
            reply = self._welcome(request) if isinstance(request, Hello) else self.answer(request)
            if reply is not None:
                raw = reply if isinstance(reply, bytes) else protocol.encode(reply)
                self.answers.append([connection, raw])
            while len(self.answers) > self.behind:
                self.socket.send_multipart(self.answers.pop(0))

    def _welcome(self, hello: Hello) -> Welcome:
        pool_id, epoch = self.owner.pool_id, self.owner.epoch
        return Welcome(id=hello.id, version=1, pool_id=pool_id, epoch=epoch, client=self.lent)

    def turn(self) -> list[object]:
        finished = self.client.poll()
        self.serve()
        return list(finished)

    def hellos(self) -> list[Hello]:
        return [request for request in self.seen if isinstance(request, Hello)]

    def connect(self) -> None:
        until(lambda: (self.turn(), self.client.connected)[1], "connection")

    def grant(self, refs: bytes, blocks: int) -> list[StoreGrant]:
        """Ask for `blocks` slots and be answered `refs`."""
        self.answer = lambda request: (
            Prepared(id=request.id, refs=refs) if isinstance(request, PrepareStore) else None
        )
        assert self.client.prepare_store(keys_of("chain", blocks)) is not None
        return until(self.turn, "the end of the request")

    def close(self) -> None:
        self.client.close()
        self.socket.close()
        self.context.term()


@pytest.fixture
def liar(shm_dir: Path) -> Iterator[LyingDaemon]:
    liar = LyingDaemon(shm_dir)
    yield liar
    liar.close()


@pytest.mark.parametrize("lent", [-2, -1, MAX_CLIENTS, 1 << 40])
def test_bitmap_that_does_not_exist(
    liar: LyingDaemon,
    lent: int,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    liar.lent = lent
    # However slow the machine is: a hello whose answer is still to come is not said again.
    monkeypatch.setattr("vllm_kvpool.client.RETRY_MS", PATIENT_MS)
    until(lambda: (liar.turn(), "makes no sense" in caplog.text)[1], "the word")
    for _ in range(20):
        liar.turn()
    assert not liar.client.connected
    assert len(liar.hellos()) == 1  # it is not asked again at once
    assert caplog.text.count("makes no sense") == 1


def test_answers_that_take_longer_than_the_next_hello(
    liar: LyingDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_kvpool.client.RETRY_MS", 20)
    liar.behind = 3
    liar.connect()


@pytest.mark.parametrize("refs", [bytes(3), bytes(8), bytes(24)])
def test_grant_that_does_not_fit_the_keys(
    liar: LyingDaemon, refs: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    liar.connect()
    (end,) = liar.grant(refs, 2)
    assert (end.refs, end.reason) == (None, "lost")
    assert not liar.client.connected
    assert liar.client.prepare_store(keys_of("chain", 1)) is None
    assert caplog.text.count("makes no sense") == 1


@pytest.mark.parametrize(
    "reply",
    [
        b"\xc1",
        b"\x84\xa4type\xa5error\xa2id\x02\xa4code\xa1\xff\xa7message\xa0",
        b"\x84\xa4type\xa9completed\xa2id\x02\xa5ready\x01\xa1x" + b"\x91" * 6_000 + b"\xc0",
    ],
)
def test_bytes_that_are_no_reply(
    liar: LyingDaemon, reply: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    liar.connect()
    liar.answer = lambda _: reply
    liar.client.timeout_ms = 100
    assert liar.client.prepare_store(keys_of("chain", 1)) is not None
    (end,) = until(liar.turn, "the end of the request")
    assert (end.refs, end.reason) == (None, "timeout")
    assert liar.client.skipped["reply_malformed"] == 1
    assert caplog.text.count("cannot be read") == 1


def test_admin_command_is_told_at_once(liar: LyingDaemon) -> None:
    liar.answer = lambda _: b"\xc1"
    with ThreadPoolExecutor() as threads:
        call = threads.submit(call_daemon, liar.paths, Stats(id=0), timeout_s=PATIENT_MS)
        until(lambda: (liar.serve(), call.done())[1], "the end of the call")
    with pytest.raises(ProtocolError, match="cannot be read"):
        call.result()


def test_refused_completion_is_said_again_after_a_hello(liar: LyingDaemon) -> None:
    liar.connect()
    ref = pack_refs([1 << 32 | 7])
    (grant,) = liar.grant(ref, 1)
    liar.answer = lambda request: Error(id=request.id, code="internal", message="a bug")
    liar.client.complete_store(grant.request_id)
    until(lambda: (liar.turn(), not liar.client.connected)[1], "the refusal")
    liar.answer = lambda request: Completed(id=request.id, ready=1)
    until(lambda: (liar.turn(), liar.client.writing == b"")[1], "the second time")
    assert liar.hellos()[-1].writing == ref
    assert [r.refs for r in liar.seen if isinstance(r, CompleteStore)] == [ref, ref]
    assert liar.client.connected


def test_folder_that_is_not_ours(
    liar: LyingDaemon, shm_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is said to whoever listens there, and nothing made."""
    link = shm_dir / "vllm-kvpool-link"
    link.symlink_to(liar.paths.folder)
    client = PoolClient(link, namespace_of("a"))
    for _ in range(20):
        client._next_try_ms = 0
        client.poll()
        liar.serve()
    assert client.view is None
    assert liar.seen == []
    assert list(liar.paths.clients.iterdir()) == [liar.client.lock_path]
    assert caplog.text.count("is not a directory") == 1
    link.unlink()  # from now on there is just no pool
    client.poll()
    client.close()
