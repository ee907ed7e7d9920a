"""The attempts of a block: the same as those of a service under Retry, with the loop in the hands of the caller."""

# ruff: noqa: PT012 -- what raises here is a loop around a block, which is never a single statement

from __future__ import annotations

import gc
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from towline.clock import Clock
from towline.errors import LinkLost, MisuseError
from towline.hooks import AttemptEnded, GaveUp, Hooks, RetryScheduled
from towline.layers.attempt_loop import AttemptBlock, attempts
from towline.layers.retry import Retry, given_up
from towline.policies import (
    NOT_CLONEABLE,
    Answer,
    Attempt,
    Backoff,
    Budget,
    GiveUp,
    NotCloneable,
    PolicySession,
    StandardPolicy,
)
from towline.testing import MockClock, cancel_at_every_await

SERIES = Backoff.linear(initial=1, step=1, jitter="none")
AT_ONCE = Backoff.constant(0)


def policy(backoff: Backoff = SERIES, **settings: Any) -> StandardPolicy:  # Any: those of StandardPolicy
    values: dict[str, Any] = {"on": OSError, "budget": None, **settings}
    return StandardPolicy(backoff, **values)


@dataclass
class Recorded(PolicySession[Any, Any]):
    """A policy that answers as it is told to, and records what it was asked. Nothing more to say: None."""

    says: list[Answer] = field(default_factory=list[Answer])
    asked: list[Attempt[Any, Any]] = field(default_factory=list[Attempt[Any, Any]])
    change: Callable[[Attempt[Any, Any]], None] = lambda attempt: None
    clone: Callable[[Any], Any] = lambda request: request
    opened: int = 0
    ended: int = 0

    def session(self, request: object, /, *, clock: Clock, random: Random) -> Recorded:
        self.opened += 1
        return self

    def clone_request(self, request: Any, /) -> Any | NotCloneable:
        return self.clone(request)

    def retry(self, attempt: Attempt[Any, Any], /) -> Answer:
        kept = Attempt[Any, Any](attempt.request, number=attempt.number, error=attempt.error, response=attempt.response)
        self.asked.append(kept)
        self.change(attempt)
        return self.says.pop(0) if self.says else None

    def end(self) -> None:
        self.ended += 1


class Counted(Budget):
    """A budget that counts who is under way, and what was paid for and is not over."""

    counts_calls = True

    def __init__(self) -> None:
        self.inside = self.extra = 0

    def withdraw(self) -> bool:
        self.extra += 1
        return True

    def release(self) -> None:
        self.extra -= 1

    def enter(self) -> None:
        self.inside += 1

    def leave(self) -> None:
        self.inside -= 1

    @property
    def balance(self) -> float:
        return 1


class Events(Hooks):
    def __init__(self, clock: MockClock | None = None) -> None:
        self.seen: list[object] = []
        self.clock = clock

    def on_attempt(self, event: AttemptEnded, /) -> None:
        self.seen.append(event)

    def on_retry_scheduled(self, event: RetryScheduled, /) -> None:
        self.seen.append(event)
        if self.clock is not None:
            assert len(self.clock.slept) == event.attempt - 2, "it is told before the wait"

    def on_give_up(self, event: GaveUp, /) -> None:
        self.seen.append(event)


# --- how often, and what comes of it ---


@pytest.mark.smoke
async def test_r2_three_attempts_are_exactly_three_and_the_last_error_leaves_the_block_itself() -> None:
    clock = MockClock()
    raised = [OSError(1), OSError(2), OSError(3), OSError(4)]
    numbers: list[int] = []
    with pytest.raises(OSError, match="3") as caught:
        async for attempt in attempts(policy(), clock=clock, sleep=clock.sleep):
            with attempt:
                numbers.append(attempt.number)
                raise raised[attempt.number - 1]
    assert caught.value is raised[2]
    assert numbers == [1, 2, 3]
    assert clock.slept == [1, 2]
    mark = given_up(caught.value)
    assert mark is not None
    assert (mark.attempts, mark.reason) == (3, GiveUp.ATTEMPTS)


async def test_r3_one_attempt_waits_for_nothing() -> None:
    clock = MockClock()
    with pytest.raises(OSError, match="no"):
        async for attempt in attempts(policy(max_attempts=1), clock=clock, sleep=clock.sleep):
            with attempt:
                raise OSError("no")
    assert clock.slept == []


