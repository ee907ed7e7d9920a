"""The Hedge layer: another call beside one that is late, and nothing left of it afterwards."""

from __future__ import annotations

import asyncio
import gc
import math
import weakref
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from random import Random

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from towline.errors import (
    Elapsed,
    LinkLost,
    Overloaded,
    RateLimited,
    ServiceClosed,
    TowlineError,
)
from towline.hooks import HedgeStarted, Hooks
from towline.layers.hedge import Hedge
from towline.layers.retry import Retry
from towline.layers.timeout import Timeout
from towline.policies import NOT_CLONEABLE, Backoff, Budget, Errors, StandardPolicy, TpsBudget
from towline.policies.budget import ConcurrencyBudget, Empty, Unlimited
from towline.policies.hedge import Percentile
from towline.service import Service, Wrapper, load, ready_now
from towline.testing import MockClock, cancel_at_every_await
from towline.timer import TASK

EVER = math.inf


@dataclass
class Call:
    """What a call does: takes so long, then answers or raises. ``tidying`` is how long it takes to be cancelled."""

    takes: float
    outcome: str | BaseException = "done"
    tidying: float = 0.0
    is_shielded: bool = False


@dataclass
class Scripted:
    """A service whose first call does the first thing, and so on; more calls than that are an error of the test."""

    calls: Sequence[Call]
    requests: list[object] = field(default_factory=list[object])
    began: list[float] = field(default_factory=list[float])
    log: list[str] = field(default_factory=list[str])
    running: int = 0

    async def __call__(self, request: object, /) -> str:
        self.requests.append(request)
        self.began.append(round(anyio.current_time(), 6))
        number = len(self.requests)
        call = self.calls[number - 1]
        self.running += 1
        try:
            with anyio.CancelScope(shield=call.is_shielded):
                await anyio.sleep(call.takes)
        except anyio.get_cancelled_exc_class():
            if call.tidying:
                with anyio.CancelScope(shield=True):
                    await anyio.sleep(call.tidying)
            self.log.append(f"{number} cancelled")
            raise
        finally:
            self.running -= 1
        self.log.append(f"{number} ended")
        if isinstance(call.outcome, BaseException):
            raise call.outcome
        return call.outcome

    def began_after(self, start: float) -> list[float]:
        return [round(each - start, 6) for each in self.began]


@dataclass
class Counting(Budget):
    """A budget that records what happens to it."""

    allowed: float = math.inf
    log: list[str] = field(default_factory=list[str])
    counts_calls = True

    def withdraw(self) -> bool:
        if self.allowed <= 0:
            self.log.append("refused")
            return False
        self.allowed -= 1
        self.log.append("withdraw")
        return True

    def deposit(self) -> None:
        self.log.append("deposit")

    def release(self) -> None:
        self.log.append("release")

    def enter(self) -> None:
        self.log.append("enter")

    def leave(self) -> None:
        self.log.append("leave")

    @property
    def balance(self) -> float:
        return self.allowed


@dataclass
class Told(Hooks):
    hedges: list[HedgeStarted] = field(default_factory=list[HedgeStarted])

    def on_hedge(self, event: HedgeStarted, /) -> None:
        self.hedges.append(event)


class Broken(Exception):
    retryable = True


def running_tasks() -> set[int]:
    return {task.id for task in anyio.get_running_tasks() if task.name != TASK}  # which belongs to the run


@asynccontextmanager
async def elapsing(seconds: float) -> AsyncGenerator[None]:
    start = anyio.current_time()
    yield
    assert anyio.current_time() - start == pytest.approx(seconds)


# --- H1: Tower's tests -----------------------------------------------------------------------------------------------


async def learnt(hedge: Hedge) -> tuple[Wrapper[object, str], Scripted]:
    """A service that has seen Tower's latencies in the period before, so that its delay is 10 ms."""
    inner = Scripted([Call(0.001)] * 8 + [Call(0.010)] * 2)
    service: Wrapper[object, str] = hedge(inner)
    for _ in range(10):
        await service("warm up")
    assert len(inner.requests) == 10, "no request was hedged before anything was learnt"
    await anyio.sleep(60)
    inner.requests.clear()
    inner.began.clear()
    inner.log.clear()
    return service, inner


TOWERS = Percentile(0.9, min_points=10, window=60)


@pytest.mark.smoke
async def test_h1_the_original_completes_first_although_a_hedge_was_issued() -> None:
    service, inner = await learnt(Hedge(TOWERS))
    inner.calls = [Call(0.015, "orig-done"), Call(0.010, "hedge-done")]
    async with elapsing(0.015):
        assert await service("orig") == "orig-done"
    assert inner.began[1] - inner.began[0] == pytest.approx(0.010)
    assert inner.requests == ["orig", "orig"]
    assert inner.log == ["1 ended", "2 cancelled"]


async def test_h1_the_hedge_completes_first() -> None:
    service, inner = await learnt(Hedge(TOWERS))
    inner.calls = [Call(EVER, "orig-done"), Call(0.001, "hedge-done")]
    async with elapsing(0.011):
        assert await service("orig") == "hedge-done"
    assert inner.log == ["2 ended", "1 cancelled"]


