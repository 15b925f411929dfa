"""Hosts as network namespaces on one bridge: real links that can be slow, lossy or cut.

Needs root, `ip` and `tc` (iproute2), and `nft` for loss and partitions.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
from pathlib import Path

import pytest

_NUMBERS = itertools.count()


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


class Network:
    """Skips the test where namespaces cannot be made."""

    def __init__(self, num_hosts: int) -> None:
        missing = [program for program in ("ip", "tc", "nft") if shutil.which(program) is None]
        if os.geteuid() != 0 or missing:
            pytest.skip(f"network namespaces need root and iproute2, nft; missing: {missing}")
        stem = f"kvt{os.getpid() % 10_000}{next(_NUMBERS)}"
        self._bridge = f"{stem}b"
        self.names = [f"{stem}n{i}" for i in range(num_hosts)]
        self._subnet = f"10.{200 + os.getpid() % 50}.{next(_NUMBERS) % 250}"
        self.addresses = [f"{self._subnet}.{i + 1}" for i in range(num_hosts)]
        try:
            run("ip", "link", "add", self._bridge, "type", "bridge")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this kernel or container makes no bridge: {error.stderr}")
        # The test itself is on the bridge, too.
        run("ip", "addr", "add", f"{self._subnet}.254/24", "dev", self._bridge)
        run("ip", "link", "set", self._bridge, "up")
        for name, address in zip(self.names, self.addresses, strict=True):
            self._add(name, address)

    def _add(self, name: str, address: str) -> None:
        run("ip", "netns", "add", name)
        run(
            "ip", "link", "add", f"{name}v", "type", "veth",
            "peer", "name", "eth0", "netns", name,
        )  # fmt: skip
        run("ip", "link", "set", f"{name}v", "master", self._bridge, "up")
        run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            run("ip", "-n", name, "link", "set", device, "up")

    def inside(self, host: int) -> list[str]:
        """What to put before a command for it to run on that host."""
        return ["ip", "netns", "exec", self.names[host]]

    def limit(self, host: int, rate: str) -> None:
        """What that host sends."""
        tbf = ["tbf", "rate", rate, "burst", "256kb", "latency", "100ms"]
        run("tc", "-n", self.names[host], "qdisc", "add", "dev", "eth0", "root", *tbf)

    def drop(self, host: int, rule: str) -> None:
        """Of what comes in at that host, as nft says it; without a word to the sender."""
        nft = [*self.inside(host), "nft"]
        run(*nft, "add table inet faults")
        run(*nft, "add chain inet faults in { type filter hook input priority 0 ; }")
        run(*nft, f"add rule inet faults in {rule} drop")

    def cut(self, host: int, other: int) -> None:
        self.drop(host, f"ip saddr {self.addresses[other]}")

    def lose(self, host: int, percent: int) -> None:
        self.drop(host, f"numgen random mod 100 < {percent}")

    def heal(self, host: int) -> None:
        run(*self.inside(host), "nft", "delete table inet faults")

    def capture(self, host: int, file: Path) -> subprocess.Popen[bytes]:
        """All that passes at that host into `file`, until it is ended."""
        program = (
            "import socket, sys\n"
            "wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))\n"
            "wire.setsockopt(socket.SOL_SOCKET, 33, 256 << 20)  # SO_RCVBUFFORCE\n"
            "with open(sys.argv[1], 'wb') as file:\n"
            "    print('ready', flush=True)\n"
            "    while True:\n"
            "        file.write(wire.recv(1 << 17)[54:])\n"
            "        file.flush()\n"
        )
        command = [*self.inside(host), "python3", "-c", program, str(file)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        return process

    def close(self) -> None:
        for name in self.names:
            with contextlib.suppress(subprocess.CalledProcessError):
                run("ip", "netns", "del", name)
        run("ip", "link", "del", self._bridge)
