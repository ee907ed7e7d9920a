"""A bounded queue in front of a service: `Buffer`.

The queue holds callers, not copies of what they asked for: when a caller's turn comes it makes the call itself, in its
own task. So its context variables, its deadline and its cancellation reach the service inside as if there were no
queue, and an error comes to the one whom it concerns. The worker decides one thing: when the next turn is.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import ClassVar, Final, Literal, TypeVar

import anyio

from towline.errors import Overloaded, ServiceClosed
from towline.hooks import CallShed, Hooks, tell
from towline.scope import plain_task_group
from towline.service import Service, Wrapper, offered, ready_now, refuses_now
from towline.text import differing

from ._raised import trim

__all__ = ["Buffer"]

Q = TypeVar("Q")
R = TypeVar("R")

SHORTEST_LOOK: Final = 0.001
LONGEST_LOOK: Final = 1.0
LATENESS: Final = 16
"""Where a service says whether it is ready but not when, the worker looks again: when it has waited a sixteenth longer,
which is how much too late it may be, but no more often than every millisecond, and at least once a second."""


@dataclass(frozen=True, slots=True)
class Buffer:
    """Layer: up to ``bound`` calls wait in a queue, first come, first served, until the service inside takes them.

    Needs a layer inside it that limits something and says so (`towline.service.ready_now`), such as ConcurrencyLimit or
    RateLimit; in front of anything else the queue stays empty. It does not bound how many calls are under way, only how
    many wait: ``Stack(Buffer(100), ConcurrencyLimit(10))`` takes 10 calls, and 100 that wait, and one more, which the
    worker holds in its hand until the service inside is ready; in the reverse order it is 10 in all. The numbers are
    Tower's.

    What the layers inside limit themselves has a queue without end; this one gives it an end (``on_full="shed"``), and
    lets a LoadShed or a Balance outside see that it is full.

    The service that this makes has a worker, so it is used in ``async with`` (or within `towline.service.running`):

    * A caller that is cancelled while it waits has never reached the service inside; one that is cancelled during its
      call cancels that call.
    * Leaving the block turns new calls away, and first finishes what was taken: see ``on_close``.
    * If the service inside cannot say when it is ready (its ``ready_now()`` or ``ready()`` raises while calls wait),
      the worker ends. All who wait then fail, and all who come later, until the block is left and entered again.

    Readiness is a hint and reserves nothing. It is exact where the limit is this buffer's alone, and no layer between
    the two awaits anything before the limit is reached; else a call may wait a second time, at the limit, and a few
    more wait than ``bound`` says. A service may offer ``async def ready(self) -> None`` beside ``ready_now``, to wait
    until it is probably ready. Without, the worker looks again whenever one of its own calls ends, and from time to
    time; and when none is under way it lets the next call in to wait there.

    Attributes:
        bound: how many calls may wait, 1 or more, not counting the one that the worker holds.
        on_full: what becomes of a call that finds no room: ``"wait"`` until there is, or ``"shed"`` to raise
            `Overloaded` at once.
        on_close: what leaving the block without an error does: ``"finish"`` waits until the calls that were taken are
            over, those in the queue included (bound that with `anyio.move_on_after`); ``"fail"`` waits for nothing.
            What has not begun by then, and what found no room, fails with `ServiceClosed`, as it does when the block
            ends by an error or is cancelled. A call that has begun is never cancelled: it is its caller's.
        hooks: told of every call that is turned away for want of room.

    Raises:
        ValueError: if ``bound`` is below 1, or ``on_full`` or ``on_close`` is none of the two.

    >>> async def hello(name: str, /) -> str:
    ...     return f"hello, {name}"
    >>> async def main() -> str:
    ...     async with Buffer(100)(hello) as call:
    ...         return await call("you")
    >>> anyio.run(main)
    'hello, you'
    """

    client_only: ClassVar[bool] = True

    bound: int
    on_full: Literal["wait", "shed"] = field(default="wait", kw_only=True)
    on_close: Literal["finish", "fail"] = field(default="finish", kw_only=True)
    hooks: Hooks | None = field(default=None, kw_only=True)

    __repr__ = differing

    def __post_init__(self) -> None:
        if not self.bound >= 1:  # NaN is not
            raise ValueError(f"bound is {self.bound}, where 1 or more is expected")
        if self.on_full not in ("wait", "shed"):
            raise ValueError(f"on_full is {self.on_full!r}, where 'wait' or 'shed' is expected")
        if self.on_close not in ("finish", "fail"):
            raise ValueError(f"on_close is {self.on_close!r}, where 'finish' or 'fail' is expected")

    def __call__(self, inner: Service[Q, R], /) -> Wrapper[Q, R]:
        return _Buffered(inner, self)


class _Buffered(Wrapper[Q, R]):
    """A service with a queue in front of it."""

    __slots__ = (
        "_cause",
        "_change",
        "_held",
        "_inside",
        "_is_open",
        "_layer",
        "_queue",
        "_ready",
        "_wanted",
    )

    def __init__(self, inner: Service[Q, R], layer: Buffer) -> None:
        super().__init__(inner)
        self._layer = layer
        self._ready = offered(inner, "ready")
        self._is_open = False
        self._cause: Exception | None = None  # what ended the worker
        self._inside = 0
        # A turn is the event that its caller waits for. The one that is held is no longer in the queue; nobody is in
        # the queue unless one is held. Ordered, so that a caller that gives up is out of it at once, wherever it stood.
        self._held: anyio.Event | None = None
        self._queue: OrderedDict[anyio.Event, None] = OrderedDict()
        self._wanted: anyio.Event | None = None  # the worker waits for a turn to be held
        self._change: anyio.Event | None = None  # somebody waits for a call to begin, to end or to give up

    async def __call__(self, request: Q, /) -> R:
        if not self._is_open:
            raise self._closed()
        if self._held is not None or not self._may_call():
            await self._wait_for_turn()
        # Nothing is awaited from here to the call, so that what it takes is taken before anyone asks for readiness.
        self._inside += 1
        try:
            response: R = await self.inner(request)
            return response
        finally:
            self._inside -= 1
            if self._change is not None:
                self._tell_change()

    def ready_now(self) -> bool:
        """Whether there is room. One that is closed is ready too: whoever calls it learns at once that it is."""
        return self._held is None or len(self._queue) < self._layer.bound or not self._is_open

    def refuses_now(self) -> bool:
        return (self._layer.on_full == "shed" and not self.ready_now()) or super().refuses_now()

    def _may_call(self) -> bool:
        # What turns a call away is not waited for: the caller is to hear of it.
        return ready_now(self.inner) or refuses_now(self.inner)

    # --- waiting for a turn -----------------------------------------------------------------------------------------

    async def _wait_for_turn(self) -> None:
        turn = anyio.Event()
        if self._held is None:
            self._held = turn
            if self._wanted is not None:
                self._wanted.set()
        elif len(self._queue) >= self._layer.bound and self._layer.on_full == "shed":
            raise self._overloaded()
        else:
            self._queue[turn] = None
        is_mine = False
        try:
            await turn.wait()
        finally:
            is_mine = self._held is turn
            if is_mine:
                # Begun or given up: the next one is held, and the worker may look at it once this task waits or ends.
                self._held = self._queue.popitem(last=False)[0] if self._queue else None
                self._tell_change()
            else:
                self._queue.pop(turn, None)
        if not is_mine:
            raise self._closed()

    def _tell_change(self) -> None:
        if self._change is not None:
            self._change.set()
            self._change = None

    async def _wait_for_change(self, at_most: float = math.inf) -> None:
        change = self._change
        if change is None:
            change = self._change = anyio.Event()
        with anyio.move_on_after(at_most):
            await change.wait()

    # --- the worker -------------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        try:
            while True:
                turn = self._held
                if turn is None:
                    self._wanted = anyio.Event()
                    await self._wanted.wait()
                    continue
                await self._until_ready()
                turn = self._held  # another one by now, if some have given up
                if turn is not None:
                    turn.set()
                    while self._held is turn:
                        await self._wait_for_change()
        except Exception as error:
            trim(error, __file__)
            self._shut(error)

    async def _until_ready(self) -> None:
        began = None
        while not self._may_call():
            if self._ready is not None:
                await self._ready()
            if not self._inside or self._may_call():
                return  # with none of ours inside nobody would wake us: whoever is next waits there
            now = anyio.current_time()
            began = now if began is None else began
            await self._wait_for_change(min(max((now - began) / LATENESS, SHORTEST_LOOK), LONGEST_LOOK))

    # --- open and closed --------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _running(self) -> AsyncGenerator[None]:
        async with plain_task_group() as tasks:
            tasks.start_soon(self._work)
            self._is_open = True
            self._cause = None
            try:
                yield
                if self._layer.on_close == "finish":
                    await self._finish()
            finally:
                self._shut(self._cause)
                tasks.cancel_scope.cancel()

    async def _finish(self) -> None:
        self._is_open = False
        while len(self._queue) > self._layer.bound:  # these found no room, so they were not taken
            self._queue.popitem()[0].set()
        while self._held is not None or self._inside:
            await self._wait_for_change()

    def _shut(self, cause: Exception | None) -> None:
        self._is_open = False
        self._cause = cause
        if self._held is not None:
            self._queue[self._held] = None
            self._held = None
        while self._queue:
            self._queue.popitem(last=False)[0].set()
        self._tell_change()

    def _closed(self) -> ServiceClosed:
        # A new one for everybody: an error that several tasks raise collects the tracebacks of them all.
        cause = self._cause
        if cause is None:
            return ServiceClosed("this Buffer is closed: it takes calls within its 'async with' block")
        error = ServiceClosed(f"the worker of this Buffer has ended, as the service inside failed: {cause!r}")
        error.__cause__ = cause
        return error

    def _overloaded(self) -> Overloaded:
        error = Overloaded(f"{len(self._queue)} calls wait already, where bound is {self._layer.bound}")
        if self._layer.hooks is not None:
            tell(self._layer.hooks.on_shed, CallShed("Buffer", error))
        return error