async def test_h1_a_request_that_completes_before_the_delay_is_not_hedged() -> None:
    service, inner = await learnt(Hedge(TOWERS))
    inner.calls = [Call(0.009, "orig-done")]
    assert await service("orig") == "orig-done"
    await anyio.sleep(1)
    assert inner.requests == ["orig"]


async def test_h1_a_request_that_may_not_be_repeated_is_not_hedged() -> None:
    service, inner = await learnt(Hedge(TOWERS, when=lambda request: request != "not_retryable"))
    inner.calls = [Call(0.5, "orig-done")]
    async with elapsing(0.5):
        assert await service("not_retryable") == "orig-done"
    assert inner.requests == ["not_retryable"]


async def test_h1_a_request_that_cannot_be_cloned_is_not_hedged() -> None:
    def clone(request: str) -> object:
        return NOT_CLONEABLE if request == "not_clonable" else request

    service, inner = await learnt(Hedge(TOWERS, clone=clone))
    inner.calls = [Call(0.5, "orig-done")]
    async with elapsing(0.5):
        assert await service("not_clonable") == "orig-done"
    assert inner.requests == ["not_clonable"]


# --- H2: what is learnt ------------------------------------------------------------------------------------------


async def test_h2_below_min_points_nothing_is_hedged() -> None:
    inner = Scripted([Call(0.001)] * 9 + [Call(5)])
    service = Hedge(Percentile(0.9, min_points=10, window=60))(inner)
    for _ in range(9):
        await service("warm up")
    await anyio.sleep(60)
    async with elapsing(5):
        await service("slow")
    assert len(inner.requests) == 10


async def test_h2_a_failure_starts_the_next_call_before_anything_is_learnt() -> None:
    inner = Scripted([Call(1, Broken()), Call(1)])
    async with elapsing(2):
        assert await Hedge(Percentile())(inner)("hello") == "done"


async def test_h9_what_is_learnt_is_forgotten_after_two_periods() -> None:
    service, inner = await learnt(Hedge(TOWERS))
    await anyio.sleep(60)
    inner.calls = [Call(5)]
    async with elapsing(5):
        await service("slow")


async def test_only_successes_are_learnt_from_and_each_from_its_own_beginning() -> None:
    service, inner = await learnt(Hedge(TOWERS, budget=None))
    inner.calls = [
        *[Call(0.005, ValueError())] * 5,
        *[Call(0.004, Broken()), Call(0.002)] * 10,
    ]
    for _ in range(5):
        with pytest.raises(ValueError):  # noqa: PT011 -- it says nothing
            await service("fails")
    for _ in range(10):
        await service("fails at first")
    await anyio.sleep(60)
    inner.calls = [*inner.calls, Call(1), Call(1)]
    await service("late")
    assert inner.began[-1] - inner.began[-2] == pytest.approx(0.002, rel=1 / 64)


async def test_what_is_learnt_without_a_delay_does_not_count_the_calls_that_failed_before() -> None:
    service = Hedge(Percentile(1, min_points=1, window=60))(inner := Scripted([Call(5, Broken()), Call(2)]))
    await service("fails at first")
    await anyio.sleep(60)
    inner.calls = [*inner.calls, Call(EVER), Call(1)]
    await service("late")
    assert inner.began[3] - inner.began[2] == pytest.approx(2)


async def test_the_delay_does_not_sink_when_hedges_are_faster_than_what_they_replace() -> None:
    rng = Random(1)
    calls = 0

    async def one_in_ten_is_slow(request: object, /) -> None:
        nonlocal calls
        calls += 1
        await anyio.sleep(10 if rng.random() < 0.1 else rng.uniform(0.1, 0.2))

    service = Hedge(Percentile(0.8, min_points=50, window=100), budget=None)(one_in_ten_is_slow)
    requests = 0
    for _ in range(8):  # periods
        end = anyio.current_time() + 100
        calls = requests = 0
        while anyio.current_time() < end:
            await service(0)
            requests += 1
    # the slowest fifth, half of which are not slow at all
    assert 1.15 < calls / requests < 1.25


# --- H3, H4: failures ------------------------------------------------------------------------------------------------


async def test_h3_a_failure_starts_the_next_call_at_once() -> None:
    start = anyio.current_time()
    inner = Scripted([Call(1, Broken()), Call(EVER), Call(2, "third")])
    async with elapsing(1 + 5 + 2):
        assert await Hedge(5, max_attempts=3)(inner)("hello") == "third"
    # the second after the failure, and the third after the second's delay, not after the first's
    assert inner.began_after(start) == [0, 1, 6]
    assert inner.log == ["1 ended", "3 ended", "2 cancelled"]


async def test_h3_a_failure_of_a_hedge_starts_the_next_one_and_the_original_goes_on() -> None:
    start = anyio.current_time()
    inner = Scripted([Call(20, "first"), Call(3, Broken()), Call(EVER), Call(EVER)])
    async with elapsing(20):
        assert await Hedge(5, max_attempts=4)(inner)("hello") == "first"
    assert inner.began_after(start) == [0, 5, 8, 13]
    assert sorted(inner.log) == ["1 ended", "2 ended", "3 cancelled", "4 cancelled"]


