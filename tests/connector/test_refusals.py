"""What the connector does not start with, and what it runs without: each said with the way out."""

from __future__ import annotations

import json
import logging
import shlex
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from connector.mini_engine import BLOCK, MiniEngine, expected_output, prompt_of
from helpers import Daemon, until
from vllm.config import KVTransferConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec, SlidingWindowSpec

from vllm_kvpool.connector import KVPoolConnector, compat
from vllm_kvpool.connector.compat import KVConnectorRole
from vllm_kvpool.connector.connector import _checked_config
from vllm_kvpool.errors import ConfigError

MakeEngine = Callable[..., MiniEngine]


def config_with(**changes: Any) -> Any:
    transfer = {
        "kv_connector": "KVPoolConnector",
        "kv_load_failure_policy": "recompute",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {},
    }
    model = {"disable_cascade_attn": True}
    transfer |= {key: value for key, value in changes.items() if key in transfer}
    model |= {key: value for key, value in changes.items() if key in model}
    return SimpleNamespace(
        kv_transfer_config=KVTransferConfig(**transfer), model_config=SimpleNamespace(**model)
    )


def test_usable_configuration_is_taken() -> None:
    extra = {"pool": "mine", "min_load_tokens": 1}
    assert _checked_config(config_with(kv_connector_extra_config=extra)).pool == "mine"
    assert _checked_config(config_with()).pool == "auto"


def test_load_failures_must_be_computed_again() -> None:
    """The message ends with the whole option, and the user's settings are in it."""
    extra = {"pool": "main", "epoch": "it's"}
    config = config_with(kv_load_failure_policy="fail", kv_connector_extra_config=extra)
    with pytest.raises(ConfigError) as caught:
        _checked_config(config)
    text, _, flag = str(caught.value).partition(" so: ")
    assert "(vLLM's default)" in text
    assert text.endswith('add "kv_load_failure_policy": "recompute",')
    option, value = shlex.split(flag)
    assert option == "--kv-transfer-config"
    assert json.loads(value) == {
        "kv_connector": "KVPoolConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": extra,
        "kv_load_failure_policy": "recompute",
    }
    mended = SimpleNamespace(
        kv_transfer_config=KVTransferConfig(**json.loads(value)), model_config=config.model_config
    )
    assert _checked_config(mended).pool == "main"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kv_role": "kv_producer"}, '"kv_role": "kv_both"'),
        ({"disable_cascade_attn": False}, "drop --no-disable-cascade-attn"),
        ({"kv_connector_extra_config": {"pol": "x"}}, "unknown key; known are pool, size"),
        ({"kv_connector_extra_config": {"pool": "a/b"}}, "no slash"),
        ({"kv_connector_extra_config": {"min_load_tokens": "many"}}, "min_load_tokens"),
    ],
)
def test_other_configurations_that_cannot_work(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _checked_config(config_with(**changes))
    assert words in str(caught.value)


def test_config_error_reaches_whoever_starts_the_engine(make_engine: MakeEngine) -> None:
    with pytest.raises(ConfigError, match="unknown key"):
        make_engine(extra={"pools": "x"})


# models ---------------------------------------------------------------------------------------------


def full(**options: Any) -> FullAttentionSpec:
    return FullAttentionSpec(
        block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32, **options
    )


def window() -> SlidingWindowSpec:
    return SlidingWindowSpec(
        block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32, sliding_window=64
    )


class FullAttentionWithSinks(FullAttentionSpec):
    pass


def groups(*specs: Any) -> Any:
    return [KVCacheGroupSpec([f"layer {i}"], spec) for i, spec in enumerate(specs)]


def reason(
    *specs: Any, parallel: dict[str, int] | None = None, model: dict[str, Any] | None = None
) -> str | None:
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(**(parallel or {})),
        model_config=SimpleNamespace(**(model or {})),
        cache_config=SimpleNamespace(),
    )
    return compat.why_unsupported(config, SimpleNamespace(kv_cache_groups=groups(*specs)))


def test_trap_12_models_with_several_groups_are_left_alone() -> None:
    assert reason(full()) is None
    assert "2 KV cache groups" in reason(full(), window())
    assert "SlidingWindowSpec" in reason(window())
    other = FullAttentionWithSinks(
        block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32
    )
    assert "FullAttentionWithSinks" in reason(other)
    assert "decode_context_parallel_size" in reason(
        full(), parallel={"decode_context_parallel_size": 2}
    )


def test_platforms_without_copies_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "platform_kind", lambda: "cuda")
    assert reason(full()) is None
    assert "enable_sleep_mode" in reason(full(), model={"enable_sleep_mode": True})
    monkeypatch.setattr(compat, "platform_kind", lambda: "rocm")
    assert "this is rocm" in reason(full())


