"""Who may have a session: stale, doubled, forged and crowded attempts to resume it (F3, F11 to F20, F26, F27)."""

from __future__ import annotations

import os
from random import Random
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from towline.errors import LinkLost, LossReason, SessionLost, SessionTakenOver
from towline.layers.framing import Framing
from towline.layers.heartbeat import Heartbeat
from towline.layers.resume import Resume, ServerSession, Session, State
from towline.layers.resume._proof import client_proof
from towline.layers.resume._wire import (
    Ack,
    BatchHead,
    Challenge,
    Hello,
    Proof,
    Reject,
    RejectCode,
    Resumed,
    Superseded,
)
from towline.layers.retry import Retry
from towline.policies import Backoff
from towline.testing._raw import RawPeer, RawSession
from towline.testing._simulation import Simulation, exchange, until

CREDIT = 8 << 20


def plain(**options: Any) -> tuple[Any, ...]:
    return Resume(**options), Retry(Backoff.exponential(), random=Random(0)), Heartbeat(), Framing()


async def confirmed(sim: Simulation, *, instance: bytes = b"I" * 16) -> tuple[RawPeer, RawSession, ServerSession]:
    """A raw client with a session of its own."""
    peer = await RawPeer.dial(sim.memory, sim.endpoint)
    raw = await peer.new(instance=instance)
    await peer.send(Ack(0, CREDIT))
    server = await sim.accepted()
    assert server.session_id == raw.id
    await peer.receive_all()
    return peer, raw, server


async def again(sim: Simulation, raw: RawSession, *, key: bytes | None = None) -> tuple[RawPeer, Resumed | Reject]:
    """The raw client comes back over another link."""
    peer = await RawPeer.dial(sim.memory, sim.endpoint)
    return peer, await peer.resume(raw, key=key)


def code(answer: Resumed | Reject) -> RejectCode | None:
    return answer.code if isinstance(answer, Reject) else None


# --- F3 -------------------------------------------------------------------------------------------------------------


async def test_f3_a_session_that_its_client_never_confirms_runs_no_handler_and_is_forgotten() -> None:
    expired: list[Session] = []
    async with Simulation(*plain(on_expired=expired.append)) as sim:
        peer = await RawPeer.dial(sim.memory, sim.endpoint)
        raw = await peer.new()
        assert len(sim.server.sessions) == 1
        peer.driver.abort()
        await anyio.sleep(11)
        assert sim.server.sessions == []
        with pytest.raises(anyio.WouldBlock):
            sim._take.receive_nowait()
        raw.epoch = 2
        _, answer = await again(sim, raw)
        assert code(answer) is RejectCode.UNKNOWN_SESSION
        assert expired == []


async def test_f3_a_resume_confirms_a_session_whose_first_acknowledgement_was_lost() -> None:
    async with Simulation(*plain()) as sim:
        peer = await RawPeer.dial(sim.memory, sim.endpoint)
        raw = await peer.new()
        peer.driver.abort()
        await anyio.sleep(5)
        raw.epoch = 2
        _, answer = await again(sim, raw)
        assert isinstance(answer, Resumed)
        assert (await sim.accepted()).session_id == raw.id


# --- F11, F12 -------------------------------------------------------------------------------------------------------


async def check_stale_epochs(sim: Simulation) -> None:
    """An attempt that is older than, or as old as, the one that has the session is refused and touches nothing."""
    _, raw, server = await confirmed(sim)
    raw.epoch = 5
    newer, answer = await again(sim, raw)
    assert isinstance(answer, Resumed)
    await newer.receive_all()
    for epoch in (4, 5, 1, 0):
        raw.epoch = epoch
        _, answer = await again(sim, raw)
        assert code(answer) is RejectCode.STALE_EPOCH
        assert server.epoch == 5
        assert server.state is State.ATTACHED
        assert await newer.receive_all() == []
    await newer.send(BatchHead(1, 0, CREDIT), frames=[b"still here"])
    await anyio.sleep(0.01)
    assert list(server.core.inbox) == [b"still here"]


async def test_f11_an_older_attempt_that_arrives_after_a_newer_one_is_refused_and_touches_nothing() -> None:
    async with Simulation(*plain()) as sim:
        await check_stale_epochs(sim)


