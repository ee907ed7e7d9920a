"""Try a block of code again: `attempts` hands out the attempts, and ``with`` makes one of each.

For what is no function of its own; a function takes `retryable`, a service takes `Retry`. All three do the same thing,
and a policy cannot tell them apart.

No generator stands behind the loop, and nothing is held open from one attempt to the next (PEP 789): a scope or a task
group of the block's begins and ends within it, and one around the loop sees it through to the end.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from random import Random
from types import TracebackType
from typing import Self, overload

import anyio

from towline.clock import Clock, now
from towline.errors import MisuseError
from towline.hooks import Hooks
from towline.layers._course import RANDOM, Course
from towline.layers.retry import Retry, _Attempt, _Retrying
from towline.policies import (
    Backoff,
    Errors,
    Policy,
    StandardPolicy,
)

__all__ = ["AttemptBlock", "attempts"]


class AttemptBlock:
    """One attempt, to be made by ``with``. `attempts` hands them out.

    An error that the policy wants to retry ends the block and nothing else; any other leaves it, as does the last one,
    which is the very object that was raised. A block that ends without an error ends the loop, if the policy agrees.

    Attributes:
        number: which attempt it is, counted from 1.
        result: what came of it. A policy with ``on_result`` judges what is assigned here, and None if nothing is; any
            other does not care. A policy that changes the response changes this.
    """

    # No attribute for the error: it holds the frame of the block, which holds this.
    __slots__ = ("_course", "_is_entered", "number", "result")

    def __init__(self, course: Course[None, object]) -> None:
        self.number = course.attempt.number
        self.result: object = None
        self._course: Course[None, object] | None = course  # None: it is over
        self._is_entered = False

    def __enter__(self) -> Self:
        """Begin the attempt.

        Raises:
            MisuseError: if it was entered before.
        """
        course = self._course
        if course is None or self._is_entered:
            raise MisuseError(f"attempt {self.number} was entered before, and cannot be made twice")
        self._is_entered = True
        try:
            course.begin()
        except BaseException:
            self._course = None
            course.end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        """End the attempt: True if the error is not to leave the block."""
        course, self._course = self._course, None
        assert course is not None  # it is entered once
        is_another = False
        try:
            if error is not None and not isinstance(error, Exception):
                return False
            is_another = course.ended(error, self.result)
            if is_another:
                return True
            if error is not None and course.attempt.error is error:
                return False
            self.result = course.result(error)
            return True
        finally:
            if not is_another:
                course.end()

    def __repr__(self) -> str:
        return f"<AttemptBlock {self.number}>"


class _Attempts(AsyncIterator[AttemptBlock]):
    """The attempts of one loop."""

    __slots__ = ("_block", "_course", "_is_begun")

    def __init__(self, retry: Retry) -> None:
        retrying: _Retrying[None, object] = _Retrying(_nothing, retry)
        self._course: Course[None, object] = Course(retrying, _Attempt(None))
        self._block: AttemptBlock | None = None
        self._is_begun = False

    def __aiter__(self) -> Self:
        if self._is_begun:
            raise MisuseError("these attempts belong to another loop: call attempts() for each")
        self._is_begun = True
        return self

    async def __anext__(self) -> AttemptBlock:
        self._is_begun = True
        course, block = self._course, self._block
        if block is not None and block._course is not None:
            if block._is_entered:
                raise MisuseError(f"attempt {block.number} is not over yet")
            course.end()
            raise MisuseError(f"attempt {block.number} was not made: write `with attempt:` in the loop")
        if course.is_over:
            raise StopAsyncIteration
        if course.answer is not None:
            try:
                await course.wait()
            except BaseException:
                course.end()
                raise
        self._block = AttemptBlock(course)
        return self._block


async def _nothing(request: None, /) -> object:
    raise AssertionError("the block is the service")


@overload
def attempts(
    policy: Policy | Backoff,
    *,
    clock: Clock = ...,
    sleep: Callable[[float], Awaitable[object]] = ...,
    random: Random = ...,
    hooks: Hooks | None = ...,
) -> AsyncIterator[AttemptBlock]: ...
@overload
def attempts(
    *,
    on: Errors,
    clock: Clock = ...,
    sleep: Callable[[float], Awaitable[object]] = ...,
    random: Random = ...,
    hooks: Hooks | None = ...,
) -> AsyncIterator[AttemptBlock]: ...
def attempts(
    policy: Policy | Backoff | None = None,
    *,
    on: Errors | None = None,
    clock: Clock = now,
    sleep: Callable[[float], Awaitable[object]] = anyio.sleep,
    random: Random = RANDOM,
    hooks: Hooks | None = None,
) -> AsyncIterator[AttemptBlock]:
    """Make a block of code again while it fails, when and as often as a policy says.

    For one ``async for`` loop, whose body is one ``with``:

        async for attempt in attempts(policy):
            with attempt:
                ...

    The wait comes between two blocks, in the loop. The last error leaves the block itself, marked as `Retry` marks it
    (see `given_up`). To leave the loop early, by ``break`` or ``return``, in the block or after it, is no failure.
    Cancellation and whatever else is no Exception passes through, and the policy is not asked.

    Args:
        policy: the policy; a `Backoff` stands for `StandardPolicy` with that backoff. Its requests are None. Make it
            once: a budget that is made anew for every loop limits nothing.
        on: instead of a policy, the errors to retry, for `StandardPolicy` without a budget.
        clock: gives the time in seconds.
        sleep: waits for a number of seconds.
        random: for jitter.
        hooks: told of every attempt, of every retry before the wait for it, and of giving up.

    Raises:
        TypeError: if there is neither ``policy`` nor ``on``, or both.
        MisuseError: from the loop, if an attempt was handed out and not made, or is not over yet when the next is asked
            for, or a second loop is begun; from the block, if it is entered twice.

    >>> async def main() -> None:
    ...     async for attempt in attempts(on=ConnectionError):
    ...         with attempt:
    ...             if attempt.number < 2:
    ...                 raise ConnectionResetError
    ...             print(f"attempt {attempt.number} it was")
    >>> anyio.run(main)
    attempt 2 it was
    """
    if (policy is None) is (on is None):
        raise TypeError("attempts takes either a policy, or the errors to retry by on=")
    if policy is None:
        policy = StandardPolicy(on=on, budget=None)
    return _Attempts(Retry(policy, clock=clock, sleep=sleep, random=random, hooks=hooks))
