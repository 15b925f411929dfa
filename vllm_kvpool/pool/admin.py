"""What `stats`, `ls` and `clear` do. A pool is found by its folder; its daemon need not run for
`ls` and `clear`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from vllm_kvpool._native import PoolFormatError, PoolView
from vllm_kvpool.advice import no_daemon, pool_folders
from vllm_kvpool.channel import call_daemon
from vllm_kvpool.clock import pool_time_ms
from vllm_kvpool.config import POOL_PREFIX, pool_dir
from vllm_kvpool.errors import ConfigError, PoolUnavailable
from vllm_kvpool.liveness import is_locked
from vllm_kvpool.paths import PoolPaths, check_folder
from vllm_kvpool.pool.files import PoolFolder, size_text
from vllm_kvpool.protocol import Clear, Cleared, Prefetch, Pulled, Stats, StatsReply
from vllm_kvpool.types import KEY_BYTES


class PoolSummary(NamedTuple):
    """One pool as its folder and its header show it."""

    name: str
    folder: str
    daemon: int | None
    """Process of the daemon; None when none runs."""
    silent_s: float | None
    """Since the daemon last wrote its heartbeat; None when none runs."""
    size: int
    resident: int
    """Bytes of the mount that the pool file takes now."""
    epoch: int
    clients: int
    namespaces: list[dict[str, Any]]
    problem: str
    """Why the pool file cannot be read; empty when it can."""


def list_pools(shm_dir: str) -> list[PoolSummary]:
    return [_summarize(folder) for folder in pool_folders(shm_dir)]


def _summarize(folder: Path) -> PoolSummary:
    paths = PoolPaths(folder)
    name = folder.name.removeprefix(POOL_PREFIX)
    empty = PoolSummary(name, str(folder), None, None, 0, 0, 0, 0, [], "")
    try:
        check_folder(folder)
        running = is_locked(paths.daemon_lock)
        resident = paths.pool.stat().st_blocks * 512
        info: dict[str, Any] = PoolView.open(str(paths.pool)).info()
    except FileNotFoundError:
        return empty._replace(problem=f"{folder} holds no pool")
    except (OSError, PoolFormatError, PoolUnavailable) as error:
        return empty._replace(problem=str(error))
    return empty._replace(
        daemon=info["pid"] if running else None,
        silent_s=max(0, pool_time_ms() - info["heartbeat_ms"]) / 1_000 if running else None,
        size=info["size"],
        resident=resident,
        epoch=info["epoch"],
        clients=info["clients"],
        namespaces=info["namespaces"],
    )


def pools_text(pools: list[PoolSummary], shm_dir: str) -> str:
    if not pools:
        return f"no pools under {shm_dir}"
    rows: list[tuple[str, ...]] = [("POOL", "SIZE", "RESIDENT", "CLIENTS", "NAMESPACES", "DAEMON")]
    for pool in pools:
        if pool.problem:
            rows.append((pool.name, "-", "-", "-", "-", pool.problem))
            continue
        numbers = (size_text(pool.size), size_text(pool.resident))
        counts = (str(pool.clients), str(len(pool.namespaces)))
        daemon = "none" if pool.daemon is None else f"process {pool.daemon}"
        rows.append((pool.name, *numbers, *counts, daemon))
    return _table(rows)


def fetch_stats(name: str, shm_dir: str, timeout_s: float = 5.0) -> dict[str, Any]:
    """PoolUnavailable, ProtocolError."""
    reply = call_daemon(_running(name, shm_dir), Stats(), timeout_s)
    assert isinstance(reply, StatsReply)
    stats: dict[str, Any] = msgspec.to_builtins(reply)
    del stats["type"], stats["id"]
    return stats


def _running(name: str, shm_dir: str) -> PoolPaths:
    paths = PoolPaths(pool_dir(name, shm_dir))
    if not is_locked(paths.daemon_lock):
        raise PoolUnavailable(no_daemon(name, shm_dir))
    return paths


def stats_text(stats: dict[str, Any]) -> str:
    parts = [_table([(key, str(value)) for key, value in stats["pool"].items()])]
    parts.append(_table([(key, str(value)) for key, value in sorted(stats["counters"].items())]))
    for kind in ("namespaces", "clients"):
        parts.extend(
            f"{kind.removesuffix('s')} {entry.pop('index')}\n" + _indent(entry)
            for entry in stats[kind]
        )
    return "\n\n".join(parts)


def _indent(entry: dict[str, Any]) -> str:
    return "\n".join(f"  {key} {value}" for key, value in entry.items())


def clear(name: str, shm_dir: str) -> str:
    """Forget the blocks of a running pool, or delete one that nobody serves. Returns what was
    done."""
    paths = PoolPaths(pool_dir(name, shm_dir))
    if not paths.folder.exists():
        raise PoolUnavailable(f"there is no pool '{name}' under {shm_dir}")
    if is_locked(paths.daemon_lock):
        reply = call_daemon(paths, Clear())
        assert isinstance(reply, Cleared)
        return f"pool '{name}': {reply.blocks} blocks forgotten"
    with PoolFolder(name, shm_dir) as folder:
        folder.remove()
    return f"pool '{name}' deleted"


def prefetch(name: str, shm_dir: str, namespace: str, keys: str, timeout_s: float) -> str:
    """Bring blocks here from other hosts. `namespace` and `keys` in hex, the keys of one chain, head
    first. Returns what was done. ConfigError, PoolUnavailable, ProtocolError."""
    request = Prefetch(
        namespace=_hex("namespace", namespace, 1),
        keys=_hex("keys", keys, None),
        within_ms=int(timeout_s * 1_000),
    )
    # The answer comes by then; the daemon itself may be slow.
    reply = call_daemon(_running(name, shm_dir), request, timeout_s + 5)
    assert isinstance(reply, Pulled)
    wanted = len(request.keys) // KEY_BYTES
    return f"{reply.blocks} of {wanted} blocks are here" + (reply.reason and f" ({reply.reason})")


def _hex(field: str, text: str, count: int | None) -> bytes:
    fix = f"give {KEY_BYTES} bytes each as {2 * KEY_BYTES} hex digits"
    try:
        raw = bytes.fromhex(text)
    except ValueError:
        raise ConfigError(field, text[:80], fix) from None
    if not raw or len(raw) % KEY_BYTES or count not in {None, len(raw) // KEY_BYTES}:
        raise ConfigError(field, text[:80], fix)
    return raw


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