async def test_f11_an_older_attempt_that_is_slow_with_its_proof_loses_against_a_newer_one() -> None:
    async with Simulation(*plain()) as sim:
        _, raw, server = await confirmed(sim)
        slow = await RawPeer.dial(sim.memory, sim.endpoint)
        hello = Hello(raw.instance, os.urandom(16), CREDIT, 1000, session_id=raw.id, epoch=2)
        await slow.send(hello)
        challenge = await slow.receive()
        assert isinstance(challenge, Challenge)
        raw.epoch = 3
        _, answer = await again(sim, raw)
        assert isinstance(answer, Resumed)
        await slow.send(Proof(client_proof(raw.key, hello.nonce + challenge.nonce, hello.body())))
        late = await slow.receive()
        assert isinstance(late, Reject)
        assert late.code is RejectCode.STALE_EPOCH
        assert server.epoch == 3


async def test_f12_of_two_attempts_with_one_epoch_the_second_is_refused() -> None:
    async with Simulation(*plain()) as sim:
        _, raw, server = await confirmed(sim)
        raw.epoch = 2
        first, answer = await again(sim, raw)
        assert isinstance(answer, Resumed)
        await first.receive_all()
        _, answer = await again(sim, raw)
        assert code(answer) is RejectCode.STALE_EPOCH
        assert await first.receive_all() == []
        assert server.epoch == 2


# --- F13, F14, F15: takeover ----------------------------------------------------------------------------------------


async def test_f13_thirty_stale_attempts_in_the_backlog_delay_a_live_one_by_less_than_a_second() -> None:
    async with Simulation(*plain()) as sim:
        client, server = await sim.connect()
        stale = RawSession(client.session_id, client._key, epoch=1, instance=client._instance)
        sim.cut("blackhole")
        for _ in range(30):
            peer = await RawPeer.dial(sim.memory, sim.endpoint)
            await peer.send(Hello(stale.instance, os.urandom(16), CREDIT, 1000, session_id=stale.id, epoch=1))
        began = anyio.current_time()
        client.reconnect()
        await until(lambda: server.epoch == 2, within=1)
        assert anyio.current_time() - began < 1
        await exchange(client, server, [b"a"], [b"b"])


async def check_takeover_of_a_stuck_link(sim: Simulation) -> None:
    """The old link is stuck in a write and still brings frames, and a newer link takes the session over."""
    old, raw, server = await confirmed(sim)
    before = anyio.get_running_tasks()
    for _ in range(10):
        await server.send(bytes(1000))  # more than the link holds, and the old client does not read
    await old.send(BatchHead(1, 0, CREDIT))
    await anyio.sleep(0.01)
    began = anyio.current_time()
    raw.epoch = 2
    new, answer = await again(sim, raw)
    assert isinstance(answer, Resumed)
    assert answer.recv == 0
    assert anyio.current_time() - began < 0.1
    # Message 1 comes over the new link, in two writes, and what the old link brings meanwhile is not it.
    await new.send(BatchHead(1, 0, CREDIT))
    await anyio.sleep(0.01)
    await old.send(BatchHead(1, 10, 1), frames=[b"a ghost", b"another"])
    await anyio.sleep(0.01)
    await new.send(frames=[b"one", b"two"])
    await anyio.sleep(0.01)
    assert list(server.core.inbox) == [b"one", b"two"]
    assert server.core.acked == 0
    assert server.state is State.ATTACHED
    assert server.attachment is not None
    await anyio.sleep(1.1)  # by now the old link was given up
    assert len(anyio.get_running_tasks()) == len(before)
    assert server.state is State.ATTACHED
    got = await new.receive_all()
    assert [item for item in got if isinstance(item, bytes)][:3] == [bytes(1000)] * 3


async def test_f14_a_takeover_waits_for_nothing_that_the_old_link_is_stuck_in() -> None:
    async with Simulation(*plain(), capacity=2048) as sim:
        await check_takeover_of_a_stuck_link(sim)


async def test_f15_what_an_old_link_brings_after_a_takeover_is_dropped() -> None:
    async with Simulation(*plain()) as sim:
        old, raw, server = await confirmed(sim)
        raw.epoch, raw.next = 2, 1000
        new = await RawPeer.dial(sim.memory, sim.endpoint)

        async def flood() -> None:
            number = 1
            while True:
                try:
                    await old.send(BatchHead(number, 0, CREDIT), frames=[b"old %d" % number])
                except LinkLost:
                    return
                number += 1
                await anyio.lowlevel.checkpoint()

        answer: Resumed | Reject | None = None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(flood)
            await anyio.lowlevel.checkpoint()
            answer = await new.resume(raw)
            for _ in range(10):
                await anyio.lowlevel.checkpoint()
            tasks.cancel_scope.cancel()
        assert isinstance(answer, Resumed)
        rest = [b"new %d" % i for i in range(answer.recv + 1, answer.recv + 4)]
        await new.send(BatchHead(answer.recv + 1, 0, CREDIT), frames=rest)
        await anyio.sleep(0.01)
        expected = [b"old %d" % i for i in range(1, answer.recv + 1)] + rest
        assert list(server.core.inbox) == expected


