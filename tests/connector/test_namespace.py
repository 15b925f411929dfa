"""Engines that may share blocks, and those that must not."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from connector.mini_engine import BLOCK, MiniEngine, expected_output, prompt_of

from vllm_kvpool._native import derive_keys
from vllm_kvpool.connector import compat
from vllm_kvpool.connector.namespace import (
    build_namespace,
    model_fields,
    weights_identity,
)
from vllm_kvpool.keys import block_keys, differing_fields, key_mask, namespace_digest

MakeEngine = Callable[..., MiniEngine]
PROMPT = prompt_of(1, 6 * BLOCK + 1)


def fields_of(engine: MiniEngine) -> dict[str, str]:
    return dict(engine.connector._scheduler._link.client._namespace.fields)


def test_equal_engines_agree_in_every_field(make_engine: MakeEngine) -> None:
    one, other = make_engine(num_blocks=64), make_engine(num_blocks=128, max_tokens=64)
    for engine in (one, other):
        engine.generate(PROMPT)
    assert fields_of(one) == fields_of(other)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"extra": {"epoch": "weights of May"}}, "epoch"),
        ({"prefix_caching_hash_algo": "sha256_cbor"}, "hash"),
        ({"hf_overrides": {"rms_norm_eps": 0.1}}, "config"),
        ({"kv_order": "BLHNC"}, "layout"),
    ],
)
def test_engines_that_differ_share_nothing(
    make_engine: MakeEngine, options: dict[str, object], field: str
) -> None:
    one, other = make_engine(), make_engine(**options)
    one.generate(PROMPT)
    assert other.generate(PROMPT) == (expected_output(PROMPT), 0)
    assert field in differing_fields(fields_of(one), [fields_of(other)])


def test_differing_fields_names_the_nearest() -> None:
    ours = {"a": "1", "b": "2", "c": "3"}
    assert differing_fields(ours, []) == []
    assert differing_fields(ours, [{"a": "9", "b": "9"}, {**ours, "b": "9"}]) == ["b"]
    assert differing_fields(ours, [dict(ours)]) == []


def model_of(folder: Path | str) -> SimpleNamespace:
    return SimpleNamespace(model=str(folder), revision=None, seed=0)


def test_weights_are_told_apart_by_their_bytes(tmp_path: Path) -> None:
    """Same names, sizes and times, as fine-tunes unpacked from images have."""
    load = SimpleNamespace(load_format="auto")
    identities = []
    for name, fill in (("a", b"x"), ("b", b"x"), ("c", b"y")):
        folder = tmp_path / name
        folder.mkdir()
        file = folder / "model.safetensors"
        file.write_bytes(fill * 300_000)
        os.utime(file, ns=(0, 0))
        identities.append(weights_identity(model_of(folder), load))
    assert identities[0] == identities[1] != identities[2]


def test_weights_that_cannot_be_read_go_by_name(tmp_path: Path) -> None:
    load = SimpleNamespace(load_format="auto")
    bucket = weights_identity(model_of("s3://bucket/model"), load)
    assert "s3://bucket/model" in bucket
    assert weights_identity(model_of("nobody/nothing"), load) != bucket
    dummy = SimpleNamespace(load_format="dummy")
    assert "seed=0" in weights_identity(model_of(tmp_path), dummy)


def test_longest_context_counts_only_where_it_changes_the_embedding() -> None:
    def fields(rope: str, length: int) -> dict[str, str]:
        config = SimpleNamespace(
            to_dict=lambda: {"rope_scaling": {"rope_type": rope}, "_name_or_path": "x"}
        )
        model = SimpleNamespace(
            hf_config=config, dtype="float16", quantization=None, max_model_len=length,
            model="x", revision=None, seed=0,
        )  # fmt: skip
        return model_fields(model, SimpleNamespace(load_format="dummy"))

    assert fields("default", 1000) == fields("default", 2000)
    assert fields("longrope", 1000) != fields("longrope", 2000)


def test_digest_separates_names_from_values() -> None:
    assert namespace_digest({"ab": "c"}) != namespace_digest({"a": "bc"})
    assert namespace_digest({"a": "1", "b": "2"}) == namespace_digest({"b": "2", "a": "1"})


def test_description_fits_the_wire() -> None:
    fields = {f"field {i}": "x" * 40 for i in range(10)}
    namespace = build_namespace(fields, b"n" * 32, ["2x10 bytes sha256:0"] * 8, 4096)
    assert len(json.dumps(namespace.fields)) < 2048
    assert namespace.fields["layout"] == "8 x 2x10 bytes sha256:0"


def test_keys_are_hashes_under_a_mask() -> None:
    hashes = [bytes([i]) * 32 for i in range(5)]
    mask = key_mask(b"d" * 32, 0)
    assert block_keys(mask, hashes) == derive_keys(mask, b"".join(hashes))
    assert block_keys(mask, []) == b""
    short = [bytes([i]) * 16 for i in range(5)]
    padded = [value + bytes(16) for value in short]
    assert block_keys(mask, short) == block_keys(mask, padded)
    masks = {mask, key_mask(b"d" * 32, 1), key_mask(b"e" * 32, 0), key_mask(b"d" * 32, 0, b"s")}
    assert len(masks) == 4


def test_trap_28_random_seed_of_hashes_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    seeded = hasattr(compat.kv_cache_utils, "DEFAULT_NONE_HASH_SEED")
    assert compat.none_hash_is_random("sha256") is not seeded
    assert compat.none_hash_is_random("xxhash_cbor")
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    assert not compat.none_hash_is_random("sha256")
    assert not compat.none_hash_is_random("xxhash")


def test_trap_28_random_seed_is_said_with_the_line_to_set(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compat, "none_hash_is_random", lambda algorithm: True)
    make_engine().generate(PROMPT)
    assert "export PYTHONHASHSEED=0" in caplog.text
