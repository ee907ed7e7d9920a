"""Standing workers: the tasks in which handlers run.

A task for each call would take three times as long as all the rest of it. So tasks stand by, and each takes one call
after another. What a task has for one call alone it must have here for a call in a task: a scope that can be cancelled
and has a deadline, and context variables that the next call does not see.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable
from contextvars import copy_context
from typing import Final, TypeAlias

import anyio
from anyio.abc import TaskGroup

from towline.loop import is_asyncio, tell_anyio
from towline.waiter import Waiter, waiters

from ._core import IncomingCall

__all__ = ["Job", "Worker", "Workers"]

logger = logging.getLogger(__name__)

STANDING: Final = 32
"""So many idle workers stay; what a burst has started beyond that ends when it has nothing to do."""

Job: TypeAlias = tuple[
    Callable[[IncomingCall], Awaitable[None]], Callable[[IncomingCall], Awaitable[None]], IncomingCall
]
"""What answers a call, what says that its deadline has passed, and the call."""


class Workers:
    """The workers of one end, for all its connections.

    Args:
        tasks: where they run.
        most: how many there may be: how many handlers run at once.
        max_waiting: how many calls may wait for one.
    """

    def __init__(self, tasks: TaskGroup, *, most: int, max_waiting: int) -> None:
        self._tasks = tasks
        self.new_waiter, self.wake = waiters()
        # Of what made this. A worker is started by whichever connection brings a call, and answers those of all.
        self._context = copy_context()
        if is_asyncio():
            self._context.run(tell_anyio)  # a call may come in a turn of the loop that is no task's
        self._most = most
        self._max_waiting = max_waiting
        self._waiting: deque[Job] = deque()
        self._idle: list[Worker] = []
        self._count = 0
        self._is_woken = False  # one is on its way to look at what waits, and wakes the next

    @property
    def is_full(self) -> bool:
        """Whether no more calls may wait."""
        return len(self._waiting) >= self._max_waiting

    def give(self, job: Job) -> None:
        """Have a call answered as soon as a worker is free."""
        self._waiting.append(job)
        if not self._is_woken:
            self._wake()

    def _wake(self) -> None:
        """Wake one worker. It wakes the next, if it has to leave calls waiting; so a burst of short calls wakes two."""
        if self._idle:
            self._is_woken = True
            self.wake(self._idle.pop().waiter)
        elif self._count < self._most:
            self._is_woken = True
            self._count += 1
            # In a copy, since a task that starts eagerly may come here again.
            self._context.copy().run(self._tasks.start_soon, Worker(self).run)

    def arrived(self) -> None:
        """The worker that was woken runs."""
        self._is_woken = False

    def take(self) -> Job | None:
        """The next call for a worker that is free."""
        waiting = self._waiting
        if not waiting:
            return None
        job = waiting.popleft()
        if waiting and not self._is_woken:  # somebody else looks after the next as soon as this one has to wait
            self._wake()
        return job

    def rest(self, worker: Worker) -> bool:
        """A worker has nothing to do. False if it may end."""
        if len(self._idle) >= STANDING:
            self._count -= 1
            return False
        self._idle.append(worker)
        return True

    def replace(self) -> None:
        """A worker ends that has been used up."""
        self._count -= 1
        if self._waiting and not self._is_woken:
            self._wake()


class Worker:
    """One task that answers one call after another."""

    __slots__ = ("_call", "_pool", "_scope", "waiter")

    _scope: anyio.CancelScope
    waiter: Waiter

    def __init__(self, pool: Workers) -> None:
        self._pool = pool
        self._call: IncomingCall | None = None

    def cancel(self, call: IncomingCall) -> None:
        """Stop answering this call."""
        if self._call is call:
            self._scope.cancel()

    async def run(self) -> None:
        pool = self._pool
        pool.arrived()
        clean = copy_context()
        while True:
            job: Job | None = None
            with anyio.CancelScope() as self._scope:
                while True:
                    job = pool.take()
                    if job is None:
                        self.waiter = pool.new_waiter()
                        if not pool.rest(self):
                            return
                        await self.waiter
                        pool.arrived()
                        continue
                    answer, _, call = job
                    if call.is_over:
                        continue
                    self._call = call
                    call.handler = self
                    if call.deadline < math.inf:
                        self._scope.deadline = call.deadline
                    await answer(call)
                    call.handler = self._call = None
                    if self._scope.cancel_called:
                        break  # too late for this call, and the next must not suffer for it
                    if call.deadline < math.inf:
                        self._scope.deadline = math.inf
                    # A handler that has set a context variable must not show it to the next.
                    if copy_context() != clean:
                        return pool.replace()
            # Only this call was cancelled: by its caller, or by its deadline.
            self._call = None
            if job is not None:
                _, late, call = job
                call.handler = None
                if not call.is_over:
                    await late(call)
            if copy_context() != clean:
                return pool.replace()
