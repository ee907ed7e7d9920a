"""Budgets: what is paid in is paid out, no more of it and no later than it should be."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Literal

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from towline.errors import MisuseError
from towline.hooks import GaveUp, Hooks, RetryScheduled
from towline.layers.retry import Retry
from towline.policies import Backoff, StandardPolicy
from towline.policies.budget import Budget, ConcurrencyBudget, Empty, TokenRatioBudget, TpsBudget, Unlimited
from towline.testing import MockClock, cancel_at_every_await

PHASES = [0.0, 0.0625, 12345.678, 1e9]
"""Where on the clock a budget is first used must not matter."""


def withdrawn(budget: Budget, limit: int = 2_000_000) -> int:
    """Withdraw until the budget says no; how often that was."""
    return next(n for n in range(limit) if not budget.withdraw())


def tps(ttl: float, min_per_sec: float, ratio: float, *, at: float = 0.0) -> tuple[TpsBudget, MockClock]:
    clock = MockClock(at)
    return TpsBudget(ttl=ttl, min_per_sec=min_per_sec, ratio=ratio, clock=clock), clock


# --- G1: Tower's own tests -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", PHASES)
def test_g1_nothing_is_allowed_where_nothing_was_deposited(phase: float) -> None:
    budget, _ = tps(1, 0, 1.0, at=phase)
    assert not budget.withdraw()


@pytest.mark.parametrize("phase", PHASES)
def test_g1_a_deposit_leaks_away(phase: float) -> None:
    budget, clock = tps(1, 0, 1.0, at=phase)
    budget.deposit()
    clock.advance(3)
    assert not budget.withdraw()


@pytest.mark.parametrize("phase", PHASES)
def test_g1_deposits_leak_away_window_by_window(phase: float) -> None:
    budget, clock = tps(1, 0, 0.5, at=phase)
    budget.deposit()
    budget.deposit()
    clock.advance(0.901)
    assert budget.withdraw()
    clock.advance(2.001)
    budget.deposit()
    clock.advance(0.301)
    budget.deposit()
    clock.advance(0.801)
    budget.deposit()
    assert budget.withdraw(), "the second and the third deposit pay for one"
    assert not budget.withdraw(), "the first one is too old"


@pytest.mark.parametrize("phase", PHASES)
def test_g1_the_reserve_is_there_without_a_deposit(phase: float) -> None:
    budget, _ = tps(1, 5, 1.0, at=phase)
    assert [budget.withdraw() for _ in range(6)] == [True] * 5 + [False]


# --- G2 and G3: how many ---------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_g2_by_default_a_hundred_retries_are_allowed_and_a_fifth_of_what_succeeds() -> None:
    budget = TpsBudget(clock=MockClock())
    assert withdrawn(budget) == 100
    budget = TpsBudget(clock=MockClock())
    for _ in range(1000):
        budget.deposit()
    assert withdrawn(budget) == 300


@pytest.mark.parametrize(
    ("ratio", "retries"),
    [
        (0.1, 100),
        (0.15, 150),
        (0.2, 200),
        (0.3, 300),
        (0.5, 500),
        (0.7, 700),
        (0.9, 900),
        (1, 1000),
        (1.001, 1001),
        (1.5, 1500),
        (2, 2000),
        (1000, 1_000_000),
        (0.0005, 0),
        (0.001, 1),
        (0.0015, 1),
        (0.002, 2),
        (0, 0),
    ],
)
def test_g3_a_thousand_deposits_pay_for_a_thousand_times_the_ratio(ratio: float, retries: int) -> None:
    budget, _ = tps(10, 0, ratio)
    for _ in range(1000):
        budget.deposit()
    assert budget.balance == retries
    assert withdrawn(budget) == retries
    assert budget.balance == 0


def test_g3_a_share_of_a_retry_in_the_reserve_adds_to_what_is_deposited() -> None:
    budget, _ = tps(10, 0.05, 0.25)
    assert budget.balance == 0
    budget.deposit()
    assert budget.balance == 0
    budget.deposit()
    assert withdrawn(budget) == 1


# --- G4: settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ttl", [0, 0.999, 60.001, -1, math.nan, math.inf])
def test_g4_a_ttl_is_1_to_60_seconds(ttl: float) -> None:
    with pytest.raises(ValueError, match=rf"^ttl is {ttl}, where 1 to 60 is expected$"):
        TpsBudget(ttl=ttl)


@pytest.mark.parametrize("ratio", [-0.001, 1000.1, math.nan, math.inf])
def test_g4_a_ratio_is_0_to_1000(ratio: float) -> None:
    with pytest.raises(ValueError, match=rf"^ratio is {ratio}, where 0 to 1000 is expected$"):
        TpsBudget(ratio=ratio)


@pytest.mark.parametrize("min_per_sec", [-1, math.nan, math.inf])
def test_g4_the_retries_a_second_are_a_number_of_0_or_more(min_per_sec: float) -> None:
    with pytest.raises(ValueError, match=rf"^min_per_sec is {min_per_sec}, where 0 or more is expected$"):
        TpsBudget(min_per_sec=min_per_sec)


def test_g4_the_ends_of_every_range_are_in_it() -> None:
    for ttl in (1, 60):
        for ratio in (0, 1000):
            assert TpsBudget(ttl=ttl, min_per_sec=0, ratio=ratio, clock=MockClock()).balance == 0


# --- G5: when --------------------------------------------------------------------------------------------------------


@given(ttl=st.sampled_from([1.0, 7.0, 10.0, 60.0]), first=st.floats(0, 0.9), second=st.floats(0, 1e6))
@settings(deadline=None)
def test_g5_a_deposit_counts_for_nine_tenths_of_the_ttl_at_least_and_all_of_it_at_most(
    ttl: float, first: float, second: float
) -> None:
    for age, counts in ((0.899, True), (1.001, False)):
        budget, clock = tps(ttl, 0, 1.0, at=second)
        assert not budget.withdraw()
        clock.advance(first * ttl)
        budget.deposit()
        clock.advance(age * ttl)
        assert budget.withdraw() is counts


@given(ttl=st.sampled_from([1.0, 7.0, 10.0, 60.0]), first=st.floats(0, 0.9))
@settings(deadline=None)
def test_g5_the_reserve_that_was_spent_is_back_after_the_ttl_and_not_before_nine_tenths_of_it(
    ttl: float, first: float
) -> None:
    budget, clock = tps(ttl, 5, 0.0)
    assert budget.balance == 5 * ttl
    clock.advance(first * ttl)
    assert withdrawn(budget) == 5 * ttl
    clock.advance(0.899 * ttl)
    assert budget.balance == 0
    clock.advance(0.102 * ttl)
    assert withdrawn(budget) == 5 * ttl


def test_g5_at_the_very_end_of_the_ttl_a_deposit_is_gone() -> None:
    budget, clock = tps(10, 0, 1.0)
    budget.deposit()
    clock.advance(9.75)
    assert budget.balance == 1
    clock.advance(0.25)
    assert budget.balance == 0


def test_g5_what_is_deposited_is_forgotten_with_its_tenth_of_the_ttl() -> None:
    budget, clock = tps(10, 0, 1.0)
    budget.deposit()
    clock.advance(0.96875)
    budget.deposit()
    clock.advance(9)
    assert budget.balance == 2
    clock.advance(0.03125)
    assert budget.balance == 0


def test_g5_steady_withdrawals_are_not_forgotten_early() -> None:
    # Where a step is just over one window, a ring that moves by whole windows from the last step forgets after half
    # the ttl.
    budget, clock = tps(10, 1, 0.0)
    assert withdrawn(budget) == 10
    for _ in range(8):
        clock.advance(1.001)
        budget.deposit()
        assert not budget.withdraw()
    clock.advance(1.001)
    assert budget.balance == 0
    clock.advance(1.001)
    assert budget.balance == 10


def test_g5_what_is_owed_for_a_deposit_that_was_forgotten_is_not_paid_twice() -> None:
    budget, clock = tps(10, 0, 1.0)
    budget.deposit()
    clock.advance(9)
    assert budget.withdraw()
    clock.advance(1)
    assert budget.balance == 0
    budget.deposit()
    assert not budget.withdraw(), "this deposit pays the debt"
    budget.deposit()
    assert budget.withdraw()


STEPS = st.lists(
    st.tuples(st.integers(0, 40), st.sampled_from(["deposit", "withdraw", "withdraw"])), min_size=1, max_size=150
)
"""How many quarters of a second later, and what happens then."""


@given(steps=STEPS, ratio=st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0]), min_per_sec=st.sampled_from([0.0, 0.1, 0.5]))
@settings(deadline=None)
def test_what_is_withdrawn_in_a_ttl_is_never_more_than_was_paid_in_and_is_all_of_it(
    steps: list[tuple[int, str]], ratio: float, min_per_sec: float
) -> None:
    budget, clock = tps(10, min_per_sec, ratio)
    reserve = min_per_sec * 10
    deposits: list[float] = []
    granted: list[float] = []

    def since(times: list[float], age: float) -> int:
        return sum(time > clock() - age for time in times)

    for quarters, verb in steps:
        clock.advance(quarters / 4)
        if verb == "deposit":
            budget.deposit()
            deposits.append(clock())
            continue
        assert budget.balance >= 0
        could = budget.balance >= 1
        if budget.withdraw():
            assert could
            granted.append(clock())
            assert since(granted, 9) <= reserve + ratio * since(deposits, 10)
        else:
            assert not could
            assert since(granted, 10) + 1 > reserve + ratio * since(deposits, 9)


# --- G6, G7 and G9: what it is for -----------------------------------------------------------------------------------


class Broken:
    """A service that takes a moment and then fails, or succeeds for some."""

    def __init__(self, succeeds: Callable[[int], bool] = lambda call: False) -> None:
        self.calls = 0
        self._succeeds = succeeds

    async def __call__(self, request: str, /) -> str:
        self.calls += 1
        succeeds = self._succeeds(self.calls)
        await anyio.sleep(0.01)
        if succeeds:
            return request
        raise ConnectionError(request)


async def ask(clients: int, each: int, service: Callable[[str], Awaitable[str]]) -> float:
    """Have so many clients make so many requests each, one after another; the seconds that it took."""

    async def client() -> None:
        for _ in range(each):
            with suppress(ConnectionError):
                await service("request")

    start = anyio.current_time()
    async with anyio.create_task_group() as group:
        for _ in range(clients):
            group.start_soon(client)
    return anyio.current_time() - start


def retrying(
    budget: Budget, *, deposit: Literal["success", "request"] = "success", hooks: Hooks | None = None
) -> Retry:
    backoff = Backoff.constant(0.01, jitter="none")
    policy = StandardPolicy(
        backoff, on=ConnectionError, idempotent=True, max_attempts=5, budget=budget, deposit=deposit
    )
    return Retry(policy, hooks=hooks)


@pytest.mark.parametrize(
    ("deposit", "least", "most"), [("success", 1000, 1000), ("request", 1190, 1200)], ids=["by success", "by request"]
)
async def test_g6_fifty_clients_with_one_budget_do_not_storm_what_is_broken(
    deposit: Literal["success", "request"], least: int, most: int
) -> None:
    service = Broken()
    budget = TpsBudget(ttl=60, min_per_sec=0, ratio=0.2)
    elapsed = await ask(50, 20, retrying(budget, deposit=deposit)(service))
    assert elapsed < 0.9 * 60
    assert least <= service.calls <= most


async def test_g6_without_a_limit_they_make_every_attempt_and_with_an_empty_one_none() -> None:
    for budget, calls in ((Unlimited(), 5000), (Empty(), 1000)):
        service = Broken()
        await ask(50, 20, retrying(budget)(service))
        assert service.calls == calls


def test_g6_shared_by_fifty_the_bare_budget_pays_out_what_was_paid_in() -> None:
    for paying, paid in ((False, 0), (True, 200)):
        budget, _ = tps(10, 0, 0.2)
        granted = 0
        for _ in range(20):
            for _ in range(50):
                if paying:
                    budget.deposit()
                granted += budget.withdraw()
        assert granted == paid


@given(
    every=st.integers(1, 12),
    ratio=st.sampled_from([0.0, 0.1, 0.2, 0.7, 1.0]),
    min_per_sec=st.sampled_from([0.0, 0.5, 2.0]),
    deposit=st.sampled_from(["success", "request"]),
)
@settings(deadline=None, max_examples=15)
async def test_g7_the_calls_for_a_request_are_bounded_by_the_ratio_and_the_reserve(
    every: int, ratio: float, min_per_sec: float, deposit: Literal["success", "request"]
) -> None:
    service = Broken(lambda call: call % every == 0)
    budget = TpsBudget(ttl=60, min_per_sec=min_per_sec, ratio=ratio)
    clients, each = 20, 5
    elapsed = await ask(clients, each, retrying(budget, deposit=deposit)(service))
    assert elapsed < 0.9 * 60
    requests, reserve = clients * each, 60 * min_per_sec
    assert service.calls / requests <= 1 + ratio + reserve / requests


async def test_g7_a_budget_that_recovers_lets_retries_mend_what_they_can() -> None:
    service = Broken(lambda call: call % 10 != 0)  # one call in ten fails, and no two in a row
    errors: list[GaveUp] = []

    class Told(Hooks):
        def on_give_up(self, event: GaveUp, /) -> None:
            errors.append(event)

    # one client, since of several any could be the one whose retries meet every tenth call
    await ask(1, 1000, retrying(TpsBudget(ttl=60, min_per_sec=0.1, ratio=0.2), hooks=Told())(service))
    assert errors == []
    assert 1100 <= service.calls <= 1120


async def test_g9_what_is_withdrawn_is_withdrawn_before_the_wait() -> None:
    scheduled: list[RetryScheduled] = []
    refused: list[GaveUp] = []
    slept: list[float] = []

    class Told(Hooks):
        def on_retry_scheduled(self, event: RetryScheduled, /) -> None:
            scheduled.append(event)

        def on_give_up(self, event: GaveUp, /) -> None:
            refused.append(event)

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        await anyio.sleep(seconds)

    async def broken(request: str, /) -> str:
        await anyio.sleep(1)
        raise ConnectionError(request)

    policy = StandardPolicy(
        Backoff.constant(3600, jitter="none"),
        on=ConnectionError,
        idempotent=True,
        budget=TpsBudget(ttl=60, min_per_sec=0, ratio=0.2),
        deposit="request",
    )
    service = Retry(policy, sleep=sleep, hooks=Told())(broken)
    async with anyio.create_task_group() as group:

        async def client() -> None:
            with pytest.raises(ConnectionError):
                await service("request")

        for _ in range(1000):
            group.start_soon(client)
        await anyio.sleep(2)  # all have failed at once, and nobody's wait is over
        assert len(scheduled) == len(slept) == 200
        assert len(refused) == 800
        assert {event.reason for event in refused} == {"budget"}


def test_g9_a_thousand_simultaneous_failures_get_two_hundred_permissions() -> None:
    budget, _ = tps(10, 0, 0.2)
    for _ in range(1000):
        budget.deposit()
    assert sum(budget.withdraw() for _ in range(1000)) == 200


# --- G10: clocks -----------------------------------------------------------------------------------------------------


class Hands:
    """A clock that can be set."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


