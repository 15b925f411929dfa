"""Locks that the kernel holds: shared by an engine's processes, worth nothing once their file is
gone."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vllm_kvpool.liveness import ClientLock, is_held, is_locked, lock_file


def test_shared_by_many_and_exclusive_to_one(tmp_path: Path) -> None:
    path = tmp_path / "clients" / "x.lock"
    one, other = ClientLock(path), ClientLock(path)
    assert one.hold()
    assert other.hold()
    assert is_held(path)
    assert not is_locked(path)
    assert lock_file(path, exclusive=True) is None
    one.close()
    assert is_held(path)
    other.close()
    assert not is_held(path)
    fd = lock_file(path, exclusive=True)
    assert fd is not None
    assert is_locked(path)
    assert not one.hold()
    os.close(fd)
    assert one.hold()
    one.close()


def test_missing_file_and_missing_folder(tmp_path: Path) -> None:
    assert not is_held(tmp_path / "none")
    assert not is_locked(tmp_path / "none")
    assert not ClientLock(tmp_path / "no" / "such" / "folder" / "x.lock").hold()


def test_lock_on_a_replaced_file_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    lock = ClientLock(path)
    assert lock.hold()
    path.unlink()
    assert not lock.held
    path.touch()
    assert not lock.held
    assert lock.hold()
    assert lock.held
    assert is_held(path)
    lock.close()


def test_waiting_ends_in_time(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    fd = lock_file(path, exclusive=True)
    assert fd is not None
    start = time.monotonic()
    assert lock_file(path, exclusive=True, timeout_s=0.1) is None
    assert 0.05 < time.monotonic() - start < 30
    os.close(fd)


def test_death_gives_it_back_and_a_stop_does_not(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    code = (
        "import sys; from pathlib import Path; from vllm_kvpool.liveness import ClientLock;"
        f"lock = ClientLock(Path({str(path)!r})); assert lock.hold(); print(1, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        holder.send_signal(signal.SIGSTOP)
        assert is_held(path)
        holder.kill()
        holder.wait()
        assert not is_held(path)


def test_children_do_not_inherit_it(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    lock = ClientLock(path)
    assert lock.hold()
    with subprocess.Popen(["sleep", "30"], close_fds=False) as child:
        lock.close()
        assert not is_held(path)
        child.kill()


@pytest.mark.parametrize(("folder_mode", "file_mode"), [(0o2770, 0o660), (0o700, 0o600)])
def test_lock_files_are_open_to_the_folders_group_whatever_the_umask(
    tmp_path: Path, folder_mode: int, file_mode: int
) -> None:
    folder = tmp_path / "pool"
    folder.mkdir()
    if os.geteuid() == 0:
        os.chown(folder, 0, 12345)
    folder.chmod(folder_mode)
    before = os.umask(0o077)
    try:
        lock = ClientLock(folder / "clients" / "x.lock")
        assert lock.hold()
    finally:
        os.umask(before)
    there = lock.path.stat()
    assert stat.S_IMODE(there.st_mode) == file_mode
    assert stat.S_IMODE(lock.path.parent.stat().st_mode) == folder_mode
    if os.geteuid() == 0 and folder_mode & stat.S_ISGID:
        assert there.st_gid == 12345
    lock.close()
