"""What clients can ask, and what they get: from a replica, or from the router itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from router.conftest import CHAT, RouterUnderTest, chat_body
from router.fake_replica import FakeReplica, answer

MakeRouter = Callable[..., RouterUnderTest]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, chat_body()),
        ("/v1/completions", {"model": "m", "prompt": "hello"}),
        ("/v1/completions", {"model": "m", "prompt": [1, 2, 3]}),
        ("/v1/embeddings", {"model": "m", "input": "hello"}),
        ("/v1/responses", {"model": "m", "input": "hello"}),
        ("/tokenize", {"model": "m", "prompt": "hello"}),
        ("/v1/audio/transcriptions", b"--boundary\r\nno json\r\n--boundary--"),
        ("/v1/models", None),
        ("/version?full=1&x=%20", None),
    ],
)
def test_passed_to_a_replica_as_it_is(
    router: RouterUnderTest, replica: FakeReplica, path: str, body: object
) -> None:
    got = router.ask(path, body, {"Authorization": "Bearer key", "X-Request-Id": "abc"})
    assert got.status == 200
    assert got.json["path"] == path
    (request,) = replica.requests
    assert request.method == ("GET" if body is None else "POST")
    assert request.target == path
    assert request.header("authorization") == ["Bearer key"]
    assert request.header("x-request-id") == ["abc"]
    assert request.header("host") == [replica.id]
    assert got.json["bytes"] == len(request.body)
    assert request.header("content-length") == ([str(len(request.body))] if body else [])


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE", "OPTIONS"])
def test_any_method(router: RouterUnderTest, replica: FakeReplica, method: str) -> None:
    assert router.ask("/v1/files/1", method=method).status == 200
    assert replica.requests[0].method == method


def test_receipts(router: RouterUnderTest, replica: FakeReplica) -> None:
    headers = router.chat(headers={"X-Session-ID": "s"}).headers
    assert headers["x-kvpool-replica"] == replica.id
    assert headers["x-kvpool-session-source"] == "header"
    assert headers["x-kvpool-reason"]
    assert int(headers["x-kvpool-predicted-hit-tokens"]) >= 0
    assert "x-kvpool-retries" not in headers


def test_what_is_for_one_connection_is_not_passed_on(
    router: RouterUnderTest, replica: FakeReplica
) -> None:
    lines = ("connection: x-secret", "x-secret: 1", "keep-alive: timeout=5", "x-kept: 1")
    replica.behave = answer(200, *lines)
    headers = {"Connection": "X-Mine", "X-Mine": "1", "TE": "trailers", "X-Kept": "2"}
    got = router.chat(headers=headers)
    sent = replica.requests[0]
    assert not sent.header("x-mine")
    assert not sent.header("te")
    assert not sent.header("connection")
    assert sent.header("x-kept") == ["2"]
    assert got.headers["x-kept"] == "1"
    assert not {"x-secret", "keep-alive"} & got.headers.keys()


@pytest.mark.parametrize("status", [400, 401, 404, 422, 500])
def test_errors_of_an_engine_are_the_engines(
    router: RouterUnderTest, replica: FakeReplica, status: int
) -> None:
    """An unknown model, invalid JSON: the engine says so, and is asked once."""
    replica.behave = answer(status)
    assert router.ask(CHAT, b'{"model": "unknown"').status == status
    assert len(replica.requests) == 1
    assert router.metric("requests_total", status=str(status)) == 1


def test_data_parallel_ranks(make_router: MakeRouter, replica: FakeReplica) -> None:
    router = make_router(
        f"{replica.url}@0", f"{replica.url}@1", options=("--policy", "round_robin")
    )
    seen = {router.chat(headers={"X-data-parallel-rank": "7"}).replica for _ in range(2)}
    assert seen == {f"{replica.id}@0", f"{replica.id}@1"}
    ranks = [request.header("x-data-parallel-rank") for request in replica.requests]
    assert sorted(ranks) == [["0"], ["1"]]


def test_a_clients_rank_reaches_a_replica_without_one(
    router: RouterUnderTest, replica: FakeReplica
) -> None:
    router.chat(headers={"X-data-parallel-rank": "7"})
    assert replica.requests[0].header("x-data-parallel-rank") == ["7"]


def test_health_and_ready(router: RouterUnderTest, replica: FakeReplica) -> None:
    assert router.ask("/health").status == 200
    assert router.ask("/ready").status == 200
    assert router.ask("/health", b"x").status == 405
    replica.die()
    router.wait_state(replica.id, "out")
    assert router.ask("/health").status == 200
    unready = router.ask("/ready")
    assert unready.status == 503
    assert unready.headers["retry-after"] == "1"
    refused = router.chat()
    assert refused.status == 503
    assert refused.json["error"]["message"]


def test_head_of_own_and_of_passed_paths(router: RouterUnderTest, replica: FakeReplica) -> None:
    for path in ("/health", "/v1/models"):
        got = router.ask(path, method="HEAD")
        assert (got.status, got.body) == (200, b"")
    assert replica.requests[0].method == "HEAD"
    assert router.ask("/v1/models").status == 200


def test_route_decides_and_sends_nothing(
    make_router: MakeRouter, replicas: list[FakeReplica]
) -> None:
    router = make_router(*replicas)
    body, headers = chat_body("to be routed"), {"X-Session-ID": "s"}
    decision = router.ask("/route", body, headers).json
    assert not any(replica.requests for replica in replicas)
    assert {decision["replica"], *decision["fallbacks"]} == {replica.id for replica in replicas}
    assert decision["url"] == f"http://{decision['replica']}"
    assert decision["session_source"] == "header"
    assert router.chat("to be routed", headers).replica == decision["replica"]
    assert router.ask("/route").status == 405


def test_metrics_count(router: RouterUnderTest, replica: FakeReplica) -> None:
    for _ in range(3):
        router.chat()
    assert router.metric("requests_total", replica=replica.id, status="200") == 3
    assert router.metric("decisions_total") == 3
    assert router.metric("first_byte_seconds_count", replica=replica.id) == 3
    assert router.metric("first_byte_seconds_bucket", le="+Inf") == 3
    router.wait_idle()


def test_load_and_cache_use_come_from_the_engines_metrics(
    router: RouterUnderTest, replica: FakeReplica
) -> None:
    from helpers import until

    replica.metrics = 'vllm:num_requests_waiting{engine="0"} 3.0\nvllm:kv_cache_usage_perc 0.25\n'
    until(lambda: router.metric("replica_waiting_requests", replica=replica.id) == 3)
    assert router.metric("replica_cache_usage", replica=replica.id) == 0.25


def test_odd_metrics_of_an_engine_harm_nobody(
    router: RouterUnderTest, replica: FakeReplica
) -> None:
    from helpers import until

    replica.metrics = "vllm:num_requests_waiting oops\nvllm:kv_cache_usage_perc 0.25\n"
    until(lambda: router.metric("replica_cache_usage", replica=replica.id) == 0.25)
    assert router.metric("replica_waiting_requests", replica=replica.id) == 0
    assert router.chat().status == 200
