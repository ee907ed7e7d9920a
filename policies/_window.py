"""The outcomes that a circuit breaker counts: those of the last seconds, or of the last calls."""

from __future__ import annotations

import math
from typing import Final

__all__ = ["LastCalls", "LastSeconds"]

BUCKETS: Final = 10
"""How finely a window of time is cut: an outcome is forgotten when it is 90 to 100 % of the window old."""


class LastSeconds:
    """The outcomes of the last ``seconds``, in buckets: what a bucket holds is forgotten all at once."""

    __slots__ = ("_buckets", "_current", "_number", "_seconds", "_width", "calls", "failures", "slow")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._width = seconds / BUCKETS
        self.clear()

    def clear(self) -> None:
        self.calls = self.failures = self.slow = 0
        self._buckets = [[0, 0, 0] for _ in range(BUCKETS)]
        self._current = self._buckets[0]
        self._number = -math.inf  # of the bucket that is the current one

    def expire(self, time: float) -> None:
        """Forget what is too old at ``time``, which must never go back."""
        number = time // self._width
        if number == self._number:
            return
        newest = int(number)
        for n in range(newest, newest - int(min(number - self._number, BUCKETS)), -1):
            calls, failures, slow = self._buckets[n % BUCKETS]
            self.calls -= calls
            self.failures -= failures
            self.slow -= slow
            self._buckets[n % BUCKETS] = [0, 0, 0]
        self._current = self._buckets[newest % BUCKETS]
        self._number = number

    def add(self, time: float, failed: bool, slow: bool) -> None:
        if time // self._width != self._number:
            self.expire(time)
        bucket = self._current
        bucket[0] += 1
        self.calls += 1
        if failed:
            bucket[1] += 1
            self.failures += 1
        if slow:
            bucket[2] += 1
            self.slow += 1

    def __str__(self) -> str:
        return f"of {self.calls} calls in {self._seconds:g} s"


class LastCalls:
    """The outcomes of the last ``count`` calls: a ring of one byte each."""

    __slots__ = ("_next", "_ring", "calls", "failures", "slow")

    def __init__(self, count: int) -> None:
        self._ring = bytearray(count)
        self.clear()

    def clear(self) -> None:
        self.calls = self.failures = self.slow = self._next = 0  # what the ring holds is out of reach

    def expire(self, time: float) -> None:
        """Nothing grows old."""

    def add(self, time: float, failed: bool, slow: bool) -> None:
        ring, at = self._ring, self._next
        if self.calls < len(ring):
            self.calls += 1
        else:
            self.failures -= ring[at] & 1
            self.slow -= ring[at] >> 1
        ring[at] = failed | slow << 1
        self.failures += failed
        self.slow += slow
        self._next = at + 1 if at + 1 < len(ring) else 0

    def __str__(self) -> str:
        return f"of the last {self.calls} calls"
