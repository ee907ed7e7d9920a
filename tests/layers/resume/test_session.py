"""The session that an application holds, on both sides: sending, receiving, ending, and what each call raises."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from towline.errors import (
    BufferFull,
    CloseIncomplete,
    ConnectionLost,
    HandshakeRefused,
    LinkLost,
    LossReason,
    MessageTooLarge,
    SessionLost,
)
from towline.layers.encryption import Encryption, Psk
from towline.layers.framing import Framing
from towline.layers.heartbeat import Heartbeat
from towline.layers.resume import (
    Attempt,
    Closed,
    Connected,
    Detached,
    Lost,
    MemoryStore,
    Resume,
    Resumed,
    ServerSession,
    Session,
    State,
    cost,
)
from towline.layers.resume._client import ClientSession
from towline.layers.retry import Retry
from towline.policies import Backoff
from towline.stack import Stack
from towline.streams import LinkAttribute
from towline.testing import Chaos, Cut, check_layer
from towline.transports import Memory

HERE = "memory://here"


class Pair:
    """A session, seen from both sides, and the means to break its links."""

    def __init__(self, client: ClientSession, server: ServerSession, chaos: Chaos) -> None:
        self.client = client
        self.server = server
        self.chaos = chaos

    @property
    def sides(self) -> tuple[Session, Session]:
        return self.client, self.server

    def cut(self) -> None:
        """Abort the current link, as a network would."""
        self.chaos.links[-1].driver.abort()

    @property
    def _memory(self) -> Memory:
        assert isinstance(self.chaos.inner, Memory)
        return self.chaos.inner

    def refuse(self) -> None:
        """Cut, and let no dial through until `allow`."""
        self._kept = dict(self._memory._listeners)
        self._memory._listeners.clear()
        self.cut()

    def allow(self) -> None:
        self._memory._listeners.update(self._kept)


@asynccontextmanager
async def joined(
    resume: Resume | None = None, *layers: Any, peer: Resume | None = None, capacity: int = 1 << 20
) -> AsyncGenerator[Pair]:
    send, receive = anyio.create_memory_object_stream[Session](1)
    done = anyio.Event()
    chaos = Chaos(Memory(capacity=capacity))

    async def handler(session: Session) -> None:
        await send.send(session)
        await done.wait()
        session.abort()

    below = (Retry(Backoff.constant(0.1)), *layers, Framing())
    ours = Stack(resume or Resume(), *below, transports=(chaos,))
    theirs = Stack(peer or resume or Resume(), *below, transports=(chaos,))
    with send, receive, anyio.fail_after(7200):
        async with theirs.open() as serving, ours.open() as opened:
            await serving.serve(HERE, handler)
            client = await opened.connect(HERE)
            server = await receive.receive()
            assert isinstance(server, ServerSession)
            yield Pair(client, server, chaos)
            client.abort()
            done.set()
            await anyio.wait_all_tasks_blocked()


SMALL = Resume(buffer=4000, window=4000, max_message=1000)


async def settled(condition: Callable[[], bool], within: float = 60) -> None:
    """Let virtual time pass until something holds."""
    with anyio.fail_after(within):
        while not condition():  # noqa: ASYNC110 - whatever a test looks for has no event
            await anyio.sleep(0.05)


@pytest.mark.smoke
async def test_the_layer_works_on_both_ends_whatever_moves_its_bytes() -> None:
    await check_layer(Resume(), Framing())
    await check_layer(Resume(), Heartbeat(), Framing(), Encryption(psk=Psk.generate()))


# --- sending and receiving -------------------------------------------------------------------------------------------


@pytest.mark.smoke
async def test_messages_arrive_in_order_both_ways() -> None:
    async with joined() as pair:
        for a, b in (pair.sides, pair.sides[::-1]):
            for n in range(100):
                await a.send(b"%d" % n)
            assert [await b.receive() for _ in range(100)] == [b"%d" % n for n in range(100)]


async def test_what_is_not_bytes_is_sent_as_it_was_at_that_moment() -> None:
    async with joined() as pair:
        pair.refuse()
        buffer = bytearray(b"before")
        await pair.server.send(buffer)  # type: ignore[arg-type]
        pair.server.send_nowait(memoryview(b"a view"))  # type: ignore[arg-type]
        await pair.server.send_many([bytearray(b"many")])  # type: ignore[list-item]
        buffer[:] = b"after!"
        assert pair.server.core.replay.unacked() == [b"before", b"a view", b"many"]


async def test_receive_many_takes_all_that_is_there_or_as_many_as_asked() -> None:
    async with joined() as pair:
        await pair.client.send_many(b"%d" % n for n in range(10))
        await pair.client.flush()
        assert await pair.server.receive_many(3) == [b"0", b"1", b"2"]
        assert await pair.server.receive_many() == [b"%d" % n for n in range(3, 10)]

        async def later() -> None:
            await anyio.sleep(10)
            await pair.client.send(b"later")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(later)
            assert await pair.server.receive_many() == [b"later"]


async def test_a_session_is_an_async_iterator_that_stops_at_the_peers_end() -> None:
    async with joined() as pair:
        await pair.client.send_many([b"a", b"b"])
        await pair.client.send_eof()
        assert [message async for message in pair.server] == [b"a", b"b"]
        for _ in range(2):
            with pytest.raises(anyio.EndOfStream):
                await pair.server.receive()


async def test_two_tasks_that_receive_at_once_are_told_so() -> None:
    async with joined() as pair, anyio.create_task_group() as tasks:
        tasks.start_soon(pair.server.receive)
        await anyio.wait_all_tasks_blocked()
        for receive in (pair.server.receive, pair.server.receive_many):
            with pytest.raises(anyio.BusyResourceError):
                await receive()
        await pair.client.send(b"for the first")


async def test_a_receive_that_is_cancelled_loses_nothing() -> None:
    async with joined() as pair:
        for n in range(20):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(pair.server.receive)
                await anyio.wait_all_tasks_blocked()
                tasks.cancel_scope.cancel()
                pair.client.send_nowait(b"%d" % n)
            assert await pair.server.receive() == b"%d" % n


async def test_sending_and_receiving_in_a_loop_lets_others_run() -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await anyio.lowlevel.checkpoint()

    async with joined() as pair, anyio.create_task_group() as tasks:
        tasks.start_soon(count)
        for _ in range(3000):
            await pair.client.send(b"x" * 1000)
        assert turns >= 3_000_000 // (128 << 10)
        tasks.cancel_scope.cancel()


# --- limits ----------------------------------------------------------------------------------------------------------


async def test_a_message_above_the_limit_is_refused_by_every_way_to_send() -> None:
    async with joined(SMALL) as pair:
        session = pair.client
        await session.send(b"x" * 1000)
        with pytest.raises(MessageTooLarge) as caught:
            await session.send(b"x" * 1001)
        assert (caught.value.size, caught.value.limit) == (1001, 1000)
        with pytest.raises(MessageTooLarge):
            session.send_nowait(b"x" * 1001)
        with pytest.raises(MessageTooLarge):
            await session.send_many([b"ok", b"x" * 1001])
        await session.send(b"still here")


async def test_the_smaller_max_message_of_the_two_ends_counts() -> None:
    async with joined(Resume(max_message=5000), peer=Resume(max_message=3000)) as pair:
        assert pair.client.max_message == pair.server.max_message == 3000
        with pytest.raises(MessageTooLarge):
            await pair.client.send(b"x" * 3001)


async def test_a_full_buffer_makes_send_wait_and_send_nowait_raise() -> None:
    async with joined(SMALL) as pair:
        pair.refuse()
        session = pair.server
        await settled(lambda: session.state is State.DETACHED)
        for _ in range(3):
            await session.send(b"x" * 1000)
        assert session.buffered == 3 * cost(b"x" * 1000)
        with pytest.raises(BufferFull) as caught:
            session.send_nowait(b"x" * 1000)
        assert (caught.value.buffered, caught.value.limit) == (3384, 4000)
        with anyio.move_on_after(10) as waited:
            await session.send(b"x" * 1000)
        assert waited.cancelled_caught
        assert len(session.core.replay.unacked()) == 3  # cancelled means not sent
        session.send_nowait(b"x" * 400)


async def test_senders_that_wait_for_room_are_served_first_come_first_served() -> None:
    async with joined(SMALL) as pair:
        order: list[int] = []
        got = b""

        async def send(number: int, size: int) -> None:
            await pair.client.send(bytes([number]) * size)
            order.append(number)

        for _ in range(4):  # the peer's window, then our buffer
            await pair.client.send(b"x" * 872)
        await pair.client.flush()
        for _ in range(4):
            await pair.client.send(b"x" * 872)
        async with anyio.create_task_group() as tasks:
            for number in range(10):
                tasks.start_soon(send, number, 900 if number % 2 else 1)
                await anyio.wait_all_tasks_blocked()
            assert order == []
            while len(got) < 18:
                got += (await pair.server.receive())[:1]
        assert order == list(range(10))
        assert got[8:] == bytes(range(10))


async def test_a_small_message_does_not_overtake_a_large_one_that_waits() -> None:
    async with joined(SMALL) as pair:
        pair.refuse()
        session = pair.server
        for _ in range(3):
            await session.send(b"x" * 1000)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(session.send, b"y" * 1000)
            await anyio.wait_all_tasks_blocked()
            with pytest.raises(BufferFull):
                session.send_nowait(b"")
            with anyio.move_on_after(1) as waited:
                await session.send(b"")
            assert waited.cancelled_caught
            tasks.cancel_scope.cancel()
        session.send_nowait(b"")  # nobody waits any more


async def test_a_sender_that_is_cancelled_lets_the_next_one_in() -> None:
    async with joined(SMALL) as pair:
        pair.refuse()
        session = pair.server
        for _ in range(3):
            await session.send(b"x" * 1000)
        async with anyio.create_task_group() as tasks:
            first = anyio.CancelScope()

            async def large() -> None:
                with first:
                    await session.send(b"y" * 1000)

            tasks.start_soon(large)
            await anyio.wait_all_tasks_blocked()
            tasks.start_soon(session.send, b"z")
            await anyio.wait_all_tasks_blocked()
            first.cancel()
        assert session.core.replay.unacked()[-1] == b"z"


async def test_a_receiver_that_sleeps_stops_the_sender_and_fills_no_memory() -> None:
    async with joined(SMALL) as pair:
        sent = 0
        with anyio.move_on_after(60):
            while True:
                await pair.client.send(b"x" * 100)
                sent += 1
        assert pair.server.core.inbox_cost <= 4000
        assert pair.client.buffered <= 4000
        assert sent <= 2 * 4000 // 228 + 1
        got = 0
        with anyio.move_on_after(60):
            while True:
                await pair.server.receive()
                got += 1
        assert got == sent


async def test_more_than_the_window_arrives_when_somebody_reads() -> None:
    async with joined(SMALL) as pair, anyio.create_task_group() as tasks:
        tasks.start_soon(pair.client.send_many, [b"%04d" % n for n in range(500)])
        assert [await pair.server.receive() for _ in range(500)] == [b"%04d" % n for n in range(500)]


# --- flush -----------------------------------------------------------------------------------------------------------


async def test_flush_returns_when_the_peer_has_everything_without_waiting_for_its_next_ack() -> None:
    async with joined() as pair:
        await pair.client.send(b"x")
        start = anyio.current_time()
        await pair.client.flush()
        assert anyio.current_time() - start < 0.1
        assert pair.client.buffered == 0
        assert len(pair.server.core.inbox) == 1
        await pair.client.flush()


async def test_flush_waits_while_detached_and_returns_after_the_way_back() -> None:
    async with joined() as pair:
        await pair.client.send(b"a")
        pair.cut()
        await pair.client.send(b"b")
        await pair.client.flush()
        assert await pair.server.receive_many() == [b"a", b"b"]


async def test_flush_without_acks_returns_when_a_link_has_it() -> None:
    async with joined() as pair:
        await pair.client.send(b"x")
        await pair.client.flush(acked=False)
        assert pair.client.core.replay.sent_upto == 1


# --- ending ----------------------------------------------------------------------------------------------------------


async def test_flush_returns_when_the_session_ends_with_everything_and_no_ack_says_so() -> None:
    """The server's last word says that it has everything. It is its only word, where it is not written at once."""
    async with joined() as pair, anyio.create_task_group() as tasks:
        await pair.server.send_eof()
        with pytest.raises(anyio.EndOfStream):
            await pair.client.receive()
        await pair.client.flush()
        assert pair.server.attachment is not None
        pair.server.attachment.link.driver.inline = False  # as with a driver that cannot
        assert pair.client.try_send(b"x")
        flushed = 0

        async def flush(acked: bool) -> None:
            nonlocal flushed
            await pair.client.flush(acked=acked)
            flushed += 1

        tasks.start_soon(pair.client.aclose)
        tasks.start_soon(flush, True)
        tasks.start_soon(flush, False)
        with anyio.fail_after(10):
            await pair.client.wait_closed()
            await anyio.wait_all_tasks_blocked()
        assert (pair.client.state, flushed) == (State.CLOSED, 2)
        await pair.client.flush()


