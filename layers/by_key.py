"""Attempts that somebody else makes: `ByKey` says which calls of a function are attempts at one and the same thing.

For ``retryable(state=...)``: a broker that delivers a message again makes the next attempt, and what is known of the
attempts before is kept here, by key.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Final

import anyio

from towline.layers._call import NO_CALL, Call, Parameters, Recovery
from towline.layers._course import Course
from towline.layers.retry import _Retrying
from towline.policies import Attempt
from towline.service import Wrapper
from towline.units import Seconds

__all__ = ["ByKey"]

MAX_KEYS: Final = 4096
"""How many keys are kept by default: Spring's limit, low enough to show that keys are not what they should be."""

KEY_TTL: Final = 3600.0
"""For how many seconds a key is kept by default: longer than brokers take to deliver a message again."""


@dataclass(frozen=True, slots=True)
class ByKey:
    """Which calls of a function are attempts at one and the same thing, for ``retryable(state=...)``.

    Attributes:
        key: a function of the arguments that gives what is the same in all of them, such as the id of a message.
        limit: how many keys are kept at most. The one that failed longest ago is forgotten for another, so what it
            stands for starts anew.
        ttl: seconds after which a key is forgotten, from when it could be tried again.

    Raises:
        ValueError: if ``limit`` is below 1, or ``ttl`` not above 0.

    >>> ByKey(lambda message: message.id, limit=0)
    Traceback (most recent call last):
    ...
    ValueError: limit is 0, where 1 or more is expected
    """

    key: Callable[..., Hashable]
    limit: int = MAX_KEYS
    ttl: Seconds = KEY_TTL

    def __post_init__(self) -> None:
        if not self.limit >= 1:
            raise ValueError(f"limit is {self.limit}, where 1 or more is expected")
        if not self.ttl > 0:  # NaN is not
            raise ValueError(f"ttl is {self.ttl}, where more than 0 is expected")


class _Kept:
    """What is known of a key from one call to the next."""

    __slots__ = ("course", "delay", "error", "ready_at")

    def __init__(self, course: Course[Call, Any]) -> None:
        self.course = course
        self.ready_at = -math.inf
        self.delay = 0.0
        self.error: Exception | None = None  # there are no more attempts


class Stateful(Wrapper[Call, Any]):
    """A function each call of which is one attempt; the key says at what.

    Spring's stateful retry, but for the wait: it comes before the next attempt rather than before the error, so that
    whoever must hand the message back, or roll a transaction back, can do so at once.
    """

    __slots__ = ("_busy", "_clock", "_kept", "_parameters", "_recovery", "_retrying", "_settings")

    def __init__(
        self, retrying: _Retrying[Call, Any], settings: ByKey, parameters: Parameters, recovery: Recovery | None
    ) -> None:
        super().__init__(retrying.inner)
        self._retrying = retrying
        self._clock = retrying._clock
        self._settings = settings
        self._parameters = parameters
        self._recovery = recovery
        self._kept: dict[Hashable, _Kept] = {}  # in the order in which they failed
        self._busy: dict[Hashable, anyio.Event] = {}

    async def __call__(self, request: Call, /) -> Any:
        key = self._parameters.apply(self._settings.key, request)
        while (other := self._busy.get(key)) is not None:
            await other.wait()
        self._busy[key] = anyio.Event()
        try:
            kept = self._take(key)
            if kept is not None and kept.error is not None:
                return await self._instead(key, kept, request)
            return await self._attempt(key, kept, request)
        finally:
            self._busy.pop(key).set()

    async def _attempt(self, key: Hashable, kept: _Kept | None, request: Call) -> Any:
        is_kept = kept is not None  # a call that is cancelled leaves things as they were
        if kept is None:
            kept = _Kept(Course(self._retrying, Attempt(request)))  # without a deadline: another call makes the next
        course = kept.course
        try:
            await self._wait(kept)
            course.attempt.request = request
            sent = course.begin()
            try:
                response = await self.inner(sent)
            except Exception as error:
                if course.ended(error, None):
                    is_kept = True
                    self._put_off(kept)
                    raise
                is_kept = course.attempt.error is not None
                if course.attempt.error is not None:
                    self._exhaust(kept, course.attempt.error)
                return course.result(error)
            is_kept = False
            course.ended(None, response)
            return course.result(None)
        finally:
            if is_kept:
                self._keep(key, kept)
            if not is_kept or kept.error is not None:
                course.end()

    async def _wait(self, kept: _Kept) -> None:
        if kept.ready_at > -math.inf:
            # No longer than was said, also if the clock went back, to another loop's, say.
            delay = min(kept.ready_at - self._clock(), kept.delay)
            if delay > 0:
                await self._retrying._sleep(delay)
        await kept.course.wait()  # for what is not time

    def _put_off(self, kept: _Kept) -> None:
        course, kept.ready_at = kept.course, self._clock()
        if isinstance(course.answer, float | int):
            kept.delay = float(course.answer)
            kept.ready_at += kept.delay
            course.answer = None
        course.attempt.request = NO_CALL  # whoever makes the next attempt brings its arguments

    def _exhaust(self, kept: _Kept, error: Exception) -> None:
        kept.ready_at = self._clock()
        kept.error = _without_frames(error)

    async def _instead(self, key: Hashable, kept: _Kept, request: Call) -> Any:
        error = kept.error
        assert error is not None
        function = None if self._recovery is None else self._recovery.find(error)
        try:
            if self._recovery is None or function is None:
                kept.error = None
                raise error
            try:
                return await self._recovery.recover(function, _without_frames(error), request)
            except BaseException:
                self._keep(key, kept)  # for another call to try this again
                raise
        finally:
            del error  # it holds this very frame

    # --- what is kept ---

    def _take(self, key: Hashable) -> _Kept | None:
        kept = self._kept.pop(key, None)
        if kept is None and not self._kept:
            return None
        oldest = self._clock() - self._settings.ttl
        while self._kept:
            first = next(iter(self._kept))
            if self._kept[first].ready_at > oldest:
                break
            self._forget(first)
        if kept is not None and kept.ready_at <= oldest:
            kept.course.end()
            return None
        return kept

    def _keep(self, key: Hashable, kept: _Kept) -> None:
        self._kept[key] = kept
        if len(self._kept) > self._settings.limit:
            self._forget(next(iter(self._kept)))

    def _forget(self, key: Hashable) -> None:
        self._kept.pop(key).course.end()


def _without_frames(error: Exception) -> Exception:
    """A copy, for keeping: the error itself holds the frames that it went through, and has been raised already."""
    for copied in (copy.copy, _bare_copy):
        try:
            new = copied(error)
            if type(new) is type(error) and new.args == error.args:
                return new
        except Exception:
            continue  # its __init__ takes something other than args
    return error


def _bare_copy(error: Exception) -> Exception:
    new = type(error).__new__(type(error), *error.args)
    new.args = error.args
    new.__dict__.update(error.__dict__)
    return new
