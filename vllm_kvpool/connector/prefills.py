"""How long prompts take to compute, as the scheduler side sees it."""

from __future__ import annotations

from typing import Any, NamedTuple


class _Running(NamedTuple):
    request: Any
    begun_s: float
    computed_before: int


class PrefillTimes:
    """From the step that computes a prompt's first tokens to the step that finds its first output
    token. Requests that were preempted begin anew."""

    def __init__(self) -> None:
        self._running: dict[str, _Running] = {}
        self._computed = 0
        """Tokens so far, of all requests: they share the steps."""

    def scheduled(self, request: Any, now_s: float) -> None:
        """For the first time, or again after all of its blocks were taken away."""
        if request.num_output_tokens == 0:
            self._running[request.request_id] = _Running(request, now_s, self._computed)

    def step(self, num_tokens: int) -> None:
        """It computes so many, with those of the requests scheduled before."""
        self._computed += num_tokens

    def take_finished(self, now_s: float) -> list[tuple[int, float]]:
        """(tokens computed meanwhile, seconds) of those that have a token by now."""
        done = [one for one in self._running.values() if one.request.num_output_tokens > 0]
        for one in done:
            del self._running[one.request.request_id]
        return [(self._computed - one.computed_before, now_s - one.begun_s) for one in done]

    def forget(self, request_id: str) -> None:
        self._running.pop(request_id, None)
