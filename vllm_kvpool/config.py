"""Configuration: frozen, small, strict. An unknown key or an unusable value is a `ConfigError`
naming the fix.

`PoolConfig` is what `vllm-kvpool serve` takes (options and TOML keys have these names, with dashes
or underscores); `ConnectorConfig` is vLLM's `kv_connector_extra_config`. `docs/configuration.md`
lists every field.
"""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Any, Literal, Self

import msgspec

from vllm_kvpool.errors import ConfigError

DEFAULT_POOL = "default"
SHM_DIR = "/dev/shm"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TCP = re.compile(r"tcp://(\*|\[[0-9a-fA-F:.%\w]+\]|[^\[\]:/*\s]+):(\d{1,5})")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|KiB|MiB|GiB|TiB|KB|MB|GB|TB|%)?")
_UNIT_BYTES = {
    None: 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
}  # fmt: skip


def parse_size(field: str, text: str | int, whole_bytes: int) -> int:
    """Bytes of `"64GiB"`, `"80%"` (of `whole_bytes`) or a plain number."""
    match = _SIZE.fullmatch(str(text).strip())
    if match is None:
        raise ConfigError(
            field, text, 'give a size like "64GiB", "500MiB" or a share of the mount like "80%"'
        )
    number, unit = float(match[1]), match[2]
    if unit == "%":
        if not 0 < number <= 100:
            raise ConfigError(field, text, "a share lies above 0% and is at most 100%")
        return int(whole_bytes * number / 100)
    if number <= 0:
        raise ConfigError(field, text, "a size is larger than 0")
    return int(number * _UNIT_BYTES[unit])


def check_pool_name(field: str, name: str) -> str:
    if _NAME.fullmatch(name) is None:
        fix = "use letters, digits, '.', '_' and '-' only (it names a folder; at most 64, no slash)"
        raise ConfigError(field, name, fix)
    return name


def _tcp_host(field: str, endpoint: str) -> str:
    match = _TCP.fullmatch(endpoint)
    if match is None:
        fix = (
            "give tcp://address:port (an IPv6 address in brackets); --listen takes ipc://path, too"
        )
        raise ConfigError(field, endpoint, fix)
    return match[1].strip("[]")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str) -> Self:
        """Build from plain values; `where` names the source in errors (a file, a vLLM option)."""
        known = cls.__struct_fields__
        for key, value in values.items():
            if key not in known:
                raise ConfigError(
                    f"{where}: {key}", value, f"unknown key; known are {', '.join(known)}"
                )
        for key, value in values.items():
            try:
                msgspec.convert({key: value}, cls)
            except msgspec.ValidationError as error:
                raise ConfigError(f"{where}: {key}", value, str(error)) from None
        return msgspec.convert(values, cls)


