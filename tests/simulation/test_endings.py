"""How a session ends: closed, aborted, expired, drained, or with the process of its peer (F26, F28, F36 to F40)."""

from __future__ import annotations

from random import Random
from typing import Any

import anyio
import pytest

from towline.errors import CloseIncomplete, LossReason, SessionLost, TowlineError
from towline.layers.encryption import Encryption, Psk
from towline.layers.framing import Framing
from towline.layers.heartbeat import Heartbeat
from towline.layers.resume import Draining, Resume, Session, State
from towline.layers.retry import Retry
from towline.policies import Backoff
from towline.testing._chaos import Cut, How
from towline.testing._simulation import Simulation, exchange, gather, until

KEY = Psk(bytes(range(32)))


def encrypted(**options: Any) -> tuple[Any, ...]:
    return (
        Resume(**options),
        Retry(Backoff.exponential(), random=Random(0)),
        Heartbeat(),
        Framing(),
        Encryption(psk=KEY, max_record_size=4096),
    )


async def drained(session: Session) -> tuple[list[bytes], Exception | None]:
    """All that a session still gives, and how it ended."""
    received: list[bytes] = []
    try:
        with anyio.fail_after(600):
            while True:
                received.append(await session.receive())
    except anyio.EndOfStream:
        return received, None
    except TowlineError as error:
        return received, error


# --- F26, F28 -------------------------------------------------------------------------------------------------------


async def test_f26_a_session_detached_beyond_its_time_to_live_is_lost_and_both_ends_know_what_arrived() -> None:
    expired: list[Session] = []
    async with Simulation(*encrypted(ttl=60, on_expired=expired.append)) as sim:
        client, server = await sim.connect()
        for i in range(3):
            await client.send(b"%d" % i)
        await anyio.sleep(0.05)  # delivered, and not yet acknowledged
        sim.network.is_down = True
        sim.cut()
        await anyio.sleep(0.01)
        for i in range(3, 5):
            await client.send(b"%d" % i)
        await anyio.sleep(61)
        assert expired == [server]
        assert sim.server.sessions == []
        received, error = await drained(server)
        assert received == [b"0", b"1", b"2"]
        assert isinstance(error, SessionLost)
        assert error.reason is LossReason.EXPIRED
        sim.network.is_down = False
        with pytest.raises(SessionLost) as caught, anyio.fail_after(60):
            await client.receive()
        lost = caught.value
        assert lost.reason is LossReason.EXPIRED
        assert (lost.delivered_upto, lost.sent_upto) == (3, 3)
        assert lost.unacked == (b"0", b"1", b"2", b"3", b"4")
        with pytest.raises(SessionLost):
            await client.send(b"no")
        with pytest.raises(SessionLost):
            await client.flush()


async def test_f26_a_client_that_finds_nobody_gives_up_a_little_after_the_server_must_have() -> None:
    async with Simulation(*encrypted(ttl=60)) as sim:
        client, _ = await sim.connect()
        sim.network.is_down = True
        sim.cut()
        began = anyio.current_time()
        with pytest.raises(SessionLost) as caught, anyio.fail_after(300):
            await client.receive()
        assert caught.value.reason is LossReason.GAVE_UP
        assert 60 <= anyio.current_time() - began <= 76


async def test_f28_after_a_restart_of_the_server_nobody_can_say_what_arrived() -> None:
    async with Simulation(*encrypted()) as sim:
        client, _ = await sim.connect()
        await client.send(b"one")
        await anyio.sleep(1)
        await client.send(b"two")
        await sim.kill_server()
        await anyio.sleep(3)
        await client.send(b"three")
        await sim.start_server()
        with pytest.raises(SessionLost) as caught, anyio.fail_after(60):
            await client.receive()
        lost = caught.value
        assert (lost.reason, lost.delivered_upto, lost.sent_upto) == (LossReason.UNKNOWN_SESSION, None, 2)
        assert lost.unacked == (b"two", b"three")
        await exchange(*await sim.connect(), [b"a new session"], [b"works"])


