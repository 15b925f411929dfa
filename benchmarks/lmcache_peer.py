"""How long does LMCache 0.5.6's server take to look up the prompt that bench_pool.py looks up?

    python -m benchmarks.lmcache_peer [--json FILE]

Server and client (lmcache_client.py) are LMCache's own code on a CPU, in an environment of its own
(scripts/venv-lmcache). One lookup is what its scheduler side sends to learn how much of a prompt is
cached: LOOKUP with all token ids, then QUERY_PREFETCH_STATUS. Each one hits all 32,768 tokens.

In LMCache's favour: it answers for 128 chunks of 256 tokens (its default), not for 2,048 blocks;
its index holds nothing else; the client waits for each reply, where an engine asks again one step
later. Against it: its lookup hashes the tokens, which vLLM has already done when it asks our pool.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Self

from benchmarks.processes import ChildProcess, free_port
from benchmarks.report import percentile, write_json

ROOT = Path(__file__).resolve().parent.parent
BIN = ROOT / ".venv-lmcache" / "bin"
START_TIMEOUT_S = 120.0
LOOKUPS = 200
QUIET = {"LMCACHE_TRACK_USAGE": "false", "LMCACHE_LOG_LEVEL": "WARNING"}


class LMCacheServer(ChildProcess):
    """`lmcache server` with its defaults; `start` returns when it answers at `url`."""

    def __init__(self, log: Path) -> None:
        port, self._http_port = free_port(), free_port()
        self.url = f"tcp://localhost:{port}"
        command = [str(BIN / "lmcache"), "server"]
        command += ["--port", str(port), "--http-port", str(self._http_port)]
        command += ["--l1-size-gb", "0.25", "--eviction-policy", "LRU"]  # these have no default
        command += ["--supported-transfer-mode", "auto"]  # CPU engines do not use the default
        super().__init__(command, log, QUIET)

    def start(self) -> Self:
        super().start()
        try:
            self._wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def _wait_ready(self) -> None:
        give_up = time.monotonic() + START_TIMEOUT_S
        health = f"http://127.0.0.1:{self._http_port}/healthcheck"
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(health, timeout=5):
                return
            if not self.running or time.monotonic() > give_up:
                raise self.fail("LMCache's server did not get ready")
            time.sleep(0.1)


def measure_lookups(lookups: int = LOOKUPS) -> list[float]:
    """Seconds that each lookup took, in order. Installs LMCache where it is missing."""
    subprocess.run([ROOT / "scripts" / "venv-lmcache"], check=True)
    client = [str(BIN / "python"), str(ROOT / "benchmarks" / "lmcache_client.py")]
    with (
        tempfile.TemporaryDirectory() as folder,
        LMCacheServer(Path(folder, "lmcache.log")) as server,
    ):
        command = [*client, server.url, str(lookups)]
        output = subprocess.run(command, stdout=subprocess.PIPE, env=os.environ | QUIET, check=True)
    seconds: list[float] = json.loads(output.stdout.splitlines()[-1])
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    times_us = [seconds * 1e6 for seconds in measure_lookups()]
    p50_us, p99_us = percentile(times_us, 0.5), percentile(times_us, 0.99)
    print(f"LMCache lookup, {len(times_us)} times: p50 {p50_us:,.0f} us, p99 {p99_us:,.0f} us")
    if args.json:
        write_json(args.json, {"p50_us": p50_us, "p99_us": p99_us, "times_us": times_us})


if __name__ == "__main__":
    main()
