"""Time, as everything here reads it: a function without arguments that gives seconds.

Policies and budgets take a clock as a parameter and own none; this is the default of them all. It follows the event
loop, so a test in virtual time moves it, and it never steps with the wall clock.
"""

from __future__ import annotations

from asyncio import get_running_loop
from collections.abc import Callable
from contextvars import ContextVar
from typing import TypeAlias

from towline.loop import is_asyncio

__all__ = ["Clock", "now"]

Clock: TypeAlias = Callable[[], float]
"""Gives monotonic seconds. Only differences mean anything."""

# Looking up the event loop takes longer than many a call that is timed (on Python 3.11 it asks the system for the
# process's number), so a task looks once, and the tasks that it starts need not. A loop in a worker thread that
# inherits the context goes on with the clock of the loop outside, which runs alike unless it is one in virtual time.
_clock: ContextVar[Clock] = ContextVar("_clock")


def now() -> float:
    """The time on the clock of the event loop that runs this, in seconds.

    Raises:
        RuntimeError: outside an event loop: give a clock of your own there, such as
            ``time.monotonic``.
    """
    try:
        return _clock.get()()
    except LookupError:  # nobody has looked here yet
        return _found()()


def _found() -> Clock:
    try:
        runs_asyncio = is_asyncio()
    except RuntimeError:
        return (
            get_running_loop().time
        )  # in a callback of asyncio's, which is no task; or there is no loop, and it raises
    if runs_asyncio:
        clock = get_running_loop().time
    else:
        import trio.lowlevel  # only where it runs already

        # Of the clock itself: trio.current_time() would find out again, at each reading, which run this is.
        clock = trio.lowlevel.current_clock().current_time
    _clock.set(clock)
    return clock
