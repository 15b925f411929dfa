"""Add to the corpus what a long run gathered: of its inputs, smallest first, those that take a step from
one line of the package to another that no seed, and no input kept before, has taken.

    .venv/bin/python -m tests.fuzz.keep control /tmp/fuzz
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import vllm_kvpool
from tests.fuzz.all_targets import TARGETS
from tests.fuzz.target import CORPUS, Target

PACKAGE = str(Path(vllm_kvpool.__file__).parent)
Step = tuple[str, int, int]
Tracer = Callable[[FrameType, str, Any], Any]


def steps_of(target: Target, data: bytes) -> set[Step]:
    steps: set[Step] = set()

    def enter(frame: FrameType, event: str, _: Any) -> Tracer | None:
        name = frame.f_code.co_filename
        if not name.startswith(PACKAGE):
            return None
        before = 0

        def line(frame: FrameType, event: str, _: Any) -> Tracer:
            nonlocal before
            steps.add((name, before, frame.f_lineno))
            before = frame.f_lineno
            return line

        return line

    sys.settrace(enter)
    try:
        target.run(data)
    finally:
        sys.settrace(None)
    return steps


def keep(target: Target, work: Path) -> tuple[int, int]:
    """How many inputs were looked at, and how many are new in the corpus."""
    folder = CORPUS / target.name
    folder.mkdir(parents=True, exist_ok=True)
    known: set[Step] = set()
    for data in target.seeds() + target.corpus():
        known |= steps_of(target, data)
    found = sorted((file.read_bytes() for file in work.iterdir()), key=len)
    kept = 0
    for data in found:
        steps = steps_of(target, data)
        if steps - known:
            known |= steps
            (folder / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
            kept += 1
    return len(found), kept


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("work", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="kvpool-fuzz-") as folder:
        target = TARGETS[args.target](Path(folder))
        try:
            found, kept = keep(target, args.work)
        finally:
            target.close()
    print(f"{args.target}: of {found} inputs {kept} reach something new")


if __name__ == "__main__":
    main()
