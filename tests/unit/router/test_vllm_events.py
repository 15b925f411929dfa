"""vLLM's own publisher and event classes, read by our subscriber: the wire format is theirs, not our idea of it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable

import pytest
from helpers import WAIT_S

from benchmarks.processes import free_port
from vllm_kvpool.router import subscriber
from vllm_kvpool.router.event_index import EventIndex, Trust
from vllm_kvpool.router.subscriber import Subscriber, endpoint_of_rank

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PUBLISHER = textwrap.dedent(
    """
    import sys, time
    from vllm.distributed import kv_events as kv

    rank, endpoint, replay = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    publisher = kv.ZmqEventPublisher(rank, endpoint, replay)

    def publish(*events):
        publisher.publish(kv.KVEventBatch(ts=time.time(), events=list(events)))

    def stored(hashes, parent, tokens):
        return kv.BlockStored(
            block_hashes=hashes, parent_block_hash=parent, token_ids=tokens, block_size=4,
            lora_id=None, medium=kv.MEDIUM_GPU, lora_name=None,
        )

    publish(stored([11, 12], None, list(range(8))))
    print("ready", flush=True)
    for line in sys.stdin:
        match line.strip():
            case "store": publish(stored([13], 12, list(range(8, 12))))
            case "remove": publish(kv.BlockRemoved(block_hashes=[13], medium=kv.MEDIUM_GPU))
            case "clear": publish(kv.AllBlocksCleared())
    publisher.shutdown()
    """
)


async def until(what: Callable[[], object], value: object) -> None:
    give_up = time.monotonic() + WAIT_S
    while (seen := what()) != value:
        assert time.monotonic() < give_up, f"{seen!r}, not {value!r}"
        await asyncio.sleep(0.01)


def test_what_vllm_publishes_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """As rank 1, whose ports vLLM counts up itself; the first batch is gone before we come."""
    monkeypatch.setattr(subscriber, "REPLAY_TIMEOUT_S", WAIT_S)
    endpoint, replay = (f"tcp://127.0.0.1:{free_port() - 1}" for _ in range(2))
    bound = endpoint.replace("127.0.0.1", "*")
    command = [sys.executable, "-c", PUBLISHER, "1", bound, replay]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert any(line.startswith("ready") for line in child.stdout)
        try:
            asyncio.run(_follow(child, endpoint_of_rank(endpoint, 1), endpoint_of_rank(replay, 1)))
        finally:
            assert child.stdin is not None
            child.stdin.close()
            assert child.wait(WAIT_S) == 0


async def _follow(child: subprocess.Popen[str], endpoint: str, replay: str) -> None:
    index = EventIndex()
    following = Subscriber(index)
    following.follow("a", endpoint, replay)

    def tell(what: str) -> None:
        assert child.stdin is not None
        child.stdin.write(f"{what}\n")
        child.stdin.flush()

    def depth() -> int:
        return index.depth(index.chain("m", range(20)), "a")

    await until(depth, 2)
    assert index.trust("a") is Trust.EXACT
    for what, expected in (("store", 3), ("remove", 2), ("store", 3), ("clear", 0)):
        tell(what)
        await until(depth, expected)
    index.check_integrity()
    await following.close()
