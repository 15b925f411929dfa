"""Wrong options and files: exit status 2 and one line that names the field, the value and what to
do."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import run_cli


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--size", "12 apples"], ["size = '12 apples'", "64GiB"]),
        (["--size", "0"], ["size = '0'", "larger than 0"]),
        (["--size", "150%"], ["size = '150%'", "at most 100%"]),
        (["--size", "-1GiB"], ["size"]),
        (["--size", "1KiB"], ["size = '1KiB'", "larger one"]),
        (["--min-block", "4MiB"], ["min_block = '4MiB'", "16.0 MiB", "--size 1073741824 or more"]),
        (["--min-block", "2GiB"], ["min_block = '2GiB'", "take a smaller --min-block"]),
        (["--min-block", "1%"], ["min_block = '1%'", "plain bytes"]),
        (["--name", "a/b"], ["name = 'a/b'", "no slash"]),
        (["--name", ""], ["name = ''"]),
        (["--name", "../x"], ["name = '../x'", "no slash"]),
        (["--name", "auto"], ["name = 'auto'", 'pool "default"']),
        (["--numa", "zero"], ["numa = 'zero'", '"0,1"']),
        (["--listen", "tcp://*:5555"], ["listen = 'tcp://*:5555'", "--insecure"]),
        (["--listen", "ipc:///no/such/folder/x.sock"], ["listen = 'ipc:///no/such/folder/x.sock'"]),
        (["--unknown", "1"], ["unrecognized arguments"]),
    ],
)
def test_option(shm_dir: Path, options: list[str], expected: list[str]) -> None:
    given = ["--size", "16MiB", *options]
    if options[0] == "--size":
        given = [f"--size={options[1]}"]
    result = run_cli("serve", "--shm-dir", shm_dir, *given)
    assert result.returncode == 2
    for text in expected:
        assert text in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('sise = "16MiB"', ["sise", "unknown key", "size"]),
        ("size = [1]", ["size = [1]", "64GiB"]),
        ("numa = 0", ["numa = 0", 'in quotes: "0"']),
        ('remove = "yes"', ["remove = 'yes'", "true or false"]),
        ("size = ", ["config", "Invalid value"]),
        ('name = "a/b"', ["name = 'a/b'"]),
    ],
)
def test_config_file(shm_dir: Path, text: str, expected: list[str]) -> None:
    config = shm_dir / "pool.toml"
    config.write_text(text)
    result = run_cli("serve", "--shm-dir", shm_dir, "--config", config)
    assert result.returncode == 2
    for part in expected:
        assert part in result.stderr


def test_missing_config_file(shm_dir: Path) -> None:
    result = run_cli("serve", "--config", shm_dir / "absent.toml")
    assert result.returncode == 2
    assert "absent.toml" in result.stderr


def test_missing_mount() -> None:
    result = run_cli("serve", "--shm-dir", "/no/such/mount", "--size", "16MiB")
    assert result.returncode == 2
    assert "shm_dir = '/no/such/mount'" in result.stderr


def test_path_too_long_for_a_socket(shm_dir: Path) -> None:
    deep = shm_dir / ("d" * 90)
    deep.mkdir()
    result = run_cli("serve", "--shm-dir", deep, "--size", "16MiB")
    assert result.returncode == 2
    assert "shorter" in result.stderr
