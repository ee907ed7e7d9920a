"""The policy that fits most uses: what it retries, how often, how long, and what it costs."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

from towline.clock import Clock
from towline.errors import (
    CircuitOpen,
    ClosedHere,
    ConnectFailed,
    ConnectionLost,
    HandshakeFailed,
    ProtocolViolation,
    SessionLost,
)
from towline.service import Dial
from towline.text import differing
from towline.units import Seconds

from .backoff import Backoff
from .budget import Budget, TpsBudget
from .classify import Errors, excluder, is_transient, matcher, says_retryable
from .retry import Answer, Attempt, GiveUp, NotCloneable, PolicySession

if TYPE_CHECKING:
    from random import Random

__all__ = ["StandardPolicy"]

DEFAULT_BACKOFF: Final = Backoff.exponential()

LONGEST: Final = sys.float_info.max


def retry_after(error: Exception) -> float | None:
    """What an error itself asks for: its ``retry_after``, in seconds.

    >>> retry_after(ValueError())
    """
    asked = getattr(error, "retry_after", None)
    # A foreign error may carry anything under this name: a date, a negative number, one that no float can hold
    return float(min(asked, LONGEST)) if isinstance(asked, (int, float)) and asked >= 0 else None


@dataclass(frozen=True, slots=True)
class StandardPolicy:
    """Decides by the errors named here, or by what an error says of itself (``retryable``, ``retry_after``, ``sent``).

    What it does depends on what is tried:

    * **A call** (anything but a `Dial`): 3 attempts by default, and a budget. Only an error that ``on`` names, or,
      without ``on``, one that says it is retryable. A call that may have been carried out (``error.sent``) is repeated
      only if ``idempotent`` says that it may be.
    * **A first connect** (a `Dial` without a cause): until ``max_elapsed``, by default 30 s. A plain
      OSError counts as retryable. A peer that ends the connection without a word may be a server that is
      just starting; three such endings in a row are taken for a refusal. No budget.
    * **The way back to a session** (a `Dial` with a cause): whatever went wrong with the network or with
      the peer is retried, since it may be a captive portal or an address that someone else has now. There
      is no limit here: whoever dials again bounds the whole. Only misuse and a session that is lost for
      good are raised.

    A dial that names failures starts that far into the backoff, with a wait before its first attempt.

    The questions are asked in this order, and the first No ends it: is the error one to retry; may the call be made
    twice; are there attempts left; has the backoff another delay; is there time for it; does the caller wait that long;
    does the budget allow it. So nothing is withdrawn for a retry that is not made, and it is withdrawn before the wait.

    Never retried, whatever ``on`` says: an error that a Retry further inside has given up on, what says that we
    closed it ourselves, and an open circuit breaker (but see ``wait_when_open``).

    Attributes:
        backoff: the delays. When it ends (`Backoff.take`), no more is tried; on the way back the last is
            repeated.
        on: the errors to retry, as `Errors`; None for those that say they are retryable (`says_retryable`). What is
            named here is all that is retried. An ExceptionGroup matches when all its leaves do.
        not_on: errors that are not retried although ``on`` has them; one leaf of a group is enough.
        on_result: says of a response that it is to be asked for again. When that comes to an end, the last response
            is returned, or ``result_error`` is raised.
        result_error: makes the error to raise for a response that is still not wanted at the end.
        max_attempts: attempts in all, the first included; None for the default of what is tried.
        max_elapsed: seconds from the first attempt to the beginning of the last; None for the default of
            what is tried, ``math.inf`` for no limit.
        max_retry_after: the longest wait that ``delay_from`` may ask for, in seconds. The default is as long as a
            detached session lives.
        delay_from: a function of the error that gives the delay it asks for, or None; by default the error's
            ``retry_after``. It replaces the backoff's, and the backoff starts over, since the peer is alive and has
            said when. Of a response nobody asks it: where that says when, make an error of it (`map_response`).
        idempotent: whether a call may be carried out twice: True, False, or a function of the request. The default
            None does not know: it refuses only after errors that say the request was sent.
        clone: makes the request that is sent from the one that is kept, or answers `NOT_CLONEABLE`. By
            default a request is taken for immutable, and sent itself.
        budget: what retries of calls are paid from. The default is a `TpsBudget` of this policy's own; give one budget
            to all policies for the same target. None for no budget.
        deposit: what pays into the budget: ``"success"``, or ``"request"`` for every request as it begins. By success
            is the stricter one when nothing works at all.
        wait_when_open: after a `CircuitOpen` wait until the breaker tries again, rather than give up.

    Raises:
        ValueError: if ``max_attempts`` is below 1, or a length of time is negative or not a number.
        TypeError: if ``on`` or ``not_on`` names no class of exceptions, or ``backoff`` is none.

    >>> StandardPolicy(max_attempts=0)
    Traceback (most recent call last):
    ...
    ValueError: max_attempts is 0, where 1 or more is expected
    """

    backoff: Backoff = DEFAULT_BACKOFF
    on: Errors | None = field(default=None, kw_only=True)
    not_on: Errors = field(default=(), kw_only=True)
    on_result: Callable[[Any], bool] | None = field(default=None, kw_only=True)  # Any: the user knows the type
    result_error: Callable[[Any], Exception] | None = field(default=None, kw_only=True)
    max_attempts: int | None = field(default=None, kw_only=True)
    max_elapsed: Seconds | None = field(default=None, kw_only=True)
    max_retry_after: Seconds = field(default=300.0, kw_only=True)
    delay_from: Callable[[Exception], float | None] = field(default=retry_after, kw_only=True)
    idempotent: bool | Callable[[Any], bool] | None = field(default=None, kw_only=True)
    clone: Callable[[Any], Any] | None = field(default=None, kw_only=True)
    budget: Budget | None = field(default_factory=TpsBudget, kw_only=True)
    deposit: Literal["success", "request"] = field(default="success", kw_only=True)
    wait_when_open: bool = field(default=False, kw_only=True)

    _matches: Callable[[Exception], bool] = field(init=False, repr=False, compare=False)
    _excludes: Callable[[Exception], bool] = field(init=False, repr=False, compare=False)
    _paid_by_success: Budget | None = field(init=False, repr=False, compare=False)
    _call_session: type[_CallSession] = field(init=False, repr=False, compare=False)

    __repr__ = differing

    def __post_init__(self) -> None:
        if not isinstance(self.backoff, Backoff):  # pyright: ignore[reportUnnecessaryIsInstance] -- 3, say
            raise TypeError(f"backoff is {self.backoff!r}, where a Backoff is expected")
        if self.max_attempts is not None and not self.max_attempts >= 1:  # NaN is not
            raise ValueError(f"max_attempts is {self.max_attempts}, where 1 or more is expected")
        if self.max_elapsed is not None and not self.max_elapsed >= 0:  # NaN is not
            raise ValueError(f"max_elapsed is {self.max_elapsed}, where 0 or more is expected")
        if not self.max_retry_after >= 0:
            raise ValueError(f"max_retry_after is {self.max_retry_after}, where 0 or more is expected")
        if not (self.idempotent is None or isinstance(self.idempotent, bool) or callable(self.idempotent)):
            raise TypeError(f"idempotent is {self.idempotent!r}, where True, False, None or a function is expected")
        if inspect.iscoroutinefunction(self.idempotent):
            raise TypeError(f"idempotent is the async function {self.idempotent!r}: a policy does not wait")
        if self.deposit not in ("success", "request"):
            raise ValueError(f"deposit is {self.deposit!r}, where 'success' or 'request' is expected")
        object.__setattr__(self, "_matches", says_retryable if self.on is None else matcher(self.on))
        object.__setattr__(self, "_excludes", excluder(self.not_on))
        object.__setattr__(self, "_paid_by_success", self.budget if self.deposit == "success" else None)
        counts = self.budget is not None and (self.budget.counts_calls or self.deposit == "request")
        kind = _CallSession if self.clone is None and not counts else _WatchedCallSession
        object.__setattr__(self, "_call_session", kind)

    def session(self, request: object, /, *, clock: Clock, random: Random) -> PolicySession[Any, Any]:
        """Open the state of one request; see `Policy.session`."""
        if not isinstance(request, Dial):
            return self._call_session(self, clock, random)
        rules = FIRST_CONNECT if request.cause is None else WAY_BACK
        return _DialSession(self, rules, clock, random, request)

    def _is_never_retried(self, attempt: Attempt[Any, Any], error: Exception) -> GiveUp | None:
        if attempt.given_up_inside:
            return GiveUp.INNER
        if isinstance(error, ClosedHere):
            return GiveUp.NOT_RETRYABLE
        if isinstance(error, CircuitOpen) and not self.wait_when_open:
            return GiveUp.BREAKER
        return None

    def _is_retryable(self, error: Exception) -> bool:
        if isinstance(error, CircuitOpen):  # only asked if wait_when_open
            return not self._excludes(error)
        return self._matches(error) and not self._excludes(error)

    def _may_repeat(self, request: object, error: Exception | None) -> bool:
        sent = True if error is None else getattr(error, "sent", None)
        if sent is False or self.idempotent is True:
            return True
        if self.idempotent is None:
            return sent is not True or error is None
        return callable(self.idempotent) and self.idempotent(request)


# --- calls -------------------------------------------------------------------------------------------------


MAX_ATTEMPTS: Final = 3
"""Of a call, by default: what retries mend, the first or the second mends; more of them only add load."""


class _CallSession(PolicySession[Any, Any]):
    """One call under a `StandardPolicy`."""

    # Made for every call, and most of them succeed: what only a failure needs is worked out there (D32). For the same
    # reason no slots: a default of the class costs nothing.
    _delays: Iterator[float] | None = None
    _extra: bool = False  # the attempt under way was paid for from the budget
    _started: float = 0.0

    def __init__(self, policy: StandardPolicy, clock: Clock, random: Random) -> None:
        self._policy = policy
        self._clock = clock
        self._random = random
        if policy.max_elapsed is not None:
            self._started = clock()

    def retry(self, attempt: Attempt[Any, Any], /) -> Answer:
        policy = self._policy
        if self._extra:
            self._extra_is_over()
        if attempt.error is not None:
            attempt.reason = policy._is_never_retried(attempt, attempt.error)
            if attempt.reason is None and not policy._is_retryable(attempt.error):
                attempt.reason = GiveUp.NOT_RETRYABLE
        elif policy.on_result is None or not policy.on_result(attempt.response):
            if policy._paid_by_success is not None:
                policy._paid_by_success.deposit()
            return None
        answer = None if attempt.reason is not None else self._again(attempt)
        if answer is None and attempt.error is None and policy.result_error is not None:
            attempt.error = policy.result_error(attempt.response)
        return answer

    def _again(self, attempt: Attempt[Any, Any]) -> float | None:
        policy, error = self._policy, attempt.error
        if not policy._may_repeat(attempt.request, error):
            attempt.reason = GiveUp.NOT_IDEMPOTENT
            return None
        if attempt.number >= (policy.max_attempts or MAX_ATTEMPTS):
            attempt.reason = GiveUp.ATTEMPTS
            return None
        delay = self._delay_after(error)
        if delay is None:
            attempt.reason = GiveUp.BACKOFF
        elif policy.max_elapsed is not None and self._clock() + delay - self._started > policy.max_elapsed:
            attempt.reason = GiveUp.ELAPSED
        elif delay >= attempt.time_left:
            attempt.reason = GiveUp.DEADLINE
        elif policy.budget is not None and not policy.budget.withdraw():
            attempt.reason = GiveUp.BUDGET
        else:
            self._extra = True
            return delay
        return None

    def _delay_after(self, error: Exception | None) -> float | None:
        policy = self._policy
        asked = None if error is None else policy.delay_from(error)
        if asked is not None and asked >= 0:  # NaN is not
            self._delays = None  # the peer is alive and has said when, so the backoff starts over
            return min(asked, policy.max_retry_after)
        if self._delays is None:
            self._delays = policy.backoff.delays(self._random)
        return next(self._delays, None)

    def _extra_is_over(self) -> None:
        self._extra = False
        budget = self._policy.budget
        if budget is not None and budget.counts_calls:
            budget.release()


class _WatchedCallSession(_CallSession):
    """A call whose beginning or end costs something: a clone, or a budget that is told of every call."""

    def __init__(self, policy: StandardPolicy, clock: Clock, random: Random) -> None:
        super().__init__(policy, clock, random)
        budget = policy.budget
        if budget is not None and budget.counts_calls:
            budget.enter()
        if budget is not None and policy.deposit == "request":
            budget.deposit()

    def clone_request(self, request: Any, /) -> Any | NotCloneable:
        clone = self._policy.clone
        return request if clone is None else clone(request)

    def end(self) -> None:
        budget = self._policy.budget
        if budget is not None and budget.counts_calls:
            if self._extra:
                self._extra_is_over()
            budget.leave()


# --- connecting --------------------------------------------------------------------------------------------


def _is_no_end_of_a_session(error: Exception) -> bool:
    # D9: on the way back every failure of the network or of a handshake is retried, whatever it says of
    # itself
    if isinstance(error, SessionLost):
        return False
    network = (ConnectFailed, HandshakeFailed, ConnectionLost, ProtocolViolation)
    return isinstance(error, network) or is_transient(error)


@dataclass(frozen=True, slots=True)
class _Rules:
    """The rules for one kind of dial. Where a policy sets a limit itself, that one holds instead."""

    is_retryable: Callable[[Exception], bool]
    max_elapsed: float = math.inf
    max_ended: float = math.inf  # endings without a word, in a row
    is_bounded_elsewhere: bool = False


FIRST_CONNECT: Final = _Rules(is_transient, max_elapsed=30.0, max_ended=3)
"""D4: the caller waits for this, and wants the error soon. D9: three EOFs in a row are a refusal."""

WAY_BACK: Final = _Rules(_is_no_end_of_a_session, is_bounded_elsewhere=True)
"""D4: the session's time to live bounds it, and stopping here would only begin it anew."""


