"""A link may be cut at any byte, in either direction, in any way: nothing is lost, doubled or reordered (F1 to F7)."""

from __future__ import annotations

from random import Random
from typing import Any

import anyio
import pytest

from towline.layers.encryption import Encryption, Psk
from towline.layers.framing import Framing
from towline.layers.heartbeat import Heartbeat
from towline.layers.resume import Resume, State
from towline.layers.retry import Retry
from towline.policies import Backoff
from towline.testing._chaos import Cut, How
from towline.testing._simulation import Simulation, exchange, until

KEY = Psk(bytes(range(32)))
THERE = [b"there %d" % i for i in range(3)]
BACK = [b"back %d" % i for i in range(3)]


def encrypted() -> tuple[Any, ...]:
    """The full stack, with small records, so that a cut can split a batch."""
    return (
        Resume(),
        Retry(Backoff.exponential(), random=Random(0)),
        Heartbeat(),
        Framing(),
        Encryption(psk=KEY, max_record_size=4096),
    )


async def three_messages(*cuts: Cut, chunk: int | None = None) -> Simulation:
    async with Simulation(*encrypted(), cuts=cuts, chunk=chunk) as sim:
        with anyio.fail_after(600):
            client, server = await sim.connect()
        await exchange(client, server, THERE, BACK)
        assert client.statistics.duplicates == server.statistics.duplicates == 0
    return sim


async def bytes_of_three_messages() -> tuple[int, int]:
    (driver,) = (await three_messages()).chaos.drivers
    return driver._sent, driver._received


async def bytes_of_a_first_handshake() -> tuple[int, int]:
    async with Simulation(*encrypted()) as sim:
        await sim.connect()
        (driver,) = sim.chaos.drivers
        return driver._sent, driver._received


async def bytes_of_a_second_handshake() -> tuple[int, int]:
    async with Simulation(*encrypted()) as sim:
        client, _ = await sim.connect()
        sim.cut()
        await anyio.sleep(5)
        assert client.state is State.ATTACHED
        driver = sim.chaos.drivers[1]
        return driver._sent, driver._received


# --- F1, F2 ---------------------------------------------------------------------------------------------------------


async def test_f1_a_link_may_be_reset_at_any_byte_that_the_client_sends() -> None:
    sent, _ = await bytes_of_three_messages()
    cuts = 0
    for at in range(sent):
        cuts += (await three_messages(Cut(sent=at))).chaos.cuts
    assert cuts > sent - 40  # a client that has all it needs may leave before the last bytes


async def test_f1_a_link_may_be_reset_at_any_byte_that_the_client_receives() -> None:
    _, received = await bytes_of_three_messages()
    cuts = 0
    for at in range(received):
        cuts += (await three_messages(Cut(received=at))).chaos.cuts
    assert cuts > received - 40


@pytest.mark.parametrize(("how", "step"), [("close", 1), ("blackhole", 3)])
@pytest.mark.parametrize("direction", ["sent", "received"])
async def test_f1_a_link_may_end_quietly_at_any_byte(how: How, step: int, direction: str) -> None:
    """A reset drops what is under way; here all that was sent before the cut arrives."""
    sent, received = await bytes_of_three_messages()
    for at in range(0, sent if direction == "sent" else received, step):
        await three_messages(Cut(sent=at, how=how) if direction == "sent" else Cut(received=at, how=how))


@pytest.mark.parametrize("chunk", [1, 2, 7])
async def test_f1_it_does_not_matter_in_what_pieces_the_bytes_arrive(chunk: int) -> None:
    sent, received = await bytes_of_three_messages()
    for at in range(chunk, sent, 29):
        await three_messages(Cut(sent=at), chunk=chunk)
    for at in range(chunk, received, 29):
        await three_messages(Cut(received=at), chunk=chunk)


async def test_f2_a_frame_that_is_cut_in_its_middle_is_dropped_and_sent_again_once() -> None:
    """In its header, after it, in the payload, at the last byte; of 20 000 bytes, which are several records."""
    message = bytes(20_000)
    start, _ = await bytes_of_a_first_handshake()
    async with Simulation(*encrypted()) as sim:
        client, _ = await sim.connect()
        await client.send(message)
        await anyio.sleep(0.001)
        total = sim.chaos.drivers[0]._sent
        assert total > 20_000
    for at in (start + 1, start + 2, start + 18, start + 40, start + 4096, start + 4130, start + 9_999, total - 1):
        async with Simulation(*encrypted(), cuts=[Cut(sent=at)]) as sim:
            client, server = await sim.connect()
            await client.send(message)
            with anyio.fail_after(60):
                assert await server.receive() == message
                await client.flush()
            assert client.statistics.resumes == client.statistics.replayed == 1, at
            assert server.statistics.duplicates == 0
            assert not server.core.inbox