async def test_after_send_eof_nothing_is_sent_and_receiving_goes_on() -> None:
    async with joined() as pair:
        await pair.client.send(b"the last")
        await pair.client.send_eof()
        await pair.client.send_eof()
        for send in (pair.client.send, pair.client.send_nowait):
            with pytest.raises(anyio.ClosedResourceError):
                await result if (result := send(b"x")) is not None else None
        with pytest.raises(anyio.ClosedResourceError):
            await pair.client.send_many([b"x"])
        await pair.server.send(b"an answer")
        assert await pair.client.receive() == b"an answer"
        assert await pair.server.receive() == b"the last"


@pytest.mark.smoke
async def test_close_on_both_sides_ends_in_closed_once() -> None:
    async with joined() as pair:
        await pair.client.send(b"a question")
        assert await pair.server.receive() == b"a question"
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(pair.client.aclose)
            tasks.start_soon(pair.server.aclose)
        await settled(lambda: pair.client.state is State.CLOSED and pair.server.state is State.CLOSED)
        for side in pair.sides:
            events = [event async for event in side.events()]
            assert events == [Connected(), Closed()]
            await side.aclose()
            await side.wait_closed()
            with pytest.raises(anyio.ClosedResourceError):
                await side.receive()
            with pytest.raises(anyio.ClosedResourceError):
                await side.send(b"x")


