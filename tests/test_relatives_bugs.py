"""The faults of a close relative, one test each (W1 to W17 of our notes on it), as far as they could exist here.

Each of them would have failed on that library, for the reason its docstring gives.
"""

from __future__ import annotations

import os
from random import Random
from typing import Any

import anyio
import pytest

from towline.errors import HandshakeFailed, HandshakeRefused, LinkLost, LossReason, SessionLost, TowlineError
from towline.layers.encryption import Encryption, Psk
from towline.layers.framing import Framing
from towline.layers.heartbeat import Heartbeat
from towline.layers.resume import Detached, MemoryStore, Resume, ServerSession, State
from towline.layers.resume._wire import Ack, NewSession
from towline.layers.retry import Retry
from towline.policies import Backoff
from towline.stack import Stack
from towline.stage import Driver
from towline.testing._chaos import Cut
from towline.testing._raw import RawPeer
from towline.testing._simulation import Simulation, exchange, gather, until

KEY = Psk(bytes(range(32)))
CREDIT = 8 << 20


def encrypted(**options: Any) -> tuple[Any, ...]:
    return (*plain(**options), Encryption(psk=KEY, max_record_size=4096))


def plain(**options: Any) -> tuple[Any, ...]:
    return Resume(**options), Retry(Backoff.exponential(), random=Random(0)), Heartbeat(), Framing()


async def attached(client: Any) -> None:
    await until(lambda: client.state is State.ATTACHED)


async def test_w1_heartbeats_take_no_number_so_an_idle_hour_before_a_cut_loses_nothing() -> None:
    """There, encrypted heartbeats were counted by the receiver only, and each cost a message at the next resume."""
    async with Simulation(*encrypted()) as sim:
        client, server = await sim.connect()
        for idle in (60, 600, 3600):
            await anyio.sleep(idle)
            assert client.core.recv == server.core.recv
            for i in range(20):
                await server.send(b"%d" % i)
                await client.send(b"%d" % i)
            sim.cut()
            with anyio.fail_after(60):
                for session in (client, server):
                    assert [await session.receive() for _ in range(20)] == [b"%d" % i for i in range(20)]
        assert client.statistics.duplicates == server.statistics.duplicates == 0


async def test_w2_a_half_open_link_does_not_stand_in_the_way_of_its_successor() -> None:
    """There, the server waited for the old connection's state, which only its end would have freed."""
    async with Simulation(*encrypted()) as sim:
        client, server = await sim.connect()
        old = server.attachment
        assert old is not None
        for attempt in range(1, 6):
            sim.cut("blackhole")  # the server sees nothing at all
            client.reconnect()
            began = anyio.current_time()

            def has_returned(epoch: int = attempt + 1) -> bool:
                return client.epoch == epoch and client.state is State.ATTACHED

            await until(has_returned, within=1)
            assert anyio.current_time() - began <= 0.2
        await anyio.sleep(2)
        assert len(sim.server._links) == 1
        await exchange(client, server, [b"a"], [b"b"])


@pytest.mark.parametrize("chunk", [7, 1000, 8192, 8193])
async def test_w3_a_replay_that_arrives_in_many_reads_stays_in_order(chunk: int) -> None:
    """There, six frames of 3000 bytes, read 8 KiB at a time, came out in another order or not at all."""
    there = [b"%d" % i + bytes(2999) for i in range(6)]
    async with Simulation(*encrypted(), chunk=chunk) as sim:
        client, server = await sim.connect()
        for _ in range(3):
            sim.network.is_down = True
            sim.cut()
            await anyio.sleep(0.5)
            for message in there:
                await client.send(message)
                await server.send(message)
            sim.network.is_down = False
            with anyio.fail_after(60):
                assert [await server.receive() for _ in there] == there
                assert [await client.receive() for _ in there] == there


async def test_w3b_both_ends_may_have_more_to_replay_than_the_transport_holds() -> None:
    """There, a replay beyond the socket's buffer failed the resume, or both ends wrote and neither read."""
    message = bytes(5000)
    async with Simulation(*encrypted(), capacity=1024) as sim:
        client, server = await sim.connect()
        sim.network.is_down = True
        sim.cut()
        await anyio.sleep(0.5)
        for session in (client, server):
            for _ in range(100):
                await session.send(message)
        sim.network.is_down = False
        with anyio.fail_after(30):
            await gather(client.flush, server.flush)
        assert len(client.core.inbox) == len(server.core.inbox) == 100
        assert client.statistics.resumes == 1


