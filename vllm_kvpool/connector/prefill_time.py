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
FORGOTTEN_AFTER = 64
"""Observations of other lengths: the engine may have become another one since."""
STEP_BITS = 5
"""Fewer than 32 tokens are one length: what a step takes at least."""
REACH = 4
"""Nothing is said of prompts so many times as long as those that are known: short ones show what a step takes at least,
and nothing of what a token takes."""


class Point(NamedTuple):
    tokens: float
    seconds: float


class _Length:
    def __init__(self) -> None:
        self._kept: deque[Point] = deque(maxlen=KEPT)
        self.last = 0
        """Number of the last observation."""
        self.typical: Point | None = None

    def add(self, point: Point, number: int) -> None:
        self._kept.append(point)
        self.last = number
        if len(self._kept) >= MIN_OBSERVATIONS:
            tokens, seconds = zip(*self._kept, strict=True)
            self.typical = Point(fmean(tokens), median(seconds))


class PrefillCurve:
    def __init__(self) -> None:
        self._count = 0
        self._lengths: dict[int, _Length] = {}
        self._points: list[Point] = []
        """By length, from 0 tokens on: what a step takes at least, where that is known. More tokens never take less:
        what was seen to the contrary is noise."""

    def add(self, tokens: int, seconds: float) -> None:
        self._count += 1
        length = self._lengths.setdefault(max(tokens.bit_length(), STEP_BITS), _Length())
        length.add(Point(tokens, seconds), self._count)
        for bits in [bits for bits, one in self._lengths.items() if self._is_old(one)]:
            del self._lengths[bits]
        self._points = self._drawn()

    def _is_old(self, length: _Length) -> bool:
        return self._count - length.last >= FORGOTTEN_AFTER

    def _drawn(self) -> list[Point]:
        step = self._lengths.get(STEP_BITS)
        points = [Point(0, step.typical.seconds if step and step.typical else 0.0)]
        for _, length in sorted(self._lengths.items()):
            if length.typical:
                tokens, seconds = length.typical
                points.append(Point(tokens, max(seconds, points[-1].seconds)))
        return points

    def reaches(self, tokens: int) -> bool:
        """Whether anything is known about so many."""
        return len(self._points) > 1 and tokens <= REACH * self._points[-1].tokens

    def at(self, tokens: int) -> float:
        """Seconds; of more tokens than are known, as much more. Needs `reaches`."""
        for shorter, longer in pairwise(self._points):
            if tokens <= longer.tokens:
                share = (tokens - shorter.tokens) / (longer.tokens - shorter.tokens)
                return shorter.seconds + share * (longer.seconds - shorter.seconds)
        return self.per_token() * tokens

    def per_token(self) -> float:
        """Seconds, in the longest prompts: next to nothing of theirs is what a step takes at least. Needs `reaches`."""
        return self._points[-1].seconds / self._points[-1].tokens