async def test_close_waits_until_the_peer_has_everything() -> None:
    async with joined() as pair:
        pair.refuse()
        await pair.client.send(b"sent while detached")
        start = anyio.current_time()

        async def come_back() -> None:
            await anyio.sleep(120)
            pair.allow()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(come_back)
            await pair.client.aclose()
        assert anyio.current_time() - start >= 119
        assert await pair.server.receive() == b"sent while detached"
        with pytest.raises(anyio.EndOfStream):
            await pair.server.receive()


async def test_close_gives_up_on_an_attached_peer_that_acknowledges_nothing() -> None:
    async with joined(Resume(linger=10)) as pair:
        pair.chaos.drivers[-1]._cut = Cut(how="blackhole")
        pair.chaos.drivers[-1].is_cut = True
        await pair.client.send(b"x")
        start = anyio.current_time()
        with pytest.raises(CloseIncomplete) as caught:
            await pair.client.aclose()
        assert caught.value.unacked == 1
        assert anyio.current_time() - start == pytest.approx(10, abs=0.5)
        assert pair.client.state is State.LOST


async def test_close_of_what_the_peer_sent_and_nobody_read_tells_the_peer() -> None:
    async with joined() as pair:
        await pair.server.send(b"unread")
        await pair.server.flush()
        await pair.client.aclose()
        with pytest.raises(anyio.EndOfStream):
            await pair.server.receive()  # the other direction has ended in order
        await settled(lambda: pair.server.state is State.LOST, within=1)
        with pytest.raises(SessionLost) as lost:
            await pair.server.send(b"more")
        assert lost.value.reason is LossReason.UNREAD
        assert lost.value.delivered_upto in (0, 1)


