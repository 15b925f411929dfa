"""An existing pool of another size or format: refused with the two ways out, and both work."""

from __future__ import annotations

from pathlib import Path

from helpers import Daemon, connect, keys_of, run_cli, serve_command, store


def filled_pool(daemon: Daemon) -> None:
    client = connect(daemon.paths)
    store(client, keys_of("chain", 7))
    client.close()
    assert daemon.stop() == 0


def test_other_size_names_both_ways_out(daemon: Daemon) -> None:
    filled_pool(daemon)
    result = run_cli(*serve_command(daemon.shm_dir, size="20MiB")[3:])
    assert result.returncode == 2
    assert "Keep its 7 blocks with --size 16777216" in result.stderr
    assert "vllm-kvpool clear --name test" in result.stderr

    daemon.start()  # the first way
    assert "7 blocks kept" in daemon.ready_line
    assert daemon.stop() == 0

    cleared = run_cli("clear", "--name", "test", "--shm-dir", daemon.shm_dir)  # the second
    assert cleared.returncode == 0
    bigger = Daemon(daemon.shm_dir, size="20MiB").start()
    assert "20.0 MiB, 0 blocks kept" in bigger.ready_line
    assert bigger.stop() == 0


def test_share_says_of_what(daemon: Daemon) -> None:
    filled_pool(daemon)
    result = run_cli(*serve_command(daemon.shm_dir, size="0.1%")[3:])
    assert result.returncode == 2
    assert f"(0.1% of {daemon.shm_dir}). Keep its 7 blocks with --size 16777216" in result.stderr


def test_other_smallest_block(daemon: Daemon) -> None:
    filled_pool(daemon)
    result = run_cli(*serve_command(daemon.shm_dir, "--min-block", "4KiB")[3:])
    assert result.returncode == 2
    assert "Keep its 7 blocks with --min-block 65536" in result.stderr


def change_header(pool: Path, offset: int, value: bytes) -> None:
    with pool.open("r+b") as file:
        file.seek(offset)
        file.write(value)


def test_other_format(daemon: Daemon) -> None:
    filled_pool(daemon)
    change_header(daemon.paths.pool, 8, (77).to_bytes(4, "little"))
    result = run_cli(*serve_command(daemon.shm_dir)[3:])
    assert result.returncode == 2
    assert "format version 77" in result.stderr
    assert "Start the vllm-kvpool that made it" in result.stderr
    assert "vllm-kvpool clear --name test" in result.stderr
    change_header(daemon.paths.pool, 8, (1).to_bytes(4, "little"))
    daemon.start()
    assert "7 blocks kept" in daemon.ready_line


def test_file_that_is_no_pool(daemon: Daemon) -> None:
    assert daemon.stop() == 0
    daemon.paths.pool.write_bytes(b"something else")
    result = run_cli(*serve_command(daemon.shm_dir)[3:])
    assert result.returncode == 2
    assert "not a pool file" in result.stderr
