"""Functions that try again by themselves: what Retry does for a service, and what is particular to functions."""

# What recovers or gives a key may take any arguments, so nothing tells a checker what a lambda takes.
# pyright: reportUnknownLambdaType=false, reportUnknownArgumentType=false, reportUnknownMemberType=false

from __future__ import annotations

import copy
import functools
import gc
import inspect
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from random import Random
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from towline.clock import Clock
from towline.errors import ConnectionLost, LinkLost, TowlineError
from towline.hooks import AttemptEnded, GaveUp, Hooks, RetryScheduled
from towline.layers.by_key import ByKey
from towline.layers.decorator import Call, retryable
from towline.layers.retry import given_up
from towline.policies import Answer, Attempt, Backoff, Budget, GiveUp, PolicySession, StandardPolicy
from towline.testing import MockClock, cancel_at_every_await

SERIES = Backoff.linear(initial=1, step=1, jitter="none")
AT_ONCE = Backoff.constant(0)


class Failing:
    """Raises the given errors in turn, the last one for ever unless an answer comes after it. Records its calls."""

    def __init__(self, *outcomes: object) -> None:
        self.outcomes = outcomes
        self.calls: list[object] = []

    def next(self, call: object = None) -> Any:
        self.calls.append(call)
        outcome = self.outcomes[min(len(self.calls), len(self.outcomes)) - 1]
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


@dataclass
class Recorded(PolicySession[Any, Any]):
    """A policy that answers as it is told to, and records what it was asked. Nothing more to say: None."""

    says: list[Answer] = field(default_factory=list[Answer])
    asked: list[Attempt[Any, Any]] = field(default_factory=list[Attempt[Any, Any]])
    change: Callable[[Attempt[Any, Any]], None] = lambda attempt: None
    opened: int = 0
    ended: int = 0

    def session(self, request: object, /, *, clock: Clock, random: Random) -> Recorded:
        self.opened += 1
        return self

    def retry(self, attempt: Attempt[Any, Any], /) -> Answer:
        kept = Attempt[Any, Any](attempt.request, number=attempt.number, error=attempt.error, response=attempt.response)
        self.asked.append(kept)
        self.change(attempt)
        return self.says.pop(0) if self.says else None

    def end(self) -> None:
        self.ended += 1


class Events(Hooks):
    def __init__(self) -> None:
        self.seen: list[object] = []

    def on_attempt(self, event: AttemptEnded, /) -> None:
        self.seen.append(event)

    def on_retry_scheduled(self, event: RetryScheduled, /) -> None:
        self.seen.append(event)

    def on_give_up(self, event: GaveUp, /) -> None:
        self.seen.append(event)


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


# --- how often, and what comes of it ---


@pytest.mark.smoke
async def test_r2_three_attempts_are_exactly_three_calls_and_the_last_error_is_raised_itself() -> None:
    clock, raised = MockClock(), [OSError(1), OSError(2), OSError(3)]
    failing = Failing(*raised)

    @retryable(on=OSError, max_attempts=3, backoff=SERIES, clock=clock, sleep=clock.sleep)
    async def fetch(url: str) -> str:
        return str(failing.next(url))

    with pytest.raises(OSError, match="3") as caught:
        await fetch("a")
    assert caught.value is raised[2]
    assert failing.calls == ["a", "a", "a"]
    assert clock.slept == [1, 2]
    mark = given_up(caught.value)
    assert mark is not None
    assert (mark.attempts, mark.reason) == (3, GiveUp.ATTEMPTS)


async def test_a_function_is_called_again_until_it_answers() -> None:
    failing = Failing(OSError(), OSError(), "answer")

    @retryable(on=OSError, backoff=AT_ONCE)
    async def fetch() -> str:
        return str(failing.next())

    assert await fetch() == "answer"
    assert len(failing.calls) == 3


async def test_there_are_three_attempts_by_default_as_springs_are() -> None:
    failing = Failing(OSError())

    @retryable(on=OSError, backoff=AT_ONCE)
    async def fetch() -> None:
        failing.next()

    with pytest.raises(OSError):  # noqa: PT011
        await fetch()
    assert len(failing.calls) == 3


async def test_what_is_not_named_or_excluded_is_raised_at_once() -> None:
    failing = Failing(TimeoutError())

    @retryable(on=OSError, not_on=TimeoutError)
    async def fetch() -> None:
        failing.next()

    with pytest.raises(TimeoutError):
        await fetch()
    failing.outcomes = (ValueError(),)
    with pytest.raises(ValueError):  # noqa: PT011
        await fetch()
    assert len(failing.calls) == 2


async def test_a_policy_of_ones_own_sees_the_arguments_as_they_were_given() -> None:
    recorded = Recorded([0.0])
    failing = Failing(OSError(), "answer")

    @retryable(policy=recorded)
    async def fetch(url: str, *, timeout: float = 1.0) -> str:
        return str(failing.next((url, timeout)))

    assert await fetch("a", timeout=2.0) == "answer"
    assert [each.request for each in recorded.asked] == [Call(("a",), {"timeout": 2.0})] * 2
    assert [each.response for each in recorded.asked] == [None, "answer"]
    assert (recorded.opened, recorded.ended) == (1, 1)


async def test_a_policy_may_change_the_arguments_of_the_next_attempt() -> None:
    def change(attempt: Attempt[Any, Any]) -> None:
        attempt.request = Call(("mirror",), {})

    failing = Failing(OSError(), "answer")

    @retryable(policy=Recorded([0.0], change=change))
    async def fetch(url: str) -> str:
        return str(failing.next(url))

    await fetch("main")
    assert failing.calls == ["main", "mirror"]


async def test_a_policy_may_copy_the_arguments_for_every_attempt() -> None:
    seen: list[list[int]] = []

    @retryable(policy=StandardPolicy(AT_ONCE, on=OSError, clone=copy.deepcopy))
    async def spoil(items: list[int]) -> None:
        seen.append(list(items))
        items.append(1)
        raise OSError

    items = [0]
    with pytest.raises(OSError):  # noqa: PT011
        await spoil(items)
    assert items == [0]
    assert seen == [[0], [0], [0]]


async def test_policy_alone_retries_what_says_that_it_is_retryable() -> None:
    failing = Failing(LinkLost("cut"), OSError("does not say"))

    @retryable(policy=StandardPolicy(AT_ONCE))
    async def fetch() -> None:
        failing.next()

    with pytest.raises(OSError, match="does not say"):
        await fetch()
    assert len(failing.calls) == 2


async def test_r5_a_result_may_be_asked_for_again_and_the_last_one_is_returned() -> None:
    failing = Failing("pending", "pending", "done")

    @retryable(on=(), on_result="pending".__eq__, backoff=AT_ONCE)
    async def poll() -> str:
        return str(failing.next())

    assert await poll() == "done"
    failing.outcomes, failing.calls = ("pending",), []
    assert await poll() == "pending"
    assert len(failing.calls) == 3


