"""Configuration: frozen, small, strict. An unknown key or an unusable value is a `ConfigError`
naming the fix.

`PoolConfig` is what `vllm-kvpool serve` takes (options and TOML keys have these names, with dashes
or underscores); `RouterConfig` is the same for `vllm-kvpool route`; `ConnectorConfig` is vLLM's
`kv_connector_extra_config`. `docs/configuration.md` lists every field.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import re
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_origin

import msgspec

from vllm_kvpool.errors import ConfigError

DEFAULT_POOL = "default"
SHM_DIR = "/dev/shm"
HALF, RING_SIZE = "50%", "2GiB"
POOL_PREFIX = "vllm-kvpool-"
"""Of the name of a pool's folder."""
AUTO = "auto"
"""What engines write for the pool `DEFAULT_POOL` with a daemon that they start: no pool's name."""
REMOTE = "tcp://"
"""What begins the address of another host's pool, where engines may write a pool's name."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TCP = re.compile(r"tcp://(\*|\[[0-9a-fA-F:.%\w]+\]|[^\[\]:/*\s]+):(\d{1,5})")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|KiB|MiB|GiB|TiB|KB|MB|GB|TB|%)?")
_LISTEN = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):(\d{1,5})")
_UNIT_BYTES = {
    None: 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
}  # fmt: skip

Size = str | int
"""Text, or plain bytes."""
SIZE_FIX = 'give a size like "64GiB" or "500MiB", or plain bytes'
SHARE_FIX = f'{SIZE_FIX}, or a share of the mount like "80%"'


def parse_size(field: str, text: Size, whole_bytes: int | None = None) -> int:
    """Bytes of `"64GiB"`, `"80%"` (of `whole_bytes`; None: it is no share of anything) or a plain
    number."""
    match = _SIZE.fullmatch(str(text).strip())
    if match is None or (match[2] == "%" and whole_bytes is None):
        raise ConfigError(field, text, SIZE_FIX if whole_bytes is None else SHARE_FIX)
    number, unit = float(match[1]), match[2]
    if unit == "%":
        assert whole_bytes is not None
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
    if name == AUTO:
        fix = f'engines mean pool "{DEFAULT_POOL}" by "{AUTO}": take that name, or another'
        raise ConfigError(field, name, fix)
    return name


def _what_to_write(kind: Any, value: object) -> str:
    """For a field of type `kind`, to whoever wrote `value`. Empty: msgspec's words have to do."""
    if get_origin(kind) is Literal:
        *others, last = (f'"{allowed}"' for allowed in get_args(kind))
        return f"write {', '.join(others)} or {last}"
    if kind is str and isinstance(value, bool | int | float):
        return f'write it in quotes: "{json.dumps(value)}"'
    return _TO_WRITE.get(kind, "")


_TO_WRITE: dict[Any, str] = {
    bool: "write true or false",
    int: "write a whole number",
    float: "write a number",
    str: "write text in quotes",
    Size: SIZE_FIX,
}


def _tcp_host(field: str, endpoint: str) -> str:
    match = _TCP.fullmatch(endpoint)
    if match is None:
        fix = (
            "give tcp://address:port (an IPv6 address in brackets); --listen takes ipc://path, too"
        )
        raise ConfigError(field, endpoint, fix)
    return match[1].strip("[]")


def _check_remote(field: str, address: str) -> None:
    """ConfigError: nothing can be connected to."""
    match = _TCP.fullmatch(address)
    if match is None or match[1] == "*" or not 0 < int(match[2]) < 65_536:
        fix = "give tcp://host:port (an IPv6 address in brackets): where that pool's daemon listens"
        raise ConfigError(field, address, fix)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str) -> Self:
        """Build from plain values; `where` names the source in errors (a file, a vLLM option)."""
        known = {field.name: field.type for field in msgspec.structs.fields(cls)}
        for key, value in values.items():
            if key not in known:
                raise ConfigError(
                    f"{where}: {key}", value, f"unknown key; known are {', '.join(known)}"
                )
        for key, value in values.items():
            try:
                msgspec.convert({key: value}, cls)
            except msgspec.ValidationError as error:
                fix = _what_to_write(known[key], value) or str(error)
                raise ConfigError(f"{where}: {key}", value, fix) from None
        return msgspec.convert(values, cls)


