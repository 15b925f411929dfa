"""The vLLM connector. `KVPoolConnector` is loaded by name, on first use: importing this package
pulls in neither vllm nor torch, and starts nothing (vLLM resolves the class in its API servers
too)."""

from __future__ import annotations

from typing import Any

__all__ = ["KVPoolConnector"]


def __getattr__(name: str) -> Any:
    if name == "KVPoolConnector":
        from vllm_kvpool.connector.connector import KVPoolConnector

        return KVPoolConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
