"""The rules of RPC/1, with no connection in sight: two cores that speak to each other, and one with a bad peer."""

from __future__ import annotations

import tracemalloc
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random
from typing import Final, Literal, NamedTuple, TypeAlias

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from towline.errors import ProtocolViolation, StatusCode
from towline.layers.rpc import _wire as wire
from towline.layers.rpc._core import (
    INITIAL_CREDIT,
    LAST_ID,
    MAX_PIECE,
    OVERHEAD,
    PIECE,
    Began,
    Cancelled,
    Core,
    Event,
    Failure,
    GoingAway,
    IncomingCall,
    Limits,
    OutgoingCall,
    Receiving,
    Sending,
)
from towline.layers.rpc._messages import Response
from towline.layers.rpc._wire import NO_LIMIT, Flag, Type

KIB: Final = 1 << 10
LIMITS: Final = Limits(max_calls=100, max_message=200_000, window=256 * KIB)

# --- frames, and a core that takes them -------------------------------------------------------------------------------

HELLO: Final = wire.encode_hello()
MORE, STREAM, END, REFUSED = Flag.MORE, Flag.STREAM, Flag.END, Flag.REFUSED


def a_call(id: int, payload: bytes = b"", flags: int = 0) -> bytes:
    return wire.encode_call(id, flags, NO_LIMIT, b"f", b"", payload)


def a_reply(id: int, payload: bytes = b"", flags: int = 0) -> bytes:
    return wire.encode_reply(id, flags, b"", payload)


def an_error(id: int, code: int = StatusCode.NOT_FOUND, flags: int = 0) -> bytes:
    return wire.encode_error(id, code, flags, NO_LIMIT, b"no", b"")


def a_message(id: int, payload: bytes = b"", flags: int = 0) -> bytes:
    return wire.encode_data(id, flags, payload)


an_end, a_cancel, a_credit, a_goaway = wire.encode_end, wire.encode_cancel, wire.encode_credit, wire.encode_goaway


# What a core says of itself. No tuples: one is equal to any other with the same numbers, whatever frame it stands for.


@dataclass(frozen=True)
class Hello:
    version: int


@dataclass(frozen=True)
class Error:
    id: int
    failure: Failure


@dataclass(frozen=True)
class Cancel:
    id: int


@dataclass(frozen=True)
class Credit:
    id: int
    granted: int


@dataclass(frozen=True)
class GoAway:
    last_id: int


Said: TypeAlias = Hello | Error | Cancel | Credit | GoAway


def the_error(id: int, code: int, flags: int, retry_after_ms: int, message: str, details: wire.Metadata) -> Error:
    return Error(id, Failure(code, flags, retry_after_ms, message, details))


SAYS: Final[Mapping[int, Callable[..., Said]]] = {
    Type.HELLO: Hello,
    Type.ERROR: the_error,
    Type.CANCEL: Cancel,
    Type.CREDIT: Credit,
    Type.GOAWAY: GoAway,
}
"""All other frames are the shell's to send: `read` raises if a core says one."""


def said(core: Core) -> list[Said | None]:
    """What the core wants to say, which its shell sends at once."""
    frames, core.control = core.control, []
    return [wire.read(frame, SAYS) for frame in frames]


def receive(core: Core, *frames: bytes) -> list[Event]:
    return list(core.receive(frames))


class Numbers(NamedTuple):
    """The first number of a side's own calls, and of its peer's."""

    own: int
    peers: int


ROLES: Final[Mapping[str, Numbers]] = {"dialling": Numbers(1, 2), "listening": Numbers(2, 1)}
ROLE: Final = pytest.mark.parametrize("role", ROLES)


def greeted(role: str = "listening", limits: Limits = LIMITS) -> Core:
    """A core whose HELLO was sent and whose peer's has arrived."""
    core = Core(limits, is_dialling=role == "dialling")
    assert said(core) == [Hello(1)]
    assert receive(core, HELLO) == []
    return core


def incoming(core: Core, *frames: bytes) -> IncomingCall:
    """The call of the peer's that these frames make."""
    (event,) = receive(core, *frames)
    assert isinstance(event, IncomingCall)
    return event


def take(core: Core, call: OutgoingCall | IncomingCall) -> bytes:
    assert call.receiving is not None
    message, cost = call.receiving.messages.popleft()
    core.taken(call.id, call.receiving, cost)
    return message


def is_idle(core: Core) -> bool:
    """Whether no calls are open."""
    return not core.outgoing and not core.incoming


def waiting(call: OutgoingCall | IncomingCall) -> list[bytes]:
    """Messages that have arrived and that nobody has taken."""
    return [] if call.receiving is None else [message for message, _ in call.receiving.messages]


def pieces_of(id: int, payload: bytes) -> list[bytes]:
    """DATA frames that bring what is left of a message."""
    pieces = [payload[at : at + PIECE] for at in range(0, len(payload), PIECE)] or [b""]
    return [a_message(id, piece, MORE) for piece in pieces[:-1]] + [a_message(id, pieces[-1])]


# --- a call, and its answer -------------------------------------------------------------------------------------------


@pytest.mark.smoke
@ROLE
def test_a_side_begins_with_hello_and_numbers_its_calls_by_its_role(role: str) -> None:
    core, own = greeted(role), ROLES[role].own
    assert core.can_call
    assert core.next_id == own
    assert [core.called(is_stream=False).id for _ in range(3)] == [own, own + 2, own + 4]
    assert core.next_id == own + 6
    assert sorted(core.outgoing) == [own, own + 2, own + 4]
    assert said(core) == []  # CALL is the shell's to send


@pytest.mark.parametrize(("role", "last"), [("dialling", 0xFFFFFFFD), ("listening", 0xFFFFFFFE)])
def test_when_the_numbers_are_used_up_there_are_no_more_calls(role: str, last: int) -> None:
    core, peer = greeted(role), greeted("listening" if role == "dialling" else "dialling")
    assert LAST_ID == 0xFFFFFFFE
    core.next_id = last
    assert core.can_call
    assert core.called(is_stream=False).id == last
    assert not core.can_call
    assert incoming(peer, a_call(last)).id == last


@pytest.mark.smoke
@ROLE
def test_a_call_is_made_once_and_answered_once(role: str) -> None:
    caller, answerer = greeted(role), greeted("listening" if role == "dialling" else "dialling")
    asks = wire.encode_call(caller.next_id, 0, 1500, "é".encode(), wire.encode_metadata({"a": b"1"}), b"ask")
    made = caller.called(is_stream=False)
    assert (made.number, made.receiving, made.sender, made.result, made.metadata) == (0, None, None, None, None)
    call = incoming(answerer, asks)
    assert (call.id, call.method, call.metadata, call.payload) == (made.id, "é", {"a": b"1"}, b"ask")
    assert (call.deadline_ms, call.is_stream, call.is_over, call.receiving) == (1500, False, False, None)
    assert call.sender is None
    assert answerer.incoming == {made.id: call}
    assert answerer.finish(call)
    assert call.is_over
    assert not answerer.finish(call)
    assert answerer.incoming == {}
    tells = wire.encode_reply(made.id, 0, wire.encode_metadata({"b": b"2"}), b"told")
    assert receive(caller, tells) == [made]
    assert made.result == Response(b"told", {"b": b"2"})
    assert caller.outgoing == {}
    assert said(caller) == said(answerer) == []


def test_a_call_that_is_whole_knows_the_message_that_made_it_so() -> None:
    core = greeted()
    assert [core.called(77).number, core.called(78, is_stream=True).number, core.called().number] == [77, 78, 0]


@ROLE
def test_both_sides_call_at_the_same_time(role: str) -> None:
    core, number = greeted(role), ROLES[role]
    made = core.called(is_stream=False)
    call = incoming(core, a_call(number.peers))
    assert (core.outgoing, core.incoming) == ({number.own: made}, {number.peers: call})
    assert core.finish(call)
    assert core.outgoing == {number.own: made}


def test_an_error_brings_all_that_it_says() -> None:
    core = greeted("dialling")
    made = core.called(is_stream=False)
    details = wire.encode_metadata({"why": b"so"})
    assert receive(core, wire.encode_error(1, 99, REFUSED, 250, "là".encode(), details)) == [made]
    assert made.result == Failure(99, REFUSED, 250, "là", {"why": b"so"})
    assert core.outgoing == {}


def test_a_call_may_be_answered_before_all_of_it_was_sent() -> None:
    core = greeted("dialling")
    long, stream = core.called(is_stream=False), core.called(is_stream=True)
    assert receive(core, an_error(1), a_reply(3, b"told")) == [long, stream]


def test_numbers_may_be_left_out() -> None:
    core = greeted()
    assert [incoming(core, a_call(id)).id for id in (1, 7, 9, 0xFFFFFFFD)] == [1, 7, 9, 0xFFFFFFFD]
    assert receive(core, a_cancel(3), an_end(5), a_credit(5, 1)) == []  # used as well, by the order of them


@ROLE
def test_a_cancelled_call_is_over_for_both_sides(role: str) -> None:
    core, number = greeted(role), ROLES[role]
    made = core.called(is_stream=False)
    core.cancel(made)
    core.cancel(made)
    assert said(core) == [Cancel(number.own)]
    assert core.outgoing == {}
    assert receive(core, a_reply(number.own, b"late")) == []
    call = incoming(core, a_call(number.peers))
    assert receive(core, a_cancel(number.peers)) == [Cancelled(call)]
    assert call.is_over
    assert core.incoming == {}
    assert not core.finish(call)
    assert receive(core, a_cancel(number.peers)) == []
    assert said(core) == []


