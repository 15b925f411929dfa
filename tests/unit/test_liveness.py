"""Locks that the kernel holds: shared by an engine's processes, worth nothing once their file is
gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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
    assert 0.05 < time.monotonic() - start < 2
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