async def test_r4_the_delays_are_those_of_the_backoff_and_none_comes_after_the_last_attempt() -> None:
    clock = MockClock()
    backoff = Backoff.exponential(initial=0.1, factor=2, cap=0.5, first=None, jitter="none")
    with pytest.raises(OSError, match="no"):
        async for attempt in attempts(policy(backoff, max_attempts=6), clock=clock, sleep=clock.sleep):
            with attempt:
                raise OSError("no")
    assert clock.slept == pytest.approx([0.1, 0.2, 0.4, 0.5, 0.5])


async def test_a_block_without_an_error_ends_the_loop() -> None:
    numbers: list[int] = []
    async for attempt in attempts(policy()):
        with attempt:
            numbers.append(attempt.number)
            if attempt.number < 2:
                raise OSError
    assert numbers == [1, 2]


async def test_an_error_that_is_not_to_be_retried_leaves_the_block_at_once() -> None:
    clock = MockClock()
    with pytest.raises(ValueError, match="no") as caught:
        async for attempt in attempts(policy(), clock=clock, sleep=clock.sleep):
            with attempt:
                raise ValueError("no")
    assert clock.slept == []
    assert given_up(caught.value) is None


async def test_on_stands_for_a_policy_for_these_errors_with_three_attempts() -> None:
    calls = 0
    with pytest.raises(ConnectionError):
        async for attempt in attempts(on=OSError):
            with attempt:
                calls += 1
                raise ConnectionResetError
    assert calls == 3


async def test_a_backoff_stands_for_a_policy_for_errors_that_say_they_are_retryable() -> None:
    calls = 0
    with pytest.raises(OSError, match="final"):
        async for attempt in attempts(SERIES):
            with attempt:
                calls += 1
                raise LinkLost("cut") if calls == 1 else OSError("final")
    assert calls == 2


async def test_r5_a_result_that_the_policy_does_not_want_is_asked_for_again() -> None:
    clock = MockClock()
    states = iter(["pending", "pending", "done"])
    state = ""
    async for attempt in attempts(policy(on_result="pending".__eq__), clock=clock, sleep=clock.sleep):
        with attempt:
            state = attempt.result = next(states)
    assert state == "done"
    assert clock.slept == [1, 2]


async def test_r5_in_the_end_an_unwanted_result_is_the_result_or_an_error() -> None:
    attempt: AttemptBlock | None = None
    async for attempt in attempts(policy(AT_ONCE, on_result="pending".__eq__)):
        with attempt:
            attempt.result = "pending"
    assert attempt is not None
    assert (attempt.number, attempt.result) == (3, "pending")

    async def polled() -> None:
        wanted = policy(AT_ONCE, on_result="pending".__eq__, result_error=RuntimeError)
        async for attempt in attempts(wanted):
            with attempt:
                attempt.result = "pending"

    with pytest.raises(RuntimeError, match="pending"):
        await polled()


async def test_what_a_block_does_not_assign_is_judged_as_none() -> None:
    recorded = Recorded([0.0])
    async for attempt in attempts(recorded):
        with attempt:
            pass
    assert [(each.number, each.request, each.response) for each in recorded.asked] == [(1, None, None), (2, None, None)]


async def test_r8_one_policy_gives_every_loop_the_same_delays() -> None:
    clock, shared = MockClock(), policy()
    for _ in range(2):
        with pytest.raises(OSError, match="no"):
            async for attempt in attempts(shared, clock=clock, sleep=clock.sleep):
                with attempt:
                    raise OSError("no")
    assert clock.slept == [1, 2, 1, 2]


async def test_r8_the_same_seed_gives_the_same_jitter_and_another_another() -> None:
    async def delays(seed: int) -> list[float]:
        clock = MockClock()
        with pytest.raises(OSError, match="no"):
            async for attempt in attempts(
                policy(Backoff.constant(1), max_attempts=9), clock=clock, sleep=clock.sleep, random=Random(seed)
            ):
                with attempt:
                    raise OSError("no")
        return clock.slept

    assert await delays(1) == await delays(1) != await delays(2)


