"""A real engine's KV events: what kv_events predicts of each prompt is what the engine then reports as cached,
through evictions and a reset, with a cache of 64 blocks."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest
from helpers import WAIT_S

from benchmarks.processes import Engine, free_port
from benchmarks.tiny_model import make_tiny_model
from vllm_kvpool.router import subscriber
from vllm_kvpool.router.event_index import Trust
from vllm_kvpool.router.fleet import Fleet
from vllm_kvpool.router.keys import route_request
from vllm_kvpool.router.kv_events import KvEvents
from vllm_kvpool.router.subscriber import Subscriber
from vllm_kvpool.router.types import Replica

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(400)]

BLOCK = 128
CACHE_BLOCKS = 64


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, str, str]]:
    """With the endpoints of its events and of their replay."""
    folder = tmp_path_factory.mktemp("engine")
    model = make_tiny_model(folder / "model", num_layers=2)
    events, replay = (f"tcp://127.0.0.1:{free_port()}" for _ in range(2))
    config = {
        "enable_kv_cache_events": True, "publisher": "zmq",
        "endpoint": events.replace("127.0.0.1", "*"), "replay_endpoint": replay,
    }  # fmt: skip
    options = (
        f"--block-size={BLOCK}", "--max-model-len=4096", "--enable-prefix-caching",
        f"--num-gpu-blocks-override={CACHE_BLOCKS}", f"--kv-events-config={json.dumps(config)}",
    )  # fmt: skip
    with Engine(model, folder / "log", extra=None, options=options) as running:
        running.wait_ready()
        yield running, events, replay


def chat(name: str, turns: int) -> dict[str, Any]:
    draw = random.Random(name)
    words = [draw.choice(["red", "green", "blue", "some", "none"]) for _ in range(60 * turns)]
    messages = [{"role": "system", "content": "Be terse. " * 40}]
    for turn in range(turns):
        text = " ".join(words[60 * turn : 60 * (turn + 1)])
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": text[:99]}]
    return {"model": "tiny", "messages": messages[:-1], "max_tokens": 1}


def test_predictions_are_exact(
    engine: tuple[Engine, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subscriber, "REPLAY_TIMEOUT_S", WAIT_S)
    running, events, replay = engine
    asyncio.run(_converse(running, events, replay))


async def _converse(running: Engine, events: str, replay: str) -> None:
    loop = asyncio.get_running_loop()

    async def post(path: str, body: dict[str, Any] | None = None) -> Any:
        answer = await loop.run_in_executor(None, running.post, path, body)
        return json.loads(answer) if answer else None

    await post("/v1/chat/completions", chat("before", 2))  # gone before we come: replayed
    policy, fleet = KvEvents(), Fleet((Replica("a", running.url),))
    following = Subscriber(policy.events)
    following.follow("a", events, replay)
    while policy.events.trust("a") is not Trust.EXACT:
        await asyncio.sleep(0.05)

    async def hits(body: dict[str, Any]) -> tuple[int, int]:
        """Predicted and reported."""
        tokens = (await post("/tokenize", {k: body[k] for k in ("model", "messages")}))["tokens"]
        request = policy.with_tokens(route_request(body, {}), tokens)
        decision = policy.decide(request, fleet, 0.0)
        assert decision is not None
        usage = (await post("/v1/chat/completions", body))["usage"]
        give_up = time.monotonic() + WAIT_S
        # its events come after its answer; those of the blocks that went for it, before those of its own
        while policy.events.depth(request.token_blocks, "a") < len(request.token_blocks):
            assert time.monotonic() < give_up, "its blocks were not told"
            await asyncio.sleep(0.01)
        details = usage["prompt_tokens_details"] or {}
        return decision.hits.total, details.get("cached_tokens") or 0

    found = [await hits(chat("before", 3))]
    for turns in range(1, 5):
        found += [await hits(chat(name, turns)) for name in ("one", "two", "three", "four")]
    found += [await hits(chat("before", 4))]
    assert [predicted for predicted, _ in found] == [reported for _, reported in found]
    assert sum(reported > 0 for _, reported in found) >= 10
    known = policy.events._sources["a"].engine_to_own
    assert 0 < len(known) <= CACHE_BLOCKS
    await post("/reset_prefix_cache")
    await hits(chat("another", 1))  # events go out with the next step
    assert 0 < len(known) <= 8
    predicted, reported = await hits(chat("one", 4))
    assert predicted == reported < 4 * BLOCK
    policy.check_integrity()
    await following.close()
