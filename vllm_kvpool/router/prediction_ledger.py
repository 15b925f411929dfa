"""Predicted against reported cache hits, and a warning when they drift apart. Pure.

Silent loss of affinity is the commonest failure of routing by cache: everything works, and every
prompt is computed in full. The engine's own `cached_tokens` is the witness. The proxy records each
answer and logs what `record` returns; `noted` tells the ledger what happened to the fleet, which is
where it looks for the cause first.

Predictions are estimates from the length of text, so they are taken as a part of the prompt and
multiplied by the tokens that the engine counted.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from vllm_kvpool.router.prompt_history import PromptHistory
from vllm_kvpool.router.types import Hits, RouteRequest

WINDOW = 64
"""Answers of a replica that are looked at together."""
MIN_ANSWERS = 16
"""Less tell nothing."""
DRIFT_BELOW = 0.5
"""Reported of predicted: half of the hits are missing."""
QUIET_S = 600.0
"""Between two warnings about one replica."""
RECENT_S = 300.0
"""How long an event of the fleet explains things."""
CHANGED_SHARE = 0.25
"""Of a replica's turns whose prompt does not continue the one before."""


@dataclass(slots=True)
class Totals:
    """Of one policy on one replica, since the start: counters for metrics. In tokens, but the first
    two."""

    answers: int = 0
    unreported: int = 0
    """Answers without `cached_tokens`."""
    prompt: int = 0
    predicted_stable: int = 0
    predicted_session: int = 0
    reported_stable: int = 0
    reported_session: int = 0


@dataclass(frozen=True, slots=True)
class _Answer:
    predicted: float
    reported: int
    changed_at_byte: int | None
    """Where the prompt stopped being that of the session's last turn; None: it continues it."""


@dataclass(slots=True)
class _Recent:
    answers: deque[_Answer] = field(default_factory=lambda: deque(maxlen=WINDOW))
    unreported: int = 0
    """In a row."""
    warned_s: float | None = None


class PredictionLedger:
    """Bounded by the number of policies and replicas; forgets a replica on request."""

    def __init__(self) -> None:
        self.totals: dict[tuple[str, str], Totals] = {}
        """By policy and replica."""
        self._recent: dict[str, _Recent] = {}
        self._history = PromptHistory()
        self._event: tuple[float, str, str] | None = None
        """The last one of the fleet: when, what, and of which replica."""

    def noted(self, event: str, replica_id: str, now: float) -> None:
        """`restart`, `add`, `remove` or `drain`: what makes sessions lose their blocks."""
        self._event = (now, event, replica_id)
        if event == "restart":
            self._recent.pop(replica_id, None)

    def record(
        self,
        policy: str,
        request: RouteRequest,
        replica_id: str,
        hits: Hits,
        prompt_tokens: int | None,
        cached_tokens: int | None,
        now: float,
    ) -> str | None:
        """One complete answer, with what its usage says. Returns a warning to be logged."""
        totals = self.totals.setdefault((policy, replica_id), Totals())
        recent = self._recent.setdefault(replica_id, _Recent())
        changed_at_byte = self._history.compare(request)
        totals.answers += 1
        if prompt_tokens is None or cached_tokens is None:
            return self._unreported(totals, recent, replica_id, now)
        recent.unreported = 0
        scale = prompt_tokens / max(1, request.prompt_tokens)
        _count(totals, request.stable_tokens * scale, hits, scale, prompt_tokens, cached_tokens)
        predicted = hits.total * scale
        recent.answers.append(_Answer(predicted, cached_tokens, changed_at_byte))
        return self._drift(recent, replica_id, now)

    def forget(self, replica_id: str) -> None:
        """It is gone. Its totals go too: metrics of replicas that come and go must not pile up."""
        self._recent.pop(replica_id, None)
        for key in [key for key in self.totals if key[1] == replica_id]:
            del self.totals[key]

    # warnings ---------------------------------------------------------------------------------------

    def _unreported(
        self, totals: Totals, recent: _Recent, replica_id: str, now: float
    ) -> str | None:
        totals.unreported += 1
        recent.unreported += 1
        if recent.unreported < WINDOW:
            return None
        return self._warning(
            recent,
            f"{replica_id}: {recent.unreported} answers in a row without cached_tokens: predictions"
            " cannot be checked. Start vLLM with --enable-prompt-tokens-details; streams carry it"
            ' only where clients ask with "stream_options": {"include_usage": true}',
            now,
        )

    def _drift(self, recent: _Recent, replica_id: str, now: float) -> str | None:
        answers = recent.answers
        if len(answers) < MIN_ANSWERS:
            return None
        predicted = sum(answer.predicted for answer in answers)
        reported = sum(answer.reported for answer in answers)
        changed = [a.changed_at_byte for a in answers if a.changed_at_byte is not None]
        if len(changed) >= CHANGED_SHARE * len(answers):
            cause = (
                f"the prompts of its sessions change near byte {sorted(changed)[len(changed) // 2]}"
            )
            fix = "keep what varies (time, ids, retrieved text) behind what does not"
            text = f"{len(changed)} of the last {len(answers)} turns"
            return self._warning(recent, f"{replica_id}: {text}: {cause}; {fix}", now)
        if predicted < MIN_ANSWERS or reported >= DRIFT_BELOW * predicted:
            return None
        text = f"{reported:,.0f} tokens cached of {predicted:,.0f} predicted"
        cause = self._cause(recent, replica_id, now)
        return self._warning(
            recent, f"{replica_id}: {text}, last {len(answers)} answers: {cause}", now
        )

    def _cause(self, recent: _Recent, replica_id: str, now: float) -> str:
        if self._event is not None and now - self._event[0] <= RECENT_S:
            ago = now - self._event[0]
            return f"{self._event[1]} of {self._event[2]} {ago:.0f} s ago: this passes"
        if not any(answer.reported for answer in recent.answers):
            return (
                "it never reports a hit: prefix caching is off, or its block hashes do not repeat"
                " (vLLM 0.28 and older with a pool: start with PYTHONHASHSEED=0)"
            )
        return (
            "it forgets earlier than expected: its cache is smaller than told, or others use it too"
        )

    def _warning(self, recent: _Recent, text: str, now: float) -> str | None:
        if recent.warned_s is not None and now - recent.warned_s < QUIET_S:
            return None
        recent.warned_s = now
        recent.answers.clear()
        recent.unreported = 0
        return text

    @property
    def prompts(self) -> int:
        """Sessions whose last prompt it remembers."""
        return len(self._history)

    def check_integrity(self) -> None:
        self._history.check_integrity()
        assert all(len(recent.answers) <= WINDOW for recent in self._recent.values())
        assert all(totals.unreported <= totals.answers for totals in self.totals.values())


def _count(
    totals: Totals, stable: float, hits: Hits, scale: float, prompt_tokens: int, cached_tokens: int
) -> None:
    """Of the reported tokens the first are the stable prefix's."""
    reported_stable = min(cached_tokens, round(stable))
    totals.prompt += prompt_tokens
    totals.predicted_stable += round(hits.stable * scale)
    totals.predicted_session += round(hits.session * scale)
    totals.reported_stable += reported_stable
    totals.reported_session += cached_tokens - reported_stable