async def test_h3_a_failure_in_the_very_moment_at_which_the_delay_ends_puts_off_what_time_would_start() -> None:
    for _ in range(20):  # on trio the order of what happens in one moment is random
        told = Told()
        inner = Scripted([Call(5, failed := Broken()), Call(3), Call(1)])
        await Hedge(5, max_attempts=3, hooks=told)(inner)("hello")
        # time first, and then the failure at once; or the failure, and then time after another delay
        assert [event.error for event in told.hedges] in ([None, failed], [failed])


async def test_h3_only_errors_that_say_so_start_another_call_by_default() -> None:
    for error in (LinkLost("cut"), Overloaded("full")):
        inner = Scripted([Call(1, error), Call(1)])
        assert await Hedge(5)(inner)("hello") == "done"
    for final in (ValueError(), Elapsed(1), ServiceClosed("closed")):
        inner = Scripted([Call(1, final), Call(1)])
        with pytest.raises(type(final)) as caught:
            await Hedge(5)(inner)("hello")
        assert caught.value is final
        assert len(inner.requests) == 1


@pytest.mark.parametrize("delay", [5, math.inf])
async def test_h3_on_says_which_errors_start_another_call(delay: float) -> None:
    ways: list[Errors] = [KeyError, (KeyError, OSError), lambda error: isinstance(error, KeyError)]
    for on in ways:
        inner = Scripted([Call(1, KeyError()), Call(1)])
        assert await Hedge(delay, on=on)(inner)("hello") == "done"
        inner = Scripted([Call(1, Broken()), Call(1)])
        with pytest.raises(Broken):
            await Hedge(delay, on=on)(inner)("hello")


async def test_an_error_that_on_does_not_name_ends_it_and_cancels_the_rest() -> None:
    fatal = ValueError("fatal")
    inner = Scripted([Call(EVER), Call(1, fatal)])
    async with elapsing(6):
        with pytest.raises(ValueError, match="fatal") as caught:
            await Hedge(5, max_attempts=3)(inner)("hello")
    assert caught.value is fatal
    assert inner.log == ["2 ended", "1 cancelled"]

    inner = Scripted([Call(6, fatal), Call(EVER)])
    with pytest.raises(ValueError, match="fatal") as caught:
        await Hedge(5, max_attempts=3)(inner)("hello")
    assert caught.value is fatal
    assert inner.log == ["1 ended", "2 cancelled"]


@pytest.mark.parametrize("delay", [0, 5, math.inf])
async def test_h4_when_all_fail_the_last_error_is_raised_itself_and_no_group(delay: float) -> None:
    errors = [Broken(1), Broken(2), Broken(3)]
    inner = Scripted([Call(3, errors[0]), Call(4, errors[1]), Call(5, errors[2])])
    with pytest.raises(Broken) as caught:
        await Hedge(delay, max_attempts=3)(inner)("hello")
    assert caught.value is errors[2]
    assert caught.value.__cause__ is None
    assert len(inner.requests) == 3


async def test_h4_the_last_to_fail_counts_and_not_the_last_to_begin() -> None:
    slow = Broken("slow")
    inner = Scripted([Call(10, slow), Call(1, Broken("quick"))])
    async with elapsing(10):
        with pytest.raises(Broken) as caught:
            await Hedge(5)(inner)("hello")
    assert caught.value is slow


async def test_a_group_from_inside_is_passed_on_itself() -> None:
    for group in (ExceptionGroup("both", [ValueError(), KeyError()]), ExceptionGroup("both", [Broken(), Broken()])):
        inner = Scripted([Call(6, group), Call(EVER)])
        with pytest.raises(ExceptionGroup) as caught:
            await Hedge(5, on=OSError)(inner)("hello")
        assert caught.value is group


@pytest.mark.parametrize("delay", [5, math.inf])
async def test_an_error_that_says_when_to_come_back_starts_nothing(delay: float) -> None:
    class Busy(TowlineError):
        retryable = True
        retry_after = 30.0

    for error in (Busy(), RateLimited("later", retry_after=1)):
        inner = Scripted([Call(1, error)])
        async with elapsing(1):
            with pytest.raises(type(error)):
                await Hedge(delay)(inner)("hello")


async def test_after_an_error_that_says_when_to_come_back_only_what_is_under_way_goes_on() -> None:
    inner = Scripted([Call(20, "first"), Call(1, RateLimited("later", retry_after=1))])
    async with elapsing(20):
        assert await Hedge(5, max_attempts=4)(inner)("hello") == "first"
    inner = Scripted([Call(7, Broken()), Call(1, RateLimited("later", retry_after=1))])
    async with elapsing(7):
        with pytest.raises(Broken):
            await Hedge(5, max_attempts=4)(inner)("hello")


# --- H5, H8: nothing is left -----------------------------------------------------------------------------------------


async def test_h5_losers_are_cancelled_and_awaited() -> None:
    inner = Scripted([Call(EVER, tidying=3), Call(EVER, tidying=2), Call(1, "third")])
    async with elapsing(5 + 5 + 1 + 3):
        assert await Hedge(5, max_attempts=3)(inner)("hello") == "third"
    assert inner.log == ["3 ended", "2 cancelled", "1 cancelled"]
    assert inner.running == 0


