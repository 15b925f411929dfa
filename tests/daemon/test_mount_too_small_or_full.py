"""A shared-memory mount that cannot hold the pool: refused, or used as far as it goes. Needs a
tmpfs of its own, so root or unprivileged user namespaces."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import run_cli, serve_command

from vllm_kvpool.pool.mount import hugepage_mode

UNSHARE = (
    ["unshare", "--mount"]
    if os.geteuid() == 0
    else ["unshare", "--user", "--map-root-user", "--mount"]
)


def has_namespaces() -> bool:
    try:
        return subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


needs_mount = pytest.mark.skipif(
    not has_namespaces(), reason="cannot mount a tmpfs here: neither root nor user namespaces"
)


def on_small_mount(folder: Path, script: str, size: str = "24m") -> list[str]:
    """`script` in a shell that has a tmpfs of `size` at `folder`, gone when the shell ends."""
    mount = f"mount -t tmpfs -o size={size} tmpfs {folder} && {script}"
    return [*UNSHARE, "sh", "-c", mount]


def in_mount(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        on_small_mount(folder, script), capture_output=True, text=True, timeout=30, check=False
    )


def test_pool_larger_than_the_mount(shm_dir: Path) -> None:
    result = run_cli("serve", "--shm-dir", shm_dir, "--size", "100TiB")
    assert result.returncode == 2
    for text in ("100.0 TiB do not fit", "free", "bytes", "--shm-size", "--size"):
        assert text in result.stderr
    assert list(shm_dir.iterdir()) == []


@needs_mount
def test_small_mount_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    serve = shlex.join(serve_command(tmp_path, size="64MiB"))
    result = in_mount(tmp_path, f"{serve}; status=$?; ls -A {tmp_path}; exit $status")
    assert result.returncode == 2, result.stderr
    assert "64.0 MiB do not fit" in result.stderr
    assert "24.0 MiB free of 24.0 MiB" in result.stderr
    assert result.stdout == ""


@needs_mount
def test_full_mount_is_refused(tmp_path: Path) -> None:
    serve = shlex.join(serve_command(tmp_path, size="16MiB"))
    fill = f"head -c 20M /dev/zero > {tmp_path}/other"
    result = in_mount(tmp_path, f"{fill}; {serve}")
    assert result.returncode == 2, result.stderr
    assert "4.0 MiB free of 24.0 MiB" in result.stderr


@needs_mount
def test_mount_that_fills_up_later_limits_the_pool(tmp_path: Path) -> None:
    """Somebody else takes the room that was free at the start: a sparse file of the pool cannot
    promise it."""
    check = "import sys, mount_filled_later; mount_filled_later.main(sys.argv[1])"
    script = shlex.join([sys.executable, "-c", check, str(tmp_path)])
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    process = subprocess.run(
        on_small_mount(tmp_path, script),
        env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert "is full" in process.stdout
    assert "remount,size=" in process.stdout
    assert signal.SIGBUS.name not in process.stderr


@needs_mount
@pytest.mark.skipif(hugepage_mode() in {None, "deny", "force"}, reason="not the mount decides here")
def test_huge_pages_are_missed_where_the_mount_gives_none_and_the_fix_mends_that(
    tmp_path: Path,
) -> None:
    serve = shlex.join(serve_command(tmp_path, "--hugepages", size="16MiB"))
    out = tmp_path / "out"
    script = (
        f"{{ {serve} > {out} & while ! grep ready {out}; do sleep 0.1; done; kill $!; wait $!; }}"
    )
    plain = in_mount(tmp_path, script)
    assert "ready" in plain.stdout
    assert "no huge pages for the pool" in plain.stderr
    fix = f"mount -o remount,huge=advise {tmp_path}"
    assert fix in plain.stderr
    mended = in_mount(tmp_path, f"{fix} && {script}")
    assert "ready" in mended.stdout
    assert "no huge pages" not in mended.stderr
