"""Tracing and metrics by OpenTelemetry: spans for calls and connections, and instruments for what happens to them.

_names        the names, units and attributes, as a table    _calls  spans and durations of calls
_connections  spans of connections, from what layers tell    _retries  what Retry and CircuitBreaker tell
_safe         what may fail here, and harms nothing

Nothing else in Towline knows OpenTelemetry. Only its API is needed; without an SDK behind it nothing is put around
anything. The names are in ``docs/reference/telemetry.md``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from typing import Any, ClassVar, Final

from opentelemetry import metrics, trace
from typing_extensions import TypeVar

from towline.errors import StackError
from towline.hooks import AllOf, Hooks
from towline.layers import CircuitBreaker, Reconnect, Resume, Retry, Rpc
from towline.layers.rpc import Plain, Request, Response
from towline.service import Layer, Service, TwoSided
from towline.stack import Stack
from towline.transport import Transport

from ._calls import Tracer
from ._connections import ConnectionHooks
from ._names import NAME, SCHEMA_URL, Instruments
from ._retries import Breakers, RetryHooks
from ._safe import safely

__all__ = ["Telemetry"]

Q = TypeVar("Q", default=Any)
R = TypeVar("R", default=Any)
InQ = TypeVar("InQ", default=Any)
InR = TypeVar("InR", default=Any)

_VERSION: Final = version("towline")

_STAND_INS: Final = ("opentelemetry.trace", "opentelemetry.metrics")
"""Where the API keeps what stands in for an SDK that is not there. What comes from anywhere else listens."""


class Telemetry:
    """What tells OpenTelemetry of calls and connections: one for a program, or for a part of it.

        telemetry = Telemetry()
        stack = telemetry.instrument(Stack(Rpc(), Resume(), Retry(), Framing()))

    Args:
        tracer_provider: where spans go; the global one by default, as it is when a stack is opened.
        meter_provider: where measurements go; the same.
        takes_baggage: whether a handler sees the baggage that its caller has sent. Only for callers that are trusted.

    >>> Telemetry().is_heard  # without an SDK
    False
    """

    def __init__(
        self,
        *,
        tracer_provider: trace.TracerProvider | None = None,
        meter_provider: metrics.MeterProvider | None = None,
        takes_baggage: bool = False,
    ) -> None:
        self._tracer_provider = tracer_provider
        self._meter_provider = meter_provider
        self._takes_baggage = takes_baggage
        self._parts: _Parts | None = None

    @property
    def is_heard(self) -> bool:
        """Whether anybody listens now."""
        return self._find_parts() is not None

    def instrument(self, stack: Stack[Q, R, InQ, InR], /) -> Stack[Q, R, InQ, InR]:
        """The same stack, which tells of what happens in it. Instrument a stack as a whole, and once.

        Whether anybody listens is seen each time that it is opened, or put around a service: an SDK may be set up
        later than the stack. If nobody does, it is the stack that was given, and costs nothing.

        Raises:
            StackError: if it, or a part of it, is instrumented already.

        >>> from towline import Retry, Timeout
        >>> Telemetry().instrument(Stack(Timeout(5), Retry()))
        Stack(Timeout(seconds=5), Retry())
        """
        return _Instrumented(self, *stack._within_another(), transports=stack.transports)

    def _find_parts(self) -> _Parts | None:
        """Everything that is made once for all stacks; None while nobody listens."""
        if self._parts is None:
            tracers = self._tracer_provider or trace.get_tracer_provider()
            meters = self._meter_provider or metrics.get_meter_provider()
            if _listens(tracers) or _listens(meters):
                tracer = tracers.get_tracer(NAME, _VERSION, SCHEMA_URL)
                meter = meters.get_meter(NAME, _VERSION, SCHEMA_URL)
                if _listens(tracer) or _listens(meter):  # an SDK may be there, and be turned off
                    self._parts = _Parts(tracer, meter, takes_baggage=self._takes_baggage)
        return self._parts


def _listens(part: object) -> bool:
    # The API's own provider is asked nothing: it remembers each meter that it gives.
    return not type(part).__module__.startswith(_STAND_INS)


class _Parts:
    """What listens, and what tells it."""

    def __init__(self, tracer: trace.Tracer, meter: metrics.Meter, *, takes_baggage: bool) -> None:
        instruments = Instruments(meter)
        self._calls = Tracer(tracer, instruments, takes_baggage=takes_baggage)
        self._connections = ConnectionHooks(tracer, instruments)
        self._breakers = Breakers()
        self._retries = {operation: RetryHooks(operation, instruments) for operation in ("call", "dial")}
        links = self._connections
        instruments.observe(links.sessions, links.buffers, links.credits, self._breakers.observe)

    def instrumented(self, layers: tuple[Any, ...]) -> list[Any]:
        """These layers with what tells of them, in them and between them."""
        reconnect, resume = _find(layers, Reconnect), _find(layers, Resume)
        # Around calls stand the layers outside a Reconnect, and all of a stack that makes no connection; all others
        # stand around connecting.
        connects = reconnect is not None or _find(layers, TwoSided) is not None
        calls = range(reconnect or 0) if connects else range(len(layers))
        found = [self._told(layer, "call" if position in calls else "dial") for position, layer in enumerate(layers)]
        # From the inside out, so that the positions hold.
        if resume is not None:
            retry = _find(layers, Retry, range(len(layers) - 1, resume, -1))
            found.insert((resume if retry is None else retry) + 1, _Dialling(self._connections.dials))
        if calls or reconnect is not None:
            retry = _find(layers, Retry, reversed(calls))
            if retry is not None:
                found.insert(retry + 1, _Dialling(self._calls.attempts))
            found.insert(0, _Dialling(self._calls.calls))
        return found

    def _told(self, layer: Any, operation: str) -> Any:
        takes_hooks = hasattr(layer, "hooks")
        match layer:
            case Retry():
                return _with_hooks(layer, self._retries[operation])
            case CircuitBreaker():
                return _with_hooks(layer, self._breakers)
            case Rpc():
                return dataclasses.replace(layer, outgoing=self._outgoing(layer), incoming=self._incoming(layer))
            case TwoSided() if takes_hooks:  # Resume, Encryption, Heartbeat, and what wraps one
                return _with_hooks(layer, self._connections)
            case _:
                return layer

    def _outgoing(self, rpc: Rpc) -> Callable[[Plain], Service[Request, Response]]:
        theirs = rpc.outgoing
        return lambda plain: self._calls.outgoing(plain if theirs is None else theirs(plain), plain.peer)

    def _incoming(self, rpc: Rpc) -> Layer:
        theirs = rpc.incoming

        def incoming(handler: Service[Any, Any], /) -> Service[Any, Any]:
            return self._calls.incoming(handler if theirs is None else theirs(handler))

        return incoming


def _find(layers: Sequence[Any], kind: type, positions: Iterable[int] | None = None) -> int | None:
    """The first position, of all or of these, at which such a layer stands."""
    among = range(len(layers)) if positions is None else positions
    return next((position for position in among if isinstance(layers[position], kind)), None)


def _with_hooks(layer: Any, hooks: Hooks) -> Any:
    """The layer with these hooks beside its own, which are told first."""
    return dataclasses.replace(layer, hooks=hooks if layer.hooks is None else AllOf(layer.hooks, hooks))


class _Dialling:
    """A layer for the dialling side."""

    client_only: ClassVar[bool] = True

    def __init__(self, layer: Callable[[Service[Any, Any]], Service[Any, Any]]) -> None:
        self._layer = layer

    def __call__(self, inner: Service[Any, Any], /) -> Service[Any, Any]:
        return self._layer(inner)


class _Instrumented(Stack[Q, R, InQ, InR]):
    """A stack that tells of itself as soon as somebody listens."""

    def __init__(self, telemetry: Telemetry, *layers: Any, transports: tuple[Transport, ...]) -> None:
        Stack.__init__(self, *layers, transports=transports)  # pyright: ignore[reportUnknownMemberType]
        self._telemetry = telemetry

    def _like(self, *layers: Any) -> Stack:
        return _Instrumented(self._telemetry, *layers, transports=self.transports)

    def _within_another(self) -> tuple[Any, ...]:
        raise StackError("this stack is instrumented: instrument the whole instead, and once")

    def _to_open(self) -> Stack[Q, R, InQ, InR]:
        parts = safely(self._telemetry._find_parts)
        if parts is None:
            return self
        opened: Stack[Any, Any, Any, Any] = Stack(*parts.instrumented(self.layers), transports=self.transports)
        return opened
