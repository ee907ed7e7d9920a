"""How often calls may begin: a `Rate` says it, and a `Meter` keeps count of it for one service.

Both kinds decide from ``now`` alone. `Gcra` lets calls begin at an even pace, after a burst; `FixedWindow` lets them
begin as they come, so many in each window of time.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from towline.units import Seconds

__all__ = ["FixedWindow", "Gcra", "Meter", "Rate"]


class Meter(ABC):
    """The count of one service's calls. If the clock goes back, no time has passed."""

    __slots__ = ()

    @abstractmethod
    def wait(self, now: float) -> float:
        """Seconds until a call may begin; 0 if one may begin now. Counts none."""

    @abstractmethod
    def take(self, now: float) -> float:
        """Begin a call if one may begin now: then 0, and it is counted. Otherwise what `wait` says."""


class Rate(ABC):
    """How often calls may begin: settings, without a count."""

    __slots__ = ()

    @abstractmethod
    def meter(self) -> Meter:
        """Begin to count, for one service."""


def _dust(interval: float) -> float:
    # How early a call may begin: less than this is lost to floats. Three times 0.1 s is not 0.3 s; and a clock that has
    # run for months does not move by a tenth of a nanosecond, so a wait for that might never end.
    return max(interval * 1e-6, 1e-9)


def _check(num: object, per: float, name: str = "num") -> None:
    if not isinstance(num, int):
        raise TypeError(f"{name} is {num!r}, where a whole number is expected")
    if num < 1:
        raise ValueError(f"{name} is {num}, where 1 or more is expected")
    if not 0 < per < math.inf:  # NaN is not
        raise ValueError(f"per is {per}, where a number of seconds above 0 is expected")


# --- an even pace ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Gcra(Rate):
    """``burst`` calls at once after a pause, then one each ``per / num`` seconds: a token bucket.

    It is counted by the generic cell rate algorithm (ITU-T I.371), which keeps one number: the time at which the bucket
    would be full again. In any span of ``t`` seconds no more than ``burst + t * num / per`` calls begin. So a bucket
    that was full lets through up to ``num + burst`` in its first ``per``; where a target counts strictly, with a window
    of its own, choose ``burst=1``.

    Attributes:
        num: how many calls may begin in ``per`` seconds, in the long run.
        per: the length of that time in seconds.
        burst: how many may begin at once after a pause. The default is ``num``: whoever has not called for ``per``
            seconds may make the calls of that time. 1 keeps all calls ``per / num`` apart.

    Raises:
        ValueError: if ``num`` or ``burst`` is below 1, or ``per`` is not a number above 0.
        TypeError: if ``num`` or ``burst`` is no whole number.

    >>> meter = Gcra(4, per=1, burst=2).meter()
    >>> [meter.take(now) for now in (5.0, 5.0, 5.0, 5.125, 5.25)]
    [0.0, 0.0, 0.25, 0.125, 0.0]
    """

    num: int
    per: Seconds
    burst: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        _check(self.num, self.per)
        if self.burst is None:
            object.__setattr__(self, "burst", self.num)
        else:
            _check(self.burst, self.per, "burst")

    def meter(self) -> Meter:
        """Begin to count, with a full bucket."""
        return _GcraMeter(self.per / self.num, self.burst or self.num)


class _GcraMeter(Meter):
    """Knows when the bucket would be full again, and nothing else."""

    __slots__ = ("_dust", "_full_at", "_interval", "_most", "_tolerance")

    def __init__(self, interval: float, burst: int) -> None:
        self._interval = interval
        self._dust = _dust(interval)
        self._tolerance = (burst - 1) * interval  # how far ahead full_at may be for a call to begin,
        self._most = self._tolerance + self._dust + interval  # and how far it can be then
        self._full_at = -math.inf

    def wait(self, now: float) -> float:
        ahead = self._full_at - now
        if ahead > self._most:  # the clock went back
            self._full_at = now + self._most
            ahead = self._most
        wait = ahead - self._tolerance
        return wait if wait > self._dust else 0.0

    def take(self, now: float) -> float:
        wait = self.wait(now)
        if not wait:
            # From when it was due, not from when it came: what is early by dust must not add up
            self._full_at = max(self._full_at, now) + self._interval
        return wait


# --- so many in each window ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FixedWindow(Rate):
    """``num`` calls in each window of ``per`` seconds, as they come; the others wait for the next window.

    A window begins with the first call after the last one is over, as in Tower. So twice ``num`` calls may begin in
    less than ``per``: at the end of one window, and at the beginning of the next.

    Attributes:
        num: how many calls may begin in a window.
        per: the length of a window in seconds.

    Raises:
        ValueError: if ``num`` is below 1, or ``per`` is not a number above 0.
        TypeError: if ``num`` is no whole number.

    >>> meter = FixedWindow(2, per=1).meter()
    >>> [meter.take(now) for now in (5.0, 5.25, 5.5, 6.0)]
    [0.0, 0.0, 0.5, 0.0]
    """

    num: int
    per: Seconds

    def __post_init__(self) -> None:
        _check(self.num, self.per)

    def meter(self) -> Meter:
        """Begin to count; the first window begins with the first call."""
        return _WindowMeter(self.num, self.per)


class _WindowMeter(Meter):
    """Knows when the window ends, and how many calls may still begin in it."""

    __slots__ = ("_dust", "_left", "_num", "_per", "_until")

    def __init__(self, num: int, per: float) -> None:
        self._num = num
        self._per = per
        self._dust = _dust(per)
        self._left = 0
        self._until = -math.inf

    def wait(self, now: float) -> float:
        rest = self._until - now
        if rest > self._per:  # the clock went back
            self._until = now + self._per
            rest = self._per
        return rest if rest > self._dust and not self._left else 0.0

    def take(self, now: float) -> float:
        wait = self.wait(now)
        if not wait:
            if self._until - now <= self._dust:
                self._until = now + self._per
                self._left = self._num
            self._left -= 1
        return wait