class PoolConfig(_Config, frozen=True, kw_only=True):
    """One pool daemon."""

    name: str = DEFAULT_POOL
    """Names the pool: its folder is `<shm-dir>/vllm-kvpool-<name>`."""
    size: Size = "50%"
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
    upstream: str = ""
    """`tcp://host:port` of the pool that this one stands in front of."""
    shm_dir: str = SHM_DIR
    """The shared-memory mount."""
    hugepages: bool = False
    """Back the pool with transparent huge pages."""
    numa: str = ""
    """NUMA nodes, as in "0" (bind) or "0,1" (interleave); empty leaves it to the kernel."""
    min_block: Size = "64KiB"
    """The smallest block to be expected; the index is sized for a pool full of them."""
    group_access: bool = False
    """Let the group of the daemon's user share the pool (mode 0660 instead of 0600)."""
    remove: bool = False
    """Delete the pool at a clean end instead of keeping it for the next start."""

    def __post_init__(self) -> None:
        check_pool_name("name", self.name)
        parse_size("size", self.size, 1 << 40)
        parse_size("min_block", self.min_block)
        if self.numa and re.fullmatch(r"\d+(,\d+)*", self.numa) is None:
            raise ConfigError("numa", self.numa, 'list node numbers, as in "0" or "0,1"')
        if self.advertise and _tcp_host("advertise", self.advertise) == "*":
            raise ConfigError("advertise", self.advertise, "name the address that other hosts use")
        if self.listen and not self.listen.startswith("ipc://"):
            _tcp_host("listen", self.listen)
        if self.upstream:
            _check_remote("upstream", self.upstream)

    def check_access(self) -> None:
        """ConfigError: other hosts could not find this one, or anybody could read from it. Looks at
        several fields, so it is for a whole configuration only."""
        if self.upstream and self.directory:
            fix = "a pool asks its upstream or a directory of many hosts: leave one of them out"
            raise ConfigError("upstream", self.upstream, fix)
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
        return bool(self.directory or self.upstream) or self.listen.startswith("tcp://")


class ConnectorConfig(_Config, frozen=True, kw_only=True):
    """`kv_connector_extra_config` of one engine."""

    pool: str = AUTO
    """Name of the pool to use; "auto" uses pool "default" and starts its daemon when none runs;
    `tcp://host:port` uses that host's, through a small pool in front of it that is started so."""
    size: Size = ""
    """Of the pool that is started; empty: half of the mount with "auto", 2 GiB before a remote one."""
    shm_dir: str = SHM_DIR
    """The shared-memory mount of the pool."""
    keys: str = ""
    """Folder of CURVE keys for a remote pool: our own, and the pool's as `upstream.key`."""
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
    """Which blocks carry a payload checksum: none, one in 64 (chosen by key), or all."""
    epoch: str = ""
    """A word in the namespace (not the pool's epoch): change it to stop sharing with blocks stored
    before (new weights, same path)."""

    def __post_init__(self) -> None:
        if ":" in self.pool:
            _check_remote("pool", self.pool)
        check_pool_name("pool", self.pool_name)
        parse_size("size", self.pool_size, 1 << 40)
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

    def check_keys(self) -> None:
        """ConfigError: keys for nothing. Looks at several fields, so it is for a whole configuration
        only."""
        if self.keys and not self.upstream:
            fix = 'they are for a pool of another host, "pool": "tcp://host:port": leave them out'
            raise ConfigError("keys", self.keys, fix)

    @property
    def upstream(self) -> str:
        """Address of the remote pool; empty: the pool is this host's."""
        return self.pool if self.pool.startswith(REMOTE) else ""

    @property
    def starts_daemon(self) -> bool:
        return self.pool == AUTO or bool(self.upstream)

    @property
    def pool_name(self) -> str:
        """Of the pool on this host."""
        if self.upstream:
            return _name_before(self.upstream)
        return DEFAULT_POOL if self.pool == AUTO else self.pool

    @property
    def pool_size(self) -> Size:
        return self.size or (RING_SIZE if self.upstream else HALF)


