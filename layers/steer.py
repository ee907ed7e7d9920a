"""One service made of several: `Steer`, where the request says which of them answers it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Generic, Self, TypeAlias, TypeVar

from towline.errors import MisuseError
from towline.service import Service, load, ready_now, refuses_now, running

__all__ = ["Pick", "Steer"]

Q = TypeVar("Q")
R = TypeVar("R")

Pick: TypeAlias = Callable[[Q, Sequence[Service[Q, R]]], int]
"""Says by its index which of the services is to answer a request."""


class Steer(Generic[Q, R]):
    """A service of several: ``pick`` chooses the one that answers a request.

    For services that are *not* alike: shards by key, a large and a small model, reads and writes. For services of which
    each will do, take a `Balance`. It may stand wherever a service may: inside a Retry, which asks ``pick`` again for
    every attempt, and around services that have layers of their own.

    A call waits for the service that was picked and for no other. Only the hint `ready_now` cannot know what will be
    picked, so it holds for all: put a `Buffer` into each service if one that is busy shall not speak for the others.

    To enter a Steer (``async with``, or `towline.service.running`) enters the services inside, in their order, and
    leaves them in the reverse one. Where none of them owns a task, it need not be entered.

    Args:
        services: the services, in the order in which ``pick`` counts them.
        pick: is called with a request and the services, and answers with an index. What it raises, the caller gets.

    Raises:
        ValueError: if there are no services.

    >>> import anyio
    >>> async def even(request: int, /) -> str:
    ...     return f"{request} is even"
    >>> async def odd(request: int, /) -> str:
    ...     return f"{request} is odd"
    >>> parity = Steer([even, odd], lambda request, services: request % 2)
    >>> anyio.run(parity, 7)
    '7 is odd'
    """

    __slots__ = ("_exit", "_pick", "services")

    services: tuple[Service[Q, R], ...]

    def __init__(self, services: Sequence[Service[Q, R]], pick: Pick[Q, R]) -> None:
        self.services = tuple(services)
        if not self.services:
            raise ValueError("Steer got 0 services, where 1 or more is expected")
        self._pick = pick
        self._exit: AsyncExitStack | None = None

    async def __call__(self, request: Q, /) -> R:
        """Let the service that is picked answer.

        Raises:
            MisuseError: if ``pick`` answers with what is no index of a service. Those below 0 are none.
        """
        services = self.services
        index = self._pick(request, services)
        try:
            if index < 0:
                raise IndexError
            service = services[index]
        except (IndexError, TypeError):
            raise MisuseError(f"pick chose {index!r}, where 0 to {len(services) - 1} is expected") from None
        return await service(request)

    def ready_now(self) -> bool:
        """Whether all of the services would probably begin a call without waiting. A hint."""
        return all(map(ready_now, self.services))

    def refuses_now(self) -> bool:
        """Whether all of the services would turn a call away. A hint."""
        return all(map(refuses_now, self.services))

    def load(self) -> float:
        """The load of the busiest service, as nobody knows which will be picked. A hint."""
        return max(map(load, self.services))

    async def __aenter__(self) -> Self:
        """Enter the services inside.

        Raises:
            MisuseError: if it is entered already.
        """
        if self._exit is not None:
            raise MisuseError(f"{self!r} is entered already")
        async with AsyncExitStack() as entered:
            for service in self.services:
                await entered.enter_async_context(running(service))
            self._exit = entered.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        """Leave the services inside, the last first."""
        assert self._exit is not None
        entered, self._exit = self._exit, None
        return await entered.__aexit__(kind, error, traceback)

    def __repr__(self) -> str:
        names = ", ".join(getattr(service, "__name__", None) or repr(service) for service in self.services)
        return f"<Steer between {names}>"
