"""Which handler answers which method."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from towline.errors import CallFailed, MisuseError, StatusCode
from towline.service import Service

from ._messages import Request, Response

__all__ = ["Router"]

H = TypeVar("H", bound=Callable[..., Any])


class Router:
    """A service that has each method answered by a service of its own: an ``async def``, or one in layers.

    Raises:
        CallFailed: when it is called with a method that nobody answers: UNIMPLEMENTED, and refused.

    >>> router = Router()
    >>> @router.method("echo")
    ... async def echo(request: Request, /) -> Response:
    ...     return Response(request.payload)
    >>> import anyio
    >>> anyio.run(router, Request("echo", b"hello"))
    Response(b'hello')
    >>> router
    Router(echo)
    """

    def __init__(self, handlers: Mapping[str, Service[Request, Response]] | None = None) -> None:
        self._handlers: dict[str, Service[Request, Response]] = {}
        for name, handler in (handlers or {}).items():
            self.add(name, handler)

    @property
    def methods(self) -> Mapping[str, Service[Request, Response]]:
        """What is answered, by name; a copy."""
        return dict(self._handlers)

    def add(self, name: str, handler: Service[Request, Response]) -> None:
        """Have a method answered by ``handler``.

        Raises:
            MisuseError: if it is answered already.
            TypeError: if ``handler`` cannot be called.
        """
        if not callable(handler):
            raise TypeError(f"the handler of {name!r} is {handler!r}, where a service is expected")
        if name in self._handlers:
            raise MisuseError(f"the method {name!r} is answered already, by {self._handlers[name]!r}")
        self._handlers[name] = handler

    def method(self, name: str) -> Callable[[H], H]:
        """Decorator: have a method answered by this function."""

        def decorate(handler: H) -> H:
            self.add(name, handler)
            return handler

        return decorate

    async def __call__(self, request: Request, /) -> Response:
        handler = self._handlers.get(request.method)
        if handler is None:
            raise self._unknown(request.method)
        return await handler(request)

    def _unknown(self, name: str) -> CallFailed:
        close = difflib.get_close_matches(name, self._handlers, 1)
        text = f"there is no method {name!r}" + (f": did you mean {close[0]!r}?" if close else "")
        return CallFailed(StatusCode.UNIMPLEMENTED, text, refused=True)

    def __repr__(self) -> str:
        return f"Router({', '.join(self._handlers)})"