@pytest.mark.parametrize("back", [0.5, 5.0, 1e6, 1e300])
def test_g10_a_clock_that_goes_back_neither_pays_nor_takes_anything(back: float) -> None:
    hands = Hands()
    budget = TpsBudget(ttl=10, min_per_sec=0.2, ratio=1, clock=hands)
    hands.time = 2e6
    budget.deposit()
    assert budget.withdraw()
    assert budget.balance == 2
    hands.time -= back
    assert budget.balance == 2
    assert withdrawn(budget) == 2


def test_g10_after_a_clock_went_back_what_was_spent_is_back_one_ttl_later() -> None:
    hands = Hands()
    budget = TpsBudget(ttl=10, min_per_sec=1, ratio=1, clock=hands)
    hands.time = 1e6
    assert withdrawn(budget) == 10
    hands.time = 3.0  # the program goes on in another event loop
    assert not budget.withdraw()
    hands.time = 3.0 + 8.99
    assert not budget.withdraw()
    hands.time = 3.0 + 10
    assert withdrawn(budget) == 10


@pytest.mark.parametrize("gap", [100.0, 1e9, 1e300])
def test_g10_after_a_huge_gap_all_is_forgotten_at_once(gap: float) -> None:
    hands = Hands()
    budget = TpsBudget(ttl=10, min_per_sec=1, ratio=1, clock=hands)
    assert withdrawn(budget) == 10
    hands.time += gap
    assert budget.balance == 10
    budget.deposit()
    assert budget.balance == 11