@pytest.mark.parametrize("delay", [0, 5])
@pytest.mark.parametrize("outcome", ["done", ValueError(), Broken()])
async def test_h5_no_task_is_left(delay: float, outcome: str | Exception) -> None:
    before = running_tasks()
    inner = Scripted([Call(EVER), Call(1, outcome), Call(1, outcome), Call(EVER), Call(3, outcome)])
    with suppress(ValueError, Broken), anyio.move_on_after(100):
        await Hedge(delay, max_attempts=5)(inner)("hello")
    assert running_tasks() == before
    assert inner.running == 0


async def test_h5_what_a_loser_answers_or_raises_is_dropped() -> None:
    for late in ("late", ValueError("late"), Broken("late")):
        told = Told()
        inner = Scripted([Call(9, late, is_shielded=True), Call(1, "second")])
        async with elapsing(9):
            assert await Hedge(5, max_attempts=3, hooks=told)(inner)("hello") == "second"
        assert inner.log == ["2 ended", "1 ended"]
        assert len(told.hedges) == 1
    for late in ("late", ValueError("late"), Broken("late")):
        inner = Scripted([Call(6, "first"), Call(9, late, is_shielded=True)])
        assert await Hedge(5)(inner)("hello") == "first"
        assert inner.log == ["1 ended", "2 ended"]


async def test_h5_a_call_that_was_not_begun_when_another_answered_is_not_begun() -> None:
    async def at_once(request: str, /) -> str:
        calls.append(request)
        return request

    calls: list[str] = []
    assert await Hedge(0, max_attempts=5)(at_once)("hello") == "hello"
    assert calls == ["hello"]


@pytest.mark.parametrize("delay", [0, 5, math.inf])
@pytest.mark.parametrize("when", [1, 5, 5.5, 6, 100])
async def test_h8_cancelling_the_caller_cancels_all(delay: float, when: float) -> None:
    before = running_tasks()
    inner = Scripted([Call(EVER)] * 3)
    with anyio.move_on_after(when) as scope:
        await Hedge(delay, max_attempts=3)(inner)("hello")
    assert scope.cancelled_caught
    assert inner.running == 0
    assert running_tasks() == before
    begun = len(inner.requests)
    await anyio.sleep(1000)
    assert len(inner.requests) == begun


@pytest.mark.parametrize("delay", [5, math.inf])
async def test_h8_a_failure_of_a_call_that_is_being_cancelled_starts_no_other(delay: float) -> None:
    calls = 0

    async def turns_cancellation_into_an_error(request: str, /) -> None:
        nonlocal calls
        calls += 1
        try:
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            raise LinkLost("cut") from None

    budget = Counting()
    with suppress(LinkLost), anyio.move_on_after(1):  # whichever comes out, the error or the cancellation
        await Hedge(delay, budget=budget)(turns_cancellation_into_an_error)("hello")
    assert calls == 1
    assert budget.log == ["enter", "leave"]


async def test_h8_no_call_is_begun_while_a_cancelled_one_cleans_up() -> None:
    inner = Scripted([Call(EVER, tidying=100)])
    with anyio.move_on_after(1) as scope:
        await Hedge(5, max_attempts=3)(inner)("hello")
    assert scope.cancelled_caught
    assert len(inner.requests) == 1


@pytest.mark.parametrize("delay", [0, 1, math.inf, Percentile()], ids=str)
async def test_h8_cancelled_at_every_await_it_leaves_no_task_and_no_permit(delay: float | Percentile) -> None:
    budget = ConcurrencyBudget(at_least=10)

    async def check() -> None:
        assert (budget._under_way.requests, budget._under_way.extra) == (0, 0)
        assert all(inner.running == 0 for inner in inners)

    inners: list[Scripted] = []

    def request() -> Awaitable[str]:
        inner = Scripted([Call(1.5, Broken()), Call(3, tidying=1), Call(1, "third")])
        inners.append(inner)
        return Hedge(delay, max_attempts=3, budget=budget)(inner)("hello")

    places = await cancel_at_every_await(request, check)  # type: ignore[arg-type]  # what calls a service is a coroutine
    assert places >= 2