async def test_r13_the_delay_that_an_error_asks_for_is_kept() -> None:
    class Busy(TowlineError):
        retry_after = 7.0

    clock = MockClock()
    failing = Failing(Busy(), LookupError(), Busy())

    def delay_from(error: Exception) -> float | None:
        return 3.0 if isinstance(error, LookupError) else None

    @retryable(on=Exception, backoff=SERIES, clock=clock, sleep=clock.sleep)
    async def asked() -> None:
        failing.next()

    @retryable(on=Exception, backoff=SERIES, delay_from=delay_from, clock=clock, sleep=clock.sleep)
    async def otherwise() -> None:
        failing.next()

    with pytest.raises(Busy):
        await asked()
    assert clock.slept == [7.0, 1.0]
    failing.calls, clock.slept = [], []
    with pytest.raises(Busy):
        await otherwise()
    assert clock.slept == [1.0, 3.0]


async def test_max_elapsed_bounds_the_beginning_of_the_last_attempt() -> None:
    clock, failing = MockClock(), Failing(OSError())

    @retryable(on=OSError, max_attempts=99, max_elapsed=3, backoff=SERIES, clock=clock, sleep=clock.sleep)
    async def fetch() -> None:
        failing.next()

    with pytest.raises(OSError):  # noqa: PT011
        await fetch()
    assert clock.slept == [1, 2]


async def test_r19_what_may_have_been_carried_out_is_repeated_only_if_that_does_no_harm() -> None:
    class Sent(ConnectionLost):
        sent = True

    class NotSent(ConnectionLost):
        sent = False

    seen: list[tuple[str, int]] = []

    def idempotent(method: str, /, url: str, *, body: int) -> bool:
        seen.append((url, body))
        return method == "GET"

    failing = Failing(Sent("lost"))

    @retryable(on=ConnectionLost, idempotent=idempotent, backoff=AT_ONCE)
    async def send(method: str, url: str, *, body: int = 0) -> None:
        failing.next()

    async def calls(function: Callable[..., Awaitable[None]], *args: str, **kwargs: Any) -> int:
        failing.calls = []
        with suppress(ConnectionLost):
            await function(*args, **kwargs)
        return len(failing.calls)

    assert await calls(send, "GET", url="a") == 3
    assert await calls(send, "PUT", "a", body=1) == 1
    assert seen == [("a", 0), ("a", 0), ("a", 0), ("a", 1)]

    @retryable(on=ConnectionLost, backoff=AT_ONCE)
    async def unknown() -> None:
        failing.next()

    @retryable(on=ConnectionLost, idempotent=True, backoff=AT_ONCE)
    async def known() -> None:
        failing.next()

    assert await calls(unknown) == 1
    assert await calls(known) == 3
    failing.outcomes = (NotSent("never left"),)
    assert await calls(unknown) == 3


async def test_a_decorator_has_one_budget_for_all_that_it_is_put_on() -> None:
    clock, calls = MockClock(), 0
    shared = retryable(on=OSError, max_attempts=2, backoff=AT_ONCE, clock=clock, sleep=clock.sleep)

    @shared
    async def first() -> None:
        nonlocal calls
        calls += 1
        raise OSError

    @shared
    async def second() -> None:
        nonlocal calls
        calls += 1
        raise OSError

    for _ in range(100):
        for each in (first, second):
            with suppress(OSError):
                await each()
    assert calls == 200 + 100  # the default allows a hundred retries that no success has paid for


async def test_the_budget_may_be_shared_or_none() -> None:
    counted, calls = Counted(), 0

    @retryable(on=OSError, budget=counted, backoff=AT_ONCE)
    async def fetch() -> None:
        nonlocal calls
        calls += 1
        assert counted.inside == 1
        assert counted.extra == (calls > 1)
        raise OSError

    with pytest.raises(OSError):  # noqa: PT011
        await fetch()
    assert (calls, counted.inside, counted.extra) == (3, 0, 0)

    @retryable(on=OSError, budget=None, max_attempts=1000, backoff=AT_ONCE)
    async def unbounded() -> None:
        nonlocal calls
        calls += 1
        raise OSError

    calls = 0
    with pytest.raises(OSError):  # noqa: PT011
        await unbounded()
    assert calls == 1000


@settings(deadline=None, max_examples=30)
@given(max_attempts=st.integers(1, 40), succeeds_at=st.integers(1, 50))
async def test_there_are_never_more_calls_than_max_attempts(max_attempts: int, succeeds_at: int) -> None:
    calls = 0

    @retryable(on=OSError, max_attempts=max_attempts, backoff=AT_ONCE, budget=None)
    async def fetch() -> int:
        nonlocal calls
        calls += 1
        if calls < succeeds_at:
            raise OSError
        return calls

    if succeeds_at <= max_attempts:
        assert await fetch() == succeeds_at
    else:
        with pytest.raises(OSError):  # noqa: PT011
            await fetch()
    assert calls == min(max_attempts, succeeds_at)


# --- the labels that functions share with services ---


async def test_r7_a_hundred_calls_at_once_do_not_share_state() -> None:
    calls: dict[int, int] = {}

    @retryable(on=OSError, max_attempts=3, backoff=AT_ONCE, budget=None)
    async def fetch(number: int) -> None:
        calls[number] = calls.get(number, 0) + 1
        await anyio.lowlevel.checkpoint()
        raise OSError(number)

    async def one(number: int) -> None:
        with pytest.raises(OSError) as caught:  # noqa: PT011
            await fetch(number)
        assert caught.value.args == (number,)

    async with anyio.create_task_group() as group:
        for number in range(100):
            group.start_soon(one, number)
    assert sum(calls.values()) == 300
    assert set(calls.values()) == {3}


async def test_r8_a_function_that_is_called_again_has_the_same_delays_again() -> None:
    clock = MockClock()

    @retryable(on=OSError, max_attempts=4, backoff=SERIES, clock=clock, sleep=clock.sleep)
    async def fetch() -> None:
        raise OSError

    for _ in range(2):
        with pytest.raises(OSError):  # noqa: PT011
            await fetch()
    assert clock.slept == [1, 2, 3, 1, 2, 3]


async def test_r8_the_same_seed_gives_the_same_jitter_and_another_another() -> None:
    async def delays(seed: int) -> list[float]:
        clock = MockClock()
        decorate = retryable(on=OSError, max_attempts=9, random=Random(seed), clock=clock, sleep=clock.sleep)

        @decorate
        async def fetch() -> None:
            raise OSError

        with pytest.raises(OSError):  # noqa: PT011
            await fetch()
        return clock.slept

    assert await delays(1) == await delays(1) != await delays(2)


async def test_r9_cancellation_in_a_call_or_a_wait_ends_it_and_the_policy_is_not_asked() -> None:
    recorded, calls = Recorded([5.0]), 0

    @retryable(policy=recorded)
    async def fetch(seconds: float) -> None:
        nonlocal calls
        calls += 1
        await anyio.sleep(seconds)
        raise OSError

    for seconds, asked in ((5.0, 0), (0.5, 1)):
        with anyio.move_on_after(1) as scope:
            await fetch(seconds)
        assert scope.cancelled_caught
        assert len(recorded.asked) == asked
    assert (calls, recorded.opened, recorded.ended) == (2, 2, 2)


