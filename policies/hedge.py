"""After how long a call is late enough for a second one beside it: the delay of `Hedge`, learnt from calls before.

A fixed delay is right only as long as the target is as fast as it was when somebody chose it. `Percentile` says instead
which share of the calls may be called late; a `RotatingHistogram` remembers how long calls took lately. Neither reads a
clock: ``now`` comes in with every question.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

from towline.text import differing
from towline.units import Seconds

__all__ = ["Percentile", "RotatingHistogram"]

STEPS: Final = 64
"""Buckets to an octave, all of one width: a bucket is never wider than 1/64 of the times in it, which is 1.6 %."""

SHORTEST: Final = 2.0**-20
LONGEST: Final = 2.0**17
"""One microsecond and a day and a half: what is beyond counts as that, so there are never more than 37 octaves."""


@dataclass(frozen=True, slots=True)
class Percentile:
    """A delay that all but the slowest calls of the last while have met.

    With ``share`` 0.95 one call in twenty is late, so hedging by it adds one in twenty; 0.99 adds one in a hundred, and
    helps against fewer of the slow ones.

    Attributes:
        share: which part of the calls is not late, above 0 and up to 1, which is as slow as the slowest.
        min_points: how many calls must be known before any delay is. The default is the least number of which one is
            above the 95th percentile.
        window: seconds. A delay is learnt from the calls that ended within one window, and holds for the next. The
            default is that of Finagle's backup requests.
        at_least: the shortest delay, in seconds, whatever was learnt: what answers in less needs no help, and nearly
            every call would be late by a hair. The default is Finagle's.

    Raises:
        ValueError: if a number is outside of what is said above, or not a number.

    >>> Percentile(95)
    Traceback (most recent call last):
    ...
    ValueError: share is 95, where a number above 0 and up to 1 is expected
    """

    share: float = 0.95
    min_points: int = field(default=20, kw_only=True)
    window: Seconds = field(default=30.0, kw_only=True)
    at_least: Seconds = field(default=0.001, kw_only=True)

    __repr__ = differing

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:  # NaN is neither
            raise ValueError(f"share is {self.share}, where a number above 0 and up to 1 is expected")
        if not self.min_points >= 1:  # NaN is not
            raise ValueError(f"min_points is {self.min_points}, where 1 or more is expected")
        if not 0 < self.window < math.inf:
            raise ValueError(f"window is {self.window}, where a finite number above 0 is expected")
        if not 0 <= self.at_least < math.inf:
            raise ValueError(f"at_least is {self.at_least}, where a finite number of 0 or more is expected")

    def delay(self, histogram: RotatingHistogram, now: float) -> float:
        """The delay in seconds at the time ``now``; ``math.inf`` while too few calls are known.

        >>> histogram = RotatingHistogram(window=30)
        >>> for milliseconds in [1, 1, 1, 1, 1, 1, 1, 1, 10, 10]:
        ...     histogram.record(milliseconds / 1000, now=0)
        >>> percentile = Percentile(0.9, min_points=10)
        >>> percentile.delay(histogram, now=0), percentile.delay(histogram, now=30)
        (inf, 0.01)
        """
        if histogram.count(now) < self.min_points:
            return math.inf
        return max(histogram.percentile(self.share, now), self.at_least)


class _Counts:
    """How many times fell into each bucket. Bounded: there are 2,369 buckets, and only those that are used exist."""

    __slots__ = ("buckets", "highest", "total")

    def __init__(self) -> None:
        self.buckets: dict[int, int] = {}
        self.total = 0
        self.highest = 0.0


class RotatingHistogram:
    """How long calls took, in two periods of ``window`` seconds: one is written while the one before it is read.

    So what is read does not change within a period, and is at most two periods old: after two periods without a word
    nothing is left of it. (Tower's hedging remembers in the same way.) What is read is never below the time that was
    recorded, and above it by 1.6 % at the most.

    Args:
        window: the length of a period, in seconds. The first begins with the first call that is made here.

    >>> histogram = RotatingHistogram(window=10)
    >>> histogram.record(0.5, now=0)
    >>> [histogram.count(now) for now in (9, 10, 19, 20)]
    [0, 1, 1, 0]
    """

    __slots__ = ("_known", "_read", "_rotated", "_write", "window")

    def __init__(self, window: float) -> None:
        self.window = window
        self._read = _Counts()
        self._write = _Counts()
        self._rotated: float | None = None
        self._known: dict[float, float] = {}  # percentiles of what is read; worked out once in a period

    def record(self, seconds: float, now: float) -> None:
        """A call that took ``seconds`` has ended."""
        self._rotate(now)
        counts = self._write
        # Written so that NaN counts as the shortest, too
        seconds = min(seconds, LONGEST) if seconds > SHORTEST else SHORTEST
        mantissa, exponent = math.frexp(seconds)  # 0.5 <= mantissa < 1, so what is added is from STEPS to 2 * STEPS - 1
        bucket = exponent * STEPS + int(mantissa * (2 * STEPS))
        counts.buckets[bucket] = counts.buckets.get(bucket, 0) + 1
        counts.total += 1
        if seconds > counts.highest:
            counts.highest = seconds

    def count(self, now: float) -> int:
        """How many calls ended in the period that is read at the time ``now``."""
        self._rotate(now)
        return self._read.total

    def percentile(self, share: float, now: float) -> float:
        """The least number of seconds in which at least ``share`` of the calls ended; 0 if there were none.

        >>> histogram = RotatingHistogram(window=10)
        >>> for seconds in (0.25, 0.5, 1.0, 2.0):
        ...     histogram.record(seconds, now=0)
        >>> histogram.percentile(0.5, now=10), histogram.percentile(1, now=10)
        (0.5078125, 2.0)
        """
        self._rotate(now)
        known = self._known.get(share)
        if known is None:
            known = self._known[share] = _percentile(self._read, share)
        return known

    def _rotate(self, now: float) -> None:
        if self._rotated is None:
            self._rotated = now
        gone = now - self._rotated
        if gone < 0:  # the clock went back, to another loop's, say: from here on it goes on
            self._rotated = now
        if gone < self.window:
            return
        periods = gone // self.window
        self._rotated += periods * self.window
        self._read = self._write if periods == 1 else _Counts()
        self._write = _Counts()
        self._known = {}


def _percentile(counts: _Counts, share: float) -> float:
    # What is subtracted is for products such as 0.07 * 100, which is a little above 7
    rank = max(1, math.ceil(share * counts.total - 1e-9))
    seen = 0
    for bucket, count in sorted(counts.buckets.items()):
        seen += count
        if seen >= rank:
            exponent, step = divmod(bucket - STEPS, STEPS)
            return min(math.ldexp(STEPS + step + 1, exponent) / (2 * STEPS), counts.highest)
    return 0.0
