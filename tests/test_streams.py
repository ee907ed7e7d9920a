"""What an application holds over one link: bytes, frames or lines, as anyio describes a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import anyio
import pytest

from towline.errors import ConnectionLost, LinkLost, MessageTooLarge, MisuseError
from towline.layers.framing import FramingStage
from towline.layers.heartbeat import HeartbeatStage
from towline.layers.lines import LinesStage
from towline.link import Link
from towline.streams import FrameStream, LinkAttribute, LinkByteStream
from towline.testing import (
    DriverPair,
    clogged_driver_pair,
    link_pair,
    lockstep_driver_pair,
    memory_stream_pair,
    open_scope,
)
from towline.transports._stream import StreamDriver
from towline.transports.memory import memory_drivers

Streams: TypeAlias = tuple[Any, Any]


def frames(link: Link) -> FrameStream:
    stage = FramingStage(1 << 20)
    stage.established()
    link.push(stage)
    return FrameStream(link)


def lines(link: Link) -> FrameStream:
    link.push(LinesStage(1 << 20))
    return FrameStream(link)


def watched_frames(link: Link) -> FrameStream:
    stage = FramingStage(1 << 20)
    stage.established()
    link.push(stage)
    link.push(HeartbeatStage(5, 15, anyio.current_time()))
    link.write_timeout = 15
    return FrameStream(link)


KINDS = [frames, lines, watched_frames, LinkByteStream]


def any_stream() -> DriverPair:
    a, b = memory_stream_pair()
    return StreamDriver(a), StreamDriver(b)


@asynccontextmanager
async def streams(make: Callable[[Link], Any], drivers: DriverPair | None = None) -> AsyncGenerator[Streams]:
    async with open_scope() as scope:
        links = link_pair(drivers or memory_drivers(), scope)
        a, b = map(make, links)
        scope.task_group.start_soon(a.run)
        scope.task_group.start_soon(b.run)
        await anyio.wait_all_tasks_blocked()
        yield a, b
        for link in links:
            link.abort(LinkLost("the test is over"))


async def receive_bytes(stream: Any, n: int) -> bytes:
    data = b""
    while len(data) < n:
        data += await stream.receive()
    return data


# --- what anyio promises ---------------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("drivers", [memory_drivers, lockstep_driver_pair, any_stream])
async def test_what_is_sent_is_received(make: Callable[[Link], Any], drivers: Callable[[], DriverPair]) -> None:
    async with streams(make, drivers()) as (a, b):
        await a.send(b"hello")
        assert await b.receive() == b"hello"
        await b.send(b"world")
        assert await a.receive() == b"world"


@pytest.mark.parametrize("make", KINDS)
async def test_the_end_of_the_peer_is_end_of_stream_after_what_it_sent(make: Callable[[Link], Any]) -> None:
    async with streams(make) as (a, b):
        await a.send(b"the last")
        await a.aclose()
        assert await b.receive() == b"the last"
        for _ in range(2):
            with pytest.raises(anyio.EndOfStream):
                await b.receive()
        await a.wait_closed()


@pytest.mark.parametrize("make", KINDS)
async def test_a_stream_that_was_closed_here_is_a_closed_resource(make: Callable[[Link], Any]) -> None:
    async with streams(make) as (a, b):
        await b.send(b"unread")
        await anyio.wait_all_tasks_blocked()
        await a.aclose()
        await a.aclose()
        with pytest.raises(anyio.ClosedResourceError):
            await a.receive()
        with pytest.raises(anyio.ClosedResourceError):
            await a.send(b"x")


@pytest.mark.parametrize("make", KINDS)
async def test_a_link_that_breaks_is_a_broken_resource_after_what_had_arrived(make: Callable[[Link], Any]) -> None:
    async with streams(make) as (a, b):
        await b.send(b"had arrived")
        await anyio.wait_all_tasks_blocked()
        b.abort()
        await anyio.wait_all_tasks_blocked()
        assert await a.receive() == b"had arrived"
        for use in (a.receive, lambda: a.send(b"x")):
            with pytest.raises(anyio.BrokenResourceError, match="the link was reset") as caught:
                await use()
            assert isinstance(caught.value, ConnectionLost)
            assert isinstance(caught.value.__cause__, LinkLost)
            assert caught.value.retryable


@pytest.mark.parametrize("make", KINDS)
async def test_two_tasks_that_receive_at_once_are_told_so(make: Callable[[Link], Any]) -> None:
    async with streams(make) as (a, b), anyio.create_task_group() as tasks:
        tasks.start_soon(b.receive)
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(anyio.BusyResourceError):
            await b.receive()
        await a.send(b"for the first")


@pytest.mark.parametrize("make", KINDS)
async def test_a_receive_that_is_cancelled_loses_nothing(make: Callable[[Link], Any]) -> None:
    async with streams(make) as (a, b):
        for n in range(20):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(b.receive)
                await anyio.wait_all_tasks_blocked()
                tasks.cancel_scope.cancel()
                await a.send(b"%02d" % n)
            assert await b.receive() == b"%02d" % n


@pytest.mark.parametrize("make", KINDS)
async def test_a_receiver_that_waits_is_woken_by_close_and_by_abort(make: Callable[[Link], Any]) -> None:
    for end in ("aclose", "abort"):
        async with streams(make) as (a, _), anyio.create_task_group() as tasks:

            async def receive(a: Any = a) -> None:
                with pytest.raises(anyio.ClosedResourceError):
                    await a.receive()

            tasks.start_soon(receive)
            await anyio.wait_all_tasks_blocked()
            if end == "aclose":
                await a.aclose()
            else:
                a.abort()


async def test_receive_gives_at_most_what_was_asked_for() -> None:
    async with streams(LinkByteStream) as (a, b):
        await a.send(b"hello")
        await a.send(b"")
        assert await b.receive(2) == b"he"
        assert await b.receive(10) == b"llo"
        await a.send(bytearray(b"abc"))
        assert await b.receive() == b"abc"


async def test_an_empty_frame_is_a_frame() -> None:
    async with streams(frames) as (a, b):
        await a.send(b"")
        await a.send(b"x")
        assert [await b.receive(), await b.receive()] == [b"", b"x"]


async def test_a_buffer_that_its_owner_changes_later_is_sent_as_it_was() -> None:
    async with streams(frames, clogged_driver_pair(accepts=0)) as (a, b):
        buffer = bytearray(b"before")
        await a.send(buffer)
        buffer[:] = b"after!"
        a.link.driver.release()
        assert await b.receive() == b"before"


async def test_a_stream_says_what_it_is() -> None:
    async with streams(frames) as (a, _):
        a.link.peer_identity = "alice"
        a.link.rtt = 0.01
        assert a.extra(LinkAttribute.peer_identity) == "alice"
        assert a.extra(LinkAttribute.rtt) == 0.01
        assert a.extra(LinkAttribute.handshake_hash) is None
        assert "FrameStream on <Link dialling memory://pair running" in repr(a)


# --- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "item", "complaint"),
    [
        (frames, b"x" * (1 << 20) + b"x", "1,048,577 bytes"),
        (lines, b"x" * (1 << 20) + b"x", "1,048,577 bytes"),
        (lines, b"two\nlines", "line break"),
    ],
)
async def test_what_can_never_be_sent_is_refused_and_the_stream_goes_on(
    make: Callable[[Link], Any], item: bytes, complaint: str
) -> None:
    async with streams(make) as (a, b):
        with pytest.raises(MisuseError, match=complaint):
            await a.send(item)
        await a.send(b"hello")
        assert await b.receive() == b"hello"
    assert issubclass(MessageTooLarge, ValueError)


@pytest.mark.parametrize("make", [frames, LinkByteStream])
async def test_send_waits_above_the_high_water_mark_and_goes_on_below_it(make: Callable[[Link], Any]) -> None:
    async with streams(make, clogged_driver_pair(accepts=0)) as (a, b):
        sent = 0
        with anyio.move_on_after(10) as waited:
            while True:
                await a.send(b"x" * 1024)
                sent += 1
        assert waited.cancelled_caught
        assert 120 <= sent <= 128  # the one that is stuck, and what waits behind it: 64 bytes count for each beside it

        async def send() -> None:
            await a.send(b"y" * 1024)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(send)
            await anyio.wait_all_tasks_blocked()
            a.link.driver.release()
            got = 0
            while got < (sent + 1) * 1024:
                got += len(await b.receive())


@pytest.mark.parametrize("make", [frames, LinkByteStream])
async def test_a_reader_that_sleeps_holds_a_bounded_number_of_bytes(make: Callable[[Link], Any]) -> None:
    async with streams(make) as (a, b):
        total = 0
        with anyio.move_on_after(10):
            while True:
                await a.send(b"x" * 1000)
                total += 1000
        assert b._inbox_size < 300_000
        assert total < 900_000
        got = 0
        with anyio.move_on_after(10):
            while True:
                got += len(await b.receive())
        assert got == total


async def test_empty_frames_count_so_that_they_cannot_fill_memory() -> None:
    async with streams(frames) as (a, b):
        with anyio.move_on_after(10):
            while True:
                await a.send(b"")
        assert len(b._inbox) < 50_000


async def test_a_reader_that_sleeps_for_an_hour_does_not_lose_a_peer_that_is_alive() -> None:
    async with streams(watched_frames) as (a, b):
        for _ in range(150):
            await a.send(b"x" * 1000)  # fills the inbox, and not the link
        await anyio.sleep(3600)
        for _ in range(150):
            await b.receive()
        await a.send(b"still there")
        assert await b.receive() == b"still there"


async def test_what_arrives_after_close_is_not_kept() -> None:
    a, b = clogged_driver_pair(accepts=0)
    b.release()
    async with streams(LinkByteStream, (a, b)) as (closing, flooding):
        await closing.send(b"stuck")
        await closing.aclose()
        for _ in range(50):
            await flooding.send(b"x" * 60_000)
            await anyio.wait_all_tasks_blocked()
        assert closing._inbox_size < 300_000


# --- flush and half-close --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", KINDS)
async def test_flush_returns_when_all_was_handed_to_the_transport(make: Callable[[Link], Any]) -> None:
    async with streams(make, clogged_driver_pair(accepts=0)) as (a, _):
        await a.send(b"hello")
        with anyio.move_on_after(10) as waited:
            await a.flush()
        assert waited.cancelled_caught
        a.link.driver.release()
        await a.flush()
        assert a.link.driver.accepted >= 5


async def test_flush_says_when_the_link_was_lost() -> None:
    async with streams(frames, clogged_driver_pair(accepts=0)) as (a, b), anyio.create_task_group() as tasks:
        await a.send(b"hello")

        async def flush() -> None:
            with pytest.raises(ConnectionLost):
                await a.flush()

        tasks.start_soon(flush)
        await anyio.wait_all_tasks_blocked()
        b.abort()


@pytest.mark.parametrize("make", KINDS)
async def test_a_direction_that_has_ended_leaves_the_other_one(make: Callable[[Link], Any]) -> None:
    async with streams(make) as (a, b):
        await a.send(b"a question")
        await a.send_eof()
        await a.send_eof()
        with pytest.raises(anyio.ClosedResourceError):
            await a.send(b"more")
        assert await receive_bytes(b, 10) == b"a question"
        with pytest.raises(anyio.EndOfStream):
            await b.receive()
        await b.send(b"an answer")
        assert await receive_bytes(a, 9) == b"an answer"
        await b.send_eof()
        with pytest.raises(anyio.EndOfStream):
            await a.receive()


async def test_half_close_outlives_the_heartbeat_since_silence_then_says_nothing() -> None:
    async with streams(watched_frames) as (a, b):
        await a.send_eof()
        with pytest.raises(anyio.EndOfStream):
            await b.receive()
        await anyio.sleep(1000)
        await b.send(b"an answer, at last")
        assert await a.receive() == b"an answer, at last"


async def test_half_close_does_not_hide_a_peer_that_dies() -> None:
    a, b = clogged_driver_pair(accepts=0)
    a.release()
    async with streams(watched_frames, (a, b)) as (asking, _):
        await asking.send_eof()
        start = anyio.current_time()
        with pytest.raises(ConnectionLost, match="nothing was received"):
            await asking.receive()
        assert anyio.current_time() - start < 20


async def test_send_eof_waits_for_what_was_sent_and_never_writes_at_the_same_time() -> None:
    async with streams(watched_frames, lockstep_driver_pair(chunk=7)) as (a, b):

        async def end() -> None:
            await a.send(b"x" * 1000)
            await a.send_eof()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(end)
            assert await b.receive() == b"x" * 1000
        with pytest.raises(anyio.EndOfStream):
            await b.receive()


async def test_send_eof_on_a_link_that_is_lost_does_not_hang() -> None:
    async with streams(frames, clogged_driver_pair(accepts=0)) as (a, b), anyio.create_task_group() as tasks:
        await a.send(b"stuck")

        async def end() -> None:
            with pytest.raises(ConnectionLost):
                await a.send_eof()

        tasks.start_soon(end)
        await anyio.wait_all_tasks_blocked()
        b.abort()


@pytest.mark.parametrize("make", KINDS)
async def test_close_delivers_what_was_sent_before(make: Callable[[Link], Any]) -> None:
    async with streams(make) as (a, b):
        for n in range(10):
            await a.send(b"%d" % n)
        await a.aclose()
        assert await receive_bytes(b, 10) == b"0123456789"


@pytest.mark.parametrize("make", KINDS)
async def test_close_gives_up_on_a_peer_that_takes_nothing(make: Callable[[Link], Any]) -> None:
    async with streams(make, clogged_driver_pair(accepts=0)) as (a, _):
        await a.send(b"stuck")
        start = anyio.current_time()
        await a.aclose()
        assert anyio.current_time() - start < 0.1  # it does not wait; wait_closed does
        await a.wait_closed()
        assert anyio.current_time() - start == pytest.approx(5, abs=0.2)


async def test_a_sender_that_waits_for_room_is_woken_by_the_end() -> None:
    for end in ("aclose", "abort", "peer"):
        async with streams(frames, clogged_driver_pair(accepts=0)) as (a, b), anyio.create_task_group() as tasks:
            with anyio.move_on_after(1):
                while True:
                    await a.send(b"x" * 10_000)

            async def send(a: Any = a, end: str = end) -> None:
                with pytest.raises(ConnectionLost if end == "peer" else anyio.ClosedResourceError):
                    await a.send(b"x")

            tasks.start_soon(send)
            await anyio.wait_all_tasks_blocked()
            if end == "peer":
                b.abort()
            elif end == "abort":
                a.abort()
            else:
                await a.aclose()
