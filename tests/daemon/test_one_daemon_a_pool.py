"""A second daemon on the same pool is refused; other pools are none of its business."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

from helpers import Daemon, connect, keys_of, run_cli, serve_command, store

from vllm_kvpool.liveness import is_locked


def serve_again(daemon: Daemon) -> subprocess.CompletedProcess[str]:
    return run_cli(*serve_command(daemon.shm_dir)[3:])


def test_second_daemon_is_refused_by_name_and_process(daemon: Daemon) -> None:
    result = serve_again(daemon)
    assert result.returncode == 1
    assert f"pool 'test' is served by a daemon already (process {daemon.pid})" in result.stderr
    assert "--name" in result.stderr
    assert daemon.stats()["pool"]["pid"] == daemon.pid


def test_stopped_daemon_still_owns_the_pool(daemon: Daemon) -> None:
    daemon.pause()
    assert serve_again(daemon).returncode == 1
    daemon.resume()
    assert daemon.stats()["pool"]["epoch"] == 1


def test_who_only_looks_does_not_keep_a_daemon_from_starting(shm_dir: Path) -> None:
    """Looking takes the lock for an instant, and a machine may pause in it."""
    daemon = Daemon(shm_dir)
    daemon.paths.folder.mkdir(mode=0o700)
    looker = daemon.paths.daemon_lock.open("w")
    fcntl.flock(looker, fcntl.LOCK_SH)
    end = threading.Timer(3.0, looker.close)
    end.start()
    daemon.start()
    end.join()
    assert daemon.stop() == 0


def test_killed_daemon_leaves_the_pool_to_the_next(daemon: Daemon) -> None:
    daemon.kill()
    assert not is_locked(daemon.paths.daemon_lock)
    daemon.start()
    assert daemon.stats()["pool"]["epoch"] == 2


def test_two_pools_side_by_side(make_daemon: Callable[..., Daemon]) -> None:
    one, other = make_daemon(name="one"), make_daemon(name="other")
    assert one.stats()["pool"]["pool_id"] != other.stats()["pool"]["pool_id"]


def test_folder_of_somebody_else_is_not_trusted(shm_dir: Path) -> None:
    mine, stranger = shm_dir / "real", shm_dir / "vllm-kvpool-test"
    mine.mkdir()
    stranger.symlink_to(mine)
    result = run_cli(*serve_command(shm_dir)[3:])
    assert result.returncode == 2
    assert "is not a directory" in result.stderr
    if os.geteuid() == 0:
        stranger.unlink()
        stranger.mkdir()
        os.chown(stranger, 12345, 12345)
        result = run_cli(*serve_command(shm_dir)[3:])
        assert result.returncode == 2
        assert "belongs to user 12345" in result.stderr


def test_old_daemon_leaves_a_new_daemons_folder_alone(shm_dir: Path) -> None:
    """Somebody deleted the folder by hand and started another daemon in its place."""
    old, new = Daemon(shm_dir, "--remove").start(), Daemon(shm_dir)
    shutil.rmtree(old.paths.folder)
    new.start()
    assert old.stop() == 0
    assert "not ours any more" in new.errors()
    assert new.stats()["pool"]["pid"] == new.pid  # over its socket, which is still there
    client = connect(new.paths)
    store(client, keys_of("chain", 3))
    client.close()
    assert new.stop() == 0
    assert new.paths.pool.exists()
