"""The timer that takes no task: the event loop's own on asyncio, and on trio one that a run's timers share."""

from __future__ import annotations

import asyncio
import gc
import math
import weakref
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context, ContextVar, copy_context
from random import Random
from threading import Barrier

import anyio
import anyio.lowlevel
import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from outcome import Outcome

from towline.layers.hedge import Hedge
from towline.testing import cancel_at_every_await
from towline.timer import PURGE_AT_LEAST, TASK, Timer, _timers, call_later

variable: ContextVar[str] = ContextVar("variable", default="none")


class Log:
    """What was called, and when."""

    def __init__(self) -> None:
        self.start = anyio.current_time()
        self.called: list[tuple[float, object]] = []

    def after(self, delay: float, name: object) -> Timer:
        def callback() -> None:
            self.called.append((round(anyio.current_time() - self.start, 6), name))

        return call_later(delay, callback, context=copy_context())


@pytest.fixture
def _on_trio(anyio_backend_name: str) -> None:
    if anyio_backend_name != "trio":
        pytest.skip("asyncio's timers are its own")


on_trio = pytest.mark.usefixtures("_on_trio")


def timer_tasks() -> int:
    return sum(task.name == TASK for task in anyio.get_running_tasks())


def sleeps_until() -> float:
    return _timers()._asleep.deadline


def run(main: Callable[[], object], **options: object) -> object:
    clock = trio.testing.MockClock(autojump_threshold=0)
    return trio.run(main, clock=clock, **options)  # type: ignore[arg-type]


# --- on both ---------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
async def test_timers_call_in_the_order_of_their_moments() -> None:
    log = Log()
    for delay in (5, 1, 3):
        log.after(delay, delay)
    await anyio.sleep(10)
    assert log.called == [(1, 1), (3, 3), (5, 5)]


@on_trio  # asyncio promises no order
async def test_timers_of_one_moment_call_in_the_order_in_which_they_were_set() -> None:
    log = Log()
    for name in range(10):
        log.after(5, name)
    await anyio.sleep(6)
    assert log.called == [(5, name) for name in range(10)]


async def test_a_timer_that_is_cancelled_does_not_call() -> None:
    log = Log()
    timers = [log.after(delay, delay) for delay in (1, 2, 3, 4)]
    timers[0].cancel()
    timers[2].cancel()
    timers[2].cancel()
    await anyio.sleep(3.5)
    timers[1].cancel()  # which has called
    timers[3].cancel()
    await anyio.sleep(10)
    assert log.called == [(2, 2)]


async def test_a_timer_for_an_earlier_moment_may_be_set_while_another_is_waited_for() -> None:
    log = Log()
    log.after(60, "late")
    await anyio.sleep(10)
    log.after(5, "early")
    await anyio.sleep(100)
    assert log.called == [(15, "early"), (60, "late")]


async def test_a_callback_may_set_and_cancel_timers(caplog: pytest.LogCaptureFixture) -> None:
    log = Log()
    timers: list[Timer] = []

    def callback() -> None:
        for timer in timers:
            timer.cancel()
        log.after(0, "at once")
        log.after(2, "later")

    call_later(5, callback, context=copy_context())
    timers += [log.after(5, "in the same moment"), log.after(6, "after it")]
    await anyio.sleep(10)
    assert log.called == [(5, "at once"), (7, "later")]
    assert caplog.text == ""


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20), st.one_of(st.none(), st.integers(0, 40))), max_size=40)
)
async def test_any_timers_call_when_they_are_due_and_only_if_nobody_cancels_them(
    timers: list[tuple[int, int, int | None]],
) -> None:
    log = Log()
    expected: list[tuple[float, object]] = []

    async def one(name: int, begins: int, delay: int, lasts: int | None) -> None:
        await anyio.sleep(begins)
        timer = log.after(delay + 0.5, name)  # never in the moment of a cancellation
        if lasts is None or lasts > delay:
            expected.append((begins + delay + 0.5, name))
        if lasts is not None:
            await anyio.sleep(lasts)
            timer.cancel()

    async with anyio.create_task_group() as group:
        for name, each in enumerate(timers):
            group.start_soon(one, name, *each)
    await anyio.sleep(100)
    assert sorted(log.called, key=str) == sorted(expected, key=str)
    assert [at for at, _ in log.called] == sorted(at for at, _ in log.called)


