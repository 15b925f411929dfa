"""How long an engine takes to compute so many tokens, as its last prompts of about that length tell.

That is no straight line: on a GPU some hundred tokens take no longer than one (to start the kernels, to read the
weights), and then each further one takes its time. So lengths are told apart by powers of two; each has the median of
its last observations, and between two of them the line is straight.
"""

from __future__ import annotations

from collections import deque
from itertools import pairwise
from statistics import fmean, median
from typing import NamedTuple

KEPT = 8
"""Observations of each length. The median of so many follows an engine that gets slower, or faster, after four."""
MIN_OBSERVATIONS = 3
"""Of a length: the first ones are slow, as memory is touched and kernels are loaded."""
STEP_BITS = 5
"""Fewer than 32 tokens are one length: what a step takes at least."""


class Point(NamedTuple):
    tokens: float
    seconds: float


class Curve:
    def __init__(self) -> None:
        self._kept: dict[int, deque[Point]] = {}
        self._known: dict[int, Point] = {}

    def add(self, tokens: int, seconds: float) -> None:
        length = max(tokens.bit_length(), STEP_BITS)
        kept = self._kept.setdefault(length, deque(maxlen=KEPT))
        kept.append(Point(tokens, seconds))
        if len(kept) >= MIN_OBSERVATIONS:
            all_tokens, all_seconds = zip(*kept, strict=True)
            self._known[length] = Point(fmean(all_tokens), median(all_seconds))

    @property
    def known(self) -> bool:
        return bool(self._known)

    def at(self, tokens: int) -> float:
        """Seconds; of more tokens than were ever seen, as much more."""
        points = self._points()
        for shorter, longer in pairwise(points):
            if tokens <= longer.tokens:
                share = (tokens - shorter.tokens) / (longer.tokens - shorter.tokens)
                return shorter.seconds + share * (longer.seconds - shorter.seconds)
        return self.per_token() * tokens

    def per_token(self) -> float:
        """Seconds, in the longest prompts: next to nothing of theirs is what a step takes at least."""
        longest = self._known[max(self._known)]
        return longest.seconds / longest.tokens

    def _points(self) -> list[Point]:
        """By length, from 0 tokens on: what a step takes at least, where that is known."""
        least_s = self._known[STEP_BITS].seconds if STEP_BITS in self._known else 0.0
        return [Point(0, least_s), *(point for _, point in sorted(self._known.items()))]
