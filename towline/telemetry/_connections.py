"""Spans of connections, and what else Resume, Encryption and Heartbeat tell.

A connection is one link of a session: its span begins when the link is looked for, or with the first handshake where it
was accepted, and ends when the link is lost. It is linked to that of the connection before. The client's is the current
one while it dials, so that what happens then becomes its child; later nothing happens within it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextvars import Token
from typing import Any, Final, NamedTuple
from weakref import WeakKeyDictionary, WeakValueDictionary

import anyio
from opentelemetry import context, trace
from opentelemetry.context import Context
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.trace import Span, SpanContext, Status
from opentelemetry.trace import StatusCode as SpanStatus

from towline.errors import TowlineError
from towline.hooks import (
    ConnectBegan,
    ConnectEnded,
    HandshakeEnded,
    Hooks,
    LinkAttached,
    LinkDetached,
    RoundTripMeasured,
    SessionEnded,
)
from towline.layers.resume import ClientSession, Session, State
from towline.link import Link
from towline.service import Dial, Service, Side, Wrapper

from ._names import CURRENT, Attributes, Instruments, error_type, where
from ._safe import safely

__all__ = ["ConnectionHooks"]

_SIDE: Final = "towline.side"


class _Looking:
    """A client looks for a link: the connection begins.

    Attributes:
        span: the connection's.
        parent: the context in which the session was asked for.
        dials: how many were begun.
        is_found: there is a link.
        is_over: nobody looks any more.
    """

    __slots__ = ("dials", "is_found", "is_over", "parent", "span", "token")

    def __init__(self, span: Span, parent: Context) -> None:
        self.span = span
        self.parent = parent
        self.dials = 0
        self.is_found = False
        self.is_over = False
        inside = trace.set_span_in_context(span, parent)
        self.token: Token[Context] = context.attach(context.set_value(CURRENT, self, inside))


class _Line:
    """The connections of a session, one after another.

    Attributes:
        parent: the context of each.
        span: that of the connection there is; None while there is none.
        last: the latest one, and its number.
        lost_at: when it was lost, in seconds of the session's clock.
    """

    __slots__ = ("epoch", "last", "lost_at", "parent", "span")

    def __init__(self, parent: Context) -> None:
        self.parent = parent
        self.span: Span | None = None
        self.last: SpanContext | None = None
        self.epoch = 0
        self.lost_at: float | None = None

    @property
    def links(self) -> list[trace.Link]:
        return [] if self.last is None else [trace.Link(self.last, {"towline.epoch": self.epoch})]


class _Handshake(NamedTuple):
    """One that is over, with its times in nanoseconds."""

    layer: str
    began: int
    ended: int
    error: BaseException | None


class ConnectionHooks(Hooks):
    """Makes spans and measurements of what is told of links and sessions."""

    def __init__(self, tracer: trace.Tracer, instruments: Instruments) -> None:
        self._tracer = tracer
        self._instruments = instruments
        self._lines: WeakKeyDictionary[Session, _Line] = WeakKeyDictionary()
        self._spans: WeakKeyDictionary[Link, Span] = WeakKeyDictionary()  # of the connections over them
        self._accepted: WeakKeyDictionary[Link, list[_Handshake]] = WeakKeyDictionary()  # as long as they are strangers
        self._sessions: WeakValueDictionary[int, Session] = WeakValueDictionary()

    # --- the side that dials ---------------------------------------------------------------------------------------

    def on_connect_begin(self, event: ConnectBegan, /) -> None:
        line = None if event.session is None else self._lines.get(event.session)
        if line is None:
            line = _Line(context.get_current())
        attributes: Attributes = {_SIDE: Side.DIALLING.value}
        span = self._tracer.start_span("towline.connection", line.parent, links=line.links, attributes=attributes)
        _Looking(span, line.parent)

    def on_connect_end(self, event: ConnectEnded, /) -> None:
        looking = _looking()
        if looking is None:
            return
        looking.is_over = True
        context.detach(looking.token)
        if not looking.is_found:
            _end(looking.span, event.error)

    def dials(self, inner: Service[Dial, Any], /) -> Service[Dial, Any]:
        """What connects, with a span around each attempt."""
        return _Dials(inner, self.begin_dial)

    def begin_dial(self, dial: Dial) -> Callable[[BaseException | None], None] | None:
        """Begin an attempt; says what ends it."""
        looking = _looking()
        if looking is None:  # it is a probe
            return None
        attributes = where(dial.endpoint)
        if looking.dials:
            attributes["towline.resend_count"] = looking.dials
        looking.dials += 1
        span = self._tracer.start_span("towline.dial", attributes=attributes)
        token = context.attach(trace.set_span_in_context(span))

        def end(error: BaseException | None) -> None:
            context.detach(token)
            _end(span, error)

        return end

    # --- both sides ------------------------------------------------------------------------------------------------

    def on_handshake(self, event: HandshakeEnded, /) -> None:
        link, error = event.link, event.error
        if error is not None:
            about: Attributes = {"towline.layer": event.layer, _SIDE: link.side.value, "error.type": _type(error)}
            code = getattr(error, "code", None)
            if code is not None:
                about["towline.reason"] = code.name.lower()
            self._instruments.handshake_failures(1, about)
        now = time.time_ns()
        handshake = _Handshake(event.layer, now - round(event.elapsed * 1e9), now, error)
        span = self._spans.get(link)
        if span is not None:
            self._add(handshake, trace.set_span_in_context(span))
        elif link.side.is_dialling:
            if _looking() is not None:
                self._add(handshake, context.get_current())
        elif error is None:
            self._accepted.setdefault(link, []).append(handshake)

    def _add(self, handshake: _Handshake, parent: Context) -> None:
        attributes: Attributes = {"towline.layer": handshake.layer}
        span = self._tracer.start_span("towline.handshake", parent, attributes=attributes, start_time=handshake.began)
        _end(span, handshake.error, handshake.ended)

    def on_attach(self, event: LinkAttached, /) -> None:
        session, link = event.session, event.link
        line = self._lines.get(session)
        looking = _looking() if link.side.is_dialling else None
        if line is None:
            line = self._lines[session] = _Line(Context() if looking is None else looking.parent)
        if looking is None:
            span = self._accept(link, line)
        else:
            looking.is_found = True
            span = looking.span
        line.span, line.last, line.epoch = span, span.get_span_context(), session.epoch
        self._spans[link] = span
        self._sessions[id(session)] = session
        side: Attributes = {_SIDE: link.side.value}
        if span.is_recording():
            span.set_attributes(where(link.endpoint) | {"towline.epoch": session.epoch})
            if event.is_resumed:
                again = {"towline.replayed.messages": event.replayed, "towline.replayed.size": event.replayed_bytes}
                span.add_event("towline.resumed", again)
            else:
                span.add_event("towline.established")
        if event.is_resumed:
            measure = self._instruments
            measure.resumes(1, side)
            measure.replayed(event.replayed, side)
            measure.replayed_bytes(event.replayed_bytes, side)
            if line.lost_at is not None:
                measure.outages(session.scope.clock() - line.lost_at, side)

    def _accept(self, link: Link, line: _Line) -> Span:
        """The span of a connection that was accepted: it has begun with the first handshake."""
        handshakes = self._accepted.pop(link, [])
        span = self._tracer.start_span(
            "towline.connection",
            line.parent,
            links=line.links,
            attributes={_SIDE: link.side.value},
            start_time=handshakes[0].began if handshakes else None,
        )
        for handshake in handshakes:
            self._add(handshake, trace.set_span_in_context(span))
        return span

    def on_detach(self, event: LinkDetached, /) -> None:
        session = event.session
        line = self._lines.get(session)
        if line is None:
            return
        line.lost_at = session.scope.clock()
        span, line.span = line.span, None
        is_cut = event.is_lost and session.state is not State.CLOSED
        cause = event.error.__cause__
        error = cause if isinstance(cause, TowlineError) else event.error
        if is_cut and not session.state.is_over:
            self._instruments.cuts(1, {_SIDE: event.link.side.value, "error.type": _type(error)})
        if span is not None:
            _end(span, error if is_cut else None)

    def on_session_end(self, event: SessionEnded, /) -> None:
        self._sessions.pop(id(event.session), None)

    def on_round_trip(self, event: RoundTripMeasured, /) -> None:
        self._instruments.round_trips(event.seconds, {_SIDE: event.link.side.value})

    # --- what is looked at -----------------------------------------------------------------------------------------

    def sessions(self, options: CallbackOptions, /) -> Iterable[Observation]:
        counts = {(side, state): 0 for side in Side for state in (State.ATTACHED, State.DETACHED)}
        for session in self._alive():
            if not session.state.is_over:
                counts[_side_of(session), session.state] += 1
        for (side, state), count in counts.items():
            yield Observation(count, {_SIDE: side.value, "towline.session.state": state.value})

    def buffers(self, options: CallbackOptions, /) -> Iterable[Observation]:
        return self._sums(lambda session: session.buffered)

    def credits(self, options: CallbackOptions, /) -> Iterable[Observation]:
        return self._sums(lambda session: session.credit)

    def _sums(self, of: Callable[[Session], int]) -> Iterable[Observation]:
        sums = dict.fromkeys(Side, 0)
        for session in self._alive():
            sums[_side_of(session)] += of(session)
        return [Observation(total, {_SIDE: side.value}) for side, total in sums.items()]

    def _alive(self) -> list[Session]:
        # At once, since somebody may collect in a thread of its own.
        found = [reference() for reference in self._sessions.valuerefs()]
        return [session for session in found if session is not None]


class _Dials(Wrapper[Dial, Any]):
    __slots__ = ("_begin",)

    def __init__(
        self, inner: Service[Dial, Any], begin: Callable[[Dial], Callable[[BaseException | None], None] | None]
    ) -> None:
        super().__init__(inner)
        self._begin = begin

    async def __call__(self, dial: Dial, /) -> Any:
        end = safely(self._begin, dial)
        if end is None:
            return await self.inner(dial)
        try:
            link = await self.inner(dial)
        except BaseException as error:
            safely(end, error)
            raise
        safely(end, None)
        return link


def _looking() -> _Looking | None:
    found = context.get_value(CURRENT)
    # One that is over is still seen by the tasks that were started meanwhile.
    return found if isinstance(found, _Looking) and not found.is_over else None


def _side_of(session: Session) -> Side:
    return Side.DIALLING if isinstance(session, ClientSession) else Side.LISTENING


def _type(error: BaseException) -> str:
    return "CANCELLED" if isinstance(error, anyio.get_cancelled_exc_class()) else error_type(error)


def _end(span: Span, error: BaseException | None, at: int | None = None) -> None:
    if error is not None and span.is_recording():
        span.set_attribute("error.type", _type(error))
        span.set_status(Status(SpanStatus.ERROR))
    span.end(at)
