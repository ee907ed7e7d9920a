"""Whether to try again, and after how long: the contract of a retry policy, and the one that fits most uses.

A `Policy` is shared by all requests and holds only settings. For each request it opens a `PolicySession`,
which is told of every outcome and answers with a delay in seconds, or None to leave it at that. A policy
decides from what it is told: it never waits, never calls, and reads no clock.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from towline.errors import (
    ConnectFailed,
    ConnectionLost,
    HandshakeFailed,
    MisuseError,
    ProtocolViolation,
    SessionLost,
)
from towline.service import Dial

from .backoff import Backoff

if TYPE_CHECKING:
    from random import Random

__all__ = ["Failure", "Policy", "PolicySession", "StandardPolicy"]


@dataclass(frozen=True, slots=True)
class Failure:
    """What a policy is told when an attempt has failed.

    Attributes:
        attempt: which attempt of this request it was, counted from 1.
        error: what it raised.
        now: the time, on the clock that the session was opened with.
        deadline: when, on that clock, the caller stops waiting; ``math.inf`` if never.
    """

    attempt: int
    error: Exception
    now: float
    deadline: float = math.inf


class PolicySession(Protocol):
    """The state of one request. Asked after every outcome; never keeps the error or the response."""

    def before(self) -> float:
        """Seconds to wait before the first attempt; 0 for none. Called once."""
        ...

    def failed(self, failure: Failure, /) -> float | None:
        """Seconds to wait before the next attempt, or None to raise the error."""
        ...

    def succeeded(self, response: Any, /) -> float | None:  # Any: the policy says what responses it knows
        """Seconds to wait before another attempt, or None to return the response."""
        ...


class Policy(Protocol):
    """Settings, shared by all requests; may also share state between them, such as a budget."""

    # Any: Retry wraps every kind of service, and a policy for one kind of request may say so
    def session(self, request: Any, /, *, now: float, random: Random) -> PolicySession:
        """Open the state of one request.

        Args:
            request: what is about to be tried.
            now: the time, in seconds on any monotonic clock.
            random: for the jitter of delays.
        """
        ...


DEFAULT_BACKOFF: Final = Backoff.exponential()


@dataclass(frozen=True, slots=True)
class StandardPolicy:
    """The policy behind ``Retry(backoff)``. Decides by an error's own ``retryable`` and ``retry_after``.

    What it does depends on what is tried:

    * **A first connect** (a `Dial` without a cause): until ``max_elapsed``, by default 30 s. A plain
      OSError counts as retryable. A peer that ends the connection without a word may be a server that is
      just starting; three such endings in a row are taken for a refusal.
    * **The way back to a session** (a `Dial` with a cause): whatever went wrong with the network or with
      the peer is retried, since it may be a captive portal or an address that someone else has now. There
      is no limit here: whoever dials again bounds the whole. Only misuse and a session that is lost for
      good are raised.
    * **Anything else**, a call: 3 attempts by default, and only an error that says it is retryable.

    A dial that names failures starts that far into the backoff, with a wait before its first attempt.
    ``retry_after`` replaces the backoff's delay, and the backoff starts over. No delay is begun that would
    end after ``max_elapsed`` or after the caller's deadline.

    Attributes:
        backoff: the delays. When `Backoff.take` ends them, no more is tried; on the way back the last is
            repeated.
        max_attempts: attempts in all, the first included; None for the default of what is tried.
        max_elapsed: seconds from the first attempt to the beginning of the last; None for the default of
            what is tried, ``math.inf`` for no limit.
        max_retry_after: the longest wait that a peer may ask for, in seconds. The default is as long as a
            detached session lives.

    Raises:
        ValueError: if ``max_attempts`` is below 1, or a length of time is negative or not a number.

    >>> StandardPolicy(max_attempts=0)
    Traceback (most recent call last):
    ...
    ValueError: max_attempts is 0, where 1 or more is expected
    """

    backoff: Backoff = DEFAULT_BACKOFF
    max_attempts: int | None = None
    max_elapsed: float | None = None
    max_retry_after: float = 300.0

    def __post_init__(self) -> None:
        if self.max_attempts is not None and self.max_attempts < 1:
            raise ValueError(f"max_attempts is {self.max_attempts}, where 1 or more is expected")
        if self.max_elapsed is not None and not self.max_elapsed >= 0:  # NaN is not
            raise ValueError(f"max_elapsed is {self.max_elapsed}, where 0 or more is expected")
        if not self.max_retry_after >= 0:
            raise ValueError(f"max_retry_after is {self.max_retry_after}, where 0 or more is expected")

    def session(self, request: object, /, *, now: float, random: Random) -> PolicySession:
        """Open the state of one request; see `Policy.session`."""
        if not isinstance(request, Dial):
            return _Session(self, CALL, now, random)
        rules = FIRST_CONNECT if request.cause is None else WAY_BACK
        return _Session(self, rules, now, random, request.failures, request.cause)


# --- what is retried when -----------------------------------------------------------------------------------


def _says_retryable(error: Exception) -> bool:
    return getattr(error, "retryable", False) is True


def _is_transient(error: Exception) -> bool:
    # D9: by ``retryable`` wherever there is one. HandshakeFailed is an OSError too, through anyio's
    # ConnectionFailed, and must not count as one.
    if isinstance(error, MisuseError):
        return False
    retryable = getattr(error, "retryable", None)
    return isinstance(error, OSError) if retryable is None else retryable is True


def _is_no_end_of_a_session(error: Exception) -> bool:
    # D9: on the way back every failure of the network or of a handshake is retried, whatever it says of
    # itself
    if isinstance(error, SessionLost):
        return False
    network = (ConnectFailed, HandshakeFailed, ConnectionLost, ProtocolViolation)
    return isinstance(error, network) or _is_transient(error)


@dataclass(frozen=True, slots=True)
class _Rules:
    """The rules for one kind of request. Where a policy sets a limit itself, that one holds instead."""

    is_retryable: Callable[[Exception], bool]
    max_attempts: float = math.inf
    max_elapsed: float = math.inf
    max_ended: float = math.inf  # endings without a word, in a row
    is_bounded_elsewhere: bool = False


FIRST_CONNECT: Final = _Rules(_is_transient, max_elapsed=30.0, max_ended=3)
"""D4: the caller waits for this, and wants the error soon. D9: three EOFs in a row are a refusal."""

WAY_BACK: Final = _Rules(_is_no_end_of_a_session, is_bounded_elsewhere=True)
"""D4: the session's time to live bounds it, and stopping here would only begin it anew."""

