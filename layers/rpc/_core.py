"""The rules of RPC/1 for one connection: which calls there are, what may come next, and what must be said about it.

Both ends run this same code, and each may call the other. No I/O, no clock, no event loop: frames come in, events go
out to the shell, and what is to be said at once waits in ``control``. The laws:

1. A call has a number; the side that dialled takes odd ones, the other even ones, each going up. So a frame for a
   number that is not in use is either late, and passed over, or a violation.
2. Whoever sends a message within a call spends credit that the receiver has granted, by absolute numbers. Only what
   opens a call and what ends it needs none; the number of calls bounds that.
3. A call ends once, for each side: by REPLY or ERROR from the side that was called, or by CANCEL from the caller.
   Whatever comes for it after that is late.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeAlias

from towline.errors import ProtocolViolation, StatusCode

from . import _wire as wire
from ._wire import NO_METADATA, Flag, Metadata

__all__ = [
    "INITIAL_CREDIT",
    "MAX_PIECE",
    "OVERHEAD",
    "PIECE",
    "Answered",
    "Arrived",
    "Began",
    "Called",
    "Cancelled",
    "Core",
    "Credited",
    "Event",
    "GoingAway",
    "IncomingCall",
    "Limits",
    "OutgoingCall",
    "Receiving",
    "Sending",
]

PIECE: Final = 32 << 10
"""A longer message travels in pieces of so many bytes, so that others get in between."""

MAX_PIECE: Final = 64 << 10
"""No payload of a single frame is longer. It bounds what a call may bring before any credit is asked."""

INITIAL_CREDIT: Final = 64 << 10
"""What each side may send within a call before it has heard of any credit."""

OVERHEAD: Final = 64
"""What a piece costs beside its bytes, so that empty messages cannot grow a queue without bound."""

LAST_ID: Final = 0xFFFFFFFE


@dataclass(frozen=True, slots=True)
class Limits:
    """What one side holds at most.

    Attributes:
        max_calls: calls of the peer's that are open at once.
        max_message: bytes in a message.
        window: what the peer may send within a call before this side has taken it, in bytes of cost.
    """

    max_calls: int
    max_message: int
    window: int


class Sending:
    """One direction of a call, seen from the side that sends in it."""

    __slots__ = ("credit", "ended", "is_busy", "spent", "waiter")

    def __init__(self) -> None:
        self.credit = INITIAL_CREDIT
        self.spent = 0
        self.ended = False
        self.is_busy = False  # the shell's: a message in pieces is on its way, and no other gets in between
        self.waiter: Any = None  # the shell's: who waits for credit

    def has_room(self, size: int) -> bool:
        """Whether a piece of so many bytes may be sent now."""
        return self.spent + size + OVERHEAD <= self.credit


class Receiving:
    """One direction of a call, seen from the side that receives in it."""

    __slots__ = ("assembling", "consumed", "ended", "granted", "messages", "parts", "received", "waiter")

    def __init__(self, *, ended: bool) -> None:
        self.granted = INITIAL_CREDIT
        self.received = 0
        self.consumed = 0
        self.messages: deque[tuple[bytes, int]] = deque()  # whole ones with their cost, which nobody has taken yet
        self.parts: bytearray | None = None  # of a message that is not whole: joined, so that tiny ones take no more
        self.assembling = 0  # what they cost: granted at once, or the message would never be whole
        self.ended = ended
        self.waiter: Any = None  # the shell's: who waits for a message


class _Call:
    """What calls have in common, whoever has made them."""

    __slots__ = ("_sending",)

    def __init__(self) -> None:
        self._sending: Sending | None = None

    @property
    def sending(self) -> Sending:
        """What this side may send in it. Most calls are one frame and one answer, and have no use for it."""
        if self._sending is None:
            self._sending = Sending()
        return self._sending

    @property
    def has_sender(self) -> bool:
        """Whether anybody may wait to send in it."""
        return self._sending is not None


class OutgoingCall(_Call):
    """A call that this side has made."""

    __slots__ = (
        "id",
        "is_stream",
        "is_whole",
        "metadata",
        "number",
        "receiving",
        "result",
        "waiter",
    )

    def __init__(self, id: int, *, is_stream: bool) -> None:
        super().__init__()
        self.id = id
        self.is_stream = is_stream
        self.is_whole = False  # all of its payload was sent: only then may it be carried out
        self.receiving: Receiving | None = Receiving(ended=False) if is_stream else None
        self.metadata: Metadata | None = None  # of the reply, from its beginning on
        self.result: wire.Reply | wire.Error | Exception | None = None
        self.number = 0  # the shell's: the message of the layer inside that made it whole
        self.waiter: Any = None  # the shell's: who waits for the result


class IncomingCall(_Call):
    """A call that the peer has made."""

    __slots__ = (
        "deadline",
        "deadline_ms",
        "handler",
        "id",
        "is_over",
        "is_stream",
        "metadata",
        "method",
        "payload",
        "receiving",
    )

    def __init__(self, call: wire.Call) -> None:
        super().__init__()
        self.id = call.id
        self.method = call.method
        self.metadata = call.metadata
        self.deadline_ms = call.deadline_ms
        self.is_stream = bool(call.flags & Flag.STREAM)
        self.is_over = False  # answered, cancelled or lost: nothing is sent for it any more
        self.payload: bytes | None = None  # once it is whole
        self.receiving: Receiving | None = None
        self.deadline = math.inf  # the shell's: the moment on its clock
        self.handler: Any = None  # the shell's: who answers it


class Called(NamedTuple):
    """A call has arrived, with its whole payload."""

    call: IncomingCall


class Began(NamedTuple):
    """A call has begun to arrive, in pieces. Its deadline counts from now."""

    call: IncomingCall


class Answered(NamedTuple):
    """A call of ours has ended; ``call.result`` says how."""

    call: OutgoingCall


class Arrived(NamedTuple):
    """A message has arrived within a call, or the end of them."""

    receiving: Receiving


class Credited(NamedTuple):
    """There is more credit within a call."""

    sending: Sending


class Cancelled(NamedTuple):
    """The peer has cancelled a call, or has broken its limits: whoever answers it, if anybody does yet, is to stop."""

    call: IncomingCall


class GoingAway(NamedTuple):
    """The peer takes no further calls."""


Event: TypeAlias = Called | Began | Answered | Arrived | Credited | Cancelled | GoingAway


class Core:
    """One connection.

    Attributes:
        control: frames to send at once, whatever else waits.
        outgoing: the calls that this side has made, by number.
        incoming: those that the peer has made.
        peer_goes_away: the peer takes no further calls.
        goes_away: this side does not.
    """

    def __init__(self, limits: Limits, *, is_dialling: bool) -> None:
        self.limits = limits
        # Credit is told in large steps, but a peer of whose messages all were taken always has enough for a piece.
        self._credit_step = max(min(limits.window // 2, limits.window - PIECE - OVERHEAD), 1)
        self.control: list[bytes] = [wire.encode_hello()]
        self.outgoing: dict[int, OutgoingCall] = {}
        self.incoming: dict[int, IncomingCall] = {}
        self.peer_goes_away = False
        self.goes_away = False
        self._next_id = 1 if is_dialling else 2
        self._last_incoming = 0
        self._incoming_parity = 0 if is_dialling else 1
        self._greeted = False
        self._events: list[Event] = []
        self._receivers: dict[type, Callable[[Any], None]] = {
            wire.Call: self._receive_call,
            wire.Reply: self._receive_reply,
            wire.Error: self._receive_error,
            wire.Data: self._receive_data,
            wire.End: self._receive_end,
            wire.Cancel: self._receive_cancel,
            wire.Credit: self._receive_credit,
            wire.GoAway: self._receive_goaway,
            wire.Hello: self._receive_hello,
        }

    # --- what this side does ----------------------------------------------------------------------------------------

    @property
    def can_call(self) -> bool:
        """Whether the peer takes another call over this connection, as far as is known here."""
        return not self.peer_goes_away and self._next_id <= LAST_ID

    @property
    def next_id(self) -> int:
        """The number of the next call."""
        return self._next_id

    def called(self, *, is_stream: bool) -> OutgoingCall:
        """A call was made: its CALL frame, with `next_id`, was sent just now."""
        call = OutgoingCall(self._next_id, is_stream=is_stream)
        self._next_id += 2
        self.outgoing[call.id] = call
        if call.receiving is not None:
            self._grant(call.id, call.receiving)
        return call

    def cancel(self, call: OutgoingCall) -> None:
        """Give a call up. Nothing, if it has ended."""
        if self.outgoing.pop(call.id, None) is not None:
            self.control.append(wire.encode_cancel(call.id))

    def finish(self, call: IncomingCall) -> bool:
        """A call is answered: from here on whatever comes for it is late. False if it was over before."""
        if call.is_over:
            return False
        call.is_over = True
        del self.incoming[call.id]
        return True

    def taken(self, id: int, receiving: Receiving, cost: int) -> None:
        """A message was taken, and makes room for others."""
        receiving.consumed += cost
        if id in self.outgoing or id in self.incoming:
            self._grant(id, receiving)

    def go_away(self) -> None:
        """Take no further calls. Those that are open go on."""
        if not self.goes_away:
            self.goes_away = True
            self.control.append(wire.encode_goaway(self._last_incoming))

    def _grant(self, id: int, receiving: Receiving) -> None:
        if receiving.ended:
            return
        granted = receiving.consumed + self.limits.window + receiving.assembling
        if granted - receiving.granted >= self._credit_step:
            receiving.granted = granted
            self.control.append(wire.encode_credit(id, granted))

    def _refuse(self, id: int, code: StatusCode, message: str, *, refused: bool = True) -> None:
        flags = Flag.REFUSED if refused else 0
        self.control.append(wire.encode_error(id, code, flags, wire.NO_LIMIT, message.encode(), b""))

    # --- what the peer does -----------------------------------------------------------------------------------------

    def receive(self, frames: Iterable[bytes]) -> Iterator[Event]:
        """Take what has arrived, and say what that means: frame by frame, as the events are asked for.

        Raises:
            ProtocolViolation: if the peer breaks the rules, after the events of what came before. The connection is of
                no more use.
        """
        receivers, events = self._receivers, self._events
        for frame in frames:
            message = wire.decode(frame)
            if message is not None:
                if not self._greeted and type(message) is not wire.Hello:
                    raise ProtocolViolation(f"{_name(message)} where HELLO is expected: the peer speaks no RPC")
                receivers[type(message)](message)
                if events:
                    yield from events
                    events.clear()

    def _receive_hello(self, hello: wire.Hello) -> None:
        if self._greeted:
            raise ProtocolViolation("a second HELLO")
        if hello.version < 1:
            raise ProtocolViolation(f"HELLO with version {hello.version}")
        self._greeted = True

    def _receive_call(self, message: wire.Call) -> None:
        id = message.id
        if id % 2 != self._incoming_parity or id <= self._last_incoming:
            raise ProtocolViolation(f"CALL {id}, where a number above {self._last_incoming} of the peer's is expected")
        if len(message.payload) > MAX_PIECE:
            raise ProtocolViolation(f"CALL with {len(message.payload):,} bytes, where {MAX_PIECE:,} are allowed")
        if not message.flags & Flag.STREAM and message.flags & Flag.END:
            raise ProtocolViolation("CALL with END, though it opens no stream")
        if message.flags & Flag.MORE and message.flags & Flag.END:
            raise ProtocolViolation("CALL with MORE and END")
        self._last_incoming = id
        if self.goes_away:
            return self._refuse(id, StatusCode.UNAVAILABLE, "the server is shutting down")
        if len(self.incoming) >= self.limits.max_calls:
            text = f"{len(self.incoming)} calls of yours are open, as many as may be"
            return self._refuse(id, StatusCode.RESOURCE_EXHAUSTED, text)
        call = IncomingCall(message)
        self.incoming[id] = call
        if message.flags & Flag.MORE:
            receiving = call.receiving = Receiving(ended=False)
            if self._assemble(call, receiving, message.payload):
                self._grant(id, receiving)
                if call.deadline_ms != wire.NO_LIMIT:
                    self._events.append(Began(call))
        elif call.is_stream:
            receiving = call.receiving = Receiving(ended=bool(message.flags & Flag.END))
            self._begin(call, message.payload)
            if not call.is_over:
                self._grant(id, receiving)
        else:
            self._begin(call, message.payload)

    def _begin(self, call: IncomingCall, payload: bytes) -> None:
        if len(payload) > self.limits.max_message:
            return self._too_large(call, len(payload))
        call.payload = payload
        self._events.append(Called(call))

    def _receive_reply(self, message: wire.Reply) -> None:
        call = self._outgoing(message)
        if call is None:
            return
        if call.metadata is not None:
            raise ProtocolViolation(f"a second REPLY to call {call.id}")
        if len(message.payload) > MAX_PIECE:
            raise ProtocolViolation(f"REPLY with {len(message.payload):,} bytes, where {MAX_PIECE:,} are allowed")
        call.metadata = message.metadata
        receiving = call.receiving
        if receiving is not None and receiving.parts is not None:
            raise ProtocolViolation(f"REPLY to call {call.id} within a message")
        if message.flags & Flag.MORE:
            if receiving is None:
                receiving = call.receiving = Receiving(ended=False)
            if self._assemble(call, receiving, message.payload):
                self._grant(call.id, receiving)
        elif len(message.payload) > self.limits.max_message:
            self._too_large(call, len(message.payload))
        else:
            self._answer(call, message)

    def _receive_error(self, message: wire.Error) -> None:
        call = self._outgoing(message)
        if call is not None:
            self._answer(call, message)

    def _answer(self, call: OutgoingCall, result: wire.Reply | wire.Error) -> None:
        del self.outgoing[call.id]
        call.result = result
        self._events.append(Answered(call))

    def _receive_data(self, message: wire.Data) -> None:
        call: OutgoingCall | IncomingCall | None
        if message.id % 2 == self._incoming_parity:
            call = self._incoming(message)
        else:
            call = self._outgoing(message)
            if message.flags & Flag.END:
                raise ProtocolViolation("DATA with END from the side that was called")
        if call is None:
            return
        receiving = call.receiving
        if receiving is None or receiving.ended:
            raise ProtocolViolation(f"DATA for call {message.id} after its end")
        size = len(message.payload)
        cost = size + OVERHEAD
        receiving.received += cost
        if size > MAX_PIECE or receiving.received > receiving.granted:
            raise ProtocolViolation(
                f"DATA with {size:,} bytes for call {message.id}, where {MAX_PIECE:,} are allowed and credit is left "
                f"for {max(receiving.granted - receiving.received + size, 0):,}"
            )
        if message.flags & Flag.MORE:
            if message.flags & Flag.END:
                raise ProtocolViolation("DATA with MORE and END")
            if self._assemble(call, receiving, message.payload):
                self._grant(call.id, receiving)
            return
        payload = message.payload
        if receiving.parts is not None:
            if not self._assemble(call, receiving, payload):
                return
            cost, receiving.assembling = receiving.assembling, 0
            payload = bytes(receiving.parts)
            receiving.parts = None
        elif size > self.limits.max_message:
            return self._too_large(call, size)
        self._whole(call, receiving, payload, cost, ends=bool(message.flags & Flag.END))

    def _assemble(self, call: OutgoingCall | IncomingCall, receiving: Receiving, part: bytes) -> bool:
        """Add a part to a message. False if it has become too large, and the call has ended by that."""
        if receiving.parts is None:
            receiving.parts = bytearray()
        size = len(receiving.parts) + len(part)
        if size > self.limits.max_message:
            self._too_large(call, size)
            return False
        receiving.parts += part
        receiving.assembling += len(part) + OVERHEAD
        return True

    def _whole(
        self, call: OutgoingCall | IncomingCall, receiving: Receiving, payload: bytes, cost: int, *, ends: bool
    ) -> None:
        """A message is whole that has arrived in DATA frames."""
        if isinstance(call, OutgoingCall):
            if call.metadata is not None:  # of the reply, which has begun
                return self._answer(call, wire.Reply(call.id, 0, call.metadata, payload))
        elif call.payload is None:
            receiving.consumed += cost
            receiving.ended = ends or not call.is_stream
            self._grant(call.id, receiving)
            return self._begin(call, payload)
        if ends:
            receiving.ended = True
        receiving.messages.append((payload, cost))
        self._events.append(Arrived(receiving))

    def _too_large(self, call: OutgoingCall | IncomingCall, size: int) -> None:
        limit = self.limits.max_message
        text = f"a message of {size:,} bytes or more, where max_message is {limit:,}"
        if isinstance(call, OutgoingCall):
            self.control.append(wire.encode_cancel(call.id))
            error = wire.Error(call.id, StatusCode.RESOURCE_EXHAUSTED, 0, wire.NO_LIMIT, text, NO_METADATA)
            return self._answer(call, error)
        self._refuse(call.id, StatusCode.RESOURCE_EXHAUSTED, text, refused=call.payload is None)
        self.finish(call)
        self._events.append(Cancelled(call))

    def _receive_end(self, message: wire.End) -> None:
        if message.id % 2 != self._incoming_parity:
            raise ProtocolViolation("END from the side that was called")
        call = self._incoming(message)
        if call is None:
            return
        receiving = call.receiving
        if receiving is None or receiving.ended or receiving.parts is not None or call.payload is None:
            raise ProtocolViolation(f"END of call {call.id} within a message or after its end")
        receiving.ended = True
        self._events.append(Arrived(receiving))

    def _receive_cancel(self, message: wire.Cancel) -> None:
        if message.id % 2 != self._incoming_parity:
            raise ProtocolViolation("CANCEL from the side that was called")
        call = self._incoming(message)
        if call is not None:
            self.finish(call)
            self._events.append(Cancelled(call))

    def _receive_credit(self, message: wire.Credit) -> None:
        is_incoming = message.id % 2 == self._incoming_parity
        call = self._incoming(message) if is_incoming else self._outgoing(message)
        if call is not None and message.granted > call.sending.credit:
            call.sending.credit = message.granted
            self._events.append(Credited(call.sending))

    def _receive_goaway(self, message: wire.GoAway) -> None:
        self.peer_goes_away = True
        for call in [call for call in self.outgoing.values() if call.id > message.last_id]:
            text = "the peer is shutting down"
            self._answer(
                call, wire.Error(call.id, StatusCode.UNAVAILABLE, Flag.REFUSED, wire.NO_LIMIT, text, NO_METADATA)
            )
        self._events.append(GoingAway())

    # --- by number --------------------------------------------------------------------------------------------------

    def _outgoing(self, message: wire.Reply | wire.Error | wire.Data | wire.Credit) -> OutgoingCall | None:
        """The call of ours that a frame is for; None if it comes late."""
        call = self.outgoing.get(message.id)
        if call is None and (message.id % 2 == self._incoming_parity or not 0 < message.id < self._next_id):
            raise ProtocolViolation(f"{_name(message)} for call {message.id}, which was never made")
        return call

    def _incoming(self, message: wire.Data | wire.End | wire.Cancel | wire.Credit) -> IncomingCall | None:
        """The call of the peer's that a frame is for; None if it comes late."""
        call = self.incoming.get(message.id)
        if call is None and not 0 < message.id <= self._last_incoming:
            raise ProtocolViolation(f"{_name(message)} for call {message.id}, which was never made")
        return call


def _name(message: object) -> str:
    return type(message).__name__.upper()
