"""Try again what failed: `Retry`, a transparent layer around connecting and calling alike.

The layer only carries out what a policy decides: it calls the service inside it, tells the policy how that
went, and sleeps for as long as the policy says.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from typing import Any, ClassVar, Final, TypeVar, cast

import anyio
import anyio.lowlevel

from towline.chance import SystemRandom
from towline.clock import Clock, now
from towline.errors import MisuseError
from towline.hooks import AttemptEnded, GaveUp, Hooks, RetryScheduled, tell
from towline.policies import (
    NOT_CLONEABLE,
    Answer,
    Attempt,
    Backoff,
    GiveUp,
    Policy,
    PolicySession,
    StandardPolicy,
)
from towline.service import Dial, Service, Wrapper
from towline.text import differing

__all__ = ["GivenUp", "Retry", "given_up"]

Q = TypeVar("Q")
R = TypeVar("R")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GivenUp:
    """What Retry leaves on an error that it gives up on; read it with `given_up`.

    Attributes:
        attempts: how many attempts there were.
        reason: why there is no other.
    """

    attempts: int
    reason: GiveUp
    _by: object = field(repr=False, compare=False)
    _number: int = field(repr=False, compare=False)


_MARK: Final = "_towline_given_up"

_marks: int = 0
"""How many marks were ever made. One and the same error may be raised by many calls, so a mark counts only for a Retry
in whose attempt it was made."""


def given_up(error: Exception) -> GivenUp | None:
    """What the innermost Retry that gave up on ``error`` says about it; None if none has.

    An error that was not worth a retry in the first place is not marked.
    """
    try:
        mark = getattr(error, _MARK, None)
    except Exception:  # an error of somebody's may do anything when it is asked
        return None
    return mark if isinstance(mark, GivenUp) else None


@dataclass(frozen=True, slots=True)
class Retry:
    """Layer: repeat what failed, when and as often as a policy says.

    Needs nothing from the layer inside it and promises what that one does: the response, or the last error
    itself. Put it around connecting (inside Resume), around calls, or around both. What is inside it
    happens once per attempt, so a Timeout inside bounds an attempt and one outside bounds them all; a
    ConcurrencyLimit outside holds its slot through the waits too, one inside gives it back. For the
    dialling side only.

    An error that it gives up on is marked (see `given_up`), and a Retry further out with a `StandardPolicy` passes it
    on: three attempts within three attempts are three, not nine.

    Cancelling the call ends it at once, in an attempt as in a wait, and the policy is not asked. The caller's
    deadline is told to the policy, so that no wait is begun that cannot end in time.

    Attributes:
        policy: the policy; a `Backoff` stands for `StandardPolicy` with that backoff.
        clock: gives the time in seconds.
        sleep: waits for a number of seconds.
        random: for jitter. The default draws from the operating system, so it is safe after a fork.
        hooks: told of every attempt, of every retry before the wait for it, and of giving up.

    Raises:
        TypeError: if ``policy`` is neither a policy nor a backoff.

    >>> from towline.endpoint import Endpoint
    >>> answers = iter([ConnectionRefusedError(), "connected"])
    >>> async def connect(dial: Dial, /) -> str:
    ...     answer = next(answers)
    ...     if isinstance(answer, Exception):
    ...         raise answer
    ...     return answer
    >>> retrying = Retry(Backoff.constant(0.01))(connect)
    >>> anyio.run(retrying, Dial(Endpoint.parse("tcp://localhost:7000")))
    'connected'
    """

    client_only: ClassVar[bool] = True

    policy: Policy | Backoff = field(default_factory=StandardPolicy)
    clock: Clock = field(default=now, kw_only=True)
    sleep: Callable[[float], Awaitable[object]] = field(default=anyio.sleep, kw_only=True)
    random: Random = field(default_factory=SystemRandom, kw_only=True, compare=False, repr=False)
    hooks: Hooks | None = field(default=None, kw_only=True)

    __repr__ = differing

    def __post_init__(self) -> None:
        if isinstance(self.policy, type):
            raise TypeError(f"{self.policy.__name__} is a class: write {self.policy.__name__}(...)")
        if isinstance(self.policy, Backoff):
            object.__setattr__(self, "policy", StandardPolicy(backoff=self.policy))
        elif not callable(getattr(self.policy, "session", None)):
            raise TypeError(f"Retry takes a policy or a Backoff, not {self.policy!r}")

    def __call__(self, inner: Service[Q, R], /) -> Wrapper[Q, R]:
        return _Retrying(inner, self)


class _Retrying(Wrapper[Q, R]):
    """A service under a policy."""

    __slots__ = ("_clock", "_hooks", "_open", "_random", "_sleep")

    def __init__(self, inner: Service[Q, R], layer: Retry) -> None:
        super().__init__(inner)
        assert not isinstance(layer.policy, Backoff)  # it was replaced
        self._open = layer.policy.session
        self._clock = layer.clock
        self._random = layer.random
        self._sleep = layer.sleep
        self._hooks = layer.hooks

    async def __call__(self, request: Q, /) -> R:
        session: PolicySession[Q, R] = self._open(request, clock=self._clock, random=self._random)
        attempt: Attempt[Q, R] = _Attempt(request)
        told = None if self._hooks is None else _Told(self._hooks, self._clock)
        try:
            if isinstance(request, Dial):
                before = session.before()
                _tell_dial(request, 1, before, request.cause)
                if before > 0:
                    await self._sleep(before)
            while True:
                clone = session.clone_request(attempt.request)
                once = clone is NOT_CLONEABLE
                marks = _marks
                if told is not None:
                    told.begins()
                try:
                    response: R = await self.inner(attempt.request if once else clone)
                except Exception as error:
                    attempt.error, attempt.response = error, None
                    attempt.given_up_inside = self._given_up_inside(error, marks)
                    if once:
                        attempt.reason = GiveUp.NOT_CLONEABLE
                    answer = None if once else session.retry(attempt)
                    check(answer)
                    if told is not None:
                        told.ended(attempt, error, answer)
                    if answer is None:
                        self._mark(attempt)
                        return _result(attempt, error)
                    _tell_dial(attempt.request, attempt.number + 1, answer, error)
                else:
                    attempt.error, attempt.response = None, response
                    answer = None if once else session.retry(attempt)
                    if told is not None:
                        told.ended(attempt, None, answer)
                    if answer is None:
                        if attempt.error is not None:
                            self._mark(attempt)
                            return _result(attempt, None)
                        response = attempt.response  # which the policy may have changed
                        return response
                    _tell_dial(attempt.request, attempt.number + 1, answer, None)
                    check(answer)
                # What is kept beyond the attempt would be kept for the wait; and an error holds this very frame.
                attempt.error = attempt.response = None
                response = cast(R, None)
                attempt.number += 1
                if isinstance(answer, float | int):
                    await self._sleep(answer)  # also for 0: a checkpoint, or quick failures could not be cancelled
                else:
                    await answer
                    await anyio.lowlevel.checkpoint()
        finally:
            attempt.error = None
            session.end()

    def _given_up_inside(self, error: Exception, marks: int) -> bool:
        mark = given_up(error)
        return mark is not None and mark._number > marks and mark._by is not self

    def _mark(self, attempt: Attempt[Q, R]) -> None:
        error, reason = attempt.error, attempt.reason
        if error is None or reason is None or not reason.is_exhaustion or attempt.given_up_inside:
            return
        global _marks
        _marks += 1
        with suppress(Exception):  # it is frozen, or does not like to be written on: then it goes without
            if given_up(error) is None:  # or it was raised before, and has its note
                error.add_note(f"Retry gave up after attempt {attempt.number}: {_WORDS[reason]}")
            setattr(error, _MARK, GivenUp(attempt.number, reason, self, _marks))


_WORDS: Final = {
    GiveUp.ATTEMPTS: "there are no more attempts (max_attempts)",
    GiveUp.ELAPSED: "there is no more time (max_elapsed)",
    GiveUp.BACKOFF: "the backoff has no more delays",
    GiveUp.DEADLINE: "the caller's deadline is sooner than the next attempt",
    GiveUp.BUDGET: "the budget allows no more retries",
}


def check(answer: Answer) -> None:
    """Refuse what a policy cannot mean; its author is to hear of it, and not only of the error of the call.

    Raises:
        MisuseError: if it is no answer.
    """
    makes_sense = answer >= 0 if isinstance(answer, float | int) else answer is None or inspect.isawaitable(answer)
    if not makes_sense:  # NaN does not
        raise MisuseError(
            f"the policy answered {answer!r}, where seconds (0 or more), an awaitable or None is expected"
        )


def _result(attempt: Attempt[Any, R], error: Exception | None) -> R:
    """What the caller gets: the outcome itself, or what the policy has made of it."""
    final = attempt.error
    if final is None:
        response: R = attempt.response
        return response
    try:
        if error is None or error is final:
            raise final
        raise final from error
    finally:
        del final, error  # or this frame, which the error now holds, would hold the error


class _Attempt(Attempt[Q, R]):
    """An attempt that asks for the caller's deadline only when it is asked for it."""

    def __init__(self, request: Q) -> None:
        self.request = request

    @property
    def time_left(self) -> float:
        return anyio.current_effective_deadline() - anyio.current_time()


