"""How long prompts take to compute, as the scheduler side sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple


class Prefill(NamedTuple):
    num_tokens: int
    """Computed, so without those found in a cache."""
    seconds: float
    alone: bool
    """No other request was in the engine at any time of it."""


@dataclass(slots=True)
class _Running:
    request: Any
    begun_s: float
    num_tokens: int
    alone: bool


class PrefillTimes:
    """From the step that computes a prompt's first tokens to the step that finds its first output
    token. Requests that were preempted begin anew."""

    def __init__(self) -> None:
        self._running: dict[str, _Running] = {}

    def joined(self) -> None:
        """Another request has come."""
        for one in self._running.values():
            one.alone = False

    def scheduled(
        self, request: Any, num_computed_tokens: int, now_s: float, *, alone: bool
    ) -> None:
        """For the first time, or again after all of its blocks were taken away."""
        num_tokens = request.num_prompt_tokens - num_computed_tokens
        if request.num_output_tokens == 0 and num_tokens > 0:
            self._running[request.request_id] = _Running(request, now_s, num_tokens, alone)

    def take_finished(self, now_s: float) -> list[Prefill]:
        """Those that have a token by now."""
        done = [one for one in self._running.values() if one.request.num_output_tokens > 0]
        for one in done:
            del self._running[one.request.request_id]
        return [Prefill(one.num_tokens, now_s - one.begun_s, one.alone) for one in done]

    def forget(self, request_id: str) -> None:
        self._running.pop(request_id, None)