def _name_before(address: str) -> str:
    """Of the pool in front of the one at `address`: equal for all engines of a host that use it."""
    name = "to-" + re.sub(r"[^A-Za-z0-9._]", "-", address.removeprefix(REMOTE))
    if len(name) <= 48:  # the path of the daemon's socket has an end
        return name
    return f"{name[:39]}-{hashlib.sha256(address.encode()).hexdigest()[:8]}"


class RouterConfig(_Config, frozen=True, kw_only=True):
    """One router."""

    replicas: tuple[str, ...] = ()
    """`[name=]http://host:port[@rank]`, or `dns://host:port` for all addresses of a name."""
    fleet: str = ""
    """TOML file with further `replicas`, read again when it changes."""
    policy: str = "task"
    """How a replica is chosen: `docs/routing.md`."""
    kv_events: str = ""
    """Ports at the replicas' hosts of KV events and of their replay, as in "5557,6557": policy
    `kv_events` follows them."""
    listen: str = "127.0.0.1:8080"
    """Where clients connect."""
    admin: str = "127.0.0.1:8081"
    """Where `vllm-kvpool fleet` does; empty: nowhere. Whoever reaches it may change the fleet."""
    workers: int = 1
    """Processes that share `listen`."""
    max_body: str = "32MiB"
    """Larger request bodies are refused (413)."""
    client_timeout_s: float = 75.0
    """A client that takes so long over a head, sends or takes nothing for so long, is left."""
    connect_timeout_s: float = 2.0
    """A replica that takes longer to accept a connection, or to answer a probe, is not well."""
    response_timeout_s: float = 600.0
    """A replica that sends nothing for so long is given up (504)."""
    retry_share: float = 0.2
    """Retries are at most this share of all requests; 0: none."""
    probe_interval_s: float = 2.0
    """Between two looks at a replica's /health and /metrics, at the fleet file and at DNS."""
    warmup_s: float = 30.0
    """A replica that comes, or comes back, gets its full share after so long."""
    drain_s: float = 300.0
    """A replica that drains keeps its sessions for so long; also how long a router that ends waits."""

    def __post_init__(self) -> None:
        if parse_size("max_body", self.max_body, 0) <= 0:
            raise ConfigError("max_body", self.max_body, 'give a size like "32MiB"')
        parse_listen("listen", self.listen)
        if self.kv_events:
            parse_ports("kv_events", self.kv_events)
        if self.admin:
            parse_listen("admin", self.admin)
        if self.workers < 1:
            raise ConfigError("workers", self.workers, "give 1 or more processes")
        for field in ("retry_share", "warmup_s", "drain_s"):
            if not 0 <= getattr(self, field) < float("inf"):
                raise ConfigError(field, getattr(self, field), "give 0 or more")
        for field in _TIMES:
            if not 0 < getattr(self, field) < float("inf"):
                raise ConfigError(field, getattr(self, field), "give a time above 0")

    @property
    def pause_scale(self) -> float:
        """Of what is waited before a replica that failed is tried again: the default interval's pauses
        would be long ones to a router that looks more often."""
        return min(1.0, self.probe_interval_s / 2.0)


_TIMES = ("client_timeout_s", "connect_timeout_s", "response_timeout_s", "probe_interval_s")


def parse_ports(field: str, text: str) -> tuple[int, int]:
    """Two of them, as in "5557,6557"."""
    match = re.fullmatch(r"(\d{1,5}),(\d{1,5})", text)
    ports = (int(match[1]), int(match[2])) if match else (0, 0)
    if not all(0 < port < 65_536 for port in ports):
        raise ConfigError(field, text, 'give the ports of events and of their replay: "5557,6557"')
    return ports


def parse_listen(field: str, text: str) -> tuple[str, int]:
    """Host and port of `"127.0.0.1:8080"` or `"[::]:8080"`; port 0 takes a free one."""
    match = _LISTEN.fullmatch(text)
    if match is None or int(match[2]) > 65_535:
        raise ConfigError(field, text, 'give a host and a port, as in "127.0.0.1:8080"')
    return match[1].strip("[]"), int(match[2])


def pool_dir(name: str, shm_dir: str = SHM_DIR) -> Path:
    """Folder of a pool: `pool` (memory), `daemon.lock`, `control.sock`, `clients/`."""
    return Path(shm_dir) / f"{POOL_PREFIX}{check_pool_name('name', name)}"