async def test_a_close_that_is_cancelled_aborts() -> None:
    async with joined() as pair:
        pair.chaos.drivers[-1]._cut = Cut(how="blackhole")
        pair.chaos.drivers[-1].is_cut = True
        await pair.client.send(b"x")
        with anyio.move_on_after(1):
            await pair.client.aclose()
        assert pair.client.state is State.LOST


async def test_abort_ends_both_sides_at_once_and_drops_what_was_not_delivered() -> None:
    async with joined() as pair:
        await pair.server.send(b"x")
        pair.server.abort()
        assert pair.server.state is State.LOST
        await settled(lambda: pair.client.state is State.LOST, within=1)
        for side in pair.sides:
            assert side.state.is_over
        with pytest.raises(anyio.ClosedResourceError):
            await pair.server.receive()
        assert await pair.client.receive() == b"x"  # it was under way before the word of the abort
        with pytest.raises(SessionLost) as lost:
            await pair.client.receive()
        assert lost.value.reason is LossReason.ABORTED
        pair.server.abort()


async def test_what_had_arrived_is_received_before_the_loss_is_raised() -> None:
    async with joined() as pair:
        await pair.client.send_many([b"a", b"b"])
        await pair.client.flush()
        pair.client.abort()
        await settled(lambda: pair.server.state.is_over, within=1)
        assert [await pair.server.receive(), await pair.server.receive()] == [b"a", b"b"]
        for _ in range(2):
            with pytest.raises(SessionLost):
                await pair.server.receive()


