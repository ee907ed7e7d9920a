"""Spans and durations of calls.

A call is one span outside all layers (`Tracer.calls`), with one more for each attempt inside a Retry (`attempts`).
Where a connection is called directly, the span is made there (`outgoing`), which is also where the context is put into
the call. The other end takes it from there (`incoming`), and its handler runs within a span of its own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from contextvars import Token
from typing import Any, Final

import anyio
from opentelemetry import baggage, context, propagate, trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Status
from opentelemetry.trace import StatusCode as SpanStatus

from towline.endpoint import Endpoint
from towline.errors import CallFailed, StatusCode
from towline.layers.rpc import Peer, Request, Response, Stream, status_of
from towline.layers.rpc._wire import MAX_METADATA
from towline.scope import is_cancelled, only
from towline.service import Service, Wrapper

from ._names import CURRENT, NAME, Attributes, Instruments, error_type, for_metrics, where
from ._safe import safely

__all__ = ["Call", "Tracer"]

MAX_CONTEXT: Final = 8 << 10
"""Bytes that a context may have in a call's metadata. More is left out, and not taken. The caller's own goes first."""

MAX_METHODS: Final = 1_000
"""Names of methods that are told apart. All others are one, since measurements are kept for each name."""

_TURNED_AWAY: Final = (
    StatusCode.UNIMPLEMENTED,
    StatusCode.UNAUTHENTICATED,
    StatusCode.PERMISSION_DENIED,
    StatusCode.RESOURCE_EXHAUSTED,
)
"""What is answered before anybody looks whether there is such a method: it must not fill the room for names."""

OTHER: Final = "_OTHER"

_FAULTS: Final = {
    StatusCode.UNKNOWN,
    StatusCode.DEADLINE_EXCEEDED,
    StatusCode.UNIMPLEMENTED,
    StatusCode.INTERNAL,
    StatusCode.UNAVAILABLE,
    StatusCode.DATA_LOSS,
}
"""What is an error of the side that answers. The rest is what it has to say to its caller."""


class Call:
    """A call, or an attempt of one, whose span is open. It is ended once.

    Attributes:
        method: its method.
        span: its span.
        where: what is known of where it went.
        attempts: how many attempts were begun within it.
        is_over: its span was ended.
    """

    __slots__ = ("_began", "_deadline", "_record", "_token", "attempts", "is_over", "method", "span", "where")

    def __init__(self, method: str, span: Span, record: Callable[..., None] | None) -> None:
        self.method = method
        self.span = span
        self.where: Attributes = {}
        self.attempts = 0
        self.is_over = False
        self._record = record
        self._began = time.perf_counter()
        self._deadline = anyio.current_effective_deadline()
        self._token: Token[Context] | None = None

    def enter(self) -> None:
        """Make its span the current one, and what is called within it a part of it."""
        inside = trace.set_span_in_context(self.span)
        self._token = context.attach(context.set_value(CURRENT, self, inside))

    def enter_handler(self, base: Context) -> None:
        """Make its span the current one. What a handler calls is no part of the call that it answers."""
        self._token = context.attach(trace.set_span_in_context(self.span, base))

    def leave(self) -> None:
        if self._token is not None:
            token, self._token = self._token, None
            context.detach(token)

    def went(self, attributes: Attributes) -> None:
        """It went there."""
        self.where = attributes
        if self.span.is_recording():
            self.span.set_attributes(attributes)

    def last_as(self, stream: Stream) -> None:
        """End with a stream; at once with one of somebody's own, which cannot say when that is."""
        if isinstance(stream, Stream):  # pyright: ignore[reportUnnecessaryIsInstance] -- a user's layer may give another
            stream.when_over(lambda end: self.ended(end if isinstance(end, Exception) else None))
        else:
            self.ended(None)

    def ended(self, error: BaseException | None) -> None:
        """It was answered, or failed with this. On the side that calls."""
        code, kind = self._judge(error)
        self._end(self.method, code, kind, is_fault=kind is not None)

    def was_answered(self, error: BaseException | None, method: str) -> None:
        """The handler has answered, or raised this. On the side that is called."""
        code, kind = self._judge(error)
        if isinstance(error, asyncio.CancelledError) and not is_cancelled():
            code, kind = StatusCode.INTERNAL, error_type(error)  # by itself, which is a failure like any other
        elif code is None:
            code = status_of(error) if isinstance(error, Exception) else StatusCode.CANCELLED
        if method == OTHER and self.span.is_recording():
            self.span.update_name(NAME)
            self.span.set_attributes({"rpc.method": OTHER, "rpc.method_original": self.method})
        self._end(method, code, kind, is_fault=code in _FAULTS)

    def _judge(self, error: BaseException | None) -> tuple[StatusCode | None, str | None]:
        if error is None:
            return StatusCode.OK, None
        error = only(error)
        if isinstance(error, CallFailed):
            return error.code, error.code.name
        # A stream that was left ends by the first; and may have been forgotten, and found where no event loop runs.
        if type(error) is anyio.ClosedResourceError or _is_cancellation(error):
            code = StatusCode.CANCELLED
            with suppress(RuntimeError):
                if anyio.current_time() >= self._deadline:
                    code = StatusCode.DEADLINE_EXCEEDED
            return code, code.name
        return None, error_type(error)

    def _end(self, method: str, code: StatusCode | None, kind: str | None, *, is_fault: bool) -> None:
        result: Attributes = {}
        if code is not None:
            result["rpc.status_code"] = code.name
        if kind is not None:
            result["error.type"] = kind
        try:
            if self.span.is_recording():
                self.span.set_attributes(result)
                if is_fault:
                    self.span.set_status(Status(SpanStatus.ERROR))
            if self._record is not None:
                about: Attributes = {"rpc.system.name": NAME, "rpc.method": method}
                self._record(time.perf_counter() - self._began, about | result | for_metrics(self.where))
        finally:
            self.is_over = True
            self.span.end()


