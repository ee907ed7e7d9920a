"""Who may resume a session: the security cases 29 to 37, over encrypted links and over plain ones."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import anyio
import pytest

from towline import Backoff, Encryption, Framing, Heartbeat, Psk, Resume, Retry, Stack, StaticKey, StaticKeys
from towline.errors import LossReason, SessionLost
from towline.layers import AllowList
from towline.layers.encryption import noise
from towline.layers.resume import ClientSession, State
from towline.layers.resume._wire import Ack, Reject, RejectCode, Resumed
from towline.link import Link
from towline.testing import Cut
from towline.testing._raw import RawPeer, RawSession
from towline.testing._simulation import Simulation

KEY = Psk(bytes(range(32)))


def encrypted(**resume: Any) -> tuple[Any, ...]:
    return (
        Resume(**resume),
        Retry(Backoff.constant(1)),
        Heartbeat(),
        Framing(),
        Encryption(psk=KEY),
    )


def plain(**resume: Any) -> tuple[Any, ...]:
    return Resume(**resume), Retry(Backoff.exponential()), Framing()


async def resumed(client: ClientSession, epoch: int) -> None:
    with anyio.fail_after(60):
        while client.state is not State.ATTACHED or client.epoch < epoch:
            await client._change()


async def raw_session(sim: Simulation) -> tuple[RawPeer, RawSession]:
    peer = await RawPeer.dial(sim.memory, sim.endpoint)
    session = await peer.new()
    await peer.send(Ack(0, session.credit))
    await sim.accepted()
    return peer, session


# --- 29 --------------------------------------------------------------------------------------------------------------


async def test_case_29_a_resume_has_new_keys_and_counters_and_loses_and_doubles_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used: list[tuple[bytes, int]] = []
    original = noise.CipherState.initialize_key

    def remember(self: noise.CipherState, key: bytes | None) -> None:
        original(self, key)
        if key is not None:
            used.append((bytes(key), self.nonce))

    monkeypatch.setattr(noise.CipherState, "initialize_key", remember)
    async with Simulation(*encrypted()) as sim:
        client, server = await sim.connect()
        first = {key for key, _ in used}
        for epoch in range(2, 6):
            await client.send(b"%d" % epoch)
            sim.cut()
            await resumed(client, epoch)
        later = [key for key, _ in used if key not in first]
        assert all(later.count(key) == 2 for key in later), "each key is installed once at each end"
        assert all(nonce == 0 for _, nonce in used)
        assert [await server.receive() for _ in range(4)] == [b"2", b"3", b"4", b"5"]


# --- 30, 37 ----------------------------------------------------------------------------------------------------------


async def test_case_30_a_wrong_key_a_wrong_id_and_another_sessions_key_get_one_and_the_same_answer() -> None:
    async with Simulation(*plain()) as sim:
        owner, session = await raw_session(sim)
        _, other = await raw_session(sim)
        answers: list[bytes] = []
        for key, session_id in [
            (os.urandom(32), session.id),
            (session.key, os.urandom(16)),
            (other.key, session.id),
        ]:
            thief = await RawPeer.dial(sim.memory, sim.endpoint)
            wrong = RawSession(session_id, key, epoch=7)
            answer = await thief.resume(wrong)
            assert isinstance(answer, Reject)
            answers.append(answer.encode())
        assert answers[0] == answers[1] == answers[2] == Reject(RejectCode.UNKNOWN_SESSION).encode()
        await owner.send(Ack(0, session.credit))
        assert sim.server.sessions[0].attachment is not None, "the owner's connection lives on"


async def test_case_37_a_session_id_alone_resumes_nothing() -> None:
    async with Simulation(*plain()) as sim:
        _, session = await raw_session(sim)
        thief = await RawPeer.dial(sim.memory, sim.endpoint)
        answer = await thief.resume(RawSession(session.id, bytes(32), epoch=2))
        assert answer == Reject(RejectCode.UNKNOWN_SESSION)
        assert sim.server.sessions[0].epoch == 1


async def test_case_37_a_stolen_key_without_the_static_key_resumes_nothing() -> None:
    server_key, honest, thief = StaticKey.generate(), StaticKey.generate(), StaticKey.generate()

    def layers(key: StaticKey) -> tuple[Any, ...]:
        trust = AllowList([honest.public_key, thief.public_key, server_key.public_key])
        keys = StaticKeys(key, trust=trust)
        return Resume(), Retry(Backoff.exponential()), Framing(), Encryption(keys=keys)

    # One process can hold one key per stack only, so the thief gets a stack of its own over the same memory.
    async with Simulation(*layers(server_key)) as sim:
        honest_stack = Stack(*layers(honest), transports=(sim.network,))
        thief_stack = Stack(*layers(thief), transports=(sim.network,))
        async with honest_stack.open() as mine, thief_stack.open() as theirs:
            victim: ClientSession = await mine.connect(sim.endpoint)
            session = await sim.accepted()
            robber: ClientSession = await theirs.connect(sim.endpoint)
            await sim.accepted()
            robber.session_id, robber._key, robber.epoch = victim.session_id, victim._key, 50
            sim.chaos.drivers[-1].abort()
            with anyio.fail_after(60):
                await robber.wait_closed()
            with pytest.raises(SessionLost) as lost:
                await robber.receive()
            assert lost.value.reason is LossReason.UNKNOWN_SESSION
            await victim.send(b"still mine")
            assert await session.receive() == b"still mine"
            assert session.epoch == 1


# --- 31 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", [1, 4, 5])
async def test_case_31_a_stale_or_equal_epoch_is_refused_and_displaces_nobody(epoch: int) -> None:
    async with Simulation(*plain()) as sim:
        _, session = await raw_session(sim)
        session.epoch = 5
        current = await RawPeer.dial(sim.memory, sim.endpoint)
        assert isinstance(await current.resume(session), Resumed)
        attached = sim.server.sessions[0].attachment
        session.epoch = epoch
        stale = await RawPeer.dial(sim.memory, sim.endpoint)
        answer = await stale.resume(session)
        assert isinstance(answer, Reject)
        assert answer.code is RejectCode.STALE_EPOCH
        assert sim.server.sessions[0].attachment is attached


async def test_case_31_a_recorded_hello_proves_nothing_on_another_encrypted_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorded: list[bytes] = []
    original = Link.send

    async def tap(self: Link, units: list[Any]) -> None:
        for unit in units:
            notes = getattr(unit, "notes", [])
            if recorded and any(note[0] == 1 for note in notes):
                unit.notes = [recorded[-1]]  # the replay: yesterday's HELLO in place of today's
            else:
                recorded.extend(note for note in notes if note[0] == 1 and len(note) > 100)
        await original(self, units)

    async with Simulation(*encrypted()) as sim:
        client, server = await sim.connect()
        monkeypatch.setattr(Link, "send", tap)
        sim.cut()
        await resumed(client, 2)
        assert recorded, "the resume was recorded"
        sim.cut()
        with anyio.fail_after(60):
            await client.wait_closed()
        assert server.epoch == 2, "the server did not believe it"
        with pytest.raises(SessionLost, match="does not know it"):
            await client.receive()


# --- 32, 33 ----------------------------------------------------------------------------------------------------------


async def test_case_32_connections_cut_after_their_proof_do_not_lock_the_client_out() -> None:
    async with Simulation(*plain()) as sim:
        _, session = await raw_session(sim)
        for epoch in range(2, 7):
            session.epoch = epoch
            peer = await RawPeer.dial(sim.memory, sim.endpoint)
            assert isinstance(await peer.resume(session), Resumed)
            peer.driver.abort()
        session.epoch = 7
        peer = await RawPeer.dial(sim.memory, sim.endpoint)
        answer = await peer.resume(session)
        assert isinstance(answer, Resumed)
        assert (answer.recv, answer.next) == (0, 1)


@pytest.mark.parametrize("layers", [encrypted, plain])
async def test_case_33_a_link_cut_before_the_answer_is_read_costs_one_attempt(
    layers: Callable[[], tuple[Any, ...]],
) -> None:
    measured: list[int] = []
    async with Simulation(*layers(), cuts=[Cut()]) as sim:  # how many bytes does the client read until it is attached?
        client, _ = await sim.connect()
        sim.cut()
        await resumed(client, 2)
        measured.append(sim.chaos.drivers[-1]._received)
    for short in (1, 10, measured[0] // 2):
        async with Simulation(*layers(), cuts=[Cut(), Cut(received=measured[0] - short)]) as sim:
            client, server = await sim.connect()
            await client.send(b"one")
            sim.cut()
            await resumed(client, 3)
            await client.send(b"two")
            assert [await server.receive(), await server.receive()] == [b"one", b"two"]


# --- 34 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("recv", "next_"), [(1, 1), (2**64 - 1, 1), (0, 0)])
async def test_case_34_a_resume_with_numbers_that_cannot_be_ends_that_session_only(recv: int, next_: int) -> None:
    async with Simulation(*plain()) as sim:
        _, session = await raw_session(sim)
        other, other_session = await raw_session(sim)
        session.epoch, session.recv, session.next = 2, recv, next_
        peer = await RawPeer.dial(sim.memory, sim.endpoint)
        answer = await peer.resume(session)
        assert isinstance(answer, Reject)
        assert answer.code is RejectCode.STATE_MISMATCH
        assert [each.session_id for each in sim.server.sessions] == [other_session.id]
        await other.send(Ack(0, other_session.credit))


# --- 35 --------------------------------------------------------------------------------------------------------------


async def test_case_35_after_its_time_to_live_a_session_is_lost_and_no_new_one_takes_its_place() -> None:
    async with Simulation(*encrypted(ttl=20.0)) as sim:
        client, server = await sim.connect()
        sim.network.is_down = True
        sim.cut()
        await anyio.sleep(21)
        sim.network.is_down = False
        with anyio.fail_after(60), pytest.raises(SessionLost) as lost:
            await client.receive()
        assert lost.value.reason is LossReason.EXPIRED
        assert server.state is State.LOST
        assert not sim.server.sessions


async def test_case_35_a_server_that_was_restarted_knows_the_session_no_more() -> None:
    async with Simulation(*encrypted()) as sim:
        client, _ = await sim.connect()
        await sim.kill_server()
        await sim.start_server()
        with anyio.fail_after(60), pytest.raises(SessionLost) as lost:
            await client.receive()
        assert lost.value.reason is LossReason.UNKNOWN_SESSION
        assert lost.value.delivered_upto is None
        assert not sim.server.sessions


async def test_case_35_a_revoked_client_learns_it_and_cannot_resume() -> None:
    async with Simulation(*encrypted()) as sim:
        client, server = await sim.connect()
        server.revoke()
        with anyio.fail_after(60), pytest.raises(SessionLost) as lost:
            await client.receive()
        assert lost.value.reason is LossReason.REVOKED


async def test_case_35_a_client_that_was_revoked_while_it_was_away_learns_it_from_the_tombstone() -> None:
    async with Simulation(*encrypted()) as sim:
        client, server = await sim.connect()
        sim.network.is_down = True
        sim.cut()
        with anyio.fail_after(60):
            while server.state is State.ATTACHED:
                await server._change()
        server.revoke()
        sim.network.is_down = False
        with anyio.fail_after(60), pytest.raises(SessionLost) as lost:
            await client.receive()
        assert lost.value.reason is LossReason.REVOKED


# --- 36 --------------------------------------------------------------------------------------------------------------


async def test_case_36_of_two_resumes_at_once_exactly_one_lives_and_no_frame_comes_twice() -> None:
    async with Simulation(*plain()) as sim:
        _, session = await raw_session(sim)
        server = sim.server.sessions[0]
        await server.send(b"only once")
        peers = [await RawPeer.dial(sim.memory, sim.endpoint) for _ in range(2)]
        session.epoch = 2
        answers: list[Resumed | Reject] = []

        async def resume(peer: RawPeer) -> None:
            answers.append(await peer.resume(session))

        async with anyio.create_task_group() as tasks:
            for peer in peers:
                tasks.start_soon(resume, peer)
        assert sorted(type(answer).__name__ for answer in answers) == ["Reject", "Resumed"]
        received = [unit for peer in peers for unit in await peer.receive_all() if isinstance(unit, bytes)]
        assert received == [b"only once"]