@given(times=st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=50))
@settings(deadline=None)
def test_g10_no_clock_makes_it_fail_or_pay_out_what_was_never_there(times: list[float]) -> None:
    hands = Hands()
    budget = TpsBudget(ttl=10, min_per_sec=1, ratio=1, clock=hands)
    for deposits, time in enumerate(times):
        hands.time = time
        assert 0 <= budget.balance <= 10 + deposits
        budget.withdraw()
        budget.deposit()


async def test_the_default_clock_is_that_of_the_event_loop() -> None:
    budget = TpsBudget(ttl=10, min_per_sec=1)
    assert withdrawn(budget) == 10
    await anyio.sleep(10)
    assert withdrawn(budget) == 10


# --- G8: gRPC's tokens -----------------------------------------------------------------------------------------------


def failed_five_times() -> TokenRatioBudget:
    budget = TokenRatioBudget(max_tokens=10, ratio=0.1)
    assert budget.balance == 4
    assert [budget.withdraw() for _ in range(5)] == [True, True, True, True, False]
    assert budget.balance == 0
    return budget


def test_g8_retries_stop_where_no_more_than_half_of_the_tokens_is_left() -> None:
    failed_five_times()


@pytest.mark.parametrize(("successes", "allowed"), [(10, False), (11, True)])
def test_g8_a_success_brings_back_a_tenth_of_a_token(successes: int, allowed: bool) -> None:
    budget = failed_five_times()
    for _ in range(successes):
        budget.deposit()
    assert budget.balance == allowed
    assert budget.withdraw() is allowed


