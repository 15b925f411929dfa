"""`stats`, `ls` and `clear`, with and without a daemon."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers import WAIT_S, Daemon, connect, keys_of, run_cli, store

from vllm_kvpool.client import PoolClient
from vllm_kvpool.types import num_refs


def cli(daemon: Daemon, *arguments: str) -> Any:
    result = run_cli(*arguments, "--shm-dir", daemon.shm_dir)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout) if "--json" in arguments else result.stdout


def test_stats(daemon: Daemon, client: PoolClient) -> None:
    store(client, keys_of("chain", 5))
    stats = cli(daemon, "stats", "--name", "test", "--json")
    assert stats["counters"]["ready"] == 5
    assert stats["pool"]["size"] == 16 << 20
    assert stats["namespaces"][0]["ready"] == 5
    assert stats["clients"][0]["client_id"] == client.client_id
    text = cli(daemon, "stats", "--name", "test")
    assert "ready" in text
    assert client.client_id in text


def test_stats_without_a_daemon(shm_dir: Path) -> None:
    result = run_cli("stats", "--name", "test", "--shm-dir", shm_dir)
    assert result.returncode == 1
    expected = f"no daemon serves pool 'test' in {shm_dir} (pools here: none); start it: "
    assert f"{expected}vllm-kvpool serve --name test --shm-dir {shm_dir}\n" in result.stderr


def test_stats_of_a_kept_pool_name_the_line_that_serves_it(
    make_daemon: Callable[..., Daemon],
) -> None:
    daemon = make_daemon("--min-block", "4KiB")
    assert daemon.stop() == 0
    result = run_cli("stats", "--name", "test", "--shm-dir", daemon.shm_dir)
    assert "(its blocks are kept)" in result.stderr
    line = result.stderr.partition("start it: ")[2]
    assert line.startswith("vllm-kvpool serve --name test --size 16777216 --min-block 4096 --shm")
    daemon.command = [sys.executable, "-m", "vllm_kvpool", *shlex.split(line)[1:]]
    daemon.start()


def test_stats_of_another_name_list_the_pools(daemon: Daemon) -> None:
    result = run_cli("stats", "--name", "tset", "--shm-dir", daemon.shm_dir)
    assert "no daemon serves pool 'tset'" in result.stderr
    assert "(pools here: test)" in result.stderr


def test_stats_of_a_stopped_daemon_end(daemon: Daemon) -> None:
    daemon.pause()
    result = run_cli("stats", "--name", "test", "--shm-dir", daemon.shm_dir)
    assert result.returncode == 1
    assert "vllm-kvpool doctor" in result.stderr or "did not answer in time" in result.stderr


def test_ls(daemon: Daemon, client: PoolClient) -> None:
    store(client, keys_of("chain", 5))
    (pool,) = cli(daemon, "ls", "--json")
    assert (pool["name"], pool["daemon"], pool["clients"]) == ("test", daemon.pid, 1)
    assert pool["silent_s"] < WAIT_S
    assert f"process {daemon.pid}" in cli(daemon, "ls")
    assert daemon.stop() == 0
    (pool,) = cli(daemon, "ls", "--json")
    assert pool["daemon"] is None
    assert "none" in cli(daemon, "ls")
    daemon.start()


def test_ls_of_what_is_no_pool(shm_dir: Path) -> None:
    assert "no pools" in run_cli("ls", "--shm-dir", shm_dir).stdout
    broken = shm_dir / "vllm-kvpool-broken"
    broken.mkdir()
    (broken / "pool").write_bytes(bytes(8192))
    assert "not a pool file" in run_cli("ls", "--shm-dir", shm_dir).stdout
    (broken / "pool").unlink()
    assert f"{broken} holds no pool" in run_cli("ls", "--shm-dir", shm_dir).stdout
    broken.chmod(0o777)
    assert f"everybody may write to {broken}" in run_cli("ls", "--shm-dir", shm_dir).stdout


def test_clear_of_a_running_pool_spares_what_is_read(daemon: Daemon, client: PoolClient) -> None:
    store(client, keys_of("chain", 5))
    store(client, keys_of("read", 5))
    refs = client.match_prefix(keys_of("read", 5))
    client.lease(refs)
    cli(daemon, "clear", "--name", "test")
    assert client.match_prefix(keys_of("chain", 5)) == b""
    client.release(refs)
    store(client, keys_of("chain", 5))
    assert num_refs(client.match_prefix(keys_of("chain", 5))) == 5


def test_clear_without_a_daemon_deletes_the_pool(daemon: Daemon) -> None:
    client = connect(daemon.paths)
    store(client, keys_of("chain", 5))
    client.close()
    assert daemon.stop() == 0
    assert "deleted" in cli(daemon, "clear", "--name", "test")
    assert not daemon.paths.folder.exists()
    result = run_cli("clear", "--name", "test", "--shm-dir", daemon.shm_dir)
    assert result.returncode == 1
    assert "there is no pool 'test'" in result.stderr