async def test_a_loss_wakes_everyone_who_waits_each_with_an_error_of_its_own() -> None:
    async with joined(SMALL) as pair:
        errors: list[SessionLost] = []

        async def expect_lost(call: Callable[[], Any]) -> None:
            with pytest.raises(SessionLost) as lost:
                await call()
            errors.append(lost.value)

        for _ in range(7):
            with anyio.move_on_after(1):
                await pair.server.send(b"x" * 1000)
        async with anyio.create_task_group() as tasks:
            for call in (
                pair.server.receive,
                lambda: pair.server.send(b"y" * 1000),
                lambda: pair.server.send(b"z" * 1000),
                pair.server.flush,
            ):
                tasks.start_soon(expect_lost, call)
            await anyio.wait_all_tasks_blocked()
            pair.client.abort()
        assert len(errors) == 4
        assert len(set(map(id, errors))) == 4
        assert {error.reason for error in errors} == {LossReason.ABORTED}
        for call in (lambda: pair.server.send(b"x"), pair.server.send_eof, lambda: pair.server.send_many([b"x"])):
            with pytest.raises(SessionLost):
                await call()
        with pytest.raises(SessionLost):
            pair.server.send_nowait(b"x")


async def test_a_loss_sorts_every_message_into_one_of_three_classes() -> None:
    async with joined(SMALL, peer=Resume(ttl=30, buffer=4000, window=4000, max_message=1000)) as pair:
        for n in range(3):
            await pair.client.send(b"%d" % n)
        await pair.client.flush()
        pair.refuse()
        await settled(lambda: pair.client.state is State.DETACHED)
        await pair.client.send(b"never handed to a link")
        with pytest.raises(SessionLost) as lost:
            await pair.client.receive()
        error = lost.value
        assert error.reason is LossReason.GAVE_UP
        assert error.delivered_upto is None
        assert error.sent_upto == 3
        assert error.unacked == (b"never handed to a link",)
        assert not error.retryable


# --- links come and go -----------------------------------------------------------------------------------------------


@pytest.mark.smoke
async def test_a_session_outlives_its_link() -> None:
    async with joined() as pair:
        for n in range(20):
            await pair.client.send(b"to %d" % n)
            await pair.server.send(b"from %d" % n)
            pair.cut()
        assert [await pair.server.receive() for _ in range(20)] == [b"to %d" % n for n in range(20)]
        assert [await pair.client.receive() for _ in range(20)] == [b"from %d" % n for n in range(20)]
        await settled(lambda: pair.client.state is State.ATTACHED)
        assert pair.client.epoch == pair.server.epoch > 1
        assert pair.client.statistics.resumes >= 1


async def test_events_tell_the_way_back_with_its_reasons() -> None:
    async with joined() as pair:
        pair.cut()
        await pair.client.send(b"x")
        await pair.server.receive()
        pair.client.abort()
        events = [event async for event in pair.client.events()]
        kinds = [type(event) for event in events]
        assert kinds[:2] == [Connected, Detached]
        assert kinds[-2:] == [Resumed, Lost]
        assert set(kinds[2:-2]) == {Attempt}
        detached, resumed = events[1], events[-2]
        assert isinstance(detached, Detached)
        assert isinstance(detached.reason, LinkLost)
        assert isinstance(resumed, Resumed)
        assert resumed.epoch == 2


