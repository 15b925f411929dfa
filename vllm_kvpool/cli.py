"""`vllm-kvpool`: reads options, calls what does the work, prints what it returns.

Exit status: 0 done, 1 the pool, its daemon or the router would not, 2 the command line or a file is
wrong.
"""

from __future__ import annotations

import argparse
import json
import logging
import socket
import sys
import tomllib
from pathlib import Path
from typing import Any

from vllm_kvpool import __version__
from vllm_kvpool.config import DEFAULT_POOL, SHM_DIR, PoolConfig, RouterConfig
from vllm_kvpool.errors import ConfigError, KVPoolError, RouterUnavailable
from vllm_kvpool.host_keys import make_keys
from vllm_kvpool.pool import admin, doctor
from vllm_kvpool.pool.serve import serve
from vllm_kvpool.router.fleet_commands import FleetCommands, replicas_text

SERVE_HELP = {
    "name": "the pool's name",
    "size": "as in 64GiB, or a share of the mount as in 80%%",
    "listen": "a further endpoint: tcp://10.0.0.1:7707 for other hosts, ipc:///run/kvpool.sock",
    "advertise": "how other hosts reach --listen, if not by that address",
    "keys": "folder of CURVE keys: our own, and those of hosts that may connect (keygen)",
    "insecure": "let other hosts connect without keys",
    "directory": "URL of a Redis or Valkey, as in redis://10.0.0.9:6379",
    "upstream": "tcp://host:port of the pool that this one stands in front of",
    "shm_dir": "the shared-memory mount",
    "hugepages": "back the pool with transparent huge pages",
    "numa": "NUMA nodes, as in 0 (bind) or 0,1 (interleave)",
    "min_block": "the smallest block to be expected; the index is sized for it",
    "group_access": "let the group of this user share the pool",
    "remove": "delete the pool at a clean end",
}
ROUTE_HELP = {
    "replicas": "http://host:port, with @0 behind it for a data-parallel rank and name= before it "
    "for a name; or dns://host:port for all addresses of a name",
    "fleet": "TOML file with further replicas, read again when it changes",
    "policy": "how a replica is chosen",
    "kv_events": "ports at the replicas' hosts of KV events and of their replay, as in 5557,6557",
    "listen": "where clients connect",
    "admin": "where `vllm-kvpool fleet` does; empty: nowhere",
    "workers": "processes that share the port",
    "max_body": "larger request bodies are refused",
    "client_timeout_s": "for a client that sends or takes nothing",
    "connect_timeout_s": "for a replica to accept a connection or answer a probe",
    "response_timeout_s": "for a replica that sends nothing",
    "retry_share": "retries after 429 or 503 are at most this share of all requests",
    "probe_interval_s": "between two looks at a replica",
    "warmup_s": "until a replica that comes gets its full share",
    "drain_s": "for which a replica that drains keeps its sessions",
}
FLEET_COMMANDS = {
    "ls": ("the replicas and how they are", None),
    "add": ("add a replica, or take a drain back", "address"),
    "drain": ("give a replica no new sessions", "replica"),
    "rm": ("take a replica out at once", "replica"),
}


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s vllm-kvpool: %(message)s"
    )
    try:
        status: int = options.run(options)
    except ConfigError as error:
        print(f"vllm-kvpool: {error}", file=sys.stderr)
        return 2
    except (KVPoolError, OSError) as error:
        print(f"vllm-kvpool: {error}", file=sys.stderr)
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm-kvpool",
        description="One shared pool of CPU memory for all vLLM engines of a host.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("serve", help="run a pool's daemon")
    _add_serve_options(command)
    command.set_defaults(run=_serve)

    command = commands.add_parser("route", help="run the router")
    _add_route_options(command)
    command.set_defaults(run=_route)

    command = commands.add_parser("fleet", help="the replicas of a running router")
    _add_fleet_commands(command)
    command.set_defaults(run=_fleet)

    command = commands.add_parser("stats", help="counters of a running pool")
    _add_common(command, json_too=True)
    command.set_defaults(run=_stats)

    command = commands.add_parser("ls", help="the pools of this host")
    _add_common(command, name=False, json_too=True)
    command.set_defaults(run=_ls)

    text = "bring blocks here from other hosts; their keys (hex, a chain, head first) on stdin"
    command = commands.add_parser("prefetch", help=text, description=text)
    _add_common(command)
    command.add_argument("namespace", help="digest of the blocks' namespace, as `stats` shows it")
    command.add_argument("--timeout", type=float, default=30, help="seconds (default: 30)")
    command.set_defaults(run=_prefetch)

    text = "draw a key pair: NAME.key (to be copied to other hosts' folders) and NAME.key_secret"
    command = commands.add_parser("keygen", help="CURVE keys for this host", description=text)
    command.add_argument("folder", type=Path, help="where `serve --keys` looks for them")
    command.add_argument("--name", default=socket.gethostname(), help="of the files")
    command.set_defaults(run=_keygen)

    text = "forget all blocks; without a daemon, delete the pool"
    command = commands.add_parser("clear", help=text, description=text)
    _add_common(command)
    command.set_defaults(run=_clear)

    command = commands.add_parser("doctor", help="what is wrong here, and how to mend it")
    _add_common(command, name=False, json_too=True)
    command.set_defaults(run=_doctor)
    return parser


