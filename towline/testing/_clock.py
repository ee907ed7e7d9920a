"""Time that tests control: an hour passes at once, and always in the same order.

Two tools for two needs. `virtual_time_backend` runs a whole event loop, asyncio or trio, in virtual time: as
long as anything is ready it runs as usual, and when all tasks wait for the clock, the clock jumps to the
first of them. `MockClock` is a plain object for code that takes its clock and its sleep as parameters.

Virtual time does not know what a thread, another process or the network is doing: while only they work, and a
timer is pending, the timer fires. Tests of such things want real time.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Mapping
from typing import TYPE_CHECKING

import anyio.lowlevel

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike

__all__ = ["MockClock", "VirtualTimeLoop", "virtual_time_backend"]


class _JumpingSelector(selectors.BaseSelector):
    """A selector that moves a clock forward where a real one would wait.

    asyncio tells its selector how long it may wait: until the first timer, or for ever when there is none.
    That is the one place where an asyncio loop passes time, so nothing of the loop's internals is needed.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._real = selectors.DefaultSelector()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout <= 0:
            # No timer to jump to: only a thread or a file descriptor can wake the loop, in real time.
            return self._real.select(timeout)
        ready = self._real.select(0)
        if not ready:
            self.now += timeout
        return ready

    def register(self, fileobj: FileDescriptorLike, events: int, data: object = None) -> selectors.SelectorKey:
        return self._real.register(fileobj, events, data)

    def unregister(self, fileobj: FileDescriptorLike) -> selectors.SelectorKey:
        return self._real.unregister(fileobj)

    def modify(self, fileobj: FileDescriptorLike, events: int, data: object = None) -> selectors.SelectorKey:
        return self._real.modify(fileobj, events, data)

    def get_map(self) -> Mapping[FileDescriptorLike, selectors.SelectorKey]:
        return self._real.get_map()

    def close(self) -> None:
        self._real.close()


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An asyncio event loop whose clock starts at 0 and jumps to the next timer whenever nothing is ready.

    Give the class as ``loop_factory``. A file descriptor that is ready is served before any jump. With no
    timer pending the loop really waits, so a thread can wake it.

    >>> import asyncio, anyio
    >>> with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
    ...     runner.run(anyio.sleep(3600))
    ...     runner.get_loop().time()
    3600.0
    """

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        """Seconds of virtual time since the loop was made."""
        return self._jumping.now

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        # asyncio.Runner passes a timeout here from Python 3.12 on. It would expire at once, since a thread
        # that ends is nothing that the clock can see; so wait as 3.11 does.
        await super().shutdown_default_executor()


def virtual_time_backend(name: str) -> tuple[str, dict[str, object]]:
    """The value of anyio's ``anyio_backend`` fixture that runs tests in virtual time.

    Take a new one for each fixture: on trio it holds the clock itself, which goes on from run to run.

    Args:
        name: ``"asyncio"`` or ``"trio"``.

    Raises:
        ValueError: if ``name`` is neither.
        ImportError: if it is ``"trio"`` and trio is not installed.

    >>> import anyio
    >>> backend, options = virtual_time_backend("asyncio")
    >>> anyio.run(anyio.sleep, 3600, backend=backend, backend_options=options)
    """
    if name == "asyncio":
        return name, {"loop_factory": VirtualTimeLoop}
    if name == "trio":
        import trio.testing  # an optional dependency

        return name, {"clock": trio.testing.MockClock(autojump_threshold=0)}
    raise ValueError(f"{name!r} is not a backend: expected 'asyncio' or 'trio'")


class MockClock:
    """A clock that moves only when told to, for parameters named ``clock`` and ``sleep``.

    ``clock=clock, sleep=clock.sleep`` is the usual pair: sleeping moves the clock and returns. Sleeps that
    overlap do not add up, but end in the order in which they began; where the order between tasks matters,
    use `virtual_time_backend`.

    Attributes:
        slept: every length that was asked of `sleep`, in order.

    >>> clock = MockClock()
    >>> clock.advance(1.5)
    >>> clock(), clock.now()
    (1.5, 1.5)
    """

    def __init__(self, now: float = 0.0) -> None:
        self._now = now
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self._now

    def now(self) -> float:
        """The current time, in seconds; the same as calling the clock."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Move the clock forward.

        Raises:
            ValueError: if ``seconds`` is negative or not a number: a monotonic clock never goes back.
        """
        self._now += _forward(seconds)

    async def sleep(self, seconds: float) -> None:
        """Record ``seconds``, let other tasks run once, and move the clock forward. A checkpoint.

        Raises:
            ValueError: if ``seconds`` is negative or not a number.
        """
        wake = self._now + _forward(seconds)
        self.slept.append(seconds)
        await anyio.lowlevel.checkpoint()
        self._now = max(self._now, wake)

    def __repr__(self) -> str:
        return f"MockClock({self._now})"


def _forward(seconds: float) -> float:
    if not seconds >= 0:  # NaN is not
        raise ValueError(f"cannot move a clock by {seconds} seconds: the least is 0")
    return seconds
