"""Cancelling at every await finds what cancellation breaks, and ends where the coroutine does."""

from __future__ import annotations

import anyio
import pytest
from anyio.lowlevel import checkpoint

from towline.testing import cancel_at_every_await


async def test_it_goes_on_to_the_last_await() -> None:
    reached: list[int] = []

    async def three() -> None:
        for i in range(3):
            await anyio.sleep(1)
            reached.append(i)

    assert await cancel_at_every_await(three) == 3
    assert reached == [0, 0, 1, 0, 1, 2]


async def test_a_coroutine_that_never_suspends_runs_once() -> None:
    runs: list[int] = []

    async def none() -> None:
        runs.append(1)

    assert await cancel_at_every_await(none) == 0
    assert runs == [1]


async def test_what_is_left_behind_is_looked_at_after_each_run() -> None:
    held = False

    async def careless() -> None:
        nonlocal held
        held = True
        await anyio.sleep(1)  # and what follows is never reached when this is cancelled

    async def check() -> None:
        assert not held, "the lock is still taken"

    with pytest.raises(AssertionError, match="the lock is still taken"):
        await cancel_at_every_await(careless, check)


async def test_a_task_that_is_left_behind_is_found() -> None:
    async with anyio.create_task_group() as outer:

        async def leaky() -> None:
            outer.start_soon(anyio.sleep_forever)
            await anyio.sleep(1)

        with pytest.raises(AssertionError, match="cancelled at suspension 1, it left tasks behind"):
            await cancel_at_every_await(leaky)
        outer.cancel_scope.cancel()


async def test_an_error_instead_of_a_cancellation_comes_through() -> None:
    async def wrong() -> None:
        try:
            await anyio.sleep(1)
        finally:
            raise ValueError("in the clean-up")

    with pytest.raises(ValueError, match="in the clean-up"):
        await cancel_at_every_await(wrong)


async def test_there_is_a_limit() -> None:
    async def long() -> None:
        for _ in range(100):
            await checkpoint()

    with pytest.raises(AssertionError, match="no end after 10 suspensions"):
        await cancel_at_every_await(long, limit=10)
