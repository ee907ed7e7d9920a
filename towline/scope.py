"""The life that a stack opens: one task group, one clock, one random generator, one timer.

Sessions, pumps, reconnect loops and handlers belong to the scope that ``Stack.open``, ``connect`` or ``serve`` opened,
and end with it (D6).
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
import random
import weakref
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import anyio
from anyio.abc import TaskGroup

__all__ = ["Drainable", "Scope", "Timed", "Timers", "is_cancelled", "only", "plain_task_group"]

E = TypeVar("E", bound=BaseException)


class Timed(Protocol):
    """Something that wants to be told when a moment has passed."""

    timer_at: float | None
    """Owned by `Timers`: the moment for which it is in the heap."""

    @property
    def deadline(self) -> float | None: ...

    def on_time(self, now: float) -> None: ...


class Drainable(Protocol):
    """The listening side of a layer that holds sessions."""

    @property
    def sessions(self) -> Sequence[Any]: ...

    async def drain(self, deadline: float) -> int: ...


class Timers:
    """One task that keeps time for everything in a scope, since readers and writers may both be blocked (D10).

    Deadlines mostly move away (each read moves the heartbeat's), so an entry of the heap is only a moment to look
    again: moving a deadline away costs nothing.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        # Weak, since an entry may lie here long after what it is for has ended.
        self._heap: list[tuple[float, int, weakref.ref[Timed]]] = []
        self._count = itertools.count()
        self._wake: anyio.Event | None = None
        self._sleeping_until = float("inf")

    def update(self, timed: Timed) -> None:
        """Look at ``timed.deadline`` again: it may have become earlier."""
        deadline = timed.deadline
        if deadline is None or (timed.timer_at is not None and timed.timer_at <= deadline):
            return
        timed.timer_at = deadline
        heapq.heappush(self._heap, (deadline, next(self._count), weakref.ref(timed)))
        if deadline < self._sleeping_until and self._wake is not None:
            self._wake.set()

    def forget(self, timed: Timed) -> None:
        """Never call ``timed`` again, until the next `update`."""
        timed.timer_at = None

    async def run(self) -> None:
        """Keep time until cancelled."""
        while True:
            self._fire(self._clock())
            self._sleeping_until = self._heap[0][0] if self._heap else float("inf")
            self._wake = anyio.Event()
            delay = max(0.0, self._sleeping_until - self._clock())
            with anyio.CancelScope(deadline=anyio.current_time() + delay):
                await self._wake.wait()
            self._wake = None

    def _fire(self, now: float) -> None:
        while self._heap and self._heap[0][0] <= now:
            at, _, ref = heapq.heappop(self._heap)
            timed = ref()
            if timed is None or timed.timer_at != at:
                continue  # forgotten, or in the heap again for an earlier moment
            timed.timer_at = None
            deadline = timed.deadline
            if deadline is not None and deadline <= now:
                timed.on_time(now)
            self.update(timed)


@dataclass(eq=False, slots=True)
class Scope:
    """What the layers of one open stack share.

    Attributes:
        task_group: where sessions, pumps and handlers run.
        clock: monotonic seconds, ``anyio.current_time`` by default.
        random: for jitter and nothing else; secrets come from the operating system.
        wire: the names of the two-sided layers, outermost first, as both ends must stack them.
        timers: the scope's one keeper of time.
        servers: what drains when the scope is served and shall end, put there by a layer that holds sessions.
    """

    task_group: TaskGroup
    clock: Callable[[], float] = anyio.current_time
    random: random.Random = field(default_factory=random.Random)
    wire: tuple[str, ...] = ()
    servers: list[Drainable] = field(default_factory=list[Drainable])
    timers: Timers = field(init=False)

    def __post_init__(self) -> None:
        self.timers = Timers(self.clock)


@asynccontextmanager
async def plain_task_group() -> AsyncGenerator[TaskGroup]:
    """A task group that no ExceptionGroup leaves: an error of the block leaves as itself, and cancels the tasks.

    So does an error of a task, if it is the only one; and before any other what is no Exception, such as a task's
    KeyboardInterrupt. An error of the block survives that the scope around it is cancelled, as it would with a group of
    anyio's.
    """
    raised: BaseException | None = None
    cancelled = anyio.get_cancelled_exc_class()
    try:
        async with anyio.create_task_group() as tasks:
            try:
                yield tasks
            except cancelled:
                raise
            except BaseException as error:
                raised = error
                tasks.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        if raised is None:
            raise only(group) from None
        # What ends a program does so whatever else was raised; and the block may have failed because of it.
        fatal = group.subgroup(lambda error: not isinstance(error, (Exception, cancelled)))
        if fatal is not None:
            raised = only(fatal)
    finally:
        if raised is not None:
            try:
                raise raised
            finally:
                del raised  # or the error would hold this frame, and this frame the error


def only(error: E) -> E:
    """The one error that a group holds, however deep it lies; else the error, or the group, itself.

    >>> only(ExceptionGroup("one task", [ExceptionGroup("another", [KeyError("k")])]))
    KeyError('k')
    """
    inner: tuple[E, ...] = getattr(error, "exceptions", ())  # only a group has them
    return only(inner[0]) if len(inner) == 1 else error


def is_cancelled() -> bool:
    """Whether somebody has cancelled this task: a scope around it or, on asyncio, who called the task's own ``cancel``.

    For an ``except asyncio.CancelledError``: if nobody has, it is a failure like any other, as awaiting a future gives
    that was cancelled, and whoever lets it through ends a task that nobody asked to end.
    """
    if anyio.current_effective_deadline() == -math.inf:
        return True
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0