async def test_f28_a_fleet_comes_back_to_a_restarted_server_spread_over_time() -> None:
    async with Simulation(*encrypted()) as sim:
        clients = [(await sim.connect())[0] for _ in range(60)]
        await sim.kill_server()
        killed, dials = anyio.current_time(), sim.network.dials
        dials.clear()
        await anyio.sleep(120)
        # The first attempts come within 0.1 s and not as one, and the later ones at up to 30 s from each other.
        first = [round(dial - killed, 2) for dial in dials[:60]]
        assert max(first) <= 0.1
        assert max(map(first.count, first)) <= 15
        late = [int(dial - killed) for dial in dials if dial - killed > 60]
        assert max(map(late.count, late)) <= 15
        await sim.start_server()
        await anyio.sleep(60)
        assert all(client.state is State.LOST for client in clients)


# --- F36, F37, F38 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["reset", "close", "blackhole"])
@pytest.mark.parametrize("at", [400, 2_000, 20_000, 50_000])
async def test_f36_closing_with_a_thousand_messages_under_way_delivers_them_all_over_a_cut(how: How, at: int) -> None:
    messages = [b"%06d" % i + bytes(44) for i in range(1000)]
    async with Simulation(*encrypted(), cuts=[Cut(sent=at, how=how), Cut(sent=at, how=how)]) as sim:
        client, server = await sim.connect()
        await client.send_many(messages)
        got: list[bytes] = []

        async def read() -> None:
            received, error = await drained(server)
            assert error is None
            got.extend(received)
            await server.aclose()

        with anyio.fail_after(300):
            await gather(client.aclose, read)
        assert got == messages
        await client.wait_closed()
        assert client.state is server.state is State.CLOSED


async def test_f37_whatever_is_lost_of_the_farewell_both_ends_close() -> None:
    """Cut at every byte after the last message, in both directions: FINs, their acks, and CLOSED among them."""

    async def run(*cuts: Cut) -> tuple[int, int, int, int]:
        async with Simulation(*encrypted(), cuts=cuts) as sim:
            client, server = await sim.connect()
            await client.send(b"a")
            assert await server.receive() == b"a"
            await anyio.sleep(1)
            driver = sim.chaos.drivers[0]
            start = driver._sent, driver._received
            await exchange(client, server, [], [])
            return *start, driver._sent, driver._received

    sent, received, sent_end, received_end = await run()
    assert sent_end - sent > 30
    for how in ("reset", "close", "blackhole"):
        for at in range(sent, sent_end):
            await run(Cut(sent=at, how=how))
        for at in range(received, received_end):
            await run(Cut(received=at, how=how))


async def test_f38_both_ends_may_close_at_once() -> None:
    for how in ("reset", "close"):
        for at in range(250, 450, 5):
            async with Simulation(*encrypted(), cuts=[Cut(sent=at, how=how)]) as sim:
                client, server = await sim.connect()
                with anyio.fail_after(60):
                    await gather(client.aclose, server.aclose)
                    client.leave()
                    server.leave()
                    await gather(client.wait_closed, server.wait_closed)
                assert client.state is State.CLOSED
                assert server.state is State.CLOSED


@pytest.mark.parametrize("aborting", ["client", "server"])
@pytest.mark.parametrize("delay", [0.0, 1e-9, 0.05, 0.1, 1.0])
async def test_f38_an_abort_while_closing_ends_both_ends_at_once(aborting: str, delay: float) -> None:
    async with Simulation(*encrypted(window=40_000, buffer=1 << 20, max_message=20_000)) as sim:
        client, server = await sim.connect()
        for _ in range(50):
            await client.send(bytes(10_000))  # more than the window takes, and nobody reads
        errors: list[BaseException] = []

        async def close() -> None:
            try:
                await client.aclose()
            except (SessionLost, CloseIncomplete) as error:
                errors.append(error)

        async def abort() -> None:
            await anyio.sleep(delay)
            (client if aborting == "client" else server).abort()

        with anyio.fail_after(5):
            await gather(close, abort)
            await gather(client.wait_closed, server.wait_closed)
        assert client.state is State.LOST
        assert server.state is State.LOST
        assert sim.server.sessions == []
        assert len(errors) == 1


