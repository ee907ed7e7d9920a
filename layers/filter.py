"""Let only some requests through: `Filter`, a transparent layer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from towline.errors import Filtered
from towline.hooks import CallShed, Hooks, tell
from towline.layers.map import _is_awaitable
from towline.service import Service, Wrapper
from towline.text import differing

__all__ = ["Filter"]

Q = TypeVar("Q")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Filter:
    """Layer: a request goes through if ``accept(request)`` is true; if not, `Filtered` is raised and nothing is sent.

    Needs nothing from the layer inside it and promises what that one does, or `Filtered`, which no `StandardPolicy`
    retries: the same request would meet the same answer. Put it outside Retry, so that each request is looked at once.
    On the serving side it keeps requests from the handler.

    It says yes or no. To change a request, or its type, use `map_request`, which may refuse one as well, by raising.

    Attributes:
        accept: says whether a request may pass. It may be async: what can be awaited is. An error that it raises
            itself goes to the caller as it is, in place of `Filtered`: such as one that says why. (Its argument is not
            checked against the type of the requests, so that one filter fits any service.)
        hooks: told of every request that is turned away, however that was said.

    Raises:
        TypeError: if ``accept`` is no function.

    >>> import anyio
    >>> async def echo(request: str, /) -> str:
    ...     return request
    >>> short = Filter(lambda request: len(request) <= 5)(echo)
    >>> anyio.run(short, "hello")
    'hello'
    >>> anyio.run(short, "hello, world")
    Traceback (most recent call last):
    ...
    towline.errors.Filtered: a request of type str is not let through
    """

    client_only: ClassVar[bool] = False

    accept: Callable[[Any], bool | Awaitable[bool]]  # Any: the user knows the type
    hooks: Hooks | None = field(default=None, kw_only=True)

    __repr__ = differing

    def __post_init__(self) -> None:
        if not callable(self.accept):
            raise TypeError(f"Filter takes a function, not {self.accept!r}")

    def __call__(self, inner: Service[Q, R], /) -> Wrapper[Q, R]:
        return _Filtering(inner, self)


class _Filtering(Wrapper[Q, R]):
    """A service behind a filter."""

    __slots__ = ("_accept", "_hooks")

    def __init__(self, inner: Service[Q, R], layer: Filter) -> None:
        super().__init__(inner)
        self._accept = layer.accept
        self._hooks = layer.hooks

    async def __call__(self, request: Q, /) -> R:
        try:
            accepted = self._accept(request)
            if accepted is not True:
                if _is_awaitable(accepted):
                    accepted = await accepted
                if not accepted:
                    # By its type only: what a request holds may be secret
                    raise Filtered(f"a request of type {type(request).__name__} is not let through")
        except Exception as error:
            if self._hooks is not None:
                tell(self._hooks.on_shed, CallShed("Filter", error))
            raise
        response: R = await self.inner(request)
        return response