def test_g8_failures_that_are_refused_count_and_tokens_end_at_0() -> None:
    budget = TokenRatioBudget(10, 1.0)
    for _ in range(100):
        budget.withdraw()
    for _ in range(6):
        assert not budget.withdraw()
        budget.deposit()
    for _ in range(5):
        budget.deposit()
    assert not budget.withdraw(), "6 tokens, and this failure takes one"
    for _ in range(2):
        budget.deposit()
    assert budget.withdraw(), "7 tokens, and this failure takes one"


def test_g8_tokens_never_are_more_than_max_tokens() -> None:
    budget = TokenRatioBudget(10, 0.7)
    for _ in range(100):
        budget.deposit()
    assert budget.balance == 4
    budget.withdraw()
    budget.deposit()
    budget.deposit()
    assert budget.balance == 4


@pytest.mark.parametrize(
    ("max_tokens", "retries"), [(1, 0), (2, 0), (3, 1), (4, 1), (5, 2), (10, 4), (1000, 499)], ids=str
)
def test_g8_the_half_is_exact_for_odd_numbers_too(max_tokens: int, retries: int) -> None:
    budget = TokenRatioBudget(max_tokens)
    assert budget.balance == retries
    assert withdrawn(budget) == retries


@pytest.mark.parametrize(
    ("ratio", "thousandths"), [(0.5466, 546), (1.001, 1001), (0.57, 570), (0.001, 1), (0.0019, 1), (2, 2000)]
)
def test_g8_decimals_beyond_the_third_are_ignored(ratio: float, thousandths: int) -> None:
    budget = TokenRatioBudget(1000, ratio)
    for _ in range(1000):
        budget.withdraw()
    successes = 0
    while not budget.balance:
        budget.deposit()
        successes += 1
    # A failure takes one token, and after it there must be more than 500
    assert successes == math.ceil(501_001 / thousandths)