def test_a_call_that_was_answered_is_not_cancelled() -> None:
    core = greeted("dialling")
    made = core.called(is_stream=False)
    receive(core, a_reply(1))
    core.cancel(made)
    assert said(core) == []


def test_the_end_of_a_call_that_never_was_whole_is_an_event_too() -> None:
    # Whoever drains waits for calls to end.
    core = greeted()
    assert receive(core, a_call(1, b"half", MORE)) == []
    call = core.incoming[1]
    assert receive(core, a_cancel(1)) == [Cancelled(call)]
    assert receive(core, a_call(3, b"half", MORE)) == []
    call = core.incoming[3]
    assert receive(core, *[a_message(3, bytes(PIECE), MORE)] * 7) == [Cancelled(call)]
    assert core.incoming == {}


def test_what_came_before_a_violation_counts() -> None:
    # Else a call that was answered would be in no table any more, and its caller would wait for ever.
    core = greeted("dialling")
    made, other = core.called(is_stream=False), core.called(is_stream=False)
    events: list[Event] = []

    def run() -> None:
        for event in core.receive([a_reply(1, b"told"), a_call(2), a_cancel(2), b"", a_reply(3)]):
            events.append(event)

    with pytest.raises(ProtocolViolation):
        run()
    assert [type(event) for event in events] == [OutgoingCall, IncomingCall, Cancelled]
    assert events[0] is made
    assert made.result is not None
    assert other.result is None


# --- messages in pieces -----------------------------------------------------------------------------------------------

LONG: Final = bytes(range(256)) * 600  # 150 KiB


def test_a_call_in_pieces_with_a_deadline_says_when_it_began() -> None:
    core = greeted()
    frame = wire.encode_call(1, MORE, 5000, b"look", b"", b"half")
    (event,) = receive(core, frame)
    assert isinstance(event, Began)
    assert event.call.payload is None
    assert receive(core, wire.encode_data(1, 0, b"whole")) == [event.call]


def test_a_call_in_pieces_begins_when_it_is_whole() -> None:
    core = greeted()
    *frames, last = pieces_of(1, LONG[PIECE:])
    assert receive(core, a_call(1, LONG[:PIECE], MORE), *frames) == []
    assert core.incoming[1].payload is None
    call = incoming(core, last)
    assert (call.payload, call.is_stream) == (LONG, False)
    assert core.incoming == {1: call}


def test_a_stream_whose_first_message_is_in_pieces_goes_on_with_others() -> None:
    core = greeted()
    call = incoming(core, a_call(1, LONG[:PIECE], MORE | STREAM), *pieces_of(1, LONG[PIECE:]))
    assert call.payload == LONG
    assert call.receiving is not None
    assert receive(core, a_message(1, b"next"), an_end(1)) == [call.receiving] * 2
    assert (waiting(call), call.receiving.ended) == ([b"next"], True)


def test_the_last_piece_of_a_call_may_be_the_end_of_its_messages() -> None:
    core = greeted()
    call = incoming(core, a_call(1, b"a", MORE | STREAM), a_message(1, b"b", END))
    assert call.payload == b"ab"
    assert call.receiving is not None
    assert call.receiving.ended


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_reply_in_pieces_is_given_when_it_is_whole(is_stream: bool) -> None:
    core = greeted("dialling")
    made = core.called(is_stream=is_stream)
    metadata = wire.encode_metadata({"a": b"1"})
    *frames, last = [wire.encode_reply(1, MORE, metadata, LONG[:PIECE]), *pieces_of(1, LONG[PIECE:])]
    assert receive(core, *frames) == []
    assert made.result is None
    assert core.outgoing == {1: made}
    assert receive(core, last) == [made]
    assert made.result == Response(LONG, {"a": b"1"})
    assert core.outgoing == {}


@pytest.mark.parametrize("code", [StatusCode.ABORTED])
def test_an_error_may_come_within_a_reply_or_a_message(code: int) -> None:
    core = greeted("dialling")
    unary, stream = core.called(is_stream=False), core.called(is_stream=True)
    assert receive(core, a_reply(1, b"half", MORE), a_message(3, b"half", MORE)) == []
    assert receive(core, an_error(1, code), an_error(3, code)) == [unary, stream]
    assert isinstance(unary.result, Failure)
    assert waiting(stream) == []


def test_pieces_may_be_of_any_length_and_messages_of_calls_mixed() -> None:
    core = greeted()
    pieces = [b"", b"a", b"", b"bc", b"d" * MAX_PIECE, b""]
    frames = [a_call(1, b"", MORE), a_call(3, b"3", MORE)]
    for piece in pieces:
        frames += [a_message(1, piece, MORE), a_message(3, piece, MORE)]
    one, three = receive(core, *frames, a_message(1), a_message(3, b"3"))
    assert isinstance(one, IncomingCall)
    assert isinstance(three, IncomingCall)
    assert (one.payload, three.payload) == (b"".join(pieces), b"3" + b"".join(pieces) + b"3")


def test_a_piece_has_at_most_64_kib() -> None:
    core = greeted()
    most = bytes(MAX_PIECE)
    assert incoming(core, a_call(1, most, STREAM)).payload == most
    made = core.called(is_stream=False)
    assert receive(core, a_reply(made.id, most)) == [made]
    receive(core, a_message(1, most, MORE), a_message(1, most))
    assert waiting(core.incoming[1]) == [most + most]


# --- streams ----------------------------------------------------------------------------------------------------------


def test_messages_of_a_stream_arrive_in_order_in_both_directions() -> None:
    core = greeted()
    call = incoming(core, a_call(1, b"first", STREAM))
    made = core.called(is_stream=True)
    assert call.receiving is not None
    assert made.receiving is not None
    events = receive(core, a_message(1, b"a"), a_message(2, b"A"), a_message(1), a_message(1, b"b", END))
    assert events == [it.receiving for it in (call, made, call, call) if it.receiving]
    assert (waiting(call), waiting(made)) == ([b"a", b"", b"b"], [b"A"])
    assert (call.receiving.ended, made.receiving.ended) == (True, False)
    assert [take(core, call) for _ in range(3)] == [b"a", b"", b"b"]
    assert receive(core, a_message(2, LONG[:100], MORE), a_message(2, LONG[100:200]), a_reply(2)) == [
        made.receiving,
        made,
    ]
    assert waiting(made) == [b"A", LONG[:200]]


def test_an_end_is_an_event_for_whoever_waits_for_a_message() -> None:
    core = greeted()
    call = incoming(core, a_call(1, b"", STREAM))
    assert call.receiving is not None
    assert receive(core, an_end(1)) == [call.receiving]
    assert call.receiving.ended
    assert core.incoming == {1: call}


def test_a_stream_that_ends_at_once_has_no_messages_and_is_open_still() -> None:
    core = greeted()
    call = incoming(core, a_call(1, b"all", STREAM | END))
    assert call.receiving is not None
    assert call.receiving.ended
    assert said(core) == []  # no credit for what will not come
    assert core.incoming == {1: call}


# --- credit -----------------------------------------------------------------------------------------------------------

SMALLEST: Final = Limits(max_calls=100, max_message=200_000, window=64 * KIB)


@ROLE
def test_a_stream_is_granted_the_window_at_once_where_that_is_more_than_all_have(role: str) -> None:
    core, number = greeted(role), ROLES[role]
    core.called(is_stream=True)
    assert said(core) == [Credit(number.own, 256 * KIB)]
    core.called(is_stream=False)
    receive(core, a_call(number.peers))
    assert said(core) == []
    receive(core, a_call(number.peers + 2, b"", STREAM))
    assert said(core) == [Credit(number.peers + 2, 256 * KIB)]
    core = greeted(role, SMALLEST)
    core.called(is_stream=True)
    receive(core, a_call(number.peers, b"", STREAM))
    assert said(core) == []


def test_credit_is_the_cost_of_all_since_the_beginning_to_the_byte() -> None:
    assert (INITIAL_CREDIT, OVERHEAD) == (65_536, 64)
    core = greeted(limits=SMALLEST)
    call = incoming(core, a_call(1, bytes(50_000), STREAM))  # what CALL carries is free
    receive(core, a_message(1, bytes(40_000)), a_message(1), a_message(1, bytes(65_536 - 40_000 - 3 * 64)))
    assert len(waiting(call)) == 3
    with pytest.raises(ProtocolViolation, match="DATA with 0 bytes for call 1, where 65,536 are allowed and credit is"):
        receive(core, a_message(1))
    core = greeted(limits=SMALLEST)
    receive(core, a_call(1, b"", STREAM), a_message(1, bytes(60_000)))
    with pytest.raises(ProtocolViolation, match=r"DATA with 5,409 bytes .* credit is left for 5,408$"):
        receive(core, a_message(1, bytes(5_409), MORE))
    core = greeted(limits=SMALLEST)
    receive(core, a_call(1, b"", STREAM), a_message(1, bytes(65_440)))
    with pytest.raises(ProtocolViolation, match=r"credit is left for 0$"):  # for nothing, not for less
        receive(core, a_message(1))


