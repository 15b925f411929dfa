"""What Docker and Kubernetes would refuse for its form."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
from deploy.manifests import COMPOSE, KUBERNETES, objects


def check_compose(file: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    return subprocess.run([*command, str(file)], capture_output=True, text=True, check=False)


def test_compose(tmp_path: Path) -> None:
    done = check_compose(COMPOSE)
    assert done.returncode == 0, done.stdout
    wrong = tmp_path / "compose.yaml"
    wrong.write_text(COMPOSE.read_text().replace("stop_grace_period", "stop_grace"))
    assert check_compose(wrong).returncode == 1


def test_something_is_checked() -> None:
    assert {made["kind"] for made in objects()} >= {"DaemonSet", "Deployment", "Service"}
    assert len(KUBERNETES) <= len(objects())


@pytest.mark.parametrize(
    "made", objects(), ids=lambda made: f"{made['kind']} {made['metadata']['name']}"
)
@pytest.mark.parametrize("version", ["1.29", "1.37"])
def test_kubernetes(made: dict[str, object], version: str) -> None:
    kubernetes_validate.validate(made, version, strict=True)


def test_an_unknown_field_is_refused() -> None:
    (made, *_) = objects()
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(made | {"sepc": {}}, "1.29", strict=True)