@pytest.mark.parametrize("max_tokens", [0, -1, 1001])
def test_g8_max_tokens_are_1_to_1000(max_tokens: int) -> None:
    with pytest.raises(ValueError, match=rf"^max_tokens is {max_tokens}, where 1 to 1000 is expected$"):
        TokenRatioBudget(max_tokens)


@pytest.mark.parametrize("ratio", [0, -0.1, 0.0009, math.nan, math.inf])
def test_g8_a_ratio_of_tokens_is_above_0(ratio: float) -> None:
    with pytest.raises(ValueError, match=rf"^ratio is {ratio}, where 0.001 or more is expected$"):
        TokenRatioBudget(10, ratio)


def test_what_must_be_whole_is_refused_where_it_is_not() -> None:
    with pytest.raises(TypeError, match=r"^max_tokens is 10.5, where a whole number is expected$"):
        TokenRatioBudget(10.5)  # type: ignore[arg-type]  # what is tested
    with pytest.raises(TypeError, match=r"^at_least is 0.5, where a whole number is expected$"):
        ConcurrencyBudget(at_least=0.5)  # type: ignore[arg-type]  # what is tested


async def test_g8_tokens_throttle_retries() -> None:
    service = Broken()
    await ask(10, 10, retrying(TokenRatioBudget(10, 0.1))(service))
    assert service.calls == 100 + 4