async def test_r7_a_hundred_loops_at_once_do_not_share_state() -> None:
    shared = policy(max_attempts=3)
    calls = 0

    async def one() -> None:
        nonlocal calls
        with suppress(OSError):
            async for attempt in attempts(shared):
                with attempt:
                    calls += 1
                    await anyio.lowlevel.checkpoint()
                    raise OSError

    async with anyio.create_task_group() as group:
        for _ in range(100):
            group.start_soon(one)
    assert calls == 300


async def test_r12_a_group_is_retried_only_if_all_its_leaves_match() -> None:
    async def calls(group: Exception) -> int:
        number = 0
        with pytest.raises(ExceptionGroup):
            async for attempt in attempts(policy(AT_ONCE)):
                with attempt:
                    number = attempt.number
                    raise group
        return number

    assert await calls(ExceptionGroup("all", [OSError(), ExceptionGroup("in", [ConnectionError()])])) == 3
    assert await calls(ExceptionGroup("one", [OSError(), ValueError()])) == 1


async def test_r16_loops_within_loops_do_not_multiply() -> None:
    shared, calls = policy(AT_ONCE), 0
    with pytest.raises(OSError, match="no"):
        async for outer in attempts(shared):
            with outer:
                async for inner in attempts(shared):
                    with inner:
                        calls += 1
                        raise OSError("no")
    assert calls == 3


async def test_r16_a_loop_in_a_retry_and_a_retry_in_a_loop_do_not_multiply() -> None:
    calls = 0

    async def block(request: str, /) -> None:
        nonlocal calls
        async for attempt in attempts(policy(AT_ONCE)):
            with attempt:
                calls += 1
                raise OSError("no")

    with pytest.raises(OSError, match="no"):
        await Retry(policy(AT_ONCE))(block)("x")
    assert calls == 3

    async def call(request: str, /) -> None:
        nonlocal calls
        calls += 1
        raise OSError("no")

    calls = 0
    with pytest.raises(OSError, match="no"):
        async for attempt in attempts(policy(AT_ONCE)):
            with attempt:
                await Retry(policy(AT_ONCE))(call)("x")
    assert calls == 3


async def test_one_error_object_may_be_raised_in_many_loops_and_each_makes_all_its_attempts() -> None:
    error, calls = OSError("always the same"), 0
    for _ in range(2):
        with pytest.raises(OSError, match="same"):
            async for attempt in attempts(policy(AT_ONCE)):
                with attempt:
                    calls += 1
                    raise error
    assert calls == 6


async def test_r20_an_exhausted_backoff_ends_the_loop() -> None:
    number = 0
    with pytest.raises(OSError, match="no") as caught:
        async for attempt in attempts(policy(SERIES.take(1), max_attempts=9)):
            with attempt:
                number = attempt.number
                raise OSError("no")
    assert number == 2
    mark = given_up(caught.value)
    assert mark is not None
    assert mark.reason is GiveUp.BACKOFF


async def test_r10_no_wait_is_begun_that_the_deadline_would_end() -> None:
    start = anyio.current_time()
    with anyio.fail_after(1), pytest.raises(OSError, match="no"):
        async for attempt in attempts(policy(Backoff.constant(5, jitter="none"))):
            with attempt:
                raise OSError("no")
    assert anyio.current_time() == start


# --- hooks ---


async def test_r18_hooks_are_told_of_the_attempt_then_of_the_next_one_and_then_it_waits() -> None:
    clock = MockClock()
    events = Events(clock)
    first, second = OSError(1), OSError(2)
    with pytest.raises(OSError, match="2"):
        async for attempt in attempts(policy(max_attempts=2), clock=clock, sleep=clock.sleep, hooks=events):
            with attempt:
                await clock.sleep(0)
                clock.slept.pop()
                raise first if attempt.number == 1 else second
    assert events.seen == [
        AttemptEnded(1, 0.0, first, handled=True),
        RetryScheduled(2, 1.0, first),
        AttemptEnded(2, 0.0, second, handled=False),
        GaveUp(2, 1.0, GiveUp.ATTEMPTS, second),
    ]


async def test_r18_a_hook_that_raises_breaks_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Hooks):
        def on_attempt(self, event: AttemptEnded, /) -> None:
            raise RuntimeError("the hook is broken")

    number = 0
    async for attempt in attempts(policy(AT_ONCE), hooks=Broken()):
        with attempt:
            number = attempt.number
            if number < 3:
                raise OSError
    assert number == 3
    assert caplog.text.count("a hook raised") == 3


