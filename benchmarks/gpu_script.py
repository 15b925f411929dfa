"""What the scripts that compare engines on a GPU have in common: options, the work folder, the end."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.offline import MODEL_SHAPES, make_model
from benchmarks.report import write_json
from benchmarks.turns import play
from vllm_kvpool.config import SHM_DIR
from vllm_kvpool.errors import ConfigError


def script_parser(text: str | None) -> argparse.ArgumentParser:
    """With the options of every script. `text`: its docstring."""
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_engine_options(parser)
    return parser


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--size", choices=tuple(MODEL_SHAPES), default="8b", help="shape of the model"
    )
    parser.add_argument("--kv-gib", type=float, default=6, help="KV cache of each engine")
    parser.add_argument(
        "--pool-size",
        default="16GiB",
        help="of our pool, and of each peer's CPU memory (vLLM's own may take the next power of two)",
    )
    parser.add_argument("--shm-dir", default=SHM_DIR, help="where the pool lies: a tmpfs")
    parser.add_argument("--checksum", choices=("off", "sampled", "all"), default="sampled")
    parser.add_argument("--kv-cache-dtype", default="auto", help='for example "fp8"')
    parser.add_argument("--runner", choices=("auto", "v1", "v2"), default="auto")
    parser.add_argument(
        "--timeout-s", type=float, default=180, help="for an engine's start, and for each turn"
    )
    parser.add_argument("--engine", type=json.loads, default={}, help="more options of the engines")
    parser.add_argument("--json", type=Path)


def run_script(
    parser: argparse.ArgumentParser,
    run_job: Callable[[dict[str, Any]], Any],
    measure: Callable[[argparse.Namespace, Path], dict[str, Any]],
    report: Callable[[dict[str, Any]], None],
) -> None:
    """`measure` starts the same script again for each engine, which then does `run_job`: all of it, or, where the
    engines take turns, as the generator that `turns.play` wants."""
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--turns", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        work = run_job(json.loads(args.child.read_text()))
        if args.turns is not None:
            play(args.turns, work)
        return
    with work_folder() as folder:
        make_model(folder / "model", args.size)
        try:
            results = measure(args, folder)
        except ConfigError as error:
            parser.error(str(error))
    report(results)
    if args.json:
        write_json(args.json, results)


def numbers(text: str) -> list[int]:
    """An option's value, as in 1,8,32."""
    return [int(number) for number in text.split(",")]


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
