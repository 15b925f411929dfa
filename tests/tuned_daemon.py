"""`vllm-kvpool` with other limits of time: `tuned_daemon.py MODULE.NAME=VALUE ... -- serve ...`, modules of
`vllm_kvpool.pool`. Longer than the package's own where a busy machine would exceed them, shorter where
a test would just wait for them."""

from __future__ import annotations

import importlib
import sys

from vllm_kvpool.cli import main


def tune(settings: list[str]) -> None:
    for setting in settings:
        name, _, value = setting.partition("=")
        module_name, _, constant = name.partition(".")
        module = importlib.import_module(f"vllm_kvpool.pool.{module_name}")
        kind = type(getattr(module, constant))
        setattr(module, constant, kind(value))


if __name__ == "__main__":
    end = sys.argv.index("--")
    tune(sys.argv[1:end])
    raise SystemExit(main(sys.argv[end + 1 :]))
