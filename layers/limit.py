"""Bound how many calls are under way, and how often one begins: `ConcurrencyLimit` and `RateLimit`.

Who comes too early waits in a queue, first come, first served; or is turned away at once, if that is asked for. A
caller that is cancelled while it waits leaves the queue, and nobody waits longer for it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import InitVar, dataclass, field
from typing import ClassVar, Literal, TypeVar

import anyio

from towline.clock import Clock, now
from towline.errors import MisuseError, Overloaded, RateLimited
from towline.hooks import CallShed, Hooks, tell
from towline.policies.rate import Gcra, Rate
from towline.service import Service, Wrapper, ready_now, refuses_now
from towline.text import differing

__all__ = ["ConcurrencyLimit", "Limiter", "RateLimit"]

Q = TypeVar("Q")
R = TypeVar("R")


def _check_on_full(on_full: str) -> None:
    if on_full not in ("wait", "shed"):
        raise ValueError(f"on_full is {on_full!r}, where 'wait' or 'shed' is expected")


# --- how many at a time ----------------------------------------------------------------------------------------------


class Limiter:
    """So many slots, for whoever shares it: give one to several layers, or use it beside them.

    Unlike anyio's limiters it belongs to no event loop, so it may live in a module, and a task may hold several slots.
    A slot that is given back goes straight to the one who has waited longest: nobody can slip in between.

    Args:
        limit: how many slots there are. With 0 nobody ever gets one.

    Raises:
        ValueError: if ``limit`` is below 0.
        TypeError: if it is no whole number.

    >>> limiter = Limiter(1)
    >>> limiter.acquire_nowait(), limiter.acquire_nowait()
    (True, False)
    >>> limiter.release()
    >>> limiter
    <Limiter: 0 of 1 taken, 0 waiting>
    """

    __slots__ = ("_free", "_waiting", "limit")

    def __init__(self, limit: int) -> None:
        if not isinstance(limit, int):  # pyright: ignore[reportUnnecessaryIsInstance] -- 2.5 or math.inf, say
            raise TypeError(f"limit is {limit!r}, where a whole number is expected")
        if limit < 0:
            raise ValueError(f"limit is {limit}, where 0 or more is expected")
        self.limit = limit
        self._free = limit
        # Ordered, so that whoever gives up is out of it at once, wherever it stood. Events, since each belongs to the
        # loop of its own task. While anyone waits, no slot is free.
        self._waiting: OrderedDict[anyio.Event, None] = OrderedDict()

    @property
    def free(self) -> int:
        """How many slots could be taken now."""
        return self._free

    @property
    def waiting(self) -> int:
        """How many wait for a slot."""
        return len(self._waiting)

    def acquire_nowait(self) -> bool:
        """Take a slot if one is free, and say whether it was."""
        if self._free:
            self._free -= 1
            return True
        return False

    async def acquire(self) -> None:
        """Take a slot, and wait for it if none is free. Cancelled, it has taken none."""
        if self._free:
            self._free -= 1
            return
        event = anyio.Event()
        self._waiting[event] = None
        try:
            await event.wait()
        except BaseException:
            if event.is_set():  # given a slot in the same moment
                self.release()
            else:
                del self._waiting[event]
            raise

    def release(self) -> None:
        """Give a slot back. Any task may do so.

        Raises:
            MisuseError: if none is taken.
        """
        if self._waiting:
            self._waiting.popitem(last=False)[0].set()
        elif self._free < self.limit:
            self._free += 1
        else:
            raise MisuseError(f"release() without acquire(): none of the {self.limit} slots is taken")

    def __repr__(self) -> str:
        return f"<Limiter: {self.limit - self._free} of {self.limit} taken, {len(self._waiting)} waiting>"


@dataclass(frozen=True, slots=True)
class ConcurrencyLimit:
    """Layer: at most so many calls inside at a time; the others wait, first come, first served.

    Needs nothing from the layer inside it and promises what that one does. A call holds its slot until it is over,
    however it ends. So its place beside Retry is a choice: outside, a call is counted once and holds its slot through
    the waits between attempts; inside, it gives it back for the waits, and stands in line again for every attempt.
    Around connecting it bounds how many connects are tried at a time, not how many connections there are.

    Attributes:
        limit: how many; 0 lets nothing through. Each service that this wraps has as many slots, unless they share a
            `Limiter` that is given here.
        on_full: what becomes of a call that finds no free slot: ``"wait"``, or ``"shed"`` to raise `Overloaded` at
            once.
        hooks: told of every call that is turned away.

    Raises:
        ValueError: if ``limit`` is below 0, or ``on_full`` is neither of the two.
        TypeError: if ``limit`` is neither a whole number nor a Limiter.

    >>> async def hello(name: str, /) -> str:
    ...     return f"hello, {name}"
    >>> anyio.run(ConcurrencyLimit(10)(hello), "you")
    'hello, you'
    >>> shared = Limiter(10)  # for both services together
    >>> layer = ConcurrencyLimit(shared)
    >>> one, other = layer(hello), layer(hello)
    """

    client_only: ClassVar[bool] = False

    limit: int | Limiter
    on_full: Literal["wait", "shed"] = field(default="wait", kw_only=True)
    hooks: Hooks | None = field(default=None, kw_only=True)

    __repr__ = differing

    def __post_init__(self) -> None:
        if not isinstance(self.limit, Limiter):
            Limiter(self.limit)  # refuses what makes no sense
        _check_on_full(self.on_full)

    def __call__(self, inner: Service[Q, R], /) -> Wrapper[Q, R]:
        return _Limited(inner, self)


class _Limited(Wrapper[Q, R]):
    """A service with so many slots."""

    __slots__ = ("_hooks", "_limiter", "_sheds")

    def __init__(self, inner: Service[Q, R], layer: ConcurrencyLimit) -> None:
        super().__init__(inner)
        self._limiter = layer.limit if isinstance(layer.limit, Limiter) else Limiter(layer.limit)
        self._sheds = layer.on_full == "shed"
        self._hooks = layer.hooks

    async def __call__(self, request: Q, /) -> R:
        limiter = self._limiter
        if not limiter.acquire_nowait():
            if self._sheds:
                raise self._refused()
            await limiter.acquire()
        try:
            response: R = await self.inner(request)
            return response
        finally:
            limiter.release()

    def _refused(self) -> Overloaded:
        error = Overloaded(f"all of the {self._limiter.limit} calls that may be under way at a time are")
        if self._hooks is not None:
            tell(self._hooks.on_shed, CallShed("ConcurrencyLimit", error))
        return error

    def ready_now(self) -> bool:
        return self._limiter.free > 0 and ready_now(self.inner)

    def refuses_now(self) -> bool:
        return (self._sheds and not self._limiter.free) or refuses_now(self.inner)


# --- how often -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RateLimit:
    """Layer: calls begin no more often than a rate allows; the others wait, first come, first served.

    Needs nothing from the layer inside it and promises what that one does. Each service that it wraps is counted by
    itself. Inside Retry every attempt counts, outside it every call; inside a Timeout the wait counts as a part of the
    call.

    ``RateLimit(100, per=1)`` stands for ``RateLimit(Gcra(100, per=1))``: a hundred calls a second, of which a hundred
    may begin at once after a pause. See `Gcra` for smaller bursts, and `FixedWindow` for the other way to count.

    Attributes:
        rate: how often; a number means that many in ``per`` seconds.
        per: seconds, for a rate that is given as a number.
        on_full: what becomes of a call that comes too early: ``"wait"``, or ``"shed"`` to raise `RateLimited` at once,
            which says in how many seconds there is room again.
        clock: gives the time in seconds.
        sleep: waits for a number of seconds. It must move the clock: both belong together.
        hooks: told of every call that is turned away.

    Raises:
        ValueError: if ``rate`` is below 1, ``per`` is no number above 0, or ``on_full`` is neither of the two.
        TypeError: if ``rate`` is a number and ``per`` is missing, or ``rate`` is no number and ``per`` is given.

    >>> async def hello(name: str, /) -> str:
    ...     return f"hello, {name}"
    >>> async def main() -> None:
    ...     call = RateLimit(1, per=60, on_full="shed")(hello)
    ...     print(await call("you"))
    ...     try:
    ...         await call("again")
    ...     except RateLimited as error:
    ...         assert 59 < error.retry_after <= 60
    >>> anyio.run(main)
    hello, you
    """

    client_only: ClassVar[bool] = False

    rate: Rate | int
    per: InitVar[float | None] = None
    on_full: Literal["wait", "shed"] = field(default="wait", kw_only=True)
    clock: Clock = field(default=now, kw_only=True, repr=False)
    sleep: Callable[[float], Awaitable[object]] = field(default=anyio.sleep, kw_only=True, repr=False)
    hooks: Hooks | None = field(default=None, kw_only=True)

    __repr__ = differing

    def __post_init__(self, per: float | None) -> None:
        if isinstance(self.rate, Rate):
            if per is not None:
                raise TypeError(f"per is {per}, but {self.rate!r} has its own")
        elif per is None:
            raise TypeError(f"RateLimit({self.rate!r}) does not say for how many seconds: per is missing")
        else:
            object.__setattr__(self, "rate", Gcra(self.rate, per))
        _check_on_full(self.on_full)

    def __call__(self, inner: Service[Q, R], /) -> Wrapper[Q, R]:
        return _Paced(inner, self)


class _Paced(Wrapper[Q, R]):
    """A service whose calls begin at a certain rate."""

    __slots__ = ("_clock", "_first", "_hooks", "_meter", "_rate", "_sheds", "_sleep")

    def __init__(self, inner: Service[Q, R], layer: RateLimit) -> None:
        super().__init__(inner)
        assert isinstance(layer.rate, Rate)  # it was replaced
        self._rate = layer.rate
        self._meter = layer.rate.meter()
        self._clock = layer.clock
        self._sleep = layer.sleep
        self._sheds = layer.on_full == "shed"
        self._hooks = layer.hooks
        self._first = Limiter(1)  # taken by the first in the queue, who alone looks at the clock

    async def __call__(self, request: Q, /) -> R:
        if not self._first.free:
            await self._in_turn()
        elif wait := self._meter.take(self._clock()):
            if self._sheds:
                raise self._refused(wait)
            await self._in_turn()
        response: R = await self.inner(request)
        return response

    async def _in_turn(self) -> None:
        await self._first.acquire()
        try:
            while wait := self._meter.take(self._clock()):
                await self._sleep(wait)
        finally:
            self._first.release()

    def _refused(self, wait: float) -> RateLimited:
        error = RateLimited(f"no call may begin for {wait:.3g} s, by {self._rate!r}", wait)
        if self._hooks is not None:
            tell(self._hooks.on_shed, CallShed("RateLimit", error))
        return error

    def ready_now(self) -> bool:
        return self._may_begin() and ready_now(self.inner)

    def refuses_now(self) -> bool:
        return (self._sheds and not self._may_begin()) or refuses_now(self.inner)

    def _may_begin(self) -> bool:
        return self._first.free > 0 and not self._meter.wait(self._clock())
