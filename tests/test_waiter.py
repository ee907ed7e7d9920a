"""Waiters: one task waits for one thing, on either event loop."""

from __future__ import annotations

import anyio
import pytest
from anyio import wait_all_tasks_blocked

from towline.waiter import waiters


async def test_it_waits_until_it_is_set() -> None:
    waiter = waiters()()
    seen: list[str] = []

    async def wait() -> None:
        await waiter
        seen.append("on")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        await wait_all_tasks_blocked()
        assert seen == []
        waiter.set()
        waiter.set()
    assert seen == ["on"]


async def test_one_that_is_set_lets_its_task_go_on_at_once() -> None:
    waiter = waiters()()
    waiter.set()
    with anyio.fail_after(1):
        await waiter


@pytest.mark.parametrize("is_set", [False, True])
async def test_cancelled_it_may_be_set_all_the_same(is_set: bool) -> None:
    waiter = waiters()()
    with anyio.move_on_after(1) as scope:
        await waiter
    assert scope.cancelled_caught
    waiter.set()


async def test_set_and_cancelled_in_one_step_its_task_ends_either_way() -> None:
    ended: list[bool] = []

    async def wait() -> None:
        try:
            await waiter
        finally:
            ended.append(True)

    for order in ("set first", "cancel first"):
        waiter = waiters()()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            await wait_all_tasks_blocked()
            if order == "set first":
                waiter.set()
            tasks.cancel_scope.cancel()
            waiter.set()
    assert ended == [True, True]
