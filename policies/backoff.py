"""How long to wait between attempts: a `Backoff` is a series of delays, as a value.

A series says how long each delay may be; `Jitter` draws the delay itself from around that, so that clients which
failed together do not come back together. A backoff holds no position: every call of `Backoff.delays` starts the
series anew, so one value serves any number of requests at once. It reads no clock, and draws only from the random
generator that it is given.

Law: whatever is put together here, every delay is a finite number, never negative, and never above the cap. What would
grow beyond that stays where its longest draw is the cap. So jitter spreads clients at the cap too, where a delay that
was drawn first and cut off afterwards would be the same for all of them. (`Backoff.decorrelated` is cut off all the
same, since its published formula is; most of its draws are still below.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from towline.units import Seconds

from ._series import (
    Constant,
    Decorrelated,
    Exponential,
    Fibonacci,
    Linear,
    List,
    Polynomial,
    Series,
    Smooth,
    Uniform,
)
from .jitter import JITTERS, LONGEST, Draw, Jitter, JitterName, to_jitter, to_seconds

if TYPE_CHECKING:
    from random import Random

__all__ = ["Backoff"]


@dataclass(frozen=True, slots=True)
class _Leaf:
    """A series with what is drawn from it."""

    series: Series[Any]  # Any: what a state is, only its series knows
    jitter: Jitter
    cap: float = math.inf

    longest: float = field(init=False, compare=False)
    limit: float = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "longest", min(self.cap, LONGEST))
        object.__setattr__(self, "limit", self.jitter.limit(self.longest))

    def draw(self, state: Any, random: Draw) -> tuple[float, Any]:
        """The delay in a state of the series, and the state after it."""
        limit = self.limit
        value, following = self.series.step(state, limit, random)
        return self.jitter.draw(value if value < limit else limit, self.longest, random), following

    def deal(self, random: Draw, walk: _Walk | None) -> Iterator[float]:
        state = self.series.start
        while state is not None:
            if walk is not None:
                walk.last = self, state
            delay, state = self.draw(state, random)
            yield delay

    def __repr__(self) -> str:
        series = self.series
        name = next((name for name, jitter in JITTERS.items() if jitter == self.jitter), None)
        jitter = repr(self.jitter if name is None else name)
        cap = "math.inf" if self.cap == math.inf else str(self.cap)
        if series.takes_cap:
            return f"Backoff.{series.name}({series.arguments()}, cap={cap}, jitter={jitter})"
        text = f"Backoff.{series.name}({series.arguments()}, jitter={jitter})"
        return text if self.cap == math.inf else f"{text}.cap({cap})"


class _Walk:
    """Stands in for the random generator where delays are skipped, and keeps the latest step, to be drawn again."""

    __slots__ = ("last", "random")

    def __init__(self) -> None:
        self.last: tuple[_Leaf, Any] | None = None
        self.random: Draw | None = None

    def draw(self) -> float:
        return 0.5 if self.random is None else self.random()


@dataclass(frozen=True, slots=True, repr=False)
class Backoff:
    """The delays between attempts. Make one with a constructor below; two that are made alike are equal.

    Every delay is finite, never negative, and never above the cap. Full jitter is the default of all series that are
    not random themselves: of all ways to spread clients it costs a server the least work, and it still spreads them
    once the cap is reached. Those that are (`random`, `decorrelated`, `smooth`) take none unless told to.

    A backoff is changed by making another: `cap`, `jitter`, `take`, `until`, and ``+`` for one after the other. Cap and
    jitter hold for all that they are called on, and `until` counts what is given out in the end, so the order of the
    calls makes no difference; ``(a + b).cap(5)`` is ``a.cap(5) + b.cap(5)``. The iterator that `delays` makes belongs
    to one request; the backoff itself may be shared.

    >>> from random import Random
    >>> backoff = Backoff.exponential(initial=1, jitter="none", first=None).cap(5).take(4)
    >>> list(backoff.delays(Random()))
    [1.0, 2.0, 4.0, 5.0]
    >>> backoff
    Backoff.exponential(initial=1.0, factor=2.0, first=None, cap=5.0, jitter='none').take(4)
    """

    _source: _Leaf | tuple[Backoff, ...]  # a tuple is a chain: of two or more, all but the last with an end
    _count: int | None = None
    _total: float = math.inf

    # Series

    @classmethod
    def constant(cls, delay: Seconds, *, jitter: Jitter | JitterName = "full") -> Backoff:
        """The same delay every time; ``constant(0)`` for none at all.

        Without a wait a retry is worth its while once at most: ``constant(0).take(1) + ...``.

        Raises:
            ValueError: if ``delay`` is negative, infinite or not a number.

        >>> Backoff.constant(1.5)
        Backoff.constant(1.5, jitter='full')
        """
        return cls(_Leaf(Constant(to_seconds("delay", delay)), to_jitter(jitter)))

    @classmethod
    def of(cls, *delays: Seconds, hold: bool = False, jitter: Jitter | JitterName = "full") -> Backoff:
        """These delays, and then no more.

        Args:
            delays: one for each retry, in seconds.
            hold: go on with the last one for ever.
            jitter: see `Jitter`.

        Raises:
            ValueError: if there is none, or one is negative, infinite or not a number.

        >>> from random import Random
        >>> list(Backoff.of(0.1, 0.5, 2, jitter="none").delays(Random()))
        [0.1, 0.5, 2.0]
        """
        if not delays:
            raise ValueError("of has 0 delays, where 1 or more is expected")
        values = tuple(to_seconds("delay", delay) for delay in delays)
        return cls(_Leaf(List(values, bool(hold)), to_jitter(jitter)))

    @classmethod
    def linear(cls, *, initial: Seconds, step: Seconds, jitter: Jitter | JitterName = "full") -> Backoff:
        """``initial``, then ``step`` more each time.

        Raises:
            ValueError: if ``initial`` or ``step`` is negative, infinite or not a number.
        """
        return cls(_Leaf(Linear(to_seconds("initial", initial), to_seconds("step", step)), to_jitter(jitter)))

    @classmethod
    def polynomial(cls, *, initial: Seconds, degree: float = 2, jitter: Jitter | JitterName = "full") -> Backoff:
        """``initial * n ** degree`` before retry n, counted from 1: by default 1, 4, 9, 16 times ``initial``.

        Raises:
            ValueError: if ``initial`` or ``degree`` is negative, infinite or not a number.
        """
        if not 0 <= degree <= LONGEST:
            raise ValueError(f"degree is {degree}, where a finite number of 0 or more is expected")
        return cls(_Leaf(Polynomial(to_seconds("initial", initial), float(degree)), to_jitter(jitter)))

    @classmethod
    def exponential(
        cls,
        *,
        initial: Seconds = 0.25,
        factor: float = 2,
        cap: Seconds = 30.0,
        first: Seconds | None = 0.1,
        jitter: Jitter | JitterName = "full",
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
        early = None if first is None else to_seconds("first", first)
        series = Exponential(to_seconds("initial", initial), float(factor), early)
        return cls(_Leaf(series, to_jitter(jitter))).cap(cap)

    @classmethod
    def fibonacci(
        cls, *, initial: Seconds, second: Seconds | None = None, jitter: Jitter | JitterName = "full"
    ) -> Backoff:
        """``initial``, ``second`` (``initial`` once more, by default), then always the sum of the two before.

        Raises:
            ValueError: if ``initial`` or ``second`` is negative, infinite or not a number.
        """
        after = None if second is None else to_seconds("second", second)
        return cls(_Leaf(Fibonacci(to_seconds("initial", initial), after), to_jitter(jitter)))

    @classmethod
    def random(cls, shortest: Seconds, longest: Seconds, *, jitter: Jitter | JitterName = "none") -> Backoff:
        """Evenly from between two lengths, each time. Under a cap that is below ``longest``, both shrink alike.

        Raises:
            ValueError: if a length is negative, infinite or not a number, or ``shortest`` is above ``longest``.
        """
        series = Uniform(to_seconds("shortest", shortest), to_seconds("longest", longest))
        if shortest > longest:
            raise ValueError(f"shortest is {shortest}, where longest ({longest}) or less is expected")
        return cls(_Leaf(series, to_jitter(jitter)))

    @classmethod
    def decorrelated(cls, *, initial: Seconds, cap: Seconds = 30.0, jitter: Jitter | JitterName = "none") -> Backoff:
        """Evenly from between ``initial`` and 3 times the delay before, but ``cap`` at most; the first one after
        ``initial``.

        It grows by chance alone, so clients that began together are soon apart. The formula is that of AWS's simulator
        ("Exponential Backoff And Jitter"), which cuts off what is above the cap: in the long run a third of the draws,
        and more if ``initial`` is near the cap, are the cap itself, and the others spread below. Under a cap that is
        not above ``initial`` all are drawn from between a third of the cap and the cap.

        Raises:
            ValueError: if ``initial`` is negative, infinite or not a number, or ``cap`` negative or not a number.
        """
        return cls(_Leaf(Decorrelated(to_seconds("initial", initial)), to_jitter(jitter))).cap(cap)

    @classmethod
    def smooth(cls, *, initial: Seconds, cap: Seconds = 30.0, jitter: Jitter | JitterName = "none") -> Backoff:
        """Doubles as the exponential series does, but all clients together come back at an even rate, without peaks.

        The formula is that of Polly (its "decorrelated jitter backoff v2", by G. Polevoy). With f(t) = 2**t *
        tanh(sqrt(4*t)) and t = n + U before retry n, counted from 0, a delay is ``initial * (f(t) - f(t before)) /
        1.4``. The medians are 0.90, 1.14, 2, 4, 8 times ``initial``, and the longest delays about twice the median.
        Once the longest would be above ``cap``, the step is held there, so that its draws go on to spread below.

        Raises:
            ValueError: if ``initial`` is negative, infinite or not a number, or ``cap`` negative or not a number.
        """
        return cls(_Leaf(Smooth(to_seconds("initial", initial)), to_jitter(jitter))).cap(cap)

    # Changes

    def cap(self, seconds: Seconds) -> Backoff:
        """The same backoff with no delay above ``seconds``. A cap only ever lowers one that is there.

        It is told to the series and the jitter rather than applied to their result; see `Jitter`.

        Raises:
            ValueError: if ``seconds`` is negative or not a number.
        """
        if not seconds >= 0:  # NaN is not
            raise ValueError(f"cap is {seconds}, where 0 or more is expected")
        if isinstance(self._source, tuple):
            return replace(self, _source=tuple(part.cap(seconds) for part in self._source))
        return replace(self, _source=replace(self._source, cap=min(self._source.cap, float(seconds))))

    def jitter(self, jitter: Jitter | JitterName) -> Backoff:
        """The same backoff with this jitter instead of the one that it has.

        Raises:
            ValueError: if ``jitter`` is neither a `Jitter` nor the name of one.

        >>> Backoff.constant(5).jitter(Jitter.additive(1))
        Backoff.constant(5.0, jitter=Jitter.additive(1.0))
        """
        if isinstance(self._source, tuple):
            return replace(self, _source=tuple(part.jitter(jitter) for part in self._source))
        return replace(self, _source=replace(self._source, jitter=to_jitter(jitter)))

    def take(self, n: int) -> Backoff:
        """The same backoff, ended after ``n`` delays: ``n`` retries, which is ``n + 1`` attempts.

        Raises:
            ValueError: if ``n`` is negative.
            TypeError: if ``n`` is no whole number.
        """
        if not isinstance(n, int):  # pyright: ignore[reportUnnecessaryIsInstance] -- not everyone checks types
            raise TypeError(f"take is {n!r}, where a whole number is expected")
        if n < 0:
            raise ValueError(f"take is {n}, where 0 or more is expected")
        return replace(self, _count=n if self._count is None else min(self._count, n))

    def until(self, total: Seconds) -> Backoff:
        """The same backoff, ended before the first delay with which all that were given out would exceed ``total``.

        This counts the waits alone. `StandardPolicy.max_elapsed` counts the attempts too.

        Args:
            total: seconds; ``math.inf`` for no limit.

        Raises:
            ValueError: if ``total`` is negative or not a number.

        >>> from random import Random
        >>> list(Backoff.exponential(initial=1, first=None, jitter="none").until(10).delays(Random()))
        [1.0, 2.0, 4.0]
        """
        if not total >= 0:  # NaN is not
            raise ValueError(f"until is {total}, where 0 or more is expected")
        return replace(self, _total=min(self._total, float(total)))

    def __add__(self, other: Backoff, /) -> Backoff:
        """The delays of this backoff, and after its end those of the other.

        Raises:
            ValueError: if this one has no end, since the other would never be used. `take` ends one, and `until` does
                unless its delays are all 0.

        >>> Backoff.constant(0).take(1) + Backoff.constant(5)
        Backoff.constant(0.0, jitter='full').take(1) + Backoff.constant(5.0, jitter='full')
        """
        if not isinstance(other, Backoff):  # pyright: ignore[reportUnnecessaryIsInstance] -- Python's protocol for +
            return NotImplemented
        if not self._ends:
            raise ValueError(f"{self!r} has no end, so what is added to it would never come: end it with take or until")
        return Backoff(self._parts + other._parts)

    @property
    def _ends(self) -> bool:
        if self._count is not None or self._total != math.inf:
            return True
        source = self._source
        return source[-1]._ends if isinstance(source, tuple) else source.series.ends

    @property
    def _parts(self) -> tuple[Backoff, ...]:
        is_plain_chain = isinstance(self._source, tuple) and self._count is None and self._total == math.inf
        # So that a + (b + c) is equal to (a + b) + c
        return self._source if isinstance(self._source, tuple) and is_plain_chain else (self,)

    # Use

    def delays(self, random: Random, *, skip: int = 0, hold: bool = False) -> Iterator[float]:
        """Yield the delays, from the first; for ever, unless the backoff has an end.

        Args:
            random: what jitter is drawn from.
            skip: how many delays to leave out at the beginning, for who has waited for them before. Nothing
                is drawn for them; a series that goes by what was drawn, and `until`, take them for average ones.
            hold: go on with the last value of a series that ended, drawn anew each time, for who has a limit
                elsewhere.

        Raises:
            ValueError: if ``skip`` is negative.

        >>> from random import Random
        >>> from itertools import islice
        >>> list(islice(Backoff.fibonacci(initial=10, jitter="none").delays(Random(), skip=1), 4))
        [10.0, 20.0, 30.0, 50.0]
        """
        if skip < 0:
            raise ValueError(f"skip is {skip}, where 0 or more is expected")
        if skip or hold:
            return self._delays_after(random, skip, hold)
        return self._deal(random.random, None)

    def _delays_after(self, random: Random, skip: int, hold: bool) -> Iterator[float]:
        walk = _Walk()
        delays = self._deal(walk.draw, walk)
        last = None
        for _ in islice(delays, skip):
            last = walk.last
        walk.random = random.random
        for delay in delays:
            last = walk.last
            yield delay
        last = last or walk.last  # if even the first delay was too long for `until`
        while hold and last is not None:
            leaf, state = last
            yield leaf.draw(state, random.random)[0]

    def _deal(self, random: Draw, walk: _Walk | None) -> Iterator[float]:
        source = self._source
        if isinstance(source, tuple):
            delays: Iterator[float] = chain.from_iterable(part._deal(random, walk) for part in source)
        else:
            delays = source.deal(random, walk)
        if self._count is not None:
            delays = islice(delays, self._count)
        return delays if self._total == math.inf else _until(delays, self._total)

    def __repr__(self) -> str:
        if isinstance(self._source, tuple):
            text = " + ".join(map(repr, self._source))
            if self._count is not None or self._total != math.inf:
                text = f"({text})"
        else:
            text = repr(self._source)
        if self._count is not None:
            text += f".take({self._count})"
        return text if self._total == math.inf else f"{text}.until({self._total})"


def _until(delays: Iterator[float], total: float) -> Iterator[float]:
    spent = 0.0
    for delay in delays:
        spent += delay
        if spent > total:
            return
        yield delay
