"""Bound the time something may take: `Timeout`, a transparent layer for connecting and calling alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import anyio

from towline.errors import Elapsed, HandshakeTimeout
from towline.service import Dial, Service, Wrapper
from towline.text import differing
from towline.units import Seconds

__all__ = ["Timeout"]

Q = TypeVar("Q")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Timeout:
    """Layer: whatever is inside gets ``seconds``, then it is cancelled.

    Needs nothing from the layer inside it and promises what that one does, or its own error:
    `HandshakeTimeout` for a `Dial`, which is retryable; `Elapsed`, a TimeoutError, for anything else, which
    is not, since a call that took too long may still have been carried out. The error is raised after what
    was cancelled has cleaned up.

    It must stand outside what it is to bound: inside Retry it bounds one attempt, outside Retry all of them
    and the waits between. On the serving side it bounds the handler.

    A cancellation from outside stays one, also when both fall together; a TimeoutError from inside is
    passed on as it is; and a response that is there in time wins.

    Attributes:
        seconds: the longest that it may take; ``math.inf`` for no bound.

    Raises:
        ValueError: if ``seconds`` is not above 0.

    >>> async def slow(request: str, /) -> str:
    ...     await anyio.sleep(1)
    ...     return request
    >>> anyio.run(Timeout(0.01)(slow), "hello")
    Traceback (most recent call last):
    ...
    towline.errors.Elapsed: no response within 0.01 s
    """

    client_only: ClassVar[bool] = False

    seconds: Seconds

    __repr__ = differing

    def __post_init__(self) -> None:
        if not self.seconds > 0:  # NaN is not
            raise ValueError(f"a timeout of {self.seconds} seconds, where more than 0 is expected")

    def __call__(self, inner: Service[Q, R], /) -> Wrapper[Q, R]:
        return _Bounded(inner, self.seconds)


class _Bounded(Wrapper[Q, R]):
    """A service that gets so many seconds."""

    __slots__ = ("_seconds",)

    def __init__(self, inner: Service[Q, R], seconds: float) -> None:
        super().__init__(inner)
        self._seconds = seconds

    async def __call__(self, request: Q, /) -> R:
        if self._seconds == math.inf:
            response: R = await self.inner(request)
            return response
        # Not fail_after: its TimeoutError could not be told from one that came from inside.
        with anyio.move_on_after(self._seconds):
            response = await self.inner(request)
            return response
        if isinstance(request, Dial):
            raise HandshakeTimeout(f"no connection within {self._seconds:g} s")
        raise Elapsed(self._seconds)
