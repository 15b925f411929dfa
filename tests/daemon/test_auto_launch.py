"""`"pool": "auto"`: engines that start at once start one daemon, and it outlives them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import connect, keys_of, store, until

from vllm_kvpool.config import pool_dir
from vllm_kvpool.errors import PoolUnavailable
from vllm_kvpool.launch import ensure_daemon
from vllm_kvpool.liveness import is_locked
from vllm_kvpool.paths import PoolPaths
from vllm_kvpool.pool.admin import fetch_stats


@pytest.fixture
def paths(shm_dir: Path) -> Iterator[PoolPaths]:
    paths = PoolPaths(pool_dir("launched", str(shm_dir)))
    yield paths
    if is_locked(paths.daemon_lock):
        pid = int(paths.daemon_lock.read_text())
        os.kill(pid, signal.SIGCONT)
        os.kill(pid, signal.SIGTERM)
        until(lambda: not is_locked(paths.daemon_lock))
    assert "damaged" not in paths.daemon_log.read_text()


def launch(shm_dir: Path) -> subprocess.Popen[str]:
    call = f"ensure_daemon('launched', '16MiB', {str(shm_dir)!r})"
    code = f"from vllm_kvpool.launch import ensure_daemon; {call}"
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)


def test_first_engine_starts_it_and_the_next_uses_it(shm_dir: Path, paths: PoolPaths) -> None:
    ensure_daemon("launched", "16MiB", str(shm_dir))
    pid = fetch_stats("launched", str(shm_dir))["pool"]["pid"]
    ensure_daemon("launched", "16MiB", str(shm_dir))
    assert fetch_stats("launched", str(shm_dir))["pool"]["pid"] == pid
    client = connect(paths)
    store(client, keys_of("chain", 1))
    client.close()
    assert "ready" in paths.daemon_log.read_text()


def test_engines_at_once_start_one_daemon(shm_dir: Path, paths: PoolPaths) -> None:
    engines = [launch(shm_dir) for _ in range(4)]
    for engine in engines:
        _, errors = engine.communicate(timeout=60)
        assert engine.returncode == 0, errors
    assert paths.daemon_log.read_text().count("ready") == 1


def test_daemon_is_nobodys_child(shm_dir: Path, paths: PoolPaths) -> None:
    """vLLM ends its children, and theirs, when it ends."""
    engine = launch(shm_dir)
    engine.communicate(timeout=60)
    pid = fetch_stats("launched", str(shm_dir))["pool"]["pid"]
    status = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    parent, session = int(status[1]), int(status[3])
    assert parent not in {engine.pid, os.getpid()}
    assert session != os.getsid(0)


def test_failure_ends_with_what_the_daemon_said(shm_dir: Path, paths: PoolPaths) -> None:
    start = time.monotonic()
    with pytest.raises(PoolUnavailable, match=r"ended at once: .*100\.0 TiB do not fit"):
        ensure_daemon("launched", "100TiB", str(shm_dir), timeout_s=120)
    assert time.monotonic() - start < 60, "not only when the time was up"
    assert not paths.pool.exists()


def test_hanging_daemon_is_given_up(shm_dir: Path, paths: PoolPaths) -> None:
    ensure_daemon("launched", "16MiB", str(shm_dir))
    os.kill(int(paths.daemon_lock.read_text()), signal.SIGSTOP)
    with pytest.raises(PoolUnavailable, match="does not answer"):
        ensure_daemon("launched", "16MiB", str(shm_dir), timeout_s=1.0)


def test_folder_of_a_stranger_is_not_used(shm_dir: Path) -> None:
    target = shm_dir / "real"
    target.mkdir()
    pool_dir("launched", str(shm_dir)).symlink_to(target)
    with pytest.raises(PoolUnavailable, match="is not a directory"):
        ensure_daemon("launched", "16MiB", str(shm_dir))
    assert list(target.iterdir()) == []


def test_what_the_system_refuses_is_no_pool(shm_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("vllm_kvpool.launch.is_locked", refuse)
    with pytest.raises(PoolUnavailable, match="Permission denied"):
        ensure_daemon("launched", "16MiB", str(shm_dir))


def test_log_is_not_written_through_a_link(shm_dir: Path) -> None:
    precious = shm_dir / "precious"
    precious.write_text("text")
    folder = PoolPaths(pool_dir("launched", str(shm_dir)))
    folder.folder.mkdir(mode=0o700)
    folder.daemon_log.symlink_to(precious)
    with pytest.raises(PoolUnavailable, match="cannot start"):
        ensure_daemon("launched", "16MiB", str(shm_dir))
    assert precious.read_text() == "text"
