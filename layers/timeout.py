"""Bound the time something may take: `Timeout`, a transparent layer for connecting and calling alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeVar

import anyio

from towline.errors import HandshakeTimeout
from towline.service import Dial, Service

__all__ = ["Timeout"]

Q = TypeVar("Q")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Timeout:
    """Layer: whatever is inside gets ``seconds``, then it is cancelled.

    Needs nothing from the layer inside it and promises what that one does, or its own error:
    `HandshakeTimeout` for a `Dial`, which is retryable; the builtin `TimeoutError` for anything else, which
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
    TimeoutError: no response within 0.01 s
    """

    client_only: ClassVar[bool] = False

    seconds: float

    def __post_init__(self) -> None:
        if not self.seconds > 0:  # NaN is not
            raise ValueError(f"a timeout of {self.seconds} seconds, where more than 0 is expected")

    def __call__(self, inner: Service[Q, R], /) -> Service[Q, R]:
        seconds = self.seconds

        async def bounded(request: Q, /) -> R:
            # Not fail_after: its TimeoutError could not be told from one that came from inside.
            with anyio.move_on_after(seconds):
                return await inner(request)
            if isinstance(request, Dial):
                raise HandshakeTimeout(f"no connection within {seconds:g} s")
            raise TimeoutError(f"no response within {seconds:g} s")

        return bounded