async def test_f16_of_two_processes_with_one_secret_the_older_one_loses_and_they_swap_once() -> None:
    async with Simulation(*plain()) as sim:
        client, server = await sim.connect()
        copy = RawSession(client.session_id, client._key, epoch=2, instance=b"another process!")
        _, answer = await again(sim, copy)
        assert isinstance(answer, Resumed)
        with pytest.raises(SessionTakenOver), anyio.fail_after(5):
            await client.receive()
        dials = len(sim.network.dials)
        await anyio.sleep(100)
        assert len(sim.network.dials) == dials
        assert server.epoch == 2


async def test_f16_a_client_that_is_taken_over_while_it_is_away_gives_way_when_it_comes_back() -> None:
    async with Simulation(*plain()) as sim:
        client, server = await sim.connect()
        sim.network.is_down = True
        sim.cut()
        await anyio.sleep(0.1)
        copy = RawSession(client.session_id, client._key, epoch=7, instance=b"another process!")
        await again(sim, copy)
        sim.network.is_down = False
        with pytest.raises(SessionTakenOver), anyio.fail_after(60):
            await client.receive()
        assert server.epoch == 7


async def test_f14_the_old_link_is_told_who_took_over() -> None:
    async with Simulation(*plain()) as sim:
        old, raw, _ = await confirmed(sim)
        raw.epoch, raw.instance = 2, b"another process!"
        await again(sim, raw)
        assert Superseded(b"another process!") in await old.receive_all()


# --- F17, F18, F19: forged ------------------------------------------------------------------------------------------


async def test_f17_without_the_key_a_session_id_is_worth_nothing() -> None:
    """The answer is the one for a session that does not exist, and the victim's link carries no byte more."""
    async with Simulation(*plain()) as sim:
        peer, raw, server = await confirmed(sim)
        for epoch in (0, 1, 2, (1 << 64) - 1):
            raw.epoch = epoch
            _, answer = await again(sim, raw, key=bytes(32))
            assert code(answer) is RejectCode.UNKNOWN_SESSION
            assert isinstance(answer, Reject)
            assert answer.mac == b""
            assert answer.recv_final is None
        nobody = RawSession(os.urandom(16), bytes(32), epoch=2)
        _, unknown = await again(sim, nobody)
        assert unknown == answer
        assert await peer.receive_all() == []
        assert (server.epoch, server.state) == (1, State.ATTACHED)


async def test_f18_a_hello_and_its_proof_are_good_for_one_connection() -> None:
    async with Simulation(*plain()) as sim:
        _, raw, server = await confirmed(sim)
        captured = await RawPeer.dial(sim.memory, sim.endpoint)
        hello = Hello(raw.instance, os.urandom(16), CREDIT, 1000, session_id=raw.id, epoch=2)
        await captured.send(hello)
        challenge = await captured.receive()
        assert isinstance(challenge, Challenge)
        proof = Proof(client_proof(raw.key, hello.nonce + challenge.nonce, hello.body()))

        attacker = await RawPeer.dial(sim.memory, sim.endpoint)
        await attacker.send(hello)
        assert isinstance(await attacker.receive(), Challenge)
        await attacker.send(proof)
        answer = await attacker.receive()
        assert isinstance(answer, Reject)
        assert answer.code is RejectCode.UNKNOWN_SESSION
        assert server.epoch == 1

        await captured.send(proof)
        assert isinstance(await captured.receive(), Resumed)


@pytest.mark.parametrize(("recv", "next_"), [((1 << 64) - 1, 1), (2, 1), (1, 1), (0, 0), (1, (1 << 64) - 1)])
async def test_f19_absurd_numbers_change_nothing_before_the_proof_and_end_only_that_session_after_it(
    recv: int, next_: int
) -> None:
    """The server has sent message 1 and had it acknowledged, and has received message 1."""
    async with Simulation(*plain()) as sim:
        other, other_server = await sim.connect()
        peer, raw, server = await confirmed(sim)
        await server.send(b"one")
        await peer.send(BatchHead(1, 0, CREDIT), frames=[b"one"])
        await peer.send(Ack(1, CREDIT))
        await anyio.sleep(0.01)
        await peer.receive_all()
        raw.epoch, raw.recv, raw.next = (1 << 64) - 1, recv, next_
        _, answer = await again(sim, raw, key=bytes(32))
        assert code(answer) is RejectCode.UNKNOWN_SESSION
        assert (server.epoch, server.core.recv, server.core.acked) == (1, 1, 1)
        _, answer = await again(sim, raw)
        if (recv, next_) == (1, (1 << 64) - 1):
            assert isinstance(answer, Resumed)  # a peer may have much to send
        else:
            assert code(answer) is RejectCode.STATE_MISMATCH
            assert list(server.core.inbox) == [b"one"]
            await server.receive()
            with pytest.raises(SessionLost) as caught:
                await server.receive()
            assert caught.value.reason is LossReason.STATE_MISMATCH
        await exchange(other, other_server, [b"a"], [b"b"])


