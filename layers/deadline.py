"""Tell the next hop how much time is left, and keep to what is told: `Deadline`, a transparent layer for calls.

Who waits for an answer stops waiting at some moment. What is done for it after that is done for nobody, at every hop
behind the first; and a service that is slow because it has too much to do has even more to do by it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import anyio
import anyio.lowlevel

from towline.errors import DeadlineExceeded
from towline.service import Service, Wrapper
from towline.text import differing
from towline.units import Seconds

__all__ = ["Deadline"]

Q = TypeVar("Q")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Deadline:
    """Layer: bound a call by what its caller has left, and say so to the next hop.

    What is left is the least of three: ``seconds``; what the request says (``of``); and what the caller's own cancel
    scopes leave. If nothing is, the service inside is not called: `DeadlineExceeded` with ``sent`` False, or, where the
    caller's own scope has ended, the cancellation that is due. Else ``attach`` makes the request that says what is
    left, and the call is held to it. When ``seconds`` or the request's bound passes, the call is cancelled, and after
    it has cleaned up `DeadlineExceeded` with ``sent`` True is raised. When the caller's scope ends, that is a
    cancellation, also when both fall together. A response that is there in time wins.

    For both ends of a call: the calling side attaches, the serving side reads. A handler that makes calls itself needs
    only ``attach`` around those, since what was read for it is a cancel scope by then. What is told are seconds, never
    a time of day, since the clocks of two machines disagree; the time that a request takes to get there is therefore
    not counted. On the calling side it belongs outside of Retry, for one deadline over all attempts (Timeout inside
    Retry bounds each), and once more inside of it to tell each attempt what is left then. No retry is begun that the
    deadline leaves no time for.

    What time is left is measured on the event loop's clock, as its cancel scopes are. Where neither ``seconds`` nor the
    request sets a bound, no scope is opened.

    Attributes:
        seconds: the most that any call is given; None for no bound of this layer's own.
        attach: makes the request that carries a number of seconds, which is above 0 and finite. It is not called where
            there is no deadline at all. None to tell nobody.
        of: reads from a request how many seconds it says are left; None if it says nothing. That number comes from the
            other end, so ``seconds`` beside it is a limit to it. One that is not a number counts as none left.

    Raises:
        ValueError: if ``seconds`` is not above 0.

    >>> from dataclasses import replace
    >>> @dataclass(frozen=True)
    ... class Get:
    ...     key: str
    ...     seconds_left: float | None = None
    >>> async def database(request: Get, /) -> str:
    ...     assert request.seconds_left is not None
    ...     return f"{request.key} is wanted within {request.seconds_left:.0f} s"
    >>> calling = Deadline(60, attach=lambda get, left: replace(get, seconds_left=left))
    >>> serving = Deadline(3600, of=lambda get: get.seconds_left)
    >>> anyio.run(calling(serving(database)), Get("a"))
    'a is wanted within 60 s'
    >>> anyio.run(serving(database), Get("b", seconds_left=-1.5))
    Traceback (most recent call last):
    ...
    towline.errors.DeadlineExceeded: not begun: the deadline had passed, with -1.5 s left
    """

    client_only: ClassVar[bool] = False

    seconds: Seconds | None = None
    attach: Callable[[Any, float], Any] | None = field(default=None, kw_only=True)  # Any: the user knows the type
    of: Callable[[Any], float | None] | None = field(default=None, kw_only=True)

    __repr__ = differing

    def __post_init__(self) -> None:
        if self.seconds is not None and not self.seconds > 0:  # NaN is not
            raise ValueError(f"seconds is {self.seconds}, where a number above 0 is expected")

    def __call__(self, inner: Service[Q, R], /) -> Wrapper[Q, R]:
        return _Held(inner, self)


class _Held(Wrapper[Q, R]):
    """A service that is held to its caller's deadline."""

    __slots__ = ("_attach", "_of", "_seconds")

    def __init__(self, inner: Service[Q, R], layer: Deadline) -> None:
        super().__init__(inner)
        self._seconds = math.inf if layer.seconds is None else layer.seconds
        self._attach = layer.attach
        self._of = layer.of

    async def __call__(self, request: Q, /) -> R:
        bound = self._seconds
        if self._of is not None:
            told = self._of(request)
            if told is not None:
                bound = told if not told >= bound else bound  # NaN stays
        if not bound > 0:
            raise DeadlineExceeded(bound, f"not begun: the deadline had passed, with {bound:g} s left", sent=False)
        if bound == math.inf and self._attach is None:
            response: R = await self.inner(request)
            return response
        began = anyio.current_time()
        callers = anyio.current_effective_deadline() - began
        if callers <= 0:
            await _cancellation()
            raise DeadlineExceeded(callers, f"not begun: the deadline had passed, with {callers:g} s left", sent=False)
        left = min(bound, callers)
        sent: Q = request if self._attach is None or left == math.inf else self._attach(request, left)
        if callers <= bound:
            response = await self.inner(sent)  # the caller's own scope holds it
            return response
        with anyio.CancelScope(deadline=began + bound):
            response = await self.inner(sent)
            return response
        raise DeadlineExceeded(bound)


async def _cancellation() -> None:
    """Let the cancellation come that is due, since the caller's scope has ended.

    On asyncio a scope's timer is served after the tasks that are ready, so one checkpoint is too early for it.
    """
    for _ in range(2):
        await anyio.lowlevel.checkpoint()