def test_trap_12_unsupported_engine_runs_as_without_a_pool(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Said once, by the scheduler side; nothing is stored, nothing is loaded, nothing fails."""
    monkeypatch.setattr(compat, "why_unsupported", lambda *configs: "two of something")
    with caplog.at_level(logging.WARNING):
        engine = make_engine()
    assert caplog.text.count("off for this engine, which runs as without it: two of something") == 1
    prompt = prompt_of(1, 6 * BLOCK)
    assert engine.generate(prompt) == (expected_output(prompt), 0)
    assert engine.generate(prompt) == (expected_output(prompt), 5 * BLOCK)
    engine.reset_prefix_cache(connector=True)
    assert engine.generate(prompt) == (expected_output(prompt), 0)
    assert engine.stats == {}


def test_missing_layout_of_a_worker_turns_the_pool_off(
    make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(connect=False)
    link = engine.connector._scheduler._link
    link._slot, link._num_workers = None, 2
    engine.connector.set_xfer_handshake_metadata_pp_aware(
        {(0, 0): engine.worker.get_handshake_metadata()}
    )
    assert "1 of 2 workers told their layout" in caplog.text
    prompt = prompt_of(2, 6 * BLOCK)
    assert engine.generate(prompt) == (expected_output(prompt), 0)
    assert engine.stats == {"misses:no_pool": 1}


# daemons that are not there ---------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("vllm_kvpool.connector.link.ABSENT_S", 0.2)
    caplog.set_level(logging.INFO)


def step_until_logged(engine: MiniEngine, caplog: pytest.LogCaptureFixture, words: str) -> None:
    until(lambda: (engine.step(), words in caplog.text)[1], words)


def count_lines(caplog: pytest.LogCaptureFixture, words: str) -> int:
    return sum(words in record.getMessage() for record in caplog.records)


@pytest.mark.usefixtures("impatient")
def test_wrong_name_of_a_pool_is_said_once_with_the_names_there_are(
    make_engine: MakeEngine, daemon: Daemon, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(extra={"pool": "tset"}, connect=False)
    words = (
        f"no daemon serves pool 'tset' in {daemon.shm_dir} (pools here: test); start it: "
        f"vllm-kvpool serve --name tset --shm-dir {daemon.shm_dir}"
    )
    assert engine.connector.has_pending_push_work()  # no request comes, and yet it is said
    step_until_logged(engine, caplog, words)
    assert not engine.connector.has_pending_push_work()
    prompt = prompt_of(3, 6 * BLOCK)
    assert engine.generate(prompt) == (expected_output(prompt), 0)
    time.sleep(0.3)
    engine.step()
    assert count_lines(caplog, "no daemon serves") == 1


@pytest.mark.usefixtures("impatient")
def test_daemon_that_goes_and_comes_back_is_said_once_each(
    make_engine: MakeEngine, daemon: Daemon, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine()
    engine.lose_patience()
    gone = "the daemon of pool 'test' is gone: storing nothing until it is back, loads go on"
    for seed in range(2):
        caplog.clear()
        daemon.kill()
        engine.generate(prompt_of(10 + seed, 6 * BLOCK))
        step_until_logged(engine, caplog, gone)
        time.sleep(0.3)
        engine.step()
        assert count_lines(caplog, gone) == 1
        daemon.start()
        step_until_logged(engine, caplog, "the daemon of pool 'test' is back")
    assert engine.connector._scheduler._link.connected


@pytest.mark.usefixtures("impatient")
def test_daemon_that_hangs_is_said_not_to_answer(
    make_engine: MakeEngine, daemon: Daemon, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(connect=False)
    daemon.pause()
    assert engine.connector.has_pending_push_work()
    step_until_logged(engine, caplog, "the daemon of pool 'test' does not answer: nothing is")
    daemon.resume()
    step_until_logged(engine, caplog, "connected as client")
    assert count_lines(caplog, "is back") == 0


# how it is found --------------------------------------------------------------------------------------


def test_plugin_registers_the_name_once() -> None:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    from vllm_kvpool.connector.plugin import register

    register()
    register()
    assert KVConnectorFactory.get_connector_class_by_name("KVPoolConnector") is KVPoolConnector


def test_facts_that_vllm_asks_the_class_and_the_instance(engine: MiniEngine) -> None:
    connector = engine.connector
    assert connector.role == KVConnectorRole.SCHEDULER
    assert not connector.requires_kv_delivery
    assert not KVPoolConnector.requires_piecewise_for_cudagraph({})
    assert connector.request_finished(SimpleNamespace(request_id="?"), []) == (False, None)
