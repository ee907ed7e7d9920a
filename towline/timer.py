"""Call a function later, on whichever event loop runs, without a task for it.

asyncio's loop has timers of its own. trio has none, only tasks that sleep, and one of these for each call would take
longer than all the rest of a layer; so the timers of a trio run share one.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import math
from asyncio import get_running_loop
from collections.abc import Callable
from contextlib import suppress
from contextvars import Context
from functools import cache, partial
from typing import TYPE_CHECKING, Final, Protocol

import anyio

from towline.loop import is_asyncio, tell_anyio

if TYPE_CHECKING:
    import trio.lowlevel

__all__ = ["TASK", "Timer", "call_later"]

logger = logging.getLogger(__name__)

TASK: Final = "towline timers"
"""The name of the task that a trio run's timers share. It is a system task, and ends with the run."""

PURGE_AT_LEAST: Final = 64
"""So many timers are never too many, all of them cancelled or not."""


class Timer(Protocol):
    """A call that is still to come."""

    def cancel(self) -> None:
        """Do not make the call, if it has not been made, and forget what it is."""


def call_later(delay: float, callback: Callable[[], object], *, context: Context) -> Timer:
    """Call ``callback`` in ``context`` after ``delay`` seconds, outside of any task of the caller's.

    It may use anyio there, as in a task. What it raises harms nobody: it is logged, here or by asyncio.

    Raises:
        RuntimeError: outside a task.
    """
    if is_asyncio():
        return get_running_loop().call_later(delay, _call_on_asyncio, callback, context=context)
    return _timers().call_later(delay, partial(context.run, callback))


def _call_on_asyncio(callback: Callable[[], object]) -> None:
    tell_anyio()
    callback()


class _Timer:
    __slots__ = ("_timers", "callback")

    def __init__(self, timers: _Timers, callback: Callable[[], object]) -> None:
        self._timers = timers
        self.callback: Callable[[], object] | None = callback  # None once it is cancelled

    def cancel(self) -> None:
        if self.callback is not None:
            self.callback = None
            self._timers.set_alarm()


class _Timers:
    """The timers of one trio run, and the task that makes their calls.

    It sleeps in a scope whose deadline is moved, from outside, to the moment of the first timer that is not cancelled.
    So none wakes it for nothing, which would move a clock in virtual time.
    """

    def __init__(self) -> None:
        import trio.lowlevel  # only where it runs already

        self._now = trio.lowlevel.current_clock().current_time
        self._heap: list[tuple[float, int, _Timer]] = []
        self._count = itertools.count()
        self._purge_above = PURGE_AT_LEAST
        self._asleep = anyio.CancelScope()

    def call_later(self, delay: float, callback: Callable[[], object]) -> _Timer:
        timer = _Timer(self, callback)
        heapq.heappush(self._heap, (self._now() + delay, next(self._count), timer))
        if len(self._heap) > self._purge_above:
            self._purge()
        self.set_alarm()
        return timer

    def set_alarm(self) -> None:
        """Wake the task when the first timer is due: it may be another one now."""
        heap = self._heap
        while heap and heap[0][2].callback is None:
            heapq.heappop(heap)
        first = heap[0][0] if heap else math.inf
        if self._asleep.deadline != first:  # to set it takes twenty times as long as to look
            self._asleep.deadline = first

    async def run(self) -> None:
        """Make the calls until cancelled."""
        while True:
            with anyio.CancelScope() as self._asleep:
                self.set_alarm()
                await anyio.sleep_forever()
            self._call_due()

    def _call_due(self) -> None:
        due: list[_Timer] = []  # and none that is set by one of them
        now = self._now()
        while self._heap and self._heap[0][0] <= now:
            due.append(heapq.heappop(self._heap)[2])
        for timer in due:
            try:
                if timer.callback is not None:
                    timer.callback()
            except BaseException:  # no cancellation, which only an await raises; any other would end the whole run
                logger.exception("a timer's callback raised", extra={"event": "timer.failed"})

    def _purge(self) -> None:
        """Drop what is cancelled, also behind the first; seldom enough that it costs each timer next to nothing."""
        self._heap = [entry for entry in self._heap if entry[2].callback is not None]
        heapq.heapify(self._heap)
        self._purge_above = max(PURGE_AT_LEAST, 2 * len(self._heap))


def _timers() -> _Timers:
    timers = _of_run().get()
    if timers is None:
        import trio.lowlevel  # only where it runs already

        timers = _Timers()
        _of_run().set(timers)
        with suppress(RuntimeError):  # the run is over but for what its generators clean up: there is no later
            trio.lowlevel.spawn_system_task(timers.run, name=TASK)
    return timers


@cache
def _of_run() -> trio.lowlevel.RunVar[_Timers | None]:
    import trio.lowlevel  # only where it runs already

    return trio.lowlevel.RunVar("towline timers", default=None)
