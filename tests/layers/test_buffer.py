"""The Buffer layer: who waits, who goes next, and what becomes of all of them when it ends."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import anyio
import anyio.lowlevel
import pytest
from anyio import wait_all_tasks_blocked
from hypothesis import given, settings
from hypothesis import strategies as st

from towline.errors import MisuseError, Overloaded, ServiceClosed
from towline.hooks import CallShed, Hooks
from towline.layers.buffer import LATENESS, Buffer
from towline.layers.limit import ConcurrencyLimit, Limiter, RateLimit
from towline.layers.timeout import Timeout
from towline.service import Service, Wrapper, ready_now
from towline.testing import cancel_at_every_await


class Gate:
    """A service that takes calls only while it is open, and says how to wait for that; a call answers when released."""

    def __init__(self, *, is_open: bool = False) -> None:
        self.requests: list[int] = []
        self.cancelled: list[int] = []
        self.is_open = is_open
        self.failure: Exception | None = None
        self._change = anyio.Event()
        self._released = anyio.Event()

    def open(self) -> None:
        self.is_open = True
        self._change.set()

    def fail(self, error: Exception) -> None:
        self.failure = error
        self._change.set()

    def release(self) -> None:
        self._released.set()

    def ready_now(self) -> bool:
        if self.failure is not None:
            raise self.failure
        return self.is_open

    async def ready(self) -> None:
        if not self.is_open:
            await self._change.wait()
        if self.failure is not None:
            raise self.failure

    async def __call__(self, request: int, /) -> int:
        self.requests.append(request)
        try:
            await self._released.wait()
        except BaseException:
            self.cancelled.append(request)
            raise
        return 10 * request


class OneByOne(Gate):
    """Takes one call each time it is opened."""

    async def __call__(self, request: int, /) -> int:
        self.is_open = False
        self._change = anyio.Event()
        return await super().__call__(request)


@dataclass
class Callers:
    """Calls in tasks of their own, and what came of each."""

    service: Service[int, int]
    tasks: anyio.abc.TaskGroup
    answers: dict[int, int] = field(default_factory=dict[int, int])
    errors: dict[int, Exception] = field(default_factory=dict[int, Exception])
    scopes: dict[int, anyio.CancelScope] = field(default_factory=dict[int, anyio.CancelScope])

    async def start(self, *requests: int) -> None:
        """Start calls, one after the other, until nothing moves."""
        for request in requests:
            self.tasks.start_soon(self._call, request)
            await wait_all_tasks_blocked()

    async def cancel(self, *requests: int) -> None:
        for request in requests:
            self.scopes[request].cancel()
        await wait_all_tasks_blocked()

    async def _call(self, request: int) -> None:
        with anyio.CancelScope() as scope:
            self.scopes[request] = scope
            try:
                self.answers[request] = await self.service(request)
            except Exception as error:
                self.errors[request] = error

    @property
    def waiting(self) -> list[int]:
        return [
            request
            for request, scope in self.scopes.items()
            if request not in self.answers and request not in self.errors and not scope.cancel_called
        ]


@asynccontextmanager
async def callers_of(service: Service[int, int]) -> AsyncGenerator[Callers]:
    async with anyio.create_task_group() as tasks:
        yield Callers(service, tasks)


@asynccontextmanager
async def calling(service: Wrapper[int, int]) -> AsyncGenerator[Callers]:
    """Callers of a service, within its block and for longer."""
    async with callers_of(service) as callers, service:
        yield callers


async def tenfold(request: int, /) -> int:
    await anyio.lowlevel.checkpoint()
    return 10 * request


# --- calls go through -----------------------------------------------------------------------------------------------


@pytest.mark.smoke
async def test_a_request_and_its_response_go_through() -> None:
    async with Buffer(1)(tenfold) as call:
        assert await call(4) == 40


async def test_a_buffer_does_not_limit_how_many_calls_are_under_way() -> None:
    gate = Gate(is_open=True)
    async with calling(Buffer(1, on_full="shed")(gate)) as callers:
        await callers.start(*range(50))
        assert gate.requests == [*range(50)]
        gate.release()
    assert callers.answers == {n: 10 * n for n in range(50)}


async def test_an_error_of_a_call_comes_to_its_caller_as_it_is_and_to_nobody_else() -> None:
    error = ValueError("no")

    async def service(request: int, /) -> int:
        await anyio.lowlevel.checkpoint()
        if request == 1:
            raise error
        return 10 * request

    async with calling(Buffer(5)(ConcurrencyLimit(1)(service))) as callers:
        for n in range(4):
            callers.tasks.start_soon(callers._call, n)
        await wait_all_tasks_blocked()
    assert callers.errors == {1: error}
    assert callers.errors[1] is error
    assert callers.answers == {0: 0, 2: 20, 3: 30}


async def test_a_queued_call_sees_the_context_and_the_deadline_of_its_caller() -> None:
    who: ContextVar[str] = ContextVar("who", default="nobody")
    seen: dict[int, tuple[str, float]] = {}

    class Looking(Gate):
        async def __call__(self, request: int, /) -> int:
            seen[request] = who.get(), anyio.current_effective_deadline()
            return request

    gate = Looking()

    async def caller(request: int, name: str, deadline: float) -> None:
        who.set(name)
        with anyio.CancelScope(deadline=deadline):
            await call(request)

    later = anyio.current_time() + 100
    async with Buffer(5)(gate) as call, anyio.create_task_group() as tasks:
        tasks.start_soon(caller, 1, "one", later)
        tasks.start_soon(caller, 2, "two", math.inf)
        await wait_all_tasks_blocked()
        assert not seen
        gate.open()
    assert seen == {1: ("one", later), 2: ("two", math.inf)}


async def test_a_caller_that_is_cancelled_during_its_call_cancels_that_call_alone() -> None:
    gate = OneByOne(is_open=True)
    async with calling(Buffer(5)(gate)) as callers:
        await callers.start(1, 2)
        gate.open()
        await wait_all_tasks_blocked()
        assert gate.requests == [1, 2]
        await callers.cancel(2)
        assert gate.cancelled == [2]
        gate.release()
    assert callers.answers == {1: 10}


# --- the queue ------------------------------------------------------------------------------------------------------


async def test_l6_with_bound_2_three_are_accepted_and_the_fourth_is_turned_away() -> None:
    gate = Gate()
    async with calling(Buffer(2, on_full="shed")(gate)) as callers:
        call = callers.service
        for n in (1, 2, 3):
            assert ready_now(call)
            await callers.start(n)
        assert not ready_now(call)
        with pytest.raises(Overloaded, match=r"^2 calls wait already, where bound is 2$") as caught:
            await call(4)
        assert caught.value.sent is False
        assert gate.requests == []
        gate.open()
        gate.release()
    assert callers.answers == {1: 10, 2: 20, 3: 30}
    assert gate.requests == [1, 2, 3]


async def test_l6_with_bound_2_and_one_tick_for_all_it_is_the_fourth_too() -> None:
    # The worker has had no time to take one out of the queue; it makes no difference.
    gate = Gate()
    async with calling(Buffer(2, on_full="shed")(gate)) as callers:
        for n in (1, 2, 3, 4):
            callers.tasks.start_soon(callers._call, n)
        await wait_all_tasks_blocked()
        assert len(callers.waiting) == 3
        assert [type(error) for error in callers.errors.values()] == [Overloaded]
        gate.open()
        gate.release()


async def test_l6_with_bound_2_the_fourth_waits_and_is_answered_in_its_turn() -> None:
    gate = OneByOne()
    gate.release()
    async with calling(Buffer(2)(gate)) as callers:
        call = callers.service
        await callers.start(1, 2, 3, 4, 5)
        assert not ready_now(call)
        assert callers.waiting == [1, 2, 3, 4, 5]
        for n in range(1, 6):
            assert gate.requests == [*range(1, n)]
            assert ready_now(call) is (n > 3)
            gate.open()
            await wait_all_tasks_blocked()
        assert callers.answers == {n: 10 * n for n in range(1, 6)}
        assert ready_now(call)


async def test_l6_a_cancelled_queued_request_never_reaches_the_service_inside() -> None:
    gate = Gate()
    gate.release()
    async with calling(Buffer(10)(gate)) as callers:
        await callers.start(1, 2, 3, 4, 5, 6)
        await callers.cancel(1, 3, 6)  # the one that is held, one in the middle and the last
        gate.open()
        await wait_all_tasks_blocked()
        assert gate.requests == [2, 4, 5]
        assert callers.answers == {2: 20, 4: 40, 5: 50}


async def test_l6_a_request_that_is_cancelled_as_its_turn_comes_does_not_stop_the_next() -> None:
    gate = Gate()
    gate.release()
    async with calling(Buffer(10)(gate)) as callers:
        call = callers.service
        await callers.start(1, 2, 3)
        gate.open()
        callers.scopes[1].cancel()
        await wait_all_tasks_blocked()
        assert callers.answers.keys() | {1} == {1, 2, 3}
        assert await call(4) == 40


async def test_l6_when_all_have_given_up_the_buffer_is_as_new() -> None:
    gate = Gate()
    gate.release()
    async with calling(Buffer(2, on_full="shed")(gate)) as callers:
        call = callers.service
        for _ in range(5):  # Tower's doesnt_leak_permits: a place that was given up is free again
            await callers.start(1, 2, 3)
            assert not ready_now(call)
            await callers.cancel(1, 2, 3)
            assert ready_now(call)
        gate.open()
        await callers.start(4)
        assert callers.answers == {4: 40}
        assert gate.requests == [4]


async def test_nobody_overtakes_the_queue_when_the_service_becomes_ready() -> None:
    gate = Gate()
    gate.release()
    async with calling(Buffer(10)(gate)) as callers:
        call = callers.service
        await callers.start(1, 2)
        gate.open()
        assert await call(3) == 30  # comes when the gate is open already, and the worker has not run yet
        assert gate.requests == [1, 2, 3]


async def test_the_hooks_are_told_of_a_call_that_is_turned_away() -> None:
    class Told(Hooks):
        events: list[CallShed] = []  # noqa: RUF012 -- one instance, in one test

        def on_shed(self, event: CallShed, /) -> None:
            self.events.append(event)
            raise RuntimeError("is logged, and harms nothing")

    told = Told()
    gate = Gate()
    async with calling(Buffer(1, on_full="shed", hooks=told)(gate)) as callers:
        await callers.start(1, 2, 3)
        assert [(event.layer, event.error) for event in told.events] == [("Buffer", callers.errors[3])]
        gate.open()
        gate.release()


# --- beside limits --------------------------------------------------------------------------------------------------


async def test_l4_a_buffer_of_100_outside_a_limit_of_10_takes_110_and_one_more() -> None:
    gate = Gate(is_open=True)
    async with calling(Buffer(100, on_full="shed")(ConcurrencyLimit(10)(gate))) as callers:
        for n in range(200):
            callers.tasks.start_soon(callers._call, n)
        await wait_all_tasks_blocked()
        assert len(gate.requests) == 10
        assert len(callers.waiting) == 10 + 100 + 1
        assert Counter(type(error) for error in callers.errors.values()) == {Overloaded: 89}
        gate.release()
    assert len(callers.answers) == 111


async def test_l4_a_limit_of_10_outside_a_buffer_of_100_takes_10() -> None:
    gate = Gate(is_open=True)
    async with calling(ConcurrencyLimit(10, on_full="shed")(Buffer(100)(gate))) as callers:
        for n in range(200):
            callers.tasks.start_soon(callers._call, n)
        await wait_all_tasks_blocked()
        assert len(gate.requests) == len(callers.waiting) == 10
        gate.release()


async def test_as_soon_as_a_call_ends_however_the_next_begins() -> None:
    async def service(request: int, /) -> int:
        begun.append(request)
        if request == 2:
            raise ValueError
        await anyio.sleep(1000 if request == 1 else 1)
        return 10 * request

    begun: list[int] = []
    start = anyio.current_time()
    async with calling(Buffer(10)(ConcurrencyLimit(1)(service))) as callers:
        await callers.start(1, 2, 3, 4)
        assert begun == [1]
        await callers.cancel(1)
        assert begun == [1, 2, 3]
        await anyio.sleep_until(start + 2.5)
        assert begun == [1, 2, 3, 4]
        assert callers.answers == {3: 30, 4: 40}


async def test_a_service_that_others_keep_busy_is_waited_for_inside_where_nothing_else_would_wake_the_worker() -> None:
    limiter = Limiter(1)
    await limiter.acquire()
    async with calling(Buffer(10)(ConcurrencyLimit(limiter)(tenfold))) as callers:
        await callers.start(1, 2, 3)
        assert limiter.waiting == 1
        limiter.release()
        await anyio.sleep(1)
        assert callers.waiting == []
    assert callers.answers == {1: 10, 2: 20, 3: 30}


async def test_two_buffers_share_a_limiter_and_all_calls_are_answered() -> None:
    limiter = Limiter(3)
    running = most = 0

    async def service(request: int, /) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await anyio.sleep(1)
        running -= 1
        return 10 * request

    layer = Buffer(1000)
    limited = ConcurrencyLimit(limiter)
    async with calling(layer(limited(service))) as one, calling(layer(limited(service))) as other:
        for n in range(100):
            one.tasks.start_soon((one, other)[n % 2]._call, n)
        await wait_all_tasks_blocked()
    assert len(one.answers) == len(other.answers) == 50
    assert most == 3


async def test_a_service_that_cannot_be_waited_for_is_looked_at_again_a_sixteenth_later_at_most() -> None:
    begun: list[float] = []

    async def service(request: int, /) -> int:
        begun.append(anyio.current_time() - start)
        await anyio.sleep(10_000)  # no call ends while others wait, and to end is what would wake the worker
        return request

    start = anyio.current_time()
    async with Buffer(100)(RateLimit(1, per=8)(service)) as call, anyio.create_task_group() as tasks:
        for n in range(5):
            tasks.start_soon(call, n)
    assert begun[0] == 0
    for earlier, later in pairwise(begun):
        assert 8 - 1e-6 <= later - earlier <= 8 * (1 + 1 / LATENESS) + 0.01


async def test_what_has_waited_for_an_hour_is_looked_at_every_second() -> None:
    class Told:
        is_ready = True

        def ready_now(self) -> bool:
            return self.is_ready

        async def __call__(self, request: int, /) -> int:
            self.is_ready = request == 2
            await anyio.sleep(10_000 if request == 1 else 0)
            return request

    service = Told()
    async with calling(Buffer(1)(service)) as callers:
        await callers.start(1, 2)
        await anyio.sleep(3600.05)
        assert callers.waiting == [1, 2]
        service.is_ready = True
        await anyio.sleep(1.01)
        assert callers.answers == {2: 2}


async def test_readiness_is_waited_for_through_the_layers_in_between() -> None:
    gate = Gate()
    gate.release()
    async with calling(Buffer(10)(Timeout(3600)(gate))) as callers:
        await callers.start(1)
        await anyio.sleep(100)
        assert gate.requests == []
        gate.open()
        await wait_all_tasks_blocked()
        assert callers.answers == {1: 10}


async def test_ready_that_returns_too_early_is_no_busy_loop() -> None:
    class Hasty(Gate):
        asked = 0

        async def ready(self) -> None:
            self.asked += 1

    gate = Hasty(is_open=True)
    async with calling(Buffer(10)(gate)) as callers:
        await callers.start(1)
        gate.is_open = False
        await callers.start(2)
        await anyio.sleep(100)
        assert gate.requests == [1]
        assert gate.asked < 500
        gate.open()
        await anyio.sleep(100 / LATENESS)
        assert gate.requests == [1, 2]
        gate.release()


# --- the worker ends ------------------------------------------------------------------------------------------------


async def test_l6_the_death_of_the_worker_fails_all_who_wait_and_all_who_come_with_the_same_cause() -> None:
    gate = Gate()
    cause = ValueError("broken inside")
    async with calling(Buffer(2)(gate)) as callers:
        call = callers.service
        await callers.start(1, 2, 3, 4)
        gate.fail(cause)
        await wait_all_tasks_blocked()
        assert callers.waiting == []
        await callers.start(5, 6)
        errors = [callers.errors[n] for n in range(1, 7)]
        assert all(type(error) is ServiceClosed for error in errors)
        assert all(error.__cause__ is cause for error in errors)
        assert len({id(error) for error in errors}) == 6  # an instance that two tasks raise tells the story of both
        assert str(errors[0]) == (
            "the worker of this Buffer has ended, as the service inside failed: ValueError('broken inside')"
        )
        assert gate.requests == []
        assert ready_now(call)  # a call does not wait
    with pytest.raises(ServiceClosed) as caught:
        await call(7)
    assert caught.value.__cause__ is cause


async def test_l6_the_death_of_the_worker_is_that_of_its_block_and_not_for_ever() -> None:
    gate = Gate()
    gate.release()
    service = Buffer(2)(gate)
    async with calling(service) as callers:
        call = callers.service
        await callers.start(1)
        gate.fail(ValueError())
        await callers.start(2)
        assert sorted(callers.errors) == [1, 2]
    gate.failure = None
    gate.open()
    async with service as call:
        assert await call(3) == 30


async def test_a_hint_that_fails_while_calls_wait_ends_the_worker_too() -> None:
    class NoWait:
        calls = 0

        def ready_now(self) -> bool:
            if self.calls == 2:
                raise ValueError("no hint")
            return self.calls == 0

        async def __call__(self, request: int, /) -> int:
            self.calls += 1
            await anyio.sleep(10)
            self.calls += 1
            return request

    async with calling(Buffer(2)(NoWait())) as callers:
        await callers.start(1, 2, 3)
        await anyio.sleep(11)
        assert callers.answers == {1: 1}
        assert [str(callers.errors[n].__cause__) for n in (2, 3)] == ["no hint", "no hint"]


async def test_the_death_of_the_worker_leaves_calls_alone_that_have_begun() -> None:
    gate = OneByOne(is_open=True)
    async with calling(Buffer(2)(gate)) as callers:
        await callers.start(1, 2)
        gate.fail(ValueError())
        await wait_all_tasks_blocked()
        assert callers.waiting == [1]
        gate.release()
    assert callers.answers == {1: 10}


async def test_the_cause_that_is_kept_holds_no_frame_of_the_buffer() -> None:
    gate = Gate()
    cause = ValueError()
    async with calling(Buffer(2)(gate)) as callers:
        await callers.start(1)
        gate.fail(cause)
        await wait_all_tasks_blocked()
        traceback = cause.__traceback__
        names: list[str] = []
        while traceback is not None:
            names.append(traceback.tb_frame.f_code.co_name)
            traceback = traceback.tb_next
        assert names == ["ready"]


# --- open and closed ------------------------------------------------------------------------------------------------


async def test_a_call_outside_of_the_block_is_one_to_a_closed_service() -> None:
    service = Buffer(2)(tenfold)
    with pytest.raises(ServiceClosed, match=r"^this Buffer is closed: it takes calls within its 'async with' block$"):
        await service(1)
    async with service:
        assert await service(1) == 10
        with pytest.raises(MisuseError, match="is entered already"):
            await service.__aenter__()
    with pytest.raises(ServiceClosed):
        await service(1)
    async with service as call:
        assert await call(2) == 20


async def test_leaving_the_block_finishes_what_was_taken_and_fails_what_found_no_room() -> None:
    gate = OneByOne(is_open=True)
    service = Buffer(2)(gate)
    async with callers_of(service) as callers:
        async with service as call:
            await callers.start(1, 2, 3, 4, 5, 6)
            assert gate.requests == [1]

            async def later() -> None:
                await wait_all_tasks_blocked()
                with pytest.raises(ServiceClosed):
                    await call(7)
                assert sorted(callers.errors) == [5, 6]
                assert ready_now(call)  # although two wait: a new call does not
                for _ in range(3):
                    gate.open()
                    await anyio.sleep(1)
                assert gate.requests == [1, 2, 3, 4]
                assert not callers.answers
                gate.release()

            callers.tasks.start_soon(later)
        assert callers.answers == {1: 10, 2: 20, 3: 30, 4: 40}
    assert all(type(error) is ServiceClosed and error.__cause__ is None for error in callers.errors.values())


async def test_leaving_can_be_bounded_and_what_has_not_begun_by_then_fails() -> None:
    gate = OneByOne(is_open=True)
    service = Buffer(2)(gate)
    async with callers_of(service) as callers:
        start = anyio.current_time()
        with anyio.move_on_after(5):
            async with service:
                await callers.start(1, 2, 3)
        assert anyio.current_time() - start == pytest.approx(5)
        await wait_all_tasks_blocked()
        assert sorted(callers.errors) == [2, 3]
        assert callers.waiting == [1]
        gate.release()
    assert callers.answers == {1: 10}


async def test_on_close_fail_leaves_at_once_and_a_call_that_has_begun_goes_on() -> None:
    gate = OneByOne(is_open=True)
    service = Buffer(2, on_close="fail")(gate)
    async with callers_of(service) as callers:
        async with service:
            await callers.start(1, 2, 3)
        await wait_all_tasks_blocked()
        assert sorted(callers.errors) == [2, 3]
        assert gate.cancelled == []
        gate.release()
    assert callers.answers == {1: 10}


@pytest.mark.parametrize("raised", [ValueError("mine"), KeyboardInterrupt()])
async def test_an_error_in_the_block_leaves_it_as_it_is_and_waits_for_nobody(raised: BaseException) -> None:
    gate = Gate()
    service = Buffer(2)(gate)
    async with callers_of(service) as callers:
        with pytest.raises(type(raised)) as caught:  # noqa: PT012 -- the block is what is tested
            async with service:
                await callers.start(1, 2)
                raise raised
        assert caught.value is raised
        await wait_all_tasks_blocked()
        assert sorted(callers.errors) == [1, 2]


async def test_a_group_that_the_block_raises_is_passed_on_as_it_is() -> None:
    group = ExceptionGroup("both", [ValueError(), TypeError()])
    with pytest.raises(ExceptionGroup) as caught:
        async with Buffer(2)(tenfold):
            raise group
    assert caught.value is group


async def test_the_service_inside_is_entered_before_and_left_after_the_buffer() -> None:
    events: list[str] = []

    class Owner(Wrapper[int, int]):
        async def __aenter__(self) -> Any:
            events.append("entered")
            return await super().__aenter__()

        async def __aexit__(self, *args: Any) -> bool | None:
            events.append("left")
            return await super().__aexit__(*args)

        async def __call__(self, request: int, /) -> int:
            await anyio.sleep(1)
            events.append("answered")
            return request

    async with anyio.create_task_group() as tasks, Buffer(2)(Owner(tenfold)) as call:
        tasks.start_soon(call, 1)
        await wait_all_tasks_blocked()
    assert events == ["entered", "answered", "left"]


# --- cancellation at every await ------------------------------------------------------------------------------------


async def test_a_call_may_be_cancelled_at_every_await_and_leaves_nothing_behind() -> None:
    limiter = Limiter(1)
    async with Buffer(2, on_full="shed")(ConcurrencyLimit(limiter)(tenfold)) as call:

        async def check() -> None:
            await wait_all_tasks_blocked()
            assert limiter.free == 1
            assert ready_now(call)
            assert await call(1) == 10

        async def queued() -> None:
            async with anyio.create_task_group() as tasks:
                for n in range(3):
                    tasks.start_soon(call, n)
                await wait_all_tasks_blocked()

        async def one_after_the_other() -> None:
            assert await call(1) == 10
            assert await call(2) == 20

        assert await cancel_at_every_await(one_after_the_other, check) >= 2
        assert await cancel_at_every_await(queued, check) >= 1


async def test_a_waiting_call_may_be_cancelled_at_every_await() -> None:
    async with Buffer(1)(ConcurrencyLimit(1)(tenfold)) as call, anyio.create_task_group() as tasks:

        async def waiting() -> None:
            tasks.start_soon(call, 1)
            tasks.start_soon(call, 2)
            await anyio.lowlevel.checkpoint()
            assert await call(3) == 30

        async def check() -> None:
            await wait_all_tasks_blocked()
            assert await call(4) == 40

        # The other calls are tasks, too, and end only when they have a turn.
        async def settled() -> None:
            try:
                await waiting()
            finally:
                with anyio.CancelScope(shield=True):
                    await wait_all_tasks_blocked()

        assert await cancel_at_every_await(settled, check) >= 3


@pytest.mark.parametrize("on_close", ["finish", "fail"])
async def test_the_block_may_be_cancelled_at_every_await(on_close: Literal["finish", "fail"]) -> None:
    async def block() -> None:
        async with Buffer(2, on_close=on_close)(ConcurrencyLimit(1)(tenfold)) as call:
            async with callers_of(call) as callers:
                for n in range(5):
                    callers.tasks.start_soon(callers._call, n)
            assert callers.answers == {n: 10 * n for n in range(5)}

    assert await cancel_at_every_await(block) >= 2


# --- any order of events --------------------------------------------------------------------------------------------

Step = tuple[Literal["call", "fail", "cancel", "open", "tick", "wait"], int]


@given(
    st.lists(st.tuples(st.sampled_from(["call", "fail", "cancel", "open", "tick", "wait"]), st.integers(0, 30))),
    st.integers(1, 3),
    st.sampled_from(["wait", "shed"]),
    st.booleans(),
)
@settings(deadline=None, max_examples=100)
async def test_every_caller_gets_exactly_its_own_answer_in_the_order_of_arrival(
    steps: list[Step], bound: int, on_full: Literal["wait", "shed"], has_ready: bool
) -> None:
    begun: list[int] = []
    failing: set[int] = set()

    async def service(request: int, /) -> int:
        begun.append(request)
        await anyio.sleep(request % 3)
        if request in failing:
            raise ValueError(request)
        return 10 * request

    gate = Limiter(2)
    inner: Service[int, int] = ConcurrencyLimit(gate)(service)
    if has_ready:

        class Waitable(Wrapper[int, int]):
            async def __call__(self, request: int, /) -> int:
                response: int = await self.inner(request)
                return response

            async def ready(self) -> None:
                await gate.acquire()
                gate.release()

        inner = Waitable(inner)
    arrived: list[int] = []
    async with calling(Buffer(bound, on_full=on_full)(inner)) as callers:
        for kind, n in steps:
            if kind in ("call", "fail"):
                number = len(arrived)
                arrived.append(number)
                if kind == "fail":
                    failing.add(number)
                await callers.start(number)
            elif kind == "cancel" and n in callers.scopes:
                callers.scopes[n].cancel()
            elif kind == "tick":
                await anyio.lowlevel.checkpoint()
            elif kind == "wait":
                await anyio.sleep(n / 10)
    assert begun == sorted(begun)
    assert len(begun) == len(set(begun))
    for number in arrived:
        if number in callers.answers:
            assert callers.answers[number] == 10 * number
            assert number in begun
            assert number not in failing
        elif number in callers.errors:
            error = callers.errors[number]
            if isinstance(error, ValueError):
                assert error.args == (number,)
                assert number in failing
            else:
                assert isinstance(error, Overloaded | ServiceClosed)
                assert number not in begun
                assert isinstance(error, Overloaded) is (on_full == "shed")
        else:
            assert callers.scopes[number].cancel_called
    assert gate.free == 2


# --- the layer itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [0, -1, math.nan])
def test_a_bound_below_1_is_refused(bound: int) -> None:
    with pytest.raises(ValueError, match=rf"^bound is {bound}, where 1 or more is expected$"):
        Buffer(bound)


def test_words_that_are_not_known_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^on_full is 'drop', where 'wait' or 'shed' is expected$"):
        Buffer(1, on_full="drop")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"^on_close is 'cancel', where 'finish' or 'fail' is expected$"):
        Buffer(1, on_close="cancel")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def test_one_layer_value_makes_a_queue_for_each_service() -> None:
    layer = Buffer(1, on_full="shed")
    busy = Gate()
    async with calling(layer(busy)) as callers, layer(tenfold) as other:
        await callers.start(1, 2)
        assert not ready_now(callers.service)
        assert ready_now(other)
        assert await other(1) == 10
        busy.open()
        busy.release()


def test_a_layer_is_a_value() -> None:
    assert Buffer(5) == Buffer(5, on_full="wait", on_close="finish", hooks=None)
    assert Buffer(5) != Buffer(6)
    assert repr(Buffer(5)) == "Buffer(bound=5)"
    assert repr(Buffer(5)(tenfold)) == "<Buffered around tenfold>"
    assert Buffer.client_only


def test_types_are_those_of_the_service_inside() -> None:
    service: Callable[[int], Awaitable[int]] = Buffer(5)(tenfold)
    assert callable(service)


async def test_an_outer_cancellation_is_no_group() -> None:
    with suppress(TimeoutError), anyio.fail_after(1):
        async with Buffer(5)(tenfold):
            await anyio.sleep(5)
