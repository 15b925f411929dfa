"""Load or compute again, whichever is predicted to be faster.

Both are learnt from what requests of this engine went through: the time of a load until vLLM goes on with its request
(the last bytes may still be coming then, behind the starts of kernels), and the time from the first step of a prompt's
computation to its first token, with how many tokens were computed meanwhile. A load does not count its wait for other
loads: many of them at once would look slow one by one, while the link still carries all of them sooner than the GPU
computes them. A load is a straight line over the number of tokens, fitted to the last ones; computation is a curve
(`prefill_time.py`). A request alone in its engine saves what its whole prompt takes less what the rest of it takes
anyway, which is nothing where a step takes as long for both. Beside other requests every token counts, as many share a
step. Until both are known, and again when no load was seen for a while, the answer is to load; what computing takes is
known without that.

Pure: no clock, no engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from vllm_kvpool.connector.prefill_time import PrefillCurve

KEEP = 0.9
"""What an observation weighs when the next one comes: about the last ten count."""
MIN_OBSERVATIONS = 8
"""The first ones are slow: memory is touched."""
TRUST_S = 10.0
"""A line of loads is believed for so long after its last one: were loads given up for good because some were slow,
nobody would notice when they get fast again."""


@dataclass(slots=True)
class Line:
    """seconds = intercept + slope * tokens, by least squares with weights that fade."""

    count: int = 0
    weight: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0
    tokens_squared: float = 0.0
    product: float = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        self.count += 1
        self.weight = self.weight * KEEP + 1
        self.tokens = self.tokens * KEEP + tokens
        self.seconds = self.seconds * KEEP + seconds
        self.tokens_squared = self.tokens_squared * KEEP + tokens * tokens
        self.product = self.product * KEEP + tokens * seconds

    @property
    def known(self) -> bool:
        return self.count >= MIN_OBSERVATIONS

    def _slope(self) -> float:
        """Through the origin where the observations do not tell otherwise: all about as long, or
        shorter ones that took longer."""
        spread = self.weight * self.tokens_squared - self.tokens * self.tokens
        if spread > 0.01 * self.weight * self.tokens_squared:
            slope = (self.weight * self.product - self.tokens * self.seconds) / spread
            if slope > 0:
                return slope
        return self.product / self.tokens_squared

    def at(self, tokens: int) -> float:
        slope = self._slope()
        return (self.seconds - slope * self.tokens) / self.weight + slope * tokens


class Prediction(NamedTuple):
    load_s: float
    compute_s: float

    @property
    def load_is_faster(self) -> bool:
        return self.load_s <= self.compute_s


class Tradeoff:
    def __init__(self) -> None:
        self._loads = Line()
        self._computations = PrefillCurve()
        self._last_load_s = self._last_end_s = float("-inf")

    def loaded(self, tokens: int, begun_s: float, now_s: float) -> None:
        """One load is done; they end in the order in which they begin."""
        self._loads.add(tokens, now_s - max(begun_s, self._last_end_s))
        self._last_load_s = now_s
        self.ended(now_s)

    def ended(self, now_s: float) -> None:
        """Some load has, also one that failed and tells nothing itself: the next one has waited for it."""
        self._last_end_s = now_s

    def computed(self, tokens: int, seconds: float) -> None:
        """So many, of whatever requests, in that time."""
        self._computations.add(tokens, seconds)

    def load_s(self, tokens: int, now_s: float) -> float | None:
        """None: not known, or not any more."""
        if not self._loads.known or now_s > self._last_load_s + TRUST_S:
            return None
        return self._loads.at(tokens)

    def compute_s(self, tokens: int, rest: int, alone: bool) -> float | None:
        """How much longer a prompt of which `rest` tokens are computed in any case takes with `tokens` more. `alone`:
        no other request is in the engine. None: not known."""
        if not self._computations.reaches(rest + tokens):
            return None
        if alone:
            return self._computations.at(rest + tokens) - self._computations.at(rest)
        return self._computations.per_token() * tokens

    def predict(self, tokens: int, rest: int, alone: bool, now_s: float) -> Prediction | None:
        """For `tokens` more, as in `compute_s`. None: one of the two is not known."""
        load_s, compute_s = self.load_s(tokens, now_s), self.compute_s(tokens, rest, alone)
        if load_s is None or compute_s is None:
            return None
        return Prediction(load_s, compute_s)
