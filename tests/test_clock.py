"""The default clock: that of whichever event loop runs."""

from __future__ import annotations

import asyncio
from contextvars import Context

import anyio
import anyio.to_thread
import pytest
import trio
from outcome import Outcome

from towline.clock import now
from towline.testing import virtual_time_backend


async def test_the_default_clock_is_that_of_the_event_loop() -> None:
    assert now() == anyio.current_time()
    await anyio.sleep(3600)
    assert now() == anyio.current_time()


def test_outside_an_event_loop_there_is_no_default_clock() -> None:
    with pytest.raises(RuntimeError):
        now()


@pytest.mark.parametrize("first", ["asyncio", "trio"])
@pytest.mark.parametrize("second", ["asyncio", "trio"])
def test_each_event_loop_is_asked_for_its_own_time(first: str, second: str) -> None:
    async def an_hour() -> tuple[float, float]:
        start = now()
        await anyio.sleep(3600)
        assert now() == anyio.current_time()
        return start, now()

    for name in (first, second, first):
        backend, options = virtual_time_backend(name)
        assert anyio.run(an_hour, backend=backend, backend_options=options) == (0, 3600)


async def test_a_loop_in_a_worker_thread_has_a_clock_too() -> None:
    async def inside() -> float:
        return now()

    now()
    for backend in ("asyncio", "trio"):
        assert isinstance(await anyio.to_thread.run_sync(lambda name=backend: anyio.run(inside, backend=name)), float)  # type: ignore[misc]


async def test_a_task_shares_the_clock_of_the_one_that_started_it() -> None:
    seen: list[float] = []

    async def child() -> None:
        seen.append(now() - anyio.current_time())

    now()
    async with anyio.create_task_group() as group:
        group.start_soon(child)
    assert seen == [0]


def test_where_trio_is_a_guest_of_asyncio_it_is_trios_time() -> None:
    async def guest() -> float:
        return now() - trio.current_time()

    async def host() -> float:
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[Outcome[float]] = loop.create_future()
        trio.lowlevel.start_guest_run(
            guest, run_sync_soon_threadsafe=loop.call_soon_threadsafe, done_callback=ended.set_result
        )
        return (await ended).unwrap()

    assert -1 < asyncio.run(host()) <= 0


def test_a_callback_is_told_the_time_as_well() -> None:
    async def main() -> float:
        loop = asyncio.get_running_loop()
        told: asyncio.Future[float] = loop.create_future()
        loop.call_soon(lambda: told.set_result(now()), context=Context())
        return await told - loop.time()

    assert -1 < asyncio.run(main()) <= 0