async def test_a_callback_runs_in_the_context_that_is_given() -> None:
    seen: list[str] = []
    variable.set("the caller's")
    context = copy_context()
    variable.set("changed since")
    call_later(1, lambda: seen.append(variable.get()), context=context)
    call_later(1, lambda: seen.append(variable.get()), context=Context())
    await anyio.sleep(2)
    assert seen == ["the caller's", "none"]


async def test_a_callback_may_start_a_task_of_its_callers() -> None:
    async def task() -> None:
        seen.append(variable.get())
        await anyio.sleep(3)
        seen.append(str(anyio.current_time() - start))

    seen: list[str] = []
    start = anyio.current_time()
    variable.set("the caller's")
    async with anyio.create_task_group() as group:
        call_later(5, lambda: group.start_soon(task), context=copy_context())
        await anyio.sleep(6)
    assert seen == ["the caller's", "8.0"]


async def test_a_timer_that_is_cancelled_before_or_after_keeps_nothing_alive() -> None:
    class Kept:
        def __call__(self) -> None:
            pass

    kept = [Kept(), Kept()]
    dead = [weakref.ref(each) for each in kept]
    call_later(1, lambda: None, context=copy_context())  # which stays the first
    timers = [call_later(delay, each, context=Context()) for delay, each in zip((50, 0.5), kept, strict=True)]
    await anyio.lowlevel.checkpoint()
    gc.collect()
    gc.disable()
    try:
        del kept[:]
        assert None not in [each() for each in dead]
        timers[0].cancel()
        assert dead[0]() is None
        await anyio.sleep(0.75)
        timers[1].cancel()
        assert dead[1]() is None
    finally:
        gc.enable()


# --- on trio ---------------------------------------------------------------------------------------------------------