@pytest.mark.parametrize("aborting", ["client", "server"])
async def test_f38_an_abort_while_messages_are_replayed_ends_both_ends(aborting: str) -> None:
    for wait in range(0, 60, 3):
        async with Simulation(*encrypted(), capacity=4096) as sim:
            client, server = await sim.connect()
            sim.network.is_down = True
            sim.cut()
            await anyio.sleep(1)
            for session in (client, server):
                for _ in range(50):
                    await session.send(bytes(5000))
            sim.network.is_down = False
            with anyio.fail_after(60):
                while client.state is not State.ATTACHED:  # noqa: ASYNC110 - nothing tells of it
                    await anyio.sleep(0.01)
            for _ in range(wait):
                await anyio.lowlevel.checkpoint()
            one, other = (client, server) if aborting == "client" else (server, client)
            one.abort()
            with anyio.fail_after(60):
                _, error = await drained(other)
                assert isinstance(error, SessionLost)
                await gather(client.wait_closed, server.wait_closed)
            assert error.reason is LossReason.ABORTED
            assert sim.server.sessions == []


async def test_f38_an_abort_while_detached_is_delivered_when_the_way_back_is_found() -> None:
    async with Simulation(*encrypted()) as sim:
        client, server = await sim.connect()
        sim.network.is_down = True
        sim.cut()
        await anyio.sleep(1)
        client.abort()
        await anyio.sleep(30)
        assert server.state is State.DETACHED
        sim.network.is_down = False
        with anyio.fail_after(60):
            _, error = await drained(server)
        assert isinstance(error, SessionLost)
        assert error.reason is LossReason.ABORTED


async def test_f38_a_second_close_waits_for_the_delivery_as_the_first_does() -> None:
    """Else leaving the block of a connect, while another task closes, would leave messages behind unsaid."""
    async with Simulation(*encrypted()) as sim, anyio.create_task_group() as tasks:
        async with sim.stack.connect(sim.endpoint) as client:
            server = await sim.accepted()
            sim.network.is_down = True
            sim.cut()
            await anyio.sleep(1)
            await client.send(b"kept")
            tasks.start_soon(client.aclose)
            await anyio.sleep(1)

            async def heal() -> None:
                await anyio.sleep(20)
                sim.network.is_down = False

            tasks.start_soon(heal)
        assert client.state is State.CLOSED
        assert await drained(server) == ([b"kept"], None)


async def test_f38_an_abort_that_a_stuck_link_does_not_take_is_delivered_over_the_next() -> None:
    async with Simulation(*encrypted(), capacity=2048) as sim:
        client, server = await sim.connect()
        link = sim.chaos.drivers[0]

        async def stuck(data: bytes | bytearray) -> None:
            await anyio.sleep_forever()

        link.write = stuck  # type: ignore[method-assign]
        link.inline = False
        await client.send(bytes(10_000))
        await anyio.sleep(1)
        client.abort()
        with anyio.fail_after(60):
            _, error = await drained(server)
        assert isinstance(error, SessionLost)
        assert error.reason is LossReason.ABORTED


async def test_f38_calls_that_wait_all_end_when_the_session_does() -> None:
    async with Simulation(*encrypted(window=40_000, buffer=40_000, max_message=20_000)) as sim:
        client, server = await sim.connect()
        ended: list[str] = []

        async def ends(name: str, call: Any) -> None:
            try:
                while True:
                    await call()
            except (SessionLost, anyio.ClosedResourceError):
                ended.append(name)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ends, "receive", client.receive)
            for i in range(3):
                tasks.start_soon(ends, f"send {i}", lambda: client.send(bytes(10_000)))
            await anyio.sleep(1)
            tasks.start_soon(ends, "flush", client.flush)
            await anyio.sleep(5)
            assert ended == []
            server.abort()
            await until(lambda: len(ended) == 5, within=5)


# --- F39 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["reset", "close", "blackhole"])
async def test_f39_the_end_of_a_link_is_not_the_end_of_the_stream(how: How) -> None:
    async with Simulation(*encrypted()) as sim:
        client, server = await sim.connect()
        sim.cut(how)
        with pytest.raises(TimeoutError), anyio.fail_after(60):
            await gather(client.receive, server.receive)
        assert client.statistics.resumes == 1
        await exchange(client, server, [b"a"], [b"b"])


