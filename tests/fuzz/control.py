"""The control socket: an engine's messages, and an admin client's, to the real service over a real
pool."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from tests.fuzz.frames import Message, pack, unpack
from tests.fuzz.target import CLIENT_ID, KEYS, SPACE, Target, check_reply
from vllm_kvpool import protocol
from vllm_kvpool._native import PoolOwner
from vllm_kvpool.liveness import ClientLock
from vllm_kvpool.pool.files import PoolFolder
from vllm_kvpool.pool.mount import Mount
from vllm_kvpool.pool.prefault import Prefault
from vllm_kvpool.pool.service import PoolService
from vllm_kvpool.types import KEY_BYTES

HELLO = protocol.Hello(
    id=1, version=1, now_ms=5, pid=7, client_id=CLIENT_ID, namespace=SPACE, writing=bytes(8)
)
STORE = protocol.PrepareStore(id=2, keys=KEYS, ttl_s=60, pin=True)
SIZE = 4 << 20


class Control(Target):
    name = "control"

    def __init__(self, shm_dir: Path) -> None:
        self._folder = PoolFolder("fuzz", str(shm_dir))
        self._lock = ClientLock(self._folder.paths.client_lock(CLIENT_ID))
        assert self._lock.hold()
        self._mount = Mount.of(shm_dir)
        self._pool = self._folder.paths.pool
        owner = PoolOwner.create(str(self._pool), SIZE, SPACE.slot_bytes)
        owner.populate(0)
        self._file = os.open(self._pool, os.O_RDWR | os.O_CLOEXEC)
        self._tables = self._pool.read_bytes()[: owner.size - owner.slab_bytes]

    def _service(self) -> tuple[PoolService, PoolOwner]:
        """An empty pool each time: what an input does must not depend on those before it. To write its tables
        anew takes half the time of making a file."""
        for begin, end in self._written():
            os.pwrite(self._file, self._tables[begin:end], begin)
        owner = PoolOwner.attach(str(self._pool), now_s=0)
        owner.populate(0)
        service = PoolService(owner, self._folder, Prefault(owner, self._mount))
        admin = protocol.Hello(id=1, version=1, now_ms=5, pid=7)
        for connection, hello in ((b"engine", HELLO), (b"admin", admin)):
            reply = service.handle(connection, protocol.encode(hello))
            assert isinstance(reply, protocol.Welcome), reply
        return service, owner

    def _written(self) -> Iterator[tuple[int, int]]:
        """Where the tables are no holes."""
        end = 0
        while end < len(self._tables):
            try:
                begin = os.lseek(self._file, end, os.SEEK_DATA)
            except OSError:  # ENXIO: nothing but holes from here on
                return
            end = min(os.lseek(self._file, begin, os.SEEK_HOLE), len(self._tables))
            yield begin, end

    def _granted(self) -> bytes:
        service, _ = self._service()
        reply = service.handle(b"engine", protocol.encode(STORE))
        assert isinstance(reply, protocol.Prepared)
        return reply.refs

    def seeds(self) -> list[bytes]:
        namespace, refs = SPACE.digest, self._granted()
        requests = [
            HELLO,
            STORE,
            protocol.PrepareStore(id=3, keys=KEYS[:KEY_BYTES], parent=KEYS[-KEY_BYTES:]),
            protocol.CompleteStore(id=4, refs=refs[16:], aborted=refs[:8]),
            protocol.Touch(id=5, refs=refs),
            protocol.Drop(id=6, refs=refs[-8:]),
            protocol.Pull(id=7, keys=KEYS, within_ms=100),
            protocol.CancelPull(id=7),
            protocol.Prefetch(id=8, namespace=namespace, keys=KEYS, within_ms=100),
            protocol.Clear(id=9, namespace=namespace),
            protocol.Stats(id=10, deadline_ms=1),
        ]
        alone = [pack([Message([protocol.encode(request)])]) for request in requests]
        return [*alone, pack(Message([protocol.encode(request)]) for request in requests)]

    def run(self, data: bytes) -> None:
        """Both connections have said hello."""
        service, owner = self._service()
        for message in unpack(data):
            payload = message.frames[0] if len(message.frames) == 1 else b""
            reply = service.handle(b"admin" if message.other else b"engine", payload)
            if reply is not None:
                check_reply(reply)
        service.tidy()
        owner.check_integrity()

    def close(self) -> None:
        os.close(self._file)
        self._lock.close()
        self._folder.close()
