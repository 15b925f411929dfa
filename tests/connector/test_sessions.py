"""Streaming input: a request that gets more prompt when it has answered (trap 19's relative)."""

from __future__ import annotations

from collections.abc import Callable

from connector.mini_engine import BLOCK, MiniEngine, next_token, prompt_of
from helpers import Daemon, until
from vllm.v1.request import RequestStatus

MakeEngine = Callable[..., MiniEngine]


def test_session_drops_its_last_guess_and_its_blocks_are_stored_right(
    make_engine: MakeEngine, daemon: Daemon
) -> None:
    """The last sampled token goes, and with it, at a block's end, the hash of its block."""
    engine = make_engine()
    turns = [prompt_of(1, 3 * BLOCK - 2), prompt_of(2, 2 * BLOCK + 1), prompt_of(3, BLOCK)]
    said: list[int] = []
    waiting = RequestStatus.WAITING_FOR_STREAMING_REQ
    for i, turn in enumerate(turns):
        engine.add(turn, 3, request_id="session", resumable=True)
        said += turn
        until(lambda: (engine.step(), engine.status("session") == waiting)[1])
        answer = engine.outputs["session"][3 * i :]
        for token in answer:
            assert token == next_token(said)
            said.append(token)
        said.pop()  # sampled, not computed
    engine.abort("session")
    engine.run()
    assert engine.free_blocks == 255
    until(lambda: daemon.counter("ready") == len(said) // BLOCK)
    reader = make_engine()
    assert reader.generate([*said, 0])[1] == len(said) // BLOCK * BLOCK
