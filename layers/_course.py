"""Retry's loop, a step at a time, for those who cannot let it have the loop: blocks of code, and calls by key."""

from __future__ import annotations

import inspect
from typing import Final, Generic, TypeVar

import anyio.lowlevel

import towline.layers.retry as retry_layer
from towline.chance import SystemRandom
from towline.layers.retry import _result, _Retrying, _Told, check
from towline.policies import Answer, Attempt, GiveUp, NotCloneable, PolicySession

__all__ = ["RANDOM", "Course"]

Q = TypeVar("Q")
R = TypeVar("R")

RANDOM: Final = SystemRandom()
"""For jitter. It draws from the operating system, so it is safe after a fork, and serves any number of loops."""


class Course(Generic[Q, R]):
    """One request on its way through a Retry, for those who cannot let it have the loop.

    What happens around an attempt is what `Retry` does: `begin`, then `ended`, and `wait` if there is another. `end`
    comes last, and may come at any time. Nothing is opened before the first `begin`. Not for a `Dial`, which has waits
    and listeners of its own.

    Attributes:
        attempt: the attempt under way, or to come.
        answer: what the policy wants to wait for before the next attempt; None if it does not want one.
        is_over: it has ended.
    """

    __slots__ = ("_is_once", "_marks", "_retrying", "_session", "_told", "answer", "attempt", "is_over")

    def __init__(self, retrying: _Retrying[Q, R], attempt: Attempt[Q, R]) -> None:
        self.attempt = attempt
        self.answer: Answer = None
        self.is_over = False
        self._retrying = retrying
        self._session: PolicySession[Q, R] | None = None
        self._told: _Told | None = None
        self._is_once = False
        self._marks: int = 0

    def begin(self) -> Q:
        """Begin an attempt. What to make it with."""
        retrying, request = self._retrying, self.attempt.request
        if self._session is None:
            self._session = retrying._open(request, clock=retrying._clock, random=retrying._random)
            if retrying._hooks is not None:
                self._told = _Told(retrying._hooks, retrying._clock)
        sent: Q | NotCloneable = self._session.clone_request(request)
        self._marks = retry_layer._marks
        if self._told is not None:
            self._told.begins()
        if isinstance(sent, NotCloneable):
            self._is_once = True
            return request
        return sent

    def ended(self, error: Exception | None, response: R | None) -> bool:
        """An attempt is over. Whether there is another; if not, `result` is what the caller gets."""
        retrying, attempt = self._retrying, self.attempt
        assert self._session is not None  # it has begun
        attempt.error, attempt.response = error, response
        if error is not None:
            attempt.given_up_inside = retrying._given_up_inside(error, self._marks)
            if self._is_once:
                attempt.reason = GiveUp.NOT_CLONEABLE
        self.answer = None if self._is_once else self._session.retry(attempt)
        check(self.answer)
        if self._told is not None:
            self._told.ended(attempt, error, self.answer)
        if self.answer is None:
            retrying._mark(attempt)
            return False
        attempt.error = attempt.response = None
        attempt.number += 1
        return True

    def result(self, error: Exception | None) -> R:
        """Return or raise what comes of it all: the last outcome itself, or what the policy has made of it."""
        try:
            return _result(self.attempt, error)
        finally:
            self.attempt.error = None  # it holds this very frame
            del error

    async def wait(self) -> None:
        """Wait for as long as the policy said."""
        answer, self.answer = self.answer, None
        if isinstance(answer, float | int):
            await self._retrying._sleep(answer)  # also for 0: a checkpoint, or quick failures could not be cancelled
        elif answer is not None:
            await answer
            await anyio.lowlevel.checkpoint()

    def end(self) -> None:
        """There is no further attempt. Does nothing the second time."""
        self.is_over = True
        answer, self.answer = self.answer, None
        if inspect.iscoroutine(answer):
            answer.close()  # nobody will await it
        self.attempt.error = None
        session, self._session = self._session, None
        if session is not None:
            session.end()

    def __del__(self) -> None:
        # Whoever leaves a loop between two attempts tells nobody; a budget that counts must learn of it all the same.
        self.end()
