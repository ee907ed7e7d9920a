"""The log of a session: nothing is coalesced, nothing grows, and every follower gets to the end."""

from __future__ import annotations

import anyio
import pytest

from towline.errors import LinkLost, LossReason, SessionLost
from towline.events import EventLog
from towline.layers.resume._events import (
    Attempt,
    Closed,
    Connected,
    Detached,
    Draining,
    Event,
    Lost,
    Missed,
    Resumed,
)


def add(log: EventLog[Event], event: Event) -> None:
    """As a session does."""
    log.add(event, is_last=isinstance(event, Lost | Closed))


async def collect(log: EventLog[Event]) -> list[Event]:
    return [event async for event in log.follow()]


@pytest.mark.smoke
async def test_a_follower_sees_each_event_in_order_however_late_it_looks() -> None:
    cut = LinkLost("cut")
    events: list[Event] = [
        Connected(),
        Detached(cut),
        Attempt(1, 0.05, cut),
        Attempt(2, 0.5, cut),
        Resumed(2, 17),
        Draining(30.0),
        Closed(),
    ]
    log: EventLog[Event] = EventLog()
    early: list[Event] = []

    async def follow() -> None:
        early.extend(await collect(log))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(follow)
        for event in events:
            await anyio.wait_all_tasks_blocked()
            add(log, event)
    assert early == events
    assert await collect(log) == events  # one that comes after the end


async def test_many_events_at_once_are_each_seen() -> None:
    log: EventLog[Event] = EventLog()
    seen: list[Event] = []

    async def follow() -> None:
        seen.extend(await collect(log))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(follow)
        await anyio.wait_all_tasks_blocked()
        for number in range(100):
            add(log, Attempt(number, 0, None))
        add(log, Closed())
    assert seen == [*(Attempt(number, 0, None) for number in range(100)), Closed()]


async def test_a_follower_that_never_looks_fills_no_memory_and_is_told_what_it_missed() -> None:
    log: EventLog[Event] = EventLog()
    for number in range(1000):
        add(log, Attempt(number, 0, None))
    add(log, Closed())
    seen = await collect(log)
    assert seen[0] == Missed(1001 - EventLog.KEPT)
    assert len(seen) == EventLog.KEPT + 1
    assert seen[1] == Attempt(1001 - EventLog.KEPT, 0, None)
    assert seen[-1] == Closed()


async def test_a_follower_that_falls_behind_is_told_in_the_middle() -> None:
    log: EventLog[Event] = EventLog()
    follower = log.follow()
    add(log, Connected())
    assert await anext(follower) == Connected()
    for number in range(300):
        add(log, Attempt(number, 0, None))
    assert await anext(follower) == Missed(300 - EventLog.KEPT)
    assert await anext(follower) == Attempt(300 - EventLog.KEPT, 0, None)


async def test_followers_do_not_take_events_from_each_other() -> None:
    log: EventLog[Event] = EventLog()
    seen: list[list[Event]] = []

    async def follow() -> None:
        seen.append(await collect(log))

    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(follow)
        await anyio.wait_all_tasks_blocked()
        add(log, Connected())
        add(log, Lost(SessionLost(LossReason.EXPIRED)))
    assert [len(each) for each in seen] == [2, 2, 2]


async def test_a_follower_that_is_cancelled_harms_no_other() -> None:
    log: EventLog[Event] = EventLog()
    with anyio.move_on_after(1):
        await collect(log)
    add(log, Closed())
    assert await collect(log) == [Closed()]


async def test_a_follower_that_was_cancelled_or_left_goes_on_where_it_was() -> None:
    log: EventLog[Event] = EventLog()
    add(log, Connected())
    follower = log.follow()
    async for event in follower:
        assert event == Connected()
        break
    with anyio.move_on_after(1) as patience:
        await anext(follower)
    assert patience.cancelled_caught
    add(log, Closed())
    assert [event async for event in follower] == [Closed()]
