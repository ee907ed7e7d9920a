"""One end of a connection over which both ends may call each other: what carries out what the core says.

A call is sent in its caller's task. What arrives is taken in the step in which it does, and that never waits to send
(D30): it wakes callers and streams, and gives calls of the peer's to standing workers. So only callers and handlers
ever wait for the peer.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import math
from collections.abc import AsyncIterator, Callable, Coroutine
from types import TracebackType
from typing import Any, Final, Self

import anyio
import anyio.lowlevel

from towline.endpoint import Endpoint
from towline.errors import (
    BufferFull,
    CallFailed,
    CallRejected,
    CircuitOpen,
    ConnectionLost,
    DeadlineExceeded,
    Elapsed,
    Filtered,
    MessageTooLarge,
    ProtocolViolation,
    ServiceClosed,
    ServiceUnavailable,
    StatusCode,
    TowlineError,
)
from towline.scope import is_cancelled, only
from towline.service import Service
from towline.waiter import waiters

from . import _wire as wire
from ._channel import Channel
from ._core import (
    OVERHEAD,
    PIECE,
    Began,
    Cancelled,
    Core,
    Failure,
    IncomingCall,
    Limits,
    OutgoingCall,
    Receiving,
    Sending,
)
from ._messages import Request, Response
from ._stream import Stream
from ._wire import NO_LIMIT, Flag
from ._workers import Workers

__all__ = ["LayeredPeer", "Peer", "Plain", "handling", "status_of"]

logger = logging.getLogger(__name__)

TURN: Final = 128
"""The most frames that are taken in one turn of the event loop. Then those whom they woke run."""

HALVED: Final = 8
"""So many answers at once are taken in two turns, if most of the calls that wait got theirs: see `Peer._turn`."""

MAX_TEXT: Final = 0xFFFF
"""Bytes in the text of an error. What is longer is cut."""

NOBODY: Final = "this end answers no calls"


def handling(handler: Service[Request, Response]) -> Service[Request, Response]:
    """A handler, marked as such: what it lets through of calls that it makes itself says nothing of its own.

    A limit that turns its caller away says that the call was not sent. In a layer around a handler that is true of the
    call that is answered, which may be made again. It is not where the handler had begun, and met the limit on its way.
    """

    async def handle(request: Request, /) -> Response:
        try:
            return await handler(request)
        except TowlineError as error:
            if error.sent is False and not isinstance(error, CallFailed):
                error.sent = True
            raise

    return handle


class Peer:
    """One end of a connection: a service that calls the other end. What the other end calls, its handler answers."""

    def __init__(
        self,
        channel: Channel,
        limits: Limits,
        *,
        is_dialling: bool,
        workers: Workers,
        handler: Service[Request, Response] | None,
        clock: Callable[[], float],
        reveals_errors: bool = False,
    ) -> None:
        self._channel = channel
        self._try_send = channel.try_send
        self._new_waiter, self._wake = waiters()
        # As anyio.current_effective_deadline, which asks for every call which event loop runs: that is a third of it.
        self._deadline = anyio.lowlevel.current_token().backend_class.current_effective_deadline
        self._core = Core(limits, is_dialling=is_dialling)
        self._workers = workers
        self._handler = handler
        self._clock = clock
        self._reveals_errors = reveals_errors
        self._error: Exception | None = None  # the connection is over
        self._broken: Exception | None = None  # of what takes the frames
        self._is_closed = False  # by this side
        self._changed: anyio.Event | None = None  # for whoever waits for calls to end, or for the connection to
        self._flush()  # HELLO comes before any call

    def __repr__(self) -> str:
        core = self._core
        state = "closed" if self._is_closed else "lost" if self._error is not None else "open"
        return f"<Peer {state} calling={len(core.outgoing)} answering={len(core.incoming)}>"

    @property
    def endpoint(self) -> Endpoint:
        """The endpoint that was dialled, or that accepted."""
        return self._channel.endpoint

    @property
    def is_draining(self) -> bool:
        """Whether the other end takes no further calls, and only finishes those it has."""
        return self._core.peer_goes_away

    # --- calling ----------------------------------------------------------------------------------------------------

    async def __call__(self, request: Request, /) -> Response:
        """Call the other end.

        Cancelling it cancels the handler there. The deadline of the scope around it travels with it.

        Raises:
            CallFailed: if the other end answered with an error.
            ConnectionLost: if the connection is lost; ``sent`` says whether the call may have been carried out.
            ServiceClosed: if this end is closed; ``sent`` says the same.
            DeadlineExceeded: if no time is left. Nothing was sent.
            ValueError: if the method's name or the metadata is too long.
        """
        core = self._core
        payload = request.payload
        is_stream = request.is_stream
        method = request.method.encode()
        if not 0 < len(method) <= wire.MAX_METHOD:
            raise ValueError(f"a method's name of {len(method)} bytes, where 1 to {wire.MAX_METHOD} are expected")
        metadata = wire.encode_metadata(request.metadata) if request.metadata else b""
        if self._error is not None or self._is_closed or not core.can_call:
            raise self._refusal()
        if is_stream or len(payload) > PIECE:
            call = await self._begin(is_stream, method, metadata, payload)
            if is_stream:
                return Response(stream=Stream(self, call))
        else:
            # What most calls are: one frame, sent and answered. The number is part of it, and numbers go up in the
            # order in which calls are sent.
            deadline = self._deadline()
            left = NO_LIMIT if deadline == math.inf else await _milliseconds_to(deadline)
            number = self._try_send(wire.encode_call(core.next_id, 0, left, method, metadata, payload))
            if number:
                call = core.called(number)
            else:
                call = await self._begin(is_stream, method, metadata, payload)
        if call.result is None:
            call.waiter = waiter = self._new_waiter()
            try:
                await waiter
            except BaseException:
                self.give_up(call)
                raise
        return _response_of(call)

    async def _begin(self, is_stream: bool, method: bytes, metadata: bytes, payload: bytes) -> OutgoingCall:
        """Send a call. Raised or cancelled means that it was not sent, or not to its end."""
        core = self._core
        is_long = len(payload) > PIECE
        first = payload[:PIECE] if is_long else payload
        flags = (Flag.MORE if is_long else 0) | (Flag.STREAM if is_stream else 0)
        while True:
            left = await _milliseconds_to(self._deadline())
            frame = wire.encode_call(core.next_id, flags, left, method, metadata, first)
            number = self._try_send(frame)
            if number:
                break
            try:
                await self._channel.wait_to_send(frame)
            except (ConnectionLost, anyio.ClosedResourceError) as error:
                raise self._unsent(error) from error
            if not core.can_call:
                raise self._refusal()
        call = core.called(0 if is_long else number, is_stream=is_stream)
        if core.control:
            self._flush()
        if is_long:
            try:
                call.number = await self._send_pieces(call, payload, PIECE)
            except Exception:
                if call.result is None:
                    raise  # else it was answered before it was whole, or is lost: the answer says why
        return call

    async def answer_of(self, call: OutgoingCall) -> Response:
        """Wait for the answer to a call with a stream. What comes before it is dropped, or it might find no room."""
        receiving = call.receiving
        assert receiving is not None
        while call.result is None:
            while receiving.messages:
                self._core.taken(call.id, receiving, receiving.messages.popleft()[1])
            if self._core.control:
                self._flush()
            receiving.waiter = receiving.waiter or anyio.Event()
            await receiving.waiter.wait()
        return _response_of(call)

    def when_over(self, call: OutgoingCall, told: Callable[[Response | Exception], None]) -> None:
        """Have a function told, once, how a call with a stream has ended; at once, if it has."""
        receiving = call.receiving
        assert receiving is not None
        if receiving.when_over is None:
            receiving.when_over = []
        receiving.when_over.append(told)
        if call.result is not None:
            _tell_result(call, receiving)

    def give_up(self, call: OutgoingCall) -> None:
        """Cancel a call, unless it has ended."""
        if call.result is None:
            call.result = anyio.ClosedResourceError()
            self._core.cancel(call)
            if self._core.control:
                self._flush()
            self._answered(call)

    def _refusal(self) -> Exception:
        if self._is_closed:
            return ServiceClosed("this end of the connection is closed")
        if self._error is not None:
            return self._unsent(self._error)
        # Over for new calls, though not for those under way; what made the connection makes another.
        return self._unsent(ConnectionLost("the other end takes no further calls over this connection"))

    def _unsent(self, error: Exception) -> Exception:
        """A connection's end, for a call that has not begun."""
        if isinstance(error, ConnectionLost):
            lost = copy.copy(error)
            lost.sent = False
            return lost
        return ServiceClosed("this end of the connection is closed")

    # --- messages within a call -------------------------------------------------------------------------------------

    async def send_message(self, call: OutgoingCall | IncomingCall, item: bytes) -> None:
        """Send one message of a stream."""
        await anyio.lowlevel.checkpoint_if_cancelled()
        if call.sending.ended:
            raise anyio.ClosedResourceError
        await self._send_pieces(call, item, 0)

    async def _send_pieces(self, call: OutgoingCall | IncomingCall, data: bytes, start: int) -> int:
        """Send a message, or what is left of it, as the peer has room for it: the whole of it or, raising, nothing.

        A call whose message was torn by a cancellation is over.

        Returns:
            The number of the last frame.
        """
        sending = call.sending
        is_begun = start > 0
        while sending.is_busy and not is_begun:
            await self._wait_to_send(call)
        sending.is_busy = True
        try:
            while True:
                piece = data if not start and len(data) <= PIECE else data[start : start + PIECE]
                cost = len(piece) + OVERHEAD
                self._check_open(call)
                while not sending.has_room(len(piece)):
                    await self._wait_to_send(call)
                is_last = start + len(piece) == len(data)
                sending.spent += cost
                try:
                    number = await self._channel.send(wire.encode_data(call.id, 0 if is_last else Flag.MORE, piece))
                except BaseException:
                    sending.spent -= cost
                    raise
                if is_last:
                    return number
                start += len(piece)
                is_begun = True
        except BaseException:
            if is_begun:
                self._tear(call)
            raise
        finally:
            sending.is_busy = False
            _set(sending)

    async def _wait_to_send(self, call: OutgoingCall | IncomingCall) -> None:
        sending = call.sending
        self._check_open(call)
        sending.waiter = sending.waiter or anyio.Event()
        await sending.waiter.wait()
        self._check_open(call)

    def _tear(self, call: OutgoingCall | IncomingCall) -> None:
        if isinstance(call, OutgoingCall):
            self.give_up(call)
        else:
            self._fail(call, CallFailed(StatusCode.ABORTED, "a message was not sent to its end"))

    def _check_open(self, call: OutgoingCall | IncomingCall) -> None:
        """Raise what a call that is over means to whoever sends in it."""
        if self._is_over(call):
            error = self._why_over(call)
            raise anyio.ClosedResourceError if error is None else error

    def _is_over(self, call: OutgoingCall | IncomingCall) -> bool:
        return call.is_over if isinstance(call, IncomingCall) else call.result is not None

    def _why_over(self, call: OutgoingCall | IncomingCall) -> Exception | None:
        """The error that a call has ended with; None if it was answered, or cancelled."""
        result = call.result if isinstance(call, OutgoingCall) else self._error
        return None if result is None or type(result) is Response else _error_of(result)

    async def receive_message(self, call: OutgoingCall | IncomingCall) -> bytes:
        """Receive one message of a stream."""
        receiving = call.receiving
        assert receiving is not None
        await anyio.lowlevel.checkpoint_if_cancelled()
        while not receiving.messages:
            if self._is_over(call):
                raise self._why_over(call) or anyio.EndOfStream
            if receiving.ended:
                raise anyio.EndOfStream
            receiving.waiter = receiving.waiter or anyio.Event()
            await receiving.waiter.wait()
        message, cost = receiving.messages.popleft()
        self._core.taken(call.id, receiving, cost)
        if self._core.control:
            self._flush()
        return message

    async def send_end(self, call: OutgoingCall | IncomingCall) -> None:
        """End this side's messages, if it is the side that calls. Raised or cancelled means that it was not ended."""
        await anyio.lowlevel.checkpoint()
        sending = call.sending
        if not isinstance(call, OutgoingCall) or sending.ended:
            return
        sending.ended = True
        try:
            while sending.is_busy and call.result is None:  # another task is in the middle of a message
                sending.waiter = sending.waiter or anyio.Event()
                await sending.waiter.wait()
            if call.result is None:
                await self._channel.send(wire.encode_end(call.id))
        except BaseException:
            sending.ended = False
            raise

    # --- answering --------------------------------------------------------------------------------------------------

    def _start_clock(self, call: IncomingCall) -> None:
        if call.deadline_ms != NO_LIMIT and call.deadline == math.inf:
            call.deadline = self._clock() + call.deadline_ms / 1000

    def _take(self, call: IncomingCall) -> None:
        self._start_clock(call)
        if self._handler is None:
            self._fail(call, CallFailed(StatusCode.UNIMPLEMENTED, NOBODY, refused=True))
        elif self._workers.is_full:
            text = "as many calls wait here as may"
            self._fail(call, CallFailed(StatusCode.RESOURCE_EXHAUSTED, text, refused=True))
        else:
            self._workers.give((self._answer, self._late, call))

    async def _answer(self, call: IncomingCall) -> None:
        handler = self._handler
        assert handler is not None
        payload = call.payload
        assert payload is not None
        if call.deadline < math.inf and call.deadline <= self._clock():
            return self._fail(call, CallFailed(StatusCode.DEADLINE_EXCEEDED, "it came too late", refused=True))
        request = Request(
            call.method,
            payload,
            call.metadata,
            is_stream=call.is_stream,
            stream=Stream(self, call) if call.is_stream else None,
            peer=self,
        )
        try:
            response = await handler(request)
            if not isinstance(response, Response):  # pyright: ignore[reportUnnecessaryIsInstance] -- a user's
                raise TypeError(f"the handler of {call.method!r} answered {response!r}, where a Response is expected")
            metadata = wire.encode_metadata(response.metadata) if response.metadata else b""
        except Exception as error:
            return self._fail(call, self._failure(call, error))
        except asyncio.CancelledError as error:
            if is_cancelled():
                raise
            logger.exception(
                "the handler of %r was cancelled by itself",
                call.method,
                exc_info=error,
                extra={"event": "handler.cancelled", "method": call.method},
            )
            return self._fail(call, CallFailed(StatusCode.INTERNAL))
        if call.sender is not None and call.sender.is_busy:
            logger.error(
                "the handler of %r returned while a task of its was sending a message",
                call.method,
                extra={"event": "handler.left_sending", "method": call.method},
            )
            return self._fail(call, CallFailed(StatusCode.INTERNAL))
        await self._reply(call, metadata, response.payload)

    async def _reply(self, call: IncomingCall, metadata: bytes, payload: bytes) -> None:
        if call.is_over:
            return
        try:
            if len(payload) <= PIECE:
                await self._channel.send(wire.encode_reply(call.id, 0, metadata, payload))
            else:
                await self._channel.send(wire.encode_reply(call.id, Flag.MORE, metadata, payload[:PIECE]))
                await self._send_pieces(call, payload, PIECE)
        except (TowlineError, anyio.ClosedResourceError) as error:
            logger.debug(
                "%r: no reply to call %d: %s",
                self,
                call.id,
                error,
                extra={"event": "call.unanswered", "method": call.method, "reason": str(error)},
            )
        if self._core.finish(call):
            self._note_change()
        _wake_all(call)  # a task that the handler has left behind, if there is one

    async def _late(self, call: IncomingCall) -> None:
        """The deadline of a call has passed while it was answered, and its handler was cancelled."""
        self._fail(call, CallFailed(StatusCode.DEADLINE_EXCEEDED, "its deadline has passed"))

    def _fail(self, call: IncomingCall, error: CallFailed) -> None:
        if call.is_over:
            return
        frame = _error_frame(call, error)
        self._core.finish(call)
        self._core.control.append(frame)
        self._flush()
        _wake_all(call)
        self._note_change()

    def _failure(self, call: IncomingCall, error: Exception) -> CallFailed:
        """What the caller is told of an exception. Of one that is not meant for it, no text."""
        error = only(error)  # a handler may use task groups
        if isinstance(error, CallFailed):
            if error.refused and getattr(error, _FROM_ELSEWHERE, False):
                return CallFailed(error.code, error.message, details=error.details, retry_after=error.retry_after)
            return error
        code = _code_of(error)
        if code is None:
            if not isinstance(error, ConnectionLost) or self._error is None:
                logger.exception(
                    "the handler of %r failed",
                    call.method,
                    exc_info=error,
                    extra={"event": "handler.failed", "method": call.method},
                )
            text = f"{type(error).__name__}: {error}" if self._reveals_errors else ""
            return CallFailed(StatusCode.INTERNAL, text)
        asked = getattr(error, "retry_after", None)
        return CallFailed(code, str(error), refused=getattr(error, "sent", None) is False, retry_after=asked)

    # --- what arrives -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Take what arrives until the connection is over. Raises nothing but a cancellation, and what is a bug here."""
        error: Exception = ConnectionLost("the connection's scope was closed")
        try:
            await self._channel.receive_each(self._receive, self._turn)
        except anyio.EndOfStream:
            error = ConnectionLost("the other end has closed the connection")
        except ConnectionLost as lost:
            error = lost
        except anyio.ClosedResourceError:
            error = ServiceClosed("this end of the connection is closed")
            broken = self._broken
            if broken is not None:
                is_theirs = isinstance(broken, ProtocolViolation)
                error = ConnectionLost(f"the peer broke the protocol: {broken}" if is_theirs else "this end has failed")
                error.__cause__ = broken
                if not is_theirs:
                    raise broken from None
        finally:
            self._end(error)

    def _turn(self, count: int) -> int:
        """How many of so many frames to take in this turn of the event loop.

        Those who are woken by one turn send their next calls in one write. If all that were under way were answered at
        once, and so asked again at once, this end and the other would only ever work in turns, each waiting for the
        other; so the second half is woken while the other end has the first to work on. It costs a write more.
        """
        parts = -(-count // TURN)
        if count >= HALVED and count <= len(self._core.outgoing) < 2 * count:
            parts = max(parts, 2)
        return -(-count // parts)

    def _receive(self, frames: list[bytes]) -> None:
        try:
            self._receive_all(frames)
        except Exception as error:
            self._break_off(error)

    def _break_off(self, error: Exception) -> None:
        """End the connection because of this. `run` hears that it is closed, and says why."""
        if isinstance(error, ProtocolViolation):
            logger.warning(
                "%r: the peer broke the protocol: %s",
                self,
                error,
                extra={"event": "rpc.violation", "reason": str(error)},
            )
        if self._broken is None:
            self._broken = error
        self._channel.abort()

    def _receive_all(self, frames: list[bytes]) -> None:
        for event in self._core.receive(frames):
            if isinstance(event, OutgoingCall):
                self._answered(event)
            elif isinstance(event, IncomingCall):
                self._take(event)
            elif isinstance(event, (Receiving, Sending)):
                _set(event)
            elif isinstance(event, Cancelled):
                self._cancel(event.call)
            elif isinstance(event, Began):
                self._start_clock(event.call)
            else:
                for call in event.unseen:
                    self._answered(call)
                self._note_change()
        if self._core.control:
            self._flush()
        if len(frames) > 1:
            self._channel.cork()

    def _flush(self) -> None:
        """Send what does not wait."""
        control = self._core.control
        frames, self._core.control = control, []
        try:
            for frame in frames:
                self._channel.send_now(frame)
        except (BufferFull, MessageTooLarge) as error:
            # It asks on and on and takes no answer, or not even the shortest. That is no fault of whoever is here.
            violation = ProtocolViolation(f"it asks, and takes no answer: {error}")
            violation.__cause__ = error
            self._break_off(violation)
        except (ConnectionLost, anyio.ClosedResourceError):
            pass  # the reader hears of it, too

    def _answered(self, call: OutgoingCall) -> None:
        if call.waiter is not None:
            self._wake(call.waiter)
        if call.receiving is not None or call.sender is not None:
            _wake_all(call)
            if call.receiving is not None and call.receiving.when_over is not None:
                _tell_result(call, call.receiving)
        if self._changed is not None:
            self._note_change()

    def _cancel(self, call: IncomingCall) -> None:
        if call.handler is not None:
            call.handler.cancel(call)
        _wake_all(call)
        self._note_change()

    def _end(self, error: Exception) -> None:
        """The connection is over: every call ends, once."""
        core = self._core
        self._error = error
        for call in [*core.outgoing.values()]:
            del core.outgoing[call.id]
            call.result = self._loss(call, error)
            self._answered(call)
        for incoming in [*core.incoming.values()]:
            core.finish(incoming)
            self._cancel(incoming)
        self._note_change()

    def _loss(self, call: OutgoingCall, error: Exception) -> Exception:
        was_sent = call.number > 0 and self._channel.was_delivered(call.number, error)
        if self._is_closed or not isinstance(error, ConnectionLost):
            closed = ServiceClosed("this end of the connection was closed before there was an answer")
            closed.sent = was_sent
            return closed
        lost = copy.copy(error)
        lost.__cause__ = error.__cause__
        lost.sent = was_sent
        return lost

    # --- what happens below -----------------------------------------------------------------------------------------

    def events(self) -> AsyncIterator[Any]:
        """What happens to the session below, as `Session.events`; nothing, where there is none."""
        return self._channel.events()

    # --- closing ----------------------------------------------------------------------------------------------------

    def go_away(self) -> None:
        """Take no further calls, and tell the other end. Those that are open go on."""
        self._core.go_away()
        self._flush()

    async def wait_answered(self) -> None:
        """Wait until all calls of the other end are answered, or the connection is over."""
        while self._core.incoming and self._error is None:
            await self._change()

    async def wait_closing(self) -> None:
        """Wait until this takes no further calls: the other end drains, or the connection is over."""
        while self._core.can_call and self._error is None and not self._is_closed:
            await self._change()

    async def aclose(self) -> None:
        """Close the connection. Calls under way end at once, unless the other end drains: then they may finish."""
        try:
            while self.is_draining and self._core.outgoing and self._error is None:
                await self._change()
        except BaseException:
            self.abort()
            raise
        if self._is_closed:
            await anyio.lowlevel.checkpoint()
            return
        self._is_closed = True
        self._end(ServiceClosed("this end of the connection is closed"))
        await self._channel.aclose()

    def abort(self) -> None:
        """End the connection at once."""
        self._is_closed = True
        self._channel.abort()

    async def wait_closed(self) -> None:
        """Wait until the connection is over."""
        await self._channel.wait_closed()

    async def __aenter__(self) -> Self:
        await anyio.lowlevel.checkpoint()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self.abort()
        else:
            await self.aclose()

    def _note_change(self) -> None:
        if self._changed is not None:
            self._changed.set()
            self._changed = None

    async def _change(self) -> None:
        if self._changed is None:
            self._changed = anyio.Event()
        await self._changed.wait()


class Plain:
    """What a layer around the calls of a connection wraps: the connection itself, without that layer.

    Attributes:
        peer: the connection.
    """

    __slots__ = ("peer",)

    def __init__(self, peer: Peer) -> None:
        self.peer = peer

    def __call__(self, request: Request, /) -> Coroutine[Any, Any, Response]:
        return Peer.__call__(self.peer, request)


class LayeredPeer(Peer):
    """A connection with a layer around every call that is made over it, whoever makes it."""

    def __init__(
        self, channel: Channel, limits: Limits, *, outgoing: Callable[[Plain], Service[Request, Response]], **more: Any
    ) -> None:
        super().__init__(channel, limits, **more)
        self._outgoing = outgoing(Plain(self))

    async def __call__(self, request: Request, /) -> Response:
        return await self._outgoing(request)


_FROM_ELSEWHERE: Final = "_towline_from_elsewhere"
"""Set on an error that a call was answered with. A handler that lets it through has begun, whatever it says of itself:
of the call that the handler made, and not of the one that it answers."""

_CODES: Final[dict[type[Exception], StatusCode]] = {
    DeadlineExceeded: StatusCode.DEADLINE_EXCEEDED,
    Elapsed: StatusCode.DEADLINE_EXCEEDED,
    Filtered: StatusCode.PERMISSION_DENIED,
    CircuitOpen: StatusCode.UNAVAILABLE,
    ServiceUnavailable: StatusCode.UNAVAILABLE,
    CallRejected: StatusCode.RESOURCE_EXHAUSTED,
}
"""What the errors of layers around a handler mean to a caller. The first that fits counts."""


def _code_of(error: Exception) -> StatusCode | None:
    return next((code for kind, code in _CODES.items() if isinstance(error, kind)), None)


def status_of(error: Exception) -> StatusCode:
    """What a caller is told of an exception of its handler's."""
    error = only(error)
    return error.code if isinstance(error, CallFailed) else _code_of(error) or StatusCode.INTERNAL


def _error_frame(call: IncomingCall, error: CallFailed) -> bytes:
    """An error as a frame, whatever a handler may have put into it."""
    retry_after_ms = NO_LIMIT
    if error.retry_after is not None and 0 <= error.retry_after < math.inf:
        retry_after_ms = min(round(error.retry_after * 1000), NO_LIMIT - 1)
    text = error.message.encode(errors="replace")
    if len(text) > MAX_TEXT:
        text = text[:MAX_TEXT].decode(errors="ignore").encode()  # not within a letter
    try:
        details = wire.encode_metadata(error.details) if error.details else b""
    except ValueError as wrong:
        logger.warning(
            "the details of %r are left out: %s",
            error,
            wrong,
            extra={"event": "call.details_left_out", "reason": str(wrong)},
        )
        details = b""
    has_sent = call.sender is not None and call.sender.spent > 0
    flags = Flag.REFUSED if error.refused and not has_sent else 0
    code = error.code or StatusCode.UNKNOWN  # OK is none
    return wire.encode_error(call.id, code, flags, retry_after_ms, text, details)


async def _milliseconds_to(deadline: float) -> int:
    """What is left of the time for a call, as it travels.

    Raises:
        DeadlineExceeded: if nothing is.
    """
    if deadline == math.inf:
        return NO_LIMIT
    left = deadline - anyio.current_time()
    if left <= 0:
        await anyio.lowlevel.checkpoint()  # the scope itself cancels this, if it has come so far
        raise DeadlineExceeded(0, "no time is left for the call", sent=False)
    return min(math.ceil(left * 1000), NO_LIMIT - 1)


def _response_of(call: OutgoingCall) -> Response:
    result = call.result
    if type(result) is Response:
        return result
    raise _error_of(result)


def _error_of(result: Any) -> Exception:
    if isinstance(result, Exception):
        return result
    assert isinstance(result, Failure)
    try:
        code = StatusCode(result.code or StatusCode.UNKNOWN)  # OK is no error
    except ValueError:
        code = StatusCode.UNKNOWN
    retry_after = None if result.retry_after_ms == NO_LIMIT else result.retry_after_ms / 1000
    refused = bool(result.flags & Flag.REFUSED)
    error = CallFailed(code, result.message, details=result.details, refused=refused, retry_after=retry_after)
    setattr(error, _FROM_ELSEWHERE, True)
    return error


def _tell_result(call: OutgoingCall, receiving: Receiving) -> None:
    told, receiving.when_over = receiving.when_over or [], None
    result = call.result if type(call.result) is Response else _error_of(call.result)
    for each in told:
        try:
            each(result)
        except Exception:
            logger.exception(
                "what was told of the end of a call raised; nothing else is harmed", extra={"event": "call.hook_failed"}
            )


def _set(half: Sending | Receiving | None) -> None:
    """Wake whoever waits in one direction of a call."""
    if half is not None and half.waiter is not None:
        half.waiter.set()
        half.waiter = None


def _wake_all(call: OutgoingCall | IncomingCall) -> None:
    _set(call.sender)
    _set(call.receiving)
