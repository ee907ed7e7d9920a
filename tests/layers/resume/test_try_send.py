"""What a protocol above a session, or above a stream of frames, needs: to send without waiting, or past the limit."""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from anyio import wait_all_tasks_blocked

from towline import BufferFull, ConnectionLost, Framing, MessageTooLarge, Resume, SessionLost, Stack
from towline.layers.resume._session import BEYOND
from towline.streams import BEYOND as BEYOND_A_STREAM
from towline.streams import FrameStream

names = itertools.count()
SMALL = Resume(buffer=100_000, window=100_000, max_message=50_000)


@asynccontextmanager
async def ends(*layers: Any) -> AsyncGenerator[tuple[Any, Any]]:
    """Both ends of a connection, of which the other one receives nothing by itself."""
    stack = Stack(*layers)
    came = anyio.Event()
    held: list[Any] = []

    async def hold(end: Any) -> None:
        held.append(end)
        came.set()
        await anyio.sleep_forever()

    async with stack.serve(f"memory://try-{next(names)}", hold) as server, stack.open() as opened:
        ours = await opened.connect(server.endpoint)
        await ours.send(b"first")
        await came.wait()
        assert await held[0].receive() == b"first"
        yield ours, held[0]


def send_without_end(ours: Any, sent: list[bytes]) -> None:
    for n in range(100_000):
        ours.send_at_once(b"%1000d" % n)
        sent.append(b"%1000d" % n)


async def fill(ours: Any) -> None:
    """Until neither the peer nor the buffer has room."""
    for _ in range(3):
        while ours.try_send(bytes(1000)):
            pass
        await anyio.sleep(1)
    assert not ours.try_send(bytes(1000))


@pytest.mark.parametrize("layers", [(SMALL, Framing()), (Framing(),)], ids=["session", "frames"])
async def test_it_sends_what_there_is_room_for_and_says_when_there_is_none(layers: tuple[Any, ...]) -> None:
    async with ends(*layers) as (ours, theirs):
        sent = 0
        while number := ours.try_send(bytes([sent % 256]) * 1000):
            sent += 1
            assert number == 1 + sent  # the first was sent before
            assert sent < 10_000
        assert sent > 20
        assert ours.try_send(bytes(1000)) == 0

        async def read() -> None:
            for n in range(sent):
                assert await theirs.receive() == bytes([n % 256]) * 1000

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            with anyio.fail_after(10):
                await ours.wait_to_send(bytes(1000))
                assert ours.try_send(b"\xff" * 1000) == sent + 2  # what was not sent has none
        assert await theirs.receive() == b"\xff" * 1000


async def test_after_waiting_it_is_its_turn_before_all_who_came_later() -> None:
    async with ends(SMALL, Framing()) as (ours, theirs):
        await fill(ours)
        order: list[str] = []

        async def waits() -> None:
            await ours.wait_to_send(bytes(1000))
            assert ours.try_send(b"waited")
            order.append("waited")

        async def sends() -> None:
            await ours.send(b"sent")
            order.append("sent")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(waits)
            await wait_all_tasks_blocked()
            tasks.start_soon(sends)
            await wait_all_tasks_blocked()
            assert not ours.try_send(b"x")  # nor is there a way around them
            while len(order) < 2:
                await theirs.receive()
        assert order == ["waited", "sent"]


async def test_its_numbers_are_those_that_a_lost_session_speaks_of() -> None:
    async with ends(SMALL, Framing()) as (ours, theirs):
        assert ours.last_number == 1
        assert ours.try_send(b"second") == ours.last_number == 2
        await ours.flush()  # numbers go on, whatever of them is acknowledged
        assert ours.try_send(b"third") == ours.last_number == 3
        await ours.send(b"fourth")
        assert ours.last_number == 4
        ours.send_at_once(b"fifth")
        assert ours.try_send(b"sixth") == ours.last_number == 6
        await ours.flush()
        theirs.abort()
        with pytest.raises(SessionLost) as raised:
            await ours.receive()
        assert raised.value.sent_upto == 6
        assert (ours.try_send(b"late"), ours.last_number) == (0, 6)


async def test_a_stream_of_frames_numbers_whatever_way_they_are_sent() -> None:
    async with ends(Framing()) as (ours, theirs):
        assert ours.try_send(b"second") == 2
        await ours.send(b"third")
        ours.send_at_once(b"fourth")
        assert ours.try_send(b"fifth") == 5
        await ours.flush()
        assert ours.try_send(b"sixth") == 6
        assert [await theirs.receive() for _ in range(5)] == [b"second", b"third", b"fourth", b"fifth", b"sixth"]
        await ours.aclose()
        assert ours.try_send(b"late") == 0


async def test_past_the_limit_it_sends_a_megabyte_and_no_more() -> None:
    async with ends(SMALL, Framing()) as (ours, theirs):
        await fill(ours)
        with pytest.raises(BufferFull):
            send_without_end(ours, [])
        assert 100_000 + BEYOND - 2000 <= ours.buffered <= 100_000 + BEYOND
        with pytest.raises(MessageTooLarge):
            ours.send_at_once(bytes(60_000))
        assert await theirs.receive() == bytes(1000)


async def test_a_stream_of_frames_does_so_too() -> None:
    async with ends(Framing()) as (ours, theirs):
        assert isinstance(ours, FrameStream)
        sent: list[bytes] = []
        with pytest.raises(BufferFull):
            send_without_end(ours, sent)
        assert len(sent) * 1000 > BEYOND_A_STREAM // 2
        received: list[bytes] = []
        with anyio.fail_after(10):
            while len(received) < len(sent):
                received.append(await theirs.receive())
        assert received == sent


@pytest.mark.parametrize("layers", [(SMALL, Framing()), (Framing(),)], ids=["session", "frames"])
async def test_once_it_is_over_it_sends_nothing(layers: tuple[Any, ...]) -> None:
    async with ends(*layers) as (ours, theirs):
        theirs.abort()
        await anyio.sleep(1)
        assert ours.try_send(b"x") == 0
        with pytest.raises(ConnectionLost):
            await ours.wait_to_send(b"x")
        with pytest.raises(ConnectionLost):
            ours.send_at_once(b"x")
        ours.cork()  # which then means nothing


async def test_one_that_cannot_ever_be_sent_is_refused() -> None:
    async with ends(SMALL, Framing()) as (ours, _):
        assert ours.try_send(bytes(60_000)) == 0
        with pytest.raises(MessageTooLarge):
            await ours.wait_to_send(bytes(60_000))
