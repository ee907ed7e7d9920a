"""Change what passes by, with a function: `map_request`, `map_response`, `map_error` and `then`.

Each of these makes a layer from a function; the first two and `then` may change types, and checkers follow. What a
function raises goes to the caller as it is.

For more than that no helper is needed: a plain function from Service to Service is a layer already, where Tower has its
``layer_fn``:

>>> from towline.service import Service
>>> def twice(inner: Service[int, int], /) -> Service[int, int]:
...     async def call(request: int, /) -> int:
...         return await inner(request) + await inner(request)
...     return call
>>> async def echo(request: int, /) -> int:
...     return request
>>> import anyio
>>> anyio.run(twice(echo), 21)
42
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeGuard, TypeVar, overload

from towline.service import Service, Wrapper

__all__ = ["RequestLayer", "ResponseLayer", "map_error", "map_request", "map_response", "then"]

Q = TypeVar("Q")
Q2 = TypeVar("Q2")
R = TypeVar("R")
R2 = TypeVar("R2")
Outer_Q = TypeVar("Outer_Q", contravariant=True)
Inner_Q = TypeVar("Inner_Q", covariant=True)
Inner_R = TypeVar("Inner_R", contravariant=True)
Outer_R = TypeVar("Outer_R", covariant=True)


# A checker cannot turn "any R, from Service[Q, R] to Service[Q2, R]" around, which it would have to in order to know
# from the outside of a layer what must be inside it. So layers that change one type say by their class which.


class RequestLayer(ABC, Generic[Outer_Q, Inner_Q]):
    """A layer that changes the type of requests and of nothing else: the caller's, and that of the service inside."""

    __slots__ = ()

    client_only: ClassVar[bool] = False

    @abstractmethod
    def __call__(self: RequestLayer[Q2, Q], inner: Service[Q, R], /) -> Wrapper[Q2, R]:
        """Wrap a service."""


class ResponseLayer(ABC, Generic[Inner_R, Outer_R]):
    """A layer that changes the type of responses and of nothing else: that of the service inside, and the caller's."""

    __slots__ = ()

    client_only: ClassVar[bool] = False

    @abstractmethod
    def __call__(self: ResponseLayer[R, R2], inner: Service[Q, R], /) -> Wrapper[Q, R2]:
        """Wrap a service."""


# --- from functions ------------------------------------------------------------------------------------------------


@overload
def map_request(function: Callable[[Q2], Awaitable[Q]], /) -> RequestLayer[Q2, Q]: ...
@overload
def map_request(function: Callable[[Q2], Q], /) -> RequestLayer[Q2, Q]: ...
def map_request(function: Callable[[Any], Any], /) -> RequestLayer[Any, Any]:
    """A layer that calls the service inside it with ``function(request)``.

    In a Retry it is done for every attempt; around one, once for them all.

    Args:
        function: makes the request for the service inside from the caller's. It may be async: what can be awaited is.

    Raises:
        TypeError: if ``function`` is no function.

    >>> async def double(request: int, /) -> int:
    ...     return 2 * request
    >>> map_request(int)(double)
    <MappedRequest around double>
    >>> import anyio
    >>> anyio.run(map_request(int)(double), "21")
    42
    """
    return _MapRequest(_function("map_request", function))


@overload
def map_response(function: Callable[[R], Awaitable[R2]], /) -> ResponseLayer[R, R2]: ...
@overload
def map_response(function: Callable[[R], R2], /) -> ResponseLayer[R, R2]: ...
def map_response(function: Callable[[Any], Any], /) -> ResponseLayer[Any, Any]:
    """A layer that answers with ``function(response)``.

    A function may raise instead, to make an error of a response; a Retry further out then sees it. With an async
    function it is Tower's ``and_then``.

    Args:
        function: makes the caller's response from that of the service inside. It may be async: what can be awaited is.

    Raises:
        TypeError: if ``function`` is no function.

    >>> async def double(request: int, /) -> int:
    ...     return 2 * request
    >>> import anyio
    >>> anyio.run(map_response(hex)(double), 21)
    '0x2a'
    """
    return _MapResponse(_function("map_response", function))


def map_error(function: Callable[[Exception], Exception], /) -> _MapError:
    """A layer that raises ``function(error)`` where the service inside raises ``error``, with that one as its cause.

    Cancellation is no error and is not asked about. Towards a Retry further out, the new error speaks for the call:
    its ``retryable``, ``retry_after`` and ``sent``.

    Args:
        function: makes the caller's error from that of the service inside; the one it got, to leave it as it is.

    Raises:
        TypeError: if ``function`` is no function.

    >>> async def broken(request: str, /) -> str:
    ...     raise KeyError(request)
    >>> def as_lookup(error: Exception) -> Exception:
    ...     return LookupError("not here") if isinstance(error, KeyError) else error
    >>> import anyio
    >>> anyio.run(map_error(as_lookup)(broken), "hello")
    Traceback (most recent call last):
    ...
    LookupError: not here
    """
    return _MapError(_function("map_error", function))


