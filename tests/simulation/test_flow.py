"""Full buffers, slow readers, large messages, odd errors and wrong clocks (F22 to F25, F33, F43, F46, F51)."""

from __future__ import annotations

import errno
import time
from random import Random
from typing import Any

import anyio
import pytest

from towline.errors import BufferFull, ConnectFailed, MessageTooLarge
from towline.layers.encryption import Encryption, Psk
from towline.layers.framing import Framing
from towline.layers.heartbeat import Heartbeat
from towline.layers.resume import Attempt, ClientSession, Resume, Session, State, cost
from towline.layers.retry import Retry
from towline.policies import Backoff
from towline.stack import Stack
from towline.testing._chaos import Cut
from towline.testing._simulation import Simulation, exchange, until

KEY = Psk(bytes(range(32)))
THERE = [b"there %d" % i for i in range(3)]
BACK = [b"back %d" % i for i in range(3)]


def encrypted(**options: Any) -> tuple[Any, ...]:
    return (
        Resume(**options),
        Retry(Backoff.exponential(), random=Random(0)),
        Heartbeat(),
        Framing(),
        Encryption(psk=KEY, max_record_size=4096),
    )


SMALL = {"buffer": 64 << 10, "window": 32 << 10, "max_message": 16 << 10}
MESSAGE = bytes(872)  # it costs 1000


async def fill(session: Session, count: int) -> list[int]:
    """Send up to ``count`` messages, and give how many were taken in the end; it goes on in the background."""
    sent = [0]
    for _ in range(count):
        await session.send(MESSAGE)
        sent[0] += 1
    return sent