async def test_r9_wherever_it_is_cancelled_the_budget_gets_back_what_it_counts() -> None:
    counted = Counted()

    @retryable(on=OSError, budget=counted, backoff=SERIES, recover=lambda error: anyio.sleep(1))
    async def fetch() -> None:
        await anyio.sleep(1)
        raise OSError

    async def check() -> None:
        assert (counted.inside, counted.extra) == (0, 0)

    assert await cancel_at_every_await(fetch, check) == 6


async def test_r10_no_wait_is_begun_that_the_deadline_would_end() -> None:
    @retryable(on=OSError, backoff=Backoff.constant(5, jitter="none"))
    async def fetch() -> None:
        raise OSError

    start = anyio.current_time()
    with anyio.fail_after(1), pytest.raises(OSError) as caught:  # noqa: PT011
        await fetch()
    assert anyio.current_time() == start
    mark = given_up(caught.value)
    assert mark is not None
    assert mark.reason is GiveUp.DEADLINE


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
async def test_r11_what_is_no_exception_is_neither_retried_nor_recovered_from(kind: type[BaseException]) -> None:
    recorded, failing = Recorded([0.0]), Failing(kind())

    @retryable(policy=recorded, recover=lambda error: None)
    async def fetch() -> None:
        failing.next()

    with pytest.raises(kind):
        await fetch()
    assert (len(failing.calls), recorded.asked, recorded.ended) == (1, [], 1)


async def test_r12_a_group_is_retried_only_if_all_its_leaves_match() -> None:
    failing = Failing()

    @retryable(on=OSError, backoff=AT_ONCE)
    async def fetch() -> None:
        failing.next()

    for leaves, calls in (([OSError(), ConnectionError()], 3), ([OSError(), ValueError()], 1)):
        failing.outcomes, failing.calls = (ExceptionGroup("leaves", leaves),), []
        with pytest.raises(ExceptionGroup):
            await fetch()
        assert len(failing.calls) == calls


async def test_r16_functions_within_functions_do_not_multiply() -> None:
    failing = Failing(OSError("no"))
    decorate = retryable(on=OSError, backoff=AT_ONCE)

    @decorate
    async def inner() -> None:
        failing.next()

    @decorate
    async def outer() -> None:
        await inner()

    with pytest.raises(OSError, match="no"):
        await outer()
    assert len(failing.calls) == 3


async def test_r18_hooks_are_told_in_order_and_one_that_raises_breaks_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Broken(Events):
        def on_retry_scheduled(self, event: RetryScheduled, /) -> None:
            self.seen.append(("slept so far", list(clock.slept)))
            super().on_retry_scheduled(event)
            raise RuntimeError("the hook is broken")

    clock, events, errors = MockClock(), Broken(), [OSError(1), OSError(2)]
    failing = Failing(*errors)

    @retryable(on=OSError, max_attempts=2, backoff=SERIES, clock=clock, sleep=clock.sleep, hooks=events)
    async def fetch() -> None:
        failing.next()

    with pytest.raises(OSError, match="2"):
        await fetch()
    assert events.seen == [
        AttemptEnded(1, 0.0, errors[0], handled=True),
        ("slept so far", []),
        RetryScheduled(2, 1.0, errors[0]),
        AttemptEnded(2, 0.0, errors[1], handled=False),
        GaveUp(2, 1.0, GiveUp.ATTEMPTS, errors[1]),
    ]
    assert "a hook raised" in caplog.text


async def test_r20_an_exhausted_backoff_stops() -> None:
    failing = Failing(OSError())

    @retryable(on=OSError, max_attempts=9, backoff=AT_ONCE.take(1))
    async def fetch() -> None:
        failing.next()

    with pytest.raises(OSError):  # noqa: PT011
        await fetch()
    assert len(failing.calls) == 2


async def test_r21_retries_without_delays_can_be_cancelled() -> None:
    calls = 0

    @retryable(on=OSError, max_attempts=1_000_000, backoff=AT_ONCE, budget=None)
    async def fetch() -> None:
        nonlocal calls
        calls += 1
        raise OSError

    scope = anyio.CancelScope()

    async def run() -> None:
        with scope:
            await fetch()

    async with anyio.create_task_group() as group:
        group.start_soon(run)
        for _ in range(10):
            await anyio.lowlevel.checkpoint()
        scope.cancel()
    assert scope.cancelled_caught
    assert 5 < calls < 20


class Noted(OSError):
    """An error that a weak reference may point to."""


@pytest.fixture
def no_gc() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_gc")
@pytest.mark.parametrize("how", ["plain", "recover", "other recover", "state", "source"])
async def test_r22_no_error_is_in_a_cycle(how: str) -> None:
    raised: list[weakref.ref[Noted]] = []

    def fail() -> None:
        error = Noted()
        raised.append(weakref.ref(error))
        try:
            raise error
        finally:
            del error

    async def function() -> None:
        fail()

    async def source() -> AsyncIterator[int]:
        fail()
        yield 1

    async def recover(error: Exception) -> None:
        return None

    plain = retryable(on=OSError, backoff=AT_ONCE)
    decorated: Callable[[], Coroutine[Any, Any, None]] = plain(function)
    if how == "recover":
        decorated = retryable(on=OSError, backoff=AT_ONCE, recover=recover)(function)
    elif how == "other recover":
        decorated = retryable(on=OSError, backoff=AT_ONCE, recover={LookupError: recover})(function)
    elif how == "state":
        decorated = retryable(on=OSError, backoff=AT_ONCE, state=lambda: "key")(function)
    elif how == "source":
        rows = plain(source)

        async def first() -> None:
            await anext(rows())

        decorated = first

    for _ in range(5):
        try:
            await decorated()
        except Noted as error:  # with a key it may be a copy
            raised.append(weakref.ref(error))
    assert len(raised) >= 4
    assert [each() for each in raised] == [None] * len(raised)


# --- sources ---


async def test_r17_an_async_generator_is_tried_again_only_before_the_first_item() -> None:
    clock = MockClock()
    failing = Failing(OSError(1), OSError(2), "ok")

    @retryable(on=OSError, backoff=SERIES, clock=clock, sleep=clock.sleep)
    async def rows(table: str) -> AsyncIterator[str]:
        failing.next(table)
        yield "first"
        yield "second"
        raise OSError("after the first")

    seen: list[str] = []

    async def read() -> None:
        async for row in rows("a"):
            seen.append(row)

    with pytest.raises(OSError, match="after the first") as caught:
        await read()
    assert seen == ["first", "second"]
    assert failing.calls == ["a", "a", "a"]
    assert clock.slept == [1, 2]
    assert given_up(caught.value) is None


async def test_r17_a_source_that_never_gives_an_item_raises_its_last_error_itself_and_is_over() -> None:
    errors = [OSError(1), OSError(2), OSError(3)]
    failing = Failing(*errors)

    @retryable(on=OSError, backoff=AT_ONCE)
    async def rows() -> AsyncIterator[int]:
        failing.next()
        yield 1

    source = rows()
    with pytest.raises(OSError) as caught:  # noqa: PT011
        await anext(source)
    assert caught.value is errors[2]
    with pytest.raises(StopAsyncIteration):
        await anext(source)
    assert len(failing.calls) == 3