@given(
    max_tokens=st.integers(1, 50),
    ratio=st.sampled_from([0.1, 0.333, 1.0, 2.5]),
    verbs=st.lists(st.sampled_from(["deposit", "withdraw"]), max_size=200),
)
@settings(deadline=None)
def test_tokens_are_counted_as_in_a_model_of_fractions(max_tokens: int, ratio: float, verbs: list[str]) -> None:
    budget = TokenRatioBudget(max_tokens, ratio)
    paid = round(ratio * 1000)
    tokens = full = 1000 * max_tokens
    for verb in verbs:
        could = budget.balance >= 1
        if verb == "deposit":
            budget.deposit()
            tokens = min(tokens + paid, full)
        else:
            tokens = max(tokens - 1000, 0)
            assert budget.withdraw() is could is (tokens / full > 0.5)


# --- what is under way -----------------------------------------------------------------------------------------------


def under_way(requests: int, *, ratio: float = 0.2, at_least: int = 3) -> ConcurrencyBudget:
    budget = ConcurrencyBudget(ratio, at_least)
    for _ in range(requests):
        budget.enter()
    return budget


@pytest.mark.parametrize(
    ("requests", "extra"), [(0, 3), (1, 3), (15, 3), (19, 3), (20, 4), (24, 4), (25, 5), (1000, 200)]
)
def test_a_fifth_of_the_requests_under_way_may_have_an_extra_call_and_three_for_certain(
    requests: int, extra: int
) -> None:
    budget = under_way(requests)
    assert budget.balance == extra
    assert withdrawn(budget) == extra
    assert budget.balance == 0
    budget.release()
    assert withdrawn(budget) == 1


@pytest.mark.parametrize(
    ("ratio", "extra"), [(0, 0), (0.29, 290), (0.57, 570), (1, 1000), (1.001, 1001), (2.5, 2500), (0.0001, 0)]
)
def test_the_share_of_what_is_under_way_is_exact(ratio: float, extra: int) -> None:
    assert withdrawn(under_way(1000, ratio=ratio, at_least=0)) == extra


def test_extra_calls_outlive_the_requests_that_they_were_counted_by() -> None:
    budget = under_way(20, at_least=0)
    assert withdrawn(budget) == 4
    for _ in range(20):
        budget.leave()
    assert budget.balance == 0
    assert not budget.withdraw()
    for _ in range(4):
        budget.release()
    budget.enter()
    assert not budget.withdraw()
    for _ in range(4):
        budget.enter()
    assert budget.withdraw()


