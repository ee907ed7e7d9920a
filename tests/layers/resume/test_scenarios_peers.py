"""A session whose peer does what no honest one would, or what the worst network brings about (F7 to F12, F49)."""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import anyio
import pytest

from towline.errors import LinkLost, LossReason, SessionLost, SessionTakenOver
from towline.layers.framing import Framing
from towline.layers.heartbeat import Heartbeat
from towline.layers.resume import ClientSession, Resume, ServerSession, State, _client, _server
from towline.layers.resume._core import Core
from towline.layers.resume._wire import (
    Abort,
    AbortCode,
    Ack,
    BatchHead,
    Closed,
    Fin,
    Reject,
    RejectCode,
    Resumed,
    Superseded,
)
from towline.layers.retry import Retry
from towline.policies import Backoff
from towline.testing._raw import RawPeer, RawSession, raw_listener
from towline.testing._simulation import Simulation, exchange, gather

CREDIT = 8 << 20


def plain() -> tuple[Any, ...]:
    return Resume(), Retry(Backoff.exponential(), random=Random(0)), Heartbeat(), Framing()


async def confirmed(sim: Simulation) -> tuple[RawPeer, RawSession, ServerSession]:
    """A raw client with a session of its own."""
    peer = await RawPeer.dial(sim.memory, sim.endpoint)
    raw = await peer.new()
    await peer.send(Ack(0, CREDIT))
    server = await sim.accepted()
    assert server.session_id == raw.id
    await peer.receive_all()
    return peer, raw, server


async def again(sim: Simulation, raw: RawSession) -> tuple[RawPeer, Resumed | Reject]:
    """The raw client comes back over another link."""
    peer = await RawPeer.dial(sim.memory, sim.endpoint)
    return peer, await peer.resume(raw)


@asynccontextmanager
async def client_of_a_raw_server() -> AsyncGenerator[tuple[Simulation, ClientSession, RawPeer, RawSession, Any]]:
    """A client's session whose server is played by the test."""
    async with Simulation(*plain()) as sim:
        await sim.kill_server()
        async with raw_listener(sim.memory, sim.endpoint) as peers:
            raw = RawSession(b"s" * 16, b"k" * 32)
            sessions: list[ClientSession] = []
            accepted: list[RawPeer] = []

            async def dial() -> None:
                sessions.append(await sim.dial())

            async def accept() -> None:
                accepted.append(await peers.receive())
                await accepted[0].accept_new(session=raw)

            await gather(dial, accept)
            yield sim, sessions[0], accepted[0], raw, peers


# --- F7: what comes twice is taken once -----------------------------------------------------------------------------


@pytest.mark.parametrize("first", [1, 2, 3, 4])
async def test_f7_a_peer_that_replays_too_much_has_nothing_delivered_twice(first: int) -> None:
    """It holds four messages, three were delivered, and it starts again at any of them."""
    messages = [b"one", b"two", b"three", b"four"]
    async with Simulation(*plain()) as sim:
        peer, raw, server = await confirmed(sim)
        await peer.send(BatchHead(1, 0, CREDIT), frames=messages[:3])
        await anyio.sleep(0.01)
        peer.driver.abort()
        await anyio.sleep(1)
        raw.epoch, raw.next = 2, 5
        peer, answer = await again(sim, raw)
        assert isinstance(answer, Resumed)
        assert answer.recv == 3
        await peer.send(BatchHead(first, 0, CREDIT), frames=messages[first - 1 :])
        await anyio.sleep(0.01)
        assert list(server.core.inbox) == messages
        assert server.statistics.duplicates == 4 - first


async def test_f7_a_whole_batch_that_comes_twice_on_one_link_is_dropped() -> None:
    async with Simulation(*plain()) as sim:
        peer, _, server = await confirmed(sim)
        for _ in range(3):
            await peer.send(BatchHead(1, 0, CREDIT), frames=[b"one", b"two"])
        await peer.send(BatchHead(3, 0, CREDIT), frames=[b"three"])
        await anyio.sleep(0.01)
        assert list(server.core.inbox) == [b"one", b"two", b"three"]
        assert server.statistics.duplicates == 4
        assert server.state is State.ATTACHED


# --- F8, F9: acknowledgements ---------------------------------------------------------------------------------------


async def test_f8_acknowledgements_that_are_doubled_old_or_out_of_order_change_nothing() -> None:
    async with Simulation(*plain()) as sim:
        peer, _, server = await confirmed(sim)
        for i in range(5):
            await server.send(b"%d" % i)
        await anyio.sleep(0.01)
        for recv in (3, 3, 1, 0, 2, 3):
            await peer.send(Ack(recv, CREDIT))
            await peer.send(BatchHead(1, recv, 0))
            await anyio.sleep(0.01)
            assert server.core.acked == 3
            assert server.core.replay.unacked() == [b"3", b"4"]
        assert server.core.peer_credit == CREDIT
        await peer.send(Ack(5, CREDIT))
        await anyio.sleep(0.01)
        assert server.buffered == 0
        assert server.state is State.ATTACHED


