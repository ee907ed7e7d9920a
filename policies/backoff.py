"""How long to wait between attempts: a `Backoff` is a series of delays, as a value.

A series says the longest that each delay may be; jitter draws the delay itself from what is below, so that
clients which failed together do not come back together. A backoff holds no position: every call of
`Backoff.delays` starts the series anew, so one value serves any number of requests at once. It reads no
clock, and draws only from the random generator that it is given.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Final, Literal, Protocol, get_args

if TYPE_CHECKING:
    from random import Random

__all__ = ["Backoff", "Jitter"]

Jitter = Literal["full", "none"]
"""How a delay is drawn: ``"full"``, evenly from 0 to the series' value; ``"none"``, that value itself."""

LONGEST: Final = sys.float_info.max
"""Where a series without a cap stops growing: a delay is always a finite number."""


class _Series(Protocol):
    """One law of growth. A value, with a repr that is the arguments of its constructor."""

    def values(self) -> Iterator[float]:
        """Yield the values without jitter or cap, from the first. They may reach infinity."""
        ...


@dataclass(frozen=True, slots=True)
class _Constant:
    delay: float

    def __repr__(self) -> str:
        return f"constant({self.delay}"

    def values(self) -> Iterator[float]:
        while True:
            yield self.delay


@dataclass(frozen=True, slots=True)
class _Linear:
    initial: float
    step: float

    def __repr__(self) -> str:
        return f"linear(initial={self.initial}, step={self.step}"

    def values(self) -> Iterator[float]:
        n = 0
        while True:
            yield self.initial + n * self.step  # not a running sum, which would gather rounding errors
            n += 1


@dataclass(frozen=True, slots=True)
class _Exponential:
    initial: float
    factor: float
    first: float | None

    def __repr__(self) -> str:
        return f"exponential(initial={self.initial}, factor={self.factor}, first={self.first}"

    def values(self) -> Iterator[float]:
        if self.first is not None:
            yield self.first
        value = self.initial
        while True:
            yield value
            value *= self.factor  # reaches infinity where ** would raise OverflowError


@dataclass(frozen=True, slots=True)
class _Fibonacci:
    initial: float

    def __repr__(self) -> str:
        return f"fibonacci(initial={self.initial}"

    def values(self) -> Iterator[float]:
        value, following = self.initial, self.initial
        while True:
            yield value
            value, following = following, value + following


