"""Whether to try again, and after how long: the contract of a retry policy, in Tower's shape.

A `Policy` is shared by all requests and holds only settings. For each request it opens a `PolicySession`, which sees
every outcome, success included, and answers with a delay, with something to await, or with None to leave it at that. It
may change the next request, and what the caller gets in the end. A policy decides from what it is told: it never waits,
never calls, and reads no clock but the one that it is given.
"""

from __future__ import annotations

import enum
import math
from abc import ABC, abstractmethod
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol, TypeAlias, TypeVar

from towline.clock import Clock
from towline.hooks import GiveUp

if TYPE_CHECKING:
    from random import Random

__all__ = [
    "NOT_CLONEABLE",
    "Answer",
    "Attempt",
    "GiveUp",
    "NotCloneable",
    "Policy",
    "PolicySession",
]

Q = TypeVar("Q")
R = TypeVar("R")


class NotCloneable(enum.Enum):
    """The type of `NOT_CLONEABLE`, since None may be a request."""

    NOT_CLONEABLE = "this request cannot be made twice"


NOT_CLONEABLE: Final = NotCloneable.NOT_CLONEABLE
"""What ``clone_request`` answers for a request that cannot be made twice, such as one whose body is a stream."""


Answer: TypeAlias = float | Awaitable[object] | None
"""What a policy answers: seconds to wait before the next attempt; something to await before it; or None to stop."""


class Attempt(Generic[Q, R]):
    """One attempt and its outcome, as a policy sees it.

    Attributes:
        number: which attempt of this request it is, counted from 1.
        request: what the *next* attempt will be made with; assign another to change it. It is the one that the caller
            gave (or that the policy assigned before), not the clone that was sent.
        error: what the attempt raised, or None. Assign it, or ``response``, to change what the caller gets; it gets the
            response if ``error`` is None.
        response: what it answered, if ``error`` is None.
        given_up_inside: a Retry further inside has made all the attempts that it may for this error.
        reason: why the policy stops here, for whoever wants to know; a policy sets it when it answers None.
    """

    # No slots: most attempts succeed, and are made and judged without any of these being set (D32).
    number: int = 1
    error: Exception | None = None
    response: Any = None  # Any: it is an R whenever error is None, which a type cannot say
    given_up_inside: bool = False
    reason: GiveUp | None = None

    def __init__(
        self,
        request: Q,
        *,
        number: int = 1,
        error: Exception | None = None,
        response: R | None = None,
        time_left: float = math.inf,
        given_up_inside: bool = False,
    ) -> None:
        self.request = request
        self.number = number
        self.error = error
        self.response = response
        self.given_up_inside = given_up_inside
        self._time_left = time_left

    @property
    def time_left(self) -> float:
        """Seconds until the caller stops waiting; ``math.inf`` if it never does."""
        return self._time_left

    def __repr__(self) -> str:
        outcome = f"response={self.response!r}" if self.error is None else f"error={self.error!r}"
        return f"Attempt({self.request!r}, number={self.number}, {outcome})"


class PolicySession(ABC, Generic[Q, R]):
    """The state of one request. Subclass it and write `retry`; the rest has defaults.

    It must not keep an error or a response: an error holds the frames that it went through.

    >>> class Twice(PolicySession[str, str]):
    ...     def retry(self, attempt: Attempt[str, str], /) -> Answer:
    ...         return 0.0 if attempt.error is not None and attempt.number < 2 else None
    """

    __slots__ = ()

    def before(self) -> float:
        """Seconds to wait before the first attempt. Asked only for a `Dial`, which may follow on others."""
        return 0.0

    def clone_request(self, request: Q, /) -> Q | NotCloneable:
        """The request to send, asked before every attempt; `NOT_CLONEABLE` to send ``request`` itself, and only once.

        Whatever is sent must leave ``request`` as it is, for the attempt after it.
        """
        return request

    @abstractmethod
    def retry(self, attempt: Attempt[Q, R], /) -> Answer:
        """Whether another attempt is to be made; asked after every one, unless its request could not be cloned."""

    def end(self) -> None:
        """The request is over, however it ended. Called once."""


class Policy(Protocol):
    """Settings, shared by all requests; may also share state between them, such as a budget."""

    # Any: Retry wraps every kind of service, and a policy for one kind of request may say so
    def session(self, request: Any, /, *, clock: Clock, random: Random) -> PolicySession[Any, Any]:
        """Open the state of one request.

        Args:
            request: what is about to be tried.
            clock: gives monotonic seconds.
            random: for the jitter of delays.
        """
        ...
