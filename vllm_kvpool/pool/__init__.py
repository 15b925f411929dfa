"""The pool daemon: no CUDA, no torch, no vLLM."""