@on_trio
@pytest.mark.parametrize("error", [ZeroDivisionError("oh"), SystemExit("oh"), KeyboardInterrupt("oh")], ids=repr)
async def test_what_a_callback_raises_is_logged_and_harms_no_other(
    caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    def bad() -> None:
        raise error

    log = Log()
    call_later(1, bad, context=copy_context())
    log.after(1, "in the same moment")
    log.after(2, "after it")
    await anyio.sleep(3)
    assert log.called == [(1, "in the same moment"), (2, "after it")]
    assert "a timer's callback raised" in caplog.text
    assert "oh" in caplog.text


@on_trio
async def test_all_timers_of_a_run_share_one_task() -> None:
    assert timer_tasks() == 0
    for _ in range(3):
        timers = [call_later(delay, lambda: None, context=copy_context()) for delay in range(1, 100)]
        assert timer_tasks() == 1
        await anyio.sleep(50)
        for timer in timers:
            timer.cancel()
        assert timer_tasks() == 1


@on_trio
async def test_it_sleeps_until_the_first_timer_that_is_not_cancelled() -> None:
    start = anyio.current_time()
    first, second, third = (call_later(delay, lambda: None, context=copy_context()) for delay in (10, 20, 30))
    await anyio.sleep(1)
    assert sleeps_until() == start + 10
    second.cancel()
    assert sleeps_until() == start + 10
    first.cancel()
    assert sleeps_until() == start + 30
    earlier = call_later(1, lambda: None, context=copy_context())
    assert sleeps_until() == start + 2
    earlier.cancel()
    third.cancel()
    assert sleeps_until() == math.inf
    assert _timers()._heap == []


@on_trio
async def test_a_timer_that_is_cancelled_does_not_move_the_clock() -> None:
    call_later(60, lambda: None, context=copy_context()).cancel()
    start = anyio.current_time()
    assert await anyio.to_thread.run_sync(lambda: "done") == "done"  # which virtual time knows nothing of
    assert anyio.current_time() == start


@on_trio
async def test_a_task_that_waits_for_all_others_does_not_wait_for_timers() -> None:
    log = Log()
    log.after(60, "late")
    await anyio.wait_all_tasks_blocked()
    assert log.called == []
    assert anyio.current_time() == log.start


@on_trio
async def test_timers_that_are_cancelled_do_not_pile_up() -> None:
    log = Log()
    log.after(1, "first")  # behind which all others lie
    heap = 0
    for number in range(10_000):
        log.after(60, number).cancel()
        heap = max(heap, len(_timers()._heap))
    assert heap <= PURGE_AT_LEAST + 1
    alive = [log.after(delay, delay) for delay in Random(1).sample(range(10, 2000), 1000)]
    for number in range(10_000):
        log.after(60, number).cancel()
        heap = max(heap, len(_timers()._heap))
    assert heap <= 2 * (len(alive) + 2)
    for timer in alive[::2]:
        timer.cancel()
    await anyio.sleep(5000)
    assert len(log.called) == 1 + 500
    assert log.called == sorted(log.called)
    assert _timers()._heap == []


@on_trio
async def test_the_task_is_no_leak_of_the_call_that_happened_to_be_the_first() -> None:
    async def answer(request: str, /) -> str:
        await anyio.sleep(1)
        return request

    assert timer_tasks() == 0
    await cancel_at_every_await(lambda: Hedge(60)(answer)("hello"))
    assert timer_tasks() == 1


# --- runs of trio ----------------------------------------------------------------------------------------------------


async def hedged() -> tuple[float, str]:
    """What a call that is late comes to, beside many that are not."""

    async def service(request: str, /) -> str:
        calls.append(request)
        await trio.sleep(100 if request == "late" and calls.count("late") == 1 else 1)
        return request

    calls: list[str] = []
    start = trio.current_time()
    call = Hedge(5)(service)
    for _ in range(10):
        await call("quick")
    answer = await call("late")
    return trio.current_time() - start, answer


def test_each_run_has_timers_of_its_own_though_others_went_before() -> None:
    for _ in range(3):
        assert run(hedged) == (16, "late")


def test_runs_in_several_threads_at_once_have_timers_of_their_own() -> None:
    def thread() -> object:
        together.wait()
        return [run(hedged) for _ in range(20)]

    together = Barrier(4)
    with ThreadPoolExecutor(4) as threads:
        for each in [threads.submit(thread) for _ in range(4)]:
            assert each.result() == [(16, "late")] * 20


def test_a_run_inside_a_thread_of_another_has_timers_of_its_own() -> None:
    async def outer() -> object:
        call_later(1000, lambda: None, context=copy_context())
        return await trio.to_thread.run_sync(run, hedged)

    assert run(outer) == (16, "late")


def test_where_trio_is_a_guest_of_asyncio_it_is_trios_timer() -> None:
    async def host() -> object:
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[Outcome[object]] = loop.create_future()
        trio.lowlevel.start_guest_run(
            hedged,
            run_sync_soon_threadsafe=loop.call_soon_threadsafe,
            done_callback=ended.set_result,
            clock=trio.testing.MockClock(autojump_threshold=0),
        )
        return (await ended).unwrap()

    assert asyncio.run(host()) == (16, "late")


def test_a_timer_that_is_still_to_call_does_not_hold_up_the_end_of_a_run() -> None:
    called: list[str] = []

    async def main() -> float:
        call_later(1000, lambda: called.append("late"), context=copy_context())
        await trio.sleep(1)
        return trio.current_time()

    assert run(main) == 1
    assert called == []


@pytest.mark.parametrize("before", [True, False], ids=["with timers before", "the first timer"])
def test_a_call_works_where_generators_clean_up_after_the_end_of_a_run(before: bool) -> None:
    answers: list[str] = []

    async def at_once(request: str, /) -> str:
        return request

    async def generator() -> AsyncGenerator[None]:
        try:
            yield
        finally:
            answers.append(await Hedge(5)(at_once)("hello"))

    async def main() -> None:
        if before:
            await Hedge(5)(at_once)("hello")
        left.append(generator())
        await anext(left[0])

    left: list[AsyncGenerator[None]] = []
    run(main)
    assert answers == ["hello"]


async def test_outside_a_task_there_is_no_timer_to_set() -> None:
    def thread() -> None:
        with pytest.raises(RuntimeError):
            call_later(1, lambda: None, context=copy_context())

    with ThreadPoolExecutor(1) as threads:
        threads.submit(Context().run, thread).result()
