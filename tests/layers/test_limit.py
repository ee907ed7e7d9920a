"""The limits: never more calls than they allow, nobody out of turn, and nothing lost when a caller goes away."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from towline.errors import MisuseError, Overloaded, RateLimited, TowlineError
from towline.hooks import CallShed, Hooks
from towline.layers.limit import ConcurrencyLimit, Limiter, RateLimit
from towline.layers.retry import Retry
from towline.policies import Backoff, StandardPolicy
from towline.policies.rate import FixedWindow, Gcra, Rate
from towline.service import Wrapper, load, ready_now
from towline.stack import Stack
from towline.testing import MockClock, cancel_at_every_await, virtual_time_backend


class Busy:
    """A service whose calls take as many seconds as they say, and fail if that is negative."""

    def __init__(self) -> None:
        self.inside = 0
        self.peak = 0
        self.begun: list[float] = []

    async def __call__(self, seconds: float, /) -> float:
        self.begun.append(anyio.current_time())
        self.inside += 1
        self.peak = max(self.peak, self.inside)
        try:
            await anyio.sleep(abs(seconds))
            if seconds < 0:
                raise ConnectionError("broken")
            return seconds
        finally:
            self.inside -= 1


class Told(Hooks):
    def __init__(self) -> None:
        self.shed: list[CallShed] = []

    def on_shed(self, event: CallShed, /) -> None:
        self.shed.append(event)


async def same(request: int, /) -> int:
    return request


async def settle() -> None:
    """Let every task run until it waits for the clock or for another task; no time passes."""
    for _ in range(5):
        await anyio.lowlevel.checkpoint()


async def is_freed_after_refusal(call: Callable[[int], Awaitable[object]], refusal: type[TowlineError]) -> bool:
    """Whether the error of a refused call is gone with the call, without a garbage collector."""
    gc.collect()
    gc.disable()
    try:
        try:
            await call(1)
        except refusal as error:
            left = weakref.ref(error)
        else:
            raise AssertionError("it was not refused")
        return left() is None
    finally:
        gc.enable()


# --- the limiter -----------------------------------------------------------------------------------------------------


async def test_a_slot_goes_to_the_one_who_has_waited_longest_and_nobody_slips_in_between() -> None:
    limiter = Limiter(1)
    order: list[str] = []

    async def wait(name: str) -> None:
        await limiter.acquire()
        order.append(name)

    await limiter.acquire()
    async with anyio.create_task_group() as group:
        for name in "abc":
            group.start_soon(wait, name)
            await settle()
        assert (limiter.free, limiter.waiting) == (0, 3)
        limiter.release()
        assert not limiter.acquire_nowait(), "the slot is another's already, though it does not know yet"
        await settle()
        assert order == ["a"]
        limiter.release()
        await settle()
        assert order == ["a", "b"]
        limiter.release()
        await settle()
        assert order == ["a", "b", "c"]
    limiter.release()
    assert (limiter.free, limiter.waiting) == (1, 0)


async def test_a_slot_that_comes_in_the_moment_of_a_cancellation_goes_on_to_the_next() -> None:
    limiter = Limiter(1)
    got: list[str] = []
    scope = anyio.CancelScope()

    async def first() -> None:
        with scope:
            await limiter.acquire()
            try:
                await anyio.sleep(1)
                got.append("first")
            finally:
                limiter.release()

    async def second() -> None:
        await limiter.acquire()
        got.append("second")

    await limiter.acquire()
    async with anyio.create_task_group() as group:
        group.start_soon(first)
        await settle()
        group.start_soon(second)
        await settle()
        limiter.release()
        scope.cancel()
        await settle()
        assert got == ["second"]
    limiter.release()
    assert (limiter.free, limiter.waiting) == (1, 0)


async def test_whoever_leaves_the_queue_leaves_no_gap() -> None:
    limiter = Limiter(2)
    scopes = [anyio.CancelScope() for _ in range(5)]
    got: list[int] = []

    async def wait(number: int) -> None:
        with scopes[number]:
            await limiter.acquire()
            got.append(number)

    await limiter.acquire()
    await limiter.acquire()
    async with anyio.create_task_group() as group:
        for number in range(5):
            group.start_soon(wait, number)
            await settle()
        for number in (0, 2):
            scopes[number].cancel()
        await settle()
        assert limiter.waiting == 3
        limiter.release()
        await settle()
        limiter.release()
        await settle()
        assert got == [1, 3]
        scopes[4].cancel()
    assert got == [1, 3]
    limiter.release()
    limiter.release()
    assert repr(limiter) == "<Limiter: 0 of 2 taken, 0 waiting>"


async def test_one_task_may_hold_several_slots_and_another_may_give_them_back() -> None:
    limiter = Limiter(2)
    await limiter.acquire()
    await limiter.acquire()

    async def give_back() -> None:
        limiter.release()
        limiter.release()

    async with anyio.create_task_group() as group:
        group.start_soon(give_back)
    assert limiter.free == 2


def test_a_slot_that_nobody_holds_cannot_be_given_back() -> None:
    for limit in (0, 2):
        limiter = Limiter(limit)
        with pytest.raises(
            MisuseError, match=rf"^release\(\) without acquire\(\): none of the {limit} slots is taken$"
        ):
            limiter.release()
        assert limiter.free == limit


# --- ConcurrencyLimit: Tower's tests ---------------------------------------------------------------------------------


@pytest.mark.smoke
async def test_l3_two_are_in_flight_the_others_wait_and_are_let_in_one_by_one() -> None:
    busy = Busy()
    call = ConcurrencyLimit(2)(busy)
    start = anyio.current_time()
    async with anyio.create_task_group() as group:
        for seconds in (10, 14, 10, 10):
            group.start_soon(call, seconds)
            await settle()
        assert busy.inside == 2
        assert not ready_now(call)
    assert [begun - start for begun in busy.begun] == [0, 0, 10, 14]
    assert busy.peak == 2
    assert ready_now(call)


async def test_l3_a_limit_of_0_lets_nothing_through() -> None:
    busy = Busy()
    call = ConcurrencyLimit(0)(busy)
    assert not ready_now(call)
    with anyio.move_on_after(1e6) as scope:
        await call(1)
    assert scope.cancelled_caught
    assert busy.begun == []
    with pytest.raises(Overloaded):
        await ConcurrencyLimit(0, on_full="shed")(busy)(1)


async def test_l3_a_hint_reserves_nothing() -> None:
    call = ConcurrencyLimit(1)(same)
    for _ in range(3):
        assert ready_now(call)
    assert await call(1) == 1


async def test_l3_a_call_that_fails_gives_its_slot_back() -> None:
    busy = Busy()
    call = ConcurrencyLimit(1)(busy)
    for _ in range(3):
        with pytest.raises(ConnectionError):
            await call(-1)
        assert ready_now(call)
    assert await call(1) == 1


async def test_l3_a_call_that_is_cancelled_gives_its_slot_back_and_the_next_one_begins_at_once() -> None:
    busy = Busy()
    call = ConcurrencyLimit(1)(busy)
    start = anyio.current_time()
    async with anyio.create_task_group() as group:
        with anyio.move_on_after(3):
            group.start_soon(call, 5)  # not within the scope
            await settle()
            await call(1)  # in the queue when it is cancelled
        await settle()
        group.start_soon(call, 5)
    assert [begun - start for begun in busy.begun] == [0, 5]

    with anyio.move_on_after(3):
        await call(100)  # inside when it is cancelled
    assert ready_now(call)


async def test_l3_those_who_wait_are_served_first_come_first_served() -> None:
    call = ConcurrencyLimit(1)(Busy())
    order: list[int] = []

    async def client(number: int) -> None:
        await call(1)
        order.append(number)

    async with anyio.create_task_group() as group:
        for number in range(20):
            group.start_soon(client, number)
            await settle()
    assert order == list(range(20))


@pytest.mark.parametrize("limit", [1, 7, 999, 1000, 1001])
async def test_l3_a_thousand_tasks_are_never_more_inside_than_the_limit(limit: int) -> None:
    busy = Busy()
    call = ConcurrencyLimit(limit)(busy)
    start = anyio.current_time()

    async def client(number: int) -> None:
        try:
            await call(1 if number % 3 else -1)
        except ConnectionError:
            assert number % 3 == 0

    async with anyio.create_task_group() as group:
        for number in range(1000):
            group.start_soon(client, number)
    assert busy.peak == min(limit, 1000)
    assert len(busy.begun) == 1000
    assert anyio.current_time() - start == pytest.approx(math.ceil(1000 / limit))


# --- ConcurrencyLimit: whose slots -----------------------------------------------------------------------------------


async def test_l3_a_limiter_is_shared_by_all_services_that_are_given_it() -> None:
    one, other = Busy(), Busy()
    limiter = Limiter(3)
    layer = ConcurrencyLimit(limiter)
    calls = [layer(one), ConcurrencyLimit(limiter)(other)]
    both: list[int] = []

    async def client(number: int) -> None:
        await calls[number % 2](1)
        both.append(one.inside + other.inside)

    async with anyio.create_task_group() as group:
        for number in range(20):
            group.start_soon(client, number)
        await settle()
        assert one.inside + other.inside == 3
        assert not ready_now(calls[0])
        assert not ready_now(calls[1])
    assert max(both) <= 3
    assert limiter.free == 3


async def test_l3_each_service_has_slots_of_its_own_otherwise() -> None:
    layer = ConcurrencyLimit(1)
    one, other = Busy(), Busy()
    first, second = layer(one), layer(other)
    async with anyio.create_task_group() as group:
        group.start_soon(first, 1)
        group.start_soon(second, 1)
        await settle()
        assert (one.inside, other.inside) == (1, 1)


async def test_one_call_may_pass_the_same_limiter_twice() -> None:
    limiter = Limiter(2)
    layer = ConcurrencyLimit(limiter)
    assert await layer(layer(same))(1) == 1
    assert limiter.free == 2


MODULE_LIMITER = Limiter(2)
MODULE_BUSY = Busy()
MODULE_CALL = RateLimit(100, per=1)(ConcurrencyLimit(MODULE_LIMITER)(ConcurrencyLimit(2)(MODULE_BUSY)))


def test_l3_what_lives_in_a_module_works_in_one_event_loop_after_another() -> None:
    async def main(is_cut: bool) -> None:
        with anyio.move_on_after(5 if is_cut else math.inf):
            async with anyio.create_task_group() as group:
                for _ in range(200):  # some wait for a slot, and some for the rate
                    group.start_soon(MODULE_CALL, 2 if is_cut else 0.01)

    for backend in ("asyncio", "trio", "asyncio", "trio", "trio"):
        for is_cut in (True, False):
            MODULE_BUSY.begun.clear()
            name, options = virtual_time_backend(backend)
            anyio.run(main, is_cut, backend=name, backend_options=options)
            assert len(MODULE_BUSY.begun) == (6 if is_cut else 200)
            assert (MODULE_LIMITER.free, MODULE_LIMITER.waiting) == (2, 0)
    assert MODULE_BUSY.peak == 2


# --- ConcurrencyLimit: shedding, and its place -----------------------------------------------------------------------


async def test_l5_a_call_too_many_is_shed_at_once_if_that_is_asked_for() -> None:
    told, busy = Told(), Busy()
    call = ConcurrencyLimit(2, on_full="shed", hooks=told)(busy)
    start = anyio.current_time()
    async with anyio.create_task_group() as group:
        group.start_soon(call, 10)
        group.start_soon(call, 10)
        await settle()
        for _ in range(3):
            with pytest.raises(Overloaded, match=r"^all of the 2 calls that may be under way at a time are$") as caught:
                await call(1)
            assert caught.value is told.shed[-1].error
            assert caught.value.retryable
            assert caught.value.sent is False
        assert anyio.current_time() == start
    assert [event.layer for event in told.shed] == ["ConcurrencyLimit"] * 3
    assert len(busy.begun) == 2
    assert await call(1) == 1


async def test_outside_retry_a_call_keeps_its_slot_between_attempts_and_inside_it_gives_it_back() -> None:
    retry = Retry(
        StandardPolicy(Backoff.constant(10, jitter="none"), on=ConnectionError, idempotent=True, max_attempts=2)
    )
    outside = ConcurrencyLimit(1)(retry(Busy()))
    inside_limit = ConcurrencyLimit(1)(Busy())
    inside = retry(inside_limit)
    async with anyio.create_task_group() as group:

        async def fail(call: Callable[[float], Awaitable[float]]) -> None:
            with pytest.raises(ConnectionError):
                await call(-1)

        group.start_soon(fail, outside)
        group.start_soon(fail, inside)
        await anyio.sleep(5)
        assert not ready_now(outside)
        assert ready_now(inside)


async def test_hints_are_those_of_the_service_inside_too() -> None:
    class Tired(Wrapper[int, int]):
        is_ready = False

        async def __call__(self, request: int, /) -> int:
            return request

        def ready_now(self) -> bool:
            return self.is_ready

        def load(self) -> float:
            return 42.0

    tired = Tired(same)
    layers: list[ConcurrencyLimit | RateLimit] = [ConcurrencyLimit(1), RateLimit(1, per=1)]
    for layer in layers:
        call = layer(tired)
        tired.is_ready = False
        assert not ready_now(call)
        tired.is_ready = True
        assert ready_now(call)
        assert load(call) == 42.0


# --- RateLimit: Tower's tests ----------------------------------------------------------------------------------------

ONE_IN_100_MS: list[Rate] = [FixedWindow(1, per=0.1), Gcra(1, per=0.1)]
THREE_IN_100_MS: list[Rate] = [FixedWindow(3, per=0.1), Gcra(3, per=0.1)]


@pytest.mark.smoke
@pytest.mark.parametrize("rate", ONE_IN_100_MS, ids=repr)
async def test_l1_with_one_call_in_100_ms_the_second_waits_for_100_ms(rate: Rate) -> None:
    busy = Busy()
    call = RateLimit(rate)(busy)
    start = anyio.current_time()
    assert ready_now(call)
    await call(0)
    assert not ready_now(call)
    async with anyio.create_task_group() as group:
        group.start_soon(call, 0)
        await anyio.sleep(0.099)
        assert len(busy.begun) == 1
        await anyio.sleep(0.002)
        assert len(busy.begun) == 2
    assert [begun - start for begun in busy.begun] == pytest.approx([0, 0.1])


@pytest.mark.parametrize("rate", THREE_IN_100_MS, ids=repr)
async def test_l1_what_is_left_of_three_calls_in_100_ms_is_reset(rate: Rate) -> None:
    call = RateLimit(rate)(same)
    await call(1)
    await anyio.sleep(0.1)
    await call(1)
    await call(1)
    assert ready_now(call)
    await call(1)
    assert not ready_now(call)


async def test_l1_calls_that_come_at_once_begin_as_the_rate_allows() -> None:
    for rate, expected in (
        (FixedWindow(3, per=1), [0, 0, 0, 1, 1, 1, 2]),
        (Gcra(4, per=1, burst=3), [0, 0, 0, 0.25, 0.5, 0.75, 1]),
        (Gcra(4, per=1, burst=1), [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5]),
    ):
        busy = Busy()
        call = RateLimit(rate)(busy)
        start = anyio.current_time()
        async with anyio.create_task_group() as group:
            for _ in range(7):
                group.start_soon(call, 10)
        assert [begun - start for begun in busy.begun] == pytest.approx(expected)


# --- RateLimit: the queue --------------------------------------------------------------------------------------------


async def test_l2_whoever_is_cancelled_consumes_nothing_and_the_next_one_takes_its_place() -> None:
    call = RateLimit(1, per=1)(same)
    scopes = [anyio.CancelScope() for _ in range(7)]
    begun: list[tuple[int, float]] = []
    start = anyio.current_time()

    async def client(number: int) -> None:
        with scopes[number]:
            await call(number)
            begun.append((number, anyio.current_time() - start))

    async with anyio.create_task_group() as group:
        for number in range(7):
            group.start_soon(client, number)
            await settle()
        assert begun == [(0, 0)]
        scopes[3].cancel()  # in the middle of the queue
        await anyio.sleep(0.5)
        scopes[1].cancel()  # the first, which waits for the clock
        await anyio.sleep(1)
        scopes[4].cancel()
        scopes[5].cancel()
    assert begun == [(0, 0), (2, 1), (6, 2)]
    assert not ready_now(call)
    await anyio.sleep(1)
    assert ready_now(call)


async def test_l2_those_who_wait_are_served_first_come_first_served_and_nobody_overtakes_them() -> None:
    call = RateLimit(FixedWindow(2, per=1))(same)
    order: list[int] = []

    async def client(number: int, after: float) -> None:
        await anyio.sleep(after)
        await call(number)
        order.append(number)

    async with anyio.create_task_group() as group:
        for number, after in enumerate([0, 0, 0.1, 0.2, 0.3, 0.4, 1.0, 1.0, 1.5, 2.0]):
            group.start_soon(client, number, after)
    assert sorted(order[:2]) == [0, 1]
    assert order[2:6] == [2, 3, 4, 5]
    assert sorted(order) == list(range(10))


async def test_l2_a_call_that_is_cancelled_anywhere_leaves_nothing_behind() -> None:
    call = RateLimit(1, per=1)(ConcurrencyLimit(1)(Busy()))
    await call(0)

    async def two() -> None:
        await call(0.5)
        await call(0.5)

    async def check() -> None:
        await anyio.sleep(1)
        assert ready_now(call)
        await call(0)

    assert await cancel_at_every_await(two, check) == 4


@pytest.mark.parametrize("rate", ONE_IN_100_MS, ids=repr)
async def test_l5_a_call_too_early_is_shed_at_once_if_that_is_asked_for(rate: Rate) -> None:
    told, busy = Told(), Busy()
    call = RateLimit(rate, on_full="shed", hooks=told)(busy)
    await call(0)
    await anyio.sleep(0.0625)
    start = anyio.current_time()
    with pytest.raises(RateLimited) as caught:
        await call(0)
    assert anyio.current_time() == start
    assert caught.value.retry_after == pytest.approx(0.0375)
    assert str(caught.value) == f"no call may begin for 0.0375 s, by {rate!r}"
    assert caught.value.retryable
    assert [(event.layer, event.error) for event in told.shed] == [("RateLimit", caught.value)]
    assert caught.value.retry_after is not None
    await anyio.sleep(caught.value.retry_after)
    await call(0)
    assert len(busy.begun) == 2


async def test_l5_retry_waits_as_long_as_a_limit_says() -> None:
    busy = Busy()
    call = Retry(StandardPolicy(Backoff.constant(1000)))(RateLimit(1, per=60, on_full="shed")(busy))
    start = anyio.current_time()
    await call(0)
    await call(0)
    assert [begun - start for begun in busy.begun] == pytest.approx([0, 60])


async def test_a_number_of_calls_is_a_rate_at_an_even_pace() -> None:
    assert RateLimit(100, per=1) == RateLimit(100, 1) == RateLimit(Gcra(100, per=1))
    assert RateLimit(100, per=1) != RateLimit(FixedWindow(100, per=1))


async def test_each_service_is_counted_by_itself() -> None:
    layer = RateLimit(1, per=1)
    one, other = layer(same), layer(same)
    await one(1)
    assert not ready_now(one)
    assert ready_now(other)


async def test_clock_and_sleep_are_those_that_are_given() -> None:
    clock = MockClock(1e6)
    call = RateLimit(1, per=3600, clock=clock, sleep=clock.sleep)(same)
    start = anyio.current_time()
    for _ in range(4):
        await call(1)
    assert clock() == 1e6 + 3 * 3600
    assert clock.slept == [3600] * 3
    assert anyio.current_time() == start


async def test_while_anyone_waits_nobody_else_is_ready_even_when_it_is_time() -> None:
    clock, woken = MockClock(), anyio.Event()

    async def oversleep(seconds: float) -> None:
        await woken.wait()

    busy = Busy()
    call = RateLimit(1, per=1, clock=clock, sleep=oversleep)(busy)
    await call(0)
    async with anyio.create_task_group() as group:
        group.start_soon(call, 0)
        await settle()
        clock.advance(1)
        assert not ready_now(call)
        woken.set()
        await settle()
        assert len(busy.begun) == 2
    clock.advance(1)
    assert ready_now(call)


async def test_a_sleep_that_ends_early_is_followed_by_another() -> None:
    clock = MockClock()

    async def doze(seconds: float) -> None:
        await clock.sleep(seconds / 2 if seconds > 1e-3 else seconds)

    call = RateLimit(1, per=1, clock=clock, sleep=doze)(same)
    await call(1)
    await call(1)
    assert clock() == pytest.approx(1, abs=1e-6)
    assert len(clock.slept) == 11


async def test_a_sleep_that_fails_leaves_nothing_behind() -> None:
    clock = MockClock()

    async def broken(seconds: float) -> None:
        raise OSError("no sleep")

    call = RateLimit(1, per=1, clock=clock, sleep=broken)(same)
    await call(1)
    for _ in range(2):
        with pytest.raises(OSError, match="no sleep"):
            await call(1)
    clock.advance(1)
    assert await call(1) == 1


# --- whatever happens ------------------------------------------------------------------------------------------------

CLIENTS = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 30), st.none() | st.integers(0, 60)), min_size=1, max_size=30
)
"""Of each: when it comes and how long its call takes, in sixteenths of a second; and when it is cancelled, halfway
between two sixteenths, if at all."""


async def run_clients(
    clients: list[tuple[int, int, int | None]], layer: ConcurrencyLimit | RateLimit
) -> tuple[list[int], list[float], int]:
    """Which calls began, in order; when, in seconds from the start; and the most that there were at a time."""
    numbers: list[int] = []
    times: list[float] = []
    inside = peak = 0

    async def service(number: int, /) -> int:
        nonlocal inside, peak
        numbers.append(number)
        times.append(anyio.current_time() - start)
        inside += 1
        peak = max(peak, inside)
        try:
            await anyio.sleep(clients[number][1] / 16)
        finally:
            inside -= 1
        return number

    call = layer(service)

    async def client(number: int) -> None:
        arrival, _, cancelled = clients[number]
        with anyio.CancelScope() as scope:
            if cancelled is not None:
                scope.deadline = start + arrival / 16 + (cancelled + 0.5) / 16
            await anyio.sleep_until(start + arrival / 16)
            await call(number)

    start = anyio.current_time()
    # In the order in which they come, so that of those who come at the same time the first is started first.
    async with anyio.create_task_group() as group:
        for number in sorted(range(len(clients)), key=lambda number: clients[number][0]):
            await anyio.sleep_until(start + clients[number][0] / 16)
            group.start_soon(client, number)
            await settle()
    return numbers, times, peak


@given(clients=CLIENTS, limit=st.integers(1, 4))
@settings(deadline=None, max_examples=150)
async def test_whoever_comes_and_goes_a_limit_is_never_exceeded_and_no_slot_is_lost(
    clients: list[tuple[int, int, int | None]], limit: int
) -> None:
    limiter = Limiter(limit)
    numbers, times, peak = await run_clients(clients, ConcurrencyLimit(limiter))
    assert peak <= limit
    assert (limiter.free, limiter.waiting) == (limit, 0)
    begun = dict(zip(numbers, times, strict=True))
    by_arrival = sorted(range(len(clients)), key=lambda number: clients[number][0])
    in_turn = [begun[number] for number in by_arrival if number in begun]
    assert in_turn == sorted(in_turn), "first come, first served"
    assert {number for number, client in enumerate(clients) if client[2] is None} <= set(numbers)


@given(clients=CLIENTS, num=st.integers(1, 4), burst=st.integers(1, 4))
@settings(deadline=None, max_examples=150)
async def test_whoever_comes_and_goes_calls_begin_exactly_when_the_rate_allows(
    clients: list[tuple[int, int, int | None]], num: int, burst: int
) -> None:
    interval = 1 / num
    expected: list[tuple[int, float]] = []
    full_at = last = -math.inf
    for number in sorted(range(len(clients)), key=lambda number: clients[number][0]):
        arrival, _, cancelled = clients[number]
        begins = max(arrival / 16, last, full_at - (burst - 1) * interval)
        # A third of a second never meets the middle of a sixteenth, so it is always clear which of the two was first
        if cancelled is not None and arrival / 16 + (cancelled + 0.5) / 16 < begins:
            continue
        full_at, last = max(full_at, begins) + interval, begins
        expected.append((number, begins))
    numbers, times, _ = await run_clients(clients, RateLimit(Gcra(num, per=1, burst=burst)))
    assert numbers == [number for number, _ in expected]
    assert times == pytest.approx([begins for _, begins in expected], abs=1e-5)


@given(clients=CLIENTS, num=st.integers(1, 4))
@settings(deadline=None, max_examples=150)
async def test_whoever_comes_and_goes_calls_begin_exactly_when_the_window_allows(
    clients: list[tuple[int, int, int | None]], num: int
) -> None:
    expected: list[tuple[int, float]] = []
    until, left = -math.inf, 0
    for number in sorted(range(len(clients)), key=lambda number: clients[number][0]):
        arrival, _, cancelled = clients[number]
        begins = max(arrival / 16, expected[-1][1] if expected else 0.0)
        if not left:
            begins = max(begins, until)
        if cancelled is not None and arrival / 16 + (cancelled + 0.5) / 16 < begins:
            continue
        if begins >= until:
            until, left = begins + 1, num
        left -= 1
        expected.append((number, begins))
    numbers, times, _ = await run_clients(clients, RateLimit(FixedWindow(num, per=1)))
    assert numbers == [number for number, _ in expected]
    assert times == pytest.approx([begins for _, begins in expected], abs=1e-5)


# --- settings, and what they are as values ---------------------------------------------------------------------------


def test_settings_that_make_no_sense_are_refused_with_both_values() -> None:
    with pytest.raises(ValueError, match=r"^limit is -1, where 0 or more is expected$"):
        ConcurrencyLimit(-1)
    for limit in (2.5, math.inf, math.nan, "2", None):
        with pytest.raises(TypeError, match=rf"^limit is {limit!r}, where a whole number is expected$"):
            ConcurrencyLimit(limit)  # type: ignore[arg-type]  # what is tested
    drop: Any = "drop"
    with pytest.raises(ValueError, match=r"^on_full is 'drop', where 'wait' or 'shed' is expected$"):
        ConcurrencyLimit(1, on_full=drop)
    with pytest.raises(ValueError, match=r"^on_full is 'drop', where 'wait' or 'shed' is expected$"):
        RateLimit(1, per=1, on_full=drop)
    with pytest.raises(TypeError, match=r"^RateLimit\(100\) does not say for how many seconds: per is missing$"):
        RateLimit(100)
    with pytest.raises(TypeError, match=r"^per is 2, but FixedWindow\(num=1, per=1\) has its own$"):
        RateLimit(FixedWindow(1, per=1), per=2)
    with pytest.raises(ValueError, match=r"^num is 0, where 1 or more is expected$"):
        RateLimit(0, per=1)
    with pytest.raises(ValueError, match=r"^per is nan, where a number of seconds above 0 is expected$"):
        RateLimit(1, per=math.nan)
    with pytest.raises(TypeError, match=r"^num is 0.5, where a whole number is expected$"):
        RateLimit(0.5, per=1)  # type: ignore[arg-type]  # what is tested


def test_limits_are_values_that_wrap_both_sides() -> None:
    limiter = Limiter(2)
    assert ConcurrencyLimit(2) == ConcurrencyLimit(2) != ConcurrencyLimit(3)
    assert ConcurrencyLimit(limiter) == ConcurrencyLimit(limiter) != ConcurrencyLimit(Limiter(2))
    assert repr(ConcurrencyLimit(2)) == "ConcurrencyLimit(limit=2)"
    assert repr(RateLimit(2, per=1)) == "RateLimit(rate=Gcra(num=2, per=1, burst=2))"
    assert repr(ConcurrencyLimit(2)(same)) == "<Limited around same>"
    assert repr(RateLimit(2, per=1)(same)) == "<Paced around same>"
    assert not ConcurrencyLimit.client_only
    assert not RateLimit.client_only
    layers = RateLimit(2, per=1), ConcurrencyLimit(2)
    assert Stack(*layers) == Stack(*layers)
    assert hash(Stack(*layers)) == hash(Stack(*layers))


async def test_a_refusal_is_freed_with_its_call() -> None:
    busy = Busy()
    limited = ConcurrencyLimit(0, on_full="shed")(busy)
    paced = RateLimit(1, per=60, on_full="shed")(busy)
    await paced(0)
    assert await is_freed_after_refusal(limited, Overloaded)
    assert await is_freed_after_refusal(paced, RateLimited)


async def test_a_hook_that_raises_does_not_change_the_refusal(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Hooks):
        def on_shed(self, event: CallShed, /) -> None:
            raise RuntimeError("broken hook")

    with pytest.raises(Overloaded):
        await ConcurrencyLimit(0, on_full="shed", hooks=Broken())(same)(1)
    assert "a hook raised" in caplog.text
