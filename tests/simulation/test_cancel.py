"""A call may be cancelled at any of its awaits: it has happened or not, nothing is lost, nothing is left (F41)."""

from __future__ import annotations

from collections.abc import Coroutine
from random import Random
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from towline.layers.encryption import Encryption, Psk
from towline.layers.framing import Framing
from towline.layers.heartbeat import Heartbeat
from towline.layers.resume import Resume, ServerSession, State
from towline.layers.retry import Retry
from towline.layers.timeout import Timeout
from towline.policies import Backoff
from towline.stack import Stack
from towline.testing._cancel import _Counted
from towline.testing._chaos import Cut
from towline.testing._simulation import Simulation, exchange, gather, until

KEY = Psk(bytes(range(32)))


def encrypted(*, attempt: float = 30.0, **options: Any) -> tuple[Any, ...]:
    return (
        Resume(**options),
        Retry(Backoff.exponential(), random=Random(0)),
        Timeout(attempt),
        Heartbeat(),
        Framing(),
        Encryption(psk=KEY, max_record_size=4096),
    )


async def cancel_at(at: int, coroutine: Coroutine[Any, Any, object]) -> bool:
    """Run a coroutine and cancel it at its ``at``-th suspension. Whether it came that far."""
    scope = anyio.CancelScope()
    counted = _Counted(coroutine, at, scope.cancel)
    with scope:
        await counted
    return counted.suspensions >= at


async def test_f41_a_send_that_is_cancelled_was_not_sent_and_one_that_returned_was() -> None:
    async with Simulation(*encrypted(buffer=20_000, window=20_000, max_message=5_000)) as sim:
        client, server = await sim.connect()
        sent: list[bytes] = []
        received: list[bytes] = []

        async def send(number: int) -> None:
            message = b"%06d" % number + bytes(4000)
            await client.send(message)
            sent.append(message)

        async def read() -> None:
            while True:
                await anyio.sleep(0.05)
                received.append(await server.receive())

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            for number in range(300):
                await cancel_at(number % 4 + 1, send(number))
            assert 10 < len(sent) < 300
            with anyio.fail_after(600):
                await client.flush()
            await until(lambda: len(received) == len(sent))
            tasks.cancel_scope.cancel()
        assert received == sent


async def test_f41_a_receive_that_is_cancelled_loses_no_message() -> None:
    async with Simulation(*encrypted()) as sim:
        client, server = await sim.connect()
        received: list[bytes] = []

        async def receive(many: bool) -> None:
            if many:
                received.extend(await server.receive_many())
            else:
                received.append(await server.receive())

        async def send() -> None:
            for number in range(200):
                await client.send(b"%d" % number)
                for _ in range(number % 5):
                    await anyio.lowlevel.checkpoint()

        async def read() -> None:
            number = 0
            while len(received) < 200:
                number += 1
                await cancel_at(number % 4 + 1, receive(number % 7 == 0))
                await anyio.lowlevel.checkpoint()

        with anyio.fail_after(60):
            await gather(send, read)
        assert received == [b"%d" % number for number in range(200)]


async def test_f41_a_receive_that_is_cancelled_as_its_message_arrives_leaves_it_for_the_next() -> None:
    async with Simulation(*encrypted()) as sim:
        client, server = await sim.connect()
        for steps in range(12):
            scope = anyio.CancelScope()
            got: list[bytes] = []

            async def receive(scope: anyio.CancelScope = scope, got: list[bytes] = got) -> None:
                with scope:
                    got.append(await server.receive())

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(receive)
                await anyio.sleep(1)
                await client.send(b"%d" % steps)
                for _ in range(steps):
                    await anyio.lowlevel.checkpoint()
                scope.cancel()
            if not got:
                with anyio.fail_after(1):
                    got.append(await server.receive())
            assert got == [b"%d" % steps]
        await anyio.sleep(1)
        assert not server.core.inbox


async def test_f41_a_flush_that_is_cancelled_changes_nothing() -> None:
    async with Simulation(*encrypted()) as sim:
        client, server = await sim.connect()
        number, more = 0, True
        while more:
            number += 1
            await client.send(b"%d" % number)
            more = await cancel_at(number, client.flush())
            assert client.state is State.ATTACHED
        assert number >= 2
        assert client.buffered == 0
        assert await server.receive_many() == [b"%d" % i for i in range(1, number + 1)]
        await exchange(client, server, [b"a"], [b"b"])