# --- what the policy makes of it ---


async def test_a_policy_may_make_an_error_a_response() -> None:
    def change(attempt: Attempt[Any, Any]) -> None:
        attempt.error, attempt.response = None, "instead"

    recorded = Recorded(change=change)
    attempt: AttemptBlock | None = None
    async for attempt in attempts(recorded):
        with attempt:
            raise OSError
    assert attempt is not None
    assert attempt.result == "instead"
    assert recorded.ended == 1


async def test_a_policy_may_make_a_response_an_error_or_another_response() -> None:
    def refuse(attempt: Attempt[Any, Any]) -> None:
        attempt.error = LookupError(attempt.response)

    with pytest.raises(LookupError, match="found"):
        async for attempt in attempts(Recorded(change=refuse)):
            with attempt:
                attempt.result = "found"

    def double(attempt: Attempt[Any, Any]) -> None:
        attempt.response *= 2

    other: AttemptBlock | None = None
    async for other in attempts(Recorded(change=double)):
        with other:
            other.result = 21
    assert other is not None
    assert other.result == 42


async def test_a_policy_may_raise_another_error_and_the_first_is_its_cause() -> None:
    def change(attempt: Attempt[Any, Any]) -> None:
        attempt.error = LookupError("other")

    first = OSError("first")
    with pytest.raises(LookupError) as caught:
        async for attempt in attempts(Recorded(change=change)):
            with attempt:
                raise first
    assert caught.value.__cause__ is first


async def test_what_cannot_be_made_twice_is_made_once_and_the_policy_is_not_asked() -> None:
    events, recorded = Events(), Recorded([0.0], clone=lambda request: NOT_CLONEABLE)
    with pytest.raises(OSError, match="no"):
        async for attempt in attempts(recorded, hooks=events):
            with attempt:
                raise OSError("no")
    assert recorded.asked == []
    assert recorded.ended == 1
    gave_up = events.seen[-1]
    assert isinstance(gave_up, GaveUp)
    assert gave_up.reason == GiveUp.NOT_CLONEABLE


async def test_a_policy_may_wait_for_something_other_than_time() -> None:
    event, events = anyio.Event(), Events()
    reached: list[int] = []

    async def loop() -> None:
        async for attempt in attempts(Recorded([event.wait()]), hooks=events):
            with attempt:
                reached.append(attempt.number)
                if attempt.number == 1:
                    raise OSError

    async with anyio.create_task_group() as group:
        group.start_soon(loop)
        await anyio.wait_all_tasks_blocked()
        assert reached == [1]
        event.set()
    assert reached == [1, 2]
    assert isinstance(events.seen[1], RetryScheduled)
    assert events.seen[1].delay is None


async def test_what_a_policy_would_wait_for_is_closed_if_nobody_does() -> None:
    event = anyio.Event()
    recorded = Recorded([event.wait()])
    async for attempt in attempts(recorded):
        with attempt:
            raise OSError
        break
    gc.collect()  # a coroutine that nobody awaited would warn, and a warning is an error here
    assert recorded.ended == 1


@pytest.mark.parametrize("where", ["session", "clone", "retry"])
async def test_an_error_of_the_policy_leaves_the_loop_and_the_session_is_ended(where: str) -> None:
    def broken(value: object, **settings: object) -> None:
        raise ZeroDivisionError

    recorded = Recorded([0.0])
    if where == "clone":
        recorded.clone = broken
    elif where == "retry":
        recorded.change = broken
    else:
        recorded.session = broken  # type: ignore[method-assign, assignment]
    with pytest.raises(ZeroDivisionError):
        async for attempt in attempts(recorded):
            with attempt:
                raise OSError
    assert recorded.ended == recorded.opened


# --- leaving ---


async def test_r9_cancellation_in_a_block_leaves_at_once_and_the_policy_is_not_asked() -> None:
    recorded = Recorded([0.0, 0.0])
    with anyio.move_on_after(1) as scope:
        async for attempt in attempts(recorded):
            with attempt:
                await anyio.sleep(5)
    assert scope.cancelled_caught
    assert (recorded.asked, recorded.opened, recorded.ended) == ([], 1, 1)


