"""What the link to the GPU gives at best: one big copy from and to pinned memory, and both at once.

    python -m benchmarks.pinned [--gib 2] [--repeats 7]      prints one line of JSON, in GB/s

On its own, because other benchmarks must not hold memory on the GPU that they measure.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

GIB = 1 << 30


def median_rate(num_bytes: int, repeats: int, copy: Callable[[], None]) -> float:
    """GB/s (10^9 bytes) of `copy`, which moves `num_bytes` and returns when they are there."""
    copy()
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        copy()
        seconds.append(time.perf_counter() - begun)
    return num_bytes / statistics.median(seconds) / 1e9


def pinned_rates(num_bytes: int, repeats: int, device: str = "cuda") -> dict[str, float]:
    """`load` is host to device, `store` device to host, `both` the sum of the two at once.
    On a CPU: copies within its memory, to try the scripts out."""
    gpu = device == "cuda"
    hosts = [torch.ones(num_bytes, dtype=torch.uint8, pin_memory=gpu) for _ in range(2)]
    devices = [torch.ones(num_bytes, dtype=torch.uint8, device=device) for _ in range(2)]
    streams = [torch.cuda.Stream() if gpu else None for _ in range(2)]

    def copy(*pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
        for stream, (to, source) in zip(streams, pairs, strict=False):
            with torch.cuda.stream(stream):
                to.copy_(source, non_blocking=True)
        if gpu:
            torch.cuda.synchronize()

    load, store = (devices[0], hosts[0]), (hosts[1], devices[1])
    return {
        "load": median_rate(num_bytes, repeats, lambda: copy(load)),
        "store": median_rate(num_bytes, repeats, lambda: copy(store)),
        "both": median_rate(2 * num_bytes, repeats, lambda: copy(load, store)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    print(json.dumps(pinned_rates(int(args.gib * GIB), args.repeats, args.device)))


if __name__ == "__main__":
    main()