async def test_f41_a_connect_that_is_cancelled_leaves_neither_tasks_nor_sessions() -> None:
    async def handler(session: Any) -> None:
        async for message in session:
            await session.send(message)

    async with Simulation(*encrypted(ttl=30), handler=handler) as sim:
        tasks = len(anyio.get_running_tasks())
        stack = Stack(*sim.stack.layers, transports=(sim.network,))

        async def connect() -> None:
            async with stack.open() as opened:
                session = await opened.connect(sim.endpoint)
                await session.send(b"x")
                assert await session.receive() == b"x"

        at, more = 0, True
        while more:
            at += 1
            more = await cancel_at(at, connect())
            await anyio.lowlevel.checkpoint()
        assert at > 8
        await anyio.sleep(120)
        assert sim.server.sessions == []
        assert len(sim.server._links) == 0
        assert len(anyio.get_running_tasks()) == tasks


@pytest.mark.parametrize("peer_closes", [False, True])
async def test_f41_a_close_that_is_cancelled_aborts_and_ends_both_ends(peer_closes: bool) -> None:
    async with Simulation(*encrypted()) as sim:
        tasks = len(anyio.get_running_tasks())
        at, more = 0, True
        while more:
            at += 1
            client, server = await sim.connect()
            await client.send(b"a")
            assert await server.receive() == b"a"
            if peer_closes:
                await server.send_eof()
            more = await cancel_at(at, client.aclose())
            client.leave()
            with anyio.fail_after(60):
                if more:
                    await server.wait_closed()
                    assert server.state in (State.LOST, State.CLOSED)
                else:
                    await gather(server.aclose, server.wait_closed)
                    assert server.state is State.CLOSED
                await client.wait_closed()
        sim.over.set()
        await anyio.sleep(60)
        assert at >= 2
        assert sim.server.sessions == []
        assert len(anyio.get_running_tasks()) == tasks


async def test_f41_a_close_that_is_cancelled_while_detached_still_ends_the_peer() -> None:
    async with Simulation(*encrypted()) as sim:
        client, server = await sim.connect()
        sim.network.is_down = True
        sim.cut()
        await anyio.sleep(1)
        await client.send(b"a")
        with anyio.move_on_after(5) as scope:
            await client.aclose()
        assert scope.cancelled_caught
        assert client.state is State.LOST
        sim.network.is_down = False
        with anyio.fail_after(60):
            await server.wait_closed()
        assert sim.server.sessions == []


async def test_f41_leaving_the_block_of_a_connect_by_an_error_aborts_the_session() -> None:
    async with Simulation(*encrypted()) as sim:
        servers: list[ServerSession] = []

        async def fail() -> None:
            async with sim.stack.connect(sim.endpoint) as session:
                await session.send(b"a")
                servers.append(await sim.accepted())
                raise KeyError

        with pytest.raises(KeyError):
            await fail()
        with anyio.fail_after(60):
            await servers[0].wait_closed()
        assert servers[0].state is State.LOST


async def test_f41_an_attempt_to_resume_that_times_out_at_any_byte_loses_nothing() -> None:
    """Each attempt meets a black hole one byte further on, and is cancelled there by Timeout (W4b)."""
    holes = [Cut(sent=at, how="blackhole") for at in range(0, 260, 8)]
    async with Simulation(*encrypted(attempt=0.5, ttl=7200), cuts=[Cut(seconds=1), *holes]) as sim:
        client, server = await sim.connect()
        await client.send(b"before")
        await anyio.sleep(0.9)
        await client.send(b"there 0")
        await server.send(b"back 0")
        assert await server.receive() == b"before"
        await anyio.sleep(0.2)
        await client.send(b"there 1")
        with anyio.fail_after(3600):
            assert [await server.receive() for _ in range(2)] == [b"there 0", b"there 1"]
            assert await client.receive() == b"back 0"
        await exchange(client, server, [b"there 2"], [b"back 1"], within=3600)