async def test_the_state_of_a_session_is_what_it_says() -> None:
    async with joined() as pair:
        assert pair.client.state is State.ATTACHED
        assert "attached epoch=1 buffered=0 waiting=0" in repr(pair.client)
        pair.refuse()
        await settled(lambda: pair.client.state is State.DETACHED)
        assert pair.client.rtt is None
        assert pair.client.extra(LinkAttribute.epoch) >= 1
        assert pair.client.extra(LinkAttribute.peer_identity) is None
        assert pair.client.peer_identity is None


async def test_reconnect_while_attached_replaces_the_link_and_loses_nothing() -> None:
    async with joined() as pair:
        await pair.client.send(b"before")
        pair.client.reconnect()
        await pair.client.send(b"meanwhile")
        await settled(lambda: pair.client.epoch == 2 and pair.client.state is State.ATTACHED, within=1)
        await pair.client.send(b"after")
        assert [await pair.server.receive() for _ in range(3)] == [b"before", b"meanwhile", b"after"]
        assert len(pair.chaos.links) == 2


async def test_reconnect_while_detached_makes_the_next_attempt_at_once() -> None:
    slow = Retry(Backoff.constant(1000))
    chaos = Chaos(Memory())
    ours = Stack(Resume(ttl=3600), slow, Framing(), transports=(chaos,))

    async def echo(session: Session) -> None:
        async for message in session:
            await session.send(message)

    async with ours.serve(HERE, echo), ours.connect(HERE) as session:
        await session.send(b"x")
        await session.receive()
        chaos.links[-1].driver.abort()
        inner = chaos.inner
        assert isinstance(inner, Memory)
        kept = dict(inner._listeners)
        inner._listeners.clear()
        await settled(lambda: session.state is State.DETACHED)
        await anyio.sleep(5)
        inner._listeners.update(kept)
        start = anyio.current_time()
        session.reconnect()
        await session.send(b"y")
        assert await session.receive() == b"y"
        assert anyio.current_time() - start < 1


async def test_a_dead_link_is_replaced_when_heartbeat_has_found_it() -> None:
    async with joined(None, Heartbeat(interval=1, timeout=3)) as pair:
        await anyio.sleep(5)
        assert pair.client.rtt == 0
        pair.chaos.drivers[-1]._cut = Cut(how="blackhole")
        pair.chaos.drivers[-1].is_cut = True
        start = anyio.current_time()
        await pair.client.send(b"x")
        assert await pair.server.receive() == b"x"
        assert anyio.current_time() - start <= 5


@pytest.mark.parametrize(
    "how", ["closed by both", "aborted here", "aborted there", "aborted while detached", "expired"]
)
@pytest.mark.parametrize("which", [0, 1], ids=["client", "server"])
async def test_who_waits_for_its_end_is_told_however_it_ends(which: int, how: str) -> None:
    async with joined() as pair, anyio.create_task_group() as tasks:
        one, other = pair.sides[which], pair.sides[1 - which]
        told = 0

        async def wait() -> None:
            nonlocal told
            await one.wait_closed()
            told += 1
            assert (one.state.is_over, one.attachment) == (True, None)

        tasks.start_soon(wait)
        tasks.start_soon(wait)
        await other.send(b"x")
        assert await one.receive() == b"x"
        await other.flush()
        assert told == 0
        if how == "closed by both":
            tasks.start_soon(one.aclose)
            await other.aclose()
        elif how == "aborted here":
            one.abort()
        elif how == "aborted there":
            other.abort()
        elif how == "aborted while detached":
            pair.refuse()
            await settled(lambda: one.attachment is None)
            assert told == 0
            one.abort()
        else:
            pair.refuse()  # and it comes back too late, to a server that has given it up
            await anyio.sleep(3600)
        await settled(lambda: told == 2, within=10)


