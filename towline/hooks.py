"""What layers tell whoever wants to know: telemetry, a log, a test.

A layer that has something to tell takes ``hooks``. Subclass `Hooks`, write the methods that you care about, and give
the same object to as many layers as you like. Hooks are called in the task of the call, must not block, and can harm
nothing: what they raise is logged and dropped.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

__all__ = [
    "AttemptEnded",
    "CallShed",
    "GaveUp",
    "GiveUp",
    "HedgeStarted",
    "Hooks",
    "RetryScheduled",
    "StateChanged",
    "tell",
]

E = TypeVar("E")

logger = logging.getLogger(__name__)


class GiveUp(enum.StrEnum):
    """Why no further attempt is made."""

    NOT_RETRYABLE = "not_retryable"
    NOT_CLONEABLE = "not_cloneable"
    NOT_IDEMPOTENT = "not_idempotent"
    BREAKER = "breaker"
    INNER = "inner"
    ATTEMPTS = "attempts"
    ELAPSED = "elapsed"
    BACKOFF = "backoff_exhausted"
    DEADLINE = "deadline"
    BUDGET = "budget"

    @property
    def is_exhaustion(self) -> bool:
        """Whether an outer Retry must take it for final, too: everything was tried that was allowed."""
        return self in _EXHAUSTIONS


_EXHAUSTIONS: Final = {GiveUp.ATTEMPTS, GiveUp.ELAPSED, GiveUp.BACKOFF, GiveUp.DEADLINE, GiveUp.BUDGET, GiveUp.INNER}


@dataclass(frozen=True, slots=True)
class AttemptEnded:
    """An attempt is over.

    Attributes:
        attempt: its number, counted from 1.
        elapsed: seconds that it took.
        error: what it raised; None if it answered.
        handled: the policy wants another attempt, so this outcome is not the caller's.
    """

    attempt: int
    elapsed: float
    error: Exception | None
    handled: bool


@dataclass(frozen=True, slots=True)
class RetryScheduled:
    """Another attempt will be made.

    Attributes:
        attempt: its number, so 2 for the first retry.
        delay: seconds until it begins; None if the policy waits for something other than time.
        error: what the attempt before it raised; None after a response that the policy did not like.
    """

    attempt: int
    delay: float | None
    error: Exception | None


@dataclass(frozen=True, slots=True)
class GaveUp:
    """No further attempt is made, and the caller gets the last outcome.

    Attributes:
        attempts: how many there were.
        elapsed: seconds since the first began.
        reason: why.
        error: what the caller gets; None if it is a response that the policy did not like.
    """

    attempts: int
    elapsed: float
    reason: GiveUp
    error: Exception | None


@dataclass(frozen=True, slots=True)
class StateChanged:
    """A circuit breaker has changed its state, or a `Reconnect`.

    Attributes:
        name: what it is called.
        old: the state before. Of a breaker ``closed``, ``open``, ``half_open`` or ``isolated``; of a `Reconnect`
            ``closed``, ``idle``, ``connecting``, ``connected`` or ``waiting``.
        new: the state now.
        reason: why, for people.
    """

    name: str
    old: str
    new: str
    reason: str


@dataclass(frozen=True, slots=True)
class HedgeStarted:
    """A second call, or a later one, was started beside one that has not answered yet.

    Attributes:
        attempt: its number, so 2 for the first hedge.
        elapsed: seconds since the first call began.
        error: the failure that it was started for; None if it was started because time had passed.
    """

    attempt: int
    elapsed: float
    error: Exception | None


@dataclass(frozen=True, slots=True)
class CallShed:
    """A call was turned away.

    Attributes:
        layer: the layer that did so.
        error: what the caller gets.
    """

    layer: str
    error: Exception


class Hooks:
    """Does nothing with what it is told. Subclass it, and write the methods that you care about.

    >>> class Printed(Hooks):
    ...     def on_retry_scheduled(self, event: RetryScheduled) -> None:
    ...         print(f"attempt {event.attempt} in {event.delay} s")
    >>> Printed().on_retry_scheduled(RetryScheduled(2, 0.5, None))
    attempt 2 in 0.5 s
    """

    def on_attempt(self, event: AttemptEnded, /) -> None:
        """An attempt is over."""

    def on_retry_scheduled(self, event: RetryScheduled, /) -> None:
        """Another attempt will be made; called before the wait for it."""

    def on_give_up(self, event: GaveUp, /) -> None:
        """No further attempt is made."""

    def on_state_change(self, event: StateChanged, /) -> None:
        """A circuit breaker or a `Reconnect` has changed its state."""

    def on_hedge(self, event: HedgeStarted, /) -> None:
        """A call was started beside one that has not answered yet."""

    def on_shed(self, event: CallShed, /) -> None:
        """A call was turned away."""


def tell(hook: Callable[[E], None], event: E) -> None:
    """Call a hook for a layer: what it raises is logged, and goes no further."""
    try:
        hook(event)
    except Exception:
        logger.exception("a hook raised; the call goes on", extra={"event": "hook.failed"})