def test_whoever_sends_has_room_for_what_was_granted() -> None:
    core = greeted("dialling")
    sending = core.called(is_stream=True).sending
    assert (sending.credit, sending.spent) == (INITIAL_CREDIT, 0)
    assert sending.has_room(INITIAL_CREDIT - OVERHEAD)
    assert not sending.has_room(INITIAL_CREDIT - OVERHEAD + 1)
    sending.spent += 65_472
    assert sending.has_room(0)
    assert not sending.has_room(1)
    assert receive(core, a_credit(1, 65_537)) == [sending]
    assert sending.has_room(1)
    assert not sending.has_room(2)


@ROLE
def test_credit_goes_up_only(role: str) -> None:
    core, number = greeted(role), ROLES[role]
    made = core.called(is_stream=True)
    call = incoming(core, a_call(number.peers))
    for one in (made, call):
        assert receive(core, a_credit(one.id, 100_000)) == [one.sending]
        assert receive(core, a_credit(one.id, 100_000), a_credit(one.id, 99_999), a_credit(one.id, 0)) == []
        assert one.sending.credit == 100_000
        assert receive(core, a_credit(one.id, 2**64 - 1)) == [one.sending]
        assert one.sending.credit == 2**64 - 1


def test_what_was_taken_is_granted_again_in_large_steps() -> None:
    core = greeted()
    call = incoming(core, a_call(1, b"", STREAM))
    said(core)
    receive(core, *[a_message(1, bytes(MAX_PIECE - OVERHEAD))] * 4)  # all of the window
    take(core, call)
    assert said(core) == []
    take(core, call)
    assert said(core) == [Credit(1, (256 + 128) * KIB)]  # half of the window
    take(core, call)
    assert said(core) == []
    take(core, call)
    assert said(core) == [Credit(1, 512 * KIB)]
    assert receive(core, *[a_message(1, bytes(MAX_PIECE - OVERHEAD))] * 4)
    with pytest.raises(ProtocolViolation):
        receive(core, a_message(1))


def test_parts_are_granted_as_they_come() -> None:
    core = greeted(limits=SMALLEST)
    call = incoming(core, a_call(1, b"", STREAM))
    piece = a_message(1, bytes(PIECE), MORE)
    cost = PIECE + OVERHEAD
    for count in range(1, 6):
        receive(core, piece)
        assert said(core) == [Credit(1, 64 * KIB + count * cost)]
    receive(core, a_message(1))
    assert said(core) == []
    assert take(core, call) == bytes(5 * PIECE)
    # It was granted before; only the window is free again, and of that only what the last piece took is new.
    assert said(core) == []
    receive(core, a_message(1, bytes(PIECE - 2 * OVERHEAD)))
    take(core, call)
    assert said(core) == [Credit(1, 64 * KIB + 6 * cost - OVERHEAD)]


@pytest.mark.parametrize("is_stream", [False, True])
def test_parts_of_a_request_and_of_a_reply_are_granted_and_the_first_is_free(is_stream: bool) -> None:
    core = greeted("dialling", SMALLEST)
    core.called(is_stream=is_stream)
    flags = STREAM if is_stream else 0
    receive(core, a_call(2, bytes(PIECE), MORE | flags), a_reply(1, bytes(PIECE), MORE))
    cost = PIECE + OVERHEAD
    assert said(core) == [Credit(2, 64 * KIB + cost), Credit(1, 64 * KIB + cost)]
    receive(core, a_message(2, bytes(PIECE), MORE), a_message(1, bytes(PIECE), MORE))
    assert said(core) == [Credit(2, 64 * KIB + 2 * cost), Credit(1, 64 * KIB + 2 * cost)]
    receive(core, a_message(2, bytes(PIECE)), a_message(1, bytes(PIECE)))
    # The request is given, so that counts as taken; where nothing may follow nothing is granted.
    assert said(core) == ([Credit(2, 64 * KIB + 3 * cost)] if is_stream else [])


def test_nothing_is_granted_after_the_end() -> None:
    core = greeted(limits=SMALLEST)
    ended = incoming(core, a_call(1, b"", STREAM))
    receive(core, a_message(1, bytes(60_000)), an_end(1))
    take(core, ended)
    flagged = incoming(core, a_call(3, b"", STREAM))
    receive(core, a_message(3, bytes(60_000), END))
    take(core, flagged)
    answered = incoming(core, a_call(5, b"", STREAM))
    receive(core, a_message(5, bytes(60_000)))
    core.finish(answered)
    take(core, answered)
    made = core.called(is_stream=True)
    receive(core, a_message(2, bytes(60_000)), a_reply(2))
    assert take(core, made) == bytes(60_000)
    incoming(core, a_call(7, b"", STREAM | MORE), a_message(7, bytes(60_000), END))
    assert said(core) == []


@given(
    st.sampled_from([64 * KIB, 64 * KIB + 1, 65_600, 65_663, 65_664, 70_000, 128 * KIB, 256 * KIB]),
    st.lists(st.integers(0, PIECE) | st.integers(PIECE - 2 * OVERHEAD, PIECE), max_size=40),
)
@example(64 * KIB, [32 * KIB - 1 - OVERHEAD])
@example(64 * KIB, [32 * KIB - 2 * OVERHEAD])
@example(65_663, [32_831 - OVERHEAD - 1])
def test_a_peer_of_whose_messages_all_were_taken_has_room_for_a_piece(window: int, sizes: list[int]) -> None:
    # Else both would wait for ever: the one for credit, the other for something to take.
    core = greeted(limits=Limits(max_calls=1, max_message=PIECE, window=window))
    call = incoming(core, a_call(1, b"", STREAM))
    granted, spent = INITIAL_CREDIT, 0
    for size in [*sizes, PIECE]:
        for frame in said(core):
            assert isinstance(frame, Credit)
            assert granted < frame.granted <= spent + window
            granted = frame.granted
        assert spent + PIECE + OVERHEAD <= granted
        spent += size + OVERHEAD
        receive(core, a_message(1, bytes(size)))
        take(core, call)


# --- limits -----------------------------------------------------------------------------------------------------------


def test_more_calls_than_may_be_open_are_refused_until_one_is_over() -> None:
    core = greeted(limits=Limits(max_calls=2, max_message=100, window=64 * KIB))
    one = incoming(core, a_call(1))
    assert receive(core, a_call(3, b"half", MORE)) == []
    assert receive(core, a_call(5), a_call(7, b"half", MORE), a_message(7, b"rest")) == []
    text = "2 calls of yours are open, as many as may be"
    code = StatusCode.RESOURCE_EXHAUSTED
    assert said(core) == [Error(id, Failure(code, REFUSED, NO_LIMIT, text, {})) for id in (5, 7)]
    assert sorted(core.incoming) == [1, 3]
    core.finish(one)
    assert incoming(core, a_call(9)).id == 9
    receive(core, a_cancel(3))
    assert incoming(core, a_call(11)).id == 11
    assert said(core) == []
    receive(core, a_call(13))
    assert len(said(core)) == 1


def test_calls_of_our_own_do_not_count() -> None:
    core = greeted(limits=Limits(max_calls=1, max_message=100, window=64 * KIB))
    for _ in range(5):
        core.called(is_stream=False)
    assert incoming(core, a_call(1))


TINY: Final = Limits(max_calls=3, max_message=10, window=64 * KIB)
TEN, ELEVEN = b"x" * 10, b"x" * 11

TOO_LARGE: Final[Mapping[str, tuple[list[bytes], list[bytes], list[bytes]]]] = {
    # what comes before, how a message arrives that is just not too large, and one that is
    "a request": ([], [a_call(1, TEN)], [a_call(1, ELEVEN)]),
    "a request that opens a stream": ([], [a_call(1, TEN, STREAM)], [a_call(1, ELEVEN, STREAM)]),
    "a request in pieces": (
        [],
        [a_call(1, b"x" * 5, MORE), a_message(1, b"x" * 5)],
        [a_call(1, b"x" * 5, MORE), a_message(1, b"x" * 6)],
    ),
    "a request that is too large before it is whole": (
        [],
        [a_call(1, TEN, MORE), a_message(1)],
        [a_call(1, TEN, MORE), a_message(1, b"x", MORE)],
    ),
    "a request whose first piece is too large": ([], [a_call(1, TEN, MORE), a_message(1)], [a_call(1, ELEVEN, MORE)]),
    "a message": ([a_call(1, b"", STREAM)], [a_message(1, TEN)], [a_message(1, ELEVEN)]),
    "the last message": ([a_call(1, b"", STREAM)], [a_message(1, TEN, END)], [a_message(1, ELEVEN, END)]),
    "a message in pieces": (
        [a_call(1, b"", STREAM), a_message(1, TEN, MORE), a_message(1)],
        [a_message(1, b"x" * 5, MORE), a_message(1, b"x" * 5)],
        [a_message(1, b"x" * 5, MORE), a_message(1, b"x" * 6)],
    ),
    "a message that is too large before it is whole": (
        [a_call(1, b"", STREAM)],
        [a_message(1, TEN, MORE), a_message(1)],
        [a_message(1, TEN, MORE), a_message(1, b"x", MORE)],
    ),
    "a message whose first piece is too large": (
        [a_call(1, b"", STREAM)],
        [a_message(1, TEN, MORE), a_message(1)],
        [a_message(1, ELEVEN, MORE)],
    ),
}