async def test_acks_wake_those_who_flush_and_none_who_wait_for_the_sessions_state() -> None:
    async with joined() as pair, anyio.create_task_group() as tasks:
        changes = flushes = 0

        async def count_changes() -> None:
            nonlocal changes
            while True:
                await pair.client._change()
                changes += 1

        async def flush() -> None:
            nonlocal flushes
            await pair.client.flush()
            flushes += 1

        tasks.start_soon(count_changes)
        await anyio.wait_all_tasks_blocked()
        for n in range(5):
            await pair.client.send(b"x")
            tasks.start_soon(flush)
            tasks.start_soon(flush)
            await settled(lambda n=n: flushes == 2 * n + 2)  # type: ignore[misc]
        assert changes == 0
        pair.cut()
        await settled(lambda: pair.client.epoch == 2 and pair.client.state is State.ATTACHED)
        assert changes >= 2  # detached, and attached
        tasks.cancel_scope.cancel()


async def test_an_exception_in_the_block_of_a_session_aborts_it() -> None:
    async with joined() as pair:

        async def use() -> None:
            async with pair.client:
                raise KeyError("mine")

        with pytest.raises(KeyError):
            await use()
        assert pair.client.state is State.LOST
        with pytest.raises(SessionLost):
            await pair.server.receive()


async def test_the_end_of_the_scope_ends_its_sessions() -> None:
    chaos = Chaos(Memory())
    ours = Stack(Resume(), Framing(), transports=(chaos,))

    async def wait(session: Session) -> None:
        await session.receive()

    async with ours.serve(HERE, wait):
        async with ours.open() as opened:
            session = await opened.connect(HERE)
        assert session.state is State.LOST
        with pytest.raises(ConnectionLost):
            await session.send(b"x")


# --- the server's side -----------------------------------------------------------------------------------------------


async def test_who_is_not_authorized_gets_no_session() -> None:
    asked: list[Any] = []

    def authorize(identity: Any) -> bool:
        asked.append(identity)
        return False

    ours = Stack(Resume(authorize=authorize), Framing(), transports=(Memory(),))

    async def handler(session: Session) -> None:
        raise AssertionError("it has no session")

    async with ours.serve(HERE, handler):
        with pytest.raises(HandshakeRefused, match="does not let this client in") as caught:
            async with ours.connect(HERE):
                pass
        assert not caught.value.retryable
    assert asked == [None]


async def test_a_session_that_is_detached_for_too_long_expires_and_somebody_is_told() -> None:
    told: list[Session] = []
    async with joined(Resume(ttl=60, on_expired=told.append)) as pair:
        await pair.client.send(b"x")
        await pair.client.flush()
        pair.refuse()
        assert await pair.server.receive() == b"x"
        start = anyio.current_time()
        with pytest.raises(SessionLost) as lost:
            await pair.server.receive()
        assert lost.value.reason is LossReason.EXPIRED
        assert anyio.current_time() - start == pytest.approx(60, abs=1)
        assert told == [pair.server]


async def test_a_client_comes_back_to_hear_that_its_session_has_expired() -> None:
    async with joined(Resume(ttl=60)) as pair:
        pair.refuse()
        await anyio.sleep(62)
        pair.allow()
        with pytest.raises(SessionLost) as lost:
            await pair.client.receive()
        assert lost.value.reason is LossReason.EXPIRED
        assert lost.value.delivered_upto == 0


async def test_f48_handlers_that_fill_the_buffers_of_detached_sessions_stay_below_the_bytes_of_the_store() -> None:
    store = MemoryStore(max_bytes=1 << 20)
    resume = Resume(buffer=1 << 20, window=1 << 20, max_message=1000, new_store=lambda: store)
    memory = Memory()
    ours = Stack(resume, Framing(), transports=(memory,))
    reasons: list[LossReason] = []

    async def broadcast(session: Session) -> None:
        assert await session.receive() == b"ready"
        try:
            while True:
                await session.send(b"x" * 1000)
        except SessionLost as lost:
            reasons.append(lost.reason)
            raise

    async with ours.serve(HERE, broadcast), ours.open() as opened:
        sessions = [await opened.connect(HERE) for _ in range(5)]
        listeners = dict(memory._listeners)
        memory._listeners.clear()  # nobody comes back
        for session in sessions:
            await session.send(b"ready")
            await session.flush(acked=False)
            session.drop_link(LinkLost("cut"))
        await anyio.sleep(10)
        assert sum(session.held for session in store) <= (1 << 20) + 5 * (128 << 10)
        assert set(reasons) <= {LossReason.EVICTED}
        assert len(store) >= 1
        memory._listeners.update(listeners)
        for session in sessions:
            session.abort()
