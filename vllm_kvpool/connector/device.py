"""The device that holds a worker's KV cache: the only place that tells CPU and CUDA apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch


@dataclass(frozen=True)
class KVDevice:
    index: int
    """CUDA's number of the device in this process; -1: the KV cache is this process's own memory."""

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Self:
        return cls(tensor.device.index if tensor.is_cuda else -1)

    def stream(self) -> int:
        """Handle of the stream with everything that vLLM has started on the KV cache so far: copies
        begin when that has ended. 0 on a CPU, where it has ended."""
        if self.index < 0:
            return 0
        handle: int = torch.cuda.current_stream(self.index).cuda_stream
        return handle
