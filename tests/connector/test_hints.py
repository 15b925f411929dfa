"""Per-request hints: strict, never fatal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from connector.mini_engine import BLOCK, MiniEngine, expected_output, prompt_of

from vllm_kvpool.connector.hints import NO_HINTS, Hints, parse_hints


def test_hints_are_read() -> None:
    hints = {"load": False, "store": True, "ttl_s": 600, "pin": True}
    assert parse_hints("r", {"kvpool": hints}) == Hints(load=False, ttl_s=600, pin=True)
    for absent in (None, {}, {"another": {"x": 1}}, {"kvpool": {}}):
        assert parse_hints("r", absent) == NO_HINTS


@pytest.mark.parametrize(
    "hints",
    [
        {"load": "no"},
        {"load": 0},
        {"ttl_s": 0},
        {"ttl_s": -5},
        {"ttl_s": 1.5},
        {"ttl_s": 10**12},
        {"ttl": 60},
        {"pin": None},
        ["pin"],
        "pin",
        None,
    ],
)
def test_bad_hint_is_an_error_in_the_log_and_ignored(
    hints: Any, caplog: pytest.LogCaptureFixture
) -> None:
    assert parse_hints("request 7", {"kvpool": hints}) == NO_HINTS
    assert "hints of request request 7 are ignored" in caplog.text
    assert [record.levelname for record in caplog.records] == ["ERROR"]


def test_request_with_a_bad_hint_runs_as_if_it_had_none(
    make_engine: Callable[..., MiniEngine],
) -> None:
    engine = make_engine()
    prompt = prompt_of(1, 4 * BLOCK + 1)
    engine.generate(prompt, hints={"store": "perhaps"})
    engine.reset_prefix_cache()
    assert engine.generate(prompt, hints={"lode": False}) == (expected_output(prompt), 4 * BLOCK)