class Sender:
    """Sends without end, and counts."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.sent = 0

    async def run(self) -> None:
        while True:
            await self.session.send(b"%08d" % self.sent + MESSAGE[8:])
            self.sent += 1


# --- F22, F23: who does not read -----------------------------------------------------------------------------------


async def test_f22_a_peer_that_stops_reading_holds_its_sender_up_and_nothing_else() -> None:
    async with Simulation(*encrypted(**SMALL)) as sim, anyio.create_task_group() as tasks:
        client, server = await sim.connect()
        sender = Sender(client)
        tasks.start_soon(sender.run)
        await anyio.sleep(600)
        # What the window takes and what the buffer takes, and not a message more.
        assert (64 + 32) * 1024 // 1000 - 2 <= sender.sent <= (64 + 32) * 1024 // 1000
        assert server.core.inbox_cost <= 32 << 10
        assert client.buffered <= 64 << 10
        assert (client.epoch, client.state) == (1, State.ATTACHED)
        await server.send(b"the other direction is free")
        assert await client.receive() == b"the other direction is free"
        for i in range(500):
            assert int((await server.receive())[:8]) == i
        tasks.cancel_scope.cancel()


async def test_f22_credit_used_up_and_all_acknowledged_is_renewed_when_the_application_reads() -> None:
    async with Simulation(*encrypted(**SMALL)) as sim, anyio.create_task_group() as tasks:
        client, server = await sim.connect()
        sender = Sender(client)
        tasks.start_soon(sender.run)
        for _ in range(20):
            await anyio.sleep(60)
            before = sender.sent
            await server.receive_many()
            await anyio.sleep(0.1)
            assert sender.sent > before
        assert client.epoch == 1
        tasks.cancel_scope.cancel()


async def test_f23_two_applications_that_both_write_and_do_not_read_wait_and_go_on_when_one_reads() -> None:
    async with Simulation(*encrypted(**SMALL), capacity=4096) as sim, anyio.create_task_group() as tasks:
        client, server = await sim.connect()
        senders = [Sender(client), Sender(server)]
        for sender in senders:
            tasks.start_soon(sender.run)
        await anyio.sleep(600)
        full = [sender.sent for sender in senders]
        assert client.state is server.state is State.ATTACHED
        assert (client.epoch, server.epoch) == (1, 1)
        for i in range(300):
            assert int((await server.receive())[:8]) == i
        await anyio.sleep(1)
        assert senders[0].sent > full[0]
        assert senders[1].sent == full[1]
        for i in range(300):
            assert int((await client.receive())[:8]) == i
        await anyio.sleep(1)
        assert senders[1].sent > full[1]
        tasks.cancel_scope.cancel()


# --- F24, F25: the buffer -------------------------------------------------------------------------------------------


async def test_f24_a_buffer_that_is_full_while_detached_makes_send_wait_and_drains_after_the_resume() -> None:
    async with Simulation(*encrypted(**SMALL)) as sim, anyio.create_task_group() as tasks:
        client, server = await sim.connect()
        sim.network.is_down = True
        sim.cut()
        await anyio.sleep(1)
        sender = Sender(client)
        tasks.start_soon(sender.run)
        await anyio.sleep(60)
        assert sender.sent == (64 << 10) // 1000
        assert client.state is State.DETACHED
        sim.network.is_down = False
        for i in range(200):
            with anyio.fail_after(120):
                assert int((await server.receive())[:8]) == i
        tasks.cancel_scope.cancel()


async def test_f24_a_send_that_gives_up_waiting_has_not_sent() -> None:
    async with Simulation(*encrypted(**SMALL)) as sim:
        client, server = await sim.connect()
        sim.network.is_down = True
        sim.cut()
        await anyio.sleep(1)
        sent, gave_up = 0, False
        while not gave_up:
            with anyio.move_on_after(5) as scope:
                await client.send(b"%08d" % sent + MESSAGE[8:])
                sent += 1
            gave_up = scope.cancelled_caught
        with pytest.raises(BufferFull) as caught:
            client.send_nowait(MESSAGE)
        assert caught.value.limit == 64 << 10
        sim.network.is_down = False
        received: list[bytes] = []
        with anyio.fail_after(60):
            while len(received) < sent:
                received += await server.receive_many()
        await anyio.sleep(60)
        assert len(received) == sent
        assert not server.core.inbox
        await client.send(b"after")
        assert await server.receive() == b"after"


async def test_f24_senders_that_wait_are_served_in_the_order_of_their_coming() -> None:
    async with Simulation(*encrypted(**SMALL)) as sim:
        client, server = await sim.connect()
        sim.network.is_down = True
        sim.cut()
        await anyio.sleep(1)
        while client.core.has_room(cost(MESSAGE)):
            client.send_nowait(MESSAGE)
        filled = client.core.next - 1
        received: list[bytes] = []
        async with anyio.create_task_group() as tasks:
            for i in range(30):
                tasks.start_soon(client.send, b"%d" % i)
                await anyio.sleep(0.01)
            sim.network.is_down = False
            with anyio.fail_after(60):
                while len(received) < filled + 30:
                    received += await server.receive_many()
        assert received[filled:] == [b"%d" % i for i in range(30)]


async def test_f25_a_message_that_can_never_be_carried_is_refused_at_once_and_not_sent() -> None:
    async with Simulation(*encrypted(**SMALL)) as sim:
        client, server = await sim.connect()
        for session in (client, server):
            began = anyio.current_time()
            for send in (session.send(bytes((16 << 10) + 1)), session.send_many([b"fits", bytes((16 << 10) + 1)])):
                with pytest.raises(MessageTooLarge) as caught:
                    await send
                assert (caught.value.size, caught.value.limit) == ((16 << 10) + 1, 16 << 10)
            assert anyio.current_time() == began
            await session.send(bytes(16 << 10))
        with anyio.fail_after(5):
            assert await server.receive() == bytes(16 << 10)
            assert await client.receive() == bytes(16 << 10)


async def test_f25_the_smaller_of_both_ends_limits_is_the_limit() -> None:
    small = Stack(*encrypted(**SMALL))
    async with Simulation(*encrypted()) as sim:
        small.transports = (sim.network,)
        async with small.open() as opened:
            client: ClientSession = await opened.connect(sim.endpoint)
            server = await sim.accepted()
            assert client.max_message == server.max_message == 16 << 10
            with pytest.raises(MessageTooLarge):
                await server.send(bytes(20_000))
            await exchange(client, server, THERE, BACK)


# --- F33: clocks ----------------------------------------------------------------------------------------------------


async def test_f33_a_wall_clock_that_jumps_by_days_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    wall = [1_700_000_000.0]
    monkeypatch.setattr(time, "time", lambda: wall[0])
    monkeypatch.setattr(time, "time_ns", lambda: int(wall[0] * 1e9))
    async with Simulation(*encrypted(ttl=60)) as sim:
        client, server = await sim.connect()
        for jump in (86_400, -86_400, 3600, -1e9, 1e9):
            wall[0] += jump
            await anyio.sleep(20)
            assert (client.state, server.state, client.epoch) == (State.ATTACHED, State.ATTACHED, 1)
        sim.network.is_down = True
        sim.cut()
        for jump in (86_400, -86_400):
            await anyio.sleep(20)
            wall[0] += jump
        sim.network.is_down = False
        await exchange(client, server, THERE, BACK)


# --- F43: links that do not last ------------------------------------------------------------------------------------


async def test_f43_two_hundred_links_of_one_second_carry_everything_and_leave_nothing_behind() -> None:
    async with Simulation(*encrypted(), cuts=[Cut(seconds=1.0)] * 200) as sim:
        client, server = await sim.connect()
        tasks = len(anyio.get_running_tasks())
        sent = 0
        received: list[bytes] = []
        with anyio.fail_after(3600):
            while sim.chaos.cuts < 200:
                await client.send(b"%d" % sent)
                sent += 1
                await anyio.sleep(0.3)
                if server.core.inbox:
                    received += await server.receive_many()
        with anyio.fail_after(60):
            while len(received) < sent:
                received += await server.receive_many()
        assert received == [b"%d" % i for i in range(sent)]
        assert client.statistics.resumes == 200
        assert len(anyio.get_running_tasks()) == tasks
        assert len(sim.server._links) == 1
        # Each link carried something, so none was waited for: 200 seconds of life and not much more.
        assert sim.network.dials[-1] - sim.network.dials[0] < 200 * 1.3
        await exchange(client, server, THERE, BACK)


async def test_f43_links_that_carry_nothing_are_redialled_ever_more_slowly() -> None:
    async with Simulation(*encrypted(), cuts=[Cut(seconds=1.0)] * 60) as sim:
        client, server = await sim.connect()
        await anyio.sleep(600)
        dials = sim.network.dials
        assert dials[3] - dials[0] < 10
        assert dials[-1] - dials[-11] > 100
        assert client.state is not State.LOST
        sim.calm()
        await exchange(client, server, THERE, BACK)


async def test_f43_every_attempt_on_the_way_back_is_an_event_with_its_number_delay_and_cause() -> None:
    async with Simulation(*encrypted()) as sim:
        client, _ = await sim.connect()
        events: list[Attempt] = []

        async def follow() -> None:
            async for event in client.events():
                if isinstance(event, Attempt):
                    events.append(event)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(follow)
            sim.network.is_down = True
            sim.cut()
            await anyio.sleep(60)
            tasks.cancel_scope.cancel()
        assert [event.number for event in events] == list(range(1, len(events) + 1))
        assert len(events) >= 5
        assert events[0].delay <= 0.1
        assert isinstance(events[-1].cause, ConnectFailed)


# --- F46, F51: drivers ----------------------------------------------------------------------------------------------

ODD = [
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.EHOSTUNREACH,
    errno.EHOSTDOWN,
    errno.ETIMEDOUT,
    errno.ECONNABORTED,
    errno.ECONNRESET,
    errno.EPIPE,
    errno.EPROTOTYPE,
    errno.EBADF,
    errno.ENOBUFS,
    errno.EINVAL,
    10053,
    10054,
    10060,
    121,
    109,
    232,
    64,
]


@pytest.mark.parametrize("operation", ["read", "write"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_f46_any_error_of_the_system_on_a_link_detaches_and_is_retried(
    operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Simulation(*encrypted()) as sim:
        client, server = await sim.connect()
        for i, number in enumerate(ODD, 1):
            driver = sim.chaos.drivers[-1]

            async def fail(*_: object, number: int = number) -> bytes:
                raise OSError(number, "an odd error")

            def fail_now(*_: object, number: int = number) -> None:
                raise OSError(number, "an odd error")

            if operation == "read":
                monkeypatch.setattr(driver, "read", fail)
                await server.send(b"%d" % i)  # the read that waits returns, and the next one fails
            else:
                monkeypatch.setattr(driver, "write", fail)
                monkeypatch.setattr(driver, "write_now", fail_now)
                await client.send(b"%d" % i)
            await anyio.sleep(5)
            assert client.statistics.resumes == i, errno.errorcode.get(number, number)
            assert client.state is server.state is State.ATTACHED
        receiver = client if operation == "read" else server
        assert await receiver.receive_many() == [b"%d" % i for i in range(1, len(ODD) + 1)]
        await exchange(client, server, THERE, BACK)


async def test_f46_any_error_of_the_system_while_dialling_is_retried() -> None:
    async with Simulation(*encrypted()) as sim:
        client, server = await sim.connect()
        sim.network.errors = [OSError(number, "an odd error") for number in ODD]
        sim.cut()
        await until(lambda: client.statistics.resumes == 1, within=600)
        assert sim.network.errors == []
        await exchange(client, server, THERE, BACK)


async def test_f51_a_transport_that_takes_one_byte_at_a_time_doubles_and_loses_none() -> None:
    async with Simulation(*encrypted(), capacity=1, chunk=1) as sim:
        client, server = await sim.connect()
        await exchange(client, server, THERE, BACK)
        assert client.epoch == 1


@pytest.mark.parametrize("at", [0, 1, 40, 80, 100, 130, 170, 190])
async def test_f51_a_transport_that_stalls_for_six_seconds_in_the_handshake_costs_a_retry_at_most(
    at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Simulation(*encrypted(), capacity=1, chunk=1) as sim:
        from towline.transports.memory import MemoryDriver

        stalled: list[MemoryDriver] = []
        write = MemoryDriver.write

        async def stalling(self: MemoryDriver, data: bytes | bytearray) -> None:
            if not stalled and self.accepted + len(data) > at:
                stalled.append(self)
                await write(self, data[: at - self.accepted])
                data = data[at - self.accepted :]
                await anyio.sleep(6)
            await write(self, data)

        monkeypatch.setattr(MemoryDriver, "write", stalling)
        monkeypatch.setattr(MemoryDriver, "inline", False)  # so that every byte goes that way
        with anyio.fail_after(30):
            client, server = await sim.connect()
        assert stalled
        await exchange(client, server, THERE, BACK)
