"""Fuzz one target for long, guided by the edges that inputs reach in its Python code.

    .venv/bin/pip install --no-deps -r requirements/fuzz.txt       # atheris: libFuzzer for Python
    .venv/bin/python -m tests.fuzz.long_run control --minutes 10 --work /tmp/fuzz   # or door, ...

Begins with the seeds and the kept corpus; inputs that reach something new go to --work. A finding ends
the run and lies there as crash-*: put it into tests/fuzz/corpus/TARGET with the repair.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FunctionType, ModuleType
from typing import NoReturn

import atheris

from tests.fuzz.all_targets import TARGETS
from tests.fuzz.mutator import mutate
from tests.fuzz.target import CORPUS, Target
from vllm_kvpool import client, ledger, protocol
from vllm_kvpool.pool import (
    directory,
    exchange,
    inbox,
    landing,
    outbox,
    peer,
    peer_door,
    pulls,
    requests,
    service,
    sessions,
    spaces,
)  # fmt: skip

MODULES = (
    client, directory, exchange, inbox, landing, ledger, outbox, peer, peer_door, protocol, pulls,
    requests, service, sessions, spaces,
)  # fmt: skip
MAX_BYTES = 16_384
HANG_S = 60


def instrument(module: ModuleType) -> None:
    """In place: the package's own loader keeps atheris from doing it on import."""
    owners = [module, *(c for _, c in inspect.getmembers(module, inspect.isclass))]
    for owner in owners:
        for value in list(vars(owner).values()):
            inner = value.fget if isinstance(value, property) else value
            if isinstance(inner, FunctionType) and inner.__module__ == module.__name__:
                atheris.instrument_func(inner)


def fuzz(target: Target, arguments: list[str]) -> NoReturn:
    for module in MODULES:
        instrument(module)
    atheris.Setup([sys.argv[0], *arguments], target.run, custom_mutator=mutate)
    atheris.Fuzz()
    raise AssertionError("libFuzzer ends the process")


def write_seeds(target: Target, folder: Path) -> None:
    for number, seed in enumerate(target.seeds()):
        (folder / f"seed-{number}").write_bytes(seed)


def run_inside(shm_dir: Path, command: list[str]) -> int:
    """libFuzzer ends its process without a word to anybody, so its daemon is ended from here."""
    process = subprocess.Popen([*command, "--shm-dir", str(shm_dir)], start_new_session=True)
    try:
        return process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):  # not all targets have one
            os.killpg(process.pid, signal.SIGKILL)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--work", type=Path, required=True, help="folder for what it finds")
    parser.add_argument("--shm-dir", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.shm_dir is None:
        with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="kvpool-fuzz-") as folder:
            command = [sys.executable, "-m", "tests.fuzz.long_run", *sys.argv[1:]]
            return run_inside(Path(folder), command)
    args.work.mkdir(parents=True, exist_ok=True)
    target = TARGETS[args.target](args.shm_dir)
    write_seeds(target, args.work)
    options = [f"-max_len={MAX_BYTES}", f"-timeout={HANG_S}", f"-artifact_prefix={args.work}/"]
    options += ["-print_final_stats=1", f"-max_total_time={int(args.minutes * 60)}"]
    kept = CORPUS / args.target
    fuzz(target, [*options, str(args.work), *([str(kept)] if kept.exists() else [])])


if __name__ == "__main__":
    sys.exit(main())