@pytest.mark.parametrize("kind", TOO_LARGE)
@pytest.mark.parametrize("window", [64 * KIB, 256 * KIB])
def test_a_message_that_is_too_large_is_answered_with_an_error(kind: str, window: int) -> None:
    limits = Limits(max_calls=3, max_message=10, window=window)
    before, largest, too_large = TOO_LARGE[kind]
    has_begun = bool(before)
    core = greeted(limits=limits)
    receive(core, *before, *largest)
    assert core.incoming[1].payload is not None
    assert core.incoming[1].is_over is False

    core = greeted(limits=limits)
    receive(core, *before, *too_large[:-1])
    said(core)  # credit
    too_large = too_large[-1:]
    call = core.incoming.get(1)
    events = receive(core, *too_large)
    assert [type(event) for event in events] == [Cancelled]
    if call is not None:
        assert events == [Cancelled(call)]
    # Nothing more comes for that call, credit neither.
    text = "a message of 11 bytes or more, where max_message is 10"
    code = StatusCode.RESOURCE_EXHAUSTED
    assert said(core) == [Error(1, Failure(code, 0 if has_begun else REFUSED, NO_LIMIT, text, {}))]
    assert core.incoming == {}
    # What was under way comes late.
    assert receive(core, a_message(1, b"x", MORE), a_message(1, b"x"), an_end(1), a_cancel(1)) == []
    assert said(core) == []


TOO_LARGE_ANSWERS: Final[Mapping[str, tuple[bool, list[bytes], list[bytes]]]] = {
    # whether the call is a stream, and as above
    "a reply": (False, [a_reply(1, TEN)], [a_reply(1, ELEVEN)]),
    "a reply in pieces": (
        False,
        [a_reply(1, b"x" * 5, MORE), a_message(1, b"x" * 5)],
        [a_reply(1, b"x" * 5, MORE), a_message(1, b"x" * 6)],
    ),
    "a reply that is too large before it is whole": (
        False,
        [a_reply(1, TEN, MORE), a_message(1)],
        [a_reply(1, TEN, MORE), a_message(1, b"x", MORE)],
    ),
    "a reply whose first piece is too large": (
        False,
        [a_reply(1, TEN, MORE), a_message(1)],
        [a_reply(1, ELEVEN, MORE)],
    ),
    "the reply of a stream": (True, [a_reply(1, TEN)], [a_reply(1, ELEVEN)]),
    "the reply of a stream, in pieces": (
        True,
        [a_reply(1, TEN, MORE), a_message(1)],
        [a_reply(1, TEN, MORE), a_message(1, b"x")],
    ),
    "a message": (True, [a_message(1, TEN), a_reply(1)], [a_message(1, ELEVEN)]),
    "a message in pieces": (
        True,
        [a_message(1, TEN, MORE), a_message(1), a_reply(1)],
        [a_message(1, TEN, MORE), a_message(1, b"x")],
    ),
    "a message whose first piece is too large": (
        True,
        [a_message(1, TEN, MORE), a_message(1), a_reply(1)],
        [a_message(1, ELEVEN, MORE)],
    ),
}


@pytest.mark.parametrize("kind", TOO_LARGE_ANSWERS)
def test_an_answer_that_is_too_large_ends_the_wait_and_cancels_the_call(kind: str) -> None:
    is_stream, largest, too_large = TOO_LARGE_ANSWERS[kind]
    core = greeted("dialling", TINY)
    made = core.called(is_stream=is_stream)
    receive(core, *largest)
    assert isinstance(made.result, Response)
    assert said(core) == []

    core = greeted("dialling", TINY)
    made = core.called(is_stream=is_stream)
    assert receive(core, *too_large) == [made]
    text = "a message of 11 bytes or more, where max_message is 10"
    assert made.result == Failure(StatusCode.RESOURCE_EXHAUSTED, 0, NO_LIMIT, text, {})
    assert said(core) == [Cancel(1)]
    assert core.outgoing == {}
    assert receive(core, a_message(1, b"x", MORE), a_reply(1), an_error(1)) == []


# --- what a peer may send without end ---------------------------------------------------------------------------------

MANY: Final = 20_000


