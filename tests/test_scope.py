"""Timers: one keeper of time for everything in a scope."""

from __future__ import annotations

import gc

import anyio
import pytest

from towline.scope import Scope, Timers, plain_task_group
from towline.testing import open_scope


class Alarm:
    """Rings at its deadline, and is silent until it gets another one."""

    def __init__(self, deadline: float | None = None) -> None:
        self.timer_at: float | None = None
        self.deadline = deadline
        self.rung: list[float] = []

    def on_time(self, now: float) -> None:
        self.rung.append(now)
        self.deadline = None


@pytest.mark.smoke
async def test_each_is_told_once_at_its_own_deadline() -> None:
    start = anyio.current_time()
    async with open_scope() as scope:
        alarms = [Alarm(start + n) for n in (30, 10, 20)]
        for alarm in alarms:
            scope.timers.update(alarm)
        await anyio.sleep(100)
    assert [[round(at - start) for at in alarm.rung] for alarm in alarms] == [[30], [10], [20]]


async def test_a_deadline_that_moves_away_is_kept_and_costs_nothing_until_then() -> None:
    start = anyio.current_time()
    async with open_scope() as scope:
        alarm = Alarm(start + 10)
        for n in range(1000):
            alarm.deadline = start + 10 + n / 100
            scope.timers.update(alarm)
        assert len(scope.timers._heap) == 1
        await anyio.sleep(15)
        assert alarm.rung == []
        await anyio.sleep(10)
    assert [round(at - start, 2) for at in alarm.rung] == [19.99]


async def test_a_deadline_that_comes_nearer_wakes_the_keeper() -> None:
    start = anyio.current_time()
    async with open_scope() as scope:
        alarm = Alarm(start + 1000)
        scope.timers.update(alarm)
        await anyio.sleep(1)
        alarm.deadline = start + 2
        scope.timers.update(alarm)
        await anyio.sleep(5)
        assert [round(at - start) for at in alarm.rung] == [2]
        await anyio.sleep(1000)
        assert len(alarm.rung) == 1  # the old entry found nothing to do


async def test_what_has_no_deadline_is_left_alone() -> None:
    async with open_scope() as scope:
        alarm = Alarm(None)
        scope.timers.update(alarm)
        await anyio.sleep(10)
        assert alarm.rung == []
        assert scope.timers._heap == []


async def test_what_was_forgotten_is_not_told() -> None:
    async with open_scope() as scope:
        alarm = Alarm(anyio.current_time() + 5)
        scope.timers.update(alarm)
        scope.timers.forget(alarm)
        await anyio.sleep(10)
        assert alarm.rung == []
        alarm.deadline = anyio.current_time() + 5
        scope.timers.update(alarm)
        await anyio.sleep(10)
        assert len(alarm.rung) == 1


async def test_what_is_gone_is_not_kept_alive_by_its_deadline() -> None:
    async with open_scope() as scope:
        alarm = Alarm(anyio.current_time() + 5)
        scope.timers.update(alarm)
        del alarm
        gc.collect()
        assert scope.timers._heap[0][2]() is None
        await anyio.sleep(10)
        assert scope.timers._heap == []


async def test_who_sets_a_new_deadline_when_told_is_told_again() -> None:
    class Ticker(Alarm):
        def on_time(self, now: float) -> None:
            self.rung.append(now)
            self.deadline = now + 10

    start = anyio.current_time()
    async with open_scope() as scope:
        ticker = Ticker(start + 10)
        scope.timers.update(ticker)
        await anyio.sleep(45)
    assert [round(at - start) for at in ticker.rung] == [10, 20, 30, 40]


async def test_the_clock_of_the_scope_is_the_one_that_counts() -> None:
    now = 1e6
    async with open_scope(clock=lambda: now) as scope:
        alarm = Alarm(now + 10)
        scope.timers.update(alarm)
        await anyio.sleep(10)
        assert alarm.rung == []  # our own clock has not moved
        now += 10
        await anyio.sleep(20)
        assert alarm.rung == [1e6 + 10]


async def test_a_thousand_deadlines_at_one_moment_are_told_in_order() -> None:
    order: list[int] = []

    class Numbered(Alarm):
        def __init__(self, number: int, deadline: float) -> None:
            super().__init__(deadline)
            self.number = number

        def on_time(self, now: float) -> None:
            super().on_time(now)
            order.append(self.number)

    async with open_scope() as scope:
        at = anyio.current_time() + 1
        alarms = [Numbered(n, at) for n in range(1000)]
        for alarm in alarms:
            scope.timers.update(alarm)
        await anyio.sleep(2)
    assert order == list(range(1000))


async def test_a_scope_has_its_own_timers_and_random_generator() -> None:
    async with anyio.create_task_group() as tasks:
        a, b = Scope(tasks), Scope(tasks)
        assert isinstance(a.timers, Timers)
        assert a.timers is not b.timers
        assert a.random is not b.random
        assert a.clock() == anyio.current_time()


# --- a task group that no ExceptionGroup leaves ----------------------------------------------------------------------


async def test_an_error_of_the_block_leaves_as_itself_and_cancels_the_tasks() -> None:
    cancelled = False

    async def task() -> None:
        nonlocal cancelled
        try:
            await anyio.sleep_forever()
        finally:
            cancelled = True

    async def block() -> None:
        async with plain_task_group() as tasks:
            tasks.start_soon(task)
            await anyio.sleep(1)
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        await block()
    assert cancelled


@pytest.mark.parametrize(("tasks", "raised"), [(1, ValueError), (2, ExceptionGroup)])
async def test_an_error_of_a_task_leaves_as_itself_and_several_as_a_group(tasks: int, raised: type[Exception]) -> None:
    async def task() -> None:
        try:
            await anyio.sleep(1)
        finally:
            raise ValueError("a tasks")

    async def block() -> None:
        async with plain_task_group() as group:
            for _ in range(tasks):
                group.start_soon(task)

    with pytest.raises(raised):
        await block()


async def test_an_error_of_the_block_survives_that_the_scope_around_it_is_cancelled() -> None:
    async def block() -> None:
        with anyio.CancelScope() as scope:
            async with plain_task_group() as tasks:
                tasks.start_soon(anyio.sleep_forever)
                scope.cancel()
                raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        await block()


async def test_cancelling_it_from_outside_is_a_cancellation() -> None:
    with anyio.move_on_after(1) as scope:
        async with plain_task_group() as tasks:
            tasks.start_soon(anyio.sleep_forever)
    assert scope.cancelled_caught
