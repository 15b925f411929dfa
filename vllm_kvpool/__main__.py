"""`python -m vllm_kvpool` is `vllm-kvpool`."""

from vllm_kvpool.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
