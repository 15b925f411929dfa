"""Per-request hints: strict, never fatal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from connector.mini_engine import BLOCK, MiniEngine, expected_output, prompt_of
from helpers import Daemon

from vllm_kvpool.connector import hints as module
from vllm_kvpool.connector.hints import NO_HINTS, WANTED, HintReader, Hints


@pytest.fixture
def reader() -> HintReader:
    return HintReader()


def test_hints_are_read(reader: HintReader) -> None:
    hints = {"load": False, "store": True, "ttl_s": 600, "pin": True}
    assert reader.read("r", {"kvpool": hints}) == Hints(load=False, ttl_s=600, pin=True)
    for absent in (None, {}, {"another": {"x": 1}}, {"kvpool": {}}):
        assert reader.read("r", absent) == NO_HINTS


@pytest.mark.parametrize(
    ("hints", "words"),
    [
        ({"load": "no"}, "'load' = 'no': give true or false"),
        ({"load": 0}, "'load' = 0: give true or false"),
        ({"ttl_s": 0}, "'ttl_s' = 0: give whole seconds, at least 1"),
        ({"ttl_s": -5}, "'ttl_s' = -5: give whole seconds"),
        ({"ttl_s": 1.5}, "'ttl_s' = 1.5: give whole seconds"),
        ({"ttl_s": 10**12}, "at most"),
        ({"ttl": 60}, "'ttl' = 60: unknown hint; known are load, store, ttl_s, pin"),
        ({"pin": None}, "'pin' = None: give true or false"),
        ({7: True}, "7 = True: unknown hint"),
        ({"pin\n": "x" * 1_000}, "'pin\\n' = 'xxx"),
        (["pin"], "hints = ['pin']: give a mapping"),
        ("pin", "hints = 'pin': give a mapping"),
        (None, "hints = None: give a mapping"),
    ],
)
def test_bad_hint_is_an_error_in_the_log_and_ignored(
    reader: HintReader, hints: Any, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert reader.read("7", {"kvpool": hints}) == NO_HINTS
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    text = record.getMessage()
    assert text.startswith("KV pool: ignored in request 7: ")
    assert words in text
    assert "\n" not in text
    assert len(text) < 250


def test_every_hint_says_what_is_wanted() -> None:
    assert tuple(WANTED) == Hints.__struct_fields__


def test_good_hints_beside_a_bad_one_count(reader: HintReader) -> None:
    hints = {"store": False, "pin": "yes", "ttl_s": 60, "lode": False}
    assert reader.read("r", {"kvpool": hints}) == Hints(store=False, ttl_s=60)


def test_each_mistake_is_logged_once_a_while(
    reader: HintReader, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for request in range(50):
        reader.read(f"r{request}", {"kvpool": {"pin": "yes", f"hint {request}": 1}})
        reader.read(f"s{request}", {"kvpool": {"ttl_s": request - 100}})
    assert len(caplog.records) == 3
    clock = module.time.monotonic() + module.REPEAT_S
    monkeypatch.setattr(module.time, "monotonic", lambda: clock)
    reader.read("late", {"kvpool": {"pin": "yes"}})
    reader.read("later", {"kvpool": {"pin": "yes"}})
    assert len(caplog.records) == 4


def test_request_with_a_bad_hint_runs_with_the_others(
    make_engine: Callable[..., MiniEngine], daemon: Daemon
) -> None:
    engine = make_engine()
    prompt = prompt_of(1, 4 * BLOCK + 1)
    engine.generate(prompt, hints={"store": False, "pin": "yes"})
    assert daemon.counter("stored") == 0
    engine.generate(prompt, hints={"store": "perhaps"})
    engine.reset_prefix_cache()
    assert engine.generate(prompt, hints={"lode": False}) == (expected_output(prompt), 4 * BLOCK)