async def test_w4_two_resumes_with_a_replay_between_them_count_each_message_once() -> None:
    """There, a replayed message was counted twice, so that the next resume left as many out."""
    async with Simulation(*encrypted()) as sim:
        client, server = await sim.connect()
        sent = 0
        for burst in (8, 3, 5, 1, 13):
            sim.network.is_down = True
            sim.cut()
            await anyio.sleep(0.5)
            for _ in range(burst):
                await server.send(b"%d" % sent)
                sent += 1
            sim.network.is_down = False
            await attached(client)
            await anyio.sleep(0.05)  # it has arrived, and its ack is not under way
            assert client.core.recv == server.core.next - 1 == sent
        received: list[bytes] = []
        while len(received) < sent:
            received += await client.receive_many()
        assert received == [b"%d" % i for i in range(sent)]
        await exchange(client, server, [b"a"], [b"b"])


async def test_w4b_an_attempt_that_is_cancelled_in_its_handshake_takes_no_state_with_it() -> None:
    """There, buffers and counters were moved into the attempt, and gone when a timeout dropped it."""
    async with Simulation(*encrypted(ttl=3600)) as sim:
        client, server = await sim.connect()
        sim.chaos._cuts = iter([Cut(sent=at, how="blackhole") for at in range(10, 250, 12)])
        sim.cut()
        await anyio.sleep(0.001)
        await client.send(b"kept")
        await server.send(b"kept, too")
        while len(sim.chaos.drivers) < 22:
            client.reconnect()  # cancels the attempt that hangs
            await anyio.sleep(0.15)
            assert client.core.replay.unacked() in ([b"kept"], [])
        with anyio.fail_after(120):
            assert await server.receive() == b"kept"
            assert await client.receive() == b"kept, too"
        await exchange(client, server, [b"a"], [b"b"])


async def test_w5_a_consumer_that_has_gone_stands_in_nobodys_way() -> None:
    """There, an answer for a caller that had given up locked the whole client until a sweep a minute later."""
    async with Simulation(*encrypted()) as sim:
        client, server = await sim.connect()
        for _ in range(5):
            with anyio.move_on_after(1):
                await client.receive()
        await server.send(b"late")
        other, other_server = await sim.connect()
        await exchange(other, other_server, [b"a"], [b"b"])
        await client.send(b"still there")
        assert await server.receive() == b"still there"
        assert await client.receive() == b"late"


async def test_w6_a_heartbeat_is_read_when_it_arrives_and_ends_no_link_unclean() -> None:
    """There, a frame without a payload was not looked at before more bytes came, and made a clean end unclean."""
    async with Simulation(*plain()) as sim:
        client, server = await sim.connect()
        await anyio.sleep(5.01)
        assert client.rtt is not None
        assert client.rtt < 0.01
        peer = await RawPeer.dial(sim.memory, sim.endpoint)
        await peer.new()
        await peer.send(Ack(0, CREDIT))
        session = await sim.accepted()
        await peer.send_raw(b"\x80\x00\x00\x09\x20" + bytes(8))
        await peer.driver.send_eof()
        await until(lambda: session.state is State.DETACHED)
        reasons = [str(event.reason) for event in session.log._events if isinstance(event, Detached)]
        assert reasons == ["the peer closed the link"]
        assert server.state is State.ATTACHED


async def test_w7_a_resume_whose_answer_is_lost_again_and_again_locks_nobody_out() -> None:
    """There, each resume changed a one-time password at both ends, which a cut in the middle left different."""
    lost = [Cut(received=at) for at in range(40, 170, 3)]
    async with Simulation(*encrypted(ttl=3600), cuts=[Cut(seconds=1), *lost]) as sim:
        client, server = await sim.connect()
        await anyio.sleep(2)
        await exchange(client, server, [b"a"], [b"b"], within=3000)
        assert sim.chaos.cuts > 40


async def test_w8_sessions_that_nobody_comes_back_to_are_forgotten() -> None:
    """There, they were kept for ever, with up to 256 MiB each."""
    async with Simulation(*encrypted(ttl=60, tombstone_ttl=120)) as sim:
        servers: list[ServerSession] = []
        for _ in range(50):
            client, server = await sim.connect()
            await client.send(b"x")
            await anyio.sleep(0.01)
            servers.append(server)
            sim.network.is_down = True
            client.drop_link(LinkLost("gone"))
            client.lose(client.loss(LossReason.LOCAL_ABORT))
            sim.network.is_down = False
        assert len(sim.server.sessions) == 50
        await anyio.sleep(61)
        assert sim.server.sessions == []
        for server in servers:
            assert await server.receive() == b"x"
            with pytest.raises(SessionLost):
                await server.receive()


