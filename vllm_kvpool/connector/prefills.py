"""How long prompts take to compute, as the scheduler side sees it."""

from __future__ import annotations

from typing import Any, NamedTuple


class _Prefill(NamedTuple):
    request: Any
    begun_s: float
    num_tokens: int
    """To be computed."""


class PrefillTimes:
    """From the step that computes a prompt's first tokens to the step that finds its first output
    token. Requests that were preempted begin anew."""

    def __init__(self) -> None:
        self._running: dict[str, _Prefill] = {}

    def scheduled(self, request: Any, num_computed_tokens: int, now_s: float) -> None:
        """For the first time, or again after all of its blocks were taken away."""
        num_tokens = request.num_prompt_tokens - num_computed_tokens
        if request.num_output_tokens == 0 and num_tokens > 0:
            self._running[request.request_id] = _Prefill(request, now_s, num_tokens)

    def take_finished(self, now_s: float) -> list[tuple[int, float]]:
        """(tokens, seconds) of those that have a token by now."""
        done = [one for one in self._running.values() if one.request.num_output_tokens > 0]
        for one in done:
            del self._running[one.request.request_id]
        return [(one.num_tokens, now_s - one.begun_s) for one in done]

    def forget(self, request_id: str) -> None:
        self._running.pop(request_id, None)
