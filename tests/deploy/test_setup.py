"""The lines of docs/deploy.md make what the files expect, and the daemon starts with it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from deploy.manifests import COMPOSE, DOCS, Command, commands, pods, shell_lines
from helpers import until
from redis_server import RedisServer

from benchmarks.processes import free_port

ROOT = DOCS.parent


class Site:
    """A copy of the documents in which shell lines can be run, with what they call."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls = folder / "calls"
        shutil.copytree(DOCS / "deploy", folder / "docs/deploy")
        self._programs = folder / "bin"
        self._programs.mkdir()
        for name in ("docker", "kubectl"):
            self._program(name, f'echo "{name} $*" >> {self.calls}')
        self._program("vllm-kvpool", f'exec {sys.executable} -m vllm_kvpool "$@"')

    def _program(self, name: str, line: str) -> None:
        (self._programs / name).write_text(f"#!/bin/sh\n{line}\n")
        (self._programs / name).chmod(0o755)

    def run(self, lines: str) -> list[str]:
        """What was called of docker and kubectl."""
        path = f"{self._programs}:{os.environ['PATH']}"
        env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
        subprocess.run(["sh", "-euc", lines], cwd=self.folder, env=env, check=True)
        return self.calls.read_text().splitlines()


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def secret_keys(site: Site, calls: list[str]) -> dict[str, set[str]]:
    """Secret -> its keys, as `kubectl create secret generic NAME --from-file=PATH` makes them."""
    found = {}
    for call in calls:
        if "create secret generic" in call:
            *_, name, source = call.split()
            path = site.folder / source.removeprefix("--from-file=")
            found[name] = {file.name for file in path.iterdir()} if path.is_dir() else {path.name}
    return found


def test_compose_on_one_host(site: Site) -> None:
    one, _ = shell_lines("Compose")
    assert site.run(one)[-1].startswith("docker compose up")
    files = yaml.safe_load(COMPOSE.read_text())["secrets"].values()
    for secret in files:
        assert (site.folder / "docs/deploy" / secret["file"]).exists()


def test_kubernetes_secrets_hold_what_pods_mount(site: Site) -> None:
    calls = site.run(shell_lines("Kubernetes")[0])
    made = secret_keys(site, calls)
    mounted = {
        volume["secret"]["secretName"]
        for pod in pods().values()
        for volume in pod.get("volumes", [])
        if "secret" in volume
    }
    assert mounted == set(made)
    assert made["kvpool-config"] == {"pool.toml"}
    assert made["kvpool-redis"] == {"redis.conf"}
    assert made["kvpool-keys"] == {"pool.key", "pool.key_secret"}
    assert all("-n vllm" in call for call in calls if "secret" in call)
    assert calls[-1] == "kubectl apply -f docs/deploy/kubernetes"


@pytest.fixture
def running() -> Iterator[list[subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.terminate()
        assert process.wait(30) == 0
        assert process.stdout is not None
        process.stdout.close()


def changed(text: str, changes: dict[str, str]) -> str:
    return re.sub("|".join(map(re.escape, changes)), lambda found: changes[found[0]], text)


def run_here(command: Command, changes: dict[str, str]) -> list[str]:
    """`command` with other places, for a machine that is no container."""
    words = [changed(word, changes) for word in command.words[1:]]
    return [sys.executable, "-m", "vllm_kvpool", *words]


@pytest.mark.parametrize("where", ["kvpool", "compose pool"])
def test_the_daemon_starts_so(
    site: Site, shm_dir: Path, running: list[subprocess.Popen[str]], where: str
) -> None:
    """The files' own commands and the documents' own lines, with a Redis that has the password from there. Only
    places, addresses and the size are changed."""
    compose = where.startswith("compose")
    site.run(shell_lines("Compose")[1] if compose else shell_lines("Kubernetes")[0])
    made = site.folder / ("docs/deploy/secrets" if compose else "")
    server = RedisServer(shm_dir, password=(made / "redis.conf").read_text().split()[1]).start()
    config = made / "pool.toml"
    changes = {
        "/run/secrets/pool.toml": str(config), "/secrets/config/pool.toml": str(config),
        "/run/secrets/keys": str(made / "keys"), "/secrets/keys": str(made / "keys"),
        "kvpool-redis:6379": f"127.0.0.1:{server.port}", "10.0.0.9:6379": f"127.0.0.1:{server.port}",
        "0.0.0.0:7707": f"127.0.0.1:{free_port()}", "10.1.2.3:7707": f"127.0.0.1:{free_port()}",
        "/kvpool": str(shm_dir), "64GiB": "16MiB",
    }  # fmt: skip
    config.write_text(changed(config.read_text(), changes))
    (serve,) = (c for c in commands("vllm-kvpool") if c.where == where)
    probe = next(c for c in commands("vllm-kvpool") if c.where.startswith(f"{where} "))
    try:
        daemon = subprocess.Popen(run_here(serve, changes), stdout=subprocess.PIPE, text=True)
        running.append(daemon)
        assert daemon.stdout is not None
        assert "ready" in daemon.stdout.readline()
        subprocess.run(run_here(probe, changes), check=True, stdout=subprocess.DEVNULL)
        hosts = "kvpool:1:main:{hosts}"
        until(lambda: server.client.scard(hosts) == 1, "the host in the directory")
    finally:
        server.kill()