async def test_r9_cancellation_in_a_wait_leaves_at_once_and_there_is_no_other_attempt() -> None:
    recorded, numbers = Recorded([5.0]), list[int]()
    with anyio.move_on_after(1) as scope:
        async for attempt in attempts(recorded):
            with attempt:
                numbers.append(attempt.number)
                raise OSError
    assert scope.cancelled_caught
    assert numbers == [1]
    assert (len(recorded.asked), recorded.ended) == (1, 1)


async def test_r9_wherever_it_is_cancelled_the_budget_gets_back_what_it_counts() -> None:
    counted = Counted()

    async def loop() -> None:
        async for attempt in attempts(policy(budget=counted)):
            with attempt:
                await anyio.sleep(1)
                if attempt.number < 3:
                    raise OSError

    async def check() -> None:
        assert (counted.inside, counted.extra) == (0, 0)

    assert await cancel_at_every_await(loop, check) == 5


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
async def test_r11_what_is_no_exception_passes_through(kind: type[BaseException]) -> None:
    recorded = Recorded([0.0, 0.0])
    with pytest.raises(kind):
        async for attempt in attempts(recorded):
            with attempt:
                raise kind
    assert (recorded.asked, recorded.ended) == ([], 1)


async def test_r11_a_group_with_what_is_no_exception_passes_through() -> None:
    recorded = Recorded([0.0, 0.0])
    with pytest.raises(BaseExceptionGroup):
        async for attempt in attempts(recorded):
            with attempt:
                raise BaseExceptionGroup("both", [KeyboardInterrupt(), OSError()])
    assert (recorded.asked, recorded.ended) == ([], 1)


async def test_break_in_a_block_is_a_success_and_ends_the_loop() -> None:
    counted = Counted()
    async for attempt in attempts(policy(budget=counted)):
        with attempt:
            break
    assert (counted.inside, counted.extra) == (0, 0)


async def test_continue_in_a_block_is_a_success_and_ends_the_loop() -> None:
    numbers: list[int] = []
    async for attempt in attempts(policy()):
        with attempt:
            numbers.append(attempt.number)
            continue
    assert numbers == [1]


async def test_return_in_a_block_is_a_success_and_returns() -> None:
    counted = Counted()

    async def function() -> int:
        async for attempt in attempts(policy(budget=counted)):
            with attempt:
                if attempt.number == 2:
                    return 42
                raise OSError
        raise AssertionError("unreachable")

    assert await function() == 42
    assert (counted.inside, counted.extra) == (0, 0)


async def test_a_loop_that_is_left_between_two_attempts_gives_the_budget_back_what_it_counts() -> None:
    counted = Counted()

    async def broken_off() -> None:
        async for attempt in attempts(policy(budget=counted)):
            with attempt:
                raise OSError
            assert (counted.inside, counted.extra) == (1, 1)
            break

    async def raised_outside() -> None:
        async for attempt in attempts(policy(budget=counted)):
            if attempt.number == 2:
                raise LookupError("not in a block")
            with attempt:
                raise OSError

    await broken_off()
    assert (counted.inside, counted.extra) == (0, 0)
    with pytest.raises(LookupError):
        await raised_outside()
    await anyio.lowlevel.checkpoint()  # trio holds the frames of a task's last wait until its next one
    assert (counted.inside, counted.extra) == (0, 0)


async def test_a_loop_that_makes_no_attempt_opens_nothing() -> None:
    recorded = Recorded()
    async for _ in attempts(recorded):
        break
    assert recorded.opened == 0


async def test_r21_a_loop_without_delays_can_be_cancelled() -> None:
    async def cancel_soon(scope: anyio.CancelScope) -> None:
        for _ in range(10):
            await anyio.lowlevel.checkpoint()
        scope.cancel()

    number = 0
    scope = anyio.CancelScope()
    async with anyio.create_task_group() as group:
        with scope:
            group.start_soon(cancel_soon, scope)
            async for attempt in attempts(policy(AT_ONCE, max_attempts=1_000_000)):
                with attempt:
                    number = attempt.number
                    raise OSError
    assert scope.cancelled_caught
    assert 5 < number < 20