async def test_w8_detached_sessions_are_bounded_in_number_and_in_bytes() -> None:
    async with Simulation(*plain(new_store=lambda: MemoryStore(max_detached=5, max_bytes=50_000))) as sim:
        sessions: list[ServerSession] = []
        for _ in range(10):
            peer = await RawPeer.dial(sim.memory, sim.endpoint)
            await peer.new()
            await peer.send(Ack(0, CREDIT))
            session = await sim.accepted()
            await session.send(bytes(9_000))
            await anyio.sleep(0.01)
            peer.driver.abort()
            await anyio.sleep(1)
            sessions.append(session)
        left = sim.server.sessions
        assert left == sessions[-5:]
        assert sum(session.held for session in left) <= 50_000


@pytest.mark.parametrize("length", [1 << 31, (1 << 32) - 1, (1 << 31) - 1, 1 << 24])
async def test_w9_an_announced_length_allocates_nothing_and_hurts_nobody_else(length: int) -> None:
    """There, a length near the largest number overflowed, and any other made a buffer grow without a limit."""
    async with Simulation(*plain()) as sim:
        client, server = await sim.connect()
        for before_session in (True, False):
            peer = await RawPeer.dial(sim.memory, sim.endpoint)
            if not before_session:
                await peer.new()
                await peer.send(Ack(0, CREDIT))
                length = max(length, (1 << 24) + 1)
            await peer.send_raw(length.to_bytes(4, "big"))

            async def read(peer: RawPeer = peer) -> None:
                while True:
                    await peer.receive()

            with pytest.raises((LinkLost, anyio.EndOfStream)), anyio.fail_after(1):
                await read()
        await exchange(client, server, [b"a"], [b"b"])


async def test_w10_no_end_falls_back_to_plaintext_or_to_another_stack() -> None:
    """There, an empty offer in a handshake that nobody authenticated made both ends go on without encryption."""
    for ours, theirs in [(encrypted(), plain()), (plain(), encrypted())]:
        async with Simulation(*theirs) as sim, Stack(*ours, transports=(sim.network,)).open() as opened:
            with pytest.raises((HandshakeFailed, LinkLost)), anyio.fail_after(60):
                await opened.connect(sim.endpoint)
            assert sim.server.sessions == []


async def test_w10_another_key_is_refused() -> None:
    other = (*plain(), Encryption(psk=Psk(bytes(range(1, 33)))))
    async with Simulation(*encrypted()) as sim, Stack(*other, transports=(sim.network,)).open() as opened:
        with pytest.raises(HandshakeRefused), anyio.fail_after(60):
            await opened.connect(sim.endpoint)


@pytest.mark.parametrize("fault", ["doubled", "left out", "exchanged", "reflected", "changed"])
async def test_w11_a_record_that_is_replayed_left_out_reordered_reflected_or_changed_is_never_read(fault: str) -> None:
    """There, nothing in a record said which one it was, nor whose: captured requests were carried out again."""
    async with Simulation(*encrypted()) as sim:
        client, server = await sim.connect()
        driver: Driver = sim.chaos.drivers[0]
        written: list[bytes] = []
        forward = driver.write_now

        def tamper(data: bytes | bytearray) -> None:
            written.append(bytes(data))

        driver.write_now = tamper  # type: ignore[method-assign]
        await client.send(b"pay 1")
        await anyio.sleep(0.001)
        await client.send(b"pay 2")
        await anyio.sleep(0.001)
        first, second = written[:2]
        for record in {
            "doubled": [first, first, second],
            "left out": [second],
            "exchanged": [second, first],
            "reflected": [],
            "changed": [first[:-1] + bytes([first[-1] ^ 1]), second],
        }[fault]:
            forward(record)
        if fault == "reflected":
            sim.chaos.drivers[0]._inner._incoming.put(first)  # type: ignore[attr-defined]
        with anyio.fail_after(60):
            assert [await server.receive() for _ in range(2)] == [b"pay 1", b"pay 2"]
        assert client.statistics.resumes == 1
        await anyio.sleep(10)
        assert not server.core.inbox
        assert not client.core.inbox


async def test_w12_what_is_sent_has_the_same_size_on_the_wire_whatever_it_says() -> None:
    """There, messages were compressed, so their content showed in their length."""
    sizes: set[int] = set()
    for content in (bytes(5000), os.urandom(5000)):
        async with Simulation(*encrypted()) as sim:
            client, _ = await sim.connect()
            before = sim.chaos.drivers[0]._sent
            await client.send(content)
            await anyio.sleep(0.01)
            sizes.add(sim.chaos.drivers[0]._sent - before)
    assert len(sizes) == 1


