"""A worker as its parent sees it: a child process and the channel to it."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Callable

from vllm_kvpool.errors import KVPoolError
from vllm_kvpool.router import control
from vllm_kvpool.router.metrics import Sample, is_gauge

READY_S = 30.0
COLLECT_S = 5.0


class WorkerProcess:
    def __init__(self, process: asyncio.subprocess.Process, channel: control.Channel) -> None:
        self._process = process
        self._channel = channel
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._collected: dict[int, asyncio.Future[None]] = {}
        self._number = 0
        self.samples: list[Sample] = []
        """Its counters when it told them last."""

    @classmethod
    async def spawn(cls, start: control.Configure) -> WorkerProcess:
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "vllm_kvpool.router.worker", str(theirs.fileno()),
                pass_fds=[theirs.fileno()], stdin=asyncio.subprocess.DEVNULL,
            )  # fmt: skip
        worker = cls(process, await control.Channel.over(ours))
        worker.send(start)
        return worker

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: control.Message) -> None:
        self._channel.send(message)

    async def listen(self, obey: Callable[[WorkerProcess, control.Message], None]) -> int:
        """Until the worker is gone; its exit status."""
        async for message in self._channel:
            match message:
                case control.Ready():
                    self._ready.set_result(None)
                case control.Samples(number, samples):
                    self.samples = samples
                    if (future := self._collected.pop(number, None)) and not future.done():
                        future.set_result(None)
                case _:
                    obey(self, message)
        self._channel.close()
        for future in self._collected.values():
            future.cancel()
        status = await self._process.wait()  # it may still be telling why
        if not self._ready.done():
            self._ready.set_exception(KVPoolError(f"worker {self.pid} ended before it was ready"))
        return status

    async def wait_ready(self) -> None:
        """KVPoolError: it did not get there."""
        try:
            await asyncio.wait_for(asyncio.shield(self._ready), READY_S)
        except TimeoutError:
            raise KVPoolError(f"worker {self.pid} was not ready in {READY_S:g} s") from None

    async def collect(self) -> None:
        """Brings `samples` up to date; of one that does not answer they stay as they are."""
        self._number += 1
        future = asyncio.get_running_loop().create_future()
        self._collected[self._number] = future
        self.send(control.Collect(self._number))
        await asyncio.wait([future], timeout=COLLECT_S)

    def gauges(self) -> dict[str, float]:
        """Each of its gauges, as it told them last; those of replicas and tables added up."""
        sums: dict[str, float] = {}
        for name, _, value in self.samples:
            if is_gauge(name):
                sums[name] = sums.get(name, 0) + value
        return sums

    def kill(self) -> None:
        if self._process.returncode is None:
            os.kill(self.pid, 9)
