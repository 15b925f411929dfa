"""What lies in Redis, where anybody may have written: to the real directory, and on to the real
exchange, which opens connections to the hosts that it names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec

from tests.fuzz.frames import Message, pack, unpack
from tests.fuzz.host import FuzzHost
from tests.fuzz.target import KEYS, Target
from vllm_kvpool.config import PoolConfig
from vllm_kvpool.pool.anchors import asked
from vllm_kvpool.pool.directory import Directory, HostRecord
from vllm_kvpool.pool.exchange import Exchange
from vllm_kvpool.types import BlockKeys, num_keys

URL = "redis://127.0.0.1:1"
OWN, OTHER = b"0" * 16, b"1" * 16


class Answers:
    """In place of redis-py: each read is answered with what comes next of the input; behind its end
    there is nothing."""

    def __init__(self, messages: list[Message]) -> None:
        self._left = [message.frames for message in messages]

    def _next(self) -> list[bytes]:
        return self._left.pop(0) if self._left else []

    def smembers(self, key: bytes) -> set[bytes]:
        return set(self._next())

    def get(self, key: bytes) -> bytes | None:
        return next(iter(self._next()), None)

    def _write(self, key: bytes, *_: object, **__: object) -> int:
        return 1

    set = sadd = srem = expire = delete = _write

    def pipeline(self, *, transaction: bool) -> Pipeline:
        return Pipeline(self)


class Pipeline:
    def __init__(self, answers: Answers) -> None:
        self._answers = answers
        self._gathered: list[Any] = []

    def __getattr__(self, command: str) -> Callable[..., None]:
        def gather(*arguments: object, **options: object) -> None:
            self._gathered.append(getattr(self._answers, command)(*arguments, **options))

        return gather

    def execute(self) -> list[Any]:
        return self._gathered


class Records(Target):
    name = "records"

    def __init__(self, shm_dir: Path) -> None:
        config = PoolConfig(name="fuzz", directory=URL)
        self._host = FuzzHost(shm_dir)
        owner: Any = SimpleNamespace(pool_id=OWN.hex())
        self._exchange = Exchange(self._host.daemon.paths, config, owner)

    def seeds(self) -> list[bytes]:
        me = _record(HostRecord(OWN, "tcp://10.0.0.1:7707"))
        host = _record(HostRecord(OTHER, "tcp://10.0.0.2:7707"))
        hosts = Message([OWN, OTHER])
        named = Message([OTHER])
        known = [hosts, Message([me]), Message([host])]
        addresses = ("tcp://[fe80::1%eth0]:7707", "tcp://127.0.0.1:0", "tcp://h:99999", "ipc://x")
        others = [Message([_record(HostRecord(OTHER, address))]) for address in addresses]
        return [
            pack([*known, *[named] * num_keys(KEYS)]),
            pack([Message([]), *[named] * num_keys(KEYS), Message([host])]),
            *(pack([Message([OTHER]), other, *[named] * num_keys(KEYS)]) for other in others),
        ]

    def run(self, data: bytes) -> None:
        """A beat, a look-up of a chain, and a connection to each host that it names."""
        me = HostRecord(OWN, "tcp://10.0.0.1:7707")
        directory = Directory(URL, "fuzz", OWN.hex(), me, Counter())
        try:
            directory._redis = Answers(unpack(data))
            directory._beat()
            directory.ask(1, asked(BlockKeys(KEYS), 1))
            directory.announce([KEYS[:32]], True)
            directory.announce([KEYS[32:64]], False)
            directory._look_up(directory._take_asks(0) or [])
            directory._flush()
            (answer,) = directory.take_answers()
        finally:
            directory._thread = _Stopped()  # type: ignore[assignment]
            directory.stop()
        for host, blocks in answer.hosts:
            assert host.id != OWN
            assert 0 < blocks <= num_keys(KEYS)
            self._connect(host)

    def _connect(self, host: HostRecord) -> None:
        """To loopback: what others have made up is nothing to look up in DNS, or to call."""
        address = re.sub(r"//[^:/\[\]]+", "//127.0.0.1", host.address)
        peer = self._exchange._peer_of(msgspec.structs.replace(host, address=address))
        if peer is not None:
            peer.close()
        self._exchange._peers.clear()

    def close(self) -> None:
        self._exchange._close_sockets()
        directory = self._exchange.directory
        assert directory is not None
        directory._thread = _Stopped()  # type: ignore[assignment]
        directory.stop()
        self._exchange._spaces.close()
        self._host.close()


class _Stopped:
    """In place of a thread that never ran."""

    def join(self, timeout_s: float) -> None:
        pass


def _record(host: HostRecord) -> bytes:
    return msgspec.msgpack.encode(host)
