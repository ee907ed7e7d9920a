"""How many extra calls a target may be asked for: a `Budget` is shared by all requests to it and all who repeat them.

A limit of attempts bounds one request; it does not stop a thousand requests that fail at once from becoming three
thousand, which is how a target that stumbles is kept down (a retry storm). A budget ties extra calls to what succeeds:
share one between Retry and Hedge, one for each target.

It never waits. Who wants to make an extra call asks `Budget.withdraw` *when it decides*, before any delay: permission
asked for after the delay comes too late, when all who wait have decided already.

Three kinds, by what bounds the extra calls: `TpsBudget`, a share of what was achieved in the last seconds;
`TokenRatioBudget`, how many of the last requests failed; `ConcurrencyBudget`, a share of what is under way. They count
in whole numbers, so that no share is lost to rounding, and what was paid in is paid out to the last call. The settings
of a budget are fixed, and by them two are equal; what it holds is its own.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass, field
from typing import ClassVar, Final

from towline.clock import Clock, now
from towline.errors import MisuseError
from towline.units import Seconds

__all__ = ["Budget", "ConcurrencyBudget", "Empty", "TokenRatioBudget", "TpsBudget", "Unlimited"]


class Budget(ABC):
    """A shared allowance of extra calls. Only `withdraw` and `balance` must be written; the rest does nothing.

    Attributes:
        counts_calls: this budget wants to know what is under way. Only then are `enter`, `leave` and `release` called;
            they would cost every call something, and most budgets do not ask.

    >>> class Coins(Budget):
    ...     def __init__(self, coins: int) -> None:
    ...         self.coins = coins
    ...     def withdraw(self) -> bool:
    ...         self.coins -= 1
    ...         return self.coins >= 0
    ...     @property
    ...     def balance(self) -> float:
    ...         return max(self.coins, 0)
    >>> purse = Coins(1)
    >>> purse.withdraw(), purse.withdraw()
    (True, False)
    """

    __slots__ = ()

    counts_calls: ClassVar[bool] = False

    @abstractmethod
    def withdraw(self) -> bool:
        """Whether one extra call may be made; if so, it is paid for."""

    def deposit(self) -> None:  # noqa: B027 -- to be written by those who care, as the three below
        """Something was achieved that pays for extra calls: a call has succeeded (or has begun; its user says)."""

    def release(self) -> None:  # noqa: B027
        """An extra call that was paid for is over."""

    def enter(self) -> None:  # noqa: B027
        """A request begins, of one call or of several."""

    def leave(self) -> None:  # noqa: B027
        """A request is over, however it ended."""

    @property
    @abstractmethod
    def balance(self) -> float:
        """How often in a row `withdraw` would now say yes: a whole number, or ``math.inf``."""


# --- by what was achieved in the last seconds ------------------------------------------------------------------------


SCALE: Final = 1_000_000
"""What one extra call costs. A share of a call is a whole number of these, however small the ratio."""

WINDOWS: Final = 10
"""How many windows a ttl is cut into: what was paid in counts for nine tenths of the ttl at least, and all of it at
most."""


class _Windows:
    """What was paid in, less what was paid out, in each of the last ten windows of time."""

    __slots__ = ("begins", "ends", "fresh", "length", "older")

    def __init__(self, length: float) -> None:
        self.length = length
        self.begins = self.ends = -math.inf  # so the first window begins with the first use
        self.fresh = 0
        self.older = deque([0] * (WINDOWS - 1), maxlen=WINDOWS - 1)

    def turn(self, now: float) -> None:
        """Make the window of ``now`` the fresh one, and forget what is too old. For when `now` is not within it."""
        passed = (now - self.begins) / self.length
        if passed < 0:
            # The clock went back, as that of another event loop may: nobody can say how much time has passed. To take
            # it for none forgets too late rather than too early; to wait until it is there again may be for days.
            self.begins = now
        elif not passed < WINDOWS:  # nor is NaN
            self.fresh = 0
            self.older.extend([0] * (WINDOWS - 1))
            self.begins = now
        else:
            for _ in range(int(passed)):
                self.older.append(self.fresh)
                self.fresh = 0
            self.begins += int(passed) * self.length
        self.ends = self.begins + self.length


@dataclass(frozen=True, slots=True, kw_only=True)
class TpsBudget(Budget):
    """So many retries a second, and a share of what was deposited in the last ``ttl`` seconds.

    For most uses the right one, and the default of `StandardPolicy`. With the defaults, which are those of Finagle and
    Tower, 100 retries may be made at once, and one more for every five calls that succeed: a short failure is mended
    even by a client that has just started, and a long one makes the load grow by no more than a fifth.

    Time is cut into ten windows of ``ttl / 10``; deposits and withdrawals count in the window in which they were made,
    and are forgotten with it. (Tower cuts it likewise. It loses a share to rounding, though, which makes 70 % into
    100 %, and may forget a window too early.)

    Attributes:
        ttl: for how many seconds a deposit counts, 1 to 60.
        min_per_sec: retries a second that are allowed whatever was deposited, so that a client with few calls may retry
            at all. They are counted over the whole ``ttl``, so ``min_per_sec * ttl`` may be made at once.
        ratio: how many retries one deposit pays for, 0 to 1000.
        clock: gives monotonic seconds. If it goes back, no time has passed.

    Raises:
        ValueError: if a setting is not a number in its range.

    >>> from towline.testing import MockClock
    >>> budget = TpsBudget(ttl=1, min_per_sec=0, ratio=0.5, clock=MockClock())
    >>> budget.withdraw()
    False
    >>> budget.deposit(), budget.deposit()
    (None, None)
    >>> budget.withdraw(), budget.withdraw()
    (True, False)
    """

    ttl: Seconds = 10.0
    min_per_sec: float = 10.0
    ratio: float = 0.2
    clock: Clock = field(default=now, repr=False)

    _paid: int = field(init=False, repr=False, compare=False)
    _reserve: int = field(init=False, repr=False, compare=False)
    _windows: _Windows = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 1 <= self.ttl <= 60:  # NaN is not
            raise ValueError(f"ttl is {self.ttl}, where 1 to 60 is expected")
        if not 0 <= self.min_per_sec < math.inf:
            raise ValueError(f"min_per_sec is {self.min_per_sec}, where 0 or more is expected")
        if not 0 <= self.ratio <= 1000:
            raise ValueError(f"ratio is {self.ratio}, where 0 to 1000 is expected")
        object.__setattr__(self, "_paid", round(self.ratio * SCALE))
        object.__setattr__(self, "_reserve", round(self.min_per_sec * self.ttl * SCALE))
        object.__setattr__(self, "_windows", _Windows(self.ttl / WINDOWS))

    def deposit(self) -> None:
        """A call has succeeded (or has begun): it pays for ``ratio`` retries."""
        # On the path of every call. It takes as long as to read the clock, and little more.
        windows = self._windows
        now = self.clock()
        if not windows.begins <= now < windows.ends:
            windows.turn(now)
        windows.fresh += self._paid

    def withdraw(self) -> bool:
        """Whether one retry may be made; if so, it is paid for."""
        if self._held() < SCALE:
            return False
        self._windows.fresh -= SCALE
        return True

    @property
    def balance(self) -> float:
        """How many retries could be made now."""
        # May be owed: what was paid in is forgotten before what it has paid for.
        return max(self._held() // SCALE, 0)

    def _held(self) -> int:
        windows = self._windows
        now = self.clock()
        if not windows.begins <= now < windows.ends:
            windows.turn(now)
        return self._reserve + windows.fresh + sum(windows.older)


# --- by how many of the last requests failed -------------------------------------------------------------------------


THOUSAND: Final = 1000
"""gRPC counts tokens to three decimal places, so thousandths are whole numbers."""


class _Tokens:
    """How many thousandths of a token there are."""

    __slots__ = ("left",)

    def __init__(self, left: int) -> None:
        self.left = left


@dataclass(frozen=True, slots=True)
class TokenRatioBudget(Budget):
    """Retries while more than half of the tokens are there: every failure takes one, every success brings back a share.

    This is gRPC's throttling of retries (proposal A6, ``retryThrottling``). It knows no time: what was lost comes back
    by calls that succeed and by nothing else, so it suits a target that is called steadily. In the long run retries
    stop where more than ``ratio`` failures come to one success.

    `withdraw` counts as the failure that it is asked for, so it takes a token even if it says no.

    Attributes:
        max_tokens: how many tokens there can be, and are at first: 1 to 1000, and whole.
        ratio: the share of a token that a success brings back. Decimal places beyond the third are ignored.

    Raises:
        ValueError: if ``max_tokens`` is out of its range, or ``ratio`` is not above 0 in its first three decimals.
        TypeError: if ``max_tokens`` is no whole number.

    >>> budget = TokenRatioBudget(max_tokens=4, ratio=0.5)
    >>> budget.withdraw(), budget.withdraw()
    (True, False)
    >>> budget.deposit(), budget.deposit(), budget.deposit()
    (None, None, None)
    >>> budget.withdraw()
    True
    """

    max_tokens: int = 10
    ratio: float = 0.1

    _full: int = field(init=False, repr=False, compare=False)
    _paid: int = field(init=False, repr=False, compare=False)
    _tokens: _Tokens = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_whole("max_tokens", self.max_tokens)
        if not 1 <= self.max_tokens <= 1000:
            raise ValueError(f"max_tokens is {self.max_tokens}, where 1 to 1000 is expected")
        if not 0.001 <= self.ratio < math.inf:  # NaN is not
            raise ValueError(f"ratio is {self.ratio}, where 0.001 or more is expected")
        object.__setattr__(self, "_full", self.max_tokens * THOUSAND)
        # The inner rounding is for what is no more than the dust of floats: 1.001 * 1000 is 1000.9999999999999
        object.__setattr__(self, "_paid", math.floor(round(self.ratio * THOUSAND, 6)))
        object.__setattr__(self, "_tokens", _Tokens(self._full))

    def deposit(self) -> None:
        """A call has succeeded (or has begun): a share of a token comes back."""
        tokens = self._tokens
        if tokens.left < self._full:
            tokens.left = min(tokens.left + self._paid, self._full)

    def withdraw(self) -> bool:
        """A call has failed, which takes a token: whether it may be made again."""
        tokens = self._tokens
        tokens.left = max(tokens.left - THOUSAND, 0)
        return 2 * tokens.left > self._full

    @property
    def balance(self) -> float:
        """How many failures in a row may be retried now."""
        return max((self._tokens.left - self._full // 2 - 1) // THOUSAND, 0)


# --- by what is under way --------------------------------------------------------------------------------------------


class _UnderWay:
    """How many requests, and how many extra calls for them, have begun and are not over."""

    __slots__ = ("extra", "requests")

    def __init__(self) -> None:
        self.requests = 0
        self.extra = 0


@dataclass(frozen=True, slots=True)
class ConcurrencyBudget(Budget):
    """At any time so many extra calls for so many requests under way, and a few for certain.

    It bounds what a target has to bear at once, and not how often it is asked: right for a target whose calls take
    long, and for `Hedge`, where an extra call runs beside the first one. An extra call counts from the decision to its
    end, so the wait before a retry counts, too. The numbers are failsafe-go's.

    Attributes:
        ratio: how many extra calls there may be for each request that is under way.
        at_least: how many there may be for certain, so that a client with few calls can have any.

    Raises:
        ValueError: if ``ratio`` is not a number of 0 or more, or ``at_least`` is below 0.
        TypeError: if ``at_least`` is no whole number.

    >>> budget = ConcurrencyBudget(0.5, at_least=0)
    >>> budget.enter(), budget.enter()
    (None, None)
    >>> budget.withdraw(), budget.withdraw()
    (True, False)
    >>> budget.release()
    >>> budget.withdraw()
    True
    """

    counts_calls: ClassVar[bool] = True

    ratio: float = 0.2
    at_least: int = 3

    _share: int = field(init=False, repr=False, compare=False)
    _under_way: _UnderWay = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < math.inf:  # NaN is not
            raise ValueError(f"ratio is {self.ratio}, where 0 or more is expected")
        _check_whole("at_least", self.at_least)
        if self.at_least < 0:
            raise ValueError(f"at_least is {self.at_least}, where 0 or more is expected")
        object.__setattr__(self, "_share", round(self.ratio * SCALE))
        object.__setattr__(self, "_under_way", _UnderWay())

    def enter(self) -> None:
        """A request begins."""
        self._under_way.requests += 1

    def leave(self) -> None:
        """A request is over.

        Raises:
            MisuseError: if none is under way.
        """
        if not self._under_way.requests:
            raise MisuseError("leave() without enter(): no request is under way")
        self._under_way.requests -= 1

    def withdraw(self) -> bool:
        """Whether one extra call may begin; if so, it counts until `release`."""
        if not self.balance:
            return False
        self._under_way.extra += 1
        return True

    def release(self) -> None:
        """An extra call is over.

        Raises:
            MisuseError: if none is under way.
        """
        if not self._under_way.extra:
            raise MisuseError("release() without withdraw(): no extra call is under way")
        self._under_way.extra -= 1

    @property
    def balance(self) -> float:
        """How many extra calls could begin now."""
        allowed = max(self._share * self._under_way.requests // SCALE, self.at_least)
        return max(allowed - self._under_way.extra, 0)


# --- the two ends ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Unlimited(Budget):
    """Never says no. For where a budget is called for and another limit holds, or for a test."""

    def withdraw(self) -> bool:
        """Yes."""
        return True

    @property
    def balance(self) -> float:
        """``math.inf``."""
        return math.inf


@dataclass(frozen=True, slots=True)
class Empty(Budget):
    """Never says yes: turns every extra call off, wherever this budget is shared.

    >>> Empty().withdraw()
    False
    """

    def withdraw(self) -> bool:
        """No."""
        return False

    @property
    def balance(self) -> float:
        """0."""
        return 0


def _check_whole(name: str, value: object) -> None:
    if not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}, where a whole number is expected")