async def test_w13_ids_are_not_guessable_and_no_secret_shows_in_a_text() -> None:
    """There, an id was a 32-bit number, a collision overwrote a session, and keys showed when printed."""
    async with Simulation(*encrypted()) as sim:
        pairs = [await sim.connect() for _ in range(20)]
        ids = {server.session_id for _, server in pairs}
        keys = {server.key for _, server in pairs}
        assert len(ids) == len(keys) == 20
        assert {len(each) for each in ids} == {16}
        for client, server in pairs:
            note = NewSession(b"i" * 16, server.session_id, server.key, 1, 1, 1)
            for thing in (client, server, note, sim.server, sim.stack):
                assert repr(server.key) not in repr(thing)
                assert server.key.hex() not in repr(thing)
                assert repr(bytes(range(32))) not in repr(thing)


async def test_w14_the_way_back_ends_at_once_when_the_application_says_so() -> None:
    """There, the loop that reconnected ignored a shutdown, and fatal errors were tried again for ever."""
    async with Simulation(*encrypted()) as sim:
        began = anyio.current_time()
        async with sim.stack.open() as opened:
            client = await opened.connect(sim.endpoint)
            sim.network.is_down = True
            client.drop_link(LinkLost("cut"))
            await anyio.sleep(40)
        assert anyio.current_time() - began == pytest.approx(40, abs=1)
        dials = len(sim.network.dials)
        await anyio.sleep(1000)
        assert len(sim.network.dials) == dials


async def test_w14_a_first_connect_is_tried_again_too() -> None:
    async with Simulation(*encrypted()) as sim:
        sim.network.is_down = True

        async def heal() -> None:
            await anyio.sleep(8)
            sim.network.is_down = False

        async def connect() -> None:
            client, server = await sim.connect()
            await exchange(client, server, [b"a"], [b"b"])

        with anyio.fail_after(40):
            await gather(heal, connect)


async def test_w15_a_client_that_goes_leaves_no_task_and_no_link() -> None:
    """There, a client that was dropped left its task and its socket behind."""
    async with Simulation(*encrypted(ttl=1)) as sim:
        tasks = len(anyio.get_running_tasks())
        for how in ("close", "error", "drop"):
            try:
                async with sim.stack.open() as opened:
                    client = await opened.connect(sim.endpoint)
                    if how == "close":
                        await client.aclose()
                    elif how == "error":
                        raise KeyError
            except KeyError:
                pass
        sim.over.set()
        await anyio.sleep(100)
        assert sim.server.sessions == []
        assert len(sim.server._links) == 0
        assert len(anyio.get_running_tasks()) == tasks


async def test_w16_an_idle_session_does_nothing_but_its_heartbeats() -> None:
    """There, loops woke up every millisecond."""
    async with Simulation(*encrypted()) as sim:
        client, _ = await sim.connect()
        await anyio.sleep(10)
        driver = sim.chaos.drivers[0]
        before = driver._sent + driver._received
        await anyio.sleep(3500)  # within the age of a key
        heartbeats = (driver._sent + driver._received - before) / 40
        assert heartbeats <= 4 * 3500 / 5
        assert client.epoch == 1


async def test_w16_many_messages_share_a_write() -> None:
    async with Simulation(*encrypted()) as sim:
        client, server = await sim.connect()
        writes = 0
        driver = sim.chaos.drivers[0]
        write, write_now = driver.write, driver.write_now

        async def count(data: bytes | bytearray) -> None:
            nonlocal writes
            writes += 1
            await write(data)

        def count_now(data: bytes | bytearray) -> None:
            nonlocal writes
            writes += 1
            write_now(data)

        driver.write, driver.write_now = count, count_now  # type: ignore[method-assign]
        for i in range(1000):
            await client.send(b"%d" % i)
        with anyio.fail_after(1):
            assert [await server.receive() for _ in range(1000)] == [b"%d" % i for i in range(1000)]
        assert writes < 20


async def test_w17_what_a_request_asks_is_done_once_however_often_the_link_is_lost() -> None:
    """There, a resume that had lost its count carried requests out twice, or never, and nobody saw."""
    done: list[bytes] = []

    async def handler(session: Any) -> None:
        async for request in session:
            done.append(request)
            await session.send(b"done " + request)

    async with Simulation(*encrypted(), handler=handler, seed=17, mean=700) as sim:
        client = await sim.dial()
        for i in range(200):
            await client.send(b"%d" % i)
            with anyio.fail_after(600):
                assert await client.receive() == b"done %d" % i
        assert sim.chaos.cuts > 20
        assert done == [b"%d" % i for i in range(200)]


async def test_errors_of_a_lost_connection_are_ours() -> None:
    async with Simulation(*encrypted()) as sim:
        await sim.kill_server()
        with pytest.raises(TowlineError), anyio.fail_after(60):
            await sim.dial()