def kept_of(flood: Callable[[], None]) -> int:
    """How many bytes are kept after it."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        flood()
        return tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()


@ROLE
@pytest.mark.parametrize(
    "kind",
    ["credit", "late credit", "cancel", "late data", "late end", "late reply", "late error", "goaway", "unknown type"],
)
def test_a_flood_of_frames_that_change_nothing_is_not_kept(role: str, kind: str) -> None:
    core, number = busy(role)
    frame = {
        "credit": a_credit(number.peers, 70_000),
        "late credit": a_credit(number.own + 10, 70_000),
        "cancel": a_cancel(number.peers + 12),
        "late data": a_message(number.peers + 12, b"x" * 100, MORE),
        "late end": an_end(number.peers + 12),
        "late reply": a_reply(number.own + 10, b"x" * 100, MORE),
        "late error": an_error(number.own + 10),
        "goaway": a_goaway(number.own + 12),
        "unknown type": b"\x80" + b"x" * 100,
    }[kind]

    def flood() -> None:
        for _ in core.receive(frame for _ in range(MANY)):
            pass

    assert kept_of(flood) < MANY  # less than a byte for each; other threads may allocate a little meanwhile
    assert said(core) == []


def test_calls_without_end_cost_one_refusal_each_and_nothing_else() -> None:
    core = greeted(limits=TINY)
    receive(core, a_call(1), a_call(3), a_call(5))

    def flood() -> None:
        for id in range(7, 7 + 2 * MANY, 2):
            assert receive(core, a_call(id, b"x" * 100, MORE | STREAM), a_message(id, b"x", MORE)) == []
            (refusal,) = said(core)
            assert isinstance(refusal, Error)
            assert refusal.id == id

    assert kept_of(flood) < MANY
    assert sorted(core.incoming) == [1, 3, 5]


def test_calls_that_are_cancelled_at_once_are_not_kept() -> None:
    core = greeted()

    def flood() -> None:
        for id in range(1, 2 * MANY, 2):
            call, cancelled = receive(core, a_call(id, b"x" * 100, STREAM), a_cancel(id))
            assert isinstance(call, IncomingCall)
            assert isinstance(cancelled, Cancelled)
            assert len(said(core)) == 1  # the credit

    assert kept_of(flood) < MANY
    assert core.incoming == {}


@pytest.mark.parametrize("size", [0, 1, 2])
def test_parts_of_a_message_take_no_more_than_their_bytes(size: int) -> None:
    # Their cost is granted as they come, so nothing else bounds how many there are.
    core = greeted()
    receive(core, a_call(1, b"", MORE))
    assert said(core) == [Credit(1, 256 * KIB + OVERHEAD)]
    grants: list[int] = []

    def flood() -> None:
        for count in range(1, MANY + 1):
            assert receive(core, a_message(1, bytes(size), MORE)) == []
            grants.extend(frame.granted for frame in said(core) if isinstance(frame, Credit))
            assert len(grants) <= count * (size + OVERHEAD) // (128 * KIB)

    assert kept_of(flood) < size * MANY * 9 // 8 + MANY
    assert len(grants) > 5
    assert incoming(core, a_message(1)).payload == bytes(size * MANY)


# --- going away -------------------------------------------------------------------------------------------------------


@ROLE
def test_whoever_goes_away_says_so_once_and_finishes_what_is_open(role: str) -> None:
    core, number = greeted(role), ROLES[role]
    one = incoming(core, a_call(number.peers))
    receive(core, a_call(number.peers + 2, b"half", MORE))
    receive(core, a_call(number.peers + 4), a_cancel(number.peers + 4))
    said(core)
    core.go_away()
    core.go_away()
    assert core.goes_away
    assert said(core) == [GoAway(number.peers + 4)]
    assert receive(core, a_call(number.peers + 6), a_call(number.peers + 8, b"half", MORE | STREAM)) == []
    assert receive(core, a_message(number.peers + 8, b"rest")) == []
    text, code = "the server is shutting down", StatusCode.UNAVAILABLE
    assert said(core) == [
        Error(id, Failure(code, REFUSED, NO_LIMIT, text, {})) for id in (number.peers + 6, number.peers + 8)
    ]
    two = incoming(core, a_message(number.peers + 2, b"rest"))
    assert two.payload == b"halfrest"
    assert core.incoming == {number.peers: one, number.peers + 2: two}
    assert core.can_call  # of its own it may make as many as before
    assert not core.peer_goes_away
    made = core.called(is_stream=False)
    assert receive(core, a_reply(made.id)) == [made]


def test_whoever_goes_away_before_any_call_says_0() -> None:
    core = greeted()
    core.go_away()
    assert said(core) == [GoAway(0)]
    assert receive(core, a_call(1)) == []
    assert len(said(core)) == 1


@ROLE
def test_when_the_peer_goes_away_the_calls_that_it_has_not_seen_are_refused(role: str) -> None:
    core, number = greeted(role), ROLES[role]
    made = [core.called(is_stream=False) for _ in range(4)]
    said(core)
    core.cancel(made[3])
    assert receive(core, a_goaway(made[1].id)) == [GoingAway([made[2]])]
    text = "the peer is shutting down"
    assert made[2].result == Failure(StatusCode.UNAVAILABLE, REFUSED, NO_LIMIT, text, {})
    assert made[3].result is None  # it was over before
    assert sorted(core.outgoing) == [made[0].id, made[1].id]
    assert core.peer_goes_away
    assert not core.can_call
    assert not core.goes_away
    assert receive(core, an_error(made[2].id), a_reply(made[0].id)) == [made[0]]
    assert receive(core, a_goaway(0)) == [GoingAway([made[1]])]
    assert core.outgoing == {}
    assert incoming(core, a_call(number.peers)).id == number.peers


def test_calls_that_cross_with_going_away_on_both_sides_end_once() -> None:
    a, b = greeted("dialling"), greeted("listening")
    cores = (a, b)
    seen, unseen = ([core.called(is_stream=False) for core in cores] for _ in range(2))
    called = [incoming(core, a_call(call.id)) for core, call in zip(cores, reversed(seen), strict=True)]
    for core in cores:
        core.go_away()
    goaways = [core.control for core in cores]
    for core in cores:
        core.control = []
    for core, goaway, call, own, other in zip(cores, reversed(goaways), called, unseen, reversed(unseen), strict=True):
        assert receive(core, a_call(other.id)) == []  # sent before the other heard of it
        assert receive(core, *goaway) == [GoingAway([own])]
        assert core.finish(call)
    assert all(isinstance(call.result, Failure) and call.result.flags == REFUSED for call in unseen)
    for caller, answerer, made in zip(cores, reversed(cores), seen, strict=True):
        (refusal,) = answerer.control
        assert receive(caller, refusal, a_reply(made.id)) == [made]
        assert is_idle(caller)


# --- what a peer must not do ------------------------------------------------------------------------------------------


def busy(role: str, limits: Limits = LIMITS) -> tuple[Core, Numbers]:
    """A core with a call in every state, on either side: see below."""
    core, number = greeted(role, limits), ROLES[role]
    own, peers = number
    made = [core.called(is_stream=is_stream) for is_stream in (False, True, False, True, True, False, True)]
    receive(core, a_reply(own + 4, b"half", MORE))
    receive(core, a_reply(own + 6, b"half", MORE))
    receive(core, a_message(own + 8, b"half", MORE))
    core.cancel(made[5])
    receive(core, a_reply(own + 12))
    receive(core, a_call(peers), a_call(peers + 2, b"", STREAM))
    receive(core, a_call(peers + 4, b"half", MORE), a_call(peers + 6, b"half", MORE | STREAM))
    receive(core, a_call(peers + 8, b"", STREAM), a_message(peers + 8, b"half", MORE))
    receive(core, a_call(peers + 10, b"", STREAM), an_end(peers + 10))
    core.finish(incoming(core, a_call(peers + 12)))
    receive(core, a_call(peers + 14, b"", STREAM), a_cancel(peers + 14))
    said(core)
    receive(core, a_credit(peers, 70_000))
    return core, number


OWN: Final = {
    "a call": 0,
    "a stream": 2,
    "a call, its reply half here": 4,
    "a stream, its reply half here": 6,
    "a stream, a message half here": 8,
    "a call that was cancelled": 10,
    "a stream that was answered": 12,
    "a call that was not made yet": 14,
    "one that comes long after": 140,
}
PEERS: Final = {
    "a call": 0,
    "a stream": 2,
    "a call, half here": 4,
    "a stream, half here": 6,
    "a stream, a message half here": 8,
    "a stream whose messages have ended": 10,
    "a call that was answered": 12,
    "a stream that was cancelled": 14,
    "a call that was not made yet": 16,
    "one that comes long after": 160,
}
"""The calls of a busy core, counted from the first of the same side."""

Frames: TypeAlias = Callable[[int], Sequence[bytes]]


def full(id: int) -> list[bytes]:
    """So much that all credit is used to the last byte."""
    return [a_message(id, bytes(MAX_PIECE - OVERHEAD))] * 4


@dataclass(frozen=True)
class Violation:
    side: Literal["own", "peers"]
    call: str
    frames: Frames  # for the number of that call. All but the last are fine.
    text: str


NEVER: Final = r"for call \d+, which was never made$"
LARGE: Final = bytes(MAX_PIECE + 1)

VIOLATIONS: Final[Mapping[str, Violation]] = {
    # --- numbers
    "a number again": Violation(
        "peers", "a call", lambda id: [a_call(id)], r"CALL \d+, where a number above \d+ of the peer's is expected"
    ),
    "a number that is over, again": Violation(
        "peers", "a stream that was cancelled", lambda id: [a_call(id)], r"CALL \d+, where a number above"
    ),
    "a number of the other side": Violation(
        "own", "one that comes long after", lambda id: [a_call(id)], r"CALL \d+, where a number above"
    ),
    "the number of an own call": Violation("own", "a call", lambda id: [a_call(id)], r"CALL \d+, where a number above"),
    "number 0": Violation("own", "a call", lambda _: [a_call(0)], r"CALL 0, where a number above"),
    # --- CALL
    "a call with more than 64 KiB": Violation(
        "peers",
        "a call that was not made yet",
        lambda id: [a_call(id, LARGE)],
        r"CALL with 65,537 bytes, where 65,536 are allowed",
    ),
    "a call in pieces whose first has more than 64 KiB": Violation(
        "peers", "a call that was not made yet", lambda id: [a_call(id, LARGE, MORE | STREAM)], r"CALL with 65,537"
    ),
    "an end of what is no stream": Violation(
        "peers", "a call that was not made yet", lambda id: [a_call(id, b"", END)], "CALL with END, though it opens no"
    ),
    "an end within the first message": Violation(
        "peers",
        "a call that was not made yet",
        lambda id: [a_call(id, b"", MORE | STREAM | END)],
        "CALL with MORE and END",
    ),
    # --- REPLY
    "a second reply": Violation(
        "own", "a call, its reply half here", lambda id: [a_reply(id)], r"a second REPLY to call \d+"
    ),
    "a second reply, of a stream": Violation(
        "own", "a stream, its reply half here", lambda id: [a_reply(id, b"", MORE)], r"a second REPLY to call \d+"
    ),
    "a reply with more than 64 KiB": Violation(
        "own", "a call", lambda id: [a_reply(id, LARGE)], r"REPLY with 65,537 bytes, where 65,536 are allowed"
    ),
    "a reply in pieces whose first has more than 64 KiB": Violation(
        "own", "a stream", lambda id: [a_reply(id, LARGE, MORE)], r"REPLY with 65,537 bytes"
    ),
    "a reply within a message": Violation(
        "own", "a stream, a message half here", lambda id: [a_reply(id)], r"REPLY to call \d+ within a message"
    ),
    "a reply in pieces within a message": Violation(
        "own", "a stream, a message half here", lambda id: [a_reply(id, b"", MORE)], r"REPLY to call \d+ within a mes"
    ),
    # --- DATA
    "a message for a call that is no stream": Violation(
        "own", "a call", lambda id: [a_message(id)], r"DATA for call \d+"
    ),
    "a message from the caller of what is no stream": Violation(
        "peers", "a call", lambda id: [a_message(id)], r"DATA for call \d+"
    ),
    "a second message of a call in pieces": Violation(
        "peers", "a call, half here", lambda id: [a_message(id), a_message(id)], r"DATA for call \d+ after its end"
    ),
    "a message after END": Violation(
        "peers",
        "a stream whose messages have ended",
        lambda id: [a_message(id)],
        r"DATA for call \d+ after its end",
    ),
    "a message after the flag END": Violation(
        "peers", "a stream", lambda id: [a_message(id, b"", END), a_message(id)], r"DATA for call \d+ after its end"
    ),
    "a message after the flag END of a first message in pieces": Violation(
        "peers",
        "a stream, half here",
        lambda id: [a_message(id, b"", END), a_message(id, b"", MORE)],
        r"DATA for call \d+ after its end",
    ),
    "a message after the flag END of CALL": Violation(
        "peers",
        "a call that was not made yet",
        lambda id: [a_call(id, b"", STREAM | END), a_message(id)],
        r"DATA for call \d+ after its end",
    ),
    "a message with more than 64 KiB": Violation(
        "peers", "a stream", lambda id: [a_message(id, LARGE)], r"DATA with 65,537 bytes .* where 65,536 are allowed"
    ),
    "a message with more than 64 KiB from the side that was called": Violation(
        "own", "a stream", lambda id: [a_message(id, LARGE)], r"DATA with 65,537 bytes .* where 65,536 are allowed"
    ),
    "a message beyond credit": Violation(
        "peers", "a stream", lambda id: [*full(id), a_message(id)], r"DATA with 0 bytes .* credit is left for 0$"
    ),
    "a message beyond credit from the side that was called": Violation(
        "own", "a stream", lambda id: [*full(id), a_message(id)], r"DATA with 0 bytes .* credit is left for 0$"
    ),
    "a part of a message beyond credit": Violation(
        "peers", "a stream", lambda id: [*full(id), a_message(id, b"x", MORE)], r"DATA with 1 bytes .* for 0$"
    ),
    "the end of a message within it": Violation(
        "peers", "a stream", lambda id: [a_message(id, b"", MORE | END)], "DATA with MORE and END"
    ),
    "the end of the messages of the side that was called": Violation(
        "own", "a stream", lambda id: [a_message(id, b"", END)], "DATA with END from the side that was called"
    ),
    "the flag END within a reply": Violation(
        "own", "a call, its reply half here", lambda id: [a_message(id, b"", END)], "DATA with END from the side"
    ),
    # --- END
    "END from the side that was called": Violation(
        "own", "a stream", lambda id: [an_end(id)], "END from the side that was called"
    ),
    "END within a message": Violation(
        "peers",
        "a stream, a message half here",
        lambda id: [an_end(id)],
        r"END of call \d+ within a message or after its end",
    ),
    "END within the first message": Violation(
        "peers", "a stream, half here", lambda id: [an_end(id)], r"END of call \d+ within a message"
    ),
    "END within a call": Violation(
        "peers", "a call, half here", lambda id: [an_end(id)], r"END of call \d+ within a message"
    ),
    "END of a call that is no stream": Violation(
        "peers", "a call", lambda id: [an_end(id)], r"END of call \d+ within a message or after its end"
    ),
    "END again": Violation(
        "peers", "a stream whose messages have ended", lambda id: [an_end(id)], r"END of call \d+ .* after its end"
    ),
    "END after the flag END": Violation(
        "peers", "a stream", lambda id: [a_message(id, b"", END), an_end(id)], r"END of call \d+ .* after its end"
    ),
    # --- CANCEL
    "CANCEL from the side that was called": Violation(
        "own", "a call", lambda id: [a_cancel(id)], "CANCEL from the side that was called"
    ),
    "late CANCEL from the side that was called": Violation(
        "own", "a call that was cancelled", lambda id: [a_cancel(id)], "CANCEL from the side that was called"
    ),
    # --- frames of the wrong side
    "a reply from the caller": Violation("peers", "a call", lambda id: [a_reply(id)], f"REPLY {NEVER}"),
    "an error from the caller": Violation("peers", "a call", lambda id: [an_error(id)], f"ERROR {NEVER}"),
    "a late reply from the caller": Violation(
        "peers", "a call that was answered", lambda id: [a_reply(id)], f"REPLY {NEVER}"
    ),
    "a late error from the caller": Violation(
        "peers", "a call that was answered", lambda id: [an_error(id)], f"ERROR {NEVER}"
    ),
    # --- the frame itself
    "an unknown type": Violation("own", "a call", lambda _: [b"\x0a"], "a frame of the unknown type 10"),
    "an empty frame": Violation("own", "a call", lambda _: [b""], "an empty frame"),
    "a frame that is too short": Violation("own", "a call", lambda _: [b"\x07\x00"], "a CANCEL frame of 2 bytes"),
    "malformed metadata in what is late": Violation(
        "own",
        "a call that was cancelled",
        lambda id: [wire.encode_reply(id, 0, b"\x00\x00\x00", b"")],
        "malformed metadata",
    ),
    "a second HELLO": Violation("own", "a call", lambda _: [HELLO], "a second HELLO"),
}


@ROLE
@pytest.mark.parametrize("name", VIOLATIONS)
def test_a_peer_must_not_send(role: str, name: str) -> None:
    core, number = busy(role)
    violation = VIOLATIONS[name]
    id = number.own + OWN[violation.call] if violation.side == "own" else number.peers + PEERS[violation.call]
    *fine, last = violation.frames(id)
    receive(core, *fine)
    with pytest.raises(ProtocolViolation, match=violation.text):
        receive(core, last)


NEVER_MADE: Final[Mapping[str, Callable[[int], bytes]]] = {
    "REPLY": a_reply,
    "ERROR": an_error,
    "DATA": a_message,
    "END": an_end,
    "CANCEL": a_cancel,
    "CREDIT": lambda id: a_credit(id, 70_000),
}


@ROLE
@pytest.mark.parametrize("kind", NEVER_MADE)
@pytest.mark.parametrize("is_busy", [False, True])
def test_a_frame_for_a_number_that_was_never_used_is_a_violation(role: str, kind: str, is_busy: bool) -> None:
    own, peers = ROLES[role]
    if is_busy:
        unused = [own + OWN["a call that was not made yet"], own + OWN["one that comes long after"]]
        unused += [peers + PEERS["a call that was not made yet"], peers + PEERS["one that comes long after"]]
    else:
        unused = [own, own + 2, peers, peers + 2]
    for id in (*unused, 0, 0xFFFFFFFE, 0xFFFFFFFF):
        core = busy(role)[0] if is_busy else greeted(role)
        if kind in ("END", "CANCEL") and id % 2 == own % 2:
            text = f"{kind} from the side that was called"
        else:
            text = f"{kind} for call {id}, which was never made"
        with pytest.raises(ProtocolViolation, match=text):
            receive(core, NEVER_MADE[kind](id))


LATE: Final[Mapping[str, tuple[Literal["own", "peers"], Callable[[int], bytes]]]] = {
    "a reply": ("own", lambda id: a_reply(id, b"late")),
    "a reply in pieces": ("own", lambda id: a_reply(id, b"late", MORE)),
    "a reply that is too large": ("own", lambda id: a_reply(id, LARGE)),
    "an error": ("own", an_error),
    "an answer's message": ("own", lambda id: a_message(id, b"late")),
    "an answer's part": ("own", lambda id: a_message(id, b"late", MORE)),
    "an answer's message that is too large": ("own", lambda id: a_message(id, LARGE)),
    "credit for a request": ("own", lambda id: a_credit(id, 1 << 30)),
    "a message": ("peers", lambda id: a_message(id, b"late")),
    "a part": ("peers", lambda id: a_message(id, b"late", MORE)),
    "the last message": ("peers", lambda id: a_message(id, b"late", END)),
    "a message that is too large": ("peers", lambda id: a_message(id, LARGE)),
    "an end": ("peers", an_end),
    "a cancellation": ("peers", a_cancel),
    "credit for an answer": ("peers", lambda id: a_credit(id, 1 << 30)),
}


@ROLE
@pytest.mark.parametrize("kind", LATE)
def test_what_comes_late_is_passed_over(role: str, kind: str) -> None:
    core, number = busy(role)
    before = {**core.outgoing}, {**core.incoming}
    side, frame = LATE[kind]
    if side == "own":
        ids = [number.own + OWN["a call that was cancelled"], number.own + OWN["a stream that was answered"]]
    else:
        ids = [number.peers + PEERS["a call that was answered"], number.peers + PEERS["a stream that was cancelled"]]
    for id in ids:
        assert receive(core, frame(id), frame(id)) == []
    assert said(core) == []
    assert ({**core.outgoing}, {**core.incoming}) == before


def test_what_a_frame_of_a_later_version_says_is_passed_over() -> None:
    core, number = busy("dialling")
    assert receive(core, b"\x80", b"\xff" + bytes(100)) == []
    assert receive(core, a_cancel(number.peers)) != []


@pytest.mark.parametrize(
    "frame",
    [a_call(1), a_reply(2), an_error(2), a_message(1), an_end(1), a_cancel(1), a_credit(1, 1), a_goaway(0)],
)
def test_the_first_frame_of_a_peer_is_hello(frame: bytes) -> None:
    core = Core(LIMITS, is_dialling=False)
    name = Type(frame[0]).name
    with pytest.raises(ProtocolViolation, match=f"{name} where HELLO is expected: the peer speaks no RPC"):
        receive(core, frame)


def test_hello_of_a_later_version_is_taken_and_of_none_is_not() -> None:
    assert receive(Core(LIMITS, is_dialling=True), b"\x01\x02and more", a_call(2)) != []
    with pytest.raises(ProtocolViolation, match="HELLO with version 0"):
        receive(Core(LIMITS, is_dialling=True), b"\x01\x00")


# --- what a peer may try, at random -----------------------------------------------------------------------------------


def check_bounds(receiving: Receiving | None, limits: Limits) -> None:
    """What one call keeps of what the peer has sent, and nobody has taken."""
    if receiving is None:
        return
    kept = sum(len(message) for message, _ in receiving.messages) + len(receiving.parts or b"")
    assert kept <= limits.window + limits.max_message + MAX_PIECE
    assert receiving.received <= receiving.granted
    assert receiving.granted <= max(
        INITIAL_CREDIT, receiving.consumed + limits.window + limits.max_message + MAX_PIECE + 100 * OVERHEAD
    )


HOSTILE: Final = Limits(max_calls=8, max_message=1000, window=64 * KIB)


class Sketch(NamedTuple):
    """A frame, shown shortly."""

    kind: str
    id: int
    flags: int
    size: int
    number: int

    @property
    def frame(self) -> bytes:
        payload = bytes(self.size)
        match self.kind:
            case "call":
                return a_call(self.id, payload, self.flags)
            case "reply":
                return a_reply(self.id, payload, self.flags)
            case "error":
                return an_error(self.id, self.number % 256, self.flags)
            case "data":
                return a_message(self.id, payload, self.flags)
            case "end":
                return an_end(self.id)
            case "cancel":
                return a_cancel(self.id)
            case "credit":
                return a_credit(self.id, self.number)
            case _:
                return a_goaway(self.id)


KINDS: Final = ("call", "reply", "error", "data", "data", "data", "end", "cancel", "credit", "goaway")
SKETCHES: Final = st.builds(
    Sketch,
    st.sampled_from(KINDS),
    st.integers(0, 24) | st.integers(0, 2**32 - 1),
    st.sampled_from([0, MORE, STREAM, END, MORE | STREAM, STREAM | END, MORE | END]) | st.integers(0, 255),
    st.integers(0, 1001) | st.sampled_from([MAX_PIECE, MAX_PIECE + 1]),
    st.integers(0, 200_000) | st.integers(0, 2**64 - 1),
)


def spoiled(frame: bytes, random: Random) -> bytes:
    """A frame with a byte changed, or cut, or with something behind it."""
    at = random.randrange(len(frame))
    return random.choice([frame[:at] + random.randbytes(1) + frame[at + 1 :], frame[:at], frame + random.randbytes(3)])


@ROLE
@given(sketches=st.lists(SKETCHES, max_size=20), seed=st.integers(0, 1 << 32), spoils=st.booleans())
def test_whatever_a_peer_sends_is_taken_or_is_a_violation(
    role: str, sketches: list[Sketch], seed: int, spoils: bool
) -> None:
    core, number = busy(role, HOSTILE)
    random = Random(seed)
    violation = ""
    for sketch in sketches:
        try:
            receive(core, spoiled(sketch.frame, random) if spoils and random.random() < 0.3 else sketch.frame)
        except ProtocolViolation as error:
            violation = str(error)
            break
        for receiving in [
            *[call.receiving for call in core.incoming.values()],
            *[call.receiving for call in core.outgoing.values()],
        ]:
            check_bounds(receiving, HOSTILE)
        assert len(core.incoming) <= HOSTILE.max_calls
        assert all(id % 2 == number.own % 2 for id in core.outgoing)
        assert all(id % 2 == number.peers % 2 for id in core.incoming)
        assert len(said(core)) <= 2
    assert not violation or len(violation) > 10


@given(st.lists(st.binary(max_size=30), max_size=5))
def test_random_bytes_are_a_violation_or_are_passed_over(frames: list[bytes]) -> None:
    core, _ = busy("dialling")
    for frame in frames:
        try:
            receive(core, frame)
        except ProtocolViolation:
            return


# --- two cores, and a model -------------------------------------------------------------------------------------------

Outcome: TypeAlias = Response | Failure | Literal["cancelled"] | None


class Job:
    """Something that a side sends within a call: a message, the end of them, or the reply."""

    def __init__(self, kind: Literal["message", "request", "reply", "end"], pieces: Sequence[bytes] = ()) -> None:
        self.kind = kind
        self.pieces = deque(pieces)
        self.message = b"".join(pieces)
        self.has_begun = False
        self.ends = False  # with the flag END


@dataclass(eq=False)
class Half:
    """A call, as one side sees it."""

    call: OutgoingCall | IncomingCall
    request: bytes = b""
    jobs: deque[Job] = field(default_factory=deque[Job])
    sent: list[bytes] = field(default_factory=list[bytes])  # messages, sent to their end before the call's
    taken: list[bytes] = field(default_factory=list[bytes])
    says_more: bool = True  # it has not said its last message
    has_said: bool = False  # anything but credit
    outcome: Outcome = None
    failure: Failure | None = None  # of which the peer was told

    @property
    def got(self) -> list[bytes]:
        """All messages that have arrived."""
        return self.taken + waiting(self.call)


class Side:
    """An honest shell around a core, in all that matters to the other side."""

    def __init__(self, limits: Limits, *, is_dialling: bool) -> None:
        self.core = Core(limits, is_dialling=is_dialling)
        self.wire: deque[bytes] = deque()  # on its way to the other side
        self.made: dict[int, Half] = {}
        self.called: dict[int, Half] = {}
        self.refused: dict[int, Failure] = {}  # calls of the peer's that have never begun
        self.cancels: set[int] = set()
        self.credits: dict[int, list[int]] = {}
        self.last_id: int | None = None  # that GOAWAY named
        self.payloads = 0
        self.flush()

    def flush(self) -> None:
        for frame in self.core.control:
            self.wire.append(frame)
            match wire.read(frame, SAYS):
                case Error(id, failure):
                    half = self.called.get(id)
                    assert id not in self.refused
                    if half is None:
                        self.refused[id] = failure
                    else:
                        assert half.failure is None
                        half.failure = failure
                case Cancel(id):
                    assert id not in self.cancels
                    self.cancels.add(id)
                case Credit(id, granted):
                    self.credits.setdefault(id, []).append(granted)
                case GoAway(last_id):
                    assert self.last_id is None
                    self.last_id = last_id
                case other:
                    assert other == Hello(1)
        self.core.control = []

    def payload(self, size: int) -> bytes:
        """One of so many bytes that is not like any other."""
        self.payloads += 1
        return Random(self.payloads).randbytes(size)

    def cut(self, size: int, piece: int, *, is_padded: bool) -> list[bytes]:
        """A message in pieces. Others may cut it otherwise than our shell, and end it with an empty one."""
        payload = self.payload(size)
        return [payload[at : at + piece] for at in range(0, size, piece)] + [b""] * (is_padded or not size)

    # --- what its application does ----------------------------------------------------------------------------------

    def make(self, pieces: list[bytes], *, is_stream: bool, ends: bool) -> None:
        core = self.core
        first, *rest = pieces
        flags = (STREAM if is_stream else 0) | (MORE if rest else END if is_stream and ends else 0)
        self.wire.append(a_call(core.next_id, first, flags))
        call = core.called(is_stream=is_stream)
        half = self.made[call.id] = Half(call, b"".join(pieces), says_more=is_stream and not ends)
        if rest:
            half.jobs.append(job := Job("request", rest))
            job.ends = is_stream and ends
        self.flush()

    def say(self, half: Half, pieces: list[bytes], *, ends: bool) -> None:
        half.jobs.append(job := Job("message", pieces))
        if isinstance(half.call, OutgoingCall):
            job.ends = ends
            half.says_more = not ends

    def end(self, half: Half) -> None:
        half.says_more = False
        half.jobs.append(Job("end"))

    def reply(self, half: Half, pieces: list[bytes]) -> None:
        half.says_more = False
        half.jobs.append(Job("reply", pieces))

    def fail(self, half: Half, code: int, *, is_refusal: bool) -> None:
        assert isinstance(half.call, IncomingCall)
        half.says_more = False
        half.jobs.clear()
        assert self.core.finish(half.call)
        flags = REFUSED if is_refusal and not half.has_said else 0
        self.core.control.append(wire.encode_error(half.call.id, code, flags, NO_LIMIT, b"", b""))
        self.flush()
        half.outcome = half.failure

    def cancel(self, half: Half) -> None:
        assert isinstance(half.call, OutgoingCall)
        self.core.cancel(half.call)
        half.outcome = "cancelled"
        self.flush()

    def take(self, half: Half) -> bool:
        if not waiting(half.call):
            return False
        half.taken.append(take(self.core, half.call))
        self.flush()
        return True

    def pump(self, half: Half, *, insists: bool = False) -> bool:
        """Send the next frame of what a call has to say, if there is credit for it."""
        is_over = half.outcome is not None
        if is_over and not insists:
            half.jobs.clear()
        if not half.jobs:
            return False
        job, call = half.jobs[0], half.call
        is_last = len(job.pieces) <= 1
        if job.kind == "end":
            self.wire.append(an_end(call.id))
        elif job.kind == "reply" and not job.has_begun:
            self.wire.append(a_reply(call.id, job.pieces.popleft(), 0 if is_last else MORE))
        else:
            if not call.sending.has_room(len(job.pieces[0])):
                return False
            piece = job.pieces.popleft()
            call.sending.spent += len(piece) + OVERHEAD
            self.wire.append(a_message(call.id, piece, (END if job.ends else 0) if is_last else MORE))
        job.has_begun = half.has_said = True
        if is_last:
            half.jobs.popleft()
            if job.kind == "message" and not is_over:
                half.sent.append(job.message)
            if isinstance(call, IncomingCall) and job.kind == "reply" and self.core.finish(call):
                assert half.outcome is None
                half.outcome = Response(job.message)
        return True

    # --- what arrives -----------------------------------------------------------------------------------------------

    def receive(self, frames: list[bytes]) -> None:
        for event in self.core.receive(frames):
            match event:
                case IncomingCall() as call:
                    assert call.id not in self.called
                    assert call.payload is not None
                    self.called[call.id] = Half(call, call.payload, says_more=call.is_stream)
                case Began(call):
                    assert call.payload is None
                    assert call.id in self.core.incoming
                case OutgoingCall() as call:
                    self.note_answer(call)
                case Cancelled(call):
                    if (begun := self.called.get(call.id)) is not None:
                        assert begun.outcome is None
                        begun.outcome = "cancelled"
                case Receiving() as receiving:
                    assert receiving.messages or receiving.ended
                case Sending() as sending:
                    assert sending.credit > INITIAL_CREDIT
                case GoingAway(unseen):
                    assert not self.core.can_call
                    for call in unseen:
                        self.note_answer(call)
        self.flush()

    def note_answer(self, call: OutgoingCall) -> None:
        half = self.made[call.id]
        assert half.call is call
        assert half.outcome is None
        assert isinstance(call.result, Response | Failure)
        half.outcome = call.result

    @property
    def halves(self) -> list[Half]:
        return [*self.made.values(), *self.called.values()]


SIZES = st.sampled_from([0, 1, 3, 1000, PIECE - OVERHEAD, PIECE, PIECE + 1, 60_000, 100_000, 150_000, 150_001])
CUTS = st.tuples(SIZES, st.sampled_from([PIECE, PIECE, 20_000, 9_999]), st.booleans())
SIDES = st.integers(0, 1)
CODES = st.integers(1, 20)
HOWS = st.sampled_from(["end", "cancel", "cancel", "fail", "refuse", "go away"])
PICKS = st.integers(0, 30)
WINDOWS = st.sampled_from([64 * KIB, 64 * KIB + 100, 100_000, 256 * KIB])
Cut: TypeAlias = tuple[int, int, bool]


class TwoCores(RuleBasedStateMachine):
    """Two honest sides, and frames between them that arrive in order and at any time."""

    @initialize(windows=st.tuples(WINDOWS, WINDOWS), most=st.integers(1, 6))
    def connect(self, windows: tuple[int, int], most: int) -> None:
        self.limits = [Limits(max_calls=most, max_message=150_000, window=window) for window in windows]
        self.sides = [Side(limits, is_dialling=not number) for number, limits in enumerate(self.limits)]

    def cut(self, side: Side, cut: Cut) -> list[bytes]:
        size, piece, is_padded = cut
        return side.cut(size, piece, is_padded=is_padded)

    # --- rules ------------------------------------------------------------------------------------------------------

    @rule(side=SIDES, cut=CUTS, is_stream=st.booleans(), ends=st.booleans())
    def make(self, side: int, cut: Cut, is_stream: bool, ends: bool) -> None:
        one = self.sides[side]
        if one.core.can_call and len(one.core.outgoing) < 6:
            one.make(self.cut(one, cut), is_stream=is_stream, ends=ends)

    @rule(side=SIDES, cuts=st.lists(CUTS, min_size=1, max_size=6), ends=st.booleans())
    def make_stream(self, side: int, cuts: list[Cut], ends: bool) -> None:
        self.make(side, cuts[0], True, False)
        for cut in cuts[1:]:
            self.say(side, -1, cut, ends and cut is cuts[-1])

    @rule(side=SIDES, pick=PICKS, cut=CUTS, ends=st.booleans())
    def say(self, side: int, pick: int, cut: Cut, ends: bool) -> None:
        one = self.sides[side]
        if half := chosen([half for half in one.halves if half.says_more and half.outcome is None], pick):
            one.say(half, self.cut(one, cut), ends=ends)

    @rule(side=SIDES, pick=PICKS, cuts=st.lists(CUTS, min_size=1, max_size=6))
    def reply(self, side: int, pick: int, cuts: list[Cut]) -> None:
        one = self.sides[side]
        if half := chosen([half for half in one.called.values() if not is_answered(half)], pick):
            if half.says_more:
                for cut in cuts[1:]:
                    one.say(half, self.cut(one, cut), ends=False)
            one.reply(half, self.cut(one, cuts[0]))

    @rule(side=SIDES, pick=PICKS, how=HOWS, code=CODES)
    def stop(self, side: int, pick: int, how: str, code: int) -> None:
        one = self.sides[side]
        made = [half for half in one.made.values() if half.outcome is None]
        called = [half for half in one.called.values() if half.outcome is None]
        if how == "end" and (half := chosen([half for half in made if half.says_more], pick)):
            one.end(half)
        elif how == "cancel" and (half := chosen(made, pick)):
            one.cancel(half)
        elif how in ("fail", "refuse") and (half := chosen(called, pick)):
            one.fail(half, code, is_refusal=how == "refuse")
        elif how == "go away" and len(one.called) > 1:
            one.core.go_away()
            one.flush()

    @rule(side=SIDES, pick=PICKS, insists=st.booleans())
    def pump(self, side: int, pick: int, insists: bool) -> None:
        one = self.sides[side]
        if half := chosen([half for half in one.halves if half.jobs], pick):
            one.pump(half, insists=insists)

    @rule(side=SIDES, count=st.integers(1, 10))
    def deliver(self, side: int, count: int) -> None:
        to, from_ = self.sides[side], self.sides[not side].wire
        to.receive([from_.popleft() for _ in range(min(count, len(from_)))])

    @rule(count=st.integers(1, 60), seed=st.integers(0, 1 << 32), takes=st.booleans())
    def run(self, count: int, seed: int, takes: bool) -> None:
        """Many small steps in any order."""
        random = Random(seed)
        for _ in range(count):
            side, pick = random.randrange(2), random.randrange(31)
            match random.randrange(4):
                case 0:
                    self.deliver(side, random.randint(1, 3))
                case 1 if takes:
                    if half := chosen([half for half in self.sides[side].halves if waiting(half.call)], pick):
                        self.sides[side].take(half)
                case _:
                    self.pump(side, pick, True)

    @rule()
    def run_on(self) -> None:
        self.settle()

    # --- what is true at any time -----------------------------------------------------------------------------------

    @invariant()
    def messages_come_in_order_and_once(self) -> None:
        for half, other in self.pairs():
            for this, that in ((half, other), (other, half)):
                got = this.got
                assert got == that.sent[: len(got)]

    @invariant()
    def what_is_kept_is_bounded(self) -> None:
        for side, limits in zip(self.sides, self.limits, strict=True):
            assert len(side.core.incoming) <= limits.max_calls
            for half in side.halves:
                check_bounds(half.call.receiving, limits)
                assert half.call.sending.spent <= half.call.sending.credit
        for half, other in self.pairs():
            for this, that in ((half, other), (other, half)):
                if that.call.receiving is not None:
                    assert that.call.receiving.received <= this.call.sending.spent
                    assert this.call.sending.credit <= that.call.receiving.granted

    @invariant()
    def what_is_said_beside_messages_is_bounded(self) -> None:
        for side, limits in zip(self.sides, self.limits, strict=True):
            step = min(limits.window // 2, limits.window - PIECE - OVERHEAD)
            for granted in side.credits.values():
                assert all(later - earlier >= step for earlier, later in pairwise([INITIAL_CREDIT, *granted]))
            assert all(id in side.made for id in side.cancels)

    def pairs(self) -> list[tuple[Half, Half]]:
        """The calls that have begun, as both sides see them."""
        sides = self.sides
        return [
            (sides[not number].made[id], half) for number, side in enumerate(sides) for id, half in side.called.items()
        ]

    # --- the end ----------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Everything that can be sent is sent, arrives and is taken."""
        goes_on = True
        while goes_on:
            goes_on = False
            for number, side in enumerate(self.sides):
                for half in side.halves:
                    while side.pump(half) or side.take(half):
                        goes_on = True
                if side.wire:
                    goes_on = True
                    frames, side.wire = side.wire, deque()
                    self.sides[not number].receive([*frames])
        assert not any(half.jobs for side in self.sides for half in side.halves)  # nobody waits for ever

    def teardown(self) -> None:
        if not hasattr(self, "sides"):
            return
        self.settle()
        for half, other in self.pairs():
            assert half.request == other.request
            if half.outcome is None:
                assert other.outcome is None
                assert other.got == half.sent
        for number, side in enumerate(self.sides):
            assert {*side.core.outgoing} == {*self.sides[not number].core.incoming}
            for half in [half for half in side.called.values() if half.outcome is None]:
                side.reply(half, [b"at last"])
        self.settle()
        for side in self.sides:
            assert is_idle(side.core)
            assert side.core.control == []
        for number, side in enumerate(self.sides):
            for half in side.made.values():
                self.check_outcomes(half, side, self.sides[not number])
        self.messages_come_in_order_and_once()
        self.what_is_kept_is_bounded()
        self.what_is_said_beside_messages_is_bounded()

    def check_outcomes(self, half: Half, side: Side, answerer: Side) -> None:
        id, outcome = half.call.id, half.outcome
        other = answerer.called.get(id)
        assert outcome is not None
        assert other is None or other.outcome is not None
        if isinstance(outcome, Response):
            assert other is not None
            assert other.outcome == outcome
            assert half.got == other.sent
            assert id not in side.cancels
        elif outcome == "cancelled":
            assert id in side.cancels
        elif id in side.cancels:  # an answer was too large
            assert (outcome.code, outcome.flags) == (StatusCode.RESOURCE_EXHAUSTED, 0)
            assert other is not None
        elif outcome.flags & REFUSED:
            is_unseen = answerer.last_id is not None and id > answerer.last_id
            if other is None:
                assert is_unseen or answerer.refused[id] == outcome
            else:
                assert other.failure == other.outcome == outcome
                assert not other.has_said
        else:
            assert other is not None
            assert other.failure == outcome
            assert other.outcome in (outcome, "cancelled")  # the latter: a message was too large
            assert half.got == other.sent


def is_answered(half: Half) -> bool:
    return half.outcome is not None or any(job.kind == "reply" for job in half.jobs)


def chosen(halves: list[Half], pick: int) -> Half | None:
    return halves[pick % len(halves)] if halves else None


TestTwoCores = TwoCores.TestCase
TestTwoCores.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
