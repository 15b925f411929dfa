"""The files of docs/deploy/, read as Docker and Kubernetes do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

DOCS = Path(__file__).parents[2] / "docs"
COMPOSE = DOCS / "deploy/compose.yaml"
KUBERNETES = sorted((DOCS / "deploy/kubernetes").glob("*.yaml"))
POD_IP = "10.1.2.3"


def objects() -> list[dict[str, Any]]:
    return [made for file in KUBERNETES for made in yaml.safe_load_all(file.read_text())]


def of_kind(*kinds: str) -> list[dict[str, Any]]:
    return [made for made in objects() if made["kind"] in kinds]


def pods() -> dict[str, dict[str, Any]]:
    """Specification of the pods of each workload, by its name."""
    workloads = of_kind("DaemonSet", "Deployment")
    return {made["metadata"]["name"]: made["spec"]["template"]["spec"] for made in workloads}


def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE.read_text())["services"]
    return found


class Command(NamedTuple):
    """One that a file has run in a container."""

    where: str
    words: list[str]

    @property
    def values(self) -> dict[str, str]:
        """Options with a value, written either way."""
        pairs = zip(self.words, [*self.words[1:], ""], strict=True)
        found = {word: after for word, after in pairs if word.startswith("--")}
        return found | dict(word.split("=", 1) for word in self.words if re.match("--[^=]+=", word))


def commands(program: str) -> list[Command]:
    """All that run `program`, probes and hooks included."""
    return [command for command in _all_commands() if command.words[0] == program]


def _all_commands() -> Iterator[Command]:
    for name, service in services().items():
        yield Command(f"compose {name}", [str(word) for word in service["command"]])
        test = service.get("healthcheck", {}).get("test", ["CMD", "none"])
        assert test[0] == "CMD"
        yield Command(f"compose {name} healthcheck", test[1:])
    for name, pod in pods().items():
        for container in pod["containers"]:
            words = [*container["command"], *container.get("args", [])]
            yield Command(name, [word.replace("$(POD_IP)", POD_IP) for word in words])
            for hook, action in _hooks(container):
                yield Command(f"{name} {hook}", action["exec"]["command"])


def _hooks(container: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    probes = {kind: container.get(kind, {}) for kind in ("startupProbe", "livenessProbe")}
    hooks = probes | container.get("lifecycle", {})
    return [(kind, action) for kind, action in hooks.items() if "exec" in action]


def shell_lines(heading: str) -> list[str]:
    """The blocks of shell commands under a heading of docs/deploy.md."""
    _, _, behind = (DOCS / "deploy.md").read_text().partition(f"\n## {heading}\n")
    blocks = re.findall(r"^```sh\n(.*?)^```", behind.split("\n## ")[0], re.DOTALL | re.MULTILINE)
    assert blocks, heading
    return blocks


def mebibytes(text: str) -> int:
    """`64GiB` of ours, `68Gi` of Kubernetes, `68g` of Compose."""
    match = re.fullmatch(r"(\d+)([GgMm])(i|iB)?", text)
    assert match is not None, text
    return int(match[1]) << (10 if match[2] in "Gg" else 0)
