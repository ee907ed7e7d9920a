"""Virtual time on both backends, and the mock clock."""

from __future__ import annotations

import asyncio
import math
import socket
import threading
import time

import anyio
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
import pytest
from hypothesis import given
from hypothesis import strategies as st

from towline.testing import MockClock, VirtualTimeLoop, virtual_time_backend


@pytest.mark.smoke
async def test_an_hour_passes_in_less_than_a_second() -> None:
    real, virtual = time.perf_counter(), anyio.current_time()
    await anyio.sleep(3600)
    assert time.perf_counter() - real < 1
    assert anyio.current_time() - virtual == pytest.approx(3600)


async def test_timers_fire_in_the_order_of_their_deadlines() -> None:
    fired: list[tuple[int, float]] = []
    start = anyio.current_time()

    async def wait(seconds: int) -> None:
        await anyio.sleep(seconds)
        fired.append((seconds, anyio.current_time() - start))

    async with anyio.create_task_group() as group:
        for seconds in (300, 1, 86_400 * 3, 20, 2):
            group.start_soon(wait, seconds)
    assert [seconds for seconds, _ in fired] == [1, 2, 20, 300, 86_400 * 3]
    for seconds, elapsed in fired:
        assert elapsed == pytest.approx(seconds)


async def test_tasks_that_are_ready_run_before_the_clock_moves() -> None:
    start = anyio.current_time()
    async with anyio.create_task_group() as group:
        group.start_soon(anyio.sleep, 100)
        for _ in range(50):
            await anyio.lowlevel.checkpoint()
        assert anyio.current_time() == start


async def test_move_on_after_cancels_at_its_deadline() -> None:
    start = anyio.current_time()
    with anyio.move_on_after(60) as scope:
        await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert anyio.current_time() - start == pytest.approx(60)


async def test_fail_after_raises_timeout_error() -> None:
    with pytest.raises(TimeoutError), anyio.fail_after(60):
        await anyio.Event().wait()


async def test_a_timer_that_was_cancelled_does_not_move_the_clock() -> None:
    start = anyio.current_time()
    with anyio.fail_after(3600):
        await anyio.sleep(1)
    assert anyio.current_time() - start == pytest.approx(1)


async def test_a_thread_is_waited_for_in_real_time_when_no_timer_is_pending() -> None:
    start, real = anyio.current_time(), time.perf_counter()
    await anyio.to_thread.run_sync(time.sleep, 0.05)
    assert time.perf_counter() - real >= 0.05
    assert anyio.current_time() - start < 1


async def test_a_thread_can_call_into_the_loop_and_pass_time_there() -> None:
    start = anyio.current_time()

    def work() -> float:
        time.sleep(0.01)
        anyio.from_thread.run(anyio.sleep, 3600)
        return anyio.from_thread.run_sync(anyio.current_time)

    assert await anyio.to_thread.run_sync(work) - start == pytest.approx(3600)


async def test_a_socket_that_is_ready_is_served_before_the_clock_moves() -> None:
    ours, theirs = socket.socketpair()
    start = anyio.current_time()
    with ours, theirs:
        ours.setblocking(False)
        theirs.send(b"x")
        with anyio.fail_after(3600):
            await anyio.wait_readable(ours)
        assert ours.recv(1) == b"x"
    assert anyio.current_time() == start


async def test_a_socket_is_waited_for_in_real_time_when_no_timer_is_pending() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        timer = threading.Timer(0.05, theirs.send, [b"x"])
        timer.start()
        await anyio.wait_readable(ours)
        timer.join()
        assert ours.recv(1) == b"x"


async def test_a_socket_can_be_waited_for_in_both_directions_at_once() -> None:
    ours, theirs = socket.socketpair()

    async def read() -> None:
        await anyio.wait_readable(ours)

    with ours, theirs:
        ours.setblocking(False)
        async with anyio.create_task_group() as group:
            group.start_soon(read)
            await anyio.lowlevel.checkpoint()
            await anyio.wait_writable(ours)
            theirs.send(b"x")


async def test_a_socket_that_never_becomes_ready_lets_the_clock_move() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        with anyio.move_on_after(3600) as scope:
            await anyio.wait_readable(ours)
    assert scope.cancelled_caught


@given(seconds=st.lists(st.floats(0, 1e6), min_size=1, max_size=5))
async def test_sleeping_takes_what_was_asked_for(seconds: list[float]) -> None:
    start = anyio.current_time()
    for length in seconds:
        await anyio.sleep(length)
    assert anyio.current_time() - start == pytest.approx(sum(seconds), abs=1e-6)


def test_the_loops_default_executor_ends_without_a_warning() -> None:
    # filterwarnings makes the warning of a join that timed out an error
    async def main() -> None:
        asyncio.get_running_loop().run_in_executor(None, time.sleep, 0.05)

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(main())


@pytest.mark.parametrize("name", ["asyncio", "trio"])
def test_a_backend_can_be_used_without_pytest(name: str) -> None:
    backend, options = virtual_time_backend(name)
    real = time.perf_counter()
    anyio.run(anyio.sleep, 3600, backend=backend, backend_options=options)
    assert time.perf_counter() - real < 1


def test_each_backend_has_a_clock_of_its_own() -> None:
    assert virtual_time_backend("trio")[1]["clock"] is not virtual_time_backend("trio")[1]["clock"]


def test_an_unknown_backend_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'curio'.*'asyncio' or 'trio'"):
        virtual_time_backend("curio")


@pytest.mark.smoke
async def test_a_mock_clock_moves_by_what_is_slept_and_records_it() -> None:
    clock = MockClock()
    await clock.sleep(2)
    clock.advance(0.5)
    await clock.sleep(0)
    assert clock() == clock.now() == 2.5
    assert clock.slept == [2, 0]
    assert repr(clock) == "MockClock(2.5)"


async def test_mock_sleeps_that_overlap_do_not_add_up() -> None:
    clock = MockClock(10)
    async with anyio.create_task_group() as group:
        group.start_soon(clock.sleep, 5)
        group.start_soon(clock.sleep, 5)
    assert clock() == 15


async def test_a_mock_sleep_is_a_checkpoint() -> None:
    clock = MockClock()
    with anyio.CancelScope() as scope:
        scope.cancel()
        await clock.sleep(1)
    assert scope.cancelled_caught


@pytest.mark.parametrize("seconds", [-1.0, math.nan])
async def test_a_mock_clock_never_goes_back(seconds: float) -> None:
    clock = MockClock()
    with pytest.raises(ValueError, match=f"by {seconds} seconds: the least is 0"):
        clock.advance(seconds)
    with pytest.raises(ValueError, match="the least is 0"):
        await clock.sleep(seconds)
    assert clock() == 0
    assert clock.slept == []
