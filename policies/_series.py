"""The laws of growth behind a `Backoff`: what each delay is, before jitter.

A law holds no position: it gives a first state, and for each state the value and the state after it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Final, Protocol, TypeVar

from .jitter import LONGEST, Draw

S = TypeVar("S")


class Series(Protocol[S]):
    """One law of growth: a value, whose states are what one walk through it remembers."""

    __slots__ = ()

    name: ClassVar[str]
    """The constructor of `Backoff` that makes it."""

    takes_cap: ClassVar[bool] = False
    """Whether that constructor has a parameter for the cap."""

    @property
    def start(self) -> S:
        """The state before the first value."""
        ...

    @property
    def ends(self) -> bool:
        return False

    def step(self, state: S, limit: float, random: Draw, /) -> tuple[float, S | None]:
        """The value in ``state``, and the state after it, None at the end.

        The value may be above ``limit``, or infinite: the caller lowers it. A series that draws it from a range keeps
        that range below the limit.
        """
        ...

    def arguments(self) -> str:
        """The arguments of the constructor, but for cap and jitter."""
        ...


@dataclass(frozen=True, slots=True)
class Constant(Series[int]):
    name: ClassVar[str] = "constant"
    delay: float

    @property
    def start(self) -> int:
        return 0

    def step(self, state: int, limit: float, random: Draw, /) -> tuple[float, int]:
        return self.delay, state

    def arguments(self) -> str:
        return f"{self.delay}"


@dataclass(frozen=True, slots=True)
class List(Series[int]):
    name: ClassVar[str] = "of"
    values: tuple[float, ...]
    hold: bool

    @property
    def start(self) -> int:
        return 0

    @property
    def ends(self) -> bool:
        return not self.hold

    def step(self, state: int, limit: float, random: Draw, /) -> tuple[float, int | None]:
        following = state + 1
        if following < len(self.values):
            return self.values[state], following
        return self.values[state], state if self.hold else None

    def arguments(self) -> str:
        return f"{', '.join(map(str, self.values))}, hold={self.hold}"


@dataclass(frozen=True, slots=True)
class Linear(Series[int]):
    name: ClassVar[str] = "linear"
    initial: float
    increment: float

    @property
    def start(self) -> int:
        return 0

    def step(self, state: int, limit: float, random: Draw, /) -> tuple[float, int]:
        # not a running sum, which would gather rounding errors
        return self.initial + state * self.increment, state + 1

    def arguments(self) -> str:
        return f"initial={self.initial}, step={self.increment}"


@dataclass(frozen=True, slots=True)
class Polynomial(Series[int]):
    name: ClassVar[str] = "polynomial"
    initial: float
    degree: float

    @property
    def start(self) -> int:
        return 1

    def step(self, state: int, limit: float, random: Draw, /) -> tuple[float, int]:
        try:
            return self.initial * float(state) ** self.degree, state + 1
        except OverflowError:
            return math.inf if self.initial > 0 else 0.0, state + 1

    def arguments(self) -> str:
        return f"initial={self.initial}, degree={self.degree}"


@dataclass(frozen=True, slots=True)
class Exponential(Series[float]):
    name: ClassVar[str] = "exponential"
    takes_cap: ClassVar[bool] = True
    initial: float
    factor: float
    first: float | None

    @property
    def start(self) -> float:
        return self.initial if self.first is None else -1.0

    def step(self, state: float, limit: float, random: Draw, /) -> tuple[float, float]:
        if state < 0 and self.first is not None:
            return self.first, self.initial
        return state, state * self.factor  # reaches infinity where ** would raise OverflowError

    def arguments(self) -> str:
        return f"initial={self.initial}, factor={self.factor}, first={self.first}"


@dataclass(frozen=True, slots=True)
class Fibonacci(Series[tuple[float, float]]):
    name: ClassVar[str] = "fibonacci"
    initial: float
    second: float | None

    @property
    def start(self) -> tuple[float, float]:
        return self.initial, self.initial if self.second is None else self.second

    def step(self, state: tuple[float, float], limit: float, random: Draw, /) -> tuple[float, tuple[float, float]]:
        value, following = state
        return value, (following, value + following)

    def arguments(self) -> str:
        return f"initial={self.initial}" + ("" if self.second is None else f", second={self.second}")


@dataclass(frozen=True, slots=True)
class Uniform(Series[int]):
    name: ClassVar[str] = "random"
    shortest: float
    longest: float

    @property
    def start(self) -> int:
        return 0

    def step(self, state: int, limit: float, random: Draw, /) -> tuple[float, int]:
        shortest, longest = self.shortest, self.longest
        if longest > limit:
            shortest, longest = shortest * (limit / longest), limit
        return shortest + (longest - shortest) * random(), state

    def arguments(self) -> str:
        return f"{self.shortest}, {self.longest}"


@dataclass(frozen=True, slots=True)
class Decorrelated(Series[float]):
    """A state is the delay before, or negative."""

    name: ClassVar[str] = "decorrelated"
    takes_cap: ClassVar[bool] = True
    initial: float

    @property
    def start(self) -> float:
        return -1.0

    def step(self, state: float, limit: float, random: Draw, /) -> tuple[float, float]:
        shortest = before = self.initial
        if shortest >= limit:  # nothing would be left of the range, so the first one is moved below
            shortest = before = limit / 3
        elif state >= 0:
            before = state
        longest = min(3 * before, LONGEST)
        value = min(shortest + (longest - shortest) * random(), limit)
        return value, value

    def arguments(self) -> str:
        return f"initial={self.initial}"


@dataclass(frozen=True, slots=True)
class Smooth(Series[tuple[int, float, float]]):
    """A state is n, the size of step n, and where on the curve the step before ended.

    The published formula takes differences of 2**t * tanh(sqrt(4 * t)) at t = n + U. Here the curve is divided by 2**n
    and the size multiplied by it, so that no power overflows, and the size can be held under a limit.
    """

    name: ClassVar[str] = "smooth"
    takes_cap: ClassVar[bool] = True
    initial: float

    @property
    def start(self) -> tuple[int, float, float]:
        return 0, self.initial, 0.0

    def step(
        self, state: tuple[int, float, float], limit: float, random: Draw, /
    ) -> tuple[float, tuple[int, float, float]]:
        n, size, before = state
        at = _curve(n, random())
        longest = _curve(n, 1.0) - (0.0 if n == 0 else _curve(n - 1, 0.0) / 2)
        value = min(size, limit / longest * _SMOOTH_SCALE) / _SMOOTH_SCALE * (at - before / 2)
        return max(value, 0.0), (n + 1, size * 2, at)  # tanh need not rise in its last digit

    def arguments(self) -> str:
        return f"initial={self.initial}"


_SMOOTH_SCALE: Final = 1.4
"""Brings the medians of the curve's differences to about 1, 2, 4, 8 times the initial delay."""


def _curve(n: int, u: float) -> float:
    return 2**u * math.tanh(math.sqrt(4 * (n + u)))