class _DialSession(PolicySession[Dial, Any]):
    """One dial under a `StandardPolicy`."""

    __slots__ = ("_cause_asks", "_clock", "_delays", "_ended", "_failures", "_policy", "_random", "_rules", "_started")

    def __init__(self, policy: StandardPolicy, rules: _Rules, clock: Clock, random: Random, dial: Dial) -> None:
        self._policy = policy
        self._rules = rules
        self._random = random
        self._clock = clock
        self._started = clock()
        self._failures = dial.failures
        self._cause_asks = None if dial.cause is None else self._asked_for(dial.cause)
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

    def retry(self, attempt: Attempt[Dial, Any], /) -> Answer:
        error = attempt.error
        if error is None:
            return None
        self._ended = self._ended + 1 if isinstance(error, HandshakeFailed) and error.ended else 0
        never = self._policy._is_never_retried(attempt, error)
        if never is not None and not self._rules.is_bounded_elsewhere:
            attempt.reason = never
        elif not self._is_retryable(error) or self._ended >= self._rules.max_ended:
            attempt.reason = GiveUp.NOT_RETRYABLE
        elif attempt.number >= self._max_attempts():
            attempt.reason = GiveUp.ATTEMPTS
        else:
            return self._again(attempt, error)
        return None

    def _again(self, attempt: Attempt[Dial, Any], error: Exception) -> float | None:
        delay = self._delay_after(error)
        if delay is None:
            attempt.reason = GiveUp.BACKOFF
        elif self._clock() + delay - self._started > self._max_elapsed():
            attempt.reason = GiveUp.ELAPSED
        # On the way back the caller's deadline ends the wait itself. Raising before it would have the
        # caller, whose part it is to dial again, do so in a hot loop until then.
        elif not self._rules.is_bounded_elsewhere and delay >= attempt.time_left:
            attempt.reason = GiveUp.DEADLINE
        else:
            return delay
        return None

    def _is_retryable(self, error: Exception) -> bool:
        policy = self._policy
        if self._rules.is_bounded_elsewhere:
            return self._rules.is_retryable(error)
        matches = self._rules.is_retryable if policy.on is None else policy._matches
        return matches(error) and not policy._excludes(error)

    def _max_attempts(self) -> float:
        ours = self._policy.max_attempts
        return math.inf if ours is None or self._rules.is_bounded_elsewhere else ours

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
        asked = self._policy.delay_from(error)
        return None if asked is None or not asked >= 0 else min(asked, self._policy.max_retry_after)