@pytest.mark.parametrize("recv", [1, 2, 99, (1 << 64) - 1])
async def test_f9_an_acknowledgement_of_what_was_never_sent_ends_that_session_and_no_other(recv: int) -> None:
    async with Simulation(*plain()) as sim:
        other, other_server = await sim.connect()
        peer, _, server = await confirmed(sim)
        await peer.send(Ack(recv, CREDIT))
        got = await peer.receive_all()
        assert Abort(AbortCode.ACK_BEYOND_SENT, 0) in got
        with pytest.raises(SessionLost) as caught:
            await server.receive()
        assert caught.value.reason is LossReason.STATE_MISMATCH
        await exchange(other, other_server, [b"a"], [b"b"])


async def test_f9_a_client_ends_its_session_by_the_same_rule() -> None:
    async with client_of_a_raw_server() as (_, client, peer, _, _):
        await client.send(b"one")
        await peer.receive_all()
        await peer.send(Ack(2, CREDIT))
        assert Abort(AbortCode.ACK_BEYOND_SENT, 0) in await peer.receive_all()
        with pytest.raises(SessionLost) as caught:
            await client.flush()
        assert caught.value.reason is LossReason.STATE_MISMATCH
        assert caught.value.unacked == (b"one",)


# --- F10: gaps ------------------------------------------------------------------------------------------------------


async def test_f10_a_gap_ends_the_link_and_a_resume_heals_it() -> None:
    async with Simulation(*plain()) as sim:
        peer, raw, server = await confirmed(sim)
        await peer.send(BatchHead(1, 0, CREDIT), frames=[b"one"])
        await peer.send(BatchHead(3, 0, CREDIT), frames=[b"three"])
        await anyio.sleep(0.01)
        assert server.state is State.DETACHED
        raw.epoch, raw.next = 2, 4
        peer, answer = await again(sim, raw)
        assert isinstance(answer, Resumed)
        assert answer.recv == 1
        await peer.send(BatchHead(2, 0, CREDIT), frames=[b"two", b"three"])
        await anyio.sleep(0.01)
        assert list(server.core.inbox) == [b"one", b"two", b"three"]


async def test_f10_the_same_gap_on_three_links_in_a_row_ends_the_session() -> None:
    async with Simulation(*plain()) as sim:
        peer, raw, server = await confirmed(sim)
        for epoch in (2, 3, 4):
            assert not server.state.is_over
            await peer.send(BatchHead(5, 0, CREDIT), frames=[b"five"])
            await anyio.sleep(0.01)
            raw.epoch = epoch
            if epoch < 4:
                peer, answer = await again(sim, raw)
                assert isinstance(answer, Resumed)
        with pytest.raises(SessionLost) as caught:
            await server.receive()
        assert caught.value.reason is LossReason.STATE_MISMATCH


async def test_f10_links_that_carry_something_between_gaps_do_not_count_as_in_a_row() -> None:
    async with Simulation(*plain()) as sim:
        peer, raw, server = await confirmed(sim)
        for number in range(1, 10):
            await peer.send(BatchHead(number, 0, CREDIT), frames=[b"good"])
            await peer.send(BatchHead(number + 2, 0, CREDIT), frames=[b"gap"])
            await anyio.sleep(0.01)
            raw.epoch, raw.next = number + 1, number + 3
            peer, answer = await again(sim, raw)
            assert isinstance(answer, Resumed)
        assert server.core.recv == 9
        assert list(server.core.inbox) == [b"good"] * 9


@pytest.mark.parametrize(
    "notes",
    [(), (Fin(7),), (Closed(0),), (Superseded(b"I" * 16),)],
    ids=["data without a number", "FIN with a gap", "CLOSED from a client", "SUPERSEDED from a client"],
)
async def test_f10_other_violations_end_the_link_and_not_the_session(notes: tuple[Any, ...]) -> None:
    async with Simulation(*plain()) as sim:
        peer, raw, server = await confirmed(sim)
        await peer.send(*notes, frames=[b"?"])
        await anyio.sleep(0.01)
        assert server.state is State.DETACHED
        assert not server.core.inbox
        raw.epoch = 2
        _, answer = await again(sim, raw)
        assert isinstance(answer, Resumed)


# --- F37, F12, F16 at a client --------------------------------------------------------------------------------------


async def test_f12_a_client_whose_epoch_is_stale_gives_way_and_does_not_fight() -> None:
    async with client_of_a_raw_server() as (sim, client, peer, raw, peers):
        peer.driver.abort()
        peer = await peers.receive()
        await refuse(peer, raw, RejectCode.STALE_EPOCH)
        with pytest.raises(SessionTakenOver):
            await client.receive()
        dials = len(sim.network.dials)
        await anyio.sleep(3600)
        assert len(sim.network.dials) == dials


