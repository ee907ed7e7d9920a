"""A service whose answers a test gives by hand: `mock_pair`, after Tower's tower-test.

A layer is tested between two hands: one calls it, the other is the service inside. The test sees every request that
comes through, and decides when it is answered, with what, or whether at all. Nothing here waits for time.
"""

from __future__ import annotations

from collections import deque
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, overload

import anyio
import anyio.lowlevel

from towline.errors import MisuseError, ServiceClosed

__all__ = ["MockCall", "MockHandle", "MockService", "mock_pair"]

Q = TypeVar("Q")
R = TypeVar("R")


class MockCall(Generic[Q, R]):
    """A call that came in: `MockHandle.next_request` gives it, and the test answers it. Made by the mock only.

    Attributes:
        request: what was asked.
    """

    __slots__ = ("_answered", "_cancelled", "_error", "_handle", "_over", "_response", "request")

    def __init__(self, request: Q, handle: MockHandle[Q, R]) -> None:
        self.request = request
        self._handle = handle
        self._answered = anyio.Event()
        self._over = anyio.Event()
        self._cancelled = False
        self._error: Exception | None = None
        self._response: Any = None  # Any: an R once it is answered and _error is None

    def respond(self, response: R) -> None:
        """Answer the call. To a caller that has given up, it comes too late and goes nowhere, as over a network.

        Raises:
            MisuseError: if it was answered before.
        """
        self._answer()
        self._response = response

    def fail(self, error: Exception) -> None:
        """Answer the call with an error, which the caller gets as it is.

        Raises:
            MisuseError: if it was answered before.
        """
        self._answer()
        self._error = error

    @property
    def is_answered(self) -> bool:
        """Whether it was answered, in time or too late."""
        return self._answered.is_set()

    @property
    def is_cancelled(self) -> bool:
        """Whether the caller has given up, so that an answer would go nowhere."""
        return self._cancelled

    async def cancelled(self) -> None:
        """Wait until the caller gives up.

        Raises:
            AssertionError: if it gets its answer instead.
        """
        await self._over.wait()
        if not self._cancelled:
            raise AssertionError(f"the caller of {self.request!r} did not give up: it got its answer")

    def _answer(self) -> None:
        if self._answered.is_set():
            raise MisuseError(f"the request {self.request!r} was answered before")
        self._answered.set()
        self._handle._settle(self)

    async def _wait(self) -> R:
        try:
            await self._answered.wait()
        except BaseException:  # the caller is cancelled, in one way or another
            self._cancelled = True
            self._handle._forget(self)
            # An answer that came too late is nobody's any more
            self._error = self._response = None
            raise
        finally:
            self._over.set()
        error, self._error = self._error, None
        if error is None:
            response: R = self._response
            self._response = None
            return response
        try:
            raise error
        finally:
            del error  # or this frame, which the error now holds, would hold the error

    def __repr__(self) -> str:
        state = "cancelled" if self._cancelled else "answered" if self.is_answered else "pending"
        return f"<MockCall of {self.request!r}, {state}>"


class MockService(Generic[Q, R]):
    """A service without an answer of its own: its calls come out at the `MockHandle` and wait there."""

    __slots__ = ("_handle",)

    def __init__(self, handle: MockHandle[Q, R]) -> None:
        self._handle = handle

    async def __call__(self, request: Q, /) -> R:
        """Hand the request to the test and wait for its answer.

        Raises:
            ServiceClosed: if the handle is closed before the request was taken.
            Exception: whatever the test answers with.
        """
        return await self._handle._admit(request)._wait()

    def ready_now(self) -> bool:
        """Whether a call would come in at once. A closed one says yes, since a call to it ends at once."""
        return self._handle._is_open

    def load(self) -> float:
        """How many calls wait, to come in or for an answer."""
        return len(self._handle._pending) + len(self._handle._outside)

    def __repr__(self) -> str:
        return f"<MockService, {self.load():.0f} waiting>"