class Tracer:
    """Makes the services that tell of calls."""

    def __init__(self, tracer: trace.Tracer, instruments: Instruments, *, takes_baggage: bool) -> None:
        self._tracer = tracer
        self._record_client = instruments.client_calls
        self._record_server = instruments.server_calls
        self._takes_baggage = takes_baggage
        self._methods: set[str] = set()

    def calls(self, inner: Service[Any, Any], /) -> Service[Any, Any]:
        """The service with a span around each call."""
        return _Calls(inner, self.begin)

    def attempts(self, inner: Service[Any, Any], /) -> Service[Any, Any]:
        """The service with a span around each attempt of a call that has one."""
        return _Calls(inner, self.begin_attempt)

    def outgoing(self, inner: Service[Request, Response], peer: Peer, /) -> Service[Request, Response]:
        """What calls over a connection, with the context in each call, and a span if it has none of ours."""
        where_to = where(peer.endpoint)

        async def call(request: Request, /) -> Response:
            around = _current()
            # A layer may make another call on its way, which is one of its own.
            if around is not None and around.method == request.method:
                safely(around.went, where_to)
                return await inner(safely(self._carry, request) or request)
            made = safely(self.begin, request, where_to)
            if made is None:
                return await inner(request)
            return await _within(made, inner, safely(self._carry, request) or request)

        return call

    def incoming(self, inner: Service[Request, Response], /) -> Service[Request, Response]:
        """A handler, each of whose runs has a span."""

        async def answer(request: Request, /) -> Response:
            made = safely(self._take, request)
            if made is None:
                return await inner(request)
            try:
                response = await inner(request)
            except BaseException as error:
                safely(made.was_answered, error, self._name(request.method, error))
                safely(made.leave)
                raise
            # What is no response is answered as a failure, too.
            wrong = None if isinstance(response, Response) else TypeError()  # pyright: ignore[reportUnnecessaryIsInstance] -- a user's
            safely(made.was_answered, wrong, self._name(request.method, wrong))
            safely(made.leave)
            return response

        return answer

    # --- the side that calls ---------------------------------------------------------------------------------------

    def begin(self, request: Request, where_to: Attributes | None = None) -> Call:
        """Begin a call, and make its span the current one."""
        attributes = _about(request.method) | (where_to or {})
        span = self._tracer.start_span(request.method, kind=SpanKind.CLIENT, attributes=attributes)
        made = Call(request.method, span, self._record_client)
        made.where = where_to or {}
        made.enter()
        return made

    def begin_attempt(self, request: Request) -> Call | None:
        """Begin an attempt of the call around it."""
        around = _current()
        if around is None or around.method != request.method:
            return None
        attributes = _about(request.method)
        if around.attempts:
            attributes["towline.resend_count"] = around.attempts
        around.attempts += 1
        span = self._tracer.start_span(request.method, kind=SpanKind.CLIENT, attributes=attributes)
        made = _Attempt(request.method, span, around)
        made.enter()
        return made

    def _carry(self, request: Request) -> Request:
        """The same request with the current context."""
        carrier: dict[str, str] = {}
        propagate.inject(carrier)
        if not carrier:
            return request
        metadata = {key: value for key, value in request.metadata.items() if key not in carrier}
        room = min(MAX_CONTEXT, MAX_METADATA - sum(len(key.encode()) + len(metadata[key]) + 3 for key in metadata))
        for key, text in carrier.items():
            value = text.encode()
            room -= len(key.encode()) + len(value) + 3
            if room < 0:
                break
            metadata[key] = value
        return Request(request.method, request.payload, metadata, is_stream=request.is_stream)

    # --- the side that is called -----------------------------------------------------------------------------------

    def _take(self, request: Request) -> Call:
        """Begin to answer a call, within what its caller says."""
        base = self._context_of(request)
        endpoint: Endpoint | None = getattr(request.peer, "endpoint", None)
        where_at = {} if endpoint is None else where(endpoint)
        attributes = _about(request.method) | where_at
        span = self._tracer.start_span(request.method, base, kind=SpanKind.SERVER, attributes=attributes)
        made = Call(request.method, span, self._record_server)
        made.where = where_at
        made.enter_handler(base)
        return made

    def _context_of(self, request: Request) -> Context:
        """What a caller has sent, and nothing of what happens to be current here."""
        carrier: dict[str, str] = {}
        room = MAX_CONTEXT
        for key in sorted(propagate.get_global_textmap().fields):
            value = request.metadata.get(key, b"")
            room -= len(value)
            if value and room >= 0:
                carrier[key] = value.decode(errors="replace")
        found = propagate.extract(carrier, Context())
        return found if self._takes_baggage else baggage.clear(found)

    def _name(self, method: str, error: BaseException | None) -> str:
        """A method's name, if there is such a method. A peer may ask for anything."""
        if method not in self._methods:
            if isinstance(error, CallFailed) and error.code in _TURNED_AWAY:
                return OTHER
            if len(self._methods) >= MAX_METHODS:
                return OTHER
            self._methods.add(method)
        return method


