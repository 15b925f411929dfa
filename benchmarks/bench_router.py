"""What a router costs: requests and streams a second of one core, processor time of each, and added latency.

    python -m benchmarks.bench_router [--seconds 5] [--repeats 3] [--replicas 4] [--policy task] [--json FILE]

The router under test is pinned to core 0; load generator and replicas share core 1. In the same run, on the same bare
replicas: nginx where it is installed, vllm-router and SMG where `scripts/venv-routers` has installed them, and the
replicas alone ("direct"). Chat bodies of 6 KB from 256 sessions of 8 tasks; answers of 64 tokens, or streams of 64
chunks, one each 8 ms.

Caveats. Throughput is bounded by core 1 as well: `gen` is the share of it that the generator took, and where that and
the replicas' share come near 1 the figure is a lower bound. Processor time (user and system, all processes of the
router) is not bounded so, and is the figure to compare. `reads` below 64 means that chunks came in together, because
something was behind. Added latency is the difference of percentiles, with and without the router, at 500 requests a
second. Repeats take turns; each figure is the median.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.other_routers import ANSWERS_S, PEER_MAKERS, Peer, answers
from benchmarks.processes import ChildProcess, Router, free_port
from benchmarks.report import write_json

ROUTER_CORE, OTHER_CORE = "0", "1"
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
CLOSED = ("--mode", "closed", "--connections", "32")
STREAM = ("--mode", "stream", "--connections", "256")
PACED = ("--mode", "paced", "--connections", "64", "--rate", "500")


class Arm(NamedTuple):
    name: str
    port: int
    pid: int | None
    """None: there is no router."""


def pinned(core: str) -> tuple[str, ...]:
    return ("taskset", "-c", core) if (os.cpu_count() or 1) > 1 else ()


def family(pid: int) -> list[int]:
    """The process and all that came from it."""
    found = [pid]
    for parent in found:
        try:
            children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        except OSError:
            continue
        found += map(int, children)
    return found


def busy_s(pid: int | None) -> float:
    """Processor time so far."""
    total = 0.0
    for member in family(pid) if pid else ():
        fields = Path(f"/proc/{member}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) * TICK_S
    return total


def load(arm: Arm, mode: tuple[str, ...], seconds: float) -> dict[str, float]:
    """One run of the generator; `cpu_us`: of the router for each answer."""
    command = [*pinned(OTHER_CORE), sys.executable, "-m", "benchmarks.http_load"]
    command += ["--port", str(arm.port), "--seconds", str(seconds), *mode]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as generator:
        assert generator.stdout is not None
        generator.stdout.readline()
        before = busy_s(arm.pid)
        result: dict[str, float] = json.loads(generator.stdout.readline())
        spent = busy_s(arm.pid) - before
    result["cpu_us"] = spent / max(1, result["done"]) * 1e6
    result["router_cpu"] = spent / seconds
    return result


def measure(arms: list[Arm], repeats: int, seconds: float) -> dict[str, Any]:
    """By arm and mode the median of each figure."""
    runs: dict[str, dict[str, list[dict[str, float]]]] = {arm.name: {} for arm in arms}
    for repeat in range(repeats):
        for arm in arms:
            for mode in (CLOSED, STREAM, PACED):
                result = load(arm, mode, seconds)
                runs[arm.name].setdefault(mode[1], []).append(result)
                rate, cost = result["rate"], result["cpu_us"]
                print(
                    f"  {repeat + 1}. {arm.name}: {mode[1]} {rate:.0f}/s, {cost:.0f} us",
                    file=sys.stderr,
                )
    return {
        name: {mode: _medians(results) for mode, results in modes.items()}
        for name, modes in runs.items()
    }


def _medians(results: list[dict[str, float]]) -> dict[str, Any]:
    medians = {key: statistics.median(result[key] for result in results) for key in results[0]}
    return {**medians, "runs": results}


def table(measured: dict[str, Any]) -> str:
    head = (
        "router",
        "req/s",
        "us/req",
        "streams/s",
        "us/stream",
        "us/chunk",
        "reads",
        "+p50 ms",
        "+p99 ms",
        "gen",
    )
    rows = [head]
    direct = measured["direct"]["paced"]
    for name, modes in measured.items():
        closed, stream, paced = modes["closed"], modes["stream"], modes["paced"]
        per_chunk = (stream["cpu_us"] - closed["cpu_us"]) / 64
        added = [f"{paced[key] - direct[key]:.2f}" for key in ("p50_ms", "p99_ms")]
        rows.append(
            (
                name, f"{closed['rate']:.0f}", f"{closed['cpu_us']:.0f}", f"{stream['rate']:.0f}",
                f"{stream['cpu_us']:.0f}", f"{per_chunk:.1f}", f"{stream['reads_per_answer']:.0f}", *added,
                f"{max(closed['generator_cpu'], stream['generator_cpu']):.2f}",
            )
        )  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ([cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows)
    return "\n".join("  ".join(line) for line in lines)


def started_peers(ports: list[int], folder: Path) -> list[Peer]:
    """Those that are installed here and get a request through."""
    peers = []
    for make in PEER_MAKERS:
        peer = make(ports, folder, pinned(ROUTER_CORE))
        if peer is None:
            print(f"{make.__name__}: not installed here", file=sys.stderr)
            continue
        peer.process.start()
        give_up = time.monotonic() + ANSWERS_S
        while (
            not (works := answers(peer.port))
            and peer.process.running
            and time.monotonic() < give_up
        ):
            time.sleep(0.2)
        if works:
            peers.append(peer)
        else:
            print(
                f"{peer.name}: answers nothing:\n{peer.process.log.read_text()[-2000:]}",
                file=sys.stderr,
            )
            peer.process.stop()
    return peers


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    ports = [free_port() for _ in range(options.replicas)]
    command = [
        *pinned(OTHER_CORE),
        sys.executable,
        "-m",
        "benchmarks.bare_replica",
        *map(str, ports),
    ]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    prefix = pinned(ROUTER_CORE)
    with (
        ChildProcess(command, folder / "replicas.log") as replicas,
        Router(folder / "router.log", "--policy", options.policy, *urls, prefix=prefix) as router,
    ):
        while not answers(ports[0]):
            assert replicas.running, replicas.log.read_text()
            time.sleep(0.1)
        peers = started_peers(ports, folder) if options.peers else []
        arms = [
            Arm("direct", ports[0], None),
            Arm(f"vllm-kvpool {options.policy}", router.port, router.pid),
        ]
        arms += [Arm(peer.name, peer.port, peer.process.pid) for peer in peers]
        try:
            return measure(arms, options.repeats, options.seconds)
        finally:
            for peer in peers:
                peer.process.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--policy", default="task")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-router-") as folder:
        measured = run(options, Path(folder))
    print(table(measured))
    if options.json:
        write_json(options.json, {"routers": measured})


if __name__ == "__main__":
    main()
