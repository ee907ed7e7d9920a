"""How busy an endpoint is, and the choice between two of them: what a `Balance` decides by.

Rule: this file counts and computes. When a call began and how long it took is told to it.

The choice is the power of two choices: take two endpoints at random and use the one with the lower load. That does
nearly as well as looking at all of them, and unlike "always the least loaded" it does not send everybody to the same
endpoint at the same moment (Mitzenmacher, *The Power of Two Choices in Randomized Load Balancing*, 2001).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from towline.text import differing
from towline.units import Seconds

if TYPE_CHECKING:
    from random import Random

__all__ = ["PeakEwma", "RoundTrips", "two_of"]


@dataclass(frozen=True, slots=True)
class PeakEwma:
    """Load as seconds: how long a round trip takes of late, times the calls that a further one would stand beside.

    The estimate follows a round trip that took longer at once (the peak), and one that took less only as time goes by:
    an exponentially weighted moving average in which what is ``decay`` seconds old counts 37 %, which is ``1/e``. So an
    endpoint that stumbles is left alone from its first slow answer on. While nothing is heard of it the estimate sinks,
    and some time later it is tried again. The measure is that of Finagle and Tower.

    Attributes:
        default_rtt: the estimate for an endpoint of which nothing is known yet, in seconds. The default is longer than
            most calls take, so a new endpoint is not flooded before it has answered once.
        decay: how fast the estimate forgets, in seconds.

    Raises:
        ValueError: if ``default_rtt`` is below 0, or ``decay`` is not above 0, or one of them is infinite or no number.

    >>> trips = PeakEwma(decay=10).round_trips(now=0)
    >>> trips.load(now=0), round(trips.load(now=10), 3)
    (1.0, 0.368)
    """

    default_rtt: Seconds = field(default=1.0, kw_only=True)
    decay: Seconds = field(default=10.0, kw_only=True)

    __repr__ = differing

    def __post_init__(self) -> None:
        if not 0 <= self.default_rtt < math.inf:  # NaN is not
            raise ValueError(f"default_rtt is {self.default_rtt}, where 0 or more is expected")
        if not 0 < self.decay < math.inf:
            raise ValueError(f"decay is {self.decay}, where more than 0 is expected")

    def round_trips(self, now: float) -> RoundTrips:
        """Begin to measure one endpoint, at ``now`` on the clock that is used from then on."""
        return RoundTrips(self, now)


class RoundTrips:
    """What was measured of one endpoint under `PeakEwma`.

    Attributes:
        pending: how many calls are under way.

    >>> trips = PeakEwma(default_rtt=0.02).round_trips(now=0)
    >>> trips.begin()
    >>> trips.end(rtt=0.5, now=0.5)
    >>> trips.load(now=0.5)
    0.5
    """

    __slots__ = ("_decay", "_estimate", "_updated", "pending")

    def __init__(self, settings: PeakEwma, now: float) -> None:
        self.pending = 0
        self._decay = settings.decay
        self._estimate = float(settings.default_rtt)
        self._updated = now

    def begin(self) -> None:
        """A call begins."""
        self.pending += 1

    def end(self, rtt: float, now: float, *, answered: bool = True) -> None:
        """A call is over.

        Args:
            rtt: the seconds that it took.
            now: the time now.
            answered: False for a call that was cancelled, or turned away before it was sent. How long a round trip
                takes it does not say, only that this one would have taken ``rtt`` or longer; so it can raise the
                estimate and not lower it. Else the endpoint that refuses everything at once would look the fastest.
        """
        self.pending -= 1
        if not answered:
            if rtt <= self._estimate * self._weight(now):
                return
            self._estimate = rtt
        elif rtt > self._estimate:
            self._estimate = rtt
        else:
            # The same as estimate * weight + rtt * (1 - weight), and exact where both are equal.
            self._estimate = rtt + (self._estimate - rtt) * self._weight(now)
        self._updated = max(self._updated, now)  # a clock that goes backwards makes nothing younger

    def load(self, now: float) -> float:
        """The load: the estimate as it has sunk by ``now``, times one more than the calls under way."""
        return self._estimate * self._weight(now) * (self.pending + 1)

    def _weight(self, now: float) -> float:
        elapsed = now - self._updated
        return math.exp(-elapsed / self._decay) if elapsed > 0 else 1.0


def two_of(count: int, random: Random) -> tuple[int, int]:
    """Two different numbers below ``count``, every ordered pair as likely as any other.

    By Floyd's way of drawing without repetition: two draws, whatever comes.

    Args:
        count: 2 or more.
        random: where the numbers come from.

    >>> from random import Random
    >>> sorted(two_of(2, Random()))
    [0, 1]
    """
    first = int(random.random() * (count - 1))
    second = int(random.random() * count)
    return (count - 1 if first == second else first), second
