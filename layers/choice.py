"""Which service, or which layer, if any: `identity`, `optional_layer`, `Optional`, `Either` and `Shared`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, overload

from towline.errors import ServiceUnavailable
from towline.layers.map import _name
from towline.service import Layer, Service, Wrapper, load, ready_now, refuses_now, running
from towline.text import differing

__all__ = ["Either", "Optional", "Shared", "identity", "optional_layer"]

Q = TypeVar("Q")
R = TypeVar("R")


def identity(inner: Service[Q, R], /) -> Service[Q, R]:
    """The layer that does nothing: what it makes of a service is that service.

    >>> async def echo(request: str, /) -> str:
    ...     return request
    >>> identity(echo) is echo
    True
    """
    return inner


@overload
def optional_layer(layer: Layer | None, /) -> Layer: ...
@overload
def optional_layer(
    layer: Callable[[Service[Q, R]], Service[Q, R]] | None, /
) -> Callable[[Service[Q, R]], Service[Q, R]]: ...
def optional_layer(layer: Any, /) -> Any:
    """``layer`` itself, or `identity` for None: for a setting that leaves a layer out.

    Since it may be left out, it must be one that changes no type.

    >>> from towline.layers.timeout import Timeout
    >>> optional_layer(Timeout(5))
    Timeout(seconds=5)
    >>> optional_layer(None) is identity
    True
    """
    return identity if layer is None else layer


async def nothing(request: object, /) -> Any:
    raise ServiceUnavailable("there is no service here")


class Optional(Wrapper[Q, R]):
    """A service that may not be there: without one every call raises `ServiceUnavailable`, at once.

    So it never makes a caller wait, and says that it is ready.

    Args:
        service: the service, or None.

    >>> import anyio
    >>> anyio.run(Optional(None), "hello")
    Traceback (most recent call last):
    ...
    towline.errors.ServiceUnavailable: there is no service here
    """

    __slots__ = ()

    def __init__(self, service: Service[Q, R] | None) -> None:
        super().__init__(nothing if service is None else service)

    async def __call__(self, request: Q, /) -> R:
        """Answer a request, if there is a service to do so.

        Raises:
            ServiceUnavailable: if there is none.
        """
        response: R = await self.inner(request)
        return response

    def refuses_now(self) -> bool:
        """Whether there is no service, or it refuses."""
        return self.inner is nothing or super().refuses_now()


@dataclass(frozen=True, slots=True)
class Either:
    """Layer: some requests go through one layer, the others through another, and all to the one service inside.

    Such as a Retry for what only reads. Both layers are put around the service, each with state of its own; the service
    itself is entered once. Needs nothing of its own from the service, and promises what the layers do. Being ready
    means that both sides are, since nobody knows yet which request will come.

    Attributes:
        when: says of a request whether it goes through ``left``. What it raises goes to the caller. (Its argument is
            not checked against the type of the requests, as with `Filter`.)
        left: the layer for requests of which ``when`` is true. Neither it nor ``right`` may change a type.
        right: the layer for the others; None for no layer.

    Raises:
        TypeError: if one of the three cannot be called.

    >>> import anyio
    >>> from towline.layers.timeout import Timeout
    >>> async def slow(request: str, /) -> str:
    ...     await anyio.sleep(0.02)
    ...     return request
    >>> impatient = Either(lambda request: request.startswith("GET"), Timeout(0.01))(slow)
    >>> anyio.run(impatient, "PUT /")
    'PUT /'
    >>> anyio.run(impatient, "GET /")
    Traceback (most recent call last):
    ...
    towline.errors.Elapsed: no response within 0.01 s
    """

    when: Callable[[Any], bool]  # Any: the user knows the type
    left: Callable[[Service[Any, Any]], Service[Any, Any]]  # or a Layer for one type of requests would not be one
    right: Callable[[Service[Any, Any]], Service[Any, Any]] | None = None

    __repr__ = differing

    def __post_init__(self) -> None:
        for name, value in (("when", self.when), ("left", self.left), ("right", optional_layer(self.right))):
            if not callable(value):
                raise TypeError(f"{name} of Either is {value!r}, which cannot be called")

    @property
    def client_only(self) -> bool:
        """Whether a stack that serves leaves this out: it does if one of the two sides is for the dialling end only."""
        return any(getattr(side, "client_only", False) for side in (self.left, self.right))

    def __call__(self, inner: Service[Q, R], /) -> Wrapper[Q, R]:
        return _Choosing(inner, self)


class _Choosing(Wrapper[Q, R]):
    """A service with two ways to it."""

    __slots__ = ("_left", "_right", "_when")

    def __init__(self, inner: Service[Q, R], layer: Either) -> None:
        super().__init__(inner)
        self._when = layer.when
        lent = _lent(inner)  # or each side would enter it
        self._left = layer.left(lent)
        self._right = lent if layer.right is None else layer.right(lent)

    async def __call__(self, request: Q, /) -> R:
        return await (self._left if self._when(request) else self._right)(request)

    def ready_now(self) -> bool:
        return ready_now(self._left) and ready_now(self._right)

    def refuses_now(self) -> bool:
        return refuses_now(self._left) and refuses_now(self._right)

    def load(self) -> float:
        return max(load(self._left), load(self._right))

    def _running(self) -> AbstractAsyncContextManager[object]:
        return _both(self._left, self._right)

    def __repr__(self) -> str:
        return f"<Either {_name(self._left)} or {_name(self._right)}>"


@asynccontextmanager
async def _both(left: Service[Q, R], right: Service[Q, R]) -> AsyncGenerator[None]:
    async with running(left), running(right):
        yield


class Shared(Wrapper[Any, Service[Q, R]]):
    """One service for every target: what a connector is to connections, around a service that exists already.

    For whatever wants to make its services, such as a balancer or a reconnecting layer, and for tests of it. Tower's
    ``Shared`` clones the service each time; here services are shared as they are. The service lives as long as this:
    entering and leaving what it gives out does nothing.

    Args:
        service: what every call answers with.

    >>> import anyio
    >>> async def echo(request: str, /) -> str:
    ...     return request
    >>> anyio.run(Shared(echo), "tcp://localhost:7000") is echo
    True
    """

    __slots__ = ("_given_out",)

    def __init__(self, service: Service[Q, R]) -> None:
        super().__init__(service)
        self._given_out = _lent(service)

    async def __call__(self, target: object, /) -> Service[Q, R]:
        """The service, whatever the target."""
        given_out: Service[Q, R] = self._given_out
        return given_out

    def ready_now(self) -> bool:
        """Always: there is nothing to make."""
        return True

    def load(self) -> float:
        """Nothing, however busy the service is."""
        return 0.0


class _Lent:
    """A service whose lifetime is somebody else's: it can be called, and looked at, and not be entered."""

    __slots__ = ("inner",)

    def __init__(self, inner: Service[Any, Any]) -> None:
        self.inner = inner

    def __call__(self, request: Any, /) -> Coroutine[Any, Any, Any]:
        return self.inner(request)

    def ready_now(self) -> bool:
        return ready_now(self.inner)

    def refuses_now(self) -> bool:
        return refuses_now(self.inner)

    def load(self) -> float:
        return load(self.inner)

    def __repr__(self) -> str:
        return _name(self.inner)


def _lent(service: Service[Q, R]) -> Service[Q, R]:
    lent: Any = _Lent(service)  # a Service, but for the type of the coroutine, which it only passes on
    return lent if hasattr(service, "__aenter__") else service