def test_what_never_began_cannot_be_over() -> None:
    budget = ConcurrencyBudget()
    with pytest.raises(MisuseError, match=r"^leave\(\) without enter\(\): no request is under way$"):
        budget.leave()
    with pytest.raises(MisuseError, match=r"^release\(\) without withdraw\(\): no extra call is under way$"):
        budget.release()
    assert budget.balance == 3


@pytest.mark.parametrize("ratio", [-0.1, math.nan, math.inf])
def test_a_ratio_of_what_is_under_way_is_0_or_more(ratio: float) -> None:
    with pytest.raises(ValueError, match=rf"^ratio is {ratio}, where 0 or more is expected$"):
        ConcurrencyBudget(ratio)


def test_what_is_allowed_for_certain_is_0_or_more() -> None:
    with pytest.raises(ValueError, match=r"^at_least is -1, where 0 or more is expected$"):
        ConcurrencyBudget(at_least=-1)


async def test_g9_a_retry_that_waits_counts_as_under_way() -> None:
    service = Broken()
    peak = 0

    async def sleep(seconds: float) -> None:
        nonlocal peak
        peak = max(peak, 20 - int(budget.balance))
        await anyio.sleep(seconds)

    budget = ConcurrencyBudget(0.2, at_least=0)
    policy = StandardPolicy(
        Backoff.constant(3600, jitter="none"), on=ConnectionError, idempotent=True, max_attempts=2, budget=budget
    )
    elapsed = await ask(100, 1, Retry(policy, sleep=sleep)(service))
    assert elapsed > 3600
    assert peak == 20
    assert service.calls == 120
    assert budget.balance == 0


async def test_a_call_that_is_cancelled_anywhere_is_no_longer_under_way() -> None:
    budget = ConcurrencyBudget(3.0, at_least=1)  # so that whatever is left behind shows in the balance
    service = retrying(budget)(Broken())

    async def call() -> None:
        with pytest.raises(ConnectionError):
            await service("request")

    async def check() -> None:
        assert budget.balance == 1
        budget.enter()
        assert budget.balance == 3
        budget.leave()

    assert await cancel_at_every_await(call, check) >= 5 + 3


# --- what they are as values -----------------------------------------------------------------------------------------


def test_budgets_that_are_made_alike_are_equal_whatever_they_hold() -> None:
    clock = MockClock()
    pairs: list[tuple[Budget, Budget, Budget]] = [
        (TpsBudget(clock=clock), TpsBudget(clock=clock), TpsBudget(ttl=20, clock=clock)),
        (TokenRatioBudget(), TokenRatioBudget(), TokenRatioBudget(20)),
        (ConcurrencyBudget(), ConcurrencyBudget(), ConcurrencyBudget(at_least=0)),
        (Empty(), Empty(), Unlimited()),
    ]
    for one, other, different in pairs:
        one.withdraw()
        assert one == other
        assert hash(one) == hash(other)
        assert one != different
    assert TpsBudget(clock=clock) != TpsBudget(clock=MockClock())
    assert StandardPolicy() == StandardPolicy()


def test_budgets_show_their_settings() -> None:
    assert repr(TpsBudget(ttl=5)) == "TpsBudget(ttl=5, min_per_sec=10.0, ratio=0.2)"
    assert repr(TokenRatioBudget()) == "TokenRatioBudget(max_tokens=10, ratio=0.1)"
    assert repr(ConcurrencyBudget()) == "ConcurrencyBudget(ratio=0.2, at_least=3)"
    assert repr(Empty()) == "Empty()"
    assert repr(Unlimited()) == "Unlimited()"


def test_only_a_budget_of_what_is_under_way_asks_to_be_told_of_it() -> None:
    assert ConcurrencyBudget.counts_calls
    for quiet in (Budget, TpsBudget, TokenRatioBudget, Empty, Unlimited):
        assert not quiet.counts_calls


def test_the_two_ends_hear_nothing_and_never_change() -> None:
    ends: list[tuple[Budget, float]] = [(Empty(), 0), (Unlimited(), math.inf)]
    for budget, balance in ends:
        budget.enter()
        budget.deposit()
        assert budget.balance == balance
        assert budget.withdraw() is (balance > 0)
        budget.release()
        budget.leave()
        assert budget.balance == balance