class MockHandle(Generic[Q, R]):
    """The test's end of a `mock_pair`: takes the calls that come in, and answers them.

    As ``async with handle:`` it checks at the end of the block that no request is left without an answer, and closes.
    Put it inside the task group of the callers (``async with create_task_group() as tasks, handle:``), so that it
    speaks up before anyone waits for them.

    >>> from towline.layers.timeout import Timeout
    >>> async def main() -> None:
    ...     service, handle = mock_pair(str, str)
    ...     call = Timeout(10)(service)
    ...     async def client() -> None:
    ...         print(await call("hello"))
    ...     async with anyio.create_task_group() as tasks, handle:
    ...         tasks.start_soon(client)
    ...         (await handle.expect("hello")).respond("world")
    >>> anyio.run(main)
    world
    """

    __slots__ = ("_arrived", "_calls", "_closed", "_failures", "_left", "_news", "_outside", "_pending")

    def __init__(self, *, allow: int | None = None) -> None:
        self._left = _checked(allow)
        self._calls = 0
        self._closed = False
        self._failures: deque[Exception] = deque()
        self._outside: deque[MockCall[Q, R]] = deque()  # not let in yet, the oldest first
        self._arrived: deque[MockCall[Q, R]] = deque()  # let in, and not taken by next_request yet
        self._pending: dict[MockCall[Q, R], None] = {}  # let in, and not over; a dict for its order
        self._news: anyio.Event | None = None  # made by who waits, so no event loop is needed before

    # --- what comes in ---------------------------------------------------------------------------------------------

    async def next_request(self) -> MockCall[Q, R]:
        """Wait for the next call, in the order in which they came in.

        A call whose caller gave up before anyone looked comes too, since it was made; `MockCall.is_cancelled` says so.
        There is no limit in time: where a request may never come, put ``anyio.fail_after`` around it.

        Raises:
            ServiceClosed: if the handle is closed.
        """
        await anyio.lowlevel.checkpoint()
        while not self._arrived:
            if self._closed:
                raise _closed()
            if self._news is None:
                self._news = anyio.Event()
            await self._news.wait()
        return self._arrived.popleft()

    def next_request_nowait(self) -> MockCall[Q, R] | None:
        """The next call if there is one already, else None."""
        return self._arrived.popleft() if self._arrived else None

    async def expect(self, request: Q) -> MockCall[Q, R]:
        """Wait for the next call, and check that it asks for ``request``.

        Raises:
            AssertionError: if it asks for something else.
            ServiceClosed: if the handle is closed.
        """
        call = await self.next_request()
        if call.request != request:
            raise AssertionError(f"the next request is {call.request!r}, where {request!r} is expected")
        return call

    @property
    def calls(self) -> int:
        """How many calls came in, in all; one that `fail_next` was for never did."""
        return self._calls

    @property
    def pending(self) -> tuple[MockCall[Q, R], ...]:
        """The calls that came in and are waiting for an answer, taken or not, in the order in which they came in."""
        return tuple(self._pending)

    @property
    def waiting(self) -> int:
        """How many calls are not let in yet (see `allow`)."""
        return len(self._outside)

    # --- what is let in --------------------------------------------------------------------------------------------

    def allow(self, calls: int | None) -> None:
        """Let in so many calls from now on, those that wait first; the rest wait, and the service is not ready.

        It replaces what is left of an earlier number, as in Tower.

        Args:
            calls: how many; None for no limit.

        Raises:
            ValueError: if ``calls`` is negative.
        """
        self._left = _checked(calls)
        while self._outside and self._left != 0:
            self._let_in(self._outside.popleft())

    def fail_next(self, error: Exception) -> None:
        """Let the next call fail before it comes in: the oldest of those that wait to be let in, or one still to be
        made. Said several times, it is for as many calls.

        Once the handle is closed it does nothing.
        """
        if self._outside:
            self._outside.popleft().fail(error)
        elif not self._closed:
            self._failures.append(error)

    def close(self) -> None:
        """Close the service: calls that nobody has taken fail with `ServiceClosed`, and so do all later ones.

        A call that was taken stays to be answered. Closing again does nothing.
        """
        self._closed = True
        self._tell()
        for call in (*self._outside, *self._arrived):
            if not call.is_cancelled:
                call.fail(_closed())  # an error of its own for each
        self._outside.clear()
        self._arrived.clear()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Check that nothing is left to answer, unless the block has failed, and close.

        Raises:
            AssertionError: if there is a request without an answer. Its caller goes on waiting then, until it is
                cancelled: another error beside this one would only hide it.
        """
        self._closed = True
        self._tell()
        if kind is not None:
            return
        if self._pending or self._outside:
            # A caller that was cancelled just now has not noticed yet; two rounds of the loop are enough for that
            await anyio.lowlevel.checkpoint()
            await anyio.lowlevel.checkpoint()
        left = [call.request for call in (*self._pending, *self._outside)]
        if left:
            raise AssertionError(f"{len(left)} unanswered: {', '.join(map(repr, left))}")
        self.close()

    def __repr__(self) -> str:
        closed = ", closed" if self._closed else ""
        return f"<MockHandle, {len(self._pending)} pending, {len(self._outside)} waiting{closed}>"

    # --- the service's side ----------------------------------------------------------------------------------------

    @property
    def _is_open(self) -> bool:
        return self._closed or bool(self._failures) or (self._left != 0)

    def _admit(self, request: Q) -> MockCall[Q, R]:
        if self._closed:
            raise _closed()
        if self._failures:
            raise self._failures.popleft()
        call = MockCall(request, self)
        if self._left == 0:
            self._outside.append(call)
        else:
            self._let_in(call)
        return call

    def _let_in(self, call: MockCall[Q, R]) -> None:
        if self._left is not None:
            self._left -= 1
        self._calls += 1
        self._pending[call] = None
        self._arrived.append(call)
        self._tell()

    def _settle(self, call: MockCall[Q, R]) -> None:
        """The call is answered, perhaps before anyone took it."""
        self._pending.pop(call, None)
        if call in self._arrived:
            self._arrived.remove(call)

    def _forget(self, call: MockCall[Q, R]) -> None:
        """The caller gave up. What came in stays for `next_request`; what did not, never will."""
        self._pending.pop(call, None)
        if call in self._outside:
            self._outside.remove(call)

    def _tell(self) -> None:
        if self._news is not None:
            self._news.set()
            self._news = None


@overload
def mock_pair(*, allow: int | None = None) -> tuple[MockService[Any, Any], MockHandle[Any, Any]]: ...


@overload
def mock_pair(
    request: type[Q], response: type[R], /, *, allow: int | None = None
) -> tuple[MockService[Q, R], MockHandle[Q, R]]: ...


def mock_pair(
    request: Any = None, response: Any = None, /, *, allow: int | None = None
) -> tuple[MockService[Any, Any], MockHandle[Any, Any]]:
    """A service, and a handle that sees its requests and gives its answers: Tower's ``mock::pair()``.

    Use it on either event loop, from one of its tasks. Any number of calls may wait at once, and they may be answered
    in any order.

    Args:
        request: the type of the requests, for type checkers only; without it and ``response`` they are ``Any``.
        response: the type of the responses.
        allow: how many calls are let in (see `MockHandle.allow`); None for no limit, which is Tower's default too.

    Raises:
        ValueError: if ``allow`` is negative.

    >>> service, handle = mock_pair(str, str, allow=0)
    >>> service.ready_now()
    False
    >>> handle.allow(1)
    >>> service.ready_now()
    True
    """
    handle: MockHandle[Any, Any] = MockHandle(allow=allow)
    return MockService(handle), handle


def _checked(calls: int | None) -> int | None:
    if calls is not None and calls < 0:
        raise ValueError(f"{calls} calls are allowed, where 0 or more is expected")
    return calls


def _closed() -> ServiceClosed:
    return ServiceClosed("the mock is closed")
