"""The arms of a comparison on a GPU: our connector, no connector, and the peers, each with what it needs beside it.

`take_turns` runs them side by side: the engines of all arms live at the same time on the same GPU, and only one of them
works at any moment. An arm that fails says why and costs the others nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.engine_child import QUIET, Arm, player
from benchmarks.populated_pool import POOL, pool_daemon, pool_log_lines
from benchmarks.processes import ChildProcess, free_port, kv_transfer_config
from benchmarks.report import write_json
from benchmarks.turns import Player, rounds
from vllm_kvpool.config import parse_size
from vllm_kvpool.errors import ConfigError, KVPoolError

PEER_SERVER_S = 20.0
"""LMCache's server takes connections some time before it answers."""
POOL_ARMS = ("kvpool", "kvpool-other")
CONNECTORS = {
    "way": ("WayConnector", "benchmarks.way_connector"),
    "load": ("AlwaysLoadConnector", "benchmarks.always_load"),
    "trace": ("TracedKVPoolConnector", "benchmarks.traced_connector"),
}
"""What needs another connector than ours as it is; it finds the value in KVPOOL_WAY, ..."""
PEERS = ("offloading", "offloading-all", "simple", "simple-lazy", "lmcache", "lmcache-mp")
"""`simple-lazy` stores what VRAM is about to drop, `simple` what is computed, as `kvpool` does. `offloading` stores
prompts only, its default, `offloading-all` what is generated, too."""
PROGRESS_S = 15.0
LMCACHE_SERVER = (
    "import sys; from lmcache.cli.main import main; "
    "sys.argv = ['lmcache', 'server', '--host', '127.0.0.1', '--port', '{port}', "
    "'--l1-size-gb', '{gib}', '--eviction-policy', 'LRU']; main()"
)


def add_arms(parser: argparse.ArgumentParser, arms: str) -> None:
    """Those of a comparison of arms."""
    known = ("none", *POOL_ARMS, *PEERS)
    parser.add_argument(
        "--arms",
        default=arms,
        help=f"of {', '.join(known)}; our own with options of the connector, as in "
        "kvpool+checksum=off+store=prompt, or kvpool+way=driver, +way=staged, +load=always "
        f"(default {arms})",
    )


def kind_of(name: str) -> str:
    """ "kvpool" of "kvpool+checksum=off"."""
    return name.partition("+")[0]


def salt_of(name: str) -> str:
    """Keeps arms of our own with other options apart, which share a pool; none for the rest, whose hashes stay as
    they are."""
    return name.partition("+")[2]


