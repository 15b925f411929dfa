"""Checks of the host, each with its fix. Those of pools are in tests/daemon/test_doctor.py."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from vllm_kvpool.errors import ConfigError
from vllm_kvpool.pool import doctor
from vllm_kvpool.pool import mount as mount_module
from vllm_kvpool.pool.mount import Mount


@pytest.mark.parametrize(
    ("version", "seed", "status"),
    [
        ("0.28.0", None, "fail"),
        ("0.28.0", "random", "fail"),
        ("0.28.0", "0", "ok"),
        ("0.29.0", None, "ok"),
        ("0.32.0+cpu", None, "ok"),
        ("1.0.0", None, "ok"),
        (None, None, "ok"),
    ],
)
def test_hash_seed(
    monkeypatch: pytest.MonkeyPatch, version: str | None, seed: str | None, status: str
) -> None:
    monkeypatch.setattr(doctor, "_vllm_version", lambda: version)
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    if seed is not None:
        monkeypatch.setenv("PYTHONHASHSEED", seed)
    finding = doctor._hash_seed()
    assert finding.status == status
    assert ("export PYTHONHASHSEED=0" in finding.fix) == (status == "fail")


@pytest.mark.parametrize(("size", "status"), [(64 << 20, "fail"), (64 << 30, "ok")])
def test_shared_memory(monkeypatch: pytest.MonkeyPatch, size: int, status: str) -> None:
    monkeypatch.setattr(Mount, "of", lambda path: Mount(path, size, size))
    finding = doctor._shared_memory("/dev/shm")
    assert finding.status == status
    assert ("--shm-size" in finding.fix) == (status == "fail")


@pytest.mark.parametrize(("limit", "status"), [(8 << 20, "warn"), (-1, "ok")])
def test_locked_memory(monkeypatch: pytest.MonkeyPatch, limit: int, status: str) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    finding = doctor._memlock()
    assert finding.status == status
    assert ("ulimit -l unlimited" in finding.fix) == (status == "warn")


def test_memory_and_disks_are_told_apart(tmp_path: Path) -> None:
    assert Mount.of(Path("/dev/shm")).why_slow() == ""
    on_disk = Mount(tmp_path, 64 << 30, 64 << 30, kind="ext4")
    assert f"{tmp_path} is on ext4, not in memory" in on_disk.why_slow()
    assert "of an unknown kind" in on_disk._replace(kind="").why_slow()


def test_disk_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mount, "of", lambda path: Mount(path, 64 << 30, 64 << 30, kind="xfs"))
    finding = doctor._shared_memory("/data")
    assert finding.status == "warn"
    assert "/data is on xfs" in finding.message
    assert "/dev/shm" in finding.fix


@pytest.mark.parametrize("path", ["/proc", "/sys"])
def test_what_holds_no_files_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match="holds no files of ours: name a mounted tmpfs"):
        Mount.of(Path(path))
    finding = doctor._shared_memory(path)
    assert (finding.status, finding.fix) == ("fail", "--shm-dir: name a mounted tmpfs, as /dev/shm")


@pytest.mark.parametrize(
    ("huge", "modes", "fix"),
    [
        ("never", "always advise [never] deny force", "mount -o remount,huge=advise /shm"),
        ("never", "[always] advise never deny force", "mount -o remount,huge=advise /shm"),
        ("advise", "always advise [never] deny force", ""),
        ("never", "always advise never deny [force]", ""),
        ("always", "always advise never [deny] force", "echo never > "),
        ("always", None, ""),
    ],
)
def test_huge_pages(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, huge: str, modes: str | None, fix: str
) -> None:
    file = tmp_path / "shmem_enabled"
    if modes is not None:
        file.write_text(modes)
    monkeypatch.setattr(mount_module, "SHMEM_HUGEPAGES", file)
    monkeypatch.setattr(Mount, "of", lambda path: Mount(path, 1 << 34, 1 << 34, huge=huge))
    finding = doctor._hugepages("/shm")
    assert finding.status == "ok"
    assert bool(finding.fix) == bool(fix)
    assert fix in finding.fix
    assert ("this kernel has none" in finding.message) == (modes is None)


def test_versions_are_named() -> None:
    message = doctor._versions().message
    assert "protocol 1" in message
