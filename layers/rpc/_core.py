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
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeAlias

from towline.errors import ProtocolViolation, StatusCode

from . import _wire as wire
from ._messages import Response
from ._wire import NO_METADATA, Flag, Metadata, Type

__all__ = [
    "INITIAL_CREDIT",
    "MAX_PIECE",
    "OVERHEAD",
    "PIECE",
    "Began",
    "Cancelled",
    "Core",
    "Event",
    "Failure",
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

    __slots__ = ("assembling", "consumed", "ended", "granted", "messages", "parts", "received", "waiter", "when_over")

    def __init__(self, *, ended: bool) -> None:
        self.granted = INITIAL_CREDIT
        self.received = 0
        self.consumed = 0
        self.messages: deque[tuple[bytes, int]] = deque()  # whole ones with their cost, which nobody has taken yet
        self.parts: bytearray | None = None  # of a message that is not whole: joined, so that tiny ones take no more
        self.assembling = 0  # what they cost: granted at once, or the message would never be whole
        self.ended = ended
        self.waiter: Any = None  # the shell's: who waits for a message
        self.when_over: list[Any] | None = None  # the shell's: who is told how the call has ended, if anybody is


class _Call:
    """What calls have in common, whoever has made them."""

    __slots__ = ("sender",)

    sender: Sending | None  # None as long as nothing is sent within it: most calls are one frame and one answer

    @property
    def sending(self) -> Sending:
        """What this side sends in it."""
        if self.sender is None:
            self.sender = Sending()
        return self.sender


class Failure(NamedTuple):
    """An error that a call of ours has ended with, as it came over the wire."""

    code: int
    flags: int
    retry_after_ms: int
    message: str
    details: Metadata


class OutgoingCall(_Call):
    """A call that this side has made."""

    __slots__ = (
        "id",
        "metadata",
        "number",
        "receiving",
        "result",
        "waiter",
    )

    def __init__(self, id: int, number: int) -> None:
        self.id = id
        self.number = number  # of the layer inside: the message that made it whole; 0 as long as none has
        self.sender: Sending | None = None
        self.receiving: Receiving | None = None
        self.metadata: Metadata | None = None  # of the reply, from its beginning on
        self.result: Response | Failure | Exception | None = None
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

    def __init__(self, id: int, method: str, metadata: Metadata, deadline_ms: int, is_stream: bool) -> None:
        self.id = id
        self.method = method
        self.metadata = metadata
        self.deadline_ms = deadline_ms
        self.is_stream = is_stream
        self.sender: Sending | None = None
        self.is_over = False  # answered, cancelled or lost: nothing is sent for it any more
        self.payload: bytes | None = None  # once it is whole
        self.receiving: Receiving | None = None
        self.deadline = math.inf  # the shell's: the moment on its clock
        self.handler: Any = None  # the shell's: who answers it


class Began(NamedTuple):
    """A call has begun to arrive, in pieces. Its deadline counts from now."""

    call: IncomingCall


class Cancelled(NamedTuple):
    """The peer has cancelled a call, or has broken its limits: whoever answers it, if anybody does yet, is to stop."""

    call: IncomingCall


class GoingAway(NamedTuple):
    """The peer takes no further calls."""

    unseen: list[OutgoingCall]
    """Those of ours that it has not taken, and will not: they have ended."""


Event: TypeAlias = IncomingCall | OutgoingCall | Receiving | Sending | Began | Cancelled | GoingAway
"""What has happened. Four of them are what it has happened to, since one comes with every frame:

- `IncomingCall`: a call has arrived, with its whole payload.
- `OutgoingCall`: a call of ours has ended; its ``result`` says how.
- `Receiving`: a message has arrived within a call, or the end of them.
- `Sending`: there is more credit within a call.
"""


class Core:
    """One connection.

    Attributes:
        control: frames to send at once, whatever else waits.
        outgoing: the calls that this side has made, by number.
        incoming: those that the peer has made.
        next_id: the number of the next call of ours.
        can_call: whether the peer takes another call over this connection, as far as is known here.
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
        self.can_call = True
        self.next_id = 1 if is_dialling else 2
        self._last_incoming = 0
        self._incoming_parity = 0 if is_dialling else 1
        # What may come, and what it does: nothing but HELLO at first.
        self._receivers: Mapping[int, Callable[..., Event | None]] = {Type.HELLO: self._receive_hello}

    # --- what this side does ----------------------------------------------------------------------------------------

    def called(self, number: int = 0, *, is_stream: bool = False) -> OutgoingCall:
        """A call was made: its CALL frame, with `next_id`, was sent just now.

        Args:
            number: of the message that the frame was, if the call is whole by it.
            is_stream: whether messages follow.
        """
        id = self.next_id
        self.next_id = id + 2
        if id + 2 > LAST_ID:
            self.can_call = False
        call = self.outgoing[id] = OutgoingCall(id, number)
        if is_stream:
            receiving = call.receiving = Receiving(ended=False)
            self._grant(id, receiving)
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
        for frame in frames:
            event = wire.read(frame, self._receivers)
            if event is not None:
                yield event

    def _receive_hello(self, version: int) -> None:
        if version < 1:
            raise ProtocolViolation(f"HELLO with version {version}")
        self._receivers = {
            Type.HELLO: self._receive_second_hello,
            Type.CALL: self._receive_call,
            Type.REPLY: self._receive_reply,
            Type.ERROR: self._receive_error,
            Type.DATA: self._receive_data,
            Type.END: self._receive_end,
            Type.CANCEL: self._receive_cancel,
            Type.CREDIT: self._receive_credit,
            Type.GOAWAY: self._receive_goaway,
        }

    def _receive_second_hello(self, version: int) -> None:
        raise ProtocolViolation("a second HELLO")

    def _receive_call(
        self, id: int, flags: int, deadline_ms: int, method: str, metadata: Metadata, payload: bytes
    ) -> Event | None:
        if id % 2 != self._incoming_parity or id <= self._last_incoming:
            raise ProtocolViolation(f"CALL {id}, where a number above {self._last_incoming} of the peer's is expected")
        if len(payload) > MAX_PIECE:
            raise ProtocolViolation(f"CALL with {len(payload):,} bytes, where {MAX_PIECE:,} are allowed")
        if flags & Flag.END and not flags & Flag.STREAM:
            raise ProtocolViolation("CALL with END, though it opens no stream")
        if flags & Flag.MORE and flags & Flag.END:
            raise ProtocolViolation("CALL with MORE and END")
        self._last_incoming = id
        if self.goes_away:
            self._refuse(id, StatusCode.UNAVAILABLE, "the server is shutting down")
            return None
        if len(self.incoming) >= self.limits.max_calls:
            text = f"{len(self.incoming)} calls of yours are open, as many as may be"
            self._refuse(id, StatusCode.RESOURCE_EXHAUSTED, text)
            return None
        is_stream = flags & Flag.STREAM != 0
        call = self.incoming[id] = IncomingCall(id, method, metadata, deadline_ms, is_stream)
        if flags & Flag.MORE:
            receiving = call.receiving = Receiving(ended=False)
            too_large = self._assemble(call, receiving, payload)
            if too_large is not None:
                return too_large
            self._grant(id, receiving)
            return Began(call) if deadline_ms != wire.NO_LIMIT else None
        event = self._begin(call, payload)
        if is_stream:
            receiving = call.receiving = Receiving(ended=bool(flags & Flag.END))
            if not call.is_over:
                self._grant(id, receiving)
        return event

    def _begin(self, call: IncomingCall, payload: bytes) -> Event:
        if len(payload) > self.limits.max_message:
            return self._too_large(call, len(payload))
        call.payload = payload
        return call

    def _receive_reply(self, id: int, flags: int, metadata: Metadata, payload: bytes) -> Event | None:
        call = self._outgoing(id, "REPLY")
        if call is None:
            return None
        if call.metadata is not None:
            raise ProtocolViolation(f"a second REPLY to call {id}")
        if len(payload) > MAX_PIECE:
            raise ProtocolViolation(f"REPLY with {len(payload):,} bytes, where {MAX_PIECE:,} are allowed")
        receiving = call.receiving
        if receiving is not None and receiving.parts is not None:
            raise ProtocolViolation(f"REPLY to call {id} within a message")
        if flags & Flag.MORE:
            call.metadata = metadata
            if receiving is None:
                receiving = call.receiving = Receiving(ended=False)
            too_large = self._assemble(call, receiving, payload)
            if too_large is None:
                self._grant(id, receiving)
            return too_large
        if len(payload) > self.limits.max_message:
            return self._too_large(call, len(payload))
        return self._answer(call, Response(payload, metadata))

    def _receive_error(
        self, id: int, code: int, flags: int, retry_after_ms: int, message: str, details: Metadata
    ) -> Event | None:
        call = self._outgoing(id, "ERROR")
        return None if call is None else self._answer(call, Failure(code, flags, retry_after_ms, message, details))

    def _answer(self, call: OutgoingCall, result: Response | Failure) -> OutgoingCall:
        del self.outgoing[call.id]
        call.result = result
        return call

    def _receive_data(self, id: int, flags: int, payload: bytes) -> Event | None:
        call: OutgoingCall | IncomingCall | None
        if id % 2 == self._incoming_parity:
            call = self._incoming(id, "DATA")
        else:
            call = self._outgoing(id, "DATA")
            if flags & Flag.END:
                raise ProtocolViolation("DATA with END from the side that was called")
        if call is None:
            return None
        receiving = call.receiving
        if receiving is None or receiving.ended:
            raise ProtocolViolation(f"DATA for call {id} after its end")
        size = len(payload)
        cost = size + OVERHEAD
        receiving.received += cost
        if size > MAX_PIECE or receiving.received > receiving.granted:
            raise ProtocolViolation(
                f"DATA with {size:,} bytes for call {id}, where {MAX_PIECE:,} are allowed and credit is left "
                f"for {max(receiving.granted - receiving.received + size, 0):,}"
            )
        if flags & Flag.MORE:
            if flags & Flag.END:
                raise ProtocolViolation("DATA with MORE and END")
            too_large = self._assemble(call, receiving, payload)
            if too_large is None:
                self._grant(id, receiving)
            return too_large
        if receiving.parts is not None:
            too_large = self._assemble(call, receiving, payload)
            if too_large is not None:
                return too_large
            cost, receiving.assembling = receiving.assembling, 0
            payload = bytes(receiving.parts)
            receiving.parts = None
        elif size > self.limits.max_message:
            return self._too_large(call, size)
        return self._whole(call, receiving, payload, cost, ends=bool(flags & Flag.END))

    def _assemble(self, call: OutgoingCall | IncomingCall, receiving: Receiving, part: bytes) -> Event | None:
        """Add a part to a message. Not None if it has become too large, and the call has ended by that."""
        if receiving.parts is None:
            receiving.parts = bytearray()
        size = len(receiving.parts) + len(part)
        if size > self.limits.max_message:
            return self._too_large(call, size)
        receiving.parts += part
        receiving.assembling += len(part) + OVERHEAD
        return None

    def _whole(
        self, call: OutgoingCall | IncomingCall, receiving: Receiving, payload: bytes, cost: int, *, ends: bool
    ) -> Event:
        """A message is whole that has arrived in DATA frames."""
        if isinstance(call, OutgoingCall):
            if call.metadata is not None:  # of the reply, which has begun
                return self._answer(call, Response(payload, call.metadata))
        elif call.payload is None:
            receiving.consumed += cost
            receiving.ended = ends or not call.is_stream
            self._grant(call.id, receiving)
            return self._begin(call, payload)
        if ends:
            receiving.ended = True
        receiving.messages.append((payload, cost))
        return receiving

    def _too_large(self, call: OutgoingCall | IncomingCall, size: int) -> Event:
        limit = self.limits.max_message
        text = f"a message of {size:,} bytes or more, where max_message is {limit:,}"
        if isinstance(call, OutgoingCall):
            self.control.append(wire.encode_cancel(call.id))
            failure = Failure(StatusCode.RESOURCE_EXHAUSTED, 0, wire.NO_LIMIT, text, NO_METADATA)
            return self._answer(call, failure)
        self._refuse(call.id, StatusCode.RESOURCE_EXHAUSTED, text, refused=call.payload is None)
        self.finish(call)
        return Cancelled(call)

    def _receive_end(self, id: int) -> Event | None:
        if id % 2 != self._incoming_parity:
            raise ProtocolViolation("END from the side that was called")
        call = self._incoming(id, "END")
        if call is None:
            return None
        receiving = call.receiving
        if receiving is None or receiving.ended or receiving.parts is not None or call.payload is None:
            raise ProtocolViolation(f"END of call {id} within a message or after its end")
        receiving.ended = True
        return receiving

    def _receive_cancel(self, id: int) -> Event | None:
        if id % 2 != self._incoming_parity:
            raise ProtocolViolation("CANCEL from the side that was called")
        call = self._incoming(id, "CANCEL")
        if call is None:
            return None
        self.finish(call)
        return Cancelled(call)

    def _receive_credit(self, id: int, granted: int) -> Event | None:
        is_incoming = id % 2 == self._incoming_parity
        call = self._incoming(id, "CREDIT") if is_incoming else self._outgoing(id, "CREDIT")
        if call is None or granted <= call.sending.credit:
            return None
        call.sending.credit = granted
        return call.sending

    def _receive_goaway(self, last_id: int) -> Event:
        self.peer_goes_away = True
        self.can_call = False
        unseen = [call for call in self.outgoing.values() if call.id > last_id]
        text = "the peer is shutting down"
        for call in unseen:
            self._answer(call, Failure(StatusCode.UNAVAILABLE, Flag.REFUSED, wire.NO_LIMIT, text, NO_METADATA))
        return GoingAway(unseen)

    # --- by number --------------------------------------------------------------------------------------------------

    def _outgoing(self, id: int, what: str) -> OutgoingCall | None:
        """The call of ours that a frame is for; None if it comes late."""
        call = self.outgoing.get(id)
        if call is None and (id % 2 == self._incoming_parity or not 0 < id < self.next_id):
            raise ProtocolViolation(f"{what} for call {id}, which was never made")
        return call

    def _incoming(self, id: int, what: str) -> IncomingCall | None:
        """The call of the peer's that a frame is for; None if it comes late."""
        call = self.incoming.get(id)
        if call is None and not 0 < id <= self._last_incoming:
            raise ProtocolViolation(f"{what} for call {id}, which was never made")
        return call
