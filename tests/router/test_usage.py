"""Usage at the end of an answer; never what a model wrote about it."""

from __future__ import annotations

import json

import pytest
from router.fake_replica import chunk, event

from vllm_kvpool.router.usage import Usage, find_usage

USAGE = {"prompt_tokens": 40, "total_tokens": 50, "prompt_tokens_details": {"cached_tokens": 32}}
TALK = 'say "usage": {"prompt_tokens": 7, "prompt_tokens_details": {"cached_tokens": 9}} again'


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
def test_of_an_answer(separators: tuple[str, str]) -> None:
    answer = {"choices": [{"message": {"content": TALK}}], "usage": USAGE, "x": None}
    text = json.dumps(answer, separators=separators).encode()
    assert find_usage(text) == Usage(40, 32)


def test_of_a_stream() -> None:
    events = [{"choices": [{"delta": {"content": TALK}}]}, {"choices": [], "usage": USAGE}]
    tail = b"".join(chunk(event(value)) for value in events) + chunk(b"data: [DONE]\n\n")
    assert find_usage(tail + b"0\r\n\r\n") == Usage(40, 32)


def test_of_the_responses_api() -> None:
    usage = {"input_tokens": 40, "input_tokens_details": {"cached_tokens": 32}}
    assert find_usage(json.dumps({"usage": usage}).encode()) == Usage(40, 32)


@pytest.mark.parametrize("content", ["", TALK, json.dumps(TALK), json.dumps(json.dumps(TALK))])
def test_what_a_model_wrote_is_not_it(content: str) -> None:
    answer = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
    assert find_usage(answer) == Usage(None, None)


def test_cached_tokens_that_are_not_reported() -> None:
    usage = {"prompt_tokens": 40, "prompt_tokens_details": None}
    assert find_usage(json.dumps({"usage": usage}).encode()) == Usage(40, None)