@dataclass(frozen=True, slots=True, repr=False)
class Backoff:
    """The delays between attempts. Make one with a constructor below; two that are made alike are equal.

    Every delay is finite, never negative, and never above the cap. Full jitter is the default: of all ways to
    spread clients it costs a server the least work, and it still spreads them once the cap is reached.

    >>> from random import Random
    >>> backoff = Backoff.exponential(initial=1, jitter="none", first=None).cap(5).take(4)
    >>> list(backoff.delays(Random()))
    [1.0, 2.0, 4.0, 5.0]
    >>> backoff
    Backoff.exponential(initial=1.0, factor=2.0, first=None, cap=5.0, jitter='none').take(4)
    """

    _series: _Series
    _jitter: Jitter = "full"
    _cap: float = math.inf
    _count: int | None = None

    def __post_init__(self) -> None:
        if self._jitter not in get_args(Jitter):
            known = " or ".join(repr(name) for name in get_args(Jitter))
            raise ValueError(f"jitter is {self._jitter!r}, where {known} is expected")

    @classmethod
    def constant(cls, delay: float, *, jitter: Jitter = "full") -> Backoff:
        """The same delay every time.

        Raises:
            ValueError: if ``delay`` is negative, infinite or not a number.

        >>> Backoff.constant(1.5)
        Backoff.constant(1.5, jitter='full')
        """
        return cls(_Constant(_seconds("delay", delay)), jitter)

    @classmethod
    def linear(cls, *, initial: float, step: float, jitter: Jitter = "full") -> Backoff:
        """``initial``, then ``step`` more each time.

        Raises:
            ValueError: if ``initial`` or ``step`` is negative, infinite or not a number.
        """
        return cls(_Linear(_seconds("initial", initial), _seconds("step", step)), jitter)

    @classmethod
    def exponential(
        cls,
        *,
        initial: float = 0.25,
        factor: float = 2,
        cap: float = 30.0,
        first: float | None = 0.1,
        jitter: Jitter = "full",
    ) -> Backoff:
        """``first``, then ``initial``, and ``factor`` times as much each time, up to ``cap``.

        The defaults are those for connecting. ``first`` is one delay before the series proper: most links
        that are cut can be made again at once, so the first retry comes within 0.1 s, and the second backs
        off.

        Args:
            initial: where the series begins.
            factor: what each value is multiplied by. Below 1 the delays shrink.
            cap: no delay is above; ``math.inf`` for none.
            first: the one delay before ``initial``; None to begin with ``initial``.
            jitter: see `Jitter`.

        Raises:
            ValueError: if a length is negative or not a number, or ``factor`` is not above 0.
        """
        if not 0 < factor <= LONGEST:
            raise ValueError(f"factor is {factor}, where a finite number above 0 is expected")
        early = None if first is None else _seconds("first", first)
        return cls(_Exponential(_seconds("initial", initial), float(factor), early), jitter).cap(cap)

    @classmethod
    def fibonacci(cls, *, initial: float, jitter: Jitter = "full") -> Backoff:
        """``initial`` twice, then always the sum of the two before.

        Raises:
            ValueError: if ``initial`` is negative, infinite or not a number.
        """
        return cls(_Fibonacci(_seconds("initial", initial)), jitter)

    def cap(self, seconds: float) -> Backoff:
        """The same backoff with no delay above ``seconds``. A cap only ever lowers one that is there.

        Raises:
            ValueError: if ``seconds`` is negative or not a number.
        """
        if not seconds >= 0:  # NaN is not
            raise ValueError(f"cap is {seconds}, where 0 or more is expected")
        return replace(self, _cap=min(self._cap, float(seconds)))

    def take(self, n: int) -> Backoff:
        """The same backoff, ended after ``n`` delays: ``n`` retries, which is ``n + 1`` attempts.

        Raises:
            ValueError: if ``n`` is negative.
        """
        if n < 0:
            raise ValueError(f"take is {n}, where 0 or more is expected")
        return replace(self, _count=n if self._count is None else min(self._count, n))

    def delays(self, random: Random, *, skip: int = 0, hold: bool = False) -> Iterator[float]:
        """Yield the delays, from the first; for ever, unless `take` ended them.

        Args:
            random: what jitter is drawn from.
            skip: how many delays to leave out at the beginning, for who has waited for them before. Nothing
                is drawn for them.
            hold: go on with the last value of a series that `take` ended, for who has a limit elsewhere.

        >>> from random import Random
        >>> from itertools import islice
        >>> list(islice(Backoff.fibonacci(initial=10, jitter="none").delays(Random(), skip=1), 4))
        [10.0, 20.0, 30.0, 50.0]
        """
        values = islice(self._series.values(), self._count)
        for value in islice(_held(values) if hold else values, skip, None):
            longest = min(value, self._cap, LONGEST)
            yield longest if self._jitter == "none" else longest * random.random()

    def __repr__(self) -> str:
        series = repr(self._series)
        if isinstance(self._series, _Exponential):
            text = f"Backoff.{series}, cap={_literal(self._cap)}, jitter={self._jitter!r})"
        else:
            text = f"Backoff.{series}, jitter={self._jitter!r})"
            if self._cap != math.inf:
                text += f".cap({self._cap})"
        return text if self._count is None else f"{text}.take({self._count})"


def _held(values: Iterator[float]) -> Iterator[float]:
    last: float | None = None
    for last in values:
        yield last
    while last is not None:
        yield last


def _literal(number: float) -> str:
    return "math.inf" if number == math.inf else str(number)


def _seconds(name: str, value: float) -> float:
    if not 0 <= value <= LONGEST:  # NaN is not
        raise ValueError(f"{name} is {value}, where a finite number of 0 or more is expected")
    return float(value)