async def test_f39_the_peers_end_of_stream_leaves_our_direction_open() -> None:
    async with Simulation(*encrypted(), cuts=[Cut(seconds=2)]) as sim:
        client, server = await sim.connect()
        await client.send(b"a request")
        await client.send_eof()
        assert await drained(server) == ([b"a request"], None)
        with pytest.raises(anyio.ClosedResourceError):
            await client.send(b"more")
        for i in range(10):
            await server.send(b"%d" % i)
            await anyio.sleep(0.5)
        await server.aclose()
        assert await drained(client) == ([b"%d" % i for i in range(10)], None)
        await client.aclose()


# --- F40 ------------------------------------------------------------------------------------------------------------


async def test_f40_a_drain_loses_nothing_of_those_who_finish_and_counts_those_who_do_not() -> None:
    """Of a hundred sessions under load, seventy close within the deadline; links are cut meanwhile."""
    received: dict[bytes, int] = {}

    async def handler(session: Any) -> None:
        async for message in session:
            name, number = message.split(b" ")
            assert int(number) == received.get(name, 0)
            received[name] = int(number) + 1

    async with Simulation(*encrypted(), handler=handler) as sim:
        clients = [await sim.dial() for _ in range(100)]
        sent: dict[bytes, int] = {}
        lost: list[SessionLost] = []

        async def run(number: int) -> None:
            name, client = b"%d" % number, clients[number]
            draining = anyio.Event()

            async def watch() -> None:
                async for event in client.events():
                    if isinstance(event, Draining):
                        draining.set()

            try:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(watch)
                    while not draining.is_set() or number >= 70:
                        await client.send(b"%s %d" % (name, sent.get(name, 0)))
                        sent[name] = sent.get(name, 0) + 1
                        await anyio.sleep(0.1)
                    await client.aclose()
                    tasks.cancel_scope.cancel()
            except BaseExceptionGroup as group:
                (error,) = group.exceptions
                assert isinstance(error, SessionLost)
                lost.append(error)

        cut_off = 0
        async with anyio.create_task_group() as tasks:
            for number in range(100):
                tasks.start_soon(run, number)
            await anyio.sleep(3)
            for driver in sim.chaos.drivers[::7]:
                driver._cut = Cut(how="reset")
                driver.cut_now()
            cut_off = await sim.server.drain(20)
        assert cut_off == 30
        assert len(lost) == 30
        assert {error.reason for error in lost} == {LossReason.GOING_AWAY}
        assert [number for number in range(70) if received[b"%d" % number] != sent[b"%d" % number]] == []
        assert all(clients[number].state is State.CLOSED for number in range(70))


async def test_f40_a_server_that_drains_asks_new_clients_to_come_back_later() -> None:
    async with Simulation(*encrypted(attach_timeout=5)) as sim:
        client, server = await sim.connect()

        async def refused() -> None:
            await anyio.sleep(1)
            with pytest.raises(TowlineError):
                await sim.dial()
            await exchange(client, server, [b"still"], [b"served"])

        with anyio.fail_after(60):
            await gather(lambda: sim.server.drain(30), refused)


async def test_f40_a_drain_does_not_wait_for_a_session_that_nobody_confirmed() -> None:
    async with Simulation(*encrypted()) as sim:
        await sim._dialling.probe(sim.endpoint)
        await until(lambda: sim.server.sessions[0].attachment is None)
        began = anyio.current_time()
        assert await sim.server.drain(30) == 0
        assert anyio.current_time() - began < 1
        assert sim.server.sessions == []


async def test_f26_a_reconnect_that_outlives_its_old_link_is_bounded_like_any_way_back() -> None:
    async with Simulation(*encrypted(ttl=20.0)) as sim:
        client, _ = await sim.connect()
        sim.cut()  # after this Retry knows a cause, and sets no limit of its own
        await until(lambda: client.state is State.ATTACHED and client.epoch == 2)
        sim.network.is_down = True
        client.reconnect()
        await anyio.sleep(1)
        sim.cut()
        with anyio.fail_after(80), pytest.raises(SessionLost) as lost:
            await client.receive()
        assert lost.value.reason is LossReason.GAVE_UP
