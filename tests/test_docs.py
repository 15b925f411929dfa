"""The documents say what the code does: every message, error code, field, option and hint is
described."""

from __future__ import annotations

import re
import subprocess
import sys
import typing
from pathlib import Path

import msgspec
import pytest

from vllm_kvpool import protocol
from vllm_kvpool.config import ConnectorConfig, PoolConfig
from vllm_kvpool.pool import outbox, peer_door, requests, service
from vllm_kvpool.protocol import AnyPeerRequest, AnyReply, AnyRequest, Request

DOCS = Path(__file__).parents[1] / "docs"
DOORS = (service, peer_door, outbox, requests)
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
    ("heading", "config"), [("The daemon", PoolConfig), ("The engine", ConnectorConfig)]
)
def test_config_fields_and_defaults(heading: str, config: type[msgspec.Struct]) -> None:
    described = tables(sections("configuration.md", "##")[heading])
    assert list(described) == list(config.__struct_fields__)
    for field, (default, _) in described.items():
        value = getattr(config(), field)
        shown = str(value).lower() if isinstance(value, bool) else str(value)
        assert default == (f"`{shown}`" if shown else "(none)"), field


def test_every_option_of_serve_has_a_help_text() -> None:
    from vllm_kvpool.cli import SERVE_HELP

    assert list(SERVE_HELP) == list(PoolConfig.__struct_fields__)


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