class _Told:
    """What hooks are told about one request. Made only where there are hooks."""

    __slots__ = ("_attempt_began", "_began", "_clock", "_hooks")

    def __init__(self, hooks: Hooks, clock: Clock) -> None:
        self._hooks = hooks
        self._clock = clock
        self._began = self._attempt_began = clock()

    def begins(self) -> None:
        self._attempt_began = self._clock()

    def ended(self, attempt: Attempt[Any, Any], error: Exception | None, answer: Answer) -> None:
        now, number = self._clock(), attempt.number
        handled = answer is not None
        tell(self._hooks.on_attempt, AttemptEnded(number, now - self._attempt_began, error, handled))
        if handled:
            delay = float(answer) if isinstance(answer, float | int) else None
            tell(self._hooks.on_retry_scheduled, RetryScheduled(number + 1, delay, error))
        elif error is not None or attempt.reason is not None:
            reason = attempt.reason or GiveUp.NOT_RETRYABLE
            tell(self._hooks.on_give_up, GaveUp(number, now - self._began, reason, attempt.error))


def _tell_dial(request: object, number: int, answer: Answer, error: Exception | None) -> None:
    if isinstance(request, Dial) and request.on_attempt is not None:
        delay = float(answer) if isinstance(answer, float | int) else 0.0
        try:
            request.on_attempt(number, delay, error)
        except Exception:
            logger.exception("on_attempt raised; the call goes on", extra={"event": "hook.failed"})
