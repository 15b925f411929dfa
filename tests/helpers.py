"""Real daemons and fake engines for tests.

A fake engine is a `PoolClient` without a vLLM: in this process (`connect`), or in one of its own
that can be killed and stopped (`EngineProcess`). It writes each block's key into the block's bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, TypeVar

from vllm_kvpool.client import PoolClient
from vllm_kvpool.config import pool_dir
from vllm_kvpool.keys import namespace_digest
from vllm_kvpool.ledger import StoreGrant
from vllm_kvpool.paths import PoolPaths
from vllm_kvpool.pool.admin import fetch_stats
from vllm_kvpool.protocol import Namespace
from vllm_kvpool.types import KEY_BYTES, BlockKeys, SlotRefs, unpack_refs

SLOT_BYTES = 64 << 10
T = TypeVar("T")
WAIT_S = 30.0  # ends early; machines that build something else meanwhile are slow
LONGER_THAN_THE_GRACE_S = 3.0
"""Who is dead for more than a second, counted in whole ones and looked for twice a second, is cleared away."""
PATIENT_MS = 30_000
"""Of clients whose timeouts are not what is tested: a machine may pause for seconds."""


def until(probe: Callable[[], T], what: str = "", timeout_s: float = WAIT_S) -> T:
    """The first true value of `probe`."""
    give_up = time.monotonic() + timeout_s
    while not (value := probe()):
        assert time.monotonic() < give_up, f"waited {timeout_s} s for {what or probe}"
        time.sleep(0.01)
    return value


def keys_of(seed: str, count: int) -> BlockKeys:
    """A chain of keys; shorter chains of the same seed are its prefixes."""
    return BlockKeys(
        b"".join(hashlib.sha256(f"{seed} {i}".encode()).digest() for i in range(count))
    )


def namespace_of(name: str, slot_bytes: int = SLOT_BYTES) -> Namespace:
    fields = {"model": name}
    return Namespace(digest=namespace_digest(fields), slot_bytes=slot_bytes, fields=fields)


def tune(command: list[str], **limits: float) -> None:
    """Change what starts a daemon, for it to have other limits of time: see tests/tuned_daemon.py, `.` written as
    `__`."""
    settings = [f"{name.replace('__', '.')}={value}" for name, value in limits.items()]
    program = command.index("serve")
    if command[program - 1] == "--":
        command[program - 1 : program - 1] = settings
    else:  # in place of "-m vllm_kvpool"
        script = str(Path(__file__).with_name("tuned_daemon.py"))
        command[program - 2 : program] = [script, *settings, "--"]


class Daemon:
    """A `vllm-kvpool serve` process of its own pool."""

    def __init__(
        self, shm_dir: Path, *options: str, name: str = "test", size: str = "16MiB"
    ) -> None:
        self.name = name
        self.shm_dir = shm_dir
        self.paths = PoolPaths(pool_dir(name, str(shm_dir)))
        self.command = serve_command(shm_dir, *options, name=name, size=size)
        self.process: subprocess.Popen[str] | None = None
        self.ready_line = ""
        self.error_file = shm_dir / f"{name}.err"

    def tuned(self, **limits: float) -> Self:
        """With other limits of time than the package's own."""
        tune(self.command, **limits)
        return self

    def start(self) -> Self:
        """Returns when it is ready and all of its slabs can be handed out."""
        with open(self.error_file, "a") as errors:
            self.process = subprocess.Popen(
                self.command, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        assert self.process.stdout is not None
        self.ready_line = self.process.stdout.readline()
        assert "ready" in self.ready_line, self.errors()
        until(self._is_populated, "prefault")
        return self

    def _is_populated(self) -> bool:
        pool = self.stats()["pool"]
        return bool(pool["populated_slabs"] == pool["num_slabs"])

    def stats(self) -> dict[str, Any]:
        return fetch_stats(self.name, str(self.shm_dir), WAIT_S)

    def counter(self, name: str) -> int:
        return int(self.stats()["counters"].get(name, 0))

    def errors(self) -> str:
        return self.error_file.read_text()

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def pause(self) -> None:
        stop(self.process)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self._end()

    def replace_pool(self) -> None:
        """Another daemon and pool in the place of these."""
        self.kill()
        shutil.rmtree(self.paths.folder)
        self.start()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """A clean end; the daemon checks its pool's integrity then and returns 1 if it is
        broken."""
        self.process.send_signal(number)
        return self._end()

    def _end(self) -> int:
        status = self.process.wait(timeout=30)
        self.process.stdout.close()
        self.process = None
        return status


def stop(process: subprocess.Popen[Any]) -> None:
    """SIGSTOP; returns when all of its threads have stopped."""
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)