class PoolConfig(_Config, frozen=True, kw_only=True):
    """One pool daemon."""

    name: str = DEFAULT_POOL
    """Names the pool: its folder is `<shm-dir>/vllm-kvpool-<name>`."""
    size: str = "50%"
    """Bytes of shared memory, or a share of the mount."""
    listen: str = ""
    """A further ZeroMQ endpoint: `tcp://address:port` for other hosts, `ipc://path` for tools."""
    advertise: str = ""
    """How other hosts reach `listen`, where they know it by another address."""
    keys: str = ""
    """Folder of CURVE keys (`vllm-kvpool keygen`): our own, and those of hosts that may connect."""
    insecure: bool = False
    """Let other hosts connect without keys, to any address."""
    directory: str = ""
    """URL of the Redis or Valkey in which hosts find each other's blocks."""
    shm_dir: str = SHM_DIR
    """The shared-memory mount."""
    hugepages: bool = False
    """Back the pool with transparent huge pages."""
    numa: str = ""
    """NUMA nodes, as in "0" (bind) or "0,1" (interleave); empty leaves it to the kernel."""
    min_block: str = "64KiB"
    """The smallest block to be expected; the index is sized for a pool full of them."""
    group_access: bool = False
    """Let the group of the daemon's user share the pool (mode 0660 instead of 0600)."""
    remove: bool = False
    """Delete the pool at a clean end instead of keeping it for the next start."""

    def __post_init__(self) -> None:
        check_pool_name("name", self.name)
        parse_size("size", self.size, 1 << 40)
        parse_size("min_block", self.min_block, 1 << 20)
        if self.numa and re.fullmatch(r"\d+(,\d+)*", self.numa) is None:
            raise ConfigError("numa", self.numa, 'list node numbers, as in "0" or "0,1"')
        if self.advertise:
            _tcp_host("advertise", self.advertise)
        if self.listen and not self.listen.startswith("ipc://"):
            _tcp_host("listen", self.listen)

    def check_access(self) -> None:
        """ConfigError: other hosts could not find this one, or anybody could read from it. Looks at
        several fields, so it is for a whole configuration only."""
        if not self.listen.startswith("tcp://"):
            return
        host = _tcp_host("listen", self.listen)
        if self.directory and host in {"*", "0.0.0.0", "::"} and not self.advertise:
            fix = "other hosts cannot find it so: name an address here, or with --advertise"
            raise ConfigError("listen", self.listen, fix)
        if not (self.keys or self.insecure or _is_loopback(host)):
            fix = (
                "anybody could read the blocks: give --keys (vllm-kvpool keygen makes them), or say "
                "--insecure where only hosts that you trust reach this address"
            )
            raise ConfigError("listen", self.listen, fix)

    @property
    def has_exchange(self) -> bool:
        """Whether the daemon talks to other hosts."""
        return bool(self.directory) or self.listen.startswith("tcp://")


class ConnectorConfig(_Config, frozen=True, kw_only=True):
    """`kv_connector_extra_config` of one engine."""

    pool: str = "auto"
    """Name of the pool to use; "auto" uses pool "default" and starts its daemon when none runs."""
    size: str = "50%"
    """Size of the pool when "auto" has to make it."""
    shm_dir: str = SHM_DIR
    """The shared-memory mount of the pool."""
    min_load_tokens: int = 256
    """Compute prefixes again when fewer tokens than this would be loaded."""
    min_store_tokens: int = 0
    """Store nothing of requests whose prompt is shorter."""
    store: Literal["all", "prompt"] = "all"
    """Store prompt and generated blocks, or the prompt's only."""
    min_remote_tokens: int = 1_024
    """Compute prefixes again when another host has fewer tokens more than this pool."""
    pull_deadline_ms: int = 500
    """A request waits at most so long for blocks of another host."""
    prefill_tokens_per_s: int = 10_000
    """How fast this engine computes prompts: blocks of another host come only if they come faster."""
    load_deadline_ms: int = 2_000
    """When no copy ends for so long, loads are stopped and their blocks are computed again."""
    checksum: Literal["off", "sampled", "all"] = "sampled"
    """Which blocks carry a payload checksum: none, one in 16 (chosen by key), or all."""
    epoch: str = ""
    """Part of the namespace: change it to stop sharing with blocks stored before (new weights, same
    path)."""

    def __post_init__(self) -> None:
        check_pool_name("pool", self.pool)
        parse_size("size", self.size, 1 << 40)
        for field in ("min_load_tokens", "min_store_tokens", "min_remote_tokens"):
            if getattr(self, field) < 0:
                raise ConfigError(field, getattr(self, field), "give 0 or more tokens")
        if self.load_deadline_ms <= 0:
            raise ConfigError("load_deadline_ms", self.load_deadline_ms, "give a time above 0")
        if self.pull_deadline_ms < 0:
            fix = "give 0 or more milliseconds; 0: never wait for other hosts"
            raise ConfigError("pull_deadline_ms", self.pull_deadline_ms, fix)
        if self.prefill_tokens_per_s <= 0:
            raise ConfigError(
                "prefill_tokens_per_s", self.prefill_tokens_per_s, "give a rate above 0"
            )

    @property
    def pool_name(self) -> str:
        return DEFAULT_POOL if self.pool == "auto" else self.pool


def pool_dir(name: str, shm_dir: str = SHM_DIR) -> Path:
    """Folder of a pool: `pool` (memory), `daemon.lock`, `control.sock`, `clients/`."""
    return Path(shm_dir) / f"vllm-kvpool-{check_pool_name('name', name)}"
