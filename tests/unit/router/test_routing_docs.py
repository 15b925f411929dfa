"""docs/routing.md names every policy, reason, trust state and source of a session."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vllm_kvpool.router.event_index import Trust
from vllm_kvpool.router.keys import SESSION_COOKIE, SESSION_FIELDS, SESSION_HEADER
from vllm_kvpool.router.policies import POLICIES
from vllm_kvpool.router.policy import REASONS

TEXT = (Path(__file__).parents[3] / "docs" / "routing.md").read_text()


def first_cells(heading: str) -> set[str]:
    """Names in backticks that begin the rows of the table below a line."""
    rows = re.split(rf"^\|? ?{heading}.*$", TEXT, maxsplit=1, flags=re.MULTILINE)[1]
    table = rows.strip().split("\n\n")[0]
    return set(re.findall(r"^\| `([^`]+)`", table, re.MULTILINE))


def test_policies_and_reasons() -> None:
    assert first_cells("policy \\| chooses") == set(POLICIES)
    assert first_cells("reason \\| means") == set(REASONS)


def test_trust_states() -> None:
    assert first_cells("trust \\| when") == {trust.value for trust in Trust}


@pytest.mark.parametrize("name", [SESSION_HEADER, SESSION_COOKIE, *SESSION_FIELDS])
def test_what_names_a_session(name: str) -> None:
    assert f"`{name}`" in TEXT
