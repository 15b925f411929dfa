"""Checks of the host, each with its fix. Those of pools are in tests/daemon/test_doctor.py."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from vllm_kvpool.pool import doctor
from vllm_kvpool.pool.files import Mount


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


@pytest.mark.parametrize(
    ("modes", "fix"), [("always [never] deny", True), ("always [advise] never", False)]
)
def test_huge_pages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, modes: str, fix: bool) -> None:
    file = tmp_path / "shmem_enabled"
    file.write_text(modes)
    monkeypatch.setattr(doctor, "SHMEM_HUGEPAGES", file)
    assert bool(doctor._hugepages().fix) == fix


def test_versions_are_named() -> None:
    message = doctor._versions().message
    assert "protocol 1" in message