async def test_r17_a_source_may_be_empty_and_each_call_makes_another_one() -> None:
    failing = Failing(OSError(), None)

    @retryable(on=OSError, backoff=AT_ONCE)
    async def rows() -> AsyncIterator[int]:
        failing.next()
        return
        yield 1

    assert [row async for row in rows()] == []
    assert [row async for row in rows()] == []
    assert len(failing.calls) == 3


async def test_r17_nothing_is_called_before_the_first_item_is_asked_for() -> None:
    calls = 0

    @retryable(on=OSError)
    async def rows() -> AsyncGenerator[int, None]:
        nonlocal calls
        calls += 1
        yield 1

    async with aclosing(rows()) as source:
        assert calls == 0
        assert await anext(source) == 1
    assert calls == 1
    async with aclosing(rows()) as source:
        pass
    with pytest.raises(StopAsyncIteration):
        await anext(source)
    assert calls == 1


async def test_r17_the_first_item_may_be_judged_and_the_generator_that_gave_it_is_closed() -> None:
    closed: list[str] = []
    failing = Failing("stale", "fresh")

    @retryable(on=(), on_result="stale".__eq__, backoff=AT_ONCE)
    async def rows() -> AsyncIterator[str]:
        item = str(failing.next())
        try:
            yield item
            yield "more"
        finally:
            closed.append(item)

    source = rows()
    assert await anext(source) == "fresh"
    assert closed == ["stale"]
    assert [item async for item in source] == ["more"]
    assert closed == ["stale", "fresh"]


async def test_r17_a_source_is_a_generator_for_whoever_sends_throws_and_closes() -> None:
    failing = Failing(OSError(), "ok")
    seen: list[object] = []

    @retryable(on=OSError, backoff=AT_ONCE)
    async def chat() -> AsyncGenerator[int, str | None]:
        failing.next()
        try:
            seen.append((yield 1))
            seen.append((yield 2))
            yield 3
        except LookupError as error:
            seen.append(error)
            yield 4
        finally:
            seen.append("closed")

    source = chat()
    assert isinstance(source, AsyncGenerator)
    with pytest.raises(TypeError, match="no item yet"):
        await source.asend("too early")
    source = chat()
    assert await source.asend(None) == 1
    assert await source.asend("hello") == 2
    error = LookupError()
    assert await source.athrow(error) == 4
    await source.aclose()
    assert seen == ["hello", error, "closed"]
    with pytest.raises(LookupError):
        await chat().athrow(LookupError())


async def test_r17_cancellation_before_the_first_item_ends_the_source() -> None:
    recorded = Recorded([0.0])

    @retryable(policy=recorded)
    async def rows() -> AsyncIterator[int]:
        await anyio.sleep(5)
        yield 1

    source = rows()
    with anyio.move_on_after(1) as scope:
        await anext(source)
    assert scope.cancelled_caught
    assert (recorded.asked, recorded.ended) == ([], 1)
    with pytest.raises(StopAsyncIteration):
        await anext(source)


async def test_r17_no_scope_is_open_while_a_source_waits_to_be_asked() -> None:
    @retryable(on=OSError)
    async def rows() -> AsyncGenerator[int, None]:
        yield 1
        yield 2

    async with aclosing(rows()) as source:
        with anyio.move_on_after(1):
            assert await anext(source) == 1
        assert anyio.current_effective_deadline() == float("inf")
        with anyio.move_on_after(2):
            assert await anext(source) == 2


async def test_r17_two_tasks_cannot_ask_for_the_first_item() -> None:
    @retryable(on=OSError)
    async def rows() -> AsyncGenerator[int, None]:
        await anyio.sleep(1)
        yield 1

    async def first() -> None:
        assert await anext(source) == 1

    async with aclosing(rows()) as source, anyio.create_task_group() as group:
        group.start_soon(first)
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(RuntimeError, match="asked for its first item already"):
            await anext(source)
        with pytest.raises(RuntimeError, match="asked for its first item already"):
            await source.aclose()


@pytest.mark.usefixtures("no_gc")
async def test_r17_a_source_that_nobody_has_any_more_is_gone_at_once() -> None:
    @retryable(on=OSError)
    async def rows() -> AsyncGenerator[int, None]:
        yield 1
        yield 2

    source = rows()
    assert await anext(source) == 1
    gone = weakref.ref(source)
    await source.aclose()
    del source
    assert gone() is None


async def test_r17_sources_of_one_function_do_not_share_state() -> None:
    calls = 0

    @retryable(on=OSError, max_attempts=3, backoff=AT_ONCE, budget=None)
    async def rows() -> AsyncIterator[int]:
        nonlocal calls
        calls += 1
        await anyio.lowlevel.checkpoint()
        raise OSError
        yield 1

    async def one() -> None:
        with pytest.raises(OSError):  # noqa: PT011
            await anext(rows())

    async with anyio.create_task_group() as group:
        for _ in range(100):
            group.start_soon(one)
    assert calls == 300


class Repository:
    def __init__(self) -> None:
        self.failing = Failing(OSError(), "ok")

    @retryable(on=OSError, backoff=AT_ONCE)
    async def rows(self, count: int) -> AsyncIterator[int]:
        self.failing.next()
        for row in range(count):
            yield row


async def test_r17_a_source_may_be_a_method() -> None:
    assert [row async for row in Repository().rows(3)] == [0, 1, 2]


# --- what may be decorated ---


class Client:
    """What methods are decorated on."""

    made = 0

    def __init__(self) -> None:
        self.failing = Failing(OSError(), "answer")

    @retryable(on=OSError, backoff=AT_ONCE)
    async def get(self, key: str, /, *, default: int = 0) -> tuple[str, int, Any]:
        """Get something."""
        return key, default, self.failing.next()

    @classmethod
    @retryable(on=OSError, backoff=AT_ONCE)
    async def make(cls) -> Client:
        cls.made += 1
        if cls.made < 2:
            raise OSError
        return cls()

    @staticmethod
    @retryable(on=OSError, backoff=AT_ONCE)
    async def ping(failing: Failing) -> object:
        return failing.next()


class Pool:
    """Calls like a function."""

    def __init__(self) -> None:
        self.failing = Failing(OSError(), "answer")

    async def __call__(self, size: int) -> tuple[int, Any]:
        """Take some."""
        return await self.take(size)

    async def take(self, size: int) -> tuple[int, Any]:
        return size, self.failing.next()


async def test_methods_are_decorated_in_their_class() -> None:
    assert await Client().get("a", default=1) == ("a", 1, "answer")
    assert isinstance(await Client.make(), Client)
    assert await Client.ping(Failing(OSError(), "pong")) == "pong"
    assert await Client().ping(Failing(OSError(), "pong")) == "pong"


async def test_bound_methods_partials_and_callable_objects_are_decorated_as_they_are() -> None:
    async def get(failing: Failing, key: str) -> tuple[str, object]:
        return key, failing.next()

    decorate = retryable(on=OSError, backoff=AT_ONCE)
    assert await decorate(functools.partial(get, Failing(OSError(), "answer")))("b") == ("b", "answer")
    assert await decorate(functools.partial(Pool(), 3))() == (3, "answer")
    assert await decorate(Pool())(3) == (3, "answer")
    assert await decorate(Pool().take)(3) == (3, "answer")


