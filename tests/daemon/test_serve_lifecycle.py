"""From the readiness line to the clean end."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import Daemon, connect, keys_of, run_cli, store

from vllm_kvpool.pool.mount import Mount
from vllm_kvpool.types import num_refs


def test_readiness_line(daemon: Daemon) -> None:
    expected = f"vllm-kvpool: pool 'test' ready: 16.0 MiB, 0 blocks kept, {daemon.paths.endpoint}\n"
    assert daemon.ready_line == expected


def test_sigterm_keeps_the_blocks(daemon: Daemon) -> None:
    client = connect(daemon.paths)
    store(client, keys_of("chain", 5))
    client.close()
    assert daemon.stop() == 0
    assert "pool 'test' kept, 5 blocks" in daemon.errors()
    daemon.start()
    assert "5 blocks kept" in daemon.ready_line
    again = connect(daemon.paths)
    assert num_refs(again.match_prefix(keys_of("chain", 5))) == 5
    again.close()


def test_sigint_ends_cleanly_too(daemon: Daemon) -> None:
    assert daemon.stop(signal.SIGINT) == 0
    assert daemon.paths.pool.exists()


def test_remove_deletes_the_pool(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon("--remove")
    assert daemon.paths.pool.exists()
    assert daemon.stop() == 0
    assert not daemon.paths.folder.exists()
    assert "pool 'test' removed, with 0 blocks" in daemon.errors()


def test_deleted_pool_is_not_said_to_be_kept(daemon: Daemon) -> None:
    daemon.paths.pool.unlink()
    assert daemon.stop() == 0
    assert "kept" not in daemon.errors()


def test_disk_is_warned_of(tmp_path: Path, make_daemon: Callable[..., Daemon]) -> None:
    if Mount.of(tmp_path).kind == "tmpfs":
        pytest.skip("no folder on a disk here")
    daemon = Daemon(tmp_path).start()
    assert daemon.stop() == 0
    assert f"{tmp_path} is on" in daemon.errors()
    assert "not in memory" in daemon.errors()
    assert "not in memory" not in make_daemon().errors()


def test_files_are_private_unless_shared_with_the_group(make_daemon: Callable[..., Daemon]) -> None:
    def modes(daemon: Daemon) -> tuple[int, int]:
        paths = daemon.paths
        return paths.folder.stat().st_mode & 0o7777, paths.pool.stat().st_mode & 0o777

    assert modes(make_daemon(name="private")) == (0o700, 0o600)
    assert modes(make_daemon("--group-access", name="shared")) == (0o2770, 0o660)


def test_config_file_with_the_command_line_winning(
    shm_dir: Path, make_daemon: Callable[..., Daemon]
) -> None:
    config = shm_dir / "pool.toml"
    config.write_text('name = "other"\nmin-block = "4KiB"\nremove = true\n')
    daemon = make_daemon("--config", str(config), "--no-remove")
    pool = daemon.stats()["pool"]
    assert (pool["name"], pool["min_slot_bytes"]) == ("test", 4096)
    assert daemon.stop() == 0
    assert daemon.paths.pool.exists()


def test_systemd_is_told(
    shm_dir: Path, make_daemon: Callable[..., Daemon], monkeypatch: object
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(shm_dir / "notify"))
        manager.settimeout(30)
        monkeypatch.setenv("NOTIFY_SOCKET", str(shm_dir / "notify"))  # type: ignore[attr-defined]
        daemon = make_daemon()
        assert manager.recv(100) == b"READY=1"
        assert daemon.stop() == 0
        assert manager.recv(100) == b"STOPPING=1"


@pytest.mark.parametrize("options", [[], ["--remove"]])
def test_damaged_pool_is_an_error_at_the_end(
    make_daemon: Callable[..., Daemon], options: list[str]
) -> None:
    daemon = make_daemon(*options)
    client = connect(daemon.paths)
    store(client, keys_of("chain", 3))
    raw = daemon.paths.pool.read_bytes()
    # The third slot header's key, wherever this format keeps it.
    at = raw.index(keys_of("chain", 3)[64:])
    with daemon.paths.pool.open("r+b") as file:
        file.seek(at)
        file.write(b"\xff" * 32)
    client.close()
    assert daemon.stop() == 1
    assert "damaged" in daemon.errors()
    assert daemon.paths.folder.exists() == (not options)


def test_version_and_help() -> None:
    assert run_cli("--version").stdout.strip()
    help_text = run_cli("serve", "--help").stdout
    assert "--min-block" in help_text
    assert run_cli().returncode == 2
