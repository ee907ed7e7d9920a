"""The default clock: that of whichever event loop runs."""

from __future__ import annotations

import anyio
import pytest

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


async def test_a_task_shares_the_clock_of_the_one_that_started_it() -> None:
    seen: list[float] = []

    async def child() -> None:
        seen.append(now() - anyio.current_time())

    now()
    async with anyio.create_task_group() as group:
        group.start_soon(child)
    assert seen == [0]