def test_a_decorated_function_keeps_its_name_and_signature_and_has_the_plain_one() -> None:
    async def fetch(url: str, *, timeout: float = 1.0) -> bytes:
        """Fetch it."""
        return b""

    fetch.__dict__["note"] = "kept"
    decorated = retryable(on=OSError)(fetch)
    assert decorated.__name__ == "fetch"
    assert decorated.__qualname__.endswith("<locals>.fetch")
    assert decorated.__module__ == __name__
    assert decorated.__doc__ == "Fetch it."
    assert decorated.__dict__["note"] == "kept"
    assert decorated.__dict__["__wrapped__"] is fetch
    assert inspect.signature(decorated) == inspect.signature(fetch)
    assert inspect.iscoroutinefunction(decorated)
    assert Client.get.__name__ == "get"
    assert Client.get.__doc__ == "Get something."


def test_what_has_no_name_of_its_own_has_that_of_what_is_called() -> None:
    async def fetch(url: str) -> bytes:
        """Fetch it."""
        return b""

    pool = Pool()
    named = retryable(on=OSError)(pool)
    assert (named.__name__, named.__qualname__, named.__doc__) == ("Pool", "Pool", "Calls like a function.")
    assert named.__dict__ == {"__wrapped__": pool}
    partial = retryable(on=OSError)(functools.partial(fetch, "a"))
    assert partial.__name__ == "fetch"
    assert partial.__doc__ == "Fetch it."


def plain_function() -> None:
    pass


def plain_generator() -> Iterator[int]:
    yield 1


def returns_a_coroutine() -> Coroutine[Any, Any, None]:
    return anyio.sleep(1)


class SyncCall:
    def __call__(self) -> None:
        pass


@pytest.mark.parametrize(
    "function",
    [
        plain_function,
        plain_generator,
        returns_a_coroutine,
        lambda: None,
        SyncCall(),
        Pool,
        len,
        3,
        functools.partial(int),
    ],
)
def test_what_is_not_async_is_refused_when_it_is_decorated(function: Any) -> None:
    with pytest.raises(TypeError, match=r"retryable takes async functions, and .* is none"):
        retryable(on=OSError)(function)


@pytest.mark.parametrize("outer", [classmethod, staticmethod])
def test_classmethod_and_staticmethod_go_above(outer: Any) -> None:
    async def fetch() -> None:
        pass

    with pytest.raises(TypeError, match=f"put @{outer.__name__} above @retryable"):
        retryable(on=OSError)(outer(fetch))


def test_which_errors_to_retry_has_no_default() -> None:
    untyped: Any = retryable

    async def fetch() -> None:
        pass

    with pytest.raises(TypeError, match=r"write @retryable\(on=...\)"):
        untyped(fetch)
    with pytest.raises(TypeError, match="needs on="):
        retryable()
    with pytest.raises(TypeError, match="needs on="):
        retryable(on_result=bool)


@pytest.mark.parametrize(
    "more",
    [
        {"on": OSError},
        {"not_on": OSError},
        {"on_result": bool},
        {"max_attempts": 3},
        {"max_elapsed": 1.0},
        {"backoff": SERIES},
        {"budget": None},
        {"delay_from": lambda error: None},
        {"idempotent": True},
    ],
    ids=list,
)
def test_a_policy_stands_alone(more: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="not both"):
        retryable(policy=StandardPolicy(), **more)


