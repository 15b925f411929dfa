"""Whose folder is taken for a pool's: anybody may make names in /dev/shm."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vllm_kvpool.errors import PoolUnavailable
from vllm_kvpool.paths import check_folder

STRANGER = 12345
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "pool"
    folder.mkdir(mode=0o700)
    return folder


def test_own_and_missing_folders_pass(folder: Path, tmp_path: Path) -> None:
    check_folder(folder)
    check_folder(tmp_path / "missing")
    folder.chmod(0o2770)
    check_folder(folder)


def test_links_and_files_do_not(folder: Path, tmp_path: Path) -> None:
    link, file = tmp_path / "link", tmp_path / "file"
    link.symlink_to(folder)
    file.touch()
    for path in (link, file):
        with pytest.raises(PoolUnavailable, match="is not a directory"):
            check_folder(path)


def test_nor_does_what_everybody_may_write_to(folder: Path) -> None:
    folder.chmod(0o777)
    with pytest.raises(PoolUnavailable, match="everybody may write"):
        check_folder(folder)


@as_root
@pytest.mark.parametrize(
    ("group", "mode", "trusted"),
    [
        (STRANGER, 0o700, False),
        (STRANGER, 0o2770, False),
        (0, 0o700, False),
        (0, 0o750, False),
        (0, 0o2770, True),
        (0, 0o2777, False),
    ],
)
def test_another_user_needs_a_group_of_ours(
    folder: Path, group: int, mode: int, trusted: bool
) -> None:
    os.chown(folder, STRANGER, group)
    folder.chmod(mode)
    if trusted:
        check_folder(folder)
        return
    with pytest.raises(PoolUnavailable):
        check_folder(folder)
