"""Answer all the same when the service fails: `Fallback`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar, overload

from towline.layers.map import _name, _resolved
from towline.policies.classify import Errors, matcher
from towline.service import Service, Wrapper, running

__all__ = ["Fallback"]

Q = TypeVar("Q")
R = TypeVar("R")
V = TypeVar("V")
Answered = TypeVar("Answered", covariant=True)


@dataclass(frozen=True, slots=True, repr=False)
class Fallback(Generic[Answered]):
    """Layer: where the service inside raises one of the errors ``on``, the caller gets an answer from elsewhere.

    Made by `Fallback.value`, `Fallback.call` and `Fallback.service`, by where the answer is from. It needs nothing from
    the layer inside it, and promises a response of its kind or of the fallback's. Put it outermost, at least outside
    Retry and CircuitBreaker, whose last word it replaces; inside them it would make a success of every failure.

    ``on`` has no default: a fallback for every error also hides the mistakes in one's own code, so that must be said,
    with ``on=Exception``. What is no ``Exception``, such as a cancellation, is never answered.

    If the fallback fails too, the caller gets its error, and the first one as the ``__context__`` of that.

    Attributes:
        answer: makes the answer from the request and the error; what can be awaited is.
        on: the errors that are answered, as `Errors`; an ExceptionGroup matches when all its leaves do.

    >>> import anyio
    >>> async def broken(request: str, /) -> int:
    ...     raise ConnectionResetError(request)
    >>> anyio.run(Fallback.value(0, on=ConnectionError)(broken), "how many?")
    0
    >>> async def cache(request: str, /) -> int:
    ...     return len(request)
    >>> Fallback.service(cache, on=ConnectionError)
    Fallback.service(cache, on=ConnectionError)
    >>> anyio.run(Fallback.service(cache, on=ConnectionError)(broken), "how many?")
    9
    """

    client_only: ClassVar[bool] = False

    answer: Callable[[Any, Exception], Answered | Awaitable[Answered]]  # Any: the user knows the type
    on: Errors = field(kw_only=True)

    _matches: Callable[[Exception], bool] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        if not callable(self.answer):
            raise TypeError(f"Fallback.call takes a function of the request and the error, not {self.answer!r}")
        object.__setattr__(self, "_matches", matcher(self.on))

    @staticmethod
    def value(value: V, *, on: Errors) -> Fallback[V]:
        """Answer with ``value``: the same object each time, so let it be immutable.

        Raises:
            TypeError: if ``on`` names no class of exceptions.
        """
        return Fallback(_Value(value), on=on)

    @overload
    @staticmethod
    def call(function: Callable[[Any, Exception], Awaitable[V]], *, on: Errors) -> Fallback[V]: ...
    @overload
    @staticmethod
    def call(function: Callable[[Any, Exception], V], *, on: Errors) -> Fallback[V]: ...
    @staticmethod
    def call(function: Callable[[Any, Exception], Any], *, on: Errors) -> Fallback[Any]:
        """Answer with ``function(request, error)``, awaited if it can be. It may raise, to change the error.

        Raises:
            TypeError: if ``function`` is no function, or ``on`` names no class of exceptions.
        """
        return Fallback(function, on=on)

    @staticmethod
    def service(other: Service[Any, V], *, on: Errors) -> Fallback[V]:
        """Answer with what another service answers to the same request: a cache, or another data centre.

        It is entered and left together with the service that this layer makes, so it must not be entered elsewhere,
        nor be given to a layer around two services that are. For one that lives on its own use `Fallback.call`.

        Raises:
            TypeError: if ``other`` cannot be called, or ``on`` names no class of exceptions.
        """
        if not callable(other):
            raise TypeError(f"Fallback.service takes a service, not {other!r}")
        return Fallback(_Other(other), on=on)

    def __call__(self, inner: Service[Q, R], /) -> Wrapper[Q, R | Answered]:
        return _FallingBack(inner, self)

    def __repr__(self) -> str:
        made_by = f"{self.answer!r}" if isinstance(self.answer, _Value | _Other) else f"call({_name(self.answer)}"
        return f"Fallback.{made_by}, on={_errors(self.on)})"


@dataclass(frozen=True, slots=True, repr=False)
class _Value:
    value: Any

    def __call__(self, request: object, error: Exception, /) -> Any:
        return self.value

    def __repr__(self) -> str:
        return f"value({self.value!r}"


@dataclass(frozen=True, slots=True, repr=False)
class _Other:
    service: Service[Any, Any]

    def __call__(self, request: Any, error: Exception, /) -> Awaitable[Any]:
        return self.service(request)

    def __repr__(self) -> str:
        return f"service({_name(self.service)}"


class _FallingBack(Wrapper[Q, Any]):
    """A service with a fallback."""

    __slots__ = ("_answer", "_matches")

    def __init__(self, inner: Service[Q, Any], layer: Fallback[Any]) -> None:
        super().__init__(inner)
        self._answer = layer.answer
        self._matches = layer._matches

    def _running(self) -> AbstractAsyncContextManager[object] | None:
        return running(self._answer.service) if isinstance(self._answer, _Other) else None

    async def __call__(self, request: Q, /) -> Any:
        try:
            return await self.inner(request)
        except Exception as error:
            if not self._matches(error):
                raise
            # Still within the except clause: an error of the fallback has this one as its context
            return await _resolved(self._answer(request, error))


def _errors(on: Errors) -> str:
    classes: Any = on  # a tuple of them, once isinstance says so; it would lose their type
    return f"({', '.join(map(_name, classes))})" if isinstance(on, tuple) else _name(on)
