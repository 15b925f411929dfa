"""Every command line of the files is one that its program takes, and says what it must."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from deploy.manifests import Command, commands, mebibytes, pods, services, shell_lines

from vllm_kvpool import cli
from vllm_kvpool.config import ConnectorConfig, PoolConfig, RouterConfig
from vllm_kvpool.router import supervisor

CONNECTOR = {
    "kv_connector": "KVPoolConnector",
    "kv_connector_module_path": "vllm_kvpool.connector",
    "kv_role": "kv_both",
    "kv_load_failure_policy": "recompute",
}


def named(command: Command) -> str:
    return command.where


def ours(verb: str) -> list[Command]:
    return [command for command in commands("vllm-kvpool") if command.words[1] == verb]


def transfer_config(command: Command) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(command.values["--kv-transfer-config"])
    return config


@pytest.mark.parametrize("command", ours("serve"), ids=named)
def test_serve(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an empty file behind --config; what else is written there: test_setup."""
    served: list[PoolConfig] = []
    monkeypatch.setattr(cli, "serve", served.append)
    empty = tmp_path / "pool.toml"
    empty.touch()
    given = command.values["--config"]
    assert cli.main([word.replace(given, str(empty)) for word in command.words[1:]]) == 0
    served[0].check_access()
    assert served[0].name == "main"


@pytest.mark.parametrize("command", ours("route"), ids=named)
def test_route(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    routed: list[RouterConfig] = []
    monkeypatch.setattr(supervisor, "run_router", routed.append)
    assert cli.main(command.words[1:]) == 0
    assert routed[0].replicas
    assert routed[0].admin.startswith("127.0.0.1:")
    supervisor.parse_addresses("replicas", routed[0].replicas)


def test_each_file_has_a_pool_and_a_router() -> None:
    for verb in ("serve", "route", "stats"):
        assert {command.where.startswith("compose") for command in ours(verb)} == {True, False}


def test_probes_ask_for_the_pool_that_is_served() -> None:
    served = {(c.values["--name"], c.values["--shm-dir"]) for c in ours("serve")}
    for command in ours("stats"):
        options = cli._parser().parse_args(command.words[1:])
        assert {(options.name, options.shm_dir)} == served


@pytest.mark.parametrize("command", commands("vllm"), ids=named)
def test_vllm(command: Command) -> None:
    assert command.words[1] == "serve"
    assert "--enable-prompt-tokens-details" in command.words  # the router compares them
    config = transfer_config(command)
    extra = ConnectorConfig.from_dict(config.pop("kv_connector_extra_config"), command.where)
    assert config == CONNECTOR
    assert {(extra.pool_name, extra.shm_dir)} == {
        (c.values["--name"], c.values["--shm-dir"]) for c in ours("serve")
    }


PARSE = """
import json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
for words in json.load(sys.stdin):
    options = make_arg_parser(FlexibleArgumentParser()).parse_args(words)
    print(options.kv_transfer_config.kv_connector, options.kv_transfer_config.kv_load_failure_policy)
"""


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_takes_the_lines() -> None:
    """In a process of its own: vLLM warns of much as it is imported."""
    lines = [command.words[2:] for command in commands("vllm")]
    done = subprocess.run(
        [sys.executable, "-c", PARSE],
        input=json.dumps(lines), capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-len(lines) :] == ["KVPoolConnector recompute"] * len(lines)


def test_the_pool_fits_into_its_memory_limit() -> None:
    """Its pages are charged to the daemon; a gibibyte and more is for all else."""
    kubernetes = pods()["kvpool"]["containers"][0]["resources"]
    compose = services()["pool"]["deploy"]["resources"]
    assert kubernetes["requests"]["memory"] == kubernetes["limits"]["memory"]
    limits = [compose["limits"]["memory"], kubernetes["limits"]["memory"]]
    sizes = [command.values["--size"] for command in ours("serve")]
    for size, limit in zip(sizes, limits, strict=True):
        assert mebibytes(limit) >= mebibytes(size) + 1024


def test_answers_under_way_have_time_to_end() -> None:
    """Longer than the router drains, with what its hook waits before."""
    drain_s = RouterConfig().drain_s
    router = pods()["router"]
    (hook,) = (c for c in commands("sleep") if c.where == "router preStop")
    assert router["terminationGracePeriodSeconds"] > drain_s + int(hook.words[1])
    compose_s = int(services()["router"]["stop_grace_period"].removesuffix("s"))
    assert compose_s > drain_s


def test_an_engine_ends_when_its_answers_have() -> None:
    """The hook's words, run against metrics as vLLM writes them."""
    (hook,) = (c for c in commands("sh") if c.where == "engines preStop")
    pattern = re.search(r"grep -q '([^']+)'", hook.words[2])
    assert pattern is not None
    line = 'vllm:num_requests_running{engine="0",model_name="m"} '
    assert re.search(pattern[1], line + "3.0")
    assert not re.search(pattern[1], line + "0.0")


def test_every_block_of_shell_in_the_document_is_run() -> None:
    assert [len(shell_lines(heading)) for heading in ("Compose", "Kubernetes")] == [2, 1]