async def test_f2_the_messages_of_a_flush_that_arrived_before_a_cut_are_not_sent_again() -> None:
    """A flush of many records is cut in its middle: what came through stays, and only the rest is replayed."""
    start, _ = await bytes_of_a_first_handshake()
    messages = [b"%04d" % i + bytes(996) for i in range(40)]
    for at in range(start + 500, start + 40_000, 1777):
        async with Simulation(*encrypted(), cuts=[Cut(sent=at, how="close")]) as sim:
            client, server = await sim.connect()
            await client.send_many(messages)
            received: list[bytes] = []
            with anyio.fail_after(60):
                while len(received) < len(messages):
                    received += await server.receive_many()
            assert received == messages
            assert client.statistics.replayed <= 40 - (at - start) // 1100 + 4  # records of 4 KiB hold four
            assert server.statistics.duplicates == 0


# --- F3, F4 ---------------------------------------------------------------------------------------------------------


async def test_f3_a_cut_anywhere_in_the_first_handshake_leaves_one_session_and_no_remains() -> None:
    sent, received = await bytes_of_a_first_handshake()
    cuts = [Cut(sent=at) for at in range(0, sent, 2)] + [Cut(received=at) for at in range(0, received, 2)]
    for cut in cuts:
        async with Simulation(*encrypted(), cuts=[cut]) as sim:
            with anyio.fail_after(60):
                client, server = await sim.connect()
            await anyio.sleep(12)  # an embryo whose client never answered is forgotten
            assert list(sim.server.sessions) == [server]
            assert client.state is server.state is State.ATTACHED


async def test_f3_a_session_survives_that_its_first_acknowledgement_falls_into_a_black_hole() -> None:
    """Heartbeat finds the black hole after 15 s; the server must still know the session then."""
    sent, _ = await bytes_of_a_first_handshake()
    for at in range(sent - 60, sent + 20, 4):
        async with Simulation(*encrypted(), cuts=[Cut(sent=at, how="blackhole")]) as sim:
            with anyio.fail_after(120):
                client = await sim.dial()
                await client.send(b"hello")
                server = await sim.accepted()
                assert await server.receive() == b"hello"
            assert client.state is State.ATTACHED


@pytest.mark.parametrize("how", ["reset", "blackhole"])
async def test_f4_a_cut_anywhere_in_the_resuming_handshake_loses_nothing_and_locks_nobody_out(how: How) -> None:
    """The loss of RESUMED is among them: the next attempt has a higher epoch, and that is all."""
    sent, received = await bytes_of_a_second_handshake()
    step = 2 if how == "reset" else 5
    second = [Cut(sent=at, how=how) for at in range(0, sent, step)]
    second += [Cut(received=at, how=how) for at in range(0, received, step)]
    for cut in second:
        async with Simulation(*encrypted(), cuts=[Cut(seconds=1.0), cut]) as sim:
            client, server = await sim.connect()
            await client.send(b"before")
            assert await server.receive() == b"before"
            await anyio.sleep(0.999)
            await client.send(b"there 0")
            await server.send(b"back 0")
            await anyio.sleep(0.5)
            with anyio.fail_after(120):
                assert await server.receive() == b"there 0"
                assert await client.receive() == b"back 0"
                await client.flush()
                await server.flush()
            assert client.epoch >= 2
            assert client.statistics.duplicates == server.statistics.duplicates == 0
            await exchange(client, server, [b"there 1"], [b"back 1"])


async def test_f4_resumed_may_be_lost_many_times_in_a_row() -> None:
    _, received = await bytes_of_a_second_handshake()
    lost = [Cut(received=received - 50 + i) for i in range(20)]
    async with Simulation(*encrypted(), cuts=[Cut(seconds=1.0), *lost]) as sim:
        client, server = await sim.connect()
        await anyio.sleep(1.5)
        await exchange(client, server, THERE, BACK)
        assert sim.chaos.cuts == 21
        assert server.epoch >= 21


# --- F5, F6, F7 -----------------------------------------------------------------------------------------------------