def transfer_of(connector: str, extra: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    transfer = {"kv_connector": connector, "kv_role": "kv_both", **more}
    return transfer if extra is None else {**transfer, "kv_connector_extra_config": extra}


def kvpool_arm(name: str, args: argparse.Namespace, folder: Path) -> Arm:
    """ConfigError."""
    extra = {"pool": POOL, "shm_dir": args.shm_dir, "checksum": args.checksum}
    for option in name.split("+")[1:]:
        field_name, _, value = option.partition("=")
        extra[field_name] = int(value) if value.isdigit() else value
    special = {option: str(extra.pop(option)) for option in ("way", "load") if option in extra}
    if getattr(args, "trace", False):
        special["trace"] = str(trace_file(folder, name))
    if len(special) > 1:
        which = " and ".join(special)
        raise ConfigError("--arms", name, f"{which} need a connector each: leave one of them out")
    if not special:
        return Arm(name, kv_transfer_config(extra))
    ((option, value),) = special.items()
    transfer = kv_transfer_config(extra, connector=CONNECTORS[option])
    return Arm(name, transfer, {f"KVPOOL_{option.upper()}": value})


def trace_file(folder: Path, arm: str) -> Path:
    return folder / f"{arm}-trace.json"


@contextlib.contextmanager
def peer_arm(name: str, args: argparse.Namespace, folder: Path) -> Iterator[Arm]:
    """With its server running, if it has one."""
    num_bytes = parse_size("pool-size", args.pool_size, 0)
    memory, gib = {"cpu_bytes_to_use": num_bytes}, num_bytes >> 30
    if name in ("offloading", "offloading-all"):
        only = {"offload_prompt_only": name == "offloading"}
        yield Arm(name, transfer_of("OffloadingConnector", memory | only))
    elif name in ("simple", "simple-lazy"):
        lazy = {"lazy_offload": name == "simple-lazy"}
        yield Arm(name, transfer_of("SimpleCPUOffloadConnector", memory | lazy))
    elif name == "lmcache":
        env = {"LMCACHE_LOCAL_CPU": "True", "LMCACHE_MAX_LOCAL_CPU_SIZE": str(gib)}
        yield Arm(name, transfer_of("LMCacheConnectorV1"), env)
    elif name == "lmcache-mp":
        port = free_port()
        with lmcache_server(port, gib, folder):
            extra = {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": port}
            module = "lmcache.integration.vllm.lmcache_mp_connector"
            yield Arm(
                name, transfer_of("LMCacheMPConnector", extra, kv_connector_module_path=module)
            )
    else:
        assert name.startswith("none"), f"no arm has the name {name}"
        yield Arm(name)


@contextlib.contextmanager
def lmcache_server(port: int, gib: int, folder: Path) -> Iterator[None]:
    code = LMCACHE_SERVER.format(port=port, gib=gib)
    server = ChildProcess([sys.executable, "-c", code], folder / "lmcache-server.log", QUIET)
    with server:
        ready = time.monotonic() + PEER_SERVER_S
        while not (_answers(port) and time.monotonic() > ready):
            if not server.running or time.monotonic() > ready + 2 * PEER_SERVER_S:
                raise server.fail("LMCache's server did not get ready")
            time.sleep(0.2)
        yield


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


# all arms -------------------------------------------------------------------------------------------


def take_turns(
    module: str,
    job_of: Callable[[str], dict[str, Any]],
    results: dict[str, Any],
    folder: Path,
    args: argparse.Namespace,
) -> None:
    """The engines of `args.arms`, of our own pool with one daemon. `results["turns"]` gets the values of each arm's
    turns, by its name, and `args.json` all results after each round; `results["notes"]` what there is to say, and
    which arm was lost. SIGTERM ends it early. `job_of`: what the arm of that name is to do. ConfigError."""
    names = args.arms.split(",")
    own = {name: kvpool_arm(name, args, folder) for name in names if kind_of(name) in POOL_ARMS}
    turns, notes = results.setdefault("turns", {}), results.setdefault("notes", [])
    try:
        with contextlib.ExitStack() as stack:
            if own:
                notes.append(stack.enter_context(pool_daemon(args, folder)))
            started = (
                own.get(name) or start_peer(name, stack, args, folder, notes) for name in names
            )
            arms = [arm for arm in started if arm]
            players = [player(module, arm, job_of(arm.name), folder, args) for arm in arms]
            turns |= {one.name: one.values for one in players}
            _play(players, stack, results, args)
    except SystemExit:
        notes.append("stopped before the end: the results are those until then")
    for name in own:
        notes += pool_log_lines(folder, name)


def start_peer(
    name: str,
    stack: contextlib.ExitStack,
    args: argparse.Namespace,
    folder: Path,
    notes: list[str],
) -> Arm | None:
    """None: what it needs beside it failed, and that was told and noted."""
    try:
        return stack.enter_context(peer_arm(name, args, folder))
    except (KVPoolError, RuntimeError, OSError, subprocess.SubprocessError) as error:
        print(f"{name}: FAILED: {str(error)[-2000:]}", flush=True)
        notes.append(f"ATTENTION: {name} was lost before its engine: {str(error)[:300]}")
        return None


def _play(
    players: list[Player],
    stack: contextlib.ExitStack,
    results: dict[str, Any],
    args: argparse.Namespace,
) -> None:
    begun = told = time.monotonic()
    print(f"starting {', '.join(one.name for one in players)}", flush=True)
    for one in players:
        stack.enter_context(one)
    for number, playing in enumerate(rounds(players, args.timeout_s, results["notes"])):
        now = time.monotonic()
        if number == 0:
            names = ", ".join(one.name for one in playing)
            print(f"ready after {now - begun:.0f} s: {names}", flush=True)
        elif now > told + PROGRESS_S:
            told = now
            print(f"{number} rounds, {now - begun:.0f} s", flush=True)
        if args.json:
            write_json(args.json, results)
    print(f"all turns over after {time.monotonic() - begun:.0f} s", flush=True)
