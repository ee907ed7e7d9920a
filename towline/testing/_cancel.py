"""Cancellation as a path that tests walk: at the first await, at the second, at every one there is.

Whatever can be awaited can be cancelled there. What such a test finds is a key that was installed by half, a lock
that stays taken, a task that nobody ends.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any

import anyio

from towline import timer

__all__ = ["cancel_at_every_await"]


class _Counted:
    """Runs a coroutine in the task that awaits this, and calls back when it suspends for the n-th time."""

    def __init__(self, coroutine: Coroutine[Any, Any, object], at: int, callback: Callable[[], None]) -> None:
        self._coroutine = coroutine
        self._at = at
        self._callback = callback
        self.suspensions = 0

    # Any: what passes here is between the event loop and its own awaitables.
    def __await__(self) -> Generator[Any, Any, None]:
        coroutine = self._coroutine
        value: Any = None
        error: BaseException | None = None
        while True:
            try:
                trap = coroutine.send(value) if error is None else coroutine.throw(error)
            except StopIteration:
                return
            self.suspensions += 1
            if self.suspensions == self._at:
                self._callback()
            try:
                value, error = (yield trap), None
            except BaseException as raised:
                error = raised


async def cancel_at_every_await(
    make_coroutine: Callable[[], Coroutine[Any, Any, object]],
    check: Callable[[], Awaitable[None]] | None = None,
    *,
    limit: int = 10_000,
) -> int:
    """Run a coroutine again and again, cancelled at its first suspension, its second, and so on to the last.

    After each run no task may be left that was not there before, and ``check`` is awaited. An error that leaves the
    coroutine while it is cancelled leaves here too. Only the coroutine's own task is counted: the tasks it starts
    suspend when they like.

    Args:
        make_coroutine: makes the coroutine, anew for each run.
        check: looks at what a run has left behind; raises if it should not have.
        limit: how many suspensions are too many to go on, in case there is no end to them.

    Returns:
        How many times the coroutine suspends when nobody cancels it: the number of places that were tried.

    Raises:
        AssertionError: if a run left a task behind, or there were more than ``limit`` suspensions.

    >>> async def twice() -> None:
    ...     await anyio.sleep(1)
    ...     await anyio.sleep(1)
    >>> anyio.run(cancel_at_every_await, twice)
    2
    """
    for at in range(1, limit + 1):
        before = {task.id for task in anyio.get_running_tasks()}
        scope = anyio.CancelScope()
        counted = _Counted(make_coroutine(), at, scope.cancel)
        with scope:
            await counted
        # That of the timers is the run's own: it stays for the next who asks for one, whoever was the first.
        left = [task for task in anyio.get_running_tasks() if task.id not in before and task.name != timer.TASK]
        assert not left, f"cancelled at suspension {at}, it left tasks behind: {left}"
        if check is not None:
            await check()
        if counted.suspensions < at:
            return counted.suspensions
    raise AssertionError(f"no end after {limit} suspensions")
