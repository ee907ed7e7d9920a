"""Waiters: one task waits for one thing, on either event loop."""

from __future__ import annotations

import anyio
import pytest
from anyio import wait_all_tasks_blocked

from towline.waiter import waiters


async def test_it_waits_until_it_is_set() -> None:
    new, wake = waiters()
    waiter = new()
    seen: list[str] = []

    async def wait() -> None:
        await waiter
        seen.append("on")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        await wait_all_tasks_blocked()
        assert seen == []
        wake(waiter)
        wake(waiter)
    assert seen == ["on"]


async def test_one_that_is_set_lets_its_task_go_on_at_once() -> None:
    new, wake = waiters()
    waiter = new()
    wake(waiter)
    with anyio.fail_after(1):
        await waiter


@pytest.mark.parametrize("is_set", [False, True])
async def test_cancelled_it_may_be_set_all_the_same(is_set: bool) -> None:
    new, wake = waiters()
    waiter = new()
    with anyio.move_on_after(1) as scope:
        await waiter
    assert scope.cancelled_caught
    wake(waiter)


async def test_set_and_cancelled_in_one_step_its_task_ends_either_way() -> None:
    new, wake = waiters()
    ended: list[bool] = []

    async def wait() -> None:
        try:
            await waiter
        finally:
            ended.append(True)

    for order in ("set first", "cancel first"):
        waiter = new()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            await wait_all_tasks_blocked()
            if order == "set first":
                wake(waiter)
            tasks.cancel_scope.cancel()
            wake(waiter)
    assert ended == [True, True]