CALL: Final = _Rules(_says_retryable, max_attempts=3)
"""A call may have been carried out, so only an error that says so is safe to retry."""


class _Session:
    """One request under a `StandardPolicy`."""

    __slots__ = ("_cause_asks", "_delays", "_ended", "_failures", "_policy", "_random", "_rules", "_started")

    def __init__(
        self,
        policy: StandardPolicy,
        rules: _Rules,
        now: float,
        random: Random,
        failures: int = 0,
        cause: Exception | None = None,
    ) -> None:
        # Made for every call, and most of them succeed: what only a failure needs is worked out there (D32).
        self._policy = policy
        self._rules = rules
        self._random = random
        self._started = now
        self._failures = failures
        self._cause_asks = None if cause is None else self._asked_for(cause)
        self._ended = 0
        self._delays: Iterator[float] | None = None

    def before(self) -> float:
        # D3: whoever dials again need not wait, since this waits for them; and RETRY_LATER is no hot loop
        if self._cause_asks is not None:
            delay = self._cause_asks
        elif self._failures > 0:
            delay = self._next_delay() or 0.0
        else:
            return 0.0
        return min(delay, self._max_elapsed())

    def failed(self, failure: Failure, /) -> float | None:
        error = failure.error
        self._ended = self._ended + 1 if isinstance(error, HandshakeFailed) and error.ended else 0
        if not self._rules.is_retryable(error) or self._ended >= self._rules.max_ended:
            return None
        if failure.attempt >= self._max_attempts():
            return None
        delay = self._delay_after(error)
        if delay is None:
            return None
        wake = failure.now + delay
        if wake - self._started > self._max_elapsed():
            return None
        # On the way back the caller's deadline ends the wait itself. Raising before it would have the
        # caller, whose part it is to dial again, do so in a hot loop until then.
        if wake >= failure.deadline and not self._rules.is_bounded_elsewhere:
            return None
        return delay

    def succeeded(self, response: object, /) -> float | None:
        return None

    def _max_attempts(self) -> float:
        ours, rules = self._policy.max_attempts, self._rules
        return rules.max_attempts if ours is None or rules.is_bounded_elsewhere else ours

    def _max_elapsed(self) -> float:
        ours, rules = self._policy.max_elapsed, self._rules
        return rules.max_elapsed if ours is None or rules.is_bounded_elsewhere else ours

    def _delay_after(self, error: Exception) -> float | None:
        asked = self._asked_for(error)
        if asked is None:
            return self._next_delay()
        self._delays = None  # the peer is alive and has said when, so the backoff starts over
        return asked

    def _next_delay(self) -> float | None:
        if self._delays is None:
            self._delays = self._policy.backoff.delays(
                self._random, skip=max(self._failures - 1, 0), hold=self._rules.is_bounded_elsewhere
            )
        return next(self._delays, None)

    def _asked_for(self, error: Exception) -> float | None:
        asked = getattr(error, "retry_after", None)
        # A foreign error may carry anything under this name, a date or a negative number included
        if not isinstance(asked, (int, float)) or not asked >= 0:
            return None
        return min(float(asked), self._policy.max_retry_after)
