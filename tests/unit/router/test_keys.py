"""What a body and its headers are turned into: stable under what does not matter, and never an error."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvpool.router.keys import TEXT_BLOCK_BYTES, TEXT_BLOCK_TOKENS, route_request
from vllm_kvpool.router.types import RouteRequest

SYSTEM = {"role": "system", "content": "You are terse. " * 100}
TOOLS = [{"type": "function", "function": {"name": "search", "parameters": {"a": 1, "b": 2}}}]

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
FIELDS = ["model", "messages", "prompt", "input", "instructions", "tools", "user", "conversation",
          "cache_salt", "prompt_cache_key"]  # fmt: skip
bodies = st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=6) | json_values
messages = st.lists(
    st.dictionaries(st.sampled_from(["role", "content", "tool_calls"]), json_values)
)


def chat(*texts: str, **more: Any) -> dict[str, Any]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]
    return {"model": "m", "messages": [SYSTEM, *turns], **more}


def of(body: object, **headers: str) -> RouteRequest:
    return route_request(body, {name.replace("_", "-"): value for name, value in headers.items()})


@given(bodies)
def test_any_body_is_taken(body: object) -> None:
    request = of(body)
    assert 0 <= request.stable < 1 << 64
    assert request.stable_tokens <= request.prompt_tokens


@given(messages)
def test_any_messages_are_taken(turns: list[object]) -> None:
    of({"messages": turns, "tools": turns})


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb" * 400])
def test_lone_surrogates_are_text(text: str) -> None:
    body = json.loads(json.dumps(chat(text, tools=[text], user=text)))
    assert of(body).session_source == "user"


def test_a_deep_body_is_taken() -> None:
    deep: Any = "end"
    for _ in range(5_000):
        deep = [deep]
    of({"messages": [{"role": "user", "content": deep}], "tools": deep, "prompt": deep})


@given(st.lists(st.text(max_size=300), min_size=1, max_size=8), st.text(max_size=300))
def test_a_conversation_grows_at_its_end(texts: list[str], more: str) -> None:
    before, after = of(chat(*texts)), of(chat(*texts, more))
    assert after.blocks[: len(before.blocks)] == before.blocks
    assert (after.session, after.stable) == (before.session, before.stable)


@given(st.binary(min_size=1, max_size=4_000).map(lambda b: b.hex()), st.data())
def test_blocks_are_equal_exactly_as_far_as_the_text_is(text: str, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(text) - 1))
    other = text[:cut] + "!" + text[cut + 1 :]
    before = of({"model": "", "prompt": text}).blocks
    after = of({"model": "", "prompt": other}).blocks
    same = next(
        (i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b), len(before)
    )
    assert same == min((cut + 2) // TEXT_BLOCK_BYTES, len(before))  # two bytes for model and salt


def test_the_stable_prefix_is_system_and_tools() -> None:
    assert of(chat("a")).stable == of(chat("b")).stable
    assert of(chat("a")).stable != of(chat("a", tools=TOOLS)).stable
    assert of(chat("a")).stable != of(chat("a", model="other")).stable
    swapped = [{"function": {"parameters": {"b": 2, "a": 1}, "name": "search"}, "type": "function"}]
    assert of(chat("a", tools=TOOLS)).stable == of(chat("a", tools=swapped)).stable
    assert 370 <= of(chat("a")).stable_tokens <= 385  # 1,500 bytes
    assert of({"model": "m", "messages": [{"role": "user", "content": "a"}]}).stable_tokens == 0


def test_parts_are_their_text_and_images_are_small() -> None:
    parts = [{"type": "text", "text": "a"}]
    whole, split = chat("a"), chat("a")
    split["messages"][1]["content"] = parts
    assert of(whole).blocks == of(split).blocks
    assert of(whole).session == of(split).session
    image = {"type": "image_url", "image_url": {"url": "data:" + "A" * 100_000}}
    split["messages"][1]["content"] = [*parts, image]
    assert of(split).prompt_tokens < 500
    assert of(split).session != of(whole).session


SOURCES: list[tuple[dict[str, Any], dict[str, str], str]] = [
    ({"user": "u"}, {"X-Session-ID": "h", "Cookie": "kvpool-session=c"}, "header"),
    ({"user": "u"}, {"Cookie": "other=1; kvpool-session=c"}, "cookie"),
    ({"user": "u", "prompt_cache_key": "k"}, {}, "prompt_cache_key"),
    ({"user": "u", "conversation": {"id": "c"}}, {}, "conversation"),
    ({"user": "u"}, {"Cookie": "other=1"}, "user"),
    ({"user": 7, "conversation": {}}, {}, "fingerprint"),
]


@pytest.mark.parametrize(("fields", "headers", "source"), SOURCES)
def test_who_names_the_session(
    fields: dict[str, Any], headers: dict[str, str], source: str
) -> None:
    request = route_request(chat("a", **fields), headers)
    assert request.session_source == source
    assert request.session == route_request(
        chat("quite another", "x", **fields), headers
    ).session or (source == "fingerprint")


def test_the_fingerprint_is_system_and_first_message() -> None:
    assert of(chat("a")).session == of(chat("a", "b", "c")).session
    assert of(chat("a")).session != of(chat("b")).session


def test_token_ids_are_counted_exactly() -> None:
    ids = list(range(1_000))
    request = of({"model": "", "prompt": ids})
    assert (request.prompt_tokens, request.tokens) == (1_000, tuple(ids))
    assert len(request.blocks) == 1_000 // TEXT_BLOCK_TOKENS
    longer = of({"model": "", "prompt": [*ids, 1, 2, 3]})
    assert longer.blocks[:7] == request.blocks[:7]
    assert of({"prompt": [-1, 1 << 40]}).tokens is None
    assert of({"prompt": [True]}).tokens is None


def test_salted_prompts_share_nothing() -> None:
    assert not set(of(chat("a", cache_salt="x")).blocks) & set(of(chat("a")).blocks)


def test_bodies_of_all_endpoints() -> None:
    text = "word " * 400
    responses = {"model": "m", "instructions": "Be terse.", "input": text}
    items = {
        "model": "m",
        "input": [{"role": "user", "content": [{"type": "input_text", "text": text}]}],
    }
    for body in (
        {"model": "m", "prompt": text},
        {"model": "m", "input": [text, "b"]},
        responses,
        items,
    ):
        assert 480 <= of(body).prompt_tokens <= 520
    assert of(responses).stable_tokens > 0
