"""The replay buffer: one list, a cursor, and numbers that only grow."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from towline.errors import ProtocolViolation
from towline.layers.resume._replay import OVERHEAD, ReplayBuffer, cost

PLENTY = 1 << 60


def filled(*messages: bytes) -> ReplayBuffer:
    replay = ReplayBuffer()
    replay.extend(list(messages))
    return replay


@pytest.mark.smoke
def test_messages_are_taken_in_order_and_once() -> None:
    replay = filled(b"a", b"b")
    replay.extend([b"c"])
    assert replay.next == 4
    assert replay.take(PLENTY, PLENTY) == [b"a", b"b", b"c"]
    assert replay.take(PLENTY, PLENTY) == []
    assert (replay.cursor, replay.sent_upto, replay.unsent) == (4, 3, False)


def test_what_was_acknowledged_is_forgotten_and_its_cost_is_free_again() -> None:
    replay = filled(b"aa", b"bbb", b"c")
    replay.take(PLENTY, PLENTY)
    assert replay.cost == cost(b"aa") + cost(b"bbb") + cost(b"c")
    assert replay.acknowledge(2) == cost(b"aa") + cost(b"bbb")
    assert replay.unacked() == [b"c"]
    assert replay.acknowledge(1) == 0  # old news
    assert replay.acknowledge(3) == cost(b"c")
    assert replay.cost == 0


def test_what_was_never_sent_cannot_be_acknowledged() -> None:
    replay = filled(b"a", b"b")
    with pytest.raises(ProtocolViolation, match="acknowledged message 1, where 0 were sent"):
        replay.acknowledge(1)
    replay.take(1, PLENTY)
    with pytest.raises(ProtocolViolation, match="acknowledged message 2, where 1 were sent"):
        replay.acknowledge(2)
    assert replay.unacked() == [b"a", b"b"]


def test_a_replay_is_the_cursor_moved_back_and_spends_no_credit_again() -> None:
    replay = filled(b"a", b"b", b"c")
    price = cost(b"a")
    assert replay.take(PLENTY, 2 * price) == [b"a", b"b"]
    assert replay.rewind(1) == 2
    assert replay.take(PLENTY, 2 * price) == [b"a", b"b"]  # with the credit already used up
    assert replay.sent_cost == 2 * price
    assert replay.take(PLENTY, 3 * price) == [b"c"]


def test_a_replay_starts_wherever_the_peer_says_within_what_is_here() -> None:
    replay = filled(b"a", b"b", b"c", b"d")
    replay.take(PLENTY, PLENTY)
    replay.acknowledge(1)
    assert replay.rewind(3) == 2
    assert replay.take(PLENTY, PLENTY) == [b"c", b"d"]
    assert replay.rewind(5) == 0
    assert replay.take(PLENTY, PLENTY) == []


def test_messages_above_the_credit_wait_and_empty_ones_cost_too() -> None:
    replay = filled(b"", b"", b"")
    assert replay.take(PLENTY, OVERHEAD - 1) == []
    assert replay.take(PLENTY, OVERHEAD) == [b""]
    assert replay.take(PLENTY, 3 * OVERHEAD - 1) == [b""]
    assert replay.take(PLENTY, 3 * OVERHEAD) == [b""]


def test_a_flush_ends_with_the_message_that_crosses_its_size() -> None:
    replay = filled(*[b"x" * 100] * 10)
    assert len(replay.take(250, PLENTY)) == 3
    assert len(replay.take(100, PLENTY)) == 1
    assert len(replay.take(1, PLENTY)) == 1
    replay = filled(b"x" * 1_000_000)
    assert len(replay.take(10, PLENTY)) == 1  # a large one goes alone


def test_an_acknowledgement_in_the_middle_of_a_replay_moves_the_cursor_on() -> None:
    replay = filled(b"a", b"b", b"c")
    replay.take(PLENTY, PLENTY)
    replay.rewind(1)
    replay.acknowledge(2)
    assert replay.take(PLENTY, PLENTY) == [b"c"]


class Replay(RuleBasedStateMachine):
    """Against a model that keeps everything for ever."""

    def __init__(self) -> None:
        super().__init__()
        self.replay = ReplayBuffer()
        self.all: list[bytes] = []
        self.acked = 0
        self.cursor = 0
        self.sent = 0
        self.credit = 0

    @rule(sizes=st.lists(st.integers(0, 50), max_size=5))
    def append(self, sizes: list[int]) -> None:
        messages = [bytes([len(self.all) % 251]) * size for size in sizes]
        self.all += messages
        self.replay.extend(messages)

    @rule(more=st.integers(0, 1000))
    def grant(self, more: int) -> None:
        self.credit += more

    @rule(size=st.integers(1, 200))
    def take(self, size: int) -> None:
        got = self.replay.take(size, self.credit)
        assert got == self.all[self.cursor : self.cursor + len(got)]
        self.cursor += len(got)
        self.sent = max(self.sent, self.cursor)
        assert sum(map(cost, self.all[: self.sent])) == self.replay.sent_cost
        assert self.replay.sent_cost <= max(self.credit, self.replay.sent_cost if not got else 0)

    @precondition(lambda self: self.sent > self.acked)
    @rule(data=st.data())
    def acknowledge(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(self.acked, self.sent))
        self.replay.acknowledge(number)
        self.acked = number
        self.cursor = max(self.cursor, number)

    @rule(data=st.data())
    def rewind(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(self.acked + 1, self.sent + 1))
        assert self.replay.rewind(number) == self.sent - number + 1
        self.cursor = number - 1

    @invariant()
    def numbers_agree(self) -> None:
        replay = self.replay
        assert replay.unacked() == self.all[self.acked :]
        assert replay.cost == sum(map(cost, self.all[self.acked :]))
        assert (replay.base, replay.next) == (self.acked + 1, len(self.all) + 1)
        assert (replay.cursor, replay.sent_upto) == (self.cursor + 1, self.sent)
        assert replay.unsent == (self.cursor < len(self.all))


TestReplay = Replay.TestCase


@given(st.lists(st.binary(max_size=300), max_size=60), st.integers(1, 500))
def test_whatever_the_size_of_a_flush_all_is_taken(messages: list[bytes], size: int) -> None:
    replay = filled(*messages)
    taken: list[bytes] = []
    while replay.unsent:
        flush = replay.take(size, PLENTY)
        assert flush
        assert sum(map(len, flush[:-1])) < size
        taken += flush
    assert taken == messages
