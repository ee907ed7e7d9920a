"""What is random about a delay: `Jitter` draws it from around the value of a series."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from towline.units import Seconds

__all__ = ["Jitter"]

Draw: TypeAlias = Callable[[], float]
"""Draws evenly from 0 to 1, as ``Random.random``."""

LONGEST: Final = sys.float_info.max
"""Where a series without a cap stops growing: a delay is always a finite number."""

HIGHEST_FACTOR: Final = 100.0
"""Of a jitter, as in Tower: what is more is a percentage, given for a factor."""


def to_seconds(name: str, value: float) -> float:
    if not 0 <= value <= LONGEST:  # NaN is not
        raise ValueError(f"{name} is {value}, where a finite number of 0 or more is expected")
    return float(value)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Jitter:
    """How a delay is drawn from a series' value: evenly between ``low * value`` and ``high * value + extra``.

    The usual kinds have constructors below, and three of them names, which stand for them wherever a jitter is
    expected: ``"full"``, ``"equal"`` and ``"none"``. Others are made from the three numbers: ``Jitter(low=1, high=2)``
    draws from between the value and twice as much.

    Under a cap the value is ``min(value, (cap - extra) / high)``, or 0 if that is negative. The longest draw is then
    never above the cap, and once the series has outgrown the cap, delays are still drawn from a range that ends there.

    Attributes:
        low: the shortest draw, as a multiple of the value.
        high: the longest draw, as a multiple of the value; at most 100.
        extra: seconds on top of the longest draw.

    Raises:
        ValueError: if a number is negative, infinite or not a number, ``high`` is 0, below ``low`` or above 100.

    >>> Jitter(low=0.5, high=1) == Jitter.equal()
    True
    """

    low: float
    high: float
    extra: Seconds = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.high <= HIGHEST_FACTOR:  # NaN is not
            raise ValueError(f"high is {self.high}, where a factor above 0, up to {HIGHEST_FACTOR:.0f}, is expected")
        if not 0 <= self.low <= self.high:
            raise ValueError(f"low is {self.low}, where 0 or more, up to high ({self.high}), is expected")
        for name, value in ("low", self.low), ("high", self.high), ("extra", to_seconds("extra", self.extra)):
            object.__setattr__(self, name, float(value))

    @classmethod
    def full(cls) -> Jitter:
        """From 0 to the value. It costs a server the least work of all (AWS, "Exponential Backoff And Jitter")."""
        return cls(low=0, high=1)

    @classmethod
    def equal(cls) -> Jitter:
        """From half the value to the value: a part of every wait is certain."""
        return cls(low=0.5, high=1)

    @classmethod
    def none(cls) -> Jitter:
        """The value itself; nothing is drawn."""
        return cls(low=1, high=1)

    @classmethod
    def proportional(cls, factor: float) -> Jitter:
        """The value, more or less ``factor`` times as much. gRPC takes 0.2, Polly 0.25, resilience4j 0.5.

        Raises:
            ValueError: if ``factor`` is not from 0 to 1.

        >>> Jitter.proportional(0.2)
        Jitter.proportional(0.2)
        """
        if not 0 <= factor <= 1:
            raise ValueError(f"proportional jitter is {factor}, where 0 to 1 is expected")
        return cls(low=1 - factor, high=1 + factor)

    @classmethod
    def additive(cls, seconds: float) -> Jitter:
        """From the value to ``seconds`` more, as in stamina and urllib3.

        Raises:
            ValueError: if ``seconds`` is negative, infinite or not a number.
        """
        return cls(low=1, high=1, extra=to_seconds("additive jitter", seconds))

    def limit(self, cap: float) -> float:
        """The value whose longest draw is ``cap``, or the one nearest to it."""
        return min(max(cap - self.extra, 0.0) / self.high, LONGEST)

    def draw(self, value: float, cap: float, random: Draw) -> float:
        """Draw the delay for a value that is not above `limit`."""
        shortest = self.low * value
        longest = self.high * value + self.extra
        if longest > cap:  # by rounding
            longest = cap
        if shortest >= longest:
            return longest
        return shortest + (longest - shortest) * random()  # never rounded above longest, since random() is below 1

    def __repr__(self) -> str:
        for name, jitter in JITTERS.items():
            if self == jitter:
                return f"Jitter.{name}()"
        if self.extra > 0 and self.low == self.high == 1:
            return f"Jitter.additive({self.extra})"
        factor = float(f"{self.high - 1:.15g}")  # what was written, if it was a decimal fraction
        if 0 <= factor <= 1 and self == Jitter.proportional(factor):
            return f"Jitter.proportional({factor})"
        return f"Jitter(low={self.low}, high={self.high}, extra={self.extra})"


JitterName: TypeAlias = Literal["full", "equal", "none"]

JITTERS: Final[dict[str, Jitter]] = {"full": Jitter.full(), "equal": Jitter.equal(), "none": Jitter.none()}


def to_jitter(given: Jitter | str) -> Jitter:
    jitter = given if isinstance(given, Jitter) else JITTERS.get(given)
    if jitter is None:
        known = ", ".join(repr(name) for name in JITTERS)
        raise ValueError(f"jitter is {given!r}, where {known} or a Jitter is expected")
    return jitter