async def replayed_under_cuts(k: int, repeats: int, *, count: int = 12) -> None:
    """``count`` messages wait for a replay that is cut after about ``k`` of them, again and again."""
    size = 1500
    messages = [b"%04d" % i + bytes(size - 4) for i in range(count)]
    first, _ = await bytes_of_a_second_handshake()
    cuts = [Cut(seconds=1.0)] + [Cut(sent=first + 60 + k * (size + 8))] * repeats
    async with Simulation(*encrypted(), cuts=cuts) as sim:
        client, server = await sim.connect()
        await anyio.sleep(0.9)
        sim.network.is_down = True
        await anyio.sleep(0.2)
        for message in messages:
            await client.send(message)
        sim.network.is_down = False
        received: list[bytes] = []
        before = 0
        with anyio.fail_after(3600):
            while len(received) < count:
                received += await server.receive_many()
                assert server.core.recv >= before
                before = server.core.recv
        assert received == messages
        assert server.statistics.duplicates == 0
        await exchange(client, server, THERE, BACK)


async def test_f5_a_replay_that_is_cut_again_and_again_makes_progress() -> None:
    for k in range(1, 12):
        await replayed_under_cuts(k, 50)


async def test_f5_a_replay_that_never_gets_anywhere_goes_on_when_the_link_lives() -> None:
    await replayed_under_cuts(0, 30)


async def test_f6_two_full_sides_replay_8_mib_each_at_once_over_a_transport_that_holds_4_kib() -> None:
    message = bytes(64 << 10)
    count = (8 << 20) // (len(message) + 128)
    async with Simulation(*encrypted(), capacity=4096) as sim:
        client, server = await sim.connect()
        sim.network.is_down = True
        sim.cut()
        await anyio.sleep(1)
        for session in (client, server):
            for _ in range(count):
                session.send_nowait(message)
            assert session.state is State.DETACHED
        sim.network.is_down = False
        received = {client: 0, server: 0}

        with anyio.fail_after(300):
            while received != {client: count, server: count}:
                for session in (client, server):
                    if session.core.inbox:
                        received[session] += len(await session.receive_many())
                await anyio.sleep(0.01)
        assert client.statistics.resumes == 1
        await exchange(client, server, THERE, BACK)


async def test_f7_an_acknowledgement_that_is_lost_costs_no_message() -> None:
    """Cut after the delivery and before the ack, which comes 0.2 s later: the resume itself is the ack."""
    async with Simulation(*encrypted()) as sim:
        client, server = await sim.connect()
        await client.send(b"hello")
        await anyio.sleep(0.1)
        assert await server.receive() == b"hello"
        assert client.buffered > 0
        sim.cut()
        await until(lambda: client.statistics.resumes == 1)
        assert client.buffered == 0
        assert client.statistics.replayed == server.statistics.duplicates == 0
        await exchange(client, server, THERE, BACK)


# --- quiet sessions, other stacks -----------------------------------------------------------------------------------


async def test_f44_a_session_that_never_carried_a_message_resumes_like_any_other() -> None:
    async with Simulation(*encrypted()) as sim:
        client, server = await sim.connect()
        await anyio.sleep(60)
        sim.cut("close")
        await anyio.sleep(60)
        assert client.state is server.state is State.ATTACHED
        assert client.statistics.resumes == 1
        await exchange(client, server, THERE, BACK)


async def test_f45_resumes_without_traffic_between_them_deliver_nothing_twice() -> None:
    async with Simulation(*encrypted()) as sim:
        client, server = await sim.connect()
        await client.send(b"once")
        await server.send(b"once, too")
        await anyio.sleep(1)
        for _ in range(10):
            sim.cut()
            await anyio.sleep(40)
        assert client.statistics.resumes == 10
        assert list(server.core.inbox) == [b"once"]
        assert list(client.core.inbox) == [b"once, too"]
        assert client.statistics.replayed == 0


@pytest.mark.parametrize(
    "layers",
    [
        (Resume(), Framing()),
        (Resume(), Retry(Backoff.exponential()), Framing()),
        (Resume(), Heartbeat(), Framing()),
        (Resume(), Framing(), Encryption(psk=KEY)),
        (Resume(), Heartbeat(), Framing(), Encryption(psk=KEY)),
        (Resume(), Heartbeat(), Retry(Backoff.exponential()), Framing(), Encryption(psk=KEY)),
    ],
    ids=lambda layers: "-".join(type(layer).__name__ for layer in layers),
)
async def test_f50_layers_that_are_left_out_or_exchanged_take_only_their_own_promise_away(
    layers: tuple[Any, ...],
) -> None:
    async with Simulation(*layers, cuts=[Cut(sent=250), Cut(received=300), Cut(seconds=0.5)]) as sim:
        client, server = await sim.connect()
        there = [b"%d" % i + bytes(100) for i in range(50)]
        await exchange(client, server, there, there[::-1])
        assert sim.chaos.cuts >= 2
