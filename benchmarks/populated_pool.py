"""A pool daemon for one run of a script: populated before the first engine uses it, gone afterwards."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.processes import PoolDaemon
from vllm_kvpool.channel import call_daemon
from vllm_kvpool.config import parse_size
from vllm_kvpool.errors import PoolUnavailable
from vllm_kvpool.protocol import Stats, StatsReply

POOL = f"bench-{os.getpid()}"
POPULATE_TIMEOUT_S = 180.0


@contextlib.contextmanager
def pool_daemon(args: argparse.Namespace, folder: Path) -> Iterator[str]:
    """A populated pool, gone afterwards; what there is to say about it."""
    size, note = fitting_size(args.pool_size, args.shm_dir)
    daemon = PoolDaemon(folder / "daemon.log", name=POOL, size=str(size), shm_dir=args.shm_dir)
    try:
        with daemon:
            begun = time.monotonic()
            wait_populated(daemon)
            seconds = time.monotonic() - begun
            yield f"{note}pool of {size / 2**30:.0f} GiB, populated {seconds:.0f} s after its start"
    finally:
        shutil.rmtree(daemon.folder, ignore_errors=True)


def fitting_size(wanted: str, shm_dir: str) -> tuple[int, str]:
    usage = shutil.disk_usage(shm_dir)
    size = parse_size("pool-size", wanted, usage.total)
    if size <= usage.free * 0.98:
        return size, ""
    smaller = int(usage.free * 0.9)
    note = (
        f"ATTENTION: {shm_dir} has {usage.free / 2**30:.1f} GiB free, too little for a pool of {wanted}: "
        "blocks may be evicted before they are asked for. Give --shm-dir a larger tmpfs. "
    )
    print(note, flush=True)
    return smaller, note


def wait_populated(daemon: PoolDaemon) -> None:
    give_up = time.monotonic() + POPULATE_TIMEOUT_S
    while time.monotonic() < give_up and daemon.running:
        with contextlib.suppress(PoolUnavailable):
            reply = call_daemon(daemon.paths, Stats())
            assert isinstance(reply, StatsReply)
            if reply.pool["populated_slabs"] == reply.pool["num_slabs"]:
                return
            if reply.pool["prefault_error"]:
                print(f"ATTENTION: {reply.pool['prefault_error']}", flush=True)
                return
        time.sleep(0.2)
    raise daemon.fail("the pool was not populated")


def pool_log_lines(folder: Path, arm: str) -> list[str]:
    """What our own connector complained about, for the report."""
    log = folder / f"{arm}.log"
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return [line[:300] for line in lines if "KV pool:" in line][:10]
