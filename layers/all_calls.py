"""Ask a service for every request of a stream, several at a time: `call_all`."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from types import TracebackType
from typing import Any, Generic, Literal, Self, TypeVar, cast, overload

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup

from towline.errors import MisuseError
from towline.service import Service

__all__ = ["CallAll", "call_all"]

Q = TypeVar("Q")
R = TypeVar("R")


@overload
def call_all(
    service: Service[Q, R],
    requests: Iterable[Q] | AsyncIterable[Q],
    /,
    *,
    ordered: bool = True,
    concurrency: int = 10,
    return_errors: Literal[False] = False,
) -> CallAll[R]: ...
@overload
def call_all(
    service: Service[Q, R],
    requests: Iterable[Q] | AsyncIterable[Q],
    /,
    *,
    ordered: bool = True,
    concurrency: int = 10,
    return_errors: bool,
) -> CallAll[R | Exception]: ...
def call_all(
    service: Service[Q, Any],
    requests: Iterable[Q] | AsyncIterable[Q],
    /,
    *,
    ordered: bool = True,
    concurrency: int = 10,
    return_errors: bool = False,
) -> CallAll[Any]:
    """Call ``service`` with each of ``requests``, and iterate over the responses.

    It is used as ``async with call_all(...) as responses:``, and inside it ``async for``. Leaving the block, however
    that comes, cancels the calls that are still running and waits for their end.

    **Back-pressure.** At most ``concurrency`` requests are under way, from being pulled out of ``requests`` to the
    moment when their response is taken. So when responses are taken slowly, requests are pulled as slowly, and memory
    stays bounded. A request is pulled first, and only then is the service called: while ``requests`` has none to give,
    nothing of the service is held. Calls begin in the order of the requests, whatever the order of the responses.

    **Errors.** The error of a call is raised in the place of its response, as it is. ``async for`` ends by that, and
    leaving the block cancels the rest. To have all responses, whatever fails, use ``return_errors``; they then come as
    values. (One may also ask on: after an error ``anext(responses)`` gives the next response.) An error of ``requests``
    itself ends the iteration: it is raised after the responses to all requests before it, in any case.

    The service is not entered (see `running`): it may have other callers. ``requests`` is iterated in a task of its
    own, where it is cancelled with the rest, and it is not closed.

    Args:
        service: what to call.
        requests: what to call it with; may be endless.
        ordered: whether responses come in the order of the requests, so that a slow call holds up those after it, or
            in the order in which they are there.
        concurrency: how many requests may be under way; 1 for one after the other. The default is modest, as it is
            somebody else's service.
        return_errors: whether the error of a call is a value of the iteration, in the place of its response.

    Raises:
        ValueError: if ``concurrency`` is below 1.
        TypeError: if ``requests`` cannot be iterated over.

    >>> async def double(request: int, /) -> int:
    ...     await anyio.sleep(0.001 * (3 - request))
    ...     return 2 * request
    >>> async def main(ordered: bool) -> list[int]:
    ...     async with call_all(double, [1, 2, 3], ordered=ordered) as responses:
    ...         return [response async for response in responses]
    >>> anyio.run(main, True)
    [2, 4, 6]
    """
    return CallAll(service, requests, ordered, concurrency, return_errors)


class _Place:
    """Where the outcome of one call goes."""

    __slots__ = ("error", "is_filled", "response")

    def __init__(self) -> None:
        self.is_filled = False
        self.error: Exception | None = None
        self.response: Any = None  # Any: an R once it is filled and there is no error


class CallAll(Generic[R]):
    """The responses to many requests, as they come: what `call_all` makes, to be entered and iterated over once.

    Waiting for the next response may be cancelled, and begun again; nothing is lost by it.
    """

    # A class and no generator: a task group must not stay open across a yield (PEP 789), for a generator may be left
    # without being closed, and be finished in another task.

    __slots__ = (
        "_concurrency",
        "_is_exhausted",
        "_is_ordered",
        "_news",
        "_places",
        "_requests",
        "_return_errors",
        "_room",
        "_service",
        "_source_error",
        "_tasks",
        "_under_way",
    )

    def __init__(
        self,
        service: Service[Any, Any],
        requests: Iterable[Any] | AsyncIterable[Any],
        ordered: bool,
        concurrency: int,
        return_errors: bool,
    ) -> None:
        if not concurrency >= 1:  # NaN is not
            raise ValueError(f"concurrency is {concurrency}, where 1 or more is expected")
        if not hasattr(requests, "__aiter__") and not hasattr(requests, "__iter__"):
            raise TypeError(f"call_all takes the requests as an iterable, not {requests!r}")
        self._service = service
        self._requests = requests
        self._is_ordered = ordered
        self._concurrency = concurrency
        self._return_errors = return_errors
        self._tasks: TaskGroup | None = None
        # Ordered: a place for each request under way, some of them filled. Unordered: places join when they are filled.
        self._places: deque[_Place] = deque()
        self._under_way = 0
        self._is_exhausted = False
        self._source_error: Exception | None = None
        self._news: anyio.Event | None = None  # made by who waits: for the first place to be filled, or the end
        self._room: anyio.Event | None = None  # likewise, by the one task that pulls: for fewer under way

    async def __aenter__(self) -> Self:
        """Begin to pull requests and to call.

        Raises:
            MisuseError: if it was entered before.
        """
        if self._tasks is not None:
            raise MisuseError("call_all is used once: make another for another round")
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        self._tasks.start_soon(self._pull, self._tasks)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Cancel what is still running, and wait for its end."""
        tasks = self._tasks
        assert tasks is not None
        self._is_exhausted = True
        try:
            # Whatever has ended the block is the block's own, and goes on by itself: the task group would make an
            # ExceptionGroup of it
            tasks.cancel_scope.cancel()
            await tasks.__aexit__(None, None, None)
        finally:
            for place in self._places:
                place.error = None  # an error holds the frames that hold its place
            self._places.clear()
            self._source_error = None
            self._under_way = 0
            self._tell()

    def __aiter__(self) -> AsyncIterator[R]:
        return self

    async def __anext__(self) -> R:
        """The next response.

        Raises:
            Exception: what the call raised, in the place of its response; or what ``requests`` raised, at the end.
            MisuseError: if it is not entered.
        """
        if self._tasks is None:
            raise MisuseError("call_all is used as: async with call_all(...) as responses")
        while not (self._places and self._places[0].is_filled):
            if self._is_exhausted and not self._under_way:
                failure, self._source_error = self._source_error, None
                if failure is None:
                    raise StopAsyncIteration
                try:
                    raise failure
                finally:
                    del failure  # or this frame, which the error now holds, would hold the error
            if self._news is None:
                self._news = anyio.Event()
            await self._news.wait()
        place = self._places.popleft()
        self._under_way -= 1
        if self._room is not None:
            self._room.set()
            self._room = None
        error, place.error = place.error, None
        if error is None or self._return_errors:
            outcome: R = place.response if error is None else cast(R, error)  # an R may be an error then: see call_all
            return outcome
        try:
            if isinstance(error, StopAsyncIteration):  # it would end the iteration as if nothing had happened
                raise RuntimeError("a call raised StopAsyncIteration") from error
            raise error
        finally:
            del error

    async def _pull(self, tasks: TaskGroup) -> None:
        """Pull requests and start their calls."""
        try:
            requests = aiter(self._requests) if isinstance(self._requests, AsyncIterable) else _Async(self._requests)
            while True:
                while self._under_way >= self._concurrency:
                    self._room = anyio.Event()
                    await self._room.wait()
                try:
                    request = await anext(requests)
                except StopAsyncIteration:
                    break
                place = _Place()
                self._under_way += 1
                if self._is_ordered:
                    self._places.append(place)
                tasks.start_soon(self._call, request, place)
                del request, place  # what waits for the next request holds nothing of the last
                # Let it begin before the next one is started: trio runs what is ready in any order
                await anyio.lowlevel.checkpoint()
        except Exception as error:
            self._source_error = error
        self._is_exhausted = True
        self._tell()

    async def _call(self, request: Any, place: _Place) -> None:
        try:
            place.response = await self._service(request)
        except Exception as error:
            place.error = error
        place.is_filled = True
        if not self._is_ordered:
            self._places.append(place)
        self._tell()

    def _tell(self) -> None:
        if self._news is not None:
            self._news.set()
            self._news = None


class _Async(AsyncIterator[Q]):
    """What a plain iterable gives, for a loop that awaits."""

    def __init__(self, plain: Iterable[Q]) -> None:
        self._plain: Iterator[Q] = iter(plain)

    async def __anext__(self) -> Q:
        try:
            return next(self._plain)
        except StopIteration:
            raise StopAsyncIteration from None