def _add_common(
    command: argparse.ArgumentParser, *, name: bool = True, json_too: bool = False
) -> None:
    if name:
        command.add_argument("--name", default=DEFAULT_POOL, help=SERVE_HELP["name"])
    command.add_argument("--shm-dir", default=SHM_DIR, help=SERVE_HELP["shm_dir"])
    if json_too:
        command.add_argument("--json", action="store_true", help="machine-readable output")


def _add_serve_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--config", type=Path, help="TOML file with the same names; options here win over it"
    )
    defaults = PoolConfig()
    for field in PoolConfig.__struct_fields__:
        default = getattr(defaults, field)
        shown = "" if default in {"", False} else f" (default: {default.replace('%', '%%')})"
        flag = "--" + field.replace("_", "-")
        action = argparse.BooleanOptionalAction if isinstance(default, bool) else "store"
        # No default here: what is not given must not win over the file.
        command.add_argument(flag, action=action, default=None, help=SERVE_HELP[field] + shown)


def _serve(options: argparse.Namespace) -> int:
    values = {} if options.config is None else _read_config(options.config)
    PoolConfig.from_dict(values, str(options.config))
    given = {field: getattr(options, field) for field in PoolConfig.__struct_fields__}
    values |= {field: value for field, value in given.items() if value is not None}
    serve(PoolConfig.from_dict(values, "command line"))
    return 0


def _add_route_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--config", type=Path, help="TOML file with the same names; options here win over it"
    )
    command.add_argument("replicas", nargs="*", metavar="REPLICA", help=ROUTE_HELP["replicas"])
    defaults = RouterConfig()
    for field in RouterConfig.__struct_fields__[1:]:
        default = getattr(defaults, field)
        shown = "" if default == "" else f" (default: {default})"
        flag = "--" + field.replace("_", "-")
        command.add_argument(flag, type=type(default), default=None, help=ROUTE_HELP[field] + shown)


def _route(options: argparse.Namespace) -> int:
    values = {} if options.config is None else _read_config(options.config)
    RouterConfig.from_dict(values, str(options.config))
    given = {field: getattr(options, field) for field in RouterConfig.__struct_fields__}
    values |= {field: value for field, value in given.items() if value not in (None, [])}
    config = RouterConfig.from_dict(values, "command line")
    try:
        from vllm_kvpool.router.supervisor import run_router
    except ModuleNotFoundError as error:
        fix = "pip install 'vllm-kvpool[router]'"
        raise RouterUnavailable(f"the router needs {error.name}: {fix}") from None
    run_router(config)
    return 0


def _add_fleet_commands(command: argparse.ArgumentParser) -> None:
    admin = RouterConfig().admin
    verbs = command.add_subparsers(required=True, dest="verb", metavar="COMMAND")
    for verb, (text, argument) in FLEET_COMMANDS.items():
        parser = verbs.add_parser(verb, help=text, description=text)
        if argument is not None:
            parser.add_argument("argument", metavar=argument.upper())
        parser.add_argument("--admin", default=admin, help=f"the router's (default: {admin})")
        if verb == "ls":
            parser.add_argument("--json", action="store_true", help="machine-readable output")


def _fleet(options: argparse.Namespace) -> int:
    fleet = FleetCommands(options.admin)
    match options.verb:
        case "ls":
            replicas = fleet.replicas()
            print(json.dumps(replicas, indent=2) if options.json else replicas_text(replicas))
        case "add":
            print(f"{fleet.add(options.argument)} takes requests once it is well")
        case "drain":
            fleet.drain(options.argument)
            print(f"{options.argument} takes no new sessions")
        case "rm":
            fleet.remove(options.argument)
            print(f"{options.argument} is out")
    return 0


def _read_config(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError("config", str(path), str(error)) from None
    return {key.replace("-", "_"): value for key, value in values.items()}


def _stats(options: argparse.Namespace) -> int:
    stats = admin.fetch_stats(options.name, options.shm_dir)
    print(json.dumps(stats, indent=2) if options.json else admin.stats_text(stats))
    return 0


def _ls(options: argparse.Namespace) -> int:
    pools = admin.list_pools(options.shm_dir)
    if options.json:
        print(json.dumps([pool._asdict() for pool in pools], indent=2))
    else:
        print(admin.pools_text(pools, options.shm_dir))
    return 0


def _prefetch(options: argparse.Namespace) -> int:
    keys = sys.stdin.read()
    name, shm_dir, namespace = options.name, options.shm_dir, options.namespace
    print(admin.prefetch(name, shm_dir, namespace, keys, options.timeout))
    return 0


def _keygen(options: argparse.Namespace) -> int:
    public, secret = make_keys(options.folder, options.name)
    print(f"{secret} stays here; copy {public} into the key folders of the other hosts")
    return 0


def _clear(options: argparse.Namespace) -> int:
    print(admin.clear(options.name, options.shm_dir))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    findings = doctor.examine(options.shm_dir)
    if options.json:
        print(json.dumps([finding._asdict() for finding in findings], indent=2))
    else:
        print(doctor.findings_text(findings))
    return int(any(finding.status == "fail" for finding in findings))
