"""What holds for any composition of layers, whatever fails and whoever gives up in the middle of it."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from towline import (
    Backoff,
    Balance,
    Buffer,
    CircuitBreaker,
    ConcurrencyLimit,
    Deadline,
    Fallback,
    Filter,
    Hedge,
    LoadShed,
    RateLimit,
    Retry,
    Service,
    Stack,
    StandardPolicy,
    Timeout,
    TowlineError,
    running,
)
from towline.layers import Either, Limiter, map_error, map_request
from towline.policies import BreakerPolicy, ConcurrencyBudget, TpsBudget
from towline.testing import MockClock, cancel_at_every_await
from towline.timer import TASK

Layer = Callable[[Service[Any, Any]], Service[Any, Any]]

STEADY = Backoff.constant(0.01, jitter="none")


class Ill(Exception):
    """What the service inside raises."""


def running_tasks() -> set[int]:
    return {task.id for task in anyio.get_running_tasks() if task.name != TASK}  # which belongs to the run


class Patient:
    """A service that takes its time, and fails as it is told to."""

    def __init__(self, seed: int, failing: float) -> None:
        self.random = Random(seed)
        self.failing = failing
        self.calls = 0
        self.running = 0

    async def __call__(self, request: int, /) -> int:
        self.calls += 1
        self.running += 1
        try:
            await anyio.sleep(self.random.expovariate(1 / 0.02))
            if self.random.random() < self.failing:
                raise Ill(request)
            return request
        finally:
            self.running -= 1


class Shop:
    """Makes layers, and keeps what they might leak."""

    def __init__(self) -> None:
        self.limiters: list[Limiter] = []
        self.budgets: list[ConcurrencyBudget] = []

    def limiter(self) -> Limiter:
        self.limiters.append(Limiter(2))
        return self.limiters[-1]

    def counting(self) -> ConcurrencyBudget:
        self.budgets.append(ConcurrencyBudget(at_least=2))
        return self.budgets[-1]

    def make(self, name: str) -> Layer:
        match name:
            case "timeout":
                return Timeout(0.05)
            case "deadline":
                return Deadline(0.2)
            case "limit":
                return ConcurrencyLimit(self.limiter())
            case "shed":
                return Stack(LoadShed(), ConcurrencyLimit(self.limiter()))
            case "retry":
                return Retry(StandardPolicy(STEADY, on=Exception, idempotent=True, budget=self.counting()))
            case "breaker":
                return CircuitBreaker(BreakerPolicy(failure_ratio=1.0, min_calls=5, break_for=STEADY))
            case "hedge":
                return Hedge(0.01, max_attempts=3, on=Ill, budget=self.counting())
            case "rate":
                return RateLimit(100, per=1)
            case "buffer":
                return Buffer(3)
            case "balance":
                return lambda inner: Balance([inner])
            case "filter":
                return Filter(lambda request: True)
            case "fallback":
                return Fallback.value(-1, on=ZeroDivisionError)
            case "either":
                return Either(lambda request: request % 2 == 0, Timeout(0.03), Retry(StandardPolicy(STEADY, on=Ill)))
            case "map":
                return Stack(map_request(lambda request: request), map_error(lambda error: error))
            case _:
                raise AssertionError(name)

    def check(self) -> None:
        assert [limiter.free for limiter in self.limiters] == [2] * len(self.limiters)
        assert [limiter.waiting for limiter in self.limiters] == [0] * len(self.limiters)
        for budget in self.budgets:
            assert budget == ConcurrencyBudget(at_least=2)
            assert budget.balance == 2  # nobody is under way any more


NAMES = [
    "timeout",
    "deadline",
    "limit",
    "shed",
    "retry",
    "breaker",
    "hedge",
    "rate",
    "buffer",
    "balance",
    "filter",
    "fallback",
    "either",
    "map",
]
stacks = st.lists(st.sampled_from(NAMES), min_size=1, max_size=6)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(
    names=stacks,
    callers=st.lists(st.tuples(st.floats(0, 0.3), st.none() | st.floats(0, 0.2)), min_size=1, max_size=12),
    failing=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 1000),
)
async def test_properties_no_call_leaks_a_permit_or_a_task_however_it_ends(
    names: list[str], callers: list[tuple[float, float | None]], failing: float, seed: int
) -> None:
    shop, service = Shop(), Patient(seed, failing)
    ended: list[object] = []

    async def one(call: Service[int, int], number: int, start: float, patience: float | None) -> None:
        await anyio.sleep(start)
        outcome: object = "cancelled"
        with anyio.move_on_after(patience):
            try:
                outcome = await call(number)
            except (Ill, TowlineError) as error:
                outcome = error
        ended.append(outcome)
        assert outcome in (number, "cancelled") or isinstance(outcome, (Ill, TowlineError))

    before = running_tasks()
    with anyio.fail_after(3600):
        async with running(Stack(*map(shop.make, names))(service)) as call, anyio.create_task_group() as group:
            for number, (start, patience) in enumerate(callers):
                group.start_soon(one, call, number, start, patience)
    assert len(ended) == len(callers)
    assert service.running == 0
    assert running_tasks() == before
    shop.check()


@pytest.mark.parametrize("failing", [0.0, 1.0])
@pytest.mark.parametrize(
    "names",
    [
        ["timeout", "limit", "retry", "hedge", "breaker", "rate", "timeout"],
        ["deadline", "buffer", "limit", "retry", "balance", "timeout"],
        ["shed", "hedge", "retry", "limit", "either"],
    ],
    ids=" ".join,
)
async def test_properties_cancelled_at_every_await_nothing_is_left(names: list[str], failing: float) -> None:
    shop = Shop()
    service = Patient(0, failing)

    async def once() -> None:
        try:
            async with running(Stack(*map(shop.make, names))(service)) as call:
                await call(1)
        except (Ill, TowlineError):
            pass

    async def check() -> None:
        assert service.running == 0
        shop.check()

    await cancel_at_every_await(once, check)


@settings(deadline=None, max_examples=200)
@given(
    max_attempts=st.integers(1, 10),
    max_elapsed=st.none() | st.floats(0, 10),
    took=st.lists(st.floats(0, 2), min_size=1, max_size=10),
    ratio=st.sampled_from([0.0, 0.5, 2.0]),
    at_least=st.integers(0, 3),
    backoff=st.sampled_from([Backoff.exponential(), Backoff.decorrelated(initial=0.1), Backoff.smooth(initial=0.1)]),
    seed=st.integers(0, 1000),
)
async def test_properties_calls_never_exceed_max_attempts_nor_waits_max_elapsed_nor_retries_the_budget(
    max_attempts: int,
    max_elapsed: float | None,
    took: list[float],
    ratio: float,
    at_least: int,
    backoff: Backoff,
    seed: int,
) -> None:
    clock, calls, requests = MockClock(), 0, 5

    async def ill(request: int, /) -> None:
        nonlocal calls
        clock.advance(took[calls % len(took)])
        calls += 1
        raise Ill(request)

    budget = TpsBudget(ttl=60, min_per_sec=at_least / 60, ratio=ratio, clock=clock)
    policy = StandardPolicy(backoff, on=Ill, max_attempts=max_attempts, max_elapsed=max_elapsed, budget=budget)
    call = Retry(policy, clock=clock, sleep=clock.sleep, random=Random(seed))(ill)
    for request in range(requests):
        before, slept = calls, len(clock.slept)
        with pytest.raises(Ill):
            await call(request)
        assert 1 <= calls - before <= max_attempts
        assert max_elapsed is None or sum(clock.slept[slept:]) <= max_elapsed + 1e-9
    if clock() < 60:  # within one life of the budget
        assert calls <= requests + at_least
