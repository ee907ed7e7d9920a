"""A scope in a task of its own, for an iterator that may not hold one in its caller's task.

``async for session in stack.sessions(...)`` cannot open a task group around its ``yield``: cancel scopes must nest, and
a loop may be left by ``break``. So the scope lives in a task that belongs to nobody's scope, and is told to end without
waiting.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final

import anyio

from towline.loop import is_asyncio
from towline.service import Dial

if TYPE_CHECKING:
    from towline.stack import OpenStack, Stack

__all__ = ["Host"]

logger = logging.getLogger(__name__)

GOODBYE_TIMEOUT: Final = 1.0
"""How long the last connection may take for its last word, in seconds."""


class Host:
    """Opens a stack's scope in a task of its own, and connects there."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._opened: OpenStack | None = None
        self._ready = anyio.Event()
        self._closing = anyio.Event()
        self._started = False
        self.connection: Any = None  # the last one: its last word is awaited at the end

    async def dial(self, dial: Dial) -> Any:
        """Connect in the host's scope; called, and waited for, in the caller's task."""
        if not self._started:
            self._started = True
            _spawn(self._run)
        await self._ready.wait()
        if self._opened is None:
            raise RuntimeError("the scope of this iterator has ended")
        return await self._opened.dial(dial)

    def close(self) -> None:
        """End the scope and everything in it. Never waits."""
        self._closing.set()

    async def _run(self) -> None:
        try:
            async with self._stack.open() as opened:
                self._opened = opened
                self._ready.set()
                await self._closing.wait()
                if self.connection is not None:
                    with anyio.move_on_after(GOODBYE_TIMEOUT):
                        await self.connection.wait_closed()
        except Exception:
            logger.exception("the scope of an iterator of sessions failed", extra={"event": "scope.failed"})
        finally:
            self._opened = None
            self._ready.set()


_tasks: set[asyncio.Task[None]] = set()
"""asyncio keeps only weak references to its tasks."""


def _spawn(function: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Start a task that belongs to nobody's scope and ends with the event loop at the latest."""
    if is_asyncio():
        task = asyncio.get_running_loop().create_task(function(), name="towline sessions")
        _tasks.add(task)
        task.add_done_callback(_tasks.discard)
    else:
        import trio  # only where it runs already

        trio.lowlevel.spawn_system_task(function)
