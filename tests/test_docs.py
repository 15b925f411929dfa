"""The documents say what the code does: every message, error code, field, option, hint, metric and
counter is described."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import typing
from pathlib import Path

import msgspec
import pytest

import vllm_kvpool
from vllm_kvpool import protocol
from vllm_kvpool._native import PoolOwner
from vllm_kvpool.config import ConnectorConfig, PoolConfig, RouterConfig
from vllm_kvpool.connector.hints import Hints
from vllm_kvpool.pool import inbox, outbox, peer_door, requests, service, spaces
from vllm_kvpool.protocol import AnyPeerRequest, AnyReply, AnyRequest, Request

DOCS = Path(__file__).parents[1] / "docs"
DOORS = (service, peer_door, outbox, inbox, spaces, requests)
COMMON = set(Request.__struct_fields__)


def sections(name: str, marker: str) -> dict[str, str]:
    """Text under each heading."""
    parts = re.split(rf"^{marker} (.+)$", (DOCS / name).read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def tables(text: str) -> dict[str, list[str]]:
    """First cell (a name in backticks) to the other cells."""
    rows = (line.strip("|").split("|") for line in text.splitlines() if line.startswith("| `"))
    return {row[0].strip(" `"): [cell.strip() for cell in row[1:]] for row in rows}


MESSAGES = {
    struct.__struct_config__.tag: struct
    for union in (AnyRequest, AnyPeerRequest, AnyReply)
    for struct in typing.get_args(union)
}


@pytest.mark.parametrize("tag", MESSAGES)
def test_message_and_its_fields(tag: str) -> None:
    text = sections("protocol.md", "###")[tag]
    described = set(tables(text)) - (ERROR_CODES if tag == "error" else set())
    assert described == set(MESSAGES[tag].__struct_fields__) - COMMON


def test_no_message_is_made_up() -> None:
    assert set(sections("protocol.md", "###")) == set(MESSAGES)


def codes_in_code() -> set[str]:
    source = "".join(Path(module.__file__ or "").read_text() for module in DOORS)
    raised = re.findall(r"RefusedError\(\s*\"(\w+)\"", source)
    answered = re.findall(r"_error\([^\n]*?, \"(\w+)\"", source)
    return {*raised, *answered}


ERROR_CODES = codes_in_code()


def test_error_codes() -> None:
    described = set(tables(sections("protocol.md", "###")["error"])) - {"code", "message"}
    assert described == ERROR_CODES
    listed = (protocol.Error.__doc__ or "").removeprefix("Codes: ").rstrip(".")
    assert {code.strip() for code in listed.split(",")} == ERROR_CODES


def test_limits() -> None:
    text = (DOCS / "protocol.md").read_text()
    assert f"{protocol.MAX_KEYS:,}" in text
    assert f"{protocol.MAX_MESSAGE_BYTES >> 20} MiB" in text


@pytest.mark.parametrize(
    ("heading", "config"),
    [("The daemon", PoolConfig), ("The engine", ConnectorConfig), ("The router", RouterConfig)],
)
def test_config_fields_and_defaults(heading: str, config: type[msgspec.Struct]) -> None:
    described = tables(sections("configuration.md", "##")[heading])
    assert list(described) == list(config.__struct_fields__)
    for field, (default, _) in described.items():
        value = getattr(config(), field)
        shown = "" if value == () else str(value)
        shown = shown.lower() if isinstance(value, bool) else shown
        assert default == (f"`{shown}`" if shown else "(none)"), field


def test_hints() -> None:
    described = tables(sections("configuration.md", "##")["A request"])
    assert list(described) == list(Hints.__struct_fields__)


# metrics ------------------------------------------------------------------------------------------

PACKAGE = Path(vllm_kvpool.__file__).parent


def nodes(module: str, kind: type[ast.AST], name: str = "") -> list[typing.Any]:
    """Of `module`; those that are named so, if a name is given. Read, not imported: vLLM may be
    missing."""
    found = [n for n in ast.walk(ast.parse((PACKAGE / module).read_text())) if isinstance(n, kind)]
    return [n for n in found if not name or called(n) == name]


def called(node: typing.Any) -> str:
    """Name of a function, of what a call calls, of what an assignment sets or an index looks into."""
    if isinstance(node, ast.Assign):
        return called(node.targets[0])
    for inner in ("func", "value"):
        if hasattr(node, inner) and not isinstance(node, ast.Attribute):
            return called(getattr(node, inner))
    return str(
        getattr(node, "attr", None) or getattr(node, "id", None) or getattr(node, "name", "")
    )


def words(*trees: ast.AST) -> set[str]:
    """String literals, without docstrings and names of attributes; f-strings as in "error_<code>"."""
    found: set[str] = set()
    for node in trees:
        if isinstance(node, ast.JoinedStr):
            found.add("".join(map(part, node.values)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
        elif not (is_docstring(node) or (isinstance(node, ast.Call) and called(node) == "getattr")):
            found |= words(*ast.iter_child_nodes(node))
    return found - {""}


def is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def part(node: typing.Any) -> str:
    return str(node.value) if isinstance(node, ast.Constant) else f"<{called(node)}>"


def bodies(module: str, *functions: str) -> set[str]:
    return words(
        *(n for name in functions for d in nodes(module, ast.FunctionDef, name) for n in d.body)
    )


def table_in(name: str) -> dict[str, str]:
    (assign,) = nodes("connector/stats.py", ast.Assign, name)
    return dict(ast.literal_eval(assign.value))


def reasons_in_code() -> dict[str, set[str]]:
    """Metric -> reasons. Those that are no literal where they are counted come from elsewhere."""
    left = words(*nodes("client.py", ast.Call, "_leave")) | {"lost"}
    skipped = words(*(n.slice for n in nodes("client.py", ast.Subscript, "skipped")))
    skipped = skipped - {"store_<reason>"} | {f"store_{reason}" for reason in left}
    (statuses,) = nodes("connector/loads.py", ast.Assign, "STATUS_REASONS")
    pulls = "pool/pulls.py"
    pull_calls = ("_fail", "_finish", "_try_next_host")
    pull_ends = [call for name in pull_calls for call in nodes(pulls, ast.Call, name)]
    for module in ("pool/transfer.py", "pool/landing.py"):
        pull_ends += nodes(module, ast.Call, "TransferError")
    elsewhere = {
        "misses": bodies("connector/loads.py", "look_up", "_compared", "_why_not"),
        "load_failed_blocks": words(*statuses.value.values),
        "store_skipped_blocks": words(*nodes("connector/stores.py", ast.Call, "_give_up"))
        | left
        | {"<code>"},
        "pull_ends": words(*pull_ends, *(a.value for a in nodes(pulls, ast.Assign, "reason"))),
        "client_skipped": skipped | bodies("client.py", "_why_not"),
    }
    reasons: dict[str, set[str]] = {name: set(found) for name, found in elsewhere.items()}
    for path in (PACKAGE / "connector").glob("*.py"):
        for call in nodes(f"connector/{path.name}", ast.Call, "count"):
            for keyword in call.keywords:
                metric = call.args[0].value
                known = isinstance(keyword.value, ast.Constant) or metric in elsewhere
                assert known, f"say above where the reasons of {metric} come from"
                reasons.setdefault(metric, set()).update(words(keyword.value))
    return reasons


def test_metrics() -> None:
    described = tables(sections("metrics.md", "##")["In an engine's `/metrics`"].split("###")[0])
    counters, reasoned = table_in("COUNTERS"), table_in("REASONED_COUNTERS")
    types = {f"vllm:kvpool_{name}_total": "counter" for name in counters}
    types |= {f"vllm:kvpool_{name}_total": "counter, `reason`" for name in reasoned}
    types |= {f"vllm:kvpool_{name}": "histogram" for name in table_in("HISTOGRAMS")}
    assert {name: cells[0] for name, cells in described.items()} == types


def test_reasons() -> None:
    headed = sections("metrics.md", "###")
    described = {metric: set(tables(text.split("\n## ")[0])) for metric, text in headed.items()}
    assert described == reasons_in_code()
    assert set(described) == set(table_in("REASONED_COUNTERS"))


def test_counters_of_stats(tmp_path: Path) -> None:
    described = set(tables(sections("metrics.md", "##")["In `vllm-kvpool stats`"]))
    native = set(PoolOwner.create(str(tmp_path / "pool"), 4 << 20).stats())
    indexed = [
        index.slice
        for path in (PACKAGE / "pool").glob("*.py")
        for name in ("counters", "_counters")
        for index in nodes(f"pool/{path.name}", ast.Subscript, name)
    ]
    assert described == native | words(*indexed)


# options ------------------------------------------------------------------------------------------


def test_every_option_of_serve_and_route_has_a_help_text() -> None:
    from vllm_kvpool.cli import ROUTE_HELP, SERVE_HELP

    assert list(SERVE_HELP) == list(PoolConfig.__struct_fields__)
    assert list(ROUTE_HELP) == list(RouterConfig.__struct_fields__)


def test_metrics_headers_and_admin_paths_of_the_router() -> None:
    from vllm_kvpool.router import admin, exchange
    from vllm_kvpool.router.metrics import METRICS

    text = sections("routing.md", "##")
    assert list(tables(text["Metrics"])) == list(METRICS)
    headers = re.findall(r"(x-kvpool-[a-z-]+): %", Path(exchange.__file__).read_text())
    assert list(tables(text["Receipts"])) == headers
    paths = re.findall(r"web\.(get|post|delete)\(\"([^\"]+)", Path(admin.__file__).read_text())
    assert list(tables(text["The fleet"]))[-len(paths) :] == [
        f"{verb.upper()} {path}" for verb, path in paths
    ]


def test_example_of_the_protocol_runs(daemon_folder: Path) -> None:
    code = re.search(
        r"^```python\n(.*?)^```", (DOCS / "protocol.md").read_text(), re.MULTILINE | re.DOTALL
    )
    assert code is not None
    result = subprocess.run(
        [sys.executable, "-c", code[1], str(daemon_folder)],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout == "1 block is visible\n"


@pytest.fixture
def daemon_folder(tmp_path: Path) -> typing.Iterator[Path]:
    from helpers import Daemon

    daemon = Daemon(tmp_path).start()
    yield daemon.paths.folder
    assert daemon.stop() == 0
