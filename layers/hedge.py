"""Make a second call beside one that is late, and take the first answer: `Hedge`, a transparent layer around calls.

Most of the slow answers of a target that is otherwise fast have nothing to do with the request: a pause, a queue, a
lost packet. The same request, made once more, is rarely slow twice (Dean and Barroso, "The Tail at Scale", 2013). What
a failure does to the calls beside it follows gRPC's proposal A6; the delay that is learnt is Tower's.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from contextvars import copy_context
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import anyio
import anyio.abc

from towline.clock import Clock, now
from towline.hooks import HedgeStarted, Hooks, tell
from towline.policies import NOT_CLONEABLE, Budget, Errors, NotCloneable, TpsBudget, matcher
from towline.policies.classify import says_retryable
from towline.policies.hedge import Percentile, RotatingHistogram
from towline.policies.standard import retry_after
from towline.service import Service, Wrapper
from towline.text import differing
from towline.timer import Timer, call_later
from towline.units import Seconds

__all__ = ["Hedge"]

Q = TypeVar("Q")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Hedge:
    """Layer: make another call beside one that is late or has failed; the first response wins.

    For requests that may be carried out twice, since they will be: say with ``when`` which ones those are, if not all.
    It makes the slowest few calls faster, and adds that few to the target's load. It stands inside Retry and outside of
    whatever bounds, limits or chooses for one call: CircuitBreaker, a Timeout of each attempt, Balance. For the
    dialling side only, and not around connecting: nobody would close a connection that came second.

    The next call begins ``delay`` seconds after the one before it, or at once when one fails with an error that ``on``
    names; up to ``max_attempts`` of them. An error that it does not name ends it: the caller gets that error. If all
    fail, the caller gets the last error; it is the error itself, never a group. An error that says when to come back
    (``retry_after``) starts no call, and no other is begun after it, since waiting is up to Retry.

    When it is over, calls that are still under way are cancelled, and have cleaned up before the caller goes on.
    Cancelling the caller cancels them all. What they answer or raise by then is dropped. Each call sees the context
    variables of the caller, and its deadline.

    The ``budget`` is asked when a call is about to begin. If it says no, the calls under way go on, and none is begun
    because of time any more. A success pays into it. Give the same one to Retry around this, so that repeating and
    hedging cannot add up; each of the two pays into it for itself.

    With a `Percentile` the delay is learnt from the requests that may be hedged and succeeded. A request counts with
    all the time since its oldest call that had not failed began, also when a later call was faster: else the slowest
    would be missing from what is learnt, and the delay would sink from window to window.

    Attributes:
        delay: seconds, or a `Percentile`; 0 for all calls at once, ``math.inf`` for the next one only after a failure.
            A `Percentile` that knows too few calls is like ``math.inf``.
        max_attempts: how many calls a request may become, the first included. The default is one hedge: where two
            calls are late, a third seldom helps.
        on: the errors after which the next call begins at once, as `Errors`; None for those that say they are
            retryable, and ``()`` for none, which leaves all failures to Retry and its waits.
        budget: what hedges are paid from. The default is a `TpsBudget` of this layer's own; give one budget to all
            who call the same target. None for no limit.
        when: says of a request whether it may be made twice; None for all. Others pass through as if this layer were
            not there: one call, and nothing is learnt from it.
        clone: makes the request that is sent from the one that is kept, once for each call, or answers
            `NOT_CLONEABLE`, as for ``when``. By default a request is taken for immutable, and sent itself.
        clock: gives the time in seconds. Read only for a `Percentile` and for hooks.
        hooks: told of every hedge, just before it begins.

    Raises:
        ValueError: if ``delay`` is negative or not a number, or ``max_attempts`` is below 1.
        TypeError: if ``on`` names no class of exceptions.

    >>> times = iter([1.0, 0.001])
    >>> async def sometimes_slow(request: str, /) -> str:
    ...     took = next(times)
    ...     await anyio.sleep(took)
    ...     return f"{request}, after {took} s"
    >>> anyio.run(Hedge(0.01)(sometimes_slow), "hello")
    'hello, after 0.001 s'
    """

    client_only: ClassVar[bool] = True

    delay: Seconds | Percentile
    max_attempts: int = field(default=2, kw_only=True)
    on: Errors | None = field(default=None, kw_only=True)
    budget: Budget | None = field(default_factory=TpsBudget, kw_only=True)
    when: Callable[[Any], bool] | None = field(default=None, kw_only=True)  # Any: the user knows the type
    clone: Callable[[Any], Any] | None = field(default=None, kw_only=True)
    clock: Clock = field(default=now, kw_only=True)
    hooks: Hooks | None = field(default=None, kw_only=True)

    _matches: Callable[[Exception], bool] = field(init=False, repr=False, compare=False)

    __repr__ = differing

    def __post_init__(self) -> None:
        if not isinstance(self.delay, Percentile) and not self.delay >= 0:  # NaN is not
            raise ValueError(f"delay is {self.delay}, where 0 or more is expected")
        if not self.max_attempts >= 1:  # NaN is not
            raise ValueError(f"max_attempts is {self.max_attempts}, where 1 or more is expected")
        object.__setattr__(self, "_matches", says_retryable if self.on is None else matcher(self.on))

    def __call__(self, inner: Service[Q, R], /) -> Wrapper[Q, R]:
        return _Hedging(inner, self)


class _Hedging(Wrapper[Q, R]):
    """A service that is called once more when it is late."""

    __slots__ = ("_budget", "_clock", "_counts_calls", "_delay", "_histogram", "_layer")

    def __init__(self, inner: Service[Q, R], layer: Hedge) -> None:
        super().__init__(inner)
        self._layer = layer
        self._budget = layer.budget
        self._counts_calls = self._budget is not None and self._budget.counts_calls
        self._delay = layer.delay if layer.max_attempts > 1 else math.inf
        self._histogram = RotatingHistogram(self._delay.window) if isinstance(self._delay, Percentile) else None
        self._clock = None if self._histogram is None and layer.hooks is None else layer.clock

    async def __call__(self, request: Q, /) -> R:
        layer = self._layer
        if layer.when is not None and not layer.when(request):
            response: R = await self.inner(request)
            return response
        sent: Q | NotCloneable = request if layer.clone is None else layer.clone(request)
        if isinstance(sent, NotCloneable):
            response = await self.inner(request)
            return response
        if not self._counts_calls:
            return await self._hedge(request, sent)
        assert self._budget is not None
        self._budget.enter()
        try:
            return await self._hedge(request, sent)
        finally:
            self._budget.leave()

    async def _hedge(self, request: Q, sent: Q) -> R:
        delay = self._delay
        began = 0.0 if self._clock is None else self._clock()
        if isinstance(delay, Percentile):
            assert self._histogram is not None
            delay = delay.delay(self._histogram, began)
        if delay < math.inf:
            return await _Race(self, request, delay, began).run(sent)
        return await self._in_turn(request, sent, began)

    async def _in_turn(self, request: Q, sent: Q, began: float) -> R:
        """Make a call only after one that has failed: no two at once, so it takes no task."""
        attempt, first = 1, began
        while True:
            try:
                try:
                    response: R = await self.inner(sent)
                finally:
                    self._is_over(attempt)
            except Exception as error:
                if not self._layer._matches(error) or _asks_for_time(error) or _is_cancelled():
                    raise
                attempt += 1
                another = self._another(request, attempt, first, error)
                if isinstance(another, NotCloneable):
                    raise
                sent = another
                began = 0.0 if self._clock is None else self._clock()
            else:
                self._succeeded(began)
                return response

    def _another(self, request: Q, attempt: int, first: float, error: Exception | None) -> Q | NotCloneable:
        """The request to make another call with, which is paid for then; `NOT_CLONEABLE` if there may be none."""
        layer = self._layer
        if attempt > layer.max_attempts:
            return NOT_CLONEABLE
        sent: Q | NotCloneable = request if layer.clone is None else layer.clone(request)
        if isinstance(sent, NotCloneable) or (self._budget is not None and not self._budget.withdraw()):
            return NOT_CLONEABLE
        if layer.hooks is not None:
            tell(layer.hooks.on_hedge, HedgeStarted(attempt, layer.clock() - first, error))
        return sent

    def _is_over(self, attempt: int) -> None:
        """A call is over, however it ended."""
        if self._counts_calls and attempt > 1:
            assert self._budget is not None
            self._budget.release()

    def _succeeded(self, began: float) -> None:
        """A request has its response; ``began`` is when its oldest call began that has not failed."""
        if self._budget is not None:
            self._budget.deposit()
        if self._histogram is not None:
            now = self._layer.clock()
            self._histogram.record(now - began, now)


class _Race(Generic[Q, R]):
    """The calls of one request, of which several may be under way.

    The first runs in the caller's own task, and only those after it in tasks of their own. A timer waits for the
    delay, since a task that is started and cancelled for each request would cost several times as much as all the
    rest. The race ends with `_end`, once; whatever a call answers or raises after that is dropped.
    """

    __slots__ = (
        "_attempt",
        "_context",
        "_delay",
        "_error",
        "_first",
        "_group",
        "_has_ended",
        "_may_start",
        "_request",
        "_response",
        "_running",
        "_service",
        "_timer",
    )

    _group: anyio.abc.TaskGroup

    def __init__(self, service: _Hedging[Q, R], request: Q, delay: float, began: float) -> None:
        self._service = service
        self._request = request
        self._delay = delay
        self._first = began
        self._context = copy_context()
        self._timer: Timer | None = None
        self._attempt = 1  # the latest call
        self._running = {1: began}  # the calls under way, oldest first, and when each began
        self._may_start = True
        self._has_ended = False
        self._response: Any = None  # an R once the race is won
        self._error: Exception | None = None

    async def run(self, sent: Q) -> R:
        raised: BaseException | None = None
        try:
            async with anyio.create_task_group() as self._group:
                if self._delay > 0:
                    self._set_timer()
                else:
                    while self._start(None):
                        pass
                await self._call(1, sent)
        except BaseExceptionGroup as group:
            raised = _first(group)  # an error of `clone` or the like; or what is no Exception and ends everything
        finally:
            self._cancel_timer()
        if raised is None:
            raised, self._error = self._error, None
        if raised is not None:
            try:
                raise raised
            finally:
                del raised  # or the error would hold this frame, and this frame the error
        if not self._has_ended:
            # A call has cancelled itself, as awaiting a cancelled future of asyncio's does, and the task group took it
            # for its own doing.
            raise asyncio.CancelledError
        response: R = self._response
        return response

    async def _call(self, attempt: int, sent: Q) -> None:
        began = 0.0
        try:
            try:
                if attempt > 1 and _is_cancelled():
                    return  # it was, or the race has ended, before this task began
                response: R = await self._service.inner(sent)
            finally:
                began = self._running.pop(attempt)
                self._service._is_over(attempt)
        except Exception as error:
            if not self._has_ended:
                self._failed(error)
        else:
            if not self._has_ended:
                self._response = response
                self._service._succeeded(min((began, *self._running.values())))
                self._end(None)

    def _failed(self, error: Exception) -> None:
        if not self._service._layer._matches(error) or _is_cancelled():
            self._end(error)
            return
        if _asks_for_time(error):
            self._may_start = False
        if self._start(error):
            self._set_timer()
        elif not self._running:
            self._end(error)

    def _start(self, error: Exception | None) -> bool:
        """Start the next call, if there may be one."""
        sent = self._next(error)
        if isinstance(sent, NotCloneable):
            return False
        # In the caller's context, which is not the current one in a task of ours; and a copy, since an eager task would
        # run here and now, and may come back here.
        self._context.copy().run(self._group.start_soon, self._call, self._attempt, sent)
        return True

    def _next(self, error: Exception | None) -> Q | NotCloneable:
        """What the next call sends, which is under way from here on; `NOT_CLONEABLE` if there may be none."""
        if not self._may_start:
            return NOT_CLONEABLE
        service, attempt = self._service, self._attempt + 1
        sent = service._another(self._request, attempt, self._first, error)
        if not isinstance(sent, NotCloneable):
            self._attempt = attempt
            self._running[attempt] = 0.0 if service._clock is None else service._clock()
        return sent

    def _set_timer(self) -> None:
        """Wait, beside the calls, for the delay after the latest of them."""
        self._cancel_timer()
        if self._attempt < self._service._layer.max_attempts:
            self._timer = call_later(self._delay, self._on_time, context=self._context)

    def _on_time(self) -> None:
        if self._running:  # or the group may be closed already
            self._group.start_soon(self._late, self._attempt)

    async def _late(self, attempt: int) -> None:
        """Make the next call because of time: in a task, which can know that the caller has been cancelled."""
        if attempt != self._attempt or self._has_ended or _is_cancelled():
            return  # a call has ended, or all of it, between the timer and here
        sent = self._next(None)
        if not isinstance(sent, NotCloneable):
            self._set_timer()
            await self._call(self._attempt, sent)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end(self, error: Exception | None) -> None:
        self._has_ended = True
        self._error = error
        self._cancel_timer()
        if self._running:  # not for nothing: it takes as long as all the rest
            self._group.cancel_scope.cancel()


def _asks_for_time(error: Exception) -> bool:
    return bool(retry_after(error))


def _is_cancelled() -> bool:
    return anyio.current_effective_deadline() == -math.inf


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    cancelled = anyio.get_cancelled_exc_class()
    return next((each for each in group.exceptions if not isinstance(each, cancelled)), group)