async def test_r21_a_loop_that_waits_for_what_is_there_already_can_be_cancelled() -> None:
    number = 0

    class Endless(PolicySession[Any, Any]):
        def session(self, request: object, /, *, clock: Clock, random: Random) -> Endless:
            return self

        def retry(self, attempt: Attempt[Any, Any], /) -> Answer:
            return immediately()

    async def immediately() -> None:
        pass

    async with anyio.create_task_group() as group:
        async for attempt in attempts(Endless()):
            with attempt:
                number = attempt.number
                if number == 10:
                    group.cancel_scope.cancel()
                raise OSError
    assert number == 10


async def test_nothing_is_held_open_between_attempts() -> None:
    deadlines: list[float] = []
    async for attempt in attempts(policy(AT_ONCE)):
        deadlines.append(anyio.current_effective_deadline())
        with attempt, anyio.move_on_after(1):
            await anyio.lowlevel.checkpoint()
            deadlines.append(anyio.current_effective_deadline())
            if attempt.number < 2:
                raise OSError
    assert deadlines == [float("inf"), anyio.current_time() + 1] * 2


# --- using it wrongly ---


async def test_an_attempt_that_is_not_made_is_an_error_of_the_program() -> None:
    recorded, reached = Recorded([0.0, 0.0]), 0
    with pytest.raises(MisuseError, match="attempt 1 was not made: write `with attempt:`"):
        async for _ in attempts(recorded):
            reached += 1
    assert (reached, recorded.opened) == (1, 0)

    with pytest.raises(MisuseError, match="attempt 2 was not made"):
        async for attempt in attempts(recorded):
            if attempt.number == 1:
                with attempt:
                    raise OSError
    assert (recorded.opened, recorded.ended) == (1, 1)


async def test_a_block_cannot_be_entered_twice() -> None:
    with pytest.raises(MisuseError, match="attempt 1 was entered before"):
        async for attempt in attempts(policy()):
            with attempt, attempt:
                raise AssertionError("unreachable")

    with pytest.raises(MisuseError, match="attempt 1 was entered before"):
        async for attempt in attempts(policy()):
            with attempt:
                pass
            with attempt:
                raise AssertionError("unreachable")


async def test_the_next_attempt_cannot_be_had_while_one_is_being_made() -> None:
    loop = attempts(policy())
    with await anext(loop), pytest.raises(MisuseError, match="attempt 1 is not over yet"):
        await anext(loop)
    with pytest.raises(StopAsyncIteration):
        await anext(loop)


async def test_attempts_are_for_one_loop() -> None:
    shared = attempts(policy())
    async for attempt in shared:
        with attempt:
            pass
    with pytest.raises(MisuseError, match="belong to another loop"):
        async for _ in shared:
            raise AssertionError("unreachable")


async def test_a_block_outlives_the_iterator_that_gave_it() -> None:
    recorded = Recorded()
    block = await anext(attempts(recorded))
    gc.collect()
    with block:
        pass
    assert (recorded.opened, recorded.ended) == (1, 1)
    assert repr(block) == "<AttemptBlock 1>"


def test_attempts_is_an_iterator_and_no_generator() -> None:
    loop: object = attempts(policy())
    assert isinstance(loop, AsyncIterator)
    assert not hasattr(loop, "asend")


@pytest.mark.parametrize("arguments", [{}, {"policy": policy(), "on": OSError}])
def test_it_takes_a_policy_or_errors_and_not_both(arguments: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="either a policy, or the errors to retry by on="):
        attempts(**arguments)


def test_what_is_no_policy_is_refused() -> None:
    with pytest.raises(TypeError, match="takes a policy or a Backoff, not 3"):
        attempts(3)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="KeyboardInterrupt is no Exception"):
        attempts(on=KeyboardInterrupt)  # type: ignore[arg-type]


# --- memory ---


class Noted(OSError):
    """An error that a weak reference may point to."""


async def test_r22_a_swallowed_error_is_gone_before_the_next_attempt() -> None:
    gc.collect()
    gc.disable()
    try:
        raised: list[weakref.ref[Noted]] = []
        async for attempt in attempts(policy(AT_ONCE), hooks=Hooks()):
            assert all(each() is None for each in raised)
            with attempt:
                error = Noted()
                raised.append(weakref.ref(error))
                try:
                    if attempt.number < 3:
                        raise error
                finally:
                    del error
        assert all(each() is None for each in raised)
        assert len(raised) == 3
    finally:
        gc.enable()


