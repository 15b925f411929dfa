"""Imports go downwards only, and heavy packages stay in their corner.

5   cli
4   connector/ (vllm, torch)     router/ (aiohttp)     pool/daemon pool/serve
3   client channel ledger launch host_keys (zmq)       pool/ (the rest)
2   protocol
1   types errors config paths clock liveness keys advice                       _native (C++)
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "vllm_kvpool"
PACKAGE = "vllm_kvpool"

LAYERS = {
    1: {"", "types", "errors", "config", "paths", "clock", "liveness", "keys", "advice", "_native"},
    2: {"protocol"},
    3: {"client", "channel", "ledger", "launch", "host_keys", "pool"},
    4: {"connector", "router", "pool.daemon", "pool.serve"},
    5: {"cli", "__main__"},
}
CORNERS = ("connector", "router", "pool")
"""They never import each other: they meet in `protocol`."""
ON_THE_WIRE = (
    "pool.daemon",
    "pool.exchange",
    "pool.outbox",
    "pool.peer",
    "pool.peer_door",
    "pool.pushes",
)
ONLY_IN = {
    "vllm": ("connector",),
    "torch": ("connector",),
    "numpy": ("connector",),
    "aiohttp": ("router",),
    "httptools": ("router",),
    "uvloop": ("router",),
    "zmq": ("channel", "host_keys", "router", *ON_THE_WIRE),
    "redis": ("pool.redis_url",),
}
PURE = (
    "types", "protocol", "ledger", "pool.sessions", "pool.anchors",
    "connector.tradeoff", "connector.prefill_time",
    "router.types", "router.keys", "router.fleet", "router.policy", "router.rendezvous",
    "router.bounds", "router.bindings", "router.round_robin", "router.least_load", "router.session",
    "router.prefix_index", "router.tree", "router.groups", "router.affinity", "router.cache_aware",
    "router.task", "router.token_hashes", "router.event_wire", "router.event_index",
    "router.kv_events", "router.prediction_ledger", "router.prompt_history",
)  # fmt: skip
IMPURE = {"os", "time", "socket", "pathlib", "subprocess", "threading", "zmq", "_native", "clock"}

MODULES = sorted(ROOT.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> int:
    """The longest listed name that `module` lies under decides."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        for layer, names in LAYERS.items():
            if ".".join(parts[:length]) in names:
                return layer
    raise AssertionError(f"{module}: give it a layer in tests/test_layering.py")


def imports_of(path: Path) -> Iterator[str]:
    """All of them, also those inside functions and under `if TYPE_CHECKING`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if is_module(inner) else node.module


def is_module(name: str) -> bool:
    if not name.startswith(PACKAGE + "."):
        return False
    path = ROOT.joinpath(*name.split(".")[1:])
    return path.is_dir() or path.with_suffix(".py").exists() or name.endswith("._native")


def own(names: Iterator[str]) -> list[str]:
    mine = (name for name in names if name == PACKAGE or name.startswith(PACKAGE + "."))
    return [name.removeprefix(PACKAGE).removeprefix(".") for name in mine]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports(path: Path) -> None:
    module = name_of(path)
    for imported in own(imports_of(path)):
        assert layer_of(imported) <= layer_of(module), f"{module} imports {imported}, above it"
        for corner in CORNERS:
            if module.startswith(corner + ".") and imported.split(".")[0] in CORNERS:
                assert imported.split(".")[0] == corner, f"{module} imports {imported}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_heavy_packages(path: Path) -> None:
    module = name_of(path)
    for imported in imports_of(path):
        corners = ONLY_IN.get(imported.split(".")[0])
        if corners is not None:
            inside = any(module == c or module.startswith(c + ".") for c in corners)
            assert inside, f"{module} imports {imported}"


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_do_no_io_and_read_no_clock(module: str) -> None:
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    for imported in imports_of(path):
        assert imported.split(".")[0] not in IMPURE
        assert imported.split(".")[-1] not in IMPURE


def test_daemon_and_client_load_neither_vllm_nor_torch() -> None:
    code = (
        "import sys, vllm_kvpool.cli, vllm_kvpool.client, vllm_kvpool.launch;"
        "print(sorted({'vllm', 'torch', 'numpy', 'aiohttp', 'httptools', 'uvloop', 'redis'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