@overload
def then(
    on_response: Callable[[R], Awaitable[R2]], on_error: Callable[[Exception], Awaitable[R2]], /
) -> ResponseLayer[R, R2]: ...
@overload
def then(on_response: Callable[[R], Awaitable[R2]], on_error: Callable[[Exception], R2], /) -> ResponseLayer[R, R2]: ...
@overload
def then(on_response: Callable[[R], R2], on_error: Callable[[Exception], Awaitable[R2]], /) -> ResponseLayer[R, R2]: ...
@overload
def then(on_response: Callable[[R], R2], on_error: Callable[[Exception], R2], /) -> ResponseLayer[R, R2]: ...
def then(on_response: Callable[[Any], Any], on_error: Callable[[Exception], Any], /) -> ResponseLayer[Any, Any]:
    """A layer that makes the outcome from the one inside, whichever it is: both functions give a response, or raise.

    Only one of them is called: what ``on_response`` raises does not go to ``on_error``. An error that ``on_error``
    raises has the one that it got as its context. Cancellation goes to neither.

    Args:
        on_response: gets the response. It may be async: what can be awaited is.
        on_error: gets the error. It may be async, too.

    Raises:
        TypeError: if one of the two is no function.

    >>> async def parse(request: str, /) -> int:
    ...     return int(request)
    >>> told = then(lambda number: f"{number} it is", lambda error: f"not a number: {error}")
    >>> import anyio
    >>> anyio.run(told(parse), "42"), anyio.run(told(parse), "x")
    ('42 it is', "not a number: invalid literal for int() with base 10: 'x'")
    """
    return _Then(_function("then", on_response), _function("then", on_error))


# --- as layers -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, repr=False)
class _MapRequest(RequestLayer[Any, Any]):
    function: Callable[[Any], Any]

    def __call__(self, inner: Service[Any, R], /) -> Wrapper[Any, R]:
        return _MappedRequest(inner, self.function)

    def __repr__(self) -> str:
        return f"map_request({_name(self.function)})"


class _MappedRequest(Wrapper[Any, R]):
    __slots__ = ("_function",)

    def __init__(self, inner: Service[Any, R], function: Callable[[Any], Any]) -> None:
        super().__init__(inner)
        self._function = function

    async def __call__(self, request: Any, /) -> R:
        mapped = self._function(request)
        if _is_awaitable(mapped):
            mapped = await mapped
        response: R = await self.inner(mapped)
        return response


@dataclass(frozen=True, slots=True, repr=False)
class _MapResponse(ResponseLayer[Any, Any]):
    function: Callable[[Any], Any]

    def __call__(self, inner: Service[Q, Any], /) -> Wrapper[Q, Any]:
        return _MappedResponse(inner, self.function)

    def __repr__(self) -> str:
        return f"map_response({_name(self.function)})"


class _MappedResponse(Wrapper[Q, Any]):
    __slots__ = ("_function",)

    def __init__(self, inner: Service[Q, Any], function: Callable[[Any], Any]) -> None:
        super().__init__(inner)
        self._function = function

    async def __call__(self, request: Q, /) -> Any:
        mapped = self._function(await self.inner(request))
        return await mapped if _is_awaitable(mapped) else mapped


@dataclass(frozen=True, slots=True, repr=False)
class _MapError:
    client_only: ClassVar[bool] = False

    function: Callable[[Exception], Exception]

    def __call__(self, inner: Service[Q, R], /) -> Wrapper[Q, R]:
        return _MappedError(inner, self.function)

    def __repr__(self) -> str:
        return f"map_error({_name(self.function)})"


class _MappedError(Wrapper[Q, R]):
    __slots__ = ("_function",)

    def __init__(self, inner: Service[Q, R], function: Callable[[Exception], Exception]) -> None:
        super().__init__(inner)
        self._function = function

    async def __call__(self, request: Q, /) -> R:
        try:
            response: R = await self.inner(request)
            return response
        except Exception as error:
            mapped = self._function(error)
            if mapped is error:
                del mapped  # as below
                raise
            try:
                raise mapped from error
            finally:
                del mapped  # or this frame, which the error now holds, would hold the error


@dataclass(frozen=True, slots=True, repr=False)
class _Then(ResponseLayer[Any, Any]):
    on_response: Callable[[Any], Any]
    on_error: Callable[[Exception], Any]

    def __call__(self, inner: Service[Q, Any], /) -> Wrapper[Q, Any]:
        return _MappedOutcome(inner, self.on_response, self.on_error)

    def __repr__(self) -> str:
        return f"then({_name(self.on_response)}, {_name(self.on_error)})"


class _MappedOutcome(Wrapper[Q, Any]):
    __slots__ = ("_on_error", "_on_response")

    def __init__(
        self, inner: Service[Q, Any], on_response: Callable[[Any], Any], on_error: Callable[[Exception], Any]
    ) -> None:
        super().__init__(inner)
        self._on_response = on_response
        self._on_error = on_error

    async def __call__(self, request: Q, /) -> Any:
        try:
            response = await self.inner(request)
        except Exception as error:
            return await _resolved(self._on_error(error))
        mapped = self._on_response(response)
        return await mapped if _is_awaitable(mapped) else mapped


def _is_awaitable(value: object) -> TypeGuard[Awaitable[Any]]:
    # What counts is the type, as for await itself: a response may be a class, which has the methods of its instances.
    # The value is asked first, since for a value without it (and only for one) that takes next to no time.
    return hasattr(value, "__await__") and hasattr(type(value), "__await__")


async def _resolved(value: Any) -> Any:
    """``value``, awaited if it can be. For what may hold an error whose frames must not hold it."""
    return await value if _is_awaitable(value) else value


F = TypeVar("F", bound=Callable[..., object])


def _function(name: str, function: F) -> F:
    if not callable(function):
        raise TypeError(f"{name} takes a function, not {function!r}")
    return function


def _name(function: Callable[..., object]) -> str:
    return getattr(function, "__name__", None) or repr(function)
