"""The arms of a comparison on a GPU: an engine each, in a process of its own, with what it needs beside it.

An arm that fails says why and costs the others nothing. `run_script` is the main of all these scripts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.offline import MODEL_SHAPES, make_model
from benchmarks.processes import ChildProcess, PoolDaemon, free_port, kv_transfer_config
from benchmarks.report import write_json
from vllm_kvpool.channel import call_daemon
from vllm_kvpool.config import SHM_DIR, parse_size
from vllm_kvpool.errors import KVPoolError, PoolUnavailable
from vllm_kvpool.protocol import Stats, StatsReply

POOL = f"bench-{os.getpid()}"
PEER_BYTES = 40 << 30
PEER_SERVER_S = 20.0
"""LMCache's server takes connections some time before it answers."""
POPULATE_TIMEOUT_S = 180.0
POOL_ARMS = ("kvpool", "kvpool-other")
PEERS = ("offloading", "simple", "lmcache", "lmcache-mp")
QUIET = {
    "PYTHONHASHSEED": "0",
    "PYTHONUNBUFFERED": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "LMCACHE_TRACK_USAGE": "false",
}
LMCACHE_ENV = {"LMCACHE_LOCAL_CPU": "True", "LMCACHE_MAX_LOCAL_CPU_SIZE": str(PEER_BYTES >> 30)}
LMCACHE_SERVER = (
    "import sys; from lmcache.cli.main import main; "
    "sys.argv = ['lmcache', 'server', '--host', '127.0.0.1', '--port', '{port}', "
    "'--l1-size-gb', '{gib}', '--eviction-policy', 'LRU']; main()"
)


@dataclass(frozen=True)
class Arm:
    name: str
    transfer: dict[str, Any] | None = None
    env: dict[str, str] = field(default_factory=dict)


def transfer_of(connector: str, extra: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    transfer = {"kv_connector": connector, "kv_role": "kv_both", **more}
    return transfer if extra is None else {**transfer, "kv_connector_extra_config": extra}


def script_parser(text: str | None) -> argparse.ArgumentParser:
    """With the options of every script. `text`: its docstring."""
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_engine_options(parser)
    return parser


def run_script(
    parser: argparse.ArgumentParser,
    run_job: Callable[[dict[str, Any]], None],
    measure: Callable[[argparse.Namespace, Path], dict[str, Any]],
    report: Callable[[dict[str, Any]], None],
) -> None:
    """`measure` starts the arms by `run_child`: the same script again, which then does `run_job`."""
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run_job(json.loads(args.child.read_text()))
        return
    with work_folder() as folder:
        make_model(folder / "model", args.size)
        results = measure(args, folder)
    report(results)
    if args.json:
        write_json(args.json, results)


def numbers(text: str) -> list[int]:
    """An option's value, as in 1,8,32."""
    return [int(number) for number in text.split(",")]


def add_arms(parser: argparse.ArgumentParser, arms: str) -> None:
    """Those of a comparison of arms."""
    known = ("none", *POOL_ARMS, *PEERS)
    parser.add_argument(
        "--arms",
        default=arms,
        help=f"of {', '.join(known)}; our own with options of the connector, as in "
        f"kvpool+checksum=off+store=prompt (default {arms})",
    )


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--size", choices=tuple(MODEL_SHAPES), default="8b", help="shape of the model"
    )
    parser.add_argument("--pool-size", default="48GiB")
    parser.add_argument("--shm-dir", default=SHM_DIR, help="where the pool lies: a tmpfs")
    parser.add_argument("--checksum", choices=("off", "sampled", "all"), default="sampled")
    parser.add_argument("--kv-cache-dtype", default="auto", help='for example "fp8"')
    parser.add_argument("--runner", choices=("auto", "v1", "v2"), default="auto")
    parser.add_argument("--gpu-share", type=float, default=0.5, help="of the GPU's memory")
    parser.add_argument("--timeout-s", type=float, default=240, help="for one arm")
    parser.add_argument("--engine", type=json.loads, default={}, help="more options of the engines")
    parser.add_argument("--json", type=Path)


def runner_env(runner: str) -> dict[str, str]:
    return {} if runner == "auto" else {"VLLM_USE_V2_MODEL_RUNNER": str(int(runner == "v2"))}


def kind_of(name: str) -> str:
    """ "kvpool" of "kvpool+checksum=off"."""
    return name.partition("+")[0]


def kvpool_arm(name: str, args: argparse.Namespace, folder: Path) -> Arm:
    extra = {"pool": POOL, "shm_dir": args.shm_dir, "checksum": args.checksum}
    for option in name.split("+")[1:]:
        field_name, _, value = option.partition("=")
        extra[field_name] = int(value) if value.isdigit() else value
    if not getattr(args, "trace", False):
        return Arm(name, kv_transfer_config(extra))
    traced = ("TracedKVPoolConnector", "benchmarks.traced_connector")
    env = {"KVPOOL_TRACE": str(folder / f"{name}-trace.json")}
    return Arm(name, kv_transfer_config(extra, connector=traced), env)


