"""The listening end: strangers are few, handlers are no danger, and an end is an end."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable
from typing import Any

import anyio
import pytest

from towline.endpoint import Endpoint
from towline.errors import ConnectFailed, ConnectionLost, LinkLost, LossReason, SessionLost, TowlineError
from towline.layers.encryption import Encryption
from towline.layers.encryption.keys import Psk
from towline.layers.framing import Framing
from towline.layers.heartbeat import Heartbeat
from towline.layers.resume import Closed, Draining, Lost, Resume, Session
from towline.link import Link
from towline.service import Dial
from towline.stack import OpenStack, Stack
from towline.stage import Driver
from towline.transport import Listener
from towline.transports import Memory

PSK = Psk.generate()
HERE = "memory://here"
HELLO_SIZE = 5  # bytes of a preamble that never comes to its end


class FromSomewhere(Memory):
    """Memory whose links have a source, as those of TCP do."""

    def __init__(self) -> None:
        super().__init__()
        self.source: str = ""

    async def listen(self, endpoint: Endpoint) -> Listener:
        listener = await super().listen(endpoint)
        serve = listener.serve

        async def serve_from(accepted: Callable[[Link], None]) -> None:
            def accept(link: Link) -> None:
                link.source = self.source
                accepted(link)

            await serve(accept)

        listener.serve = serve_from  # type: ignore[method-assign]
        return listener


def encrypted(transport: Memory) -> Stack:
    return Stack(Resume(), Heartbeat(), Framing(), Encryption(psk=PSK), transports=(transport,))


async def echo(stream: Any) -> None:
    async for item in stream:
        await stream.send(item)


async def stranger(transport: Memory) -> Driver:
    link = await transport(Dial(Endpoint.parse(HERE)))
    return link.driver


async def greeted(ours: Stack | OpenStack) -> bool:
    """Whether an honest client gets in."""
    if isinstance(ours, OpenStack):
        session = await ours.connect(HERE)
        await session.send(b"hello")
        answer: bytes = await session.receive()
        await session.aclose()
        return answer == b"hello"
    async with ours.connect(HERE) as session:
        await session.send(b"hello")
        return bool(await session.receive() == b"hello")


async def is_cut(driver: Driver) -> bool:
    with anyio.move_on_after(0.01):
        try:
            while await driver.read():
                pass
        except LinkLost:
            pass
        return True
    return False


# --- strangers -------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
async def test_strangers_that_dribble_bytes_are_each_cut_off_after_five_seconds_in_all() -> None:
    transport = FromSomewhere()
    ours = encrypted(transport)
    async with ours.serve(HERE, echo) as server, anyio.create_task_group() as tasks:
        cut_after: list[float] = []

        async def dribble() -> None:
            driver = await stranger(transport)
            start = anyio.current_time()
            try:
                for byte in b"TWL" * 100:
                    await driver.write(bytes([byte]))
                    await anyio.sleep(1)
            except LinkLost:
                pass
            cut_after.append(anyio.current_time() - start)

        for _ in range(200):
            tasks.start_soon(dribble)
        await anyio.sleep(0.5)
        assert await greeted(ours)  # an honest client gets in meanwhile
        await anyio.sleep(10)
        assert len(server._strangers) == 0
        assert len(server._links) == 0
        assert len(cut_after) == 200
        assert max(cut_after) <= 7  # five seconds, and the next byte that was tried
        assert await greeted(ours)


async def test_mute_strangers_are_cut_off_by_a_stack_without_encryption_too() -> None:
    transport = FromSomewhere()
    ours = Stack(Resume(), Framing(), transports=(transport,))
    async with ours.serve(HERE, echo) as server:
        drivers = [await stranger(transport) for _ in range(50)]
        for driver in drivers:
            await driver.write(b"\x80")
        await anyio.sleep(6)
        assert len(server._links) == 0
        assert all([await is_cut(driver) for driver in drivers])


async def test_a_flood_of_strangers_holds_no_more_than_the_limit_and_fills_no_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "towline")
    transport = FromSomewhere()
    ours = encrypted(transport)
    async with ours.serve(HERE, echo, max_pending=100, max_pending_per_source=100) as server:
        drivers: list[Driver] = []
        for number in range(150):
            transport.source = f"10.0.0.{number}"
            drivers.append(await stranger(transport))
            assert len(server._strangers) <= 100
        await anyio.wait_all_tasks_blocked()
        assert len(server._links) == 100
        # The one that has waited longest went.
        assert [await is_cut(driver) for driver in drivers] == [True] * 50 + [False] * 100
        failures = [record for record in caplog.records if "failed" in record.getMessage()]
        assert len(failures) == 1
        await anyio.sleep(6)
        transport.source = "10.0.1.1"
        assert await greeted(ours)
        assert len(caplog.records) < 60


async def test_an_honest_client_gets_in_during_a_flood() -> None:
    transport = FromSomewhere()
    ours = encrypted(transport)
    async with ours.serve(HERE, echo, max_pending=20, max_pending_per_source=10), ours.open() as opened:
        for number in range(100):
            transport.source = "10.6.6.6"
            await stranger(transport)
            if number % 10 == 0:
                transport.source = f"10.0.0.{number}"
                assert await greeted(opened)


async def test_a_source_with_too_many_strangers_loses_its_own_oldest_and_harms_nobody_else() -> None:
    transport = FromSomewhere()
    ours = encrypted(transport)
    async with ours.serve(HERE, echo, max_pending=100, max_pending_per_source=3):
        transport.source = "10.0.0.1"
        patient = [await stranger(transport) for _ in range(3)]
        transport.source = "10.6.6.6"
        greedy = [await stranger(transport) for _ in range(8)]
        await anyio.wait_all_tasks_blocked()
        assert [await is_cut(driver) for driver in greedy] == [True] * 5 + [False] * 3
        assert [await is_cut(driver) for driver in patient] == [False] * 3


async def test_links_without_a_source_share_no_limit_per_source() -> None:
    transport = FromSomewhere()
    async with encrypted(transport).serve(HERE, echo, max_pending=100, max_pending_per_source=3):
        drivers = [await stranger(transport) for _ in range(50)]
        await anyio.wait_all_tasks_blocked()
        assert not any([await is_cut(driver) for driver in drivers])


async def test_who_has_proved_itself_is_no_stranger_and_is_never_turned_away() -> None:
    transport = FromSomewhere()
    transport.source = "10.0.0.1"
    ours = encrypted(transport)
    async with ours.serve(HERE, echo, max_pending=3, max_pending_per_source=3) as server, ours.open() as opened:
        sessions = [await opened.connect(HERE) for _ in range(10)]
        for session in sessions:
            await session.send(b"hello")
        assert [await session.receive() for session in sessions] == [b"hello"] * 10
        assert len(server._strangers) == 0
        assert len(server.sessions) == 10
        for session in sessions:
            session.abort()


async def test_a_thousand_that_connect_and_close_leave_no_task_and_no_link(caplog: pytest.LogCaptureFixture) -> None:
    transport = FromSomewhere()
    ours = encrypted(transport)
    async with ours.serve(HERE, echo) as server:
        await greeted(ours)
        await anyio.sleep(10)
        gc.collect()
        tasks = len(anyio.get_running_tasks())
        links = sum(isinstance(each, Link) for each in gc.get_objects())
        for number in range(1000):
            driver = await stranger(transport)
            if number % 2:
                await driver.aclose()
            else:
                driver.abort()
            if number % 100 == 0:
                await anyio.sleep(1)
        await anyio.sleep(6)
        assert len(server._links) == len(server._strangers) == 0
        assert len(anyio.get_running_tasks()) == tasks
        gc.collect()
        assert sum(isinstance(each, Link) for each in gc.get_objects()) <= links + 1  # the driver that we hold
        assert await greeted(ours)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_a_thousand_that_connect_over_memory_leave_no_descriptor() -> None:
    if not os.path.isdir("/proc/self/fd"):  # noqa: ASYNC240 - it waits for nothing
        pytest.skip("needs /proc")
    transport = FromSomewhere()
    before = len(os.listdir("/proc/self/fd"))
    async with encrypted(transport).serve(HERE, echo):
        for _ in range(1000):
            (await stranger(transport)).abort()
        await anyio.sleep(6)
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize(
    "garbage",
    [
        b"\0",
        b"\xff" * 4096,
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"\x16\x03\x01\x02\x00\x01",
    ],
)
@pytest.mark.parametrize("layers", [(Resume(), Framing()), (Resume(), Framing(), Encryption(psk=PSK))])
async def test_garbage_ends_its_own_link_and_nothing_else(
    garbage: bytes, layers: tuple[Any, ...], caplog: pytest.LogCaptureFixture
) -> None:
    transport = FromSomewhere()
    ours = Stack(*layers, transports=(transport,))
    async with ours.serve(HERE, echo) as server:
        driver = await stranger(transport)
        await driver.write(garbage)
        await anyio.sleep(6)
        assert await is_cut(driver)
        assert len(server._links) == 0
        assert await greeted(ours)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


# --- handlers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [(Resume(), Framing()), (Framing(),), ()])
async def test_a_handler_that_raises_ends_its_own_connection_and_never_the_server(
    layers: tuple[Any, ...], caplog: pytest.LogCaptureFixture
) -> None:
    async def moody(stream: Any) -> None:
        item = await stream.receive()
        if item == b"bad":
            raise ZeroDivisionError("a handler's fault")
        await stream.send(item)

    ours = Stack(*layers, transports=(Memory(),))
    async with ours.serve(HERE, moody), ours.open() as opened:
        bad, good = await opened.connect(HERE), await opened.connect(HERE)
        await bad.send(b"bad")
        with pytest.raises(ConnectionLost):
            await bad.receive()
        await good.send(b"good")
        assert await good.receive() == b"good"
        bad.abort()
        good.abort()
    assert "a handler's fault" in caplog.text
    assert "ExceptionGroup" not in caplog.text


async def test_a_handler_that_raises_tells_its_client_why_the_session_is_lost() -> None:
    async def bad(session: Session) -> None:
        await session.receive()
        raise ZeroDivisionError("a handler's fault")

    ours = Stack(Resume(), Framing(), transports=(Memory(),))
    async with ours.serve(HERE, bad), ours.open() as opened:
        session = await opened.connect(HERE)
        await session.send(b"x")
        with pytest.raises(SessionLost) as lost:
            await session.receive()
        assert lost.value.reason is LossReason.INTERNAL
        assert "a handler's fault" not in str(lost.value)  # what failed there is nobody's business here


async def test_a_handler_that_returns_closes_its_session() -> None:
    async def once(session: Session) -> None:
        await session.send(await session.receive())

    ours = Stack(Resume(), Framing(), transports=(Memory(),))
    async with ours.serve(HERE, once) as server, ours.connect(HERE) as session:
        await session.send(b"x")
        assert await session.receive() == b"x"
        with pytest.raises(anyio.EndOfStream):
            await session.receive()
        await session.aclose()
        await anyio.sleep(1)
        assert server.sessions == []


async def test_one_handler_that_never_ends_holds_up_nobody() -> None:
    transport = Memory()
    first = True

    async def slow(stream: Any) -> None:
        nonlocal first
        if first:
            first = False
            await anyio.sleep_forever()
        await echo(stream)

    ours = Stack(Framing(), transports=(transport,))
    async with ours.serve(HERE, slow), ours.open() as opened:
        stuck = await opened.connect(HERE)
        await anyio.wait_all_tasks_blocked()
        assert await greeted(opened)
        stuck.abort()


# --- the end ---------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
async def test_drain_lets_sessions_finish_and_begins_no_new_one() -> None:
    ours = Stack(Resume(), Framing(), transports=(Memory(),))
    events: list[object] = []

    async def use(session: Session) -> None:
        async for event in session.events():
            events.append(event)
            if isinstance(event, Draining):
                await session.send(b"the last")
                assert await session.receive() == b"the last"
                await session.aclose()

    async with ours.open() as serving, ours.open() as opened, anyio.create_task_group() as tasks:
        server = await serving.serve(HERE, echo)
        session = await opened.connect(HERE)
        await session.send(b"x")
        await session.receive()
        tasks.start_soon(use, session)
        await anyio.wait_all_tasks_blocked()
        start = anyio.current_time()
        assert await server.drain(30) == 0
        assert anyio.current_time() - start < 30
        with pytest.raises((ConnectFailed, TowlineError)):
            await opened.connect(HERE)
        await session.wait_closed()
        assert Draining(30.0) in events
        assert isinstance(events[-1], Closed)


async def test_drain_cuts_off_at_its_deadline_what_does_not_end_and_says_how_many() -> None:
    ours = Stack(Resume(), Framing(), transports=(Memory(),))
    async with ours.open() as serving, ours.open() as opened:
        server = await serving.serve(HERE, echo)
        sessions = [await opened.connect(HERE) for _ in range(3)]
        for session in sessions:
            await session.send(b"x")
            await session.receive()
        start = anyio.current_time()
        assert await server.drain(7) == 3
        assert anyio.current_time() - start == pytest.approx(7)
        for session in sessions:
            with pytest.raises(SessionLost) as lost:
                await session.receive()
            assert lost.value.reason is LossReason.GOING_AWAY
            assert any([isinstance(event, Lost) async for event in session.events()])


async def test_drain_of_a_server_without_sessions_returns_at_once() -> None:
    ours = Stack(Resume(), Framing(), transports=(Memory(),))
    async with ours.serve(HERE, echo) as server:
        start = anyio.current_time()
        assert await server.drain(30) == 0
        assert anyio.current_time() == start


async def test_aclose_ends_every_session_now_and_can_be_repeated() -> None:
    ours = Stack(Resume(), Framing(), transports=(Memory(),))
    async with ours.open() as serving, ours.open() as opened:
        server = await serving.serve(HERE, echo)
        session = await opened.connect(HERE)
        await session.send(b"x")
        await session.receive()
        assert repr(server) == "<Server memory://here links=1 sessions=1>"
        start = anyio.current_time()
        await server.aclose()
        await server.aclose()
        assert anyio.current_time() - start <= 1.1
        with pytest.raises(SessionLost) as lost:
            await session.receive()
        assert lost.value.reason is LossReason.GOING_AWAY
        assert repr(server) == "<Server memory://here links=0 sessions=0>"
        again = await serving.serve(HERE, echo)  # the endpoint is free
        assert again.endpoint == server.endpoint


async def test_aclose_ends_streams_cleanly() -> None:
    ours = Stack(Framing(), transports=(Memory(),))
    async with ours.open() as opened:
        async with ours.serve(HERE, echo):
            stream = await opened.connect(HERE)
            await stream.send(b"x")
            assert await stream.receive() == b"x"
        with pytest.raises(anyio.EndOfStream):
            await stream.receive()


async def test_aclose_does_not_wait_for_strangers() -> None:
    transport = Memory()
    async with encrypted(transport).open() as serving:
        server = await serving.serve(HERE, echo)
        await stranger(transport)
        await anyio.wait_all_tasks_blocked()
        start = anyio.current_time()
        await server.aclose()
        assert anyio.current_time() - start <= 1.1


async def test_closing_one_server_leaves_the_other_one_of_the_same_scope() -> None:
    ours = Stack(Resume(), Framing(), transports=(Memory(),))
    async with ours.open() as serving, ours.open() as opened:
        one, other = await serving.serve(HERE, echo), await serving.serve("memory://there", echo)
        session = await opened.connect("memory://there")
        await session.send(b"x")
        assert await session.receive() == b"x"
        assert len(one.sessions) == 0
        assert len(other.sessions) == 1
        await one.aclose()
        await session.send(b"still here")
        assert await session.receive() == b"still here"
        session.abort()


async def test_the_scope_of_a_server_leaves_no_task_behind() -> None:
    before = len(anyio.get_running_tasks())
    ours = encrypted(Memory())
    async with ours.serve(HERE, echo), ours.connect(HERE) as session:
        await session.send(b"x")
        await session.receive()
    assert len(anyio.get_running_tasks()) == before
