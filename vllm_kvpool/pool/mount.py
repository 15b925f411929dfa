"""The file system that a pool lies on: its room, whether it is memory, and its huge pages."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

from vllm_kvpool.errors import ConfigError

MOUNTS = Path("/proc/self/mountinfo")
SHMEM_HUGEPAGES = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
MEMORY = {"tmpfs", "ramfs", "devtmpfs", "hugetlbfs"}
TMPFS = "name a mounted tmpfs, as /dev/shm"


class Mount(NamedTuple):
    path: Path
    size: int
    free: int
    kind: str = "tmpfs"
    """Of file system, as the kernel names it; "" when it does not tell."""
    huge: str = "never"
    """Its mount option: who gets huge pages."""

    @staticmethod
    def of(path: Path) -> Mount:
        """ConfigError: there is none, or none that holds files."""
        try:
            room = os.statvfs(path)
            kind, options = _look_up(os.stat(path).st_dev)
        except OSError as error:
            raise ConfigError("shm_dir", str(path), f"{error.strerror}: {TMPFS}") from None
        if room.f_blocks == 0 and kind not in MEMORY:
            fix = f"{kind or 'this file system'} holds no files of ours: {TMPFS}"
            raise ConfigError("shm_dir", str(path), fix)
        huge = next((o[len("huge=") :] for o in options if o.startswith("huge=")), "never")
        size, free = room.f_blocks * room.f_frsize, room.f_bavail * room.f_frsize
        return Mount(path, size, free, kind, huge)

    def fix(self, needed: int) -> str:
        return (
            f"make it larger (mount -o remount,size={needed} {self.path}; in a container: "
            f"docker run --shm-size={needed}) or take a smaller --size"
        )

    def why_slow(self) -> str:
        """Empty when it is memory. Others work, and some (DAX) well: a word, no refusal."""
        if self.kind in MEMORY:
            return ""
        kind = self.kind or "a file system of an unknown kind"
        return (
            f"{self.path} is on {kind}, not in memory: the kernel writes the pool to its disk, and "
            f"copies wait for that; {TMPFS}"
        )

    def why_no_hugepages(self) -> str:
        """Why a pool here gets none, with the way out; empty when it gets them on request.

        The option of the mount decides, not the mode in /sys, which is for memory without a mount;
        but for two of its values, which overrule all mounts.
        """
        if self.kind != "tmpfs":
            return f"only a tmpfs gives them to pools: {TMPFS}"
        mode = hugepage_mode()
        if mode is None:
            return "this kernel has none for shared memory"
        if mode == "deny":
            return f"{SHMEM_HUGEPAGES} denies them: echo never > {SHMEM_HUGEPAGES}"
        if mode == "force" or self.huge != "never":
            return ""
        return f"{self.path} is mounted without: mount -o remount,huge=advise {self.path}"


def hugepage_mode() -> str | None:
    """The kernel's mode for shared memory; None: it knows of no huge pages."""
    try:
        modes = SHMEM_HUGEPAGES.read_text(encoding="ascii")
    except OSError:
        return None
    return modes[modes.find("[") + 1 : modes.find("]")]


def _look_up(device: int) -> tuple[str, list[str]]:
    """Kind and options of the file system with that number: proc_pid_mountinfo(5)."""
    number = f"{os.major(device)}:{os.minor(device)}"
    with contextlib.suppress(OSError):
        for line in MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines():
            place, _, source = line.partition(" - ")
            if place.split()[2] == number:
                kind, _, options = source.split(" ", 2)
                return kind, options.split(",")
    return "", []
