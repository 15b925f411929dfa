"""`doctor` finds what is wrong with pools, and its fixes are lines that work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import SLOT_BYTES, WAIT_S, Daemon, EngineProcess, connect, run_cli, until

from vllm_kvpool.client import PoolClient
from vllm_kvpool.keys import namespace_digest
from vllm_kvpool.pool import doctor
from vllm_kvpool.protocol import Namespace


def findings(shm_dir: Path) -> dict[str, doctor.Finding]:
    return {finding.check: finding for finding in doctor.examine(str(shm_dir))}


def test_healthy_pool(daemon: Daemon, client: PoolClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SILENT_S", WAIT_S)
    assert client.connected
    finding = findings(daemon.shm_dir)["pool 'test'"]
    assert (finding.status, finding.message) == ("ok", "16.0 MiB, 0 blocks, 1 clients")


def test_pool_without_a_daemon(daemon: Daemon) -> None:
    assert daemon.stop() == 0
    finding = findings(daemon.shm_dir)["pool 'test'"]
    assert finding.status == "warn"
    where = f"--shm-dir {daemon.shm_dir}"
    assert f"vllm-kvpool serve --name test --size 16777216 {where};" in finding.fix
    assert finding.fix.endswith(f"vllm-kvpool clear --name test {where}")
    daemon.start()


def test_folders_that_hold_no_pool_or_are_not_to_be_trusted(shm_dir: Path) -> None:
    folder = shm_dir / "vllm-kvpool-odd"
    folder.mkdir()
    finding = findings(shm_dir)["pool 'odd'"]
    assert (finding.status, finding.message) == ("fail", f"{folder} holds no pool")
    assert finding.fix == f"delete it: vllm-kvpool clear --name odd --shm-dir {shm_dir}"
    folder.chmod(0o777)
    finding = findings(shm_dir)["pool 'odd'"]
    assert f"everybody may write to {folder}" in finding.message
    assert finding.fix.endswith(f"rm -r {folder}")


def test_silent_daemon(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SILENT_S", 1.0)
    daemon.pause()
    until(lambda: findings(daemon.shm_dir)["pool 'test'"].status == "fail", "the silence")
    assert f"kill -CONT {daemon.pid}" in findings(daemon.shm_dir)["pool 'test'"].fix


def test_lock_files_of_the_dead(daemon: Daemon, make_engine: Callable[..., EngineProcess]) -> None:
    engine = make_engine()
    daemon.kill()
    engine.end()
    finding = findings(daemon.shm_dir)["pool 'test' clients"]
    assert (finding.status, finding.message[:9]) == ("warn", "1 engines")
    daemon.start()
    until(lambda: "pool 'test' clients" not in findings(daemon.shm_dir))


def namespace(**fields: str) -> Namespace:
    fields = {"config": "llama", "weights": "v1", "vllm": "0.32"} | fields
    return Namespace(digest=namespace_digest(fields), slot_bytes=SLOT_BYTES, fields=fields)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ({"vllm": "0.33"}, "they differ in vllm: 0.32 / 0.33"),
        ({"weights": "v2"}, None),
        ({"config": "qwen", "vllm": "0.33"}, None),
    ],
)
def test_namespaces_of_one_model(
    daemon: Daemon, other: dict[str, str], expected: str | None
) -> None:
    clients = [connect(daemon.paths, namespace()), connect(daemon.paths, namespace(**other))]
    finding = findings(daemon.shm_dir).get("pool 'test' namespaces")
    for client in clients:
        client.close()
    if expected is None:
        assert finding is None
    else:
        assert finding is not None
        assert expected in finding.message


def test_exit_status_and_json(daemon: Daemon) -> None:
    result = run_cli("doctor", "--json", "--shm-dir", daemon.shm_dir)
    found = json.loads(result.stdout)
    assert {"check", "status", "message", "fix"} == set(found[0])
    assert result.returncode == any(finding["status"] == "fail" for finding in found)
    assert "fix:" in run_cli("doctor", "--shm-dir", "/no/such/mount").stdout
    assert run_cli("doctor", "--shm-dir", "/no/such/mount").returncode == 1