async def test_h8_the_caller_may_be_cancelled_in_the_very_moment_at_which_a_delay_ends(
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = running_tasks()
    for when in [5, 10] * 20:  # on trio the order of what happens in one moment is random
        told, inner = Told(), Scripted([Call(EVER)] * 3)
        with anyio.move_on_after(when) as scope:
            await Hedge(5, max_attempts=3, hooks=told)(inner)("hello")
        assert scope.cancelled_caught
        assert len(told.hedges) < 3
        assert inner.running == 0
        assert running_tasks() == before
    assert caplog.text == ""


async def test_what_ends_a_program_is_passed_on_itself_and_ends_all_calls() -> None:
    class Interrupt(BaseException):
        pass

    for calls in ([Call(EVER), Call(1, Interrupt())], [Call(6, Interrupt()), Call(EVER)]):
        inner = Scripted(calls)
        with pytest.raises(Interrupt) as caught:
            await Hedge(5, max_attempts=3)(inner)("hello")
        assert caught.value in [call.outcome for call in calls]
        assert inner.running == 0
        assert len(inner.requests) == 2


async def test_what_ends_a_program_is_passed_on_itself_also_while_the_caller_is_cancelled() -> None:
    class Interrupt(BaseException):
        pass

    async def inner(request: str, /) -> None:
        try:
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            if asked.pop():
                raise Interrupt from None
            raise

    asked = [True, False]
    with pytest.raises(Interrupt), anyio.move_on_after(6):
        await Hedge(5)(inner)("hello")


async def test_a_call_that_cancels_itself_cancels_the_caller_as_it_would_without_the_layer(
    anyio_backend_name: str,
) -> None:
    if anyio_backend_name != "asyncio":
        pytest.skip("only on asyncio can a task be cancelled by what it awaits")

    async def inner(request: str, /) -> None:
        calls.append(request)
        await anyio.sleep(EVER if len(calls) == 1 else 1)
        future = asyncio.get_running_loop().create_future()
        future.cancel()
        await future

    calls: list[str] = []
    with pytest.raises(asyncio.CancelledError):
        await Hedge(5)(inner)("hello")
    calls = ["the first is under way"]
    with pytest.raises(asyncio.CancelledError):
        await Hedge(5)(inner)("hello")


async def test_errors_and_requests_are_not_kept_after_the_call() -> None:
    class Request:
        pass

    async def failing(request: object, /) -> None:
        await anyio.sleep(1)
        raise Broken("again")

    for delay in (0.5, 5, math.inf):
        service = Hedge(delay, budget=None)(failing)
        await anyio.lowlevel.checkpoint()
        gc.collect()
        gc.disable()
        try:
            request = Request()
            kept: list[weakref.ref[object]] = [weakref.ref(request)]
            try:
                await service(request)
            except Broken as error:
                kept.append(weakref.ref(error))
            del request
            await anyio.lowlevel.checkpoint()
            assert [each() for each in kept] == [None, None]
        finally:
            gc.enable()


# --- H6: the budget ----------------------------------------------------------------------------------------------


async def test_h6_with_an_empty_budget_there_is_no_hedge_and_the_original_goes_on() -> None:
    told = Told()
    inner = Scripted([Call(60)])
    async with elapsing(60):
        assert await Hedge(5, max_attempts=4, budget=Empty(), hooks=told)(inner)("hello") == "done"
    assert told.hedges == []


@pytest.mark.parametrize("delay", [0, 5, math.inf])
async def test_h6_with_an_empty_budget_a_failure_is_the_callers(delay: float) -> None:
    inner = Scripted([Call(1, Broken())])
    async with elapsing(1):
        with pytest.raises(Broken):
            await Hedge(delay, budget=Empty())(inner)("hello")


async def test_h6_a_budget_that_said_no_to_time_is_asked_once_more_after_a_failure() -> None:
    start = anyio.current_time()
    budget = Counting(allowed=0)
    inner = Scripted([Call(30, Broken()), Call(1)])

    async def refill() -> None:
        await anyio.sleep(20)
        budget.allowed = 10

    async with anyio.create_task_group() as group:
        group.start_soon(refill)
        assert await Hedge(5, max_attempts=4, budget=budget)(inner)("hello") == "done"
    assert inner.began_after(start) == [0, 30]
    assert budget.log == ["enter", "refused", "withdraw", "release", "deposit", "leave"]


async def test_h6_hedges_are_paid_for_when_they_begin_and_a_success_pays_in() -> None:
    budget = Counting()
    hedge = Hedge(5, max_attempts=3, budget=budget)
    await hedge(Scripted([Call(1)]))("quick")
    assert budget.log == ["enter", "deposit", "leave"]
    budget.log.clear()
    await hedge(Scripted([Call(EVER), Call(EVER), Call(1)]))("slow")
    assert budget.log == ["enter", "withdraw", "withdraw", "release", "deposit", "release", "leave"]
    budget.log.clear()
    with pytest.raises(Broken):
        await hedge(Scripted([Call(1, Broken())] * 3))("failing")
    assert budget.log == ["enter", "withdraw", "release", "withdraw", "release", "leave"]


async def test_h6_a_call_after_a_failure_is_paid_for_in_the_same_way_when_there_is_no_delay_to_wait_for() -> None:
    budget = Counting()
    hedge = Hedge(math.inf, max_attempts=3, budget=budget)
    await hedge(Scripted([Call(1, Broken()), Call(1)]))("hello")
    assert budget.log == ["enter", "withdraw", "release", "deposit", "leave"]
    budget.log.clear()
    with pytest.raises(Broken):
        await hedge(Scripted([Call(1, Broken())] * 3))("failing")
    assert budget.log == ["enter", "withdraw", "release", "withdraw", "release", "leave"]
    budget.log.clear()
    with anyio.move_on_after(1.5):
        await hedge(Scripted([Call(1, Broken()), Call(1)]))("cancelled")
    assert budget.log == ["enter", "withdraw", "release", "leave"]


async def test_h6_nothing_is_paid_for_once_there_is_an_answer_though_the_delay_ends_in_the_same_moment() -> None:
    async def inner(request: str, /) -> str:
        answered.append(False)
        await anyio.sleep(5)
        answered[-1] = True
        return request

    class Watched(Counting):
        def withdraw(self) -> bool:
            assert not any(answered)
            return super().withdraw()

    for _ in range(20):  # on trio the order of what happens in one moment is random
        answered: list[bool] = []
        budget = Watched()
        async with elapsing(5):
            assert await Hedge(5, budget=budget)(inner)("hello") == "hello"
        assert budget.log in (["enter", "deposit", "leave"], ["enter", "withdraw", "deposit", "release", "leave"])


async def test_h8_nothing_is_paid_for_or_told_while_a_cancelled_call_cleans_up() -> None:
    told, budget = Told(), Counting()
    inner = Scripted([Call(EVER, tidying=100)])
    with anyio.move_on_after(1):
        await Hedge(5, max_attempts=3, budget=budget, hooks=told)(inner)("hello")
    assert told.hedges == []
    assert budget.log == ["enter", "leave"]


async def test_h6_requests_that_pass_through_do_not_touch_the_budget() -> None:
    budget = Counting()
    await Hedge(5, budget=budget, when=lambda _: False)(Scripted([Call(60)]))("hello")
    await Hedge(5, budget=budget, clone=lambda _: NOT_CLONEABLE)(Scripted([Call(60)]))("hello")
    assert budget.log == []


async def test_h6_a_budget_bounds_the_hedges_of_a_target_that_has_become_slow() -> None:
    budget = TpsBudget(min_per_sec=1, ratio=0.2)  # so 10 for a start
    calls = 0

    async def slow(request: int, /) -> None:
        nonlocal calls
        calls += 1
        await anyio.sleep(1)

    service = Hedge(0.1, budget=budget)(slow)
    async with anyio.create_task_group() as group:
        for each in range(1000):
            group.start_soon(service, each)
    assert calls == 1000 + 10


async def test_each_layer_has_a_budget_of_its_own_unless_it_is_given_one() -> None:
    assert Hedge(5).budget is not Hedge(5).budget
    shared = Counting()
    hedge = Hedge(5, budget=shared)
    await hedge(Scripted([Call(1)]))("hello")
    await hedge(Scripted([Call(1)]))("hello")
    assert shared.log.count("deposit") == 2


# --- H7: how many ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_attempts", [1, 2, 3, 5])
async def test_h7_there_are_never_more_than_max_attempts_one_delay_apart(max_attempts: int) -> None:
    start = anyio.current_time()
    inner = Scripted([Call(100)] * 10)
    async with elapsing(100):
        await Hedge(5, max_attempts=max_attempts)(inner)("hello")
    assert inner.began_after(start) == [5 * n for n in range(max_attempts)]


@pytest.mark.parametrize("delay", [0, 5, math.inf])
@pytest.mark.parametrize("max_attempts", [1, 2, 5])
async def test_h7_failures_do_not_make_more_of_them(delay: float, max_attempts: int) -> None:
    inner = Scripted([Call(1, Broken())] * 10)
    with pytest.raises(Broken):
        await Hedge(delay, max_attempts=max_attempts)(inner)("hello")
    assert len(inner.requests) == max_attempts


async def test_with_a_delay_of_0_all_calls_begin_at_once() -> None:
    start = anyio.current_time()
    inner = Scripted([Call(3), Call(1, "second"), Call(2)])
    async with elapsing(1):
        assert await Hedge(0, max_attempts=3)(inner)("hello") == "second"
    assert inner.began_after(start) == [0, 0, 0]
    inner = Scripted([Call(3), Call(4), Call(5)])
    assert await Hedge(0, max_attempts=3, budget=Counting(allowed=1))(inner)("hello") == "done"
    assert len(inner.requests) == 2


async def test_with_an_endless_delay_the_next_call_begins_only_after_a_failure() -> None:
    start = anyio.current_time()
    inner = Scripted([Call(1000, Broken()), Call(1000, Broken()), Call(1)])
    assert await Hedge(math.inf, max_attempts=3)(inner)("hello") == "done"
    assert inner.began_after(start) == [0, 1000, 2000]


@settings(deadline=None, max_examples=60)
@given(
    calls=st.lists(st.tuples(st.integers(0, 9), st.sampled_from(["done", "broken", "fatal"])), min_size=5, max_size=5),
    delay=st.sampled_from([0, 1, 2, 5, math.inf]),
    max_attempts=st.integers(1, 5),
    allowed=st.integers(0, 5),
)
async def test_any_calls_come_to_the_outcome_that_comes_first(
    calls: list[tuple[int, str]], delay: float, max_attempts: int, allowed: int
) -> None:
    def outcome(number: int, kind: str) -> str | Exception:
        return kind if kind == "done" else Broken(number) if kind == "broken" else ValueError(number)

    # no two things at one time, so that their order is certain
    inner = Scripted([Call(takes + 0.1 + 0.01 * n, outcome(n, kind)) for n, (takes, kind) in enumerate(calls)])
    budget = Counting(allowed)
    got: object
    try:
        got = await Hedge(delay, max_attempts=max_attempts, budget=budget)(inner)("hello")
    except (ValueError, Broken) as error:
        got = error
    assert len(inner.requests) <= min(max_attempts, 1 + allowed)
    assert budget.log.count("withdraw") == budget.log.count("release") == len(inner.requests) - 1
    assert inner.running == 0
    ended = [inner.calls[int(entry.split()[0]) - 1].outcome for entry in inner.log if "ended" in entry]
    assert got is ended[-1] or got == ended[-1]
    assert all(isinstance(each, Broken) for each in ended[:-1])


async def test_where_there_is_no_delay_to_wait_for_the_response_comes_at_the_cost_of_no_checkpoint() -> None:
    async def at_once(request: str, /) -> str:
        return "at once"

    hedges = [Hedge(math.inf), Hedge(5, max_attempts=1), Hedge(Percentile()), Hedge(5, when=lambda _: False)]
    for hedge in hedges:
        coroutine = hedge(at_once)("hello")
        with pytest.raises(StopIteration, match="at once"):
            coroutine.send(None)


# --- clone, when, context, hooks -------------------------------------------------------------------------------------


async def test_every_call_gets_a_clone_of_what_the_caller_gave() -> None:
    kept = {"tags": ["a"]}
    inner = Scripted([Call(EVER), Call(EVER), Call(1)])
    await Hedge(5, max_attempts=3, clone=lambda request: {"tags": [*request["tags"], "b"]})(inner)(kept)
    assert inner.requests == [{"tags": ["a", "b"]}] * 3
    assert len({id(each) for each in inner.requests}) == 3
    assert kept == {"tags": ["a"]}
    inner = Scripted([Call(1, Broken()), Call(1)])
    await Hedge(math.inf, clone=dict[str, object].copy)(inner)(kept)
    assert all(each == kept and each is not kept for each in inner.requests)


async def test_a_request_that_can_be_cloned_only_once_is_not_hedged() -> None:
    budget = Counting()
    for delay in (5, math.inf):
        clones = iter(["only"])
        hedge = Hedge(delay, clone=lambda _, clones=clones: next(clones, NOT_CLONEABLE), budget=budget)  # type: ignore[misc]
        inner = Scripted([Call(60, Broken())])
        with pytest.raises(Broken):
            await hedge(inner)("hello")
        assert inner.requests == ["only"]
    assert "withdraw" not in budget.log


@pytest.mark.parametrize("delay", [0, 5, math.inf])
async def test_an_error_of_clone_or_of_on_is_the_callers_and_ends_all_calls(delay: float) -> None:
    def once(request: object) -> object:
        if clones:
            raise error
        clones.append(request)
        return request

    error = ZeroDivisionError()
    clones: list[object] = []
    inner = Scripted([Call(60, Broken())])
    with pytest.raises(ZeroDivisionError) as caught:
        await Hedge(delay, clone=once)(inner)("hello")
    assert caught.value is error

    def on(error: Exception) -> bool:
        raise ZeroDivisionError

    inner = Scripted([Call(60, Broken()), Call(1, Broken())])
    with pytest.raises(ZeroDivisionError):
        await Hedge(delay, on=on)(inner)("hello")
    assert inner.running == 0


async def test_requests_that_may_not_be_made_twice_pass_through_failures_included() -> None:
    inner = Scripted([Call(60, Broken())])
    with pytest.raises(Broken):
        await Hedge(5, when=lambda request: request == "read")(inner)("write")
    inner = Scripted([Call(60), Call(1)])
    async with elapsing(6):
        await Hedge(5, when=lambda request: request == "read")(inner)("read")


variable: ContextVar[str] = ContextVar("variable")


async def test_every_call_sees_the_context_of_its_caller() -> None:
    async def inner(request: str, /) -> str:
        seen.append(variable.get())
        variable.set(f"set by call {len(seen)}")
        await anyio.sleep(1)
        if len(seen) < 4:
            raise Broken
        await anyio.sleep(100)
        return "done"

    async def caller(name: str) -> None:
        variable.set(name)
        assert await Hedge(5, max_attempts=6, budget=None)(inner)("hello") == "done"

    for name in ("one", "another"):
        seen: list[str] = []
        async with anyio.create_task_group() as group:
            group.start_soon(caller, name)
        assert seen == [name] * 6  # three of them after a failure, three by time


async def test_every_call_sees_the_deadline_of_its_caller() -> None:
    async def inner(request: str, /) -> None:
        seen.append(anyio.current_effective_deadline())
        await anyio.sleep_forever()

    seen: list[float] = []
    deadline = anyio.current_time() + 20
    with anyio.CancelScope(deadline=deadline):
        await Hedge(5, max_attempts=3)(inner)("hello")
    assert seen == [deadline] * 3


async def test_hooks_are_told_of_every_hedge_before_it_begins() -> None:
    class Checking(Told):
        def on_hedge(self, event: HedgeStarted, /) -> None:
            assert len(inner.requests) == event.attempt - 1
            super().on_hedge(event)

    failed = Broken()
    told = Checking()
    inner = Scripted([Call(7, failed), Call(EVER), Call(1)])
    await anyio.sleep(1)
    await Hedge(5, max_attempts=4, hooks=told)(inner)("hello")
    assert [(event.attempt, event.error) for event in told.hedges] == [(2, None), (3, failed)]
    assert [event.elapsed for event in told.hedges] == pytest.approx([5, 7])
    told.hedges.clear()
    inner = Scripted([Call(7, failed), Call(1)])
    await Hedge(math.inf, hooks=told)(inner)("hello")
    assert [(event.attempt, event.error) for event in told.hedges] == [(2, failed)]
    assert [event.elapsed for event in told.hedges] == pytest.approx([7])


async def test_a_hook_that_raises_harms_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Bad(Hooks):
        def on_hedge(self, event: HedgeStarted, /) -> None:
            raise ZeroDivisionError

    inner = Scripted([Call(EVER), Call(1)])
    assert await Hedge(5, hooks=Bad())(inner)("hello") == "done"
    assert "a hook raised" in caplog.text


async def test_the_clock_that_is_given_is_the_one_that_is_learnt_from() -> None:
    clock = MockClock()

    async def inner(request: float, /) -> None:
        clock.advance(request)
        await anyio.lowlevel.checkpoint()

    service = Hedge(Percentile(1, min_points=1, window=100), clock=clock)(inner)
    await service(2.0)
    clock.advance(100)
    assert service._histogram.percentile(1, clock()) == 2.0  # type: ignore[attr-defined]


# --- beside other layers ---------------------------------------------------------------------------------------------


async def test_inside_retry_each_attempt_is_hedged() -> None:
    inner = Scripted([Call(9, Broken()), Call(EVER), Call(EVER), Call(1, "fourth")])
    policy = StandardPolicy(Backoff.constant(2, jitter="none"), on=Broken)
    async with elapsing(9 + 2 + 5 + 1):
        assert await Retry(policy)(Hedge(5, on=KeyError)(inner))("hello") == "fourth"
    assert inner.log == ["1 ended", "2 cancelled", "4 ended", "3 cancelled"]


async def test_a_timeout_inside_bounds_a_call_and_one_outside_the_whole() -> None:
    inner = Scripted([Call(EVER), Call(2)])
    async with elapsing(3 + 2):
        assert await Hedge(math.inf, on=Elapsed)(Timeout(3)(inner))("hello") == "done"
    inner = Scripted([Call(EVER), Call(EVER)])
    async with elapsing(8):
        with pytest.raises(Elapsed, match="no response within 8 s"):
            await Timeout(8)(Hedge(5)(inner))("hello")
    assert inner.running == 0


async def test_many_requests_at_once_do_not_disturb_each_other() -> None:
    async def inner(request: int, /) -> int:
        calls.append(request)
        await anyio.sleep(1 if calls.count(request) == 2 or request % 2 else 100)
        return request

    calls: list[int] = []
    answers: list[int] = []
    service = Hedge(5, budget=Unlimited())(inner)

    async def caller(number: int) -> None:
        answers.append(await service(number))

    async with elapsing(6), anyio.create_task_group() as group:
        for number in range(100):
            group.start_soon(caller, number)
    assert sorted(answers) == list(range(100))
    assert len(calls) == 150


async def test_one_layer_around_two_services_learns_apart() -> None:
    hedge = Hedge(Percentile(1, min_points=1, window=10))
    quick, slow = Scripted([Call(1)] * 3), Scripted([Call(4)] * 3)
    services: list[Service[object, str]] = [hedge(quick), hedge(slow)]
    for service in services:
        await service("warm up")
    await anyio.sleep(10)
    for inner, service, delay in ((quick, services[0], 1), (slow, services[1], 4)):
        inner.calls = [Call(1), Call(EVER), Call(1)]
        await service("late")
        assert inner.began[2] - inner.began[1] == pytest.approx(delay)


def test_hints_are_those_of_the_service_inside() -> None:
    class Hinting(Wrapper[int, int]):
        async def __call__(self, request: int, /) -> int:
            return request

        def ready_now(self) -> bool:
            return False

        def load(self) -> float:
            return 7.0

    async def plain(request: int, /) -> int:
        return request

    service = Hedge(5)(Hinting(plain))
    assert (ready_now(service), load(service)) == (False, 7.0)
    assert (ready_now(Hedge(5)(plain)), load(Hedge(5)(plain))) == (True, 0.0)
    assert repr(Hedge(5)(plain)) == "<Hedging around plain>"


def test_hedges_are_values_for_the_dialling_side_only() -> None:
    assert Hedge(5) == Hedge(5.0)
    assert Hedge(5) != Hedge(5, max_attempts=3)
    assert Hedge.client_only
    assert repr(Hedge(0.5, max_attempts=3)) == "Hedge(delay=0.5, max_attempts=3)"


def test_settings_that_make_no_sense_are_refused() -> None:
    for delay in (-0.1, math.nan, -math.inf):
        with pytest.raises(ValueError, match=f"delay is {delay}, where 0 or more is expected"):
            Hedge(delay)
    for max_attempts in (0, -1):
        with pytest.raises(ValueError, match=f"max_attempts is {max_attempts}, where 1 or more is expected"):
            Hedge(5, max_attempts=max_attempts)
    with pytest.raises(TypeError, match="CancelledError is no Exception"):
        Hedge(5, on=asyncio.CancelledError)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="3 is no class of exceptions"):
        Hedge(5, on=3)  # type: ignore[arg-type]