class _Attempt(Call):
    """An attempt, which is measured as a part of its call."""

    __slots__ = ("_of",)

    def __init__(self, method: str, span: Span, of: Call) -> None:
        super().__init__(method, span, None)
        self._of = of

    def went(self, attributes: Attributes) -> None:
        super().went(attributes)
        self._of.went(attributes)


class _Calls(Wrapper[Any, Any]):
    """A service with a span around each call that is a `Request`."""

    __slots__ = ("_begin",)

    def __init__(self, inner: Service[Any, Any], begin: Callable[[Request], Call | None]) -> None:
        super().__init__(inner)
        self._begin = begin

    async def __call__(self, request: Any, /) -> Any:
        made = safely(self._begin, request) if isinstance(request, Request) else None
        if made is None:
            return await self.inner(request)
        return await _within(made, self.inner, request)


async def _within(made: Call, inner: Service[Request, Response], request: Request) -> Response:
    try:
        response = await inner(request)
    except BaseException as error:
        safely(made.ended, error)
        safely(made.leave)
        raise
    if isinstance(response, Response) and response.stream is not None:  # pyright: ignore[reportUnnecessaryIsInstance] -- a user's
        # The call ends with its stream. Whoever uses that is not within its span.
        safely(made.last_as, response.stream)
    else:
        safely(made.ended, None)
    safely(made.leave)
    return response


def _is_cancellation(error: BaseException) -> bool:
    return not isinstance(error, Exception) and isinstance(error, anyio.get_cancelled_exc_class())


def _current() -> Call | None:
    found = context.get_value(CURRENT)
    # A task that was started within a call goes on with its context when the call is over.
    return found if isinstance(found, Call) and not found.is_over else None


def _about(method: str) -> Attributes:
    return {"rpc.system.name": NAME, "rpc.method": method}
