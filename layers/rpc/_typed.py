"""A call with types: one method as a layer on either side of it."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

from towline.errors import CallFailed, MisuseError, StatusCode
from towline.service import Service, Wrapper

from ._codec import JSON, Codec, Coder, DecodeError, coder_of
from ._messages import Request, Response

__all__ = ["Typed", "answered", "answering", "asked", "current_request"]

Q = TypeVar("Q")
R = TypeVar("R")

answering: ContextVar[Request] = ContextVar("towline_request")
"""Set for as long as a call is answered, and no longer: the next call of the same worker must not see it."""


def current_request() -> Request:
    """The call that is being answered: its metadata, and its ``peer`` to call back. For the code of a typed handler.

    Raises:
        MisuseError: if none is: here nobody is called by `Typed` or by a `router`.

    >>> current_request()
    Traceback (most recent call last):
    ...
    towline.errors.MisuseError: no call is being answered here
    """
    request = answering.get(None)
    if request is None:
        raise MisuseError("no call is being answered here")
    return request


@dataclass(frozen=True, slots=True)
class Typed(Generic[Q, R]):
    """Layer: one method with types, around a call. By `answered_by`, around what answers it, on the other side.

    Args:
        method: its name.
        request: the type of what it takes: a pydantic model, a dataclass, a struct of msgspec's, or any other that the
            codec knows. None travels as no bytes, and bytes as they are.
        response: the type of what it gives.
        codec: how both travel, `JsonCodec` by default. The other end must use the same.

    Raises:
        TypeError: if the codec cannot carry one of the types.
        CallFailed: when it is called, if the answer is none of its type: INTERNAL.
        MisuseError: when it is called, if the request is of another type. Nothing was sent.

    >>> import anyio
    >>> from towline.layers.rpc import Router
    >>> length = Typed("length", str, int)
    >>> async def count(text: str, /) -> int:
    ...     return len(text)
    >>> router = Router({length.method: length.answered_by(count)})
    >>> anyio.run(length(router), "four")
    4
    """

    client_only: ClassVar[bool] = True

    method: str
    request: type[Q]
    response: type[R]
    codec: Codec = field(default=JSON, kw_only=True)
    _takes: Coder[Q] = field(init=False, repr=False, compare=False)
    _gives: Coder[R] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_takes", coder_of(self.codec, self.request))
        object.__setattr__(self, "_gives", coder_of(self.codec, self.response))

    def __call__(self, inner: Service[Request, Response], /) -> Wrapper[Q, R]:
        return _Asking(inner, self)

    def answered_by(self, service: Service[Q, R], /) -> Wrapper[Request, Response]:
        """What answers calls of this method by a service with its types.

        Raises:
            CallFailed: when it is called, if the request is none of its type: INVALID_ARGUMENT, and refused. Of the
                details, ``errors`` is a JSON array of what is wrong with it.
            MisuseError: when it is called, if ``service`` answers something of another type.
        """
        return _Answering(service, self)


class _Asking(Wrapper[Q, R]):
    """A method as its caller sees it."""

    __slots__ = ("_typed",)

    def __init__(self, inner: Service[Request, Response], typed: Typed[Q, R]) -> None:
        super().__init__(inner)
        self._typed = typed

    async def __call__(self, request: Q, /) -> R:
        typed = self._typed
        response: Response = await self.inner(Request(typed.method, typed._takes.encode(request)))
        return answered(typed._gives, response.payload, typed.method)


class _Answering(Wrapper[Request, Response]):
    """A method as a router sees it."""

    __slots__ = ("_typed",)

    def __init__(self, inner: Service[Q, R], typed: Typed[Q, R]) -> None:
        super().__init__(inner)
        self._typed: Typed[Any, Any] = typed

    async def __call__(self, request: Request, /) -> Response:
        typed = self._typed
        value = asked(typed._takes, request.payload, typed.method)
        token = answering.set(request)
        try:
            answer: Any = await self.inner(value)
        finally:
            answering.reset(token)
        return Response(typed._gives.encode(answer))


# --- what is said in a call ----------------------------------------------------------------------------------------


def asked(coder: Coder[Q], data: bytes, method: str, *, has_begun: bool = False) -> Q:
    """What a caller has sent. Never the caller's bytes in an error, which may be logged."""
    try:
        return coder.decode(data)
    except ValueError as error:
        text = f"{method!r} was sent what it does not take"
        raise _bad(StatusCode.INVALID_ARGUMENT, text, error, refused=not has_begun) from error


def answered(coder: Coder[R], data: bytes, method: str) -> R:
    """What a call was answered. It may have been carried out, and to ask again would bring the same."""
    try:
        return coder.decode(data)
    except ValueError as error:
        raise _bad(StatusCode.INTERNAL, f"{method!r} answered what it does not give", error) from error


def _bad(code: StatusCode, text: str, error: ValueError, *, refused: bool = False) -> CallFailed:
    if not isinstance(error, DecodeError):  # another codec's: nobody knows what its text says
        return CallFailed(code, text, refused=refused)
    return CallFailed(code, f"{text}: {error}", details={"errors": error.report()}, refused=refused)