@pytest.mark.parametrize("instance", [b"other, 16 bytes ", None])
async def test_f16_a_client_that_is_superseded_by_another_process_gives_way(instance: bytes | None) -> None:
    """By a newer link of its own it only loses that link."""
    async with client_of_a_raw_server() as (sim, client, peer, raw, peers):
        await peer.send(Superseded(instance or client._instance))
        if instance is None:
            with anyio.fail_after(5):
                await (await peers.receive()).accept_resume(raw)
            await anyio.sleep(0.01)
            assert client.state is State.ATTACHED
            return
        with pytest.raises(SessionTakenOver):
            await client.receive()
        dials = len(sim.network.dials)
        await anyio.sleep(3600)
        assert len(sim.network.dials) == dials


async def refuse(peer: RawPeer, raw: RawSession, code: RejectCode, recv_final: int | None = None) -> None:
    """Refuse to resume, with the session's MAC."""
    from dataclasses import replace

    from towline.layers.resume._proof import refusal_proof

    hello, context = await peer.challenged(raw)
    reject = Reject(code, recv_final=recv_final, mac=bytes(32))
    await peer.send(replace(reject, mac=refusal_proof(raw.key, context, hello.body(), reject.body())))
    await peer.driver.aclose()


@pytest.mark.parametrize(("recv_final", "complete"), [(3, True), (2, False), (0, False)])
async def test_f37_a_tombstone_that_counts_the_fin_is_its_acknowledgement(recv_final: int, complete: bool) -> None:
    """Two messages and a FIN were sent, their ack was lost, and the session is closed when the client comes back."""
    async with client_of_a_raw_server() as (_, client, peer, raw, peers):
        await client.send(b"one")
        await client.send(b"two")
        await client.send_eof()
        await peer.receive_all()
        peer.driver.abort()
        await refuse(await peers.receive(), raw, RejectCode.SESSION_CLOSED, recv_final)
        await anyio.sleep(0.01)
        if complete:
            assert client.state is State.CLOSED
            await client.aclose()
        else:
            with pytest.raises(SessionLost) as caught:
                await client.aclose()
            assert caught.value.reason is LossReason.CLOSED
            assert caught.value.delivered_upto == recv_final
            assert caught.value.sent_upto == 2


async def test_f29_a_server_that_is_not_ready_is_asked_again_and_nothing_is_lost() -> None:
    async with client_of_a_raw_server() as (_, client, peer, raw, peers):
        peer.driver.abort()
        await client.send(b"waits")
        began = 0.0
        for _ in range(3):
            await (await peers.receive()).send(Reject(RejectCode.RETRY_LATER, 2000))
            began = anyio.current_time()
        peer = await peers.receive()
        assert anyio.current_time() - began >= 2
        await peer.accept_resume(raw)
        head, frame = [item for item in await peer.receive_all() if not isinstance(item, Ack)]
        assert isinstance(head, BatchHead)
        assert (head.first, frame) == (1, b"waits")
        assert client.state is State.ATTACHED


async def test_f21_a_refusal_without_the_sessions_proof_ends_nothing() -> None:
    async with client_of_a_raw_server() as (_, client, peer, raw, peers):
        peer.driver.abort()
        for code in (RejectCode.UNKNOWN_SESSION, RejectCode.SESSION_CLOSED, RejectCode.STALE_EPOCH):
            peer = await peers.receive()
            await peer.challenged(raw)
            await peer.send(Reject(code))
        with anyio.fail_after(60):
            await (await peers.receive()).accept_resume(raw)
        await anyio.sleep(0.01)
        assert client.state is State.ATTACHED


# --- F49: large numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [2**16, 2**31, 2**32, 2**53, 2**63, 2**64 - 100])
async def test_f49_numbers_near_the_limits_of_integers_are_ordinary(
    first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = first - 6
    for module in (_client, _server):
        monkeypatch.setattr(module, "Core", functools.partial(Core, first=start))
    messages = [b"%d" % i for i in range(12)]
    async with Simulation(*plain()) as sim:
        client, server = await sim.connect()
        client.epoch = server.epoch = first - 1
        for i, message in enumerate(messages):
            await client.send(message)
            await server.send(message)
            if i % 3 == 2:
                sim.cut()
            await anyio.sleep(1)
        assert client.statistics.resumes == 4
        assert server.core.recv == start + 11
        assert await server.receive_many() == messages
        assert await client.receive_many() == messages
        await exchange(client, server, messages, messages)


async def test_f49_an_epoch_beyond_the_largest_number_is_refused_and_does_no_harm() -> None:
    async with Simulation(*plain()) as sim:
        _, raw, server = await confirmed(sim)
        raw.epoch = (1 << 64) - 1
        _, answer = await again(sim, raw)
        assert isinstance(answer, Resumed)
        _, second = await again(sim, raw)
        assert isinstance(second, Reject)
        assert second.code is RejectCode.STALE_EPOCH
        assert server.state is State.ATTACHED


async def test_a_link_that_the_server_resets_raises_to_a_raw_peer() -> None:
    async with Simulation(*plain()) as sim:
        peer, _, server = await confirmed(sim)
        server.drop_link(LinkLost("test"))
        with pytest.raises(LinkLost):
            await peer.receive()
