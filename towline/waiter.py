"""One task waits for one thing: what `anyio.Event` does for many, at a fraction of the price.

For where a task waits once in every call, as for an answer, or once in every write. The cost of an Event there is that
of all the rest.
"""

from __future__ import annotations

from asyncio import Future, get_running_loop
from collections.abc import Awaitable, Callable, Generator
from functools import cache
from typing import Any, TypeAlias

from towline.loop import is_asyncio

__all__ = ["Waiter", "waiters"]

Waiter: TypeAlias = Awaitable[Any]
"""Awaited by one task, once, until it is woken. If it was woken before, awaiting it need not be a checkpoint."""


def waiters() -> tuple[Callable[[], Waiter], Callable[[Any], None]]:
    """What makes a waiter, and what wakes one, on the event loop that runs this.

    Two functions, not a class: on asyncio a waiter is a Future as it is, and a class around that would double its
    price. To wake one that was woken, or whose task was cancelled, does nothing.
    """
    if is_asyncio():
        return get_running_loop().create_future, _wake_future
    return _trio_waiters()


def _wake_future(future: Future[None]) -> None:
    if not future.done():  # its task may be cancelled, and so it was
        future.set_result(None)


@cache
def _trio_waiters() -> tuple[Callable[[], Waiter], Callable[[Any], None]]:
    from trio import lowlevel  # only where it runs already

    current_task, reschedule, wait = lowlevel.current_task, lowlevel.reschedule, lowlevel.wait_task_rescheduled

    class TrioWaiter:
        __slots__ = ("is_set", "task")

        def __init__(self) -> None:
            self.is_set = False
            self.task: lowlevel.Task | None = None

        def __await__(self) -> Generator[Any, Any, None]:
            if not self.is_set:
                self.task = current_task()
                yield from wait(self.abort).__await__()

        def abort(self, _: object) -> lowlevel.Abort:
            self.task = None
            return lowlevel.Abort.SUCCEEDED

        def wake(self) -> None:
            self.is_set = True
            task, self.task = self.task, None
            if task is not None:
                reschedule(task)

    return TrioWaiter, TrioWaiter.wake
