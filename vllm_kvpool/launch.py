"""`"pool": "auto"`, or `"tcp://..."`: the first engine on the host starts the daemon, and it outlives
that engine."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from vllm_kvpool.channel import call_daemon
from vllm_kvpool.clock import now_ms
from vllm_kvpool.config import Size, pool_dir
from vllm_kvpool.errors import PoolUnavailable, ProtocolError
from vllm_kvpool.liveness import is_locked, lock_file
from vllm_kvpool.paths import PoolPaths, check_folder

START_TIMEOUT_S = 15.0
_LOOK_S = 0.1
_LOG_TAIL_BYTES = 2_000


def ensure_daemon(
    name: str,
    size: Size,
    shm_dir: str,
    options: Sequence[str] = (),
    timeout_s: float = START_TIMEOUT_S,
) -> None:
    """Return when a daemon serves the pool; start one if need be, with further `options` of `serve`.
    Engines that start at once start one daemon.

    PoolUnavailable: none came up in time (the message ends with what it wrote to its log), or the
    folder is not one that we may use, or trust.
    """
    paths = PoolPaths(pool_dir(name, shm_dir))
    try:
        where = ["--name", name, "--size", str(size), "--shm-dir", str(Path(shm_dir).absolute())]
        _ensure(paths, [*where, *options], timeout_s)
    except (OSError, subprocess.SubprocessError) as error:
        raise PoolUnavailable(f"cannot start the daemon of {paths.folder}: {error}") from None


def _ensure(paths: PoolPaths, options: list[str], timeout_s: float) -> None:
    give_up_ms = now_ms() + int(timeout_s * 1_000)
    check_folder(paths.folder)
    if _answers(paths):
        return
    paths.folder.mkdir(mode=0o700, exist_ok=True)
    check_folder(paths.folder)  # somebody else may have been faster
    with _launch_lock(paths, timeout_s):
        if is_locked(paths.daemon_lock) or _answers(paths):
            _wait_for_other(paths, give_up_ms)
        else:
            _start(paths, options, give_up_ms)


@contextmanager
def _launch_lock(paths: PoolPaths, timeout_s: float) -> Iterator[None]:
    fd = lock_file(paths.launch_lock, exclusive=True, timeout_s=timeout_s)
    if fd is None:
        raise PoolUnavailable(f"another engine is still starting the pool's daemon: {paths.folder}")
    try:
        yield
    finally:
        os.close(fd)


def _answers(paths: PoolPaths) -> bool:
    if not is_locked(paths.daemon_lock):
        return False
    try:
        call_daemon(paths, timeout_s=_LOOK_S)
    except PoolUnavailable:
        return False
    except ProtocolError as error:
        raise PoolUnavailable(f"the daemon of {paths.folder} is another version: {error}") from None
    return True


def _wait_for_other(paths: PoolPaths, give_up_ms: int) -> None:
    """A daemon that somebody else started has the pool's lock: it will answer."""
    while not _answers(paths):
        if now_ms() > give_up_ms or not is_locked(paths.daemon_lock):
            raise PoolUnavailable(f"the daemon that holds {paths.daemon_lock} does not answer")
        time.sleep(_LOOK_S)


def _start(paths: PoolPaths, options: list[str], give_up_ms: int) -> None:
    with _open_log(paths) as log:
        log_start = log.seek(0, os.SEEK_END)
        ended = _spawn(options, log)
        try:
            while not _answers(paths):
                gone, _, _ = select.select([ended], [], [], _LOOK_S)
                if gone or now_ms() > give_up_ms:
                    what = "ended at once" if gone else "did not answer in time"
                    raise PoolUnavailable(f"the pool's daemon {what}: {_tail(log, log_start)}")
        finally:
            os.close(ended)


def _open_log(paths: PoolPaths) -> IO[bytes]:
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    return open(os.open(paths.daemon_log, flags, 0o600), "a+b")


def _spawn(options: list[str], log: IO[bytes]) -> int:
    """Start the daemon as nobody's child: engines that end take their children with them.

    Returns a descriptor that becomes readable when the daemon has ended (it holds the pipe's other
    end).
    """
    command = [sys.executable, "-m", "vllm_kvpool", "serve", *options]
    reading, writing = os.pipe()
    try:
        subprocess.run(
            ["/bin/sh", "-c", '"$@" &', "sh", *command],
            check=True,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(writing,),
            cwd="/",
            env={key: value for key, value in os.environ.items() if key != "NOTIFY_SOCKET"},
        )
    finally:
        os.close(writing)
    return reading


def _tail(log: IO[bytes], start: int) -> str:
    log.seek(0, os.SEEK_END)
    log.seek(max(start, log.tell() - _LOG_TAIL_BYTES))
    return log.read().decode(errors="replace").strip() or "its log is empty"