async def test_f20_three_hundred_idle_connections_hold_nobody_up_and_are_gone_in_five_seconds() -> None:
    async with Simulation(*plain()) as sim:
        idle = [await RawPeer.dial(sim.memory, sim.endpoint) for _ in range(300)]
        with anyio.fail_after(1):
            client, server = await sim.connect()
        assert len(sim.server._links) <= 257
        await anyio.sleep(5.1)
        assert len(sim.server._links) == 1
        for peer in idle:
            with pytest.raises((anyio.EndOfStream, LinkLost)):
                await peer.receive()
        await exchange(client, server, [b"a"], [b"b"])


async def test_f20_a_handshake_by_one_byte_a_second_has_five_seconds_like_any_other() -> None:
    async with Simulation(*plain()) as sim:
        peer = await RawPeer.dial(sim.memory, sim.endpoint)
        began = anyio.current_time()

        async def trickle() -> None:
            while True:
                await peer.send_raw(b"\x80" if anyio.current_time() == began else b"\x00")
                await anyio.sleep(1)

        with pytest.raises(LinkLost):
            await trickle()
        assert anyio.current_time() - began <= 6
        assert sim.server.sessions == []


@pytest.mark.parametrize("length", [4097, (1 << 31) - 1, 1 << 31 | 4097, (1 << 32) - 1])
async def test_f20_a_stranger_who_announces_a_large_frame_is_cut_off_at_its_header(length: int) -> None:
    async with Simulation(*plain()) as sim:
        peer = await RawPeer.dial(sim.memory, sim.endpoint)
        await peer.send_raw(length.to_bytes(4, "big"))
        began = anyio.current_time()
        with pytest.raises((anyio.EndOfStream, LinkLost)):
            await peer.receive()
        assert anyio.current_time() == began


# --- F26, F27: the end of patience ----------------------------------------------------------------------------------


async def test_f27_a_resume_in_the_tick_of_the_expiry_wins_or_loses_and_never_half() -> None:
    won = 0
    for late in range(-4, 5):
        expired: list[Session] = []
        async with Simulation(*plain(ttl=60, on_expired=expired.append)) as sim:
            peer, raw, server = await confirmed(sim)
            await server.send(b"one")
            await peer.receive_all()
            peer.driver.abort()
            await anyio.sleep(1)
            ends = server.detached_at + 60
            await anyio.sleep(ends + late * 1e-9 - anyio.current_time())
            raw.epoch = 2
            _, answer = await again(sim, raw)
            await anyio.sleep(1)
            if isinstance(answer, Resumed):
                won += 1
                assert server.state is State.ATTACHED
                assert expired == []
                assert sim.server.sessions == [server]
            else:
                assert answer.code is RejectCode.SESSION_EXPIRED
                assert answer.recv_final == 0
                assert server.state is State.LOST
                assert expired == [server]
                assert sim.server.sessions == []
    assert 0 < won < 9


async def test_f26_what_became_of_a_session_is_remembered_for_ten_minutes() -> None:
    async with Simulation(*plain(ttl=60)) as sim:
        peer, raw, _ = await confirmed(sim)
        await peer.send(BatchHead(1, 0, CREDIT), frames=[b"one", b"two"])
        await anyio.sleep(0.01)
        peer.driver.abort()
        await anyio.sleep(61)
        raw.epoch = 2
        _, answer = await again(sim, raw)
        assert isinstance(answer, Reject)
        assert (answer.code, answer.recv_final) == (RejectCode.SESSION_EXPIRED, 2)
        _, answer = await again(sim, raw, key=bytes(32))
        assert code(answer) is RejectCode.UNKNOWN_SESSION
        await anyio.sleep(601)
        _, answer = await again(sim, raw)
        assert code(answer) is RejectCode.UNKNOWN_SESSION