@contextlib.contextmanager
def peer_arm(name: str, folder: Path) -> Iterator[Arm]:
    """With its server running, if it has one."""
    memory = {"cpu_bytes_to_use": PEER_BYTES}
    if name == "offloading":
        yield Arm(name, transfer_of("OffloadingConnector", memory))
    elif name == "simple":
        yield Arm(name, transfer_of("SimpleCPUOffloadConnector", memory))
    elif name == "lmcache":
        yield Arm(name, transfer_of("LMCacheConnectorV1"), LMCACHE_ENV)
    elif name == "lmcache-mp":
        port = free_port()
        with lmcache_server(port, folder):
            extra = {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": port}
            module = "lmcache.integration.vllm.lmcache_mp_connector"
            yield Arm(
                name, transfer_of("LMCacheMPConnector", extra, kv_connector_module_path=module)
            )
    else:
        assert name.startswith("none"), f"no arm has the name {name}"
        yield Arm(name)


@contextlib.contextmanager
def lmcache_server(port: int, folder: Path) -> Iterator[None]:
    code = LMCACHE_SERVER.format(port=port, gib=PEER_BYTES >> 30)
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


# the pool -------------------------------------------------------------------------------------------


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


# all arms -------------------------------------------------------------------------------------------


def run_arms(
    names: list[str], run: Callable[[Arm], None], args: argparse.Namespace, folder: Path
) -> list[str]:
    """`run` each arm, those of our own pool one after the other with one daemon. Returns notes."""
    notes: list[str] = []
    pool_names = [name for name in names if kind_of(name) in POOL_ARMS]
    for name in names:
        try:
            if name not in pool_names:
                with peer_arm(name, folder) as arm:
                    run(arm)
            elif name == pool_names[0]:
                with pool_daemon(args, folder) as note:
                    notes.append(note)
                    for one in pool_names:
                        run(kvpool_arm(one, args, folder))
        except (KVPoolError, RuntimeError, OSError, subprocess.SubprocessError) as error:
            print(f"{name}: FAILED: {str(error)[-2000:]}", flush=True)
        except SystemExit:
            notes.append(f"stopped in {name}: the results are those until then")
            break
    for name in pool_names:
        notes += pool_log_lines(folder, name)
    return notes


# a run of an arm --------------------------------------------------------------------------------------


def run_child(
    module: str, arm: Arm, job: dict[str, Any], folder: Path, args: argparse.Namespace
) -> dict[str, Any] | None:
    """What `python -m module --child JOB` has written by its end, None for nothing; when it fails,
    the end of its log is shown. `args.engine`: further options of the engine."""
    job = {
        **job,
        "transfer": arm.transfer,
        "model": str(folder / "model"),
        "size": args.size,
        "result": str(folder / f"{arm.name}.json"),
        "engine": {
            "gpu_memory_utilization": args.gpu_share,
            "kv_cache_dtype": args.kv_cache_dtype,
            **args.engine,
        },
    }
    path, log = folder / f"{arm.name}-job.json", folder / f"{arm.name}.log"
    path.write_text(json.dumps(job))
    env = {**QUIET, **runner_env(args.runner), **arm.env}
    child = ChildProcess([sys.executable, "-m", module, "--child", str(path)], log, env)
    begun = time.monotonic()
    print(f"{arm.name}: started", flush=True)
    with child:
        assert child.process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.process.wait(args.timeout_s)
        status = child.process.poll()
    took = f"{time.monotonic() - begun:.0f} s"
    if status == 0:
        print(f"{arm.name}: done in {took}", flush=True)
    else:
        what = "timeout" if status is None else f"exit status {status}"
        print_failure(arm.name, what, took, log)
    result = Path(job["result"])
    if not result.exists():
        return None
    values: dict[str, Any] = json.loads(result.read_text())
    return values


def print_failure(name: str, what: str, took: str, log: Path) -> None:
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    causes = [line for line in lines if "Error" in line][:4]
    print(f"{name}: FAILED after {took}: {what}")
    print("\n".join(f"    {line[:300]}" for line in [*causes, "...", *lines[-12:]]), flush=True)


@contextlib.contextmanager
def work_folder() -> Iterator[Path]:
    """For the model and the logs; it stays. SIGTERM ends the run as an error does, so that no engine and no pool is
    left behind, and what has been measured is told."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    folder = Path(tempfile.mkdtemp(prefix="kvpool-bench-"))
    print(f"logs: {folder}", flush=True)
    yield folder


def measure_link(gib: float = 2) -> dict[str, float] | None:
    """In a process of its own, which leaves nothing on the GPU; None where there is none."""
    command = [sys.executable, "-m", "benchmarks.pinned", "--gib", str(gib)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        print(f"the link could not be measured: {done.stderr[-300:]}", flush=True)
        return None
    rates: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return rates


def pool_log_lines(folder: Path, arm: str) -> list[str]:
    """What our own connector complained about, for the report."""
    log = folder / f"{arm}.log"
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return [line[:300] for line in lines if "KV pool:" in line][:10]
