"""One task waits for one thing: what `anyio.Event` does for many, at a fraction of the price.

For where a task waits once in every call, as for an answer. The cost of an Event there is that of all the rest.
"""

from __future__ import annotations

from asyncio import CancelledError, Future, get_running_loop
from collections.abc import Generator
from typing import TYPE_CHECKING, Any, Protocol

import anyio

if TYPE_CHECKING:
    import trio

__all__ = ["Waiter", "waiters"]


class Waiter(Protocol):
    """Awaited by one task, once, until `set`. If it is set already, awaiting it need not be a checkpoint."""

    def set(self) -> None:
        """Let the task go on. Doing so again does nothing."""

    def __await__(self) -> Generator[Any, Any, None]: ...


def waiters() -> type[_AsyncioWaiter] | type[_TrioWaiter]:
    """The class of waiters for the event loop that runs this."""
    return _AsyncioWaiter if anyio.get_cancelled_exc_class() is CancelledError else _TrioWaiter


class _AsyncioWaiter:
    __slots__ = ("_future",)

    def __init__(self) -> None:
        self._future: Future[None] = get_running_loop().create_future()

    def set(self) -> None:
        if not self._future.done():  # its task may be cancelled, and so it was
            self._future.set_result(None)

    def __await__(self) -> Generator[Any, Any, None]:
        return self._future.__await__()


class _TrioWaiter:
    __slots__ = ("_is_set", "_task")

    def __init__(self) -> None:
        self._is_set = False
        self._task: trio.lowlevel.Task | None = None

    def set(self) -> None:
        self._is_set = True
        task, self._task = self._task, None
        if task is not None:
            import trio.lowlevel  # only where it runs already

            trio.lowlevel.reschedule(task)

    def __await__(self) -> Generator[Any, Any, None]:
        return self._wait().__await__()

    async def _wait(self) -> None:
        import trio.lowlevel

        if self._is_set:
            return
        self._task = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(self._abort)

    def _abort(self, _: object) -> trio.lowlevel.Abort:
        import trio.lowlevel

        self._task = None
        return trio.lowlevel.Abort.SUCCEEDED
