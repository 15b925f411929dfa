"""A shared CPU-memory tier for the KV caches of vLLM engines. Imports neither vLLM nor torch."""

__version__ = "0.1.0"
