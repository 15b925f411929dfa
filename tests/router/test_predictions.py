"""What was predicted to be cached is held against what engines report."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from helpers import until
from router.conftest import RouterUnderTest
from router.fake_replica import FakeReplica, stream

MakeRouter = Callable[..., RouterUnderTest]
SYSTEM = {"role": "system", "content": "You are of help. " * 500}


def ask(router: RouterUnderTest, turn: int, **more: object) -> int:
    turns = [{"role": "user", "content": f"turn {n} " * 200} for n in range(turn + 1)]
    body = {"model": "m", "messages": [SYSTEM, *turns], **more}
    return router.ask("/v1/chat/completions", body, {"X-Session-ID": "s"}).status


@pytest.mark.parametrize("streamed", [False, True])
def test_usage_is_found_and_counted_by_tier(
    make_router: MakeRouter, replica: FakeReplica, streamed: bool
) -> None:
    if streamed:
        replica.behave = stream(3)
    router = make_router(replica)
    for turn in range(3):
        assert ask(router, turn, stream=streamed) == 200
    assert router.metric("answers_total", policy="task", replica=replica.id) == 3
    assert router.metric("answers_unreported_total") == 0
    assert router.metric("prompt_tokens_total") == 3 * 40
    assert router.metric("reported_hit_tokens_total") == 3 * 32
    for tier in ("stable", "session"):
        assert router.metric("predicted_hit_tokens_total", tier=tier) > 0
    assert router.metric("predicted_hit_tokens_total") < 2 * 40


def test_other_endpoints_are_not_counted(router: RouterUnderTest) -> None:
    router.ask("/v1/embeddings", {"model": "m", "input": "text"})
    router.ask("/v1/models")
    assert router.metric("answers_total") == 0


def test_hits_that_do_not_come_are_a_warning(make_router: MakeRouter, replica: FakeReplica) -> None:
    from router.fake_replica import raw, whole

    usage = {"prompt_tokens": 4_000, "prompt_tokens_details": {"cached_tokens": 0}}
    replica.behave = raw(whole(200, {"usage": usage}))
    router = make_router(replica)
    for turn in range(30):
        assert ask(router, turn) == 200
    until(lambda: "predicted" in router.log.read_text(), "the warning")
    assert f"{replica.id}: 0 tokens cached of" in router.log.read_text()
