"""Rpc: calls over a connection. The protocol is RPC/1 (``docs/protocol.md``).

_wire     the frames                       _channel  what carries them
_core     the rules of one connection      _workers  the tasks in which handlers run
_messages what a call asks, and its answer _router   which handler answers which method
_stream   messages within a call           _peer     the shell: one end of a connection
_codec    values to bytes and back         _service  a class of methods, as a client and as a router
_typed    one method with types
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Final

import anyio

from towline.layers.resume import Session
from towline.link import Link
from towline.scope import Scope
from towline.service import Dial, Kind, Layer, Service, TwoSided
from towline.streams import FrameStream
from towline.text import differing
from towline.units import Bytes

from ._channel import Channel, FrameChannel, SessionChannel
from ._codec import Codec, Coder, DecodeError, JsonCodec, MsgspecCodec, Problem
from ._core import MAX_PIECE, Limits
from ._messages import Request, Response
from ._peer import LayeredPeer, Peer, Plain, handling, status_of
from ._router import Router
from ._service import client, method, router, service
from ._stream import Stream, open_stream
from ._typed import Typed, current_request
from ._wire import MAX_METADATA
from ._workers import Workers

__all__ = [
    "MIN_MESSAGE",
    "Codec",
    "Coder",
    "DecodeError",
    "JsonCodec",
    "MsgspecCodec",
    "Peer",
    "Plain",
    "Problem",
    "Request",
    "Response",
    "Router",
    "Rpc",
    "Stream",
    "Typed",
    "client",
    "current_request",
    "handling",
    "method",
    "open_stream",
    "router",
    "service",
    "status_of",
]


MIN_MESSAGE: Final = MAX_PIECE + 2 * MAX_METADATA
"""The longest frame: a piece of a payload, and a head with as much metadata and text as there may be."""


@dataclass(frozen=True)
class Rpc(TwoSided[Peer]):
    """Layer: calls, over sessions or frames. What connects then gives a service, and what serves is one.

    Each side may call the other over the same connection. A call carries a method's name, a payload and metadata, and
    its caller's deadline; it is answered once, with a response or with an error (`CallFailed`); or a stream of messages
    goes in both directions until then. Cancelling the caller cancels the handler.

    Needs messages or frames from the layer inside it; gives calls. Over `Resume` a link that is cut fails no call. When
    the connection is lost each pending call fails once, with an error that says whether it may have been carried out
    (``sent``): over `Resume` that is known exactly for what the peer has not received.

    Args:
        handler: answers what the listening side calls; None for nothing. What answers the dialling side is given to
            ``Stack.serve``.
        max_calls: calls of the peer's that may be open over one connection, 1 000. More are refused.
        max_message: the most bytes in a payload, or in a message of a stream, 4 MiB. More are refused.
        window: what the peer may send within a call before this side has taken it, in bytes of cost (64 and its length
            for each piece), 256 KiB. It bounds a stream to ``window / round trip``.
        max_running: handlers that run at once, over all connections of a server, 1 000.
        max_waiting: calls that wait for a handler to be free, over all connections, 10 000. More are refused.
        reveals_errors: whether a caller is told the text of an exception that a handler did not mean for it. By default
            it is told only that it was INTERNAL, and the text is logged.
        outgoing: a layer around every call that this end makes over a connection, whoever makes it. It is called once
            for each connection, with a `Plain`, which says over which; a layer outside this one is once for all.
        incoming: a layer around whatever answers calls here, outside all others; called once for each connection, too.

    Raises:
        ValueError: if a limit is below 1, or ``window`` below 64 KiB.

    >>> Rpc(max_running=10)
    Rpc(max_running=10)
    """

    needs: ClassVar[tuple[Kind, ...]] = (Kind.MESSAGES, Kind.FRAMES)
    gives: ClassVar[Kind] = Kind.CALLS
    wire: ClassVar[str] = "rpc/1"

    handler: Service[Request, Response] | None = field(default=None, compare=False)
    max_calls: int = 1_000
    max_message: Bytes = 4 << 20
    window: Bytes = 256 << 10
    max_running: int = 1_000
    max_waiting: int = 10_000
    reveals_errors: bool = False
    outgoing: Callable[[Plain], Service[Request, Response]] | None = field(default=None, compare=False, kw_only=True)
    incoming: Layer | None = field(default=None, compare=False, kw_only=True)

    __repr__ = differing

    def __post_init__(self) -> None:
        for name in ("max_calls", "max_message", "max_running", "max_waiting"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, where 1 or more is expected")
        if self.window < MAX_PIECE:
            raise ValueError(f"window is {self.window:,}, where {MAX_PIECE:,} or more is expected")

    @property
    def limits(self) -> Limits:
        """What one side holds at most, for one connection."""
        return Limits(max_calls=self.max_calls, max_message=self.max_message, window=self.window)

    def _workers(self, scope: Scope) -> Workers:
        return Workers(scope.task_group, most=self.max_running, max_waiting=self.max_waiting)

    def _peer(
        self,
        channel: Channel,
        scope: Scope,
        workers: Workers,
        handler: Service[Request, Response] | None,
        *,
        dials: bool,
    ) -> Peer:
        if handler is not None and self.incoming is not None:
            handler = self.incoming(handler)
        make = Peer if self.outgoing is None else partial(LayeredPeer, outgoing=self.outgoing)
        return make(
            channel,
            self.limits,
            is_dialling=dials,
            workers=workers,
            handler=handler,
            clock=scope.clock,
            reveals_errors=self.reveals_errors,
        )

    def connector(self, inner: Service[Dial, Any], scope: Scope) -> Service[Dial, Peer]:
        workers = self._workers(scope)

        async def connect(dial: Dial, /) -> Peer:
            peer = self._peer(_channel(await inner(dial), scope), scope, workers, self.handler, dials=True)
            scope.task_group.start_soon(peer.run)
            return peer

        return connect

    def acceptor(self, inner: Service[Any, Any], scope: Scope) -> Service[Any, None]:
        return _RpcServer(self, inner, scope).accept


class _RpcServer:
    """All connections of one listening stack."""

    def __init__(self, rpc: Rpc, handler: Service[Request, Response], scope: Scope) -> None:
        self._rpc = rpc
        self._handler = handler
        self._scope = scope
        self._workers = rpc._workers(scope)
        self._peers: set[Peer] = set()
        self._is_draining = False
        scope.servers.append(self)

    async def accept(self, connection: Any, /) -> None:
        channel = _channel(connection, self._scope)
        peer = self._rpc._peer(channel, self._scope, self._workers, self._handler, dials=False)
        self._peers.add(peer)
        try:
            if self._is_draining:
                peer.go_away()
            await peer.run()
        finally:
            self._peers.discard(peer)
        if isinstance(channel, FrameChannel):  # a session is closed by what holds it
            await channel.aclose()
            await channel.wait_closed()

    @property
    def sessions(self) -> Sequence[Any]:
        """None of its own: those of the layer inside are counted there."""
        return ()

    async def drain(self, deadline: float) -> int:
        """Take no further calls, tell every peer, and wait until those that are open are answered."""
        self._is_draining = True
        with anyio.move_on_after(deadline):
            for peer in [*self._peers]:
                peer.go_away()
            for peer in [*self._peers]:
                await peer.wait_answered()
        return 0


def _channel(connection: Any, scope: Scope) -> Channel:
    if isinstance(connection, Session):
        return SessionChannel(connection)
    assert isinstance(connection, Link)
    connection.established()
    stream = FrameStream(connection)
    scope.task_group.start_soon(stream.run)
    return FrameChannel(stream)