@pytest.mark.parametrize(
    ("wrong", "kind", "match"),
    [
        ({"on": KeyboardInterrupt}, TypeError, "KeyboardInterrupt is no Exception"),
        ({"on": OSError, "not_on": 3}, TypeError, "3"),
        ({"on": OSError, "max_attempts": 0}, ValueError, "max_attempts is 0, where 1 or more is expected"),
        ({"on": OSError, "max_elapsed": float("nan")}, ValueError, "max_elapsed is nan"),
        ({"policy": 3}, TypeError, "not 3"),
        ({"on": OSError, "on_result": bool, "state": len}, TypeError, "on_result"),
        ({"policy": StandardPolicy(on_result=bool), "state": len}, TypeError, "on_result"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_decorated(
    wrong: dict[str, Any], kind: type[Exception], match: str
) -> None:
    with pytest.raises(kind, match=match):
        retryable(**wrong)


# --- recover ---


async def test_recover_is_called_when_all_attempts_have_failed_with_the_error_and_the_arguments() -> None:
    last, seen = OSError("no"), list[object]()
    failing = Failing(last)

    async def recover(error: Exception, url: str, *, timeout: float) -> str:
        await anyio.lowlevel.checkpoint()
        seen.append((error, url, timeout))
        return "recovered"

    @retryable(on=OSError, backoff=AT_ONCE, recover=recover)
    async def fetch(url: str, *, timeout: float = 1.0) -> str:
        return str(failing.next())

    assert await fetch("a") == "recovered"
    assert seen == [(last, "a", 1.0)]
    assert len(failing.calls) == 3
    assert given_up(last) is not None


async def test_recover_is_called_for_an_error_that_was_not_worth_a_retry_as_springs_is() -> None:
    failing = Failing(ValueError("wrong"))

    @retryable(on=OSError, recover=lambda error: f"recovered from {error}")
    async def fetch() -> str:
        return str(failing.next())

    assert await fetch() == "recovered from wrong"
    assert len(failing.calls) == 1


async def test_recover_is_not_called_on_success() -> None:
    @retryable(on=OSError, recover=lambda error: "recovered")
    async def fetch() -> str:
        return "answer"

    assert await fetch() == "answer"


async def test_of_many_that_recover_the_closest_class_is_taken() -> None:
    failing = Failing()

    @retryable(
        on=(),
        recover={
            Exception: lambda error: "any",
            OSError: lambda error: "network",
            ConnectionResetError: lambda error: "reset",
        },
    )
    async def fetch() -> str:
        return str(failing.next())

    for error, answer in (
        (ConnectionResetError(), "reset"),
        (ConnectionRefusedError(), "network"),
        (TimeoutError(), "network"),
        (KeyError(), "any"),
    ):
        failing.outcomes = (error,)
        assert await fetch() == answer


async def test_an_error_that_none_recovers_from_is_raised_itself() -> None:
    error = ValueError("wrong")
    failing = Failing(error)

    @retryable(on=OSError, recover={OSError: lambda error: None})
    async def fetch() -> None:
        failing.next()

    with pytest.raises(ValueError, match="wrong") as caught:
        await fetch()
    assert caught.value is error


async def test_what_recovers_gets_its_arguments_in_one_form_however_they_were_given() -> None:
    seen: list[object] = []

    def recover(error: Exception, first: int, second: int, *others: int, third: int, **more: int) -> None:
        seen.append((first, second, others, third, more))

    @retryable(on=(), recover=recover)
    async def fetch(a: int, b: int = 2, *c: int, third: int = 3, **more: int) -> None:
        raise OSError

    await fetch(1)
    await fetch(a=1, b=5)
    await fetch(1, 2, 7, 8, third=9, fourth=4)
    assert seen == [(1, 2, (), 3, {}), (1, 5, (), 3, {}), (1, 2, (7, 8), 9, {"fourth": 4})]


class Inbox:
    """Its method recovers by another one."""

    def __init__(self) -> None:
        self.dead: list[str] = []

    async def bury(self, error: Exception, message: str) -> str:
        self.dead.append(message)
        return "buried"

    @retryable(on=OSError, backoff=AT_ONCE, recover=lambda error, self, message: self.bury(error, message))
    async def handle(self, message: str) -> str:
        raise OSError


async def test_a_method_recovers_by_another_method() -> None:
    inbox = Inbox()
    assert await inbox.handle("a") == "buried"
    assert inbox.dead == ["a"]


async def test_what_recovers_may_raise_and_the_error_before_is_seen_with_it() -> None:
    first = OSError("first")
    failing = Failing(first)

    def recover(error: Exception) -> None:
        raise LookupError("second")

    @retryable(on=(), recover=recover)
    async def fetch() -> None:
        failing.next()

    with pytest.raises(LookupError, match="second") as caught:
        await fetch()
    assert caught.value.__context__ is first


async def test_nothing_is_recovered_from_a_cancellation() -> None:
    @retryable(on=OSError, recover=lambda error: pytest.fail("recovered"))
    async def fetch() -> None:
        await anyio.sleep(5)

    with anyio.move_on_after(1) as scope:
        await fetch()
    assert scope.cancelled_caught


@pytest.mark.parametrize(
    ("recover", "match"),
    [
        (
            lambda: None,
            r"recover= must take the error and then what the function takes, \(url: 'str', \*, n: 'int' = 0\):",
        ),
        (lambda error: None, "too many positional"),
        (lambda error, url: None, "unexpected keyword argument 'n'"),
        (lambda error, url, more, *, n: None, "missing a required argument: 'more'"),
        ({OSError: lambda error: None}, "too many positional"),
        ({OSError: 3}, "recover is 3, where a function is expected"),
        ({KeyboardInterrupt: lambda error, url, n: None}, "KeyboardInterrupt is no Exception"),
        ({"OSError": lambda error, url, n: None}, "no class of exceptions"),
    ],
)
def test_what_could_not_be_called_to_recover_is_refused_when_decorating(recover: Any, match: str) -> None:
    async def fetch(url: str, *, n: int = 0) -> None:
        pass

    with pytest.raises(TypeError, match=match):
        retryable(on=OSError, recover=recover)(fetch)


def test_state_and_idempotent_must_take_the_arguments_too() -> None:
    async def fetch(url: str) -> None:
        pass

    with pytest.raises(TypeError, match=r"state= must take what the function takes, \(url: 'str'\):"):
        retryable(on=OSError, state=lambda: 1)(fetch)
    with pytest.raises(TypeError, match=r"idempotent= must take what the function takes, \(url: 'str'\):"):
        retryable(on=OSError, idempotent=lambda: True)(fetch)


@pytest.mark.parametrize("more", [{"recover": lambda error: None}, {"state": lambda: 1}])
def test_a_source_neither_recovers_nor_has_a_key(more: dict[str, Any]) -> None:
    async def rows() -> AsyncIterator[int]:
        yield 1

    with pytest.raises(TypeError, match="async generator function"):
        retryable(on=OSError, **more)(rows)


# --- state ---


@dataclass(frozen=True)
class Message:
    id: int
    text: str = ""


class Consumer:
    """Handles messages with ``state``; the tests deliver them, on a clock of their own."""

    def __init__(self, *outcomes: object, **settings: Any) -> None:
        self.clock = MockClock()
        self.failing = Failing(*outcomes)
        values: dict[str, Any] = {
            "on": OSError,
            "backoff": SERIES,
            "budget": None,
            "state": lambda message: message.id,
            "clock": self.clock,
            "sleep": self.clock.sleep,
            **settings,
        }

        async def handle(message: Message) -> str:
            return str(self.failing.next(message))

        self.deliver: Callable[[Message], Coroutine[Any, Any, str]] = retryable(**values)(handle)

    async def fails(self, message: Message, kind: type[Exception] = OSError) -> Exception:
        with pytest.raises(kind) as caught:
            await self.deliver(message)
        return caught.value


async def test_with_a_key_each_call_is_one_attempt_and_its_error_is_raised_at_once() -> None:
    errors = [OSError(1), OSError(2)]
    consumer = Consumer(*errors, "handled")
    assert await consumer.fails(Message(1)) is errors[0]
    assert consumer.clock.slept == []
    assert await consumer.fails(Message(1)) is errors[1]
    assert await consumer.deliver(Message(1)) == "handled"
    assert len(consumer.failing.calls) == 3


async def test_a_call_that_comes_too_early_waits_for_the_rest_of_the_delay() -> None:
    consumer = Consumer(OSError(), max_attempts=9)
    await consumer.fails(Message(1))
    consumer.clock.advance(0.25)
    await consumer.fails(Message(1))  # the first delay is 1
    assert consumer.clock.slept == [0.75]
    consumer.clock.advance(5)
    await consumer.fails(Message(1))  # the second is 2, and over
    assert consumer.clock.slept == [0.75]
    await consumer.fails(Message(1))
    assert consumer.clock.slept == [0.75, 3.0]


async def test_after_the_last_attempt_the_next_call_recovers_and_does_not_call_the_function() -> None:
    seen: list[object] = []

    def recover(error: Exception, message: Message) -> str:
        seen.append((type(error), str(error), message.text))
        return "buried"

    consumer = Consumer(OSError(1), OSError(2), recover=recover, max_attempts=2)
    await consumer.fails(Message(1, "first delivery"))
    last = await consumer.fails(Message(1, "second delivery"))
    mark = given_up(last)
    assert mark is not None
    assert (mark.attempts, mark.reason) == (2, GiveUp.ATTEMPTS)
    assert seen == []
    assert await consumer.deliver(Message(1, "third delivery")) == "buried"
    assert seen == [(OSError, "2", "third delivery")]
    assert len(consumer.failing.calls) == 2
    await consumer.fails(Message(1))  # and it starts anew
    assert len(consumer.failing.calls) == 3


async def test_after_the_last_attempt_without_recover_the_next_call_raises_a_copy_and_the_key_starts_anew() -> None:
    consumer = Consumer(OSError(1, "one"), OSError(2, "two"), max_attempts=2)
    await consumer.fails(Message(1))
    last = await consumer.fails(Message(1))
    again = await consumer.fails(Message(1))
    assert again is not last
    assert (type(again), again.args) == (type(last), last.args)
    assert len(consumer.failing.calls) == 2
    await consumer.fails(Message(1))
    assert len(consumer.failing.calls) == 3


async def test_an_error_that_is_not_worth_a_retry_exhausts_the_key_at_once() -> None:
    consumer = Consumer(ValueError("poison"), recover=lambda error, message: f"buried: {error}")
    await consumer.fails(Message(1), ValueError)
    assert await consumer.deliver(Message(1)) == "buried: poison"
    assert len(consumer.failing.calls) == 1


async def test_what_is_not_recovered_from_is_raised_though_something_recovers_from_others() -> None:
    consumer = Consumer(ValueError("poison"), recover={OSError: lambda error, message: "buried"})
    await consumer.fails(Message(1), ValueError)
    await consumer.fails(Message(1), ValueError)
    assert len(consumer.failing.calls) == 1


@pytest.mark.parametrize("how", ["raises", "is cancelled"])
async def test_as_long_as_what_recovers_fails_the_next_call_tries_that_again(how: str) -> None:
    tries = 0

    async def recover(error: Exception, message: Message) -> str:
        nonlocal tries
        tries += 1
        if tries == 1:
            await anyio.sleep(5)
            raise error
        return "buried"

    consumer = Consumer(ValueError("poison"), recover=recover)
    await consumer.fails(Message(1), ValueError)
    if how == "raises":
        await consumer.fails(Message(1), ValueError)
    else:
        with anyio.move_on_after(1):
            await consumer.deliver(Message(1))
    assert await consumer.deliver(Message(1)) == "buried"
    assert (tries, len(consumer.failing.calls)) == (2, 1)


async def test_a_success_forgets_the_key() -> None:
    consumer = Consumer(OSError(), "handled", OSError(), OSError(), "handled", max_attempts=3)
    await consumer.fails(Message(1))
    await consumer.deliver(Message(1))
    await consumer.fails(Message(1))
    await consumer.fails(Message(1))
    assert await consumer.deliver(Message(1)) == "handled"
    assert consumer.clock.slept == [1, 1, 2]


async def test_keys_do_not_know_of_each_other() -> None:
    consumer = Consumer(OSError(), max_attempts=2, recover=lambda error, message: f"buried {message.id}")
    for number in range(100):
        await consumer.fails(Message(number))
    for number in range(100):
        await consumer.fails(Message(number))
    for number in range(100):
        assert await consumer.deliver(Message(number)) == f"buried {number}"
    assert len(consumer.failing.calls) == 200


async def test_r7_a_hundred_keys_at_once_do_not_share_state() -> None:
    calls: dict[int, int] = {}

    @retryable(on=OSError, max_attempts=3, backoff=SERIES, budget=None, state=lambda number: number)
    async def handle(number: int) -> None:
        calls[number] = calls.get(number, 0) + 1
        await anyio.sleep(0.5)
        raise OSError(number)

    async def deliver(number: int) -> None:
        for _ in range(3):
            with pytest.raises(OSError) as caught:  # noqa: PT011
                await handle(number)
            assert caught.value.args == (number,)

    start = anyio.current_time()
    async with anyio.create_task_group() as group:
        for number in range(100):
            group.start_soon(deliver, number)
    assert set(calls.values()) == {3}
    assert anyio.current_time() - start == pytest.approx(3 * 0.5 + 1 + 2)


async def test_calls_with_one_key_wait_for_one_another() -> None:
    inside = most = calls = 0

    @retryable(on=OSError, max_attempts=50, backoff=AT_ONCE, budget=None, state=lambda: "key")
    async def handle() -> None:
        nonlocal inside, most, calls
        inside, calls = inside + 1, calls + 1
        most = max(most, inside)
        await anyio.sleep(1)
        inside -= 1
        if calls % 3:
            raise OSError

    async def deliver() -> None:
        with suppress(OSError):
            await handle()

    async with anyio.create_task_group() as group:
        for _ in range(10):
            group.start_soon(deliver)
    assert (most, calls) == (1, 10)


async def test_a_call_that_waits_for_another_with_its_key_may_be_cancelled() -> None:
    consumer = Consumer("handled")
    release = anyio.Event()

    @retryable(on=OSError, state=lambda: "key")
    async def handle() -> str:
        await release.wait()
        return "handled"

    answers: list[str] = []

    async def deliver() -> None:
        answers.append(await handle())

    async with anyio.create_task_group() as group:
        group.start_soon(deliver)
        await anyio.wait_all_tasks_blocked()
        with anyio.move_on_after(1) as scope:
            await handle()
        assert scope.cancelled_caught
        release.set()
    assert answers == ["handled"]
    assert await handle() == "handled"
    assert consumer.failing.calls == []


async def test_r9_a_cancelled_call_with_a_key_leaves_everything_as_it_was() -> None:
    consumer = Consumer(OSError(1), OSError(2), OSError(3), max_attempts=2, sleep=anyio.sleep)
    await consumer.fails(Message(1))
    for _ in range(3):  # in the wait: no attempt is counted
        with anyio.move_on_after(0.5) as scope:
            await consumer.deliver(Message(1))
        assert scope.cancelled_caught
    assert len(consumer.failing.calls) == 1
    mark = given_up(await consumer.fails(Message(1)))
    assert mark is not None
    assert mark.attempts == 2


async def test_r9_a_first_call_that_is_cancelled_is_not_kept() -> None:
    recorded = Recorded()

    @retryable(policy=recorded, state=lambda: "key")
    async def handle() -> None:
        await anyio.sleep(5)

    for _ in range(2):
        with anyio.move_on_after(1):
            await handle()
    assert (recorded.asked, recorded.opened, recorded.ended) == ([], 2, 2)


async def test_r9_wherever_a_call_with_a_key_is_cancelled_nothing_leaks() -> None:
    counted, is_broken = Counted(), True

    async def recover(error: Exception) -> None:
        await anyio.sleep(1)

    @retryable(on=OSError, max_attempts=2, backoff=SERIES, budget=counted, state=lambda: "key", recover=recover)
    async def handle() -> None:
        await anyio.sleep(1)
        if is_broken:
            raise OSError

    async def deliver() -> None:
        for _ in range(3):
            with suppress(OSError):
                await handle()

    async def check() -> None:
        nonlocal is_broken
        is_broken = False
        await handle()
        is_broken = True
        assert (counted.inside, counted.extra) == (0, 0)

    assert await cancel_at_every_await(deliver, check) == 4


async def test_of_more_keys_than_the_limit_the_one_that_failed_longest_ago_starts_anew() -> None:
    state = ByKey(lambda message: message.id, limit=2)
    recorded = Counted()
    consumer = Consumer(OSError(), max_attempts=2, state=state, budget=recorded)
    for number in (1, 2, 3):
        await consumer.fails(Message(number))
    assert recorded.inside == 2
    assert given_up(await consumer.fails(Message(2))) is not None
    assert given_up(await consumer.fails(Message(3))) is not None
    consumer.failing.outcomes = (OSError(),)
    assert given_up(await consumer.fails(Message(1))) is None


async def test_a_key_expires_some_time_after_it_could_be_tried_again() -> None:
    counted = Counted()
    consumer = Consumer(budget=counted, max_attempts=2, state=ByKey(lambda message: message.id, ttl=10))

    async def attempts_after(seconds: float) -> int:
        consumer.failing.outcomes = (OSError(1),)
        await consumer.fails(Message(1))
        consumer.clock.advance(seconds)
        consumer.failing.outcomes = (OSError(2),)
        mark = given_up(await consumer.fails(Message(1)))
        consumer.failing.outcomes = ("handled",)
        consumer.clock.advance(100)
        await consumer.deliver(Message(1))
        return 1 if mark is None else mark.attempts

    assert await attempts_after(1 + 10 - 0.01) == 2
    assert await attempts_after(1 + 10) == 1
    assert (counted.inside, counted.extra) == (0, 0)


async def test_keys_that_have_expired_are_forgotten_when_any_other_is_used() -> None:
    counted = Counted()
    consumer = Consumer(OSError(), budget=counted, state=ByKey(lambda message: message.id, ttl=10))
    for number in range(5):
        await consumer.fails(Message(number))
        consumer.clock.advance(1)
    assert counted.inside == 5
    consumer.clock.advance(8)  # the first three were ready 1 s after they failed
    await consumer.fails(Message(99))
    assert counted.inside == 3


async def test_an_exhausted_key_expires_too_and_holds_no_place_in_the_budget() -> None:
    counted = Counted()
    consumer = Consumer(ValueError(), budget=counted, state=ByKey(lambda message: message.id, ttl=10))
    await consumer.fails(Message(1), ValueError)
    assert (counted.inside, counted.extra) == (0, 0)
    consumer.clock.advance(10)
    await consumer.fails(Message(1), ValueError)
    assert len(consumer.failing.calls) == 2


async def test_r18_hooks_are_told_of_attempts_that_others_make() -> None:
    events, errors = Events(), [OSError(1), OSError(2)]
    consumer = Consumer(*errors, max_attempts=2, hooks=events)
    await consumer.fails(Message(1))
    await consumer.fails(Message(1))
    await consumer.fails(Message(1))  # no attempt
    assert events.seen == [
        AttemptEnded(1, 0.0, errors[0], handled=True),
        RetryScheduled(2, 1.0, errors[0]),
        AttemptEnded(2, 0.0, errors[1], handled=False),
        GaveUp(2, 1.0, GiveUp.ATTEMPTS, errors[1]),
    ]


async def test_a_deadline_of_this_call_does_not_count_for_the_next_one() -> None:
    consumer = Consumer(OSError(), backoff=Backoff.constant(5, jitter="none"))
    with anyio.fail_after(1):
        error = await consumer.fails(Message(1))
    assert given_up(error) is None
    await consumer.fails(Message(1))
    assert consumer.clock.slept == [5]


async def test_r8_the_key_is_the_same_however_the_arguments_are_given() -> None:
    keys: list[object] = []

    def key(queue: str, number: int, *, shard: int) -> tuple[str, int, int]:
        keys.append((queue, number, shard))
        return queue, number, shard

    @retryable(on=OSError, max_attempts=2, backoff=AT_ONCE, state=key)
    async def handle(queue: str, number: int = 0, *, shard: int = 1) -> None:
        raise OSError

    with pytest.raises(OSError):  # noqa: PT011
        await handle("a")
    with pytest.raises(OSError) as caught:  # noqa: PT011
        await handle(number=0, queue="a")
    assert given_up(caught.value) is not None
    assert keys == [("a", 0, 1), ("a", 0, 1)]


async def test_a_policy_sees_the_arguments_of_every_call_and_what_it_makes_of_them_comes_out() -> None:
    def change(attempt: Attempt[Any, Any]) -> None:
        if attempt.number == 2:
            attempt.error, attempt.response = None, "instead"

    recorded = Recorded([0.0], change=change)
    consumer = Consumer(OSError(), policy=recorded, on=None, backoff=None, budget="own")
    await consumer.fails(Message(1, "first"))
    assert await consumer.deliver(Message(1, "second")) == "instead"
    assert [each.request.args[0].text for each in recorded.asked] == ["first", "second"]
    assert (recorded.opened, recorded.ended) == (1, 1)

    def refuse(attempt: Attempt[Any, Any]) -> None:
        attempt.error = LookupError("refused")

    recorded.change, recorded.asked, consumer.failing = refuse, [], Failing("handled")
    await consumer.fails(Message(2), LookupError)
    assert (recorded.opened, recorded.ended) == (2, 2)


async def test_a_policy_may_have_the_next_call_wait_for_something_other_than_time() -> None:
    event = anyio.Event()
    recorded = Recorded([event.wait()])
    consumer = Consumer(OSError(), "handled", policy=recorded, on=None, backoff=None, budget="own")
    await consumer.fails(Message(1))
    async with anyio.create_task_group() as group:
        group.start_soon(consumer.deliver, Message(1))
        await anyio.wait_all_tasks_blocked()
        assert len(consumer.failing.calls) == 1
        event.set()
    assert len(consumer.failing.calls) == 2


async def test_the_arguments_of_a_failed_call_are_not_kept() -> None:
    class Body:
        pass

    @retryable(on=OSError, state=lambda body: "key")
    async def handle(body: Body) -> None:
        raise OSError

    body = Body()
    gone = weakref.ref(body)
    with suppress(OSError):
        await handle(body)
    del body
    gc.collect()
    assert gone() is None


class Picky(Exception):
    """Its __init__ does not take what its args are."""

    def __init__(self, *, code: int) -> None:
        super().__init__(f"code {code}")
        self.code = code


class Reworded(Exception):
    """Its __init__ would take its args, and make others of them."""

    def __init__(self, text: str) -> None:
        super().__init__(f"reworded: {text}")


class Stubborn(Exception):
    """It cannot be made anew at all."""

    def __new__(cls, secret: int = 0) -> Stubborn:
        if not secret:
            raise RuntimeError("no")
        return super().__new__(cls)

    def __init__(self, secret: int = 0) -> None:
        super().__init__()


@pytest.mark.parametrize(
    "error",
    [
        OSError(2, "missing"),
        Picky(code=5),
        Reworded("once"),
        UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"),
        Stubborn(1),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_r22_what_is_kept_of_an_exhausted_key_is_a_copy_without_frames(error: Exception) -> None:
    consumer = Consumer(error, on=())
    kind = type(error)
    last = await consumer.fails(Message(1), kind)
    again = await consumer.fails(Message(1), kind)
    assert last is error
    assert type(again) is kind
    assert (again.args, str(again), vars(again)) == (error.args, str(error), vars(error))
    assert (again is error) is isinstance(error, Stubborn)  # better raised again than not at all


@pytest.mark.parametrize(
    ("wrong", "match"),
    [({"limit": 0}, "limit is 0"), ({"ttl": 0.0}, "ttl is 0.0"), ({"ttl": float("nan")}, "ttl is nan")],
)
def test_a_key_is_kept_for_some_time_and_with_others(wrong: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ByKey(len, **wrong)


def test_by_key_is_a_value() -> None:
    assert ByKey(len, limit=3) == ByKey(len, limit=3) != ByKey(len, limit=4)
    assert (ByKey(len).limit, ByKey(len).ttl) == (4096, 3600)


async def test_state_waits_no_longer_than_was_said_though_the_clock_goes_back() -> None:
    clock = MockClock(500_000)
    times = iter([500_000.0, 500_000.0])

    def going_back() -> float:
        return next(times, 10.0)

    @retryable(
        on=OSError,
        backoff=Backoff.constant(7, jitter="none"),
        state=lambda key: key,
        clock=going_back,
        sleep=clock.sleep,
    )
    async def deliver(key: str) -> None:
        raise OSError

    for _ in range(2):
        with pytest.raises(OSError):  # noqa: PT011 -- it is the very one
            await deliver("message")
    assert all(slept <= 7 for slept in clock.slept)
