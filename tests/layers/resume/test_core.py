"""The rules of RSM/1: numbers, acknowledgements and credit, with no link in sight."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from towline.errors import MessageTooLarge, ProtocolViolation
from towline.layers.resume._core import ACK_COST, ACK_DELAY, AckBeyondSent, Core, Limits, StateMismatch
from towline.layers.resume._replay import OVERHEAD, cost
from towline.layers.resume._wire import Ack, BatchHead, Fin, Message, decode
from towline.stage import Batch

SMALL = Limits(buffer=3000, window=2000, max_message=1000)
LARGE = Limits(buffer=8 << 20, window=8 << 20, max_message=4 << 20)


def said(batches: list[Batch]) -> list[Message | bytes]:
    return [item for batch in batches for item in [*map(decode, batch.notes), *batch.frames]]


def feed(core: Core, batches: list[Batch], now: float = 0.0) -> None:
    for batch in batches:
        for note in batch.notes:
            match decode(note):
                case BatchHead() as head:
                    core.receive_head(head)
                case Ack() as ack:
                    core.receive_ack(ack)
                case Fin() as fin:
                    core.receive_fin(fin)
                case other:
                    raise AssertionError(other)
        if batch.frames:
            core.receive_frames(list(batch.frames), now)


def started(limits: Limits = LARGE) -> tuple[Core, Core]:
    """Two cores that have just met, with their first word said."""
    a, b = Core(limits), Core(limits)
    a.start(b.credit, b.limits.max_message)
    b.start(a.credit, a.limits.max_message)
    feed(b, a.pull())
    feed(a, b.pull())
    return a, b


def send(core: Core, *messages: bytes) -> None:
    for message in messages:
        core.check_size(message)
        assert core.has_room(cost(message))
        core.replay.extend([message])


def take(core: Core, count: int | None = None) -> list[bytes]:
    taken = [core.inbox.popleft() for _ in range(len(core.inbox) if count is None else min(count, len(core.inbox)))]
    core.consumed(sum(map(cost, taken)))
    return taken


def reattach(a: Core, b: Core) -> tuple[int, int]:
    """What HELLO and RESUMED do: ``a`` dials."""
    recv, next_, credit = a.recv, a.next, a.credit
    b.check_peer(recv, next_)
    replayed_b = b.attach(recv, credit, a.limits.max_message)
    a.check_peer(b.recv, b.next)
    return a.attach(b.recv, b.credit, b.limits.max_message), replayed_b


# --- sending and acknowledging ---------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_a_flush_is_one_head_and_the_messages_after_it() -> None:
    a, b = started()
    send(a, b"one", b"two")
    assert said(a.pull()) == [BatchHead(1, 0, LARGE.window), b"one", b"two"]
    assert a.pull() == []
    send(a, b"three")
    batches = a.pull()
    assert said(batches) == [BatchHead(3, 0, LARGE.window), b"three"]
    assert b.recv == 0


@pytest.mark.parametrize("first", [1, 1000])
def test_bytes_are_counted_once_whatever_is_sent_again(first: int) -> None:
    a, b = Core(LARGE, first=first), Core(LARGE, first=first)
    a.start(b.credit, LARGE.max_message)
    b.start(a.credit, LARGE.max_message)
    send(a, b"", b"x" * 10, b"y" * 100)
    a.end()
    assert (a.sent_bytes, a.peer_credit - a.replay.sent_cost) == (0, LARGE.window)
    a.pull()  # and the link is lost with it
    assert (a.sent_bytes, b.received_bytes) == (110, 0)
    assert a.peer_credit - a.replay.sent_cost == LARGE.window - 110 - 3 * OVERHEAD
    assert reattach(a, b) == (3, 0)
    feed(b, a.pull())
    assert b.peer_fin == first + 3
    assert (a.sent_bytes, b.received_bytes) == (110, 110)
    feed(a, b.pull())
    take(b)
    assert (a.sent_bytes, b.received_bytes) == (110, 110)
    assert (b.sent_bytes, a.received_bytes) == (0, 0)


def test_a_new_session_says_a_word_at_once_to_confirm_itself() -> None:
    core = Core(LARGE)
    core.start(LARGE.window, LARGE.max_message)
    assert core.wants
    assert said(core.pull()) == [Ack(0, LARGE.window)]


def test_what_arrived_is_acknowledged_after_the_delay_once() -> None:
    a, b = started()
    send(a, b"one")
    feed(b, a.pull(), now=10.0)
    assert not b.wants
    assert b.deadline == 10.0 + ACK_DELAY
    send(a, b"two")
    feed(b, a.pull(), now=10.1)
    assert b.deadline == 10.0 + ACK_DELAY
    b.on_time(10.1)
    assert not b.wants
    b.on_time(10.0 + ACK_DELAY)
    assert said(b.pull()) == [Ack(2, LARGE.window)]
    assert b.deadline is None
    assert b.pull() == []


def test_much_is_acknowledged_at_once() -> None:
    a, b = started()
    send(a, *[b"x" * 50_000] * 6)
    while batches := a.pull():
        feed(b, batches)
    assert b._unacked_cost >= ACK_COST
    assert b.wants
    assert said(b.pull()) == [Ack(6, LARGE.window)]


def test_a_request_is_answered_at_once() -> None:
    a, b = started()
    send(a, b"one")
    a.request_ack()
    feed(b, a.pull())
    assert b.wants
    feed(a, b.pull())
    assert a.acked == 1
    a.request_ack()
    assert said(a.pull()) == [Ack(0, LARGE.window, ack_request=True)]


def test_data_carries_an_ack_so_that_none_goes_alone() -> None:
    a, b = started()
    send(a, b"one")
    feed(b, a.pull())
    send(b, b"two")
    assert said(b.pull()) == [BatchHead(1, 1, LARGE.window), b"two"]
    assert b.deadline is None


def test_a_buffer_that_is_half_full_asks_for_an_ack() -> None:
    a, _ = started(SMALL)
    send(a, b"x" * 900)
    (head, _) = said(a.pull())
    assert head == BatchHead(1, 0, SMALL.window)
    send(a, b"x" * 600)
    (head, _) = said(a.pull())
    assert head == BatchHead(2, 0, SMALL.window, ack_request=True)


def test_old_news_changes_nothing() -> None:
    a, b = started()
    send(a, b"one", b"two")
    feed(b, a.pull())
    a.receive_ack(Ack(2, LARGE.window + 10))
    a.receive_ack(Ack(1, LARGE.window))
    a.receive_ack(Ack(0, 0))
    assert a.acked == 2
    assert a.peer_credit == LARGE.window + 10


# --- credit ----------------------------------------------------------------------------------------------------------


def test_no_more_is_sent_than_was_granted_until_the_peer_takes_some() -> None:
    a, b = started(SMALL)
    send(a, b"x" * 872, b"y" * 872, b"z" * 500)  # 1000 + 1000 + 628, where 2000 are granted
    feed(b, a.pull())
    assert b.recv == 2
    assert a.pull() == []
    feed(a, b.pull())
    assert not [item for item in said(a.pull()) if isinstance(item, bytes)]
    take(b, 1)
    assert b.wants  # half of the window is free: it says so at once (D19)
    feed(a, b.pull())
    feed(b, a.pull())
    assert b.recv == 3


def test_a_quarter_of_the_window_that_is_free_again_is_told_at_once_and_less_is_not() -> None:
    a, b = started(SMALL)
    send(a, b"x" * 371, b"x" * 1, b"x" * 500)
    feed(b, a.pull())
    b.on_time(100)
    b.pull()
    take(b, 1)
    assert not b.wants  # 499 of 2000
    take(b, 1)
    assert b.wants  # 628
    assert said(b.pull()) == [Ack(3, SMALL.window + 628)]


def test_a_peer_that_sends_beyond_its_credit_breaks_the_protocol() -> None:
    _, b = started(SMALL)
    b.receive_head(BatchHead(1, 0, SMALL.window))
    with pytest.raises(ProtocolViolation, match=r"sent 2,256 bytes of cost, where 2,000 were granted"):
        b.receive_frames([b"x" * 1000, b"y" * 1000], 0.0)
    assert not b.inbox


def test_a_replay_spends_no_credit_again() -> None:
    a, b = started(SMALL)
    send(a, b"x" * 872, b"y" * 872)
    feed(b, a.pull()[:0])
    a.pull()
    assert reattach(a, b) == (2, 0)
    feed(b, a.pull())
    assert list(b.inbox) == [b"x" * 872, b"y" * 872]


# --- what a peer must not do -----------------------------------------------------------------------------------------


def test_a_gap_is_a_violation() -> None:
    _, b = started()
    with pytest.raises(ProtocolViolation, match="goes on with message 2, where 1 is next"):
        b.receive_head(BatchHead(2, 0, 0))
    with pytest.raises(ProtocolViolation, match="a FIN numbered 2, where 1 is next"):
        b.receive_fin(Fin(2))


def test_data_without_a_number_is_a_violation() -> None:
    a, b = started()
    with pytest.raises(ProtocolViolation, match="data without a number"):
        b.receive_frames([b"x"], 0.0)
    send(a, b"x")
    feed(b, a.pull())
    reattach(a, b)
    with pytest.raises(ProtocolViolation, match="data without a number"):
        b.receive_frames([b"x"], 0.0)  # each connection says its first number


def test_an_acknowledgement_of_what_was_never_sent_ends_the_session() -> None:
    a, _ = started()
    send(a, b"x")
    with pytest.raises(AckBeyondSent, match="acknowledged 1, where 0 were sent"):
        a.receive_ack(Ack(1, 0))
    a.end()
    a.pull()
    with pytest.raises(AckBeyondSent):
        a.receive_ack(Ack(3, 0))
    a.receive_ack(Ack(2, 0))
    assert a.fin_acked


def test_a_message_above_what_was_agreed_is_a_violation_and_never_sent() -> None:
    a, b = Core(LARGE), Core(SMALL)
    a.start(b.credit, b.limits.max_message)
    b.start(a.credit, a.limits.max_message)
    assert a.max_message == b.max_message == 1000
    with pytest.raises(MessageTooLarge):
        a.check_size(b"x" * 1001)
    b.receive_head(BatchHead(1, 0, 0))
    with pytest.raises(ProtocolViolation, match="1,001 bytes, where 1,000 were agreed"):
        b.receive_frames([b"x" * 1001], 0.0)


def test_data_after_the_end_is_a_violation() -> None:
    _, b = started()
    b.receive_fin(Fin(1))
    b.receive_head(BatchHead(2, 0, 0))
    with pytest.raises(ProtocolViolation, match="after the end"):
        b.receive_frames([b"x"], 0.0)
    with pytest.raises(ProtocolViolation, match="a FIN numbered 0"):
        b.receive_fin(Fin(0))
    b.receive_fin(Fin(1))  # again, after a replay
    assert b.recv == 1


# --- the end ---------------------------------------------------------------------------------------------------------


def test_a_fin_goes_after_all_data_and_is_acknowledged_like_a_message() -> None:
    a, b = started()
    send(a, b"one")
    a.end()
    a.end()
    assert (a.fin, a.next) == (2, 3)
    batches = a.pull()
    assert said(batches) == [BatchHead(1, 0, LARGE.window), b"one", Fin(2)]
    feed(b, batches)
    assert (b.peer_fin, b.recv, list(b.inbox), b.consumed_upto) == (2, 2, [b"one"], 0)
    feed(a, b.pull())
    assert a.fin_acked
    assert a.acked == 2
    assert not a.is_complete
    b.end()
    feed(a, b.pull())
    feed(b, a.pull())
    assert a.is_complete
    assert b.is_complete


def test_a_fin_waits_for_data_that_waits_for_credit() -> None:
    a, b = started(SMALL)
    send(a, b"x" * 872, b"y" * 872, b"z" * 500)
    a.end()
    feed(b, a.pull())
    assert b.peer_fin is None
    take(b)
    feed(a, b.pull())
    feed(b, a.pull())
    assert b.peer_fin == 4


def test_a_fin_that_was_lost_is_said_again_after_a_resume() -> None:
    a, b = started()
    send(a, b"one")
    a.end()
    a.pull()  # lost
    reattach(a, b)
    feed(b, a.pull())
    assert b.peer_fin == 2
    b.pull()  # lost
    reattach(a, b)
    assert a.fin_acked  # the handshake said so


def test_a_fin_that_no_link_ever_carried_cannot_be_acknowledged() -> None:
    a, _ = started(SMALL)
    send(a, b"x" * 872, b"y" * 872, b"z" * 500)
    a.end()
    a.pull()
    with pytest.raises(AckBeyondSent):
        a.receive_ack(Ack(4, 0))


# --- coming back -----------------------------------------------------------------------------------------------------


def test_a_batch_that_overlaps_what_is_here_loses_its_beginning() -> None:
    a, b = started()
    send(a, b"one", b"two", b"three")
    feed(b, a.pull())
    b.receive_head(BatchHead(2, 0, 0))
    b.receive_frames([b"two", b"three", b"four"], 0.0)
    assert list(b.inbox) == [b"one", b"two", b"three", b"four"]
    assert b.duplicates == 2
    b.receive_head(BatchHead(1, 0, 0))
    b.receive_frames([b"one"], 0.0)
    assert (b.recv, b.duplicates) == (4, 3)


def test_a_peer_that_forgot_or_invented_something_cannot_resume() -> None:
    a, b = started()
    send(a, b"one", b"two")
    feed(b, a.pull())
    b.request_ack()
    feed(a, b.pull())
    for recv, next_ in ((1, 1), (3, 1), (99, 1)):
        with pytest.raises(StateMismatch, match=f"received up to {recv}, where it acknowledged 2 and 2 were sent"):
            a.check_peer(recv, next_)
    with pytest.raises(StateMismatch, match="the peer's next message is 2, where 2 were received"):
        b.check_peer(0, 2)
    a.check_peer(2, 1)


def test_progress_is_what_moved_since_the_link_came() -> None:
    a, b = started()
    reattach(a, b)
    assert not a.progress
    send(a, b"one")
    feed(b, a.pull())
    assert b.progress
    feed(a, b.pull())
    b.request_ack()
    feed(a, b.pull())
    assert a.progress


# --- against a model -------------------------------------------------------------------------------------------------


@dataclass
class End:
    core: Core
    sent: list[bytes] = field(default_factory=list[bytes])
    taken: list[bytes] = field(default_factory=list[bytes])
    wire: deque[Batch] = field(default_factory=deque[Batch])  # on its way to this end


ACTIONS = st.one_of(
    st.tuples(st.just("send"), st.booleans(), st.integers(0, 1000)),
    st.tuples(st.just("flush"), st.booleans(), st.just(0)),
    st.tuples(st.just("deliver"), st.booleans(), st.integers(1, 5)),
    st.tuples(st.just("take"), st.booleans(), st.integers(1, 4)),
    st.tuples(st.just("time"), st.booleans(), st.integers(1, 10)),
    st.tuples(st.just("end"), st.booleans(), st.just(0)),
    st.tuples(st.just("cut"), st.booleans(), st.integers(0, 2)),
)


@given(st.lists(ACTIONS, max_size=120))
def test_two_cores_over_a_link_that_is_cut_anywhere_agree_with_a_model(actions: list[tuple[str, bool, int]]) -> None:
    a, b = started(SMALL)
    ends = End(a), End(b)
    now = 0.0

    def deliver(end: End, count: int) -> None:
        for _ in range(min(count, len(end.wire))):
            feed(end.core, [end.wire.popleft()], now)  # raises where credit is exceeded, or numbers are wrong

    def reconnect(lost_answers: int) -> None:
        for end in ends:
            end.wire.clear()
        for _ in range(lost_answers):  # the server took the session over, and its answer was lost with the link
            b.check_peer(a.recv, a.next)
            b.attach(a.recv, a.credit, SMALL.max_message)
            b.pull()
        reattach(a, b)

    def check() -> None:
        for this, other in (ends, ends[::-1]):
            assert this.taken + list(this.core.inbox) == other.sent[: len(this.taken) + len(this.core.inbox)]
            assert this.core.replay.cost <= SMALL.buffer
            assert this.core.inbox_cost == sum(map(cost, this.core.inbox)) <= SMALL.window
            assert this.core.replay.sent_cost <= other.core.consumed_cost + SMALL.window
            assert this.core.acked <= other.core.recv

    for action, second, number in actions:
        end = ends[second]
        other = ends[not second]
        core = end.core
        match action:
            case "send":
                message = bytes([len(end.sent) % 251]) * number
                if core.fin is None and core.has_room(cost(message)):
                    core.replay.extend([message])
                    end.sent.append(message)
            case "flush":
                other.wire += core.pull()
            case "deliver":
                deliver(end, number)
            case "take":
                end.taken += take(core, number)
            case "time":
                now += number / 20
                core.on_time(now)
            case "end":
                core.end()
            case _:
                reconnect(number)
        check()

    # In the end, with a link that holds and applications that read, everything arrives.
    reconnect(0)
    for _ in range(200):
        now += 1
        for this, other in (ends, ends[::-1]):
            this.core.on_time(now)
            other.wire += this.core.pull()
            deliver(this, len(this.wire))
            this.taken += take(this.core)
    check()
    for this, other in (ends, ends[::-1]):
        assert this.taken == other.sent
        assert this.core.replay.unacked() == []
        assert this.core.fin_acked == (this.core.fin is not None)
        assert this.core.peer_fin == other.core.fin
    assert OVERHEAD == 128