def serve_command(
    shm_dir: Path, *options: str, name: str = "test", size: str = "16MiB"
) -> list[str]:
    common = ["--name", name, "--size", size, "--shm-dir", str(shm_dir)]
    return [sys.executable, "-m", "vllm_kvpool", "serve", *common, *options]


def run_cli(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vllm_kvpool", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, **options
    )


# fake engines -------------------------------------------------------------------------------------


def connect(
    paths: PoolPaths, namespace: str | Namespace = "a", *, timeout_ms: int = PATIENT_MS
) -> PoolClient:
    """A connected client. Its owner closes it."""
    space = namespace_of(namespace) if isinstance(namespace, str) else namespace
    client = PoolClient(paths.folder, space, timeout_ms=timeout_ms)
    wait_connected(client)
    return client


def wait_connected(client: PoolClient) -> None:
    until(lambda: (client.poll(), client.connected)[1], "connection")


def prepare(client: PoolClient, keys: BlockKeys, **options: Any) -> StoreGrant:
    """Ask for slots and wait for the answer."""
    request_id = client.prepare_store(keys, **options)
    assert request_id is not None, dict(client.skipped)
    return wait_grant(client, request_id)


def wait_grant(client: PoolClient, request_id: int) -> StoreGrant:
    return wait_grants(client, [request_id])[0]


def wait_grants(client: PoolClient, request_ids: list[int]) -> list[StoreGrant]:
    done: dict[int, StoreGrant] = {}

    def all_done() -> bool:
        done.update({grant.request_id: grant for grant in client.poll()})
        return done.keys() >= set(request_ids)

    until(all_done, "grants")
    return [done[request_id] for request_id in request_ids]


def write_blocks(client: PoolClient, keys: bytes, refs: bytes) -> SlotRefs:
    """Each key into its block's bytes; the references that were granted."""
    for i, ref in enumerate(unpack_refs(refs)):
        if ref:
            client.view.payload(ref)[:KEY_BYTES] = keys[i * KEY_BYTES : (i + 1) * KEY_BYTES]
    granted = [ref for ref in unpack_refs(refs) if ref]
    return SlotRefs(b"".join(ref.to_bytes(8, "little") for ref in granted))


def store(client: PoolClient, keys: BlockKeys, **options: Any) -> SlotRefs:
    """Store a chain and wait until it is visible, as far as there was room."""
    grant = prepare(client, keys, **options)
    assert grant.refs is not None, grant.reason
    granted = write_blocks(client, keys, grant.refs)
    client.complete_store(grant.request_id)
    until(lambda: (client.poll(), not client.writing)[1], "acknowledgement")
    return granted


def check_bytes(client: PoolClient, keys: bytes, refs: bytes) -> None:
    """Every block holds its own key."""
    for i, ref in enumerate(unpack_refs(refs)):
        expected = keys[i * KEY_BYTES : (i + 1) * KEY_BYTES]
        assert bytes(client.view.payload(ref)[:KEY_BYTES]) == expected


class EngineProcess:
    """tests/fake_engine.py: takes one command a line and answers each with one line of JSON."""

    def __init__(self, paths: PoolPaths, namespace: str = "a") -> None:
        script = Path(__file__).with_name("fake_engine.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(paths.folder), namespace],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(script.parent)},
        )
        assert self._answer() == "connected"

    def do(self, verb: str, seed: str = "", count: int = 0) -> Any:
        self.process.stdin.write(f"{verb} {seed} {count}\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        return json.loads(self.process.stdout.readline())

    def send_signal(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> None:
        """Kill it, if it lives."""
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
