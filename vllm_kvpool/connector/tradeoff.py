"""Load or compute again, whichever is predicted to be faster.

Both are learnt from what requests of this engine went through: the time of a load until its blocks can be used, and the
time from the first step of a prompt's computation to its first token, with all that is computed beside it. A load does
not count its wait for other loads: many of them at once would look slow one by one, while the link still carries all of
them sooner than the GPU computes them. A load is a straight line over the number of tokens, fitted to the
last ones; computation is so much a token, as in the longest of the last prompts, and at least what any step takes (the
floor: the starts of its kernels). The rest of a loaded prompt takes that floor in any case, so a request alone in its
engine saves nothing by loading what would be computed within it. Beside other requests every token counts: their steps
take the floor anyway. Until both are known, and again when no load was seen for a while, the answer is to load.

Pure: no clock, no engine.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

KEEP = 0.9
"""What an observation weighs when the next one comes: about the last ten count."""
MIN_OBSERVATIONS = 8
"""Of each kind. The first ones are slow: memory is touched, kernels are loaded."""
TRUST_S = 10.0
"""A line of loads is believed for so long after its last one: were loads given up for good because some were slow,
nobody would notice when they get fast again."""
FLOOR_SHARE = 0.5
"""A prompt whose tokens explain at most this share of its time took the floor."""


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

    def through_origin(self) -> float:
        """Seconds a token of the best line without an intercept: the longest observations decide."""
        return self.product / self.tokens_squared

    def _slope(self) -> float:
        """Through the origin where the observations do not tell otherwise: all about as long, or
        shorter ones that took longer."""
        spread = self.weight * self.tokens_squared - self.tokens * self.tokens
        if spread > 0.01 * self.weight * self.tokens_squared:
            slope = (self.weight * self.product - self.tokens * self.seconds) / spread
            if slope > 0:
                return slope
        return self.through_origin()

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
        self._computations = Line()
        self._floors_s: deque[float] = deque(maxlen=MIN_OBSERVATIONS)
        """Of the last prompts that took the floor. The least counts: whatever disturbs a step makes it longer, and the
        slope takes fewer prompts than these to follow an engine that gets slower, however much."""
        self._last_load_s = float("-inf")

    def loaded(self, tokens: int, begun_s: float, now_s: float) -> None:
        """One load has ended; they end in the order in which they begin."""
        self._loads.add(tokens, now_s - max(begun_s, self._last_load_s))
        self._last_load_s = now_s

    def computed(self, tokens: int, seconds: float, alone: bool) -> None:
        """`alone`: no other request was in the engine at any time of it."""
        self._computations.add(tokens, seconds)
        if alone and self._computations.known:
            explained_s = self._computations.through_origin() * tokens
            if explained_s <= FLOOR_SHARE * seconds or seconds < self._floor_s:
                self._floors_s.append(seconds)

    @property
    def _floor_s(self) -> float:
        """0: not known, as where all prompts are long."""
        return min(self._floors_s) if len(self._floors_s) == MIN_OBSERVATIONS else 0.0

    def predict(self, tokens: int, rest: int, alone: bool, now_s: float) -> Prediction | None:
        """For `tokens` more of a prompt of which `rest` others are computed in any case. `alone`: no other request is
        in the engine. None: not known."""
        if not self._loads.known or not self._computations.known:
            return None
        if now_s > self._last_load_s + TRUST_S:
            return None
        slope, floor_s = self._computations.through_origin(), self._floor_s if alone else 0.0
        compute_s = max(floor_s, slope * (rest + tokens)) - max(floor_s, slope * rest)
        return Prediction(self._loads.at(tokens), compute_s)