@pytest.mark.parametrize("change", [None, "other error", "response"])
async def test_r22_the_last_error_is_in_no_cycle(change: str | None) -> None:
    def make_other(attempt: Attempt[Any, Any]) -> None:
        attempt.error = Noted() if change == "other error" else None

    async def loop() -> weakref.ref[Noted] | None:
        reference = None
        recorded = Recorded() if change is None else Recorded(change=make_other)
        recorded.asked = Forgetful()
        try:
            async for attempt in attempts(recorded):
                with attempt:
                    error = Noted()
                    reference = weakref.ref(error)
                    try:
                        raise error
                    finally:
                        del error
        except Noted as last:
            reference = weakref.ref(last)
        return reference

    class Forgetful(list[Attempt[Any, Any]]):
        def append(self, item: Attempt[Any, Any], /) -> None:
            pass

    gc.collect()
    gc.disable()
    try:
        reference = await loop()
        assert reference is not None
        assert reference() is None
    finally:
        gc.enable()


# --- the same as Retry ---


KINDS: dict[str, Callable[[], Exception]] = {
    "retried": lambda: OSError("retried"),
    "not retried": lambda: ValueError("not retried"),
    "says when": lambda: _saying_when(),
    "group": lambda: ExceptionGroup("group", [OSError(), OSError()]),
}


def _saying_when() -> Exception:
    error = OSError("says when")
    error.retry_after = 7.0  # type: ignore[attr-defined]
    return error


@settings(deadline=None, max_examples=60)
@given(
    script=st.lists(st.sampled_from(["answer", "unwanted", *KINDS]), min_size=1, max_size=6),
    max_attempts=st.integers(1, 5),
    max_elapsed=st.none() | st.sampled_from([0.0, 2.0, 5.0]),
    take=st.integers(0, 4),
    has_result_error=st.booleans(),
)
async def test_a_policy_cannot_tell_a_block_from_a_service(
    script: list[str], max_attempts: int, max_elapsed: float | None, take: int, has_result_error: bool
) -> None:
    errors = [KINDS[each]() if each in KINDS else None for each in script]
    shared = policy(
        SERIES.take(take),
        max_attempts=max_attempts,
        max_elapsed=max_elapsed,
        on_result="unwanted".__eq__,
        result_error=LookupError if has_result_error else None,
    )

    def outcome(number: int) -> str:
        which = min(number, len(script)) - 1
        error = errors[which]
        if error is not None:
            raise error
        return script[which]

    async def trace(run: Callable[[MockClock, Events], Any]) -> list[object]:
        clock = MockClock()
        events = Events(clock)
        try:
            end: object = await run(clock, events)
        except Exception as error:
            mark = given_up(error)
            end = (type(error), str(error), None if mark is None else (mark.attempts, mark.reason))
        seen = [str(each) for each in events.seen]
        return [clock.slept, seen, end]

    async def by_service(clock: MockClock, events: Events) -> object:
        calls = 0

        async def service(request: None, /) -> str:
            nonlocal calls
            calls += 1
            return outcome(calls)

        return await Retry(shared, clock=clock, sleep=clock.sleep, hooks=events)(service)(None)

    async def by_blocks(clock: MockClock, events: Events) -> object:
        attempt: AttemptBlock | None = None
        async for attempt in attempts(shared, clock=clock, sleep=clock.sleep, hooks=events):
            with attempt:
                attempt.result = outcome(attempt.number)
        assert attempt is not None
        return attempt.result

    assert await trace(by_service) == await trace(by_blocks)


@settings(deadline=None, max_examples=30)
@given(max_attempts=st.integers(1, 50), succeeds_at=st.integers(1, 60))
async def test_there_are_never_more_attempts_than_max_attempts(max_attempts: int, succeeds_at: int) -> None:
    number = 0
    with suppress(OSError):
        async for attempt in attempts(policy(AT_ONCE, max_attempts=max_attempts)):
            with attempt:
                number = attempt.number
                if number < succeeds_at:
                    raise OSError
    assert number == min(max_attempts, succeeds_at)
